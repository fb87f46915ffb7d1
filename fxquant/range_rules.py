"""Which range to quantize to, given what a collector remembers.

A rule is a frozen object with one method, ``choose(collector, spec) -> (min_val, max_val)``, which
never changes the collector: several rules can be tried on one calibration.

==========================  ================  ==================================================
rule                        needs             minimizes or keeps
==========================  ================  ==================================================
:class:`MinMaxRule`         any collector     keeps everything that was seen
:class:`PercentileRule`     a histogram       keeps a share of the values at each end
:class:`MSERule`            a histogram       the expected squared error of quantizing
:class:`EntropyRule`        a histogram       the Kullback-Leibler divergence of the histograms
:class:`TorchHistogramRule` a histogram       what torch.ao's ``HistogramObserver`` minimizes
:class:`OnnxEntropyRule`    a histogram       what ONNX Runtime's entropy calibrator minimizes
==========================  ================  ==================================================

Those that need a histogram take one per tensor (``HistogramObserver``) or one per channel
(``PerChannelHistogramObserver``), and choose each channel's range from its own.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fxquant.collectors import (
    Collector,
    Histogram,
    HistogramCollector,
    PerChannelHistogramCollector,
    SpanHistogramCollector,
)
from fxquant.errors import ConfigError
from fxquant.specs import QuantSpec

# Bins times candidates evaluated at once: bounds the scratch memory of a search to some MiB.
_EVALUATIONS_AT_ONCE: Final[int] = 1 << 16
# Of the mirrored histogram of OnnxEntropyRule, whose search is quadratic in them.
_MOST_BINS_A_SIDE: Final[int] = 2048


@runtime_checkable
class RangeRule(Protocol):
    """What every rule offers."""

    def choose(self, collector: Collector, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range to quantize to: ``(min_val, max_val)``, float32, 0-d or ``[C]``."""
        ...


