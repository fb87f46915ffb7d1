"""The tracer: what fx records, and what it refuses, with the user's line."""

from __future__ import annotations

import builtins
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.dataflow import fields_of
from fxquant.op_view import OUT_OF_PLACE_OPERATORS
from fxquant.shape_guards import ExampleValues, shape_guard
from fxquant.shapes import is_user_code


def _writing(target: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: fx.Proxy, other: Any) -> Any:
        name = OUT_OF_PLACE_OPERATORS[target].__name__.rstrip("_")
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=name)

    return call


class _WritableProxy(fx.Proxy):
    """A proxy for which ``x += y`` writes ``x``, which other names of the tensor see too.

    fx records ``x = x + y``.
    """


for _target in OUT_OF_PLACE_OPERATORS:
    setattr(_WritableProxy, f"__{_target.__name__}__", _writing(_target))


class CaptureTracer(fx.Tracer):
    """An fx tracer that records ``max`` of shapes and makes leaves of what cannot be traced.

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
        self._thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that records what is written in place."""
        return _WritableProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Record a call for a dataclass that is a dict, too; fx keeps a dict, without its class."""
        if is_dataclass(a) and issubclass(type(a), dict):
            given = {name: self.create_arg(value) for name, value in fields_of(a).items()}
            return self.create_node("call_function", type(a), (), given)
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a condition on shapes by the example inputs and leave a guard in the graph.

        Conditions on tensor values, and all conditions where there are no example inputs, are
        refused as fx refuses them.
        """
        value = self.example_value(obj)
        if not isinstance(value, (bool, int, float)):
            return super().to_bool(obj)
        line = _line_of(traceback.extract_stack())
        self.create_proxy("call_function", shape_guard, (obj, bool(value), line), {})
        self.conditions[line] = bool(value)
        return bool(value)

    def example_value(self, obj: fx.Proxy) -> Any:
        """The value of ``obj`` with the example inputs; ``None`` where they do not run."""
        if self.examples is None:
            return None
        try:
            return self.examples.of(obj.node, self.root)
        except Exception:  # noqa: BLE001  # the examples do not run; record_shapes says so with the reason
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
        """Trace a submodule's call, noting the innermost submodule that refuses.

        fx patches ``nn.Module.__call__`` for the whole process while it traces: calls from other
        threads pass.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if _is_functional_stub(self.root, m):
            return args[0]
        try:
            return super().call_module(m, forward, args, kwargs)
        except Refused:
            raise
        except Exception as error:
            path = self.path_of_module(m)
            if path in self.islands or not path:
                raise
            raise Refused(path, user_line(error), error) from error


def _is_functional_stub(root: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is what a ``FloatFunctional`` of torch.ao passes its results through.

    ``self.skip_add.add(x, y)`` is ``torch.add(x, y)``, and an identity for eager mode to replace.
    """
    return type(module) is nn.Identity and any(
        type(holder).__name__ == "FloatFunctional"
        and getattr(holder, "activation_post_process", None) is module
        for holder in root.modules()
    )


class Refused(Exception):
    """A submodule's forward could not be traced."""

    def __init__(self, path: str, line: str, cause: Exception) -> None:
        super().__init__(path)
        self.path = path
        self.line = line
        self.cause = cause


@contextmanager
def recording_builtins() -> Iterator[None]:
    """Let ``max`` and ``min`` over traced values become nodes instead of comparisons.

    ``max((ceil(h / s) - 1) * s + k - h, 0)`` is how TensorFlow's SAME padding is written; compared
    while tracing it raises, recorded it stays right at every resolution.
    """
    originals = {"max": builtins.max, "min": builtins.min}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and isinstance(args[0], Iterator):
                args = (list(args[0]),)
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


@contextmanager
def own_gradients() -> Iterator[None]:
    """Refuse functions with a ``backward`` of their own: a trace would keep only their forward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if _find_proxy(args) is not None:
            raise fx.proxy.TraceError(
                f"{cls.__name__} is an autograd function with its own gradient"
            )
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]  # put back below
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]  # as it was


def _find_proxy(args: tuple[Any, ...]) -> fx.Proxy | None:
    items = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return next((item for item in items if isinstance(item, fx.Proxy)), None)


def first_line(error: BaseException) -> str:
    """The first line of a message, or the kind of an error that has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def user_line(error: BaseException) -> str:
    """``file:line, in function: source`` of the innermost frame outside torch and fxquant."""
    return _line_of(traceback.extract_tb(error.__traceback__))


def _line_of(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if is_user_code(frame.filename):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
    return "unknown line"
