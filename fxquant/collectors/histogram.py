"""Histograms on a grid of powers of two, which no order of batches changes."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import copy
import functools
import math
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from fxquant.collectors.base import Collector, checked_bins, flat
from fxquant.collectors.min_max import PerChannelMinMaxCollector
from fxquant.errors import ConfigError


class Histogram(NamedTuple):
    """The occupied part of a :class:`HistogramCollector`, on the CPU.

    Bin ``i`` counts the values in ``[low + i * width, low + (i + 1) * width)``.
    """

    counts: Tensor  #: float64 [K], whole numbers
    low: float  #: left edge of bin 0, at most ``min_val``
    width: float  #: width of a bin
    min_val: float  #: exact smallest value, in bin 0
    max_val: float  #: exact largest value, in bin K - 1

    def edges(self) -> Tensor:
        """The ``K + 1`` edges, float64, with the outer two drawn in to the exact extremes."""
        edges = self.low + self.width * torch.arange(len(self.counts) + 1, dtype=torch.float64)
        edges[0], edges[-1] = self.min_val, self.max_val
        return edges


class HistogramCollector(Collector):
    """Smallest and largest value, and a histogram between them.

    The bins lie on a grid ``[i * 2**e, (i + 1) * 2**e)`` with the smallest ``e`` for which the
    observed range needs no more than ``bins`` of them (so more than half are in use). When the
    range grows past that, ``e`` grows too and whole bins merge: no count is ever split or spread.
    The statistics are therefore a function of the *set* of counted values alone, whatever the
    order of the batches, the number of threads, or the way streams were united.

    Counting is what calibration costs beyond the forward pass, so of a tensor with more than
    ``count_limit`` values only every ``k``-th is counted, ``k`` times; ``k`` is coprime to every
    dimension, so that no row, column or channel is preferred. ``min_val`` and ``max_val`` always
    see all values, and the two extremes are counted once on top, so that no outlier is missed.

    Buffers beyond those of the base: ``histogram`` (int64 ``[bins]``), ``exponent`` (``e``) and
    ``first_bin`` (the ``i`` of ``histogram[0]``).

    Args:
        bins: the most bins in use, at least 2.
        count_limit: the most values counted of one tensor; ``None`` counts all.
        device: where the statistics live.
    """

    # Values binned at a time: on a CPU what they need stays in the level-2 cache.
    CPU_CHUNK: Final[int] = 1 << 17
    DEVICE_CHUNK: Final[int] = 1 << 26
    LANES: Final[int] = 4
    # No bin is narrower than 2**-100, so that its reciprocal is a normal float32.
    SMALLEST_EXPONENT: Final[int] = -100

    bins: int
    count_limit: int
    histogram: Tensor
    exponent: Tensor
    first_bin: Tensor

    def __init__(
        self,
        bins: int = 2048,
        *,
        count_limit: int | None = 1 << 16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device=device)
        if count_limit is not None and count_limit < 1:
            raise ConfigError(f"count_limit must be at least 1, or None, got {count_limit}")
        self.bins = checked_bins(bins)
        self.count_limit = 1 << 62 if count_limit is None else count_limit
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.int64, device=device))
        self.register_buffer("exponent", zero)
        self.register_buffer("first_bin", zero.clone())

    def observe(self, x: Tensor) -> None:
        """Take ``x``, of any shape, into the statistics.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        if x.numel() == 0:
            return
        values = flat(x)
        low, high = torch.aminmax(values)
        smallest, largest = self._finite(low, high, x)
        if smallest < float(self.min_val) or largest > float(self.max_val):
            self._widen(low, high)
            self._fit_grid(self.SMALLEST_EXPONENT)
        stride = _stride(values.numel(), self.count_limit)
        self._count(values[::stride], stride)
        if stride > 1:
            self._count_one(smallest)
            self._count_one(largest)
        self.num_batches += 1

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.histogram.zero_()
        self.exponent.zero_()
        self.first_bin.zero_()

    def to_histogram(self) -> Histogram:
        """The occupied bins.

        Raises:
            CalibrationError: nothing has been observed.
        """
        self._refuse_unobserved()
        width = 2.0 ** int(self.exponent)
        low, high = float(self.min_val), float(self.max_val)
        first = int(self.first_bin)
        used = math.floor(high / width) - first + 1
        counts = self.histogram[:used].to("cpu", torch.float64)
        return Histogram(counts, first * width, width, low, high)

    def _count_one(self, value: float) -> None:
        number = math.floor(value / 2.0 ** int(self.exponent)) - int(self.first_bin)
        self.histogram[number] += 1

    def _count(self, values: Tensor, weight: int) -> None:
        on_cpu = values.device.type == "cpu"
        first = int(self.first_bin)
        # A spike (the zeros of a ReLU) makes one counter wait for itself again and again, so
        # neighbouring values of a long row are counted in different lanes, added up at the end.
        lanes = self.LANES if on_cpu and values.numel() >= self.bins * self.LANES else 1
        for part in torch.split(values, self.CPU_CHUNK if on_cpu else self.DEVICE_CHUNK):
            number = self._bin_numbers(part)
            if lanes > 1:
                number.add_(self._lane_starts(values.device)[: part.numel()])
            number.sub_(first)
            counts = torch.bincount(number.to(torch.int32), minlength=lanes * self.bins)
            if lanes > 1:
                counts = counts.view(lanes, self.bins).sum(0)
            self.histogram.add_(counts, alpha=weight)

    def _bin_numbers(self, values: Tensor) -> Tensor:
        """``floor(values / width)`` on the grid, as whole float32 numbers."""
        # Scaling by a power of two is exact, so floor() finds the bin without rounding. Only with
        # bins wider than 1 can a product be too small for float32, and float64 is taken.
        exponent = int(self.exponent)
        if exponent > 0:
            values = values.to(torch.float64)
        return (values * 2.0 ** (-exponent)).floor_().to(torch.float32)

    def _lane_starts(self, device: torch.device) -> Tensor:
        if is_scripting():
            lane = torch.arange(self.CPU_CHUNK, device=device) % self.LANES
            return (lane * self.bins).to(torch.float32)
        return _cached_lane_starts(self.CPU_CHUNK, self.LANES, self.bins, device)

    def _fit_grid(self, at_least: int) -> None:
        """Coarsen and shift the grid until it holds ``[min_val, max_val]``."""
        low, high = float(self.min_val), float(self.max_val)
        exponent = _finest_exponent(low, high, self.bins, at_least)
        old_exponent, old_first = int(self.exponent), int(self.first_bin)
        empty = int(self.num_batches) == 0
        if not empty:
            exponent = max(exponent, old_exponent)
        first = math.floor(low / 2.0**exponent)
        if not empty and (exponent != old_exponent or first != old_first):
            self._move_counts(exponent - old_exponent, old_first, first)
        self.exponent.fill_(exponent)
        self.first_bin.fill_(first)

    def _move_counts(self, doublings: int, old_first: int, first: int) -> None:
        # Bin numbers are below 2**22 in magnitude: more doublings than 40 change nothing more.
        merged = 1 << min(doublings, 40)
        number = torch.arange(self.bins, device=self.histogram.device) + old_first
        number = torch.div(number, merged, rounding_mode="floor") - first
        # Only empty bins above the largest value can fall outside.
        number = number.clamp(0, self.bins - 1)
        moved = torch.zeros_like(self.histogram).index_add_(0, number, self.histogram)
        self.histogram.copy_(moved)

    def _absorb_statistics(self, other: "Collector") -> None:
        assert isinstance(other, HistogramCollector)  # absorb() compares the types
        self._refuse_other_bins(self.bins, other.bins)
        device = self.histogram.device
        theirs = copy.deepcopy(other).to(device)
        super()._absorb_statistics(theirs)
        self._fit_grid(int(theirs.exponent))
        theirs._widen(self.min_val, self.max_val)
        theirs._fit_grid(int(self.exponent))
        self.histogram += theirs.histogram