@dataclass(frozen=True, slots=True)
class MinMaxRule:
    """Keep the whole observed range; works with every collector, per tensor and per channel."""

    def choose(self, collector: Collector, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The collector's own extremes."""
        return collector.min_val.clone(), collector.max_val.clone()


class _HistogramRule:
    """A rule that makes a range of one histogram: of the tensor's, or of each channel's."""

    __slots__ = ()

    #: Whether what the rule measures holds for a zero point that is no integer.
    any_zero_point: ClassVar[bool] = False

    def choose(self, collector: Collector, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range of the tensor, 0-d, or of every channel, ``[C]``.

        Raises:
            ConfigError: the collector holds no histogram, or one for the whole tensor where the
                spec is per channel (or the other way round), or the rule is not defined for the
                spec.
        """
        name = type(self).__name__
        by_channel = isinstance(collector, PerChannelHistogramCollector)
        if not by_channel and not isinstance(
            collector, (HistogramCollector, SpanHistogramCollector)
        ):
            raise ConfigError(
                f"{name} needs a histogram, but {type(collector).__name__} keeps none; use"
                " HistogramObserver, PerChannelHistogramObserver, or MinMaxRule"
            )
        if spec.is_float:
            raise ConfigError(f"{name} chooses a range of integers; {spec.short()} is a cast")
        if spec.is_per_channel != by_channel:
            kind = "PerChannelHistogramObserver" if spec.is_per_channel else "HistogramObserver"
            raise ConfigError(
                f"{name} cannot make ranges for {spec.short()} of what {type(collector).__name__}"
                f" keeps; use {kind}"
            )
        if spec.has_float_zero_point and not self.any_zero_point:
            raise ConfigError(
                f"{name} measures integers with an integer zero point; for {spec.short()} use"
                " PercentileRule, or PerChannelMinMaxObserver"
            )
        if isinstance(collector, PerChannelHistogramCollector):
            single = replace(spec, qscheme=_PER_TENSOR[spec.is_symmetric], ch_axis=None)
            ranges = [self.range_of(h, single) for h in collector.to_histograms()]
            ends = torch.tensor(ranges, dtype=torch.float32)
            return ends[:, 0].contiguous(), ends[:, 1].contiguous()
        assert isinstance(collector, (HistogramCollector, SpanHistogramCollector))
        low, high = self.range_of(collector.to_histogram(), spec)
        return _pair(low, high)

    @abstractmethod
    def range_of(self, histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range of one histogram for a per-tensor spec: ``(min_val, max_val)``."""


_PER_TENSOR: Final = {False: torch.per_tensor_affine, True: torch.per_tensor_symmetric}


@dataclass(frozen=True, slots=True)
class PercentileRule(_HistogramRule):
    """Keep the range between two quantiles: ``[Q(1 - p), Q(p)]``, exact to a histogram bin.

    The extremes are kept at an end that holds no more than its share, and a range that was
    one-sided stays anchored at its exact extreme: cutting off the low end of a ReLU gains nothing.

    Args:
        p: the quantile of the upper end, in (0.5, 1]; 0.9999 cuts one value in ten thousand.
    """

    any_zero_point: ClassVar[bool] = True

    p: float = 0.9999

    def __post_init__(self) -> None:
        """Refuse a quantile that is no upper end."""
        if not 0.5 < self.p <= 1.0:
            raise ConfigError(f"PercentileRule(p) must be in (0.5, 1], got {self.p!r}")

    def range_of(self, histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The two quantiles."""
        edges = histogram.edges()
        cumulative = torch.cat((torch.zeros(1, dtype=torch.float64), histogram.counts.cumsum(0)))
        low = _quantile(edges, cumulative, 1.0 - self.p)
        high = _quantile(edges, cumulative, self.p)
        if histogram.min_val >= 0:
            low = histogram.min_val
        if histogram.max_val <= 0:
            high = histogram.max_val
        return low, high


@dataclass(frozen=True, slots=True)
class MSERule(_HistogramRule):
    """Minimize the expected squared error of quantizing, over both ends of the range.

    The error of a candidate is integrated in closed form, taking values as uniform within a bin:
    rounding inside the range, clipping outside, with the very scale and zero point that
    :func:`fxquant.specs.choose_qparams` would make. Candidates form a geometric grid that is then
    narrowed around the best; the observed range itself is always among them, so the result is
    never worse than :class:`MinMaxRule` by this measure. Symmetric specs and one-sided data have
    one end to search.

    Args:
        points: candidates per end in the first grid, at least 3.
        refinements: how often the grid is narrowed.
    """

    points: int = 17
    refinements: int = 3

    def __post_init__(self) -> None:
        """Refuse grids that search nothing."""
        if self.points < 3 or self.refinements < 0:
            raise ConfigError(
                f"MSERule needs points >= 3 and refinements >= 0, got {self.points} and "
                f"{self.refinements}"
            )

    def range_of(self, histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range of least expected error."""
        if spec.is_symmetric:
            largest = max(abs(histogram.min_val), abs(histogram.max_val))
            ends = (0.0, largest)
        else:
            ends = (max(-histogram.min_val, 0.0), max(histogram.max_val, 0.0))
        best = _search(histogram, spec, ends, self.points, self.refinements)
        if spec.is_symmetric:
            return -best[1], best[1]
        low = histogram.min_val if best[0] >= ends[0] else -best[0]
        high = histogram.max_val if best[1] >= ends[1] else best[1]
        return low, high


@dataclass(frozen=True, slots=True)
class EntropyRule(_HistogramRule):
    """Minimize the information lost, measured between the value histograms.

    For a clipping magnitude ``t`` the values outside ``[-t, t]`` are moved to the ends (giving the
    distribution ``P``) and the values inside are pooled into the spec's levels, each spread evenly
    over its occupied bins (giving ``Q``). The ``t`` of least ``KL(P || Q)`` wins. The bin of zero
    counts no more than its neighbours. After Migacz,
    "8-bit inference with TensorRT", GTC 2017, extended to ranges that are not symmetric by
    clipping each end at the same magnitude.

    Args:
        candidates: how many magnitudes are tried, at least 2.
    """

    candidates: int = 128

    def __post_init__(self) -> None:
        """Refuse a search without candidates."""
        if self.candidates < 2:
            raise ConfigError(f"EntropyRule needs candidates >= 2, got {self.candidates}")

    def range_of(self, histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range of least divergence."""
        largest = max(abs(histogram.min_val), abs(histogram.max_val))
        # Fewer bins than levels would all be kept apart, so nothing could be lost.
        smallest = _distance_from_zero(histogram) + spec.levels * histogram.width
        best = (float("inf"), histogram.min_val, histogram.max_val)
        if smallest >= largest:
            return best[1], best[2]
        for magnitude in torch.linspace(smallest, largest, self.candidates).tolist():
            low, high = max(histogram.min_val, -magnitude), min(histogram.max_val, magnitude)
            divergence = _divergence(histogram, low, high, spec.levels)
            if divergence <= best[0]:
                best = (divergence, low, high)
        return best[1], best[2]


@dataclass(frozen=True, slots=True)
class TorchHistogramRule(_HistogramRule):
    """The range that torch.ao's ``HistogramObserver`` finds on the same histogram.

    Starting from the whole histogram, the end whose next quantile step (``step`` of the values)
    covers more bins moves inwards, as long as the L2 error of quantizing the histogram's density
    to the levels of the storage dtype (256 for 8 bits, whatever part of them the spec uses) does
    not grow. :class:`~fxquant.observers.TorchHistogramObserver` has torch.ao's histogram too, and
    then the range is the same to the last bit; on the histogram of ``HistogramObserver``, whose
    bins lie on a power-of-two grid, the two agree within 10 % on the same data.

    Args:
        step: the quantile by which an end moves.
    """

    step: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse a step that never or at once ends the search."""
        if not 0.0 < self.step < 0.5:
            raise ConfigError(f"TorchHistogramRule(step) must be in (0, 0.5), got {self.step!r}")

    def range_of(self, histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range at which the greedy search stops."""
        levels = 2 ** torch.iinfo(spec.dtype).bits
        first, last = greedy_bins(histogram.counts, levels, self.step)
        begin, width = _pair(histogram.low, histogram.width)  # in float32, as torch.ao has it
        low, high = float(begin + width * first), float(begin + width * (last + 1))
        if high - histogram.max_val > histogram.width / 2:  # the end of a grid, not of a span
            high = histogram.max_val
        return max(low, histogram.min_val), high


@dataclass(frozen=True, slots=True)
class OnnxEntropyRule(_HistogramRule):
    """The range that ONNX Runtime's entropy calibrator finds on the same histogram.

    Ranges grow bin by bin around zero, to both sides alike, and are cut to what was seen. It
    differs from :class:`EntropyRule` in what it compares: the range always has ``levels`` cells,
    used or not (of a ReLU half of them are below zero); a remainder of bins that does not fill the
    last cell is lost from the approximation; counts are whole; the spike at zero counts in full.
    So it cuts deep into one-sided data, see docs/configuration.md. For models that have to agree
    with ONNX Runtime's, ``CalibraterEntropy`` with ``num_quantized_bins=levels``.

    Args:
        levels: how many cells the values are pooled to, at least 2; ONNX Runtime's default is 128.
    """

    levels: int = 128

    def __post_init__(self) -> None:
        """Refuse fewer cells than an approximation has."""
        if self.levels < 2:
            raise ConfigError(f"OnnxEntropyRule needs levels >= 2, got {self.levels}")

    def range_of(self, histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range of least divergence around zero, cut to what was seen."""
        first = round(histogram.low / histogram.width)  # a whole number of bins from zero
        number, width = torch.arange(len(histogram.counts)) + first, histogram.width
        # Bins far from zero for their width are merged, or there would be millions between.
        while max(-int(number[0]), int(number[-1]) + 1) > _MOST_BINS_A_SIDE:
            number, width = torch.div(number, 2, rounding_mode="floor"), 2 * width
        half = max(-int(number[0]), int(number[-1]) + 1, 1)
        counts = torch.zeros(2 * half, dtype=torch.int64)
        counts.index_add_(0, number + half, histogram.counts.long())
        begin, end = symmetric_bins(counts, self.levels)
        low, high = (begin - half) * width, (end - half) * width
        return max(low, histogram.min_val), min(high, histogram.max_val)


def symmetric_bins(counts: Tensor, levels: int) -> tuple[int, int]:
    """The bins that :class:`OnnxEntropyRule` keeps of a histogram around zero.

    Args:
        counts: int64 ``[K]``, of equally wide bins, zero at the left edge of bin ``K // 2``.
        levels: cells to pool to.

    Returns:
        ``(begin, end)``: edges, ``0 <= begin < end <= K``; all bins where there are no more than
        ``levels``.
    """
    values = counts.numpy()
    zero, size = len(values) // 2, len(values)
    total, before = values.sum(), np.concatenate([[0], np.cumsum(values)])
    best: tuple[float, int, int] = (float("inf"), 0, size)
    for half in range(levels // 2, zero + 1):
        begin, end = zero - half, min(zero + half + 1, size)
        inside = values[begin:end]
        clipped = inside.copy()
        clipped[0] += before[begin]
        clipped[-1] += total - before[end]
        divergence = _smoothed_divergence(clipped, _pooled(inside, clipped != 0, levels))
        if divergence < best[0]:
            best = (divergence, begin, end)
    return best[1], best[2]


def _pooled(inside: np.ndarray, occupied: np.ndarray, levels: int) -> np.ndarray:
    """``inside`` pooled to ``levels`` cells, each spread over its bins as a whole number."""
    width = len(inside) // levels
    used = width * levels
    cells = inside[:used].reshape(levels, width).sum(1)
    cells[-1] += inside[used:].sum()
    members = occupied[:used].reshape(levels, width).sum(1)
    spread = np.zeros(len(inside), dtype=np.int64)
    spread[:used] = np.repeat((cells / np.maximum(members, 1)).astype(np.int64), width)
    spread[:used][np.repeat(members == 0, width)] = 0
    return spread


def _smoothed_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """``KL(p || q)`` in float32, with empty bins raised a little at the cost of the others."""
    smooth = []
    for counts in (p, q):
        empty = counts == 0
        empties = int(empty.sum())
        if empties == len(counts):
            return float("inf")
        share = 1e-4 * empties / (len(counts) - empties)
        values = counts.astype(np.float32)
        values += 1e-4 * empty.astype(np.float32) + -share * (~empty).astype(np.float32)
        if (values <= 0).any():
            return float("inf")
        smooth.append(1.0 * values / np.sum(values))
    left, right = smooth
    return float(np.sum(left * np.log(left / right)))


def greedy_bins(counts: Tensor, levels: int, step: float = 1e-5) -> tuple[int, int]:
    """First and last bin that :class:`TorchHistogramRule` keeps of a histogram.

    Args:
        counts: ``[K]`` counts of equally wide bins.
        levels: number of levels that the kept bins are quantized to.
        step: the quantile by which an end moves.

    Returns:
        ``(first, last)``, both kept, ``0 <= first <= last < K``.
    """
    counts = counts.to(torch.float64)
    cumulative: list[float] = counts.cumsum(0).tolist()
    total = cumulative[-1]
    first, last = 0, len(counts) - 1
    cut_low, cut_high, least = 0.0, 1.0, float("inf")
    while cut_low < cut_high:
        next_low, next_high = cut_low + step, cut_high - step
        # The first bin at or after `first` whose cumulated share reaches the cut, and likewise
        # the last bin at or before `last` whose share does not exceed it.
        left = min(max(bisect_left(cumulative, _float32(next_low * total)), first), last)
        right = max(min(bisect_right(cumulative, _float32(next_high * total)) - 1, last), first)
        if left - first > last - right:
            candidate, cut_low = (left, last), next_low
        else:
            candidate, cut_high = (first, right), next_high
        if candidate == (first, last):
            continue
        norm = _density_error(counts, candidate[0], candidate[1], levels)
        if norm > least:
            break
        least = norm
        first, last = candidate
    return first, last


def _float32(value: float) -> float:
    """Rounded to float32, in which torch.ao compares counts: cuts fall on whole counts often."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _density_error(counts: Tensor, first: int, last: int, levels: int) -> float:
    """Squared error, in bin widths, of sending every bin's density to level centres.

    Bins ``first..last`` are cut into ``levels`` cells whose centres are the values that can be
    represented; what lies outside goes to the outermost cells.
    """
    cell = (last - first + 1) / levels
    begin = torch.arange(len(counts), dtype=torch.float64) - first
    end = begin + 1.0
    cell_begin = torch.floor(begin / cell).clamp(0, levels - 1)
    cell_end = torch.floor(end / cell).clamp(0, levels - 1)
    half = cell / 2

    def cube_between(low: Tensor, high: Tensor) -> Tensor:
        return (high**3 - low**3) / 3

    full = torch.full_like(begin, half)
    error = cube_between(begin - (cell_begin + 0.5) * cell, full)
    error = error + (cell_end - cell_begin - 1) * cube_between(-full, full)
    error = error + cube_between(-full, end - (cell_end + 0.5) * cell)
    return float((counts * error).sum())


def _pair(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def _quantile(edges: Tensor, cumulative: Tensor, share: float) -> float:
    """Where the cumulated count reaches ``share`` of all, linear within a bin."""
    target = share * float(cumulative[-1])
    bin_number = int(torch.searchsorted(cumulative, target).clamp(1, len(edges) - 1)) - 1
    before, after = float(cumulative[bin_number]), float(cumulative[bin_number + 1])
    fraction = (target - before) / (after - before) if after > before else 0.0
    left, right = float(edges[bin_number]), float(edges[bin_number + 1])
    return left + min(max(fraction, 0.0), 1.0) * (right - left)


def _search(
    histogram: Histogram,
    spec: QuantSpec,
    ends: tuple[float, float],
    points: int,
    refinements: int,
) -> tuple[float, float]:
    """Magnitudes ``(below, above)`` of the best range, each between 0 and its end."""
    grids = [_first_grid(end, histogram.width, points) for end in ends]
    best, least = ends, float("inf")
    for _ in range(refinements + 1):
        below, above = torch.meshgrid(grids[0], grids[1], indexing="ij")
        below, above = below.flatten(), above.flatten()
        errors = expected_error(histogram, -below, above, spec)
        # Of equal errors the widest range wins, so that ties do not depend on the grid.
        widths = below + above
        floor = errors.min()
        where = int(torch.where(errors <= floor, widths, -torch.ones_like(widths)).argmax())
        if float(errors[where]) < least:
            least, best = float(errors[where]), (float(below[where]), float(above[where]))
        grids = [_narrow(grid, value) for grid, value in zip(grids, best, strict=True)]
    return best


def _first_grid(end: float, width: float, points: int) -> Tensor:
    """Geometric from the end down to where the histogram resolves nothing, always with 'end'."""
    if end <= 0.0:
        return torch.zeros(1, dtype=torch.float64)
    smallest = min(8 * width / end, 0.5)
    exponents = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    return end * smallest**exponents


def _narrow(grid: Tensor, value: float) -> Tensor:
    """Half as many points again, between the neighbours of ``value`` in ``grid``."""
    if len(grid) == 1:
        return grid
    grid = grid.sort().values
    where = int((grid - value).abs().argmin())
    low, high = float(grid[max(where - 1, 0)]), float(grid[min(where + 1, len(grid) - 1)])
    inner = torch.linspace(low, high, 9, dtype=torch.float64)
    inner[int((inner - value).abs().argmin())] = value
    return inner


def expected_error(histogram: Histogram, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Mean squared error of quantizing the histogram's values to each of ``M`` ranges.

    Values are taken as uniform within a bin; bins that hold one single value (the extremes
    coincide) count at that value.

    Args:
        histogram: the values.
        low: ``[M]`` lower ends, float64, at most 0.
        high: ``[M]`` upper ends, float64, at least 0.
        spec: a per-tensor integer spec.

    Returns:
        ``[M]`` errors, float64, in units of the values squared.
    """
    scale, zero_point = _qparams(low, high, spec)
    edges = histogram.edges()
    counts = histogram.counts
    spans = edges[1:] - edges[:-1]
    # A bin that the exact extremes shrink to a point has an error, but no extent to integrate.
    point = spans <= 0
    used = (counts > 0) & ~point
    density = torch.where(used, counts / spans.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    points, point_counts = edges[:-1][point], counts[point]
    errors = torch.empty_like(scale)
    rows = max(1, _EVALUATIONS_AT_ONCE // len(edges))
    for start in range(0, len(scale), rows):
        part = slice(start, start + rows)
        s, z = scale[part, None], zero_point[part, None]
        integral = _error_integral(edges[None, :] / s, z, spec)
        total = integral.diff(dim=1) @ density * s[:, 0] ** 3
        if len(points):
            unit = points[None, :] / s
            nearest = (torch.round(unit + z)).clamp(spec.quant_min, spec.quant_max) - z
            total = total + ((unit - nearest) * s).square() @ point_counts
        errors[part] = total
    return errors / counts.sum()


def _qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """What ``choose_qparams`` makes of every candidate, as float64."""
    steps = spec.quant_max - spec.quant_min
    if spec.is_symmetric:
        scale = (torch.maximum(-low, high) / (steps / 2)).clamp(min=spec.eps)
        return scale, torch.full_like(scale, spec.symmetric_zero_point)
    scale = ((high - low) / steps).clamp(min=spec.eps)
    zero_point = (spec.quant_min - torch.round(low / scale)).clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point


def _error_integral(u: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Antiderivative of the squared quantization error at ``u = x / scale``, in units of scale.

    Within the range the error repeats with period 1: ``(u - round(u))**2``, whose antiderivative
    is ``round(u) / 12 + (u - round(u))**3 / 3``. Beyond the last level ``k`` it is ``(u - k)**2``,
    whose antiderivative continues the same expression with ``round(u)`` replaced by ``k``.
    ``u`` is overwritten.
    """
    nearest = torch.round(u).clamp_(spec.quant_min - zero_point, spec.quant_max - zero_point)
    rest = u - nearest
    cube = torch.mul(rest, rest, out=u).mul_(rest)  # in place: the arrays stay in the cache
    return nearest.div_(12).add_(cube.div_(3))


def _distance_from_zero(histogram: Histogram) -> float:
    return max(histogram.min_val, -histogram.max_val, 0.0)


def _divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    """``KL(P || Q)`` for the range ``[low, high]``; see :class:`EntropyRule`."""
    counts, width = histogram.counts, histogram.width
    first = max(int((low - histogram.low) // width), 0)
    last = min(int((high - histogram.low) // width), len(counts) - 1)
    inside = counts[first : last + 1].clone()
    zero = int(-histogram.low // width) - first
    if len(inside) > 1 and 0 <= zero < len(inside):
        # Zero is exact at every range: a spike there (ReLU) would drown what ranges differ in.
        neighbours = inside[max(zero - 1, 0) : zero + 2]
        others = neighbours.sum() - inside[zero]
        inside[zero] = torch.minimum(inside[zero], others / (len(neighbours) - 1))
    occupied = inside > 0
    if not bool(occupied.any()):
        return float("inf")
    # Clipped values join the outermost values that the range holds.
    held = torch.nonzero(occupied).flatten()
    clipped = inside.clone()
    clipped[held[0]] += counts[:first].sum()
    clipped[held[-1]] += counts[last + 1 :].sum()
    # The range reaches from low to high and to zero; the bins take their part of the levels.
    share = (high - low) / (max(high, 0.0) - min(low, 0.0))
    cells = max(1, round(levels * share))
    cell = torch.arange(len(inside)) * cells // len(inside)
    pooled = torch.zeros(cells, dtype=torch.float64).index_add_(0, cell, inside)
    members = torch.zeros(cells, dtype=torch.float64).index_add_(0, cell, occupied.double())
    spread = torch.where(occupied, (pooled / members.clamp(min=1.0))[cell], 0.0)
    p, q = clipped[occupied] / clipped.sum(), spread[occupied] / spread.sum()
    return float((p * (p / q).log()).sum())
