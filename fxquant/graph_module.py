"""The ``GraphModule`` that fxquant works on: it keeps what plain fx loses.

Pickling a plain ``GraphModule`` drops node metadata and renames nodes, and packed weights cannot be
copied or saved at all. :class:`QuantGraphModule` therefore serializes its graph structurally, with
the records of :mod:`fxquant.metadata`, and treats packed weights as caches that are made from plain
tensors when they are first read.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from fxquant.attribute_paths import set_attribute
from fxquant.autocast import is_autocast, no_autocast, widened
from fxquant.clamps import high_is_free, low_is_free
from fxquant.errors import ConfigError, LoweringError
from fxquant.graph_codec import EncodedNode, decode_graph, encode_graph
from fxquant.graph_state import (
    AbsorbedClamp,
    GraphState,
    OpEntry,
    PackRecord,
    Stage,
    WeightLimit,
)
from fxquant.late_code import may_wait
from fxquant.metadata import record_of, set_record
from fxquant.op_view import attribute

if TYPE_CHECKING:
    from fxquant.kernel_view import KernelView

# The records of a graph's state are offered here, too: earlier pickles look for them here.
__all__ = [
    "PRESERVED_ATTRIBUTES",
    "AbsorbedClamp",
    "GraphState",
    "OpEntry",
    "PackRecord",
    "QuantGraphModule",
    "Stage",
    "WeightLimit",
    "derive",
    "graphs_in",
    "parts_below",
]

PRESERVED_ATTRIBUTES: Final = "_user_preserved_attributes"
"""Key in ``GraphModule.meta`` of the attributes that the user wants kept, by name."""
_WITH_VIEWS: Final = "x86-compat"
"""The target whose callers look for modules where kernels are."""


_PACKING = threading.RLock()
_NOT_MADE = object()


def _packed_names(gm: QuantGraphModule) -> tuple[str, ...]:
    return tuple(pack.name for pack in gm.state.packs)


class _PackedOnDemand:
    """A packed constant that is made when it is first read, once, whichever thread reads it.

    It stands on the class, which fx makes anew for every graph module; once it is made, the
    constant in the module's own ``__dict__`` is what Python finds first.
    """

    def __init__(self, record: PackRecord) -> None:
        self.record = record

    def __get__(self, owner: QuantGraphModule | None, _: object = None) -> Any:
        if owner is None:
            return self
        from fxquant.packed_sets import shaped
        from fxquant.packing import pack

        with _PACKING:
            name = self.record.name
            if name not in owner.__dict__:
                shapes = owner.__dict__.get("_pack_shapes", {})
                owner.__dict__[name] = pack(owner, shaped(self.record, shapes))
            return owner.__dict__[name]


class QuantGraphModule(fx.GraphModule):
    """A ``GraphModule`` with a :class:`GraphState`, faithful copies and faithful pickles."""

    if TYPE_CHECKING:  # TorchScript would read the annotation
        _state: GraphState

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: fx.Graph,
        class_name: str = "QuantGraphModule",
        state: GraphState | None = None,
    ) -> None:
        packed = {p.name for p in state.packs} if state else set()
        held = {
            name: root.__dict__[name] for name in packed if name in getattr(root, "__dict__", {})
        }
        super().__init__(root, graph, class_name)
        for name in packed:
            self._buffers.pop(name, None)
            self.__dict__.pop(name, None)
            if held.get(name) is not None:
                self.__dict__[name] = held[name]
        self.__dict__["_state"] = state or GraphState()
        self._offer_packed()

    @property
    def state(self) -> GraphState:
        """What holds for the whole graph."""
        return self._state

    def update_state(self, **changes: Any) -> None:
        """Replace fields of :attr:`state`."""
        self.__dict__["_state"] = replace(self._state, **changes)
        self.__dict__.pop("_sets", None)
        if "packs" in changes:
            self._offer_packed()

    def add_fates(self, fates: Mapping[str, str]) -> None:
        """Record what became of ops of the float graph that no node carries out any more.

        Args:
            fates: name of the op -> sentence.
        """
        known = dict.fromkeys((*self._state.fates, *fates.items()))
        if len(known) > len(self._state.fates):
            self.update_state(fates=tuple(known))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; a converted one as it is, also under ``torch.autocast``.

        Autocast would compute what stays in FP32 in half precision, and other integers would come
        of it. What it hands in as float16 or bfloat16 is taken as float32.
        """
        if self._state.stage not in (Stage.REFERENCE, Stage.LOWERED):
            return super().__call__(*args, **kwargs)
        if not is_autocast():
            return self._run(args, kwargs)
        with no_autocast():
            return self._run(widened(args), widened(kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph on packed weights for the inputs; see :mod:`fxquant.packed_sets`."""
        sets = self.__dict__.get("_sets", _NOT_MADE)
        if sets is _NOT_MADE:
            from fxquant.packed_sets import sets_of

            sets = self.__dict__["_sets"] = sets_of(self)
        watched = self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__
        if sets is None or watched:
            return super().__call__(*args, **kwargs)
        return sets.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Submodules and tensors; in a graph of ``fxquant.compat``, kernels in place of modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            view = None if name.startswith("_") else self._kernel_view(name)
            if view is None:
                raise
            return view

    def _kernel_view(self, name: str) -> KernelView | None:
        state = self.__dict__.get("_state")
        if state is None or state.stage is not Stage.LOWERED or state.target != _WITH_VIEWS:
            return None
        from fxquant.kernel_view import view_of

        return view_of(self, name)

    # -- code ---------------------------------------------------------------------------------

    def recompile(self) -> fx.graph.PythonCode:
        """Write the code anew, or later; see :func:`fxquant.late_code.code_written_once`."""
        if not may_wait(self):
            return super().recompile()
        type(self).forward = _forward_of_changed
        return fx.graph.PythonCode("", {}, None)

    def write_code(self) -> None:
        """Write the code, where the graph was changed since it was written."""
        if type(self).forward is _forward_of_changed:
            super().recompile()

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        self.write_code()
        return super().code

    # -- states -------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; packed weights that are :attr:`PackRecord.saved` are in it."""
        result = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name in self._packed_only():
            result.pop(f"{prefix}{name}", None)
        for record in self._state.packs:
            if record.saved:
                result[f"{prefix}{record.name}"] = getattr(self, record.name)
        return result

    def _packed_only(self) -> set[str]:
        """The tensors that nothing but packed weights in state dicts is made from."""
        saved = {name for pack in self._state.packs if pack.saved for name in pack.tensors}
        if not saved:
            return saved
        apart = {name for pack in self._state.packs if not pack.saved for name in pack.tensors}
        return saved - apart - {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}

    def _load_packed(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Put the tensors of packed weights in the place of these, in the caller's copy."""
        from fxquant.packing import unpack

        for record in self._state.packs:
            packed = state_dict.pop(f"{prefix}{record.name}", None) if record.saved else None
            if packed is not None:
                state_dict |= {f"{prefix}{n}": t for n, t in unpack(record, packed).items()}

    # -- packed constants ---------------------------------------------------------------------

    def _offer_packed(self) -> None:
        for record in self._state.packs:
            setattr(type(self), record.name, _PackedOnDemand(record))

    @property
    def unpacked(self) -> tuple[str, ...]:
        """Names of the packed constants that nobody has read yet."""
        return tuple(p.name for p in self._state.packs if p.name not in self.__dict__)

    def pack(self) -> None:
        """Make all packed constants now, which the first call would make otherwise."""
        for name in self.unpacked:
            getattr(self, name)

    @contextmanager
    def packed_apart(self) -> Iterator[None]:
        """Give calls inside packed constants of their own, in this graph and those in its modules.

        oneDNN prepares a convolution for the batch, size and threads of the first call, for good:
        others take about 15 us longer. Calls that only look should not be that first one.
        """
        graphs = list(graphs_in(self))
        held = [
            {n: graph.__dict__.pop(n, _NOT_MADE) for n in (*_packed_names(graph), "_sets")}
            for graph in graphs
        ]
        for graph in graphs:
            graph.__dict__["_sets"] = None  # those constants serve all calls
        try:
            yield
        finally:
            for graph, packed in zip(graphs, held, strict=True):
                for name, value in packed.items():
                    graph.__dict__.pop(name, None)
                    if value is not _NOT_MADE:
                        graph.__dict__[name] = value

    @contextmanager
    def packing_put_off(self) -> Iterator[None]:
        """Let code that only looks whether attributes are there read packed constants.

        For a module that no other thread knows yet.
        """
        absent = self.unpacked
        self.__dict__.update(dict.fromkeys(absent, _NOT_MADE))
        try:
            yield
        finally:
            for name in absent:
                del self.__dict__[name]

    def rebuild_packed(self) -> None:
        """Make every packed constant, and every inlined number, again from the plain tensors."""
        self._drop_packed()
        self.pack()
        self._rebind()

    def _drop_packed(self) -> None:
        """Forget what was made from plain tensors."""
        for pack in self._state.packs:
            self.__dict__.pop(pack.name, None)
        self.__dict__.pop("_sets", None)

    def _rebind(self) -> None:
        if self._state.stage is Stage.LOWERED:
            from fxquant.packing import rebind_constants

            rebind_constants(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._load_packed(args[0], args[1])
        super()._load_from_state_dict(*args, **kwargs)
        errors = args[-1]  # what load_state_dict raises as one RuntimeError
        errors.extend(self._clamps_lost())
        errors.extend(self._weights_overflow())
        self._drop_packed()
        self._rebind()

    def _weights_overflow(self) -> list[str]:
        """Integer weights that a kernel of this machine would overflow with."""
        if not self._state.limits:
            return []
        from fxquant.weight_fit import overflowing

        return overflowing(self)

    def _clamps_lost(self) -> list[str]:
        """Absorbed clamps that the present ranges do not express."""
        lost = []
        for clamp in self._state.absorbed:
            scale = getattr(self, clamp.scale, None)
            zero_point = getattr(self, clamp.zero_point, None)
            if scale is None or zero_point is None:
                continue
            if not (
                low_is_free(clamp.low, scale, zero_point, clamp.quant_min)
                and high_is_free(clamp.high, scale, zero_point, clamp.quant_max)
            ):
                lost.append(
                    f"the clamp {clamp.name!r} is not in this graph, because the range it was"
                    f" converted with expressed it; the loaded range (scale {float(scale):.6g},"
                    f" zero point {int(zero_point)}) does not. Call convert_fx on a model with the"
                    " loaded statistics instead"
                )
        return lost

    # -- what int8 cannot do ------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if self._state.stage in (Stage.REFERENCE, Stage.LOWERED):
            probe = torch.zeros((), dtype=torch.float32)
            moved = fn(probe)
            if moved.dtype != probe.dtype:
                raise ConfigError(
                    f"a {self._state.stage.value} model cannot be cast to {moved.dtype}: its scales"
                    " and integers have the dtypes that its kernels take. Cast the float model"
                    " before prepare_fx, or the inputs and outputs around this one"
                )
            if self._state.stage is Stage.LOWERED and moved.device.type != "cpu":
                raise ConfigError(
                    f"a lowered model cannot be moved to {moved.device}: its int8 kernels run on"
                    " the CPU. convert_to_reference_fx(prepared) gives a model that moves"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it

    def train(self, mode: bool = True) -> QuantGraphModule:
        """Set training mode.

        Raises:
            ConfigError: training was asked of a lowered model, which has no gradients.
        """
        if mode and self._state.stage is Stage.LOWERED:
            raise ConfigError(
                "a lowered model cannot be trained: integers have no gradients. Train the float"
                " model, then prepare and convert it again"
            )
        super().train(mode)
        return self

    # -- TorchScript --------------------------------------------------------------------------

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in the place of this module."""
        from fxquant.scripting import scriptable

        return scriptable(self)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``torch.jit.trace`` runs: without packed weights, which a trace cannot hold."""
        if self._state.stage is not Stage.LOWERED:
            return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no types for it
        from fxquant.scripting import run_traced

        return run_traced(self, args, kwargs)

    # -- copies and pickles -------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantGraphModule:
        self.pack()  # both have the same constants, made once
        for pack in self._state.packs:
            packed = self.__dict__.get(pack.name)
            memo[id(packed)] = packed  # immutable: a copy may share it until it is rebuilt
        memo[id(self._state)] = self._state
        result: QuantGraphModule = super().__deepcopy__(memo)  # type: ignore[assignment]  # fx annotates the base class
        self._complete_copy(result)
        return result

    def __copy__(self) -> QuantGraphModule:
        self.pack()
        result = QuantGraphModule(self, self.graph)  # fx would make a plain GraphModule
        result.meta = self.meta
        self._complete_copy(result)
        return result

    def _complete_copy(self, result: QuantGraphModule) -> None:
        result.__dict__["_state"] = self._state
        present = {name for name, _ in result.named_buffers()}
        for name, buffer in self.named_buffers():
            if name not in present:  # fx copies only what a node mentions
                set_attribute(result, name, buffer.clone())
        result.__dict__.pop("_sets", None)
        for pack in self._state.packs:
            result._buffers.pop(pack.name, None)
            result.__dict__[pack.name] = self.__dict__[pack.name]
        result._offer_packed()
        for old, new in zip(self.graph.nodes, result.graph.nodes, strict=True):
            if old.name != new.name or old.op != new.op:
                raise AssertionError(f"a copy renamed node {old.name!r} to {new.name!r}")
            set_record(new, record_of(old))
        result.meta = dict(result.meta)
        _set_preserved_attributes(result)
        _copy_training_flags(self, result)

    def __reduce__(self) -> tuple[Any, ...]:
        packed = {p.name for p in self._state.packs}
        names = {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr")}
        parts = {name: attribute(self, name) for name in sorted(names - packed)}
        extra = {
            name: buffer
            for name, buffer in self.named_buffers()
            if name not in parts and not any(name.startswith(f"{p}.") for p in parts)
        }
        meta = dict(self.meta)
        return (
            _rebuild,
            (parts, extra, encode_graph(self.graph), self._state, self.training, meta),
        )


def _forward_of_changed(self: QuantGraphModule, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a graph whose code is not written yet."""
    self.write_code()
    return self.forward(*args, **kwargs)


def _rebuild(
    parts: dict[str, Any],
    extra: dict[str, torch.Tensor],
    nodes: list[EncodedNode],
    state: GraphState,
    training: bool,
    meta: dict[str, Any],
) -> QuantGraphModule:
    root = nn.Module()
    root.training = training
    for name, value in (parts | extra).items():
        set_attribute(root, name, value)
    for record in state.packs:
        root.__dict__[record.name] = None  # packed when it is first read
    result = QuantGraphModule(root, decode_graph(nodes), state=state)
    for name, buffer in extra.items():
        set_attribute(result, name, buffer)
    result.training = training
    result.meta.update(meta)
    _set_preserved_attributes(result)
    lost = result._weights_overflow()
    if lost:
        raise LoweringError(f"this model was pickled on a machine with other kernels: {lost[0]}")
    return result


def _set_preserved_attributes(result: QuantGraphModule) -> None:
    """Set what the user wants kept; ``deepcopy`` of a plain ``GraphModule`` does the same."""
    for name, value in result.meta.get(PRESERVED_ATTRIBUTES, {}).items():
        setattr(result, name, value)


def _copy_training_flags(source: nn.Module, destination: nn.Module) -> None:
    flags = {name: module.training for name, module in source.named_modules()}
    for name, module in destination.named_modules():
        module.training = flags.get(name, module.training)


def parts_below(module: nn.Module) -> Iterator[QuantGraphModule]:
    """The graphs in what a graph calls as it is: the parts of its islands.

    Args:
        module: a graph, or a module that runs as it is. Graphs inside the found ones are not given.
    """
    called: Iterable[nn.Module] = module.children()
    if isinstance(module, QuantGraphModule):
        paths = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "call_module")
        called = [module.get_submodule(path) for path in paths]
        called = [child for child in called if not isinstance(child, QuantGraphModule)]
    seen: set[int] = set()
    pending = list(called)[::-1]
    while pending:
        child = pending.pop()
        if id(child) in seen:
            continue
        seen.add(id(child))
        if isinstance(child, QuantGraphModule):
            yield child
        else:
            pending.extend(list(child.children())[::-1])


def graphs_in(gm: QuantGraphModule) -> Iterator[QuantGraphModule]:
    """``gm``, and the parts of its islands, and those of theirs."""
    yield gm
    for part in parts_below(gm):
        yield from graphs_in(part)


def derive(gm: QuantGraphModule) -> QuantGraphModule:
    """A new module with its own graph, modules and tensors; ``gm`` is not touched."""
    return copy.deepcopy(gm)
