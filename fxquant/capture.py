"""From a module to a float graph, on a copy: nothing of the caller's model is touched."""

from __future__ import annotations

import builtins
import copy
import functools
import inspect
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.aten import import_aten, is_aten
from fxquant.attention import drop_unread, spell_out
from fxquant.dataflow import fields_of
from fxquant.errors import (
    CaptureError,
    CaptureWarning,
    ConfigError,
    Diagnostics,
    UntraceableError,
    did_you_mean,
)
from fxquant.graph_module import GraphState, QuantGraphModule, Stage, set_attribute
from fxquant.metadata import record_of, set_record, update_record
from fxquant.op_view import OUT_OF_PLACE_OPERATORS, type_of
from fxquant.optional_inputs import same_but_for
from fxquant.reparametrized import settle
from fxquant.shape_guards import ExampleValues, shape_guard
from fxquant.shapes import Examples, bind_examples, is_user_code

_TRACE_LOCK = threading.Lock()
_SCRIPT = "it is TorchScript, which torch.fx cannot look into"


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
        except _Refused:
            raise
        except Exception as error:
            path = self.path_of_module(m)
            if path in self.islands or not path:
                raise
            raise _Refused(path, _user_line(error), error) from error


def _is_functional_stub(root: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is what a ``FloatFunctional`` of torch.ao passes its results through.

    ``self.skip_add.add(x, y)`` is ``torch.add(x, y)``, and an identity for eager mode to replace.
    """
    return type(module) is nn.Identity and any(
        type(holder).__name__ == "FloatFunctional"
        and getattr(holder, "activation_post_process", None) is module
        for holder in root.modules()
    )


class _Refused(Exception):
    """A submodule's forward could not be traced."""

    def __init__(self, path: str, line: str, cause: Exception) -> None:
        super().__init__(path)
        self.path = path
        self.line = line
        self.cause = cause


def capture(
    model: nn.Module,
    diagnostics: Diagnostics,
    example_inputs: object = None,
    *,
    share: bool = False,
    keep: bool = False,
    trains: bool = False,
    leaves: Mapping[str, str] | None = None,
    concrete_args: Mapping[str, Any] | None = None,
    strict_capture: bool = False,
    keep_inputs: bool = False,
) -> QuantGraphModule:
    """Trace ``model`` into a float graph with its own modules and tensors.

    A submodule whose ``forward`` cannot be traced becomes an opaque leaf, an *island*. It is found
    automatically and listed, with the user's line, in ``GraphState.islands``; telling the user is
    left to the caller (:func:`warn_of_islands`), who may make more of it.

    Args:
        model: any module, or an already traced ``GraphModule``.
        diagnostics: takes the warnings.
        example_inputs: decide conditions on shapes (``if x.shape[-1] % 2:``), one branch of which
            is traced; ``None`` refuses such conditions.
        share: let the parameters share the memory of the model's; :func:`take_apart` ends that.
            Weights that are computed from others (weight norm, ...) become plain parameters.
        keep: let the parameters be those of the model, which is a copy already.
        trains: the graph is to train: code with a gradient of its own is not traced through.
        leaves: paths of submodules that are not traced into, with the reason.
        concrete_args: inputs that are fixed to a value, by name.
        strict_capture: a submodule that cannot be traced is an error.
        keep_inputs: inputs that the examples leave out stay inputs where nothing asks for them;
            otherwise they are fixed to their defaults.

    Raises:
        CaptureError: when the model itself, not a part of it, cannot be traced or copied.
        UntraceableError: the ``forward`` of the model itself cannot be traced, or, under
            ``strict_capture``, that of a submodule.
        ConfigError: ``concrete_args`` names no input.
    """
    leaves = {} if leaves is None else leaves
    concrete_args = {} if concrete_args is None else concrete_args
    _check_state(model, diagnostics)
    copying = _Copying(share=share, keep=keep)
    islands: dict[str, str] = {}
    if isinstance(model, fx.GraphModule) and is_aten(model):
        exported = import_aten(copying.of(model))
        gm = QuantGraphModule(exported, exported.graph, type(model).__name__)
    elif isinstance(model, fx.GraphModule) and not concrete_args and _only_leaves(model, leaves):
        owned = copying.of(model)
        assert isinstance(owned, fx.GraphModule)
        _free_names(owned, owned.graph, diagnostics)
        gm = QuantGraphModule(owned, owned.graph, type(model).__name__)
    else:
        tracing = _Tracing(
            model,
            diagnostics,
            example_inputs,
            copying,
            leaves,
            concrete_args,
            strict_capture=strict_capture,
            trains=trains,
            keep_inputs=keep_inputs,
        )
        gm, islands = tracing.run()
    _copy_training_flags(model, gm)
    gm.meta.update(getattr(model, "meta", {}) if isinstance(model, fx.GraphModule) else {})
    _record_scopes(gm)
    names = tuple(str(n.target) for n in gm.graph.nodes if n.op == "placeholder")
    gm.__dict__["_state"] = GraphState(
        stage=Stage.FLOAT, signature=names, islands=tuple(islands.items())
    )
    return gm


def warn_of_islands(gm: QuantGraphModule, diagnostics: Diagnostics) -> None:
    """Tell of the islands of a graph that nothing will be made of."""
    for path, line in gm.state.islands:
        diagnostics.warn(
            f"module {path!r} ({type(gm.get_submodule(path)).__name__}) cannot be traced and stays"
            f" in FP32 as an opaque island: {line}. Rewrite that line without control flow on"
            " tensor values to have it quantized",
            CaptureWarning,
        )


def _copy_training_flags(model: nn.Module, gm: fx.GraphModule) -> None:
    """Containers that fx makes for the submodules of a graph train by default; take the model's."""
    flags = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in gm.named_modules(remove_duplicate=False):
        module.training = flags.get(name, module.training)


def _check_state(model: nn.Module, diagnostics: Diagnostics) -> None:
    """Refuse what has no values yet, and say what a graph does not hold."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"the model is TorchScript ({type(model).__name__}), which torch.fx cannot look into;"
            " pass the Python model that it was made from"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CaptureError(
            f"the model is wrapped in {type(model).__name__}; pass model.module, the model inside"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise CaptureError(
                f"{name!r} is on the 'meta' device and holds no values; load real weights"
                " (model.to_empty(device='cpu') and load_state_dict) before quantizing"
            )
    for name, module in model.named_modules():
        lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
        if lazy and module.has_uninitialized_params():
            raise CaptureError(
                f"module {name!r} ({type(module).__name__}) is lazy and not initialised yet; run"
                " the model once on a real input before quantizing"
            )
    if "forward" in vars(model) and not isinstance(model, fx.GraphModule):
        raise CaptureError(
            f"the forward of this {type(model).__name__} is replaced on the object, and a trace"
            " sees the forward of its class; wrap the model in a module whose forward calls it"
        )
    hooks = [
        hook
        for hook in (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
        if not str(getattr(hook, "__module__", "")).startswith("torch.export.")
    ]
    if hooks:
        names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
        diagnostics.warn(
            f"the model has the forward hook(s) {names}, which do not become part of the graph;"
            " call what they do in a forward to keep it",
            CaptureWarning,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copying:
    """How a model is copied; see :func:`own_copy` for the fields."""

    share: bool
    keep: bool

    def of(self, model: nn.Module) -> nn.Module:
        """The copy."""
        copied = own_copy(model, share=self.share, keep=self.keep)
        if self.share:
            settle(copied)
        return copied


def own_copy(model: nn.Module, *, share: bool = False, keep: bool = False) -> nn.Module:
    """A copy with tensors of its own; a cached tensor with history becomes one without.

    Args:
        model: what is copied.
        share: let parameters (not buffers) be new objects that share the memory of the model's:
            for those who replace parameters, and write into none.
        keep: let the parameters be the model's own.

    Raises:
        CaptureError: an attribute cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_in(model):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()  # deepcopy refuses tensors with history
        elif keep and isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor
        elif share and type(tensor) is nn.Parameter:
            # .data and not .detach(): the version counter is the model's own
            memo[id(tensor)] = nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
    try:
        with warnings.catch_warnings():
            # What torch.export makes holds specs of its inputs, whose copies warn of themselves.
            warnings.filterwarnings("ignore", ".*LeafSpec.. is deprecated", FutureWarning)
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({_first_line(error)}); fxquant"
            " works on a copy so that the caller's model stays as it is. Remove or define"
            " __deepcopy__ for the attribute that refuses"
        ) from error


