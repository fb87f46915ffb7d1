"""From a module to a float graph, on a copy: nothing of the caller's model is touched."""

from __future__ import annotations

import builtins
import copy
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import CaptureError, CaptureWarning, Diagnostics
from fxquant.graph_module import GraphState, QuantGraphModule, Stage
from fxquant.metadata import record_of, set_record, update_record
from fxquant.op_view import type_of
from fxquant.shape_guards import ExampleValues, shape_guard
from fxquant.shapes import as_arguments

_TRACE_LOCK = threading.Lock()
_PACKAGE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


class CaptureTracer(fx.Tracer):
    """An fx tracer that records ``max``/``min`` over shapes and turns what cannot be traced into
    leaves.

    Attributes:
        islands: paths of submodules that stay opaque, with the reason.
    """

    record_stack_traces = True

    def __init__(self, islands: dict[str, str], examples: ExampleValues | None = None) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.islands = islands
        self.examples = examples
        self.conditions: dict[str, bool] = {}

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a condition on shapes by the example inputs and leave a guard in the graph.

        Conditions on tensor values, and all conditions where there are no example inputs, are
        refused as fx refuses them.
        """
        value = None if self.examples is None else self._example_value(obj)
        if not isinstance(value, (bool, int, float)):
            return super().to_bool(obj)
        line = _line_of(traceback.extract_stack())
        self.create_proxy("call_function", shape_guard, (obj, bool(value), line), {})
        self.conditions[line] = bool(value)
        return bool(value)

    def _example_value(self, obj: fx.Proxy) -> Any:
        assert self.examples is not None
        try:
            return self.examples.of(obj.node, self.root)
        except Exception:  # the examples do not run; record_shapes says so with the reason
            return None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaf modules are those of ``torch.nn`` but containers, and the islands."""
        if module_qualified_name in self.islands or isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a submodule's call, noting the innermost submodule that refuses."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Refused:
            raise
        except Exception as error:
            path = self.path_of_module(m)
            if path in self.islands or not path:
                raise
            raise _Refused(path, _user_line(error), error) from error


class _Refused(Exception):
    """A submodule's forward could not be traced."""

    def __init__(self, path: str, line: str, cause: Exception) -> None:
        super().__init__(path)
        self.path = path
        self.line = line
        self.cause = cause


def capture(
    model: nn.Module, diagnostics: Diagnostics, example_inputs: object = None
) -> QuantGraphModule:
    """Trace ``model`` into a float graph with its own modules and tensors.

    A submodule whose ``forward`` cannot be traced becomes an opaque leaf, found automatically and
    named in a warning together with the user's line.

    Args:
        model: any module, or an already traced ``GraphModule``.
        diagnostics: takes the warnings.
        example_inputs: decide conditions on shapes (``if x.shape[-1] % 2:``), one branch of which
            is traced; ``None`` refuses such conditions.

    Raises:
        CaptureError: when the model itself, not a part of it, cannot be traced or copied.
    """
    owned = _own_copy(model)
    if isinstance(owned, fx.GraphModule) and _only_leaves(owned):
        graph = owned.graph
        gm = QuantGraphModule(owned, graph, type(model).__name__)
    else:
        gm = _trace(owned, diagnostics, example_inputs)
    gm.training = model.training
    gm.meta.update(getattr(model, "meta", {}) if isinstance(model, fx.GraphModule) else {})
    _record_scopes(gm)
    names = tuple(str(n.target) for n in gm.graph.nodes if n.op == "placeholder")
    gm.__dict__["_state"] = GraphState(stage=Stage.FLOAT, signature=names)
    return gm


def _own_copy(model: nn.Module) -> nn.Module:
    if any(p.device.type == "meta" for p in model.parameters()):
        raise CaptureError(
            "the model's parameters are on the 'meta' device and hold no values; load real weights"
            " (model.to_empty(device='cpu') and load_state_dict) before quantizing"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]  # the mixin is typed for subclasses only
            raise CaptureError(
                f"module {name!r} ({type(module).__name__}) is lazy and not initialised yet; run"
                " the model once on a real input before quantizing"
            )
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses tensors with history
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({error}); fxquant works on a copy"
            " so that the caller's model stays as it is. Remove or define __deepcopy__ for the"
            " attribute that refuses"
        ) from error


