"""The units of a network, the tensors between them, and whose a lowered graph's kernels are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxquant.dataflow import is_float_tensor, reads_only_shape
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, shape_of
from fxquant.operators import TO_DTYPE
from fxquant.planner.problem import OUTSIDE
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.network import CalibratedNetwork

_CONVERTING = (torch.quantize_per_tensor, torch.dequantize, TO_DTYPE)


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer, or an op that belongs to none.

    Attributes:
        name: of the layer, or of the op's node in the float graph.
        nodes: names of its nodes in the folded float graph.
        head: the node whose kernel tells in which arithmetic it runs.
        layer: the layer; ``None`` for an op that belongs to none.
    """

    name: str
    nodes: tuple[str, ...]
    head: str
    layer: Layer | None = None


@dataclass(frozen=True, slots=True)
class Wire:
    """A float tensor of the folded graph that leaves a unit.

    Attributes:
        name: of its node.
        producer: number of the unit; :data:`~.problem.OUTSIDE` for an input of the model.
        consumers: numbers of the units that read its values, without its own.
        elements: with the example inputs; 0 where unknown.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]
    elements: int = 0


@dataclass(frozen=True, slots=True)
class Wiring:
    """Units in graph order, and the tensors between them.

    Attributes:
        units: layers and other ops, in the order of their first nodes.
        wires: in graph order.
        owner: op of the float graph -> number of the unit that carries it out.
        tensor: op of the float graph -> name of the node that holds its value.
    """

    units: tuple[Unit, ...]
    wires: tuple[Wire, ...]
    owner: Mapping[str, int] = field(default_factory=dict)
    tensor: Mapping[str, str] = field(default_factory=dict)

    def levels(self) -> tuple[int, ...]:
        """For each unit, how many layers are on the longest way to it, itself included."""
        found = [0] * len(self.units)
        for number, unit in enumerate(self.units):
            before = [
                found[wire.producer]
                for wire in self.wires
                if number in wire.consumers and OUTSIDE != wire.producer < number
            ]
            found[number] = max(before, default=0) + (unit.layer is not None)
        return tuple(found)


def wiring_of(network: CalibratedNetwork) -> Wiring:
    """Read off the folded float graph of ``network``."""
    gm = network.graph
    of_node = {node: layer for layer in network.layers for node in layer.nodes}
    units: list[Unit] = []
    numbers: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        layer = of_node.get(node.name)
        if node.name in numbers or (layer is None and not _moves_floats(gm, node)):
            continue
        nodes = layer.nodes if layer is not None else (node.name,)
        head = layer.heads[0] if layer is not None else node.name
        units.append(Unit(layer.name if layer is not None else node.name, nodes, head, layer))
        numbers.update(dict.fromkeys(nodes, len(units) - 1))
    owner, tensor = {}, {}
    for node in gm.graph.nodes:
        for name in {node.name, *record_of(node).origins}:
            tensor[name] = node.name
            if node.name in numbers:
                owner[name] = numbers[node.name]
    return Wiring(tuple(units), tuple(_wires(gm, numbers)), owner, tensor)


def _moves_floats(gm: QuantGraphModule, node: fx.Node) -> bool:
    return is_float_tensor(gm, node) and any(
        a.op != "get_attr" and is_float_tensor(gm, a) for a in node.all_input_nodes
    )


def _wires(gm: QuantGraphModule, numbers: Mapping[str, int]) -> list[Wire]:
    wires = []
    for node in gm.graph.nodes:
        inside = node.name in numbers
        if not (inside or (node.op == "placeholder" and is_float_tensor(gm, node))):
            continue
        producer = numbers[node.name] if inside else OUTSIDE
        found: dict[int, None] = {}
        for user in node.users:
            if reads_only_shape(user):
                continue
            found[OUTSIDE if user.op == "output" else numbers.get(user.name, OUTSIDE)] = None
        consumers = tuple(number for number in found if number != producer or inside is False)
        if not inside:
            consumers = tuple(number for number in consumers if number != OUTSIDE)
        if consumers:
            elements = 1
            for size in shape_of(node) or (0,):
                elements *= size
            wires.append(Wire(node.name, producer, consumers, elements))
    return wires


@dataclass(slots=True)
class Share:
    """What the nodes of a lowered graph are for.

    Attributes:
        units: node -> number of its unit.
        wires: node that converts a tensor -> name of the tensor.
        rest: nodes that belong to nothing: sizes and numbers.
    """

    units: dict[str, int] = field(default_factory=dict)
    wires: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def shares_of(gm: QuantGraphModule, wiring: Wiring) -> Share:
    """Attribute every node of a lowered graph to a unit or to a tensor."""
    share = Share()
    for node in reversed(gm.graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        known = [o for o in record_of(node).origins if o in wiring.owner]
        if known:
            share.units[node.name] = wiring.owner[known[0]]
        elif node.target in _CONVERTING:
            share.wires[node.name] = _converted(node, wiring)
        else:  # a constant, or a change of representation, is part of the kernel that wants it
            _follow(node, share)
    return share


def _follow(node: fx.Node, share: Share) -> None:
    for user in node.users:
        if user.name in share.units:
            share.units[node.name] = share.units[user.name]
            return
        if user.name in share.wires:
            share.wires[node.name] = share.wires[user.name]
            return
    share.rest.append(node.name)


def _converted(node: fx.Node, wiring: Wiring) -> str:
    """Name of the tensor that ``node`` converts."""
    source = node.all_input_nodes[0]
    while True:
        if source.op == "placeholder":
            return source.name
        known = [o for o in record_of(source).origins if o in wiring.tensor]
        if known:
            order = list(wiring.tensor)
            return wiring.tensor[max(known, key=order.index)]
        if not source.all_input_nodes:
            return ""
        source = source.all_input_nodes[0]
