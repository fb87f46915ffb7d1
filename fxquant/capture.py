"""From a module to a float graph, on a copy: nothing of the caller's model is touched."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.aten import import_aten, is_aten
from fxquant.attention import drop_unread, spell_out
from fxquant.errors import (
    CaptureError,
    CaptureWarning,
    ConfigError,
    Diagnostics,
    UntraceableError,
    did_you_mean,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import GraphState, Stage
from fxquant.metadata import record_of, set_record, update_record
from fxquant.op_view import type_of
from fxquant.optional_inputs import same_but_for
from fxquant.own_copy import Copying
from fxquant.shape_guards import ExampleValues
from fxquant.shapes import Examples, bind_examples
from fxquant.trace_effects import attributes_of, restore_attributes, versions_of, warn_of_writes
from fxquant.traced_names import free_names, give_defaults, order_inputs
from fxquant.tracer import (
    CaptureTracer,
    Refused,
    first_line,
    own_gradients,
    recording_builtins,
    user_line,
)

_TRACE_LOCK = threading.Lock()
_SCRIPT = "it is TorchScript, which torch.fx cannot look into"


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
    copying = Copying(share=share, keep=keep)
    islands: dict[str, str] = {}
    if isinstance(model, fx.GraphModule) and is_aten(model):
        exported = import_aten(copying.of(model))
        gm = QuantGraphModule(exported, exported.graph, type(model).__name__)
    elif isinstance(model, fx.GraphModule) and not concrete_args and _only_leaves(model, leaves):
        owned = copying.of(model)
        assert isinstance(owned, fx.GraphModule)
        free_names(owned, owned.graph, diagnostics)
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
    copying: Copying
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
        order_inputs(graph, trace.fixed, forward)
        give_defaults(graph, self.concrete_args)
        restore_attributes(owned, trace.before, self.diagnostics)
        warn_of_writes(owned, trace.versions, self.diagnostics)
        self._warn(trace.conditions)
        free_names(owned, graph, self.diagnostics)
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
            before = {path: attributes_of(module) for path, module in owned.named_modules()}
            versions = versions_of(owned)
            values = None if examples is None else ExampleValues(examples.values)
            tracer = CaptureTracer({**self.leaves, **islands}, values)
            try:
                gradients = own_gradients() if self.trains else nullcontext()
                with _TRACE_LOCK, recording_builtins(), gradients, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a trace runs the user's code on proxies
                    graph = tracer.trace(owned, dict(fixed) or None)
            except Refused as refused:
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

    def _island(self, refused: Refused, islands: Mapping[str, str]) -> dict[str, str]:
        line = f"{refused.line}: {first_line(refused.cause)}"
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
            f"{type(self.model).__name__}.forward cannot be traced: {first_line(error)}"
            f" ({user_line(error)}). Move the untraceable part into a submodule, which then runs"
            " as it is, and the rest is quantized"
        )
        made.line = f"{user_line(error)}: {first_line(error)}"
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
