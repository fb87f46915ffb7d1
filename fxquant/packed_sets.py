"""Packed weights for each batch, size and number of threads that a lowered module is called with.

oneDNN prepares a convolution for the input of its first call, and packs its own operators' weights
for one shape. Other inputs are computed right, but each call then takes some 15 us longer, and
where another order of the weight is wanted, it is reordered in every call: ResNet-50, packed for
224 x 224, takes 480 ms instead of 25 at 256 x 256. So a module that is called with another shape a
second time gets packed weights for that shape, beside those that it has.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import Tensor, fx

from fxquant.inputs import BoundInterpreter, bind_inputs
from fxquant.metadata import TensorRecord, record_of

if TYPE_CHECKING:
    from fxquant.graph_module import QuantGraphModule
    from fxquant.graph_state import PackRecord

LARGEST: Final = 3
"""Sets of packed weights that a module may have beside its first."""
_REMEMBERED: Final = 64
"""Shapes that are remembered to have come once."""
_BY_SHAPE: Final = "onednn-conv"
"""The packer whose last option is the shape of the input."""

Key: TypeAlias = tuple[Any, ...]


def sets_of(gm: QuantGraphModule) -> PackedSets | None:
    """The sets of a module; ``None`` where no packed constant is prepared for a shape."""
    packs = gm.state.packs
    depends = any(pack.packer == _BY_SHAPE or "onednn" in pack.options for pack in packs)
    return PackedSets(gm) if depends else None


class PackedSets:
    """The sets of one module.

    Args:
        gm: the module; its own packed constants are the first set, for the shapes of the example
            inputs, or of the first call where there were none.
    """

    def __init__(self, gm: QuantGraphModule) -> None:
        self._lock = threading.Lock()
        expected = _expected(gm)
        self._first: Key | None = (torch.get_num_threads(), *expected) if expected else None
        self._called = False
        self._seen: dict[Key, dict[str, list[int]]] = {}
        self._views: dict[Key, QuantGraphModule] = {}

    def __deepcopy__(self, _: object) -> None:
        """A copy of the module finds out for itself."""

    def call(self, gm: QuantGraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``gm`` on the set for these inputs."""
        key = _key(args, kwargs)
        if key is None:
            return fx.GraphModule.__call__(gm, *args, **kwargs)
        if self._first is None:
            self._first = key
        if key == self._first:
            self._called = True
            return fx.GraphModule.__call__(gm, *args, **kwargs)
        found = self._views.get(key)
        if found is None and key in self._seen:
            with self._lock:
                if key not in self._views and len(self._views) < LARGEST:
                    self._views[key] = _view(gm, self._seen[key])
                found = self._views.get(key, gm)
        if found is not None:
            return fx.GraphModule.__call__(found, *args, **kwargs)
        return self._note(gm, key, args, kwargs)

    def _note(
        self, gm: QuantGraphModule, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run inputs that come for the first time, and note what shapes are to be packed for."""
        try:
            bound = bind_inputs(gm, args, kwargs)
        except TypeError:
            bound = None  # the module says what is wrong
        if bound is None or len(self._seen) >= _REMEMBERED or len(self._views) >= LARGEST:
            return fx.GraphModule.__call__(gm, *args, **kwargs)
        # The first call of the module's own constants must not be one with other shapes.
        runs = gm if self._called else _view(gm, {})
        noting = _Noting(runs, bound)
        result = noting.run()
        self._seen[key] = noting.shapes
        return result


class _Noting(BoundInterpreter):
    """Runs a graph and notes the shapes that packed constants meet."""

    def __init__(self, gm: QuantGraphModule, bound: inspect.BoundArguments) -> None:
        super().__init__(gm, bound)
        self.packed = {pack.name for pack in gm.state.packs if pack.packer == _BY_SHAPE}
        self.shapes: dict[str, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``; the input of a kernel is its first argument."""
        for source in n.all_input_nodes:
            if source.op == "get_attr" and source.target in self.packed:
                self.shapes[str(source.target)] = list(self.env[n.all_input_nodes[0]].shape)
        return super().run_node(n)


def _expected(gm: QuantGraphModule) -> tuple[Any, ...]:
    """Shapes of the example inputs, as far as they are tensors."""
    records = [record_of(node).value for node in gm.graph.nodes if node.op == "placeholder"]
    return tuple(torch.Size(r.shape) for r in records if isinstance(r, TensorRecord))


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key | None:
    """What packed weights are prepared for; ``None`` where somebody follows or fakes the call."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    shapes: list[Any] = [torch.get_num_threads()]
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) is Tensor:
            shapes.append(value.shape)
        elif isinstance(value, Tensor | fx.Proxy):
            return None
    return tuple(shapes)


def _view(gm: QuantGraphModule, shapes: Mapping[str, list[int]]) -> QuantGraphModule:
    """The same module, with no packed constants yet and shapes to pack them for."""
    made = object.__new__(type(gm))
    packed = {pack.name for pack in gm.state.packs}
    every = gm.__dict__.copy()  # in one go: another thread may be packing a weight into it
    made.__dict__.update({name: value for name, value in every.items() if name not in packed})
    made.__dict__["_sets"] = None
    made.__dict__["_pack_shapes"] = dict(shapes)
    return made


def shaped(record: PackRecord, shapes: Mapping[str, list[int]]) -> PackRecord:
    """``record`` for the shape of its input that is known."""
    if record.packer != _BY_SHAPE or record.name not in shapes:
        return record
    return replace(record, options=(*record.options[:-1], shapes[record.name]))