def _only_leaves(gm: fx.GraphModule) -> bool:
    tracer = fx.Tracer()
    return all(
        tracer.is_leaf_module(gm.get_submodule(str(n.target)), str(n.target))
        for n in gm.graph.nodes
        if n.op == "call_module"
    )


def _trace(
    model: nn.Module, diagnostics: Diagnostics, example_inputs: object
) -> QuantGraphModule:
    islands: dict[str, str] = {}
    while True:
        args, kwargs = as_arguments(example_inputs)
        usable = example_inputs is not None and not kwargs
        tracer = CaptureTracer(islands, ExampleValues(args) if usable else None)
        try:
            with _TRACE_LOCK, _recording_builtins(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a trace runs the user's code on proxies
                graph = tracer.trace(model)
        except _Refused as refused:
            if refused.path in islands:
                raise CaptureError(
                    f"module {refused.path!r} cannot be traced: {refused.cause}"
                ) from refused.cause
            islands[refused.path] = f"{refused.line}: {_first_line(refused.cause)}"
            continue
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__}.forward cannot be traced: {_first_line(error)}"
                f" ({_user_line(error)}). Move the untraceable part into a submodule: it then stays"
                " in floating point and the rest is quantized"
            ) from error
        break
    for line, value in tracer.conditions.items():
        diagnostics.warn(
            f"the condition on a shape at {line} is fixed to {value}, as for the example inputs;"
            " inputs that take the other branch will raise an error",
            CaptureWarning,
        )
    for path, line in islands.items():
        diagnostics.warn(
            f"module {path!r} ({type(model.get_submodule(path)).__name__}) cannot be traced and"
            f" stays in FP32 as an opaque island: {line}. Rewrite that line without control flow on"
            " tensor values to have it quantized",
            CaptureWarning,
        )
    gm = QuantGraphModule(model, graph, type(model).__name__)
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in islands:
            update_record(
                node, reasons=(f"opaque island: cannot be traced, {islands[str(node.target)]}",)
            )
    return gm


def _record_scopes(gm: QuantGraphModule) -> None:
    counts: dict[tuple[str, Any], int] = {}
    for node in gm.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if node.op == "call_module":
            target = str(node.target)
            stack = [entry for entry in stack if entry[0] != target]
        scope = str(stack[-1][0]) if stack else ""
        record = record_of(node)
        if node.op in ("call_module", "call_function", "call_method"):
            key = (scope, type_of(gm, node))
            counts[key] = counts.get(key, -1) + 1
            index = counts[key]
            origins: tuple[str, ...] = (node.name,)
        else:
            index, origins = 0, ()
        set_record(node, record)
        update_record(
            node,
            scope=scope,
            scope_types=tuple(entry[1] for entry in stack if isinstance(entry[1], type)),
            call_index=index,
            origins=origins,
        )


@contextmanager
def _recording_builtins() -> Iterator[None]:
    """Let ``max`` and ``min`` over traced values become nodes instead of comparisons.

    ``max((ceil(h / s) - 1) * s + k - h, 0)`` is how TensorFlow's SAME padding is written; compared
    while tracing it raises, recorded it stays right at every resolution.
    """
    originals = {"max": builtins.max, "min": builtins.min}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            proxy = _find_proxy(args)
            if proxy is None:
                return original(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", original, args, kwargs)

        return call

    for name, original in originals.items():
        setattr(builtins, name, recording(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(builtins, name, original)


def _find_proxy(args: tuple[Any, ...]) -> fx.Proxy | None:
    items = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return next((item for item in items if isinstance(item, fx.Proxy)), None)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _user_line(error: BaseException) -> str:
    """``file:line, in function: source`` of the innermost frame outside torch and fxquant."""
    return _line_of(traceback.extract_tb(error.__traceback__))


def _line_of(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        path = Path(frame.filename)
        inside = _PACKAGE in path.parents and _PACKAGE / "models_zoo" not in path.parents
        if inside or _TORCH in path.parents:
            continue
        return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
    return "unknown line"
