"""Parts of a network that are slower in int8 than in FP32: found before they are lowered.

A region is convolutions and linears, next to each other, each of which is slower in int8. To leave
it in FP32 also costs the conversions at its borders, and saves those that it has where its
neighbours are in floating point. Times are measured, or come from :func:`expected`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import networkx as nx
from torch import fx

from fxquant.errors import Diagnostics, LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_table import KernelTable, fastest
from fxquant.kernel_tasks import FLOATS, Task
from fxquant.machine import instruction_sets
from fxquant.metadata import record_of, shape_of
from fxquant.op_view import Op
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.targets.choice import candidates_of, tasks_of

_MEASURED: Final = (1.1, 10e-6)
"""How many times slower, and how many seconds, a measured loss must be to be told: no noise."""
_EXPECTED: Final = (1.5, 500e-6)
"""The same for an expected one, which must be beyond doubt."""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A tensor that a part reads.

    Attributes:
        name: of the node that gives it.
        shape: with the example inputs.
        sources: numbers of the parts whose integers come here; none where it is floating point.
    """

    name: str
    shape: tuple[int, ...]
    sources: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A convolution or linear with what is fused behind it.

    Attributes:
        name: path of its module, or name of its node.
        what: its shapes.
        int8: seconds of its int8 kernel.
        fp32: seconds in FP32.
        reads: its inputs.
    """

    name: str
    what: str
    int8: float
    fp32: float
    reads: tuple[Wire, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Parts next to each other that are slower in int8.

    Attributes:
        parts: what is in it.
        int8: seconds, with the conversions that int8 needs here.
        fp32: seconds, with the conversions that FP32 would need here.
    """

    parts: tuple[Part, ...]
    int8: float
    fp32: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts."""
        return tuple(part.name for part in self.parts)


Convert = Callable[[str, tuple[int, ...]], float]
"""``convert("quantize" or "dequantize", shape)`` in seconds."""


def slow_regions(
    parts: Sequence[Part], convert: Convert, limits: tuple[float, float] = _MEASURED
) -> tuple[Region, ...]:
    """The regions that would be faster in FP32, the greatest loss first.

    Args:
        parts: of a network, in graph order.
        convert: what a conversion costs.
        limits: how many times slower, and how many seconds, a region must be.
    """
    ratio, seconds = limits
    neighbours: nx.Graph[int] = nx.Graph()
    neighbours.add_nodes_from(n for n, part in enumerate(parts) if part.int8 > ratio * part.fp32)
    for number, part in enumerate(parts):
        for wire in part.reads:
            neighbours.add_edges_from(
                (number, source)
                for source in wire.sources
                if number in neighbours and source in neighbours
            )
    found = []
    for numbers in nx.connected_components(neighbours):
        region = _region(parts, frozenset(numbers), convert)
        if region.int8 > ratio * region.fp32 and region.int8 - region.fp32 > seconds:
            found.append(region)
    return tuple(sorted(found, key=lambda region: region.fp32 - region.int8))


def _region(parts: Sequence[Part], numbers: frozenset[int], convert: Convert) -> Region:
    inside = [parts[number] for number in sorted(numbers)]
    int8, fp32 = sum(part.int8 for part in inside), sum(part.fp32 for part in inside)
    for wire in {wire for part in inside for wire in part.reads}:
        if not wire.sources:
            int8 += convert("quantize", wire.shape)
        elif not wire.sources <= numbers:
            fp32 += convert("dequantize", wire.shape)
    outside = [part for number, part in enumerate(parts) if number not in numbers]
    for wire in {wire for part in outside for wire in part.reads}:
        if wire.sources & numbers:
            fp32 += convert("quantize", wire.shape)
    return Region(parts=tuple(inside), int8=int8, fp32=fp32)


# -- what a network is made of --------------------------------------------------------------------

Times = Callable[[Task, Op], tuple[float, float]]


def parts_of(gm: QuantGraphModule, times: Times) -> list[Part]:
    """The parts of a reference graph.

    Args:
        gm: the reference graph.
        times: seconds of a task in int8 and in FP32.
    """
    found = list(tasks_of(gm))
    last = {(behind[-1] if behind else op).node: n for n, (op, behind, _) in enumerate(found)}
    parts = []
    for op, behind, task in found:
        int8, fp32 = times(task, op)
        members = {op.node, *(other.node for other in behind)}
        values = [v for other in (op, *behind) for v in other.activations if v not in members]
        record = record_of(op.node)
        part = Part(
            name=record.module or (record.origins[0] if record.origins else op.node.name),
            what=task.key,
            int8=int8,
            fp32=fp32,
            reads=tuple(_wire(value, last) for value in values if isinstance(value, fx.Node)),
        )
        parts.append(part)
    return parts


def _wire(value: fx.Node, last: Mapping[fx.Node, int]) -> Wire:
    shape = shape_of(value) or ()
    return Wire(name=_floats(value).name, shape=shape, sources=_sources(value, last))


def _floats(value: fx.Node) -> fx.Node:
    """The float value behind ``dequantize(quantize(x))``."""
    while value.target in (QUANTIZE, DEQUANTIZE) and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value


def _sources(value: fx.Node, last: Mapping[fx.Node, int]) -> frozenset[int]:
    """The parts whose integers are in ``value``, through ops on integers that are no parts."""
    found: set[int] = set()
    seen: set[fx.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        behind = _floats(node)
        if behind is node or behind in seen:  # read in floating point
            continue
        seen.add(behind)
        if behind in last:
            found.add(last[behind])
        elif record_of(behind).annotation is not None:
            waiting += behind.all_input_nodes
    return frozenset(found)


# -- where times come from ------------------------------------------------------------------------


def tell_slow_regions(
    gm: QuantGraphModule, diagnostics: Diagnostics, table: KernelTable | None
) -> None:
    """One warning that names the regions of a reference graph that int8 makes slower.

    Args:
        gm: the reference graph, before it is lowered.
        diagnostics: takes the warning.
        table: measured times; without them only what :func:`expected` is sure of.
    """
    if table is not None:
        parts = parts_of(gm, lambda task, op: _measured(task, op, table))
        shapes = {wire.shape for part in parts for wire in part.reads if wire.shape}
        slower = any(part.fp32 < part.int8 for part in parts)
        costs = table.conversions(shapes) if slower else {}
        found = slow_regions(parts, lambda kind, s: float(costs.get(s, {}).get(kind, 0.0)))
        how = "measured, with conversions"
    else:
        found = slow_regions(parts_of(gm, expected), _expected_conversion, _EXPECTED)
        how = "by experience with such shapes; convert_fx(..., tune=True) measures"
    if found:
        diagnostics.warn(_text(found, how), LoweringWarning)


def _text(regions: Sequence[Region], how: str) -> str:
    shown = [
        f"{_listed(region)}: about {_ms(region.int8)} ms in int8, {_ms(region.fp32)} in FP32"
        for region in regions[:_SHOWN]
    ]
    more = f"; and {len(regions) - _SHOWN} more" if len(regions) > _SHOWN else ""
    rule = ", ".join(f"{name!r}: None" for name in regions[0].names[:_SHOWN])
    return (
        f"{len(regions)} part(s) of the model are slower in int8 than in FP32 on this machine"
        f" ({how}): {'; '.join(shown)}{more}. Leave them in FP32 by rules of the qconfig mapping"
        f" ({{..., {rule}}}), or let plan_mixed_precision do it, which measures the whole model"
    )


def _listed(region: Region) -> str:
    """The part that loses most, with its shapes, and those beside it in graph order."""
    worst = max(region.parts, key=lambda part: part.int8 - part.fp32)
    others = [repr(name) for name in region.names if name != worst.name]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    beside = f" beside {', '.join(others[:_SHOWN])}{more}" if others else ""
    return f"{worst.name!r} ({worst.what}){beside}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2g}"


def _measured(task: Task, op: Op, table: KernelTable) -> tuple[float, float]:
    names = tuple(choice.kernel for choice in candidates_of(task, op))
    times = table.task(task, names)
    if not times:
        return 0.0, math.inf  # nothing is known, so nothing is said
    return times[fastest(times, names[0], names)], min(times[name] for name in FLOATS)


_CALL: Final = (12e-6, 4e-6)
"""Seconds of a call that does next to nothing, in int8 and in FP32."""
_RATES: Final[Mapping[str, tuple[float, float, float, float]]] = {
    "dense": (200e9, 90e9, 100e9, 60e9),
    "depthwise": (40e9, 20e9, 30e9, 20e9),
    "transposed": (85e9, 35e9, 100e9, 60e9),
    "transposed 3d": (4e9, 3.5e9, 20e9, 20e9),
}
"""Multiply-accumulates a second of one thread: int8 with VNNI and without, FP32 with AVX512 and
without. Measured on AVX512-VNNI, and there with ``ONEDNN_MAX_CPU_ISA`` and
``FBGEMM_ENABLE_INSTRUCTIONS`` set to AVX2."""
_GROUPED_TRANSPOSED: Final = 120e-9
"""Seconds of fbgemm for each pixel and group of a grouped transposed convolution."""
_SLOW_DEPTHWISE: Final = 50e-9
"""The same for depthwise convolutions that fbgemm has no kernel for."""


def expected(task: Task, op: Op) -> tuple[float, float]:
    """Seconds of a task in int8 and in FP32 by rates measured once, of one thread.

    They are right within a factor of two on processors of one kind; :data:`_EXPECTED` keeps to
    what is beyond that.
    """
    isa = instruction_sets()
    g = task.geometry
    depthwise = g.groups > 1 and g.inputs == 1
    form = "depthwise" if depthwise else "dense"
    if g.transposed:
        form = "transposed 3d" if len(g.kernel) == 3 else "transposed"
    rates = _RATES[form]
    fp32_rate = (rates[2] if "AVX512" in isa else rates[3]) / (3 if depthwise else 1)
    fp32_rate = _RATES["depthwise"][2] / 3 if g.transposed and depthwise else fp32_rate
    int8 = task.macs / (rates[0] if "AVX512-VNNI" in isa else rates[1])
    pixels = math.prod(task.output_shape) / g.outputs
    if g.transposed and g.groups > 1:
        int8 = pixels * g.groups * _GROUPED_TRANSPOSED
    elif depthwise and not _has_fbgemm_depthwise(task):
        usual = candidates_of(task, op)[0].kernel
        int8 = pixels * g.groups * _SLOW_DEPTHWISE if usual == "fbgemm" else int8
    return _CALL[0] + int8, _CALL[1] + task.macs / fp32_rate


def _has_fbgemm_depthwise(task: Task) -> bool:
    g = task.geometry
    square = set(g.kernel) in ({3}, {5}) and len(g.kernel) == 2
    return (square or g.kernel == (3, 3, 3)) and set(g.dilation) == {1}


def _expected_conversion(_: str, shape: Iterable[int]) -> float:
    return 3e-6 + 0.04e-9 * math.prod(shape)