class PerChannelHistogramCollector(PerChannelMinMaxCollector):
    """Smallest and largest value, and a histogram, of every slice along one axis.

    Each channel has a :class:`HistogramCollector` of its own, in the module list ``channels``: for
    weights, of which it sees every value. Activations have too many for it.

    Args:
        bins: the most bins in use per channel, at least 2.
        ch_axis: the channel axis; may be negative.
        device: where the statistics live.
    """

    channels: nn.ModuleList

    def __init__(
        self, bins: int = 2048, ch_axis: int = 0, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(ch_axis, device=device)
        self.bins = checked_bins(bins)
        self.channels = nn.ModuleList()

    def observe(self, x: Tensor) -> None:
        """Take ``x``, with the same number of channels every time, into the statistics.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
            CalibrationError: ``x`` has no such axis, or another number of channels than before.
        """
        if x.numel() == 0:
            return
        super().observe(x)
        axis = self.ch_axis + x.dim() if self.ch_axis < 0 else self.ch_axis
        for channel, values in zip(self.channels, x.detach().movedim(axis, 0), strict=True):
            channel(values)

    def to_histograms(self) -> list[Histogram]:
        """The occupied bins of every channel.

        Raises:
            CalibrationError: nothing has been observed.
        """
        self._refuse_unobserved()
        return [channel.to_histogram() for channel in self._histograms()]

    def _histograms(self) -> list[HistogramCollector]:
        return [c for c in self.channels if isinstance(c, HistogramCollector)]

    def _set_channels(self, channels: int) -> None:
        super()._set_channels(channels)
        device = self.min_val.device
        self.channels = nn.ModuleList(
            HistogramCollector(self.bins, count_limit=None, device=device) for _ in range(channels)
        )

    def _absorb_statistics(self, other: "Collector") -> None:
        assert isinstance(other, PerChannelHistogramCollector)  # absorb() compares the types
        super()._absorb_statistics(other)
        for mine, theirs in zip(self._histograms(), other._histograms(), strict=True):
            mine.absorb(theirs)


@functools.lru_cache(maxsize=8)
def _cached_lane_starts(size: int, lanes: int, bins: int, device: torch.device) -> Tensor:
    """``[0, bins, 2 * bins, ..., 0, bins, ...]``: where each value's lane begins, float32.

    One row for all collectors; made outside inference mode, whose tensors cannot be used outside.
    """
    with torch.inference_mode(False):
        return (torch.arange(size, device=device) % lanes * bins).to(torch.float32)


def _stride(count: int, limit: int) -> int:
    """The smallest ``k`` that leaves at most ``limit`` of ``count`` values and is coprime to it."""
    stride = (count + limit - 1) // limit
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _finest_exponent(low: float, high: float, bins: int, at_least: int) -> int:
    """The smallest ``e`` for which ``bins`` bins of width ``2**e`` on the grid hold the range.

    Bin numbers stay below 2**22 as well, where float32 still holds every integer.
    """
    largest = max(abs(low), abs(high))
    if largest == 0.0:
        return at_least
    # frexp: v = m * 2**k with 0.5 <= m < 1, so 2**(k - 1) <= v < 2**k.
    exponent = max(at_least, math.frexp(largest)[1] - 22)
    if high > low:
        exponent = max(exponent, math.frexp((high - low) / bins)[1] - 1)
    while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= bins:
        exponent += 1
    return exponent