def take_apart(copied: nn.Module, model: nn.Module) -> None:
    """Give ``copied`` memory of its own for the parameters that it shares with ``model``."""
    theirs = {t.untyped_storage()._cdata for t in _tensors_in(model) if _is_plain(t)}
    for tensor in _tensors_in(copied):
        if _is_plain(tensor) and tensor.untyped_storage()._cdata in theirs:
            tensor.data = tensor.detach().clone()  # a parameter of ours: only its memory was shared


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout is torch.strided


def _tensors_in(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor of a model: registered, in an attribute, or in a container in one."""
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, nn.Module):
            pending.extend(vars(value).values())
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (tuple, list, set, frozenset)):
            pending.extend(value)


def _only_leaves(gm: fx.GraphModule, leaves: Collection[str]) -> bool:
    tracer = fx.Tracer()
    return all(
        str(n.target) in leaves
        or tracer.is_leaf_module(gm.get_submodule(str(n.target)), str(n.target))
        for n in gm.graph.nodes
        if n.op == "call_module"
    )


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """What a trace gave.

    Attributes:
        owned: the copy of the model that was traced.
        before: path -> attributes of its modules before that.
        versions: of its tensors before that.
        graph: the result.
        islands: with the lines that refused.
        fixed: inputs that are fixed to a value.
        conditions: on shapes, that were decided.
    """

    owned: nn.Module
    before: dict[str, dict[str, Any]]
    versions: dict[str, int]
    graph: fx.Graph
    islands: dict[str, str]
    fixed: Mapping[str, Any]
    conditions: Mapping[str, bool]


@dataclass(frozen=True)
class _Tracing:
    """One trace of a model; see :func:`capture` for the fields."""

    model: nn.Module
    diagnostics: Diagnostics
    example_inputs: object
    copying: _Copying
    leaves: Mapping[str, str]
    concrete_args: Mapping[str, Any]
    strict_capture: bool
    trains: bool
    keep_inputs: bool

    def run(self) -> tuple[QuantGraphModule, dict[str, str]]:
        """Trace until nothing refuses, each time with one more island.

        Returns:
            The graph, and the islands with the lines that refused.
        """
        forward = type(self.model).forward
        self._check_concrete(forward)
        examples = bind_examples(forward, self.example_inputs)
        left_out: Mapping[str, Any] = {} if examples is None else examples.fixed
        trace = self._trace(examples, {**left_out, **self.concrete_args})
        if self.keep_inputs and left_out:
            trace = self._with_inputs_free(examples, left_out, trace)
        owned, graph, islands = trace.owned, trace.graph, trace.islands
        _order_inputs(graph, trace.fixed, forward)
        give_defaults(graph, self.concrete_args)
        _restore_attributes(owned, trace.before, self.diagnostics)
        _warn_of_writes(owned, trace.versions, self.diagnostics)
        self._warn(trace.conditions)
        _free_names(owned, graph, self.diagnostics)
        gm = QuantGraphModule(owned, graph, type(self.model).__name__)
        islands |= self._scripts(gm)
        self._give_reasons(gm, islands)
        return gm, islands

    def _trace(self, examples: Examples | None, fixed: Mapping[str, Any]) -> _Trace:
        islands: dict[str, str] = {}
        while True:
            # Anew each time: a forward may count its calls.
            owned = self.copying.of(self.model)
            if self.copying.share:
                spell_out(owned, {**self.leaves, **islands})
            before = {path: _attributes(module) for path, module in owned.named_modules()}
            versions = _versions(owned)
            values = None if examples is None else ExampleValues(examples.values)
            tracer = CaptureTracer({**self.leaves, **islands}, values)
            try:
                gradients = _own_gradients() if self.trains else nullcontext()
                with _TRACE_LOCK, _recording_builtins(), gradients, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a trace runs the user's code on proxies
                    graph = tracer.trace(owned, dict(fixed) or None)
            except _Refused as refused:
                islands |= self._island(refused, islands)
                continue
            except Exception as error:
                raise self._untraceable(error) from error
            drop_unread(graph)
            return _Trace(
                owned=owned,
                before=before,
                versions=versions,
                graph=graph,
                islands=islands,
                fixed=fixed,
                conditions=tracer.conditions,
            )

    def _with_inputs_free(
        self, examples: Examples | None, left_out: Mapping[str, Any], fixed: _Trace
    ) -> _Trace:
        """The trace with the inputs ``left_out``, where it is the same: nothing asks for them."""
        try:
            free = self._trace(examples, self.concrete_args)
        except CaptureError:
            return fixed
        return free if same_but_for(free.graph, fixed.graph, left_out) else fixed

    def _check_concrete(self, forward: Callable[..., Any]) -> None:
        known = list(inspect.signature(forward).parameters)[1:]
        for name in self.concrete_args:
            if name not in known:
                raise ConfigError(
                    f"concrete_args fixes {name!r}, which is no input of"
                    f" {type(self.model).__name__}.forward{did_you_mean(name, known)}; it takes"
                    f" {', '.join(map(repr, known)) or 'none'}"
                )

    def _scripts(self, gm: fx.GraphModule) -> dict[str, str]:
        """The called modules that are TorchScript and not listed as leaves."""
        found: dict[str, str] = {}
        for node in gm.graph.nodes:
            path = str(node.target)
            if node.op != "call_module" or path in self.leaves:
                continue
            if isinstance(gm.get_submodule(path), torch.jit.ScriptModule):
                found |= self._refuse(path, _SCRIPT, None)
        return found

    def _island(self, refused: _Refused, islands: Mapping[str, str]) -> dict[str, str]:
        line = f"{refused.line}: {_first_line(refused.cause)}"
        if refused.path in islands or refused.path in self.leaves:
            raise CaptureError(
                f"module {refused.path!r} cannot be traced: {refused.cause}"
            ) from refused.cause
        return self._refuse(refused.path, line, refused.cause)

    def _refuse(self, path: str, line: str, cause: Exception | None) -> dict[str, str]:
        if self.strict_capture:
            kind = type(self.model.get_submodule(path)).__name__
            raise UntraceableError(
                f"module {path!r} ({kind}) cannot be traced: {line}. Rewrite that line"
                " without control flow on tensor values, or list the module as non-traceable"
            ) from cause
        return {path: line}

    def _untraceable(self, error: Exception) -> CaptureError:
        made = UntraceableError(
            f"{type(self.model).__name__}.forward cannot be traced: {_first_line(error)}"
            f" ({_user_line(error)}). Move the untraceable part into a submodule, which then runs"
            " as it is, and the rest is quantized"
        )
        made.line = f"{_user_line(error)}: {_first_line(error)}"
        return made

    def _warn(self, conditions: Mapping[str, bool]) -> None:
        for line, value in conditions.items():
            self.diagnostics.warn(
                f"the condition on a shape at {line} is fixed to {value}, as for the example"
                " inputs; inputs that take the other branch will raise an error",
                CaptureWarning,
            )

    def _give_reasons(self, gm: QuantGraphModule, islands: Mapping[str, str]) -> None:
        for node in gm.graph.nodes:
            path = str(node.target)
            if node.op != "call_module":
                continue
            if path in islands:
                reason = f"opaque island: cannot be traced, {islands[path]}"
                update_record(node, reasons=(reason,))
            elif path in self.leaves:
                update_record(node, reasons=(f"opaque island: {self.leaves[path]}",))


def _order_inputs(graph: fx.Graph, fixed: Mapping[str, Any], forward: Callable[..., Any]) -> None:
    """Give the inputs the names and the order of ``forward``, before everything else.

    fx numbers the inputs that it fixes to a value, and puts ``*args`` behind keyword-only inputs.
    """
    nodes = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            if name.removesuffix("_1") in fixed and name.endswith("_1"):
                name = node.target = name.removesuffix("_1")
            nodes[name.lstrip("*")] = node
    order = [name for name in inspect.signature(forward).parameters if name in nodes]
    last: fx.Node | None = None
    for name in order:
        place = next(iter(graph.nodes)) if last is None else last.next
        if place is not nodes[name]:
            place.prepend(nodes[name])
        named = not str(nodes[name].target).startswith("*")
        if named and last is not None and last.args and not nodes[name].args:
            # Behind a "*", which graphs have no word for; so all calls name it.
            nodes[name].args = (None,)
        last = nodes[name]


def give_defaults(graph: fx.Graph, values: Mapping[str, Any]) -> None:
    """Let callers leave out the inputs that are fixed to a value, where Python can say so."""
    for node in reversed([node for node in graph.nodes if node.op == "placeholder"]):
        name = str(node.target)
        if name in values:
            node.args = (values[name],)
        elif not node.args and not name.startswith("*"):
            return  # inputs without a default cannot follow one that has it


@functools.cache
def _names_of_graph_modules() -> frozenset[str]:
    graph = fx.Graph()
    graph.output(None)
    return frozenset(dir(QuantGraphModule(nn.Module(), graph))) - frozenset(dir(nn.Module()))


def _free_names(model: nn.Module, graph: fx.Graph, diagnostics: Diagnostics) -> None:
    """Rename what a graph reads under a name that graph modules have for themselves."""
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        atom, dot, rest = str(node.target).partition(".")
        if node.op not in ("call_module", "get_attr") or atom not in _names_of_graph_modules():
            continue
        if atom not in renamed:
            value = getattr(model, atom)
            new = f"{atom}_"
            while hasattr(model, new) or new in _names_of_graph_modules():
                new += "_"
            set_attribute(model, new, value)
            renamed[atom] = new
            diagnostics.warn(
                f"{atom!r} of the model is called {new!r} in the graph, because graph modules have"
                f" an attribute {atom!r} of their own; use {new!r} in rules",
                CaptureWarning,
            )
        node.target = f"{renamed[atom]}{dot}{rest}"


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **module._parameters, **module._buffers}


def _versions(model: nn.Module) -> dict[str, int]:
    """How often each buffer was written."""
    return {n: b._version for n, b in model.named_buffers() if not b.is_inference()}


def _warn_of_writes(
    model: nn.Module, versions: Mapping[str, int], diagnostics: Diagnostics
) -> None:
    """Say which buffers a forward wrote while it was traced: the graph will not."""
    for name, buffer in model.named_buffers():
        if buffer.is_inference() or versions.get(name, buffer._version) == buffer._version:
            continue
        diagnostics.warn(
            f"forward writes into the buffer {name!r} something that does not depend on its"
            " inputs, such as a counter; the graph does not, and reads what its first call would"
            " read. Take the buffer out of forward, or pass its value as an input",
            CaptureWarning,
        )


def _restore_attributes(
    model: nn.Module, before: Mapping[str, Mapping[str, Any]], diagnostics: Diagnostics
) -> None:
    """Undo what a forward assigned to attributes while it was traced, with a warning."""
    for path, module in model.named_modules():
        for name, value in _attributes(module).items():
            if not isinstance(value, fx.Proxy):
                continue
            if name in before[path]:
                registries = (module._buffers, module._parameters, vars(module))
                next(r for r in registries if name in r)[name] = before[path][name]
            else:
                delattr(module, name)
            whole = f"{path}.{name}" if path else name
            diagnostics.warn(
                f"forward stores a value that it computes in the attribute {whole!r}; the graph"
                " does not, and reads there what is there now. Return the value, and pass it to the"
                " next call",
                CaptureWarning,
            )


def _record_scopes(gm: QuantGraphModule) -> None:
    counts: dict[tuple[str, Any], int] = {}
    for node in gm.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if node.op == "call_module":
            target = str(node.target)
            stack = [entry for entry in stack if entry[0] != target]
        record = record_of(node)
        scope = str(stack[-1][0]) if stack else record.scope
        scope_types = tuple(entry[1] for entry in stack if isinstance(entry[1], type))
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
            scope_types=scope_types if stack else record.scope_types,
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
def _own_gradients() -> Iterator[None]:
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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _user_line(error: BaseException) -> str:
    """``file:line, in function: source`` of the innermost frame outside torch and fxquant."""
    return _line_of(traceback.extract_tb(error.__traceback__))


def _line_of(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if is_user_code(frame.filename):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
    return "unknown line"
