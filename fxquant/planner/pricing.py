"""What every choice costs on this machine: a :class:`~.problem.Problem` from a network.

*Latency.* The network is lowered with all layers in one precision, for each precision, and, for
each two representations, with the layers of even and of odd depth in one and the other and the
reverse. Every node of these graphs is timed in place (:mod:`.clock`). A unit costs what its kernels
take where all layers have its precision. Converting a tensor costs what the conversion takes, and
what the kernels on both sides take more than there: an int8 kernel that writes floats, a float
kernel that reads what an int8 kernel laid out.

*Damage.* Noise at the model's output, relative to the signal, with one layer lowered and all others
in FP32 (or an estimate, see :func:`price`).

*Size.* Bytes of the constants of a layer in each precision.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fxquant.graph_module import QuantGraphModule
from fxquant.op_rows import Runs, rows_of
from fxquant.planner.build import lowered
from fxquant.planner.cache import LatencyCache, graph_key
from fxquant.planner.candidates import INTEGERS, representation_of
from fxquant.planner.clock import Clock, NodeTimes, node_times
from fxquant.planner.problem import FLOAT, OUTSIDE, Choice, Costs, Edge, Problem
from fxquant.planner.units import Share, Unit, Wiring, shares_of, wiring_of
from fxquant.run_record import constants_of
from fxquant.sensitivity.network import FP32, Assignment, CalibratedNetwork

_CALL: Final = 100e-6
_RUNS: Final = {Runs.BF16: "bfloat16", Runs.FP16: "float16", Runs.INT8: INTEGERS}


@dataclass(frozen=True, slots=True)
class Priced:
    """A problem, and what every plan costs beside it.

    Attributes:
        problem: one unit for each unit of the wiring.
        wiring: what the units are.
        fixed: of sizes, numbers and constants that belong to no unit.
        measured: graphs that were timed now; 0 where all times came from the cache.
    """

    problem: Problem
    wiring: Wiring
    fixed: Costs
    measured: int

    def assignment(self, choices: tuple[int, ...]) -> Assignment:
        """The same for the network: layers by name."""
        layers = {}
        for unit, options, number in zip(
            self.wiring.units, self.problem.choices, choices, strict=True
        ):
            if unit.layer is not None:
                layers[unit.layer.name] = options[number].name
        return Assignment(layers)

    def settled(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        """The same for the layers; what belongs to none runs in what its neighbours make cheapest.

        That is what lowering does with ops that only move values, whatever a search left them in.
        """
        free = [
            number
            for number, unit in enumerate(self.wiring.units)
            if unit.layer is None and len(self.problem.choices[number]) > 1
        ]
        current, improved = choices, True
        while improved:
            improved = False
            for unit in free:
                least = self.problem.latency_at(unit, current)
                for number in range(len(self.problem.choices[unit])):
                    changed = (*current[:unit], number, *current[unit + 1 :])
                    latency = self.problem.latency_at(unit, changed)
                    if latency < least:
                        current, least, improved = changed, latency, True
        return current

    def costs(self, choices: tuple[int, ...]) -> Costs:
        """Predicted costs of the whole model."""
        return self.problem.costs(choices) + self.fixed


@dataclass(slots=True)
class _Graph:
    """A lowered graph that is timed.

    Attributes:
        gm: the graph.
        share: whose its nodes are.
        held: for each unit, the representation of what it reads and writes.
        lowered: for each unit, whether it runs otherwise than in FP32.
        times: of its nodes.
        cost: for each unit, seconds.
        conversions: tensor -> seconds of the nodes that convert it.
    """

    gm: QuantGraphModule
    share: Share
    held: tuple[str, ...]
    lowered: tuple[bool, ...]
    times: NodeTimes | None = None
    cost: list[float] = field(default_factory=list)
    conversions: dict[str, float] = field(default_factory=dict)


Damages = Callable[
    [CalibratedNetwork, Mapping[str, Sequence[str]]], Mapping[tuple[str, str], float]
]
"""``damages(network, {layer: precisions}) -> {(layer, precision): damage}``."""


def price(
    network: CalibratedNetwork,
    precisions: Sequence[str],
    bound: inspect.BoundArguments,
    damages: Damages,
    *,
    cache: LatencyCache,
    repeats: int = 15,
    clock: Clock = time.perf_counter,
) -> Priced:
    """Measure everything that a search needs.

    Args:
        network: calibrated, with all ``precisions`` but ``"fp32"`` and ``"int8"``.
        precisions: the candidates, ``"fp32"`` among them or not.
        bound: inputs of the call whose latency counts.
        damages: gives the damage of each layer in each precision that it can have.
        cache: where latencies are kept.
        repeats: rounds in which each graph is timed.
        clock: gives seconds.
    """
    wiring = wiring_of(network)
    known = [name for name in precisions if name != FP32]
    kinds = {name: _kind(network, name) for name in (FP32, *known)}
    graphs = {
        name: _graph(network, wiring, _uniform(network, name), kinds) for name in (FP32, *known)
    }
    offered = _offered(wiring, graphs, kinds, precisions)
    mixed = {
        pair: _graph(network, wiring, _alternating(wiring, offered, pair), kinds)
        for pair in _pairs(kinds, precisions)
    }
    measured = _measure([*graphs.values(), *mixed.values()], wiring, bound, cache, repeats, clock)
    by_layer = {
        unit.layer.name: [name for name in offered[number] if name != FP32]
        for number, unit in enumerate(wiring.units)
        if unit.layer is not None
    }
    damage = damages(network, by_layer)
    sizes = {name: _sizes(graph.gm, wiring) for name, graph in graphs.items()}
    choices = tuple(
        _choices(number, unit, offered[number], graphs, sizes, damage)
        for number, unit in enumerate(wiring.units)
    )
    edges = _edges(wiring, graphs, kinds, list(mixed.values()))
    fixed = Costs(latency=_fixed(list(graphs.values())), size=sizes[FP32].get(OUTSIDE, 0.0))
    names = tuple(unit.name for unit in wiring.units)
    return Priced(Problem(names, choices, edges), wiring, fixed, measured)


# -- graphs ---------------------------------------------------------------------------------------


def _uniform(network: CalibratedNetwork, precision: str) -> Assignment:
    return Assignment({layer.name: precision for layer in network.layers})


def _kind(network: CalibratedNetwork, precision: str) -> str:
    """The representation that layers of a precision hand to each other."""
    if precision == FP32:
        return FLOAT
    found = {
        representation_of(network.qconfig_of(layer.heads[0], precision)) for layer in network.layers
    }
    return next((kind for kind in (INTEGERS, *sorted(found)) if kind in found), FLOAT)


def _graph(
    network: CalibratedNetwork, wiring: Wiring, assignment: Assignment, kinds: Mapping[str, str]
) -> _Graph:
    gm = lowered(network, assignment)
    runs = {row.name: row.runs for row in rows_of(gm)}
    held, is_lowered = [], []
    for unit in wiring.units:
        arithmetic = _RUNS.get(runs.get(unit.head, Runs.FP32), FLOAT)
        is_lowered.append(arithmetic != FLOAT)
        if unit.layer is not None and arithmetic != FLOAT:
            arithmetic = kinds[assignment.layers[unit.layer.name]]
        held.append(arithmetic)
    return _Graph(gm, shares_of(gm, wiring), tuple(held), tuple(is_lowered))


def _offered(
    wiring: Wiring,
    graphs: Mapping[str, _Graph],
    kinds: Mapping[str, str],
    precisions: Sequence[str],
) -> list[list[str]]:
    """For each unit, the precisions that it can really have; FP32 where no other is left."""
    found = []
    for number, unit in enumerate(wiring.units):
        names = []
        for name in precisions:
            if name == FP32:
                names.append(name)
            elif unit.layer is None:
                if graphs[name].held[number] == kinds[name] != FLOAT:
                    names.append(name)
            elif graphs[name].lowered[number]:
                names.append(name)
        if unit.layer is None:
            by_kind = {kinds[name]: name for name in reversed([FP32, *names])}
            names = list(by_kind.values())
        found.append(names or [FP32])
    return found


def _pairs(kinds: Mapping[str, str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """One precision for each representation, each two of them in both orders."""
    first: dict[str, str] = {}
    for name in (FP32, *precisions):
        first.setdefault(kinds[name], name)
    names = list(first.values())
    return [(a, b) for a in names for b in names if a != b]


def _alternating(
    wiring: Wiring, offered: Sequence[Sequence[str]], pair: tuple[str, str]
) -> Assignment:
    levels = wiring.levels()
    layers = {}
    for number, unit in enumerate(wiring.units):
        if unit.layer is not None:
            wanted = pair[levels[number] % 2]
            layers[unit.layer.name] = wanted if wanted in offered[number] else FP32
    return Assignment(layers)


def _measure(
    graphs: Sequence[_Graph],
    wiring: Wiring,
    bound: inspect.BoundArguments,
    cache: LatencyCache,
    repeats: int,
    clock: Clock,
) -> int:
    """Fill in the times of all graphs; how many were not in the cache."""
    keys = [graph_key(graph.gm, bound) for graph in graphs]
    found = {key: cache.get(key) for key in keys}
    missing = {key: g.gm for key, g in zip(keys, graphs, strict=True) if found[key] is None}
    if missing:
        measured = node_times(missing, bound, repeats=repeats, clock=clock)
        cache.put(measured)
        found |= measured
    for key, graph in zip(keys, graphs, strict=True):
        times = found[key]
        assert times is not None
        graph.times = times
        graph.cost = [0.0] * len(wiring.units)
        for node, number in graph.share.units.items():
            graph.cost[number] += times.nodes.get(node, 0.0)
        for node, tensor in graph.share.wires.items():
            graph.conversions[tensor] = graph.conversions.get(tensor, 0.0) + times.nodes[node]
    return len(missing)


def _fixed(graphs: Sequence[_Graph]) -> float:
    """Seconds of a call that are of no unit: sizes and numbers, and the call itself.

    What a call takes beside its nodes is little; more than :data:`_CALL` is interference.
    """
    numbers, overheads = [], [_CALL]
    for graph in graphs:
        assert graph.times is not None
        numbers.append(sum(graph.times.nodes[name] for name in graph.share.rest))
        overheads.append(graph.times.overhead)
    return sum(numbers) / len(numbers) + min(overheads)


# -- choices --------------------------------------------------------------------------------------


def _sizes(gm: QuantGraphModule, wiring: Wiring) -> dict[int, float]:
    """Unit -> bytes of its constants; :data:`~.problem.OUTSIDE` for those of no unit."""
    found: dict[int, float] = {}
    counted: set[int] = set()
    for op, constants in constants_of(gm).items():
        number = wiring.owner.get(op, OUTSIDE)
        for tensor in constants.values():
            if tensor.data_ptr() not in counted:
                counted.add(tensor.data_ptr())
                size = float(tensor.numel() * tensor.element_size())
                found[number] = found.get(number, 0.0) + size
    return found


def _choices(
    number: int,
    unit: Unit,
    offered: Sequence[str],
    graphs: Mapping[str, _Graph],
    sizes: Mapping[str, Mapping[int, float]],
    damage: Mapping[tuple[str, str], float],
) -> tuple[Choice, ...]:
    found = []
    for name in offered:
        costs = Costs(
            latency=graphs[name].cost[number],
            damage=damage.get((unit.name, name), 0.0) if unit.layer is not None else 0.0,
            size=sizes[name].get(number, 0.0),
        )
        kind = graphs[name].held[number]
        found.append(Choice(name, costs, reads=kind, writes=kind))
    return tuple(found)


# -- conversions ----------------------------------------------------------------------------------


def _edges(
    wiring: Wiring,
    graphs: Mapping[str, _Graph],
    kinds: Mapping[str, str],
    mixed: Sequence[_Graph],
) -> tuple[Edge, ...]:
    uniform = {kinds[name]: graph for name, graph in reversed(list(graphs.items()))}
    seen: dict[str, dict[tuple[str, str], list[float]]] = {w.name: {} for w in wiring.wires}
    for graph in [*graphs.values(), *mixed]:
        for name, pair, seconds in _conversions(wiring, graph, uniform):
            seen[name].setdefault(pair, []).append(seconds)
    pairs = {pair for found in seen.values() for pair in found}
    known = {
        (wire.name, pair): sum(times) / len(times)
        for wire in wiring.wires
        for pair, times in seen[wire.name].items()
    }
    lines = {pair: _line(wiring, known, pair) for pair in pairs}
    kinds_there = sorted(set(kinds.values()))
    edges = []
    for wire in wiring.wires:
        conversions = {}
        for a in kinds_there:
            for b in kinds_there:
                if a == b:
                    continue
                base, each = lines.get((a, b), (0.0, 0.0))
                guess = base + each * wire.elements
                conversions[a, b] = max(0.0, known.get((wire.name, (a, b)), guess))
        edges.append(Edge(wire.producer, wire.consumers, conversions, wire.name))
    return tuple(edges)


def _conversions(
    wiring: Wiring, graph: _Graph, uniform: Mapping[str, _Graph]
) -> list[tuple[str, tuple[str, str], float]]:
    """(tensor, (written, read), seconds) of each conversion in a graph."""

    def held(number: int) -> str:
        return FLOAT if number == OUTSIDE else graph.held[number]

    def more(number: int) -> float:
        """What a unit takes more than where all layers have its precision."""
        if number == OUTSIDE or graph.held[number] not in uniform:
            return 0.0
        return graph.cost[number] - uniform[graph.held[number]].cost[number]

    crossing = [
        (wire, (held(wire.producer), other))
        for wire in wiring.wires
        for other in sorted({held(c) for c in wire.consumers} - {held(wire.producer)})
    ]
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    for wire, (_, other) in crossing:
        written[wire.producer] = written.get(wire.producer, 0) + 1
        for consumer in wire.consumers:
            if held(consumer) == other:
                read[consumer] = read.get(consumer, 0) + 1
    found = []
    for wire, (mine, other) in crossing:
        seconds = graph.conversions.get(wire.name, 0.0)
        if mine == INTEGERS:  # its kernel writes floats
            seconds += more(wire.producer) / written[wire.producer]
        if other == FLOAT:  # its kernels read another memory format
            readers = [c for c in wire.consumers if held(c) == FLOAT]
            seconds += sum(more(c) / read[c] for c in readers)
        found.append((wire.name, (mine, other), seconds))
    return found


def _line(
    wiring: Wiring, known: Mapping[tuple[str, tuple[str, str]], float], pair: tuple[str, str]
) -> tuple[float, float]:
    """Seconds of a conversion as a line over the number of elements, for tensors not measured."""
    points = [
        (float(wire.elements), known[wire.name, pair])
        for wire in wiring.wires
        if (wire.name, pair) in known
    ]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if math.isclose(spread, 0.0):
        return mean_y, 0.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    slope = max(0.0, slope)
    return max(0.0, mean_y - slope * mean_x), slope
