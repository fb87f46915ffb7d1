"""What observers remember about the tensors that pass them.

A collector holds statistics and nothing else; which range to make of them is the business of
:mod:`fxquant.range_rules`, so one calibration serves every choice. All statistics are buffers:
they are in ``state_dict``, move with the module, and take the same memory whatever the number
of batches.

=============================================  =========================================
collector                                      remembers
=============================================  =========================================
:class:`MinMaxCollector`                       smallest and largest value
:class:`MovingAverageMinMaxCollector`          exponential average of both, per batch
:class:`PerChannelMinMaxCollector`             both per channel
:class:`MovingAveragePerChannelMinMaxCollector`  their averages per channel
:class:`HistogramCollector`                    both and a histogram
:class:`PerChannelHistogramCollector`          both and a histogram per channel
=============================================  =========================================
"""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from fxquant.errors import CalibrationError, ConfigError, NonFiniteStatisticError


class Collector(nn.Module):
    """Base of all collectors.

    Buffers: ``min_val`` and ``max_val`` (float32), ``num_batches`` (batches seen, empty tensors
    not counted) and ``num_nonfinite`` (NaN and Inf values refused), both int64.

    Attributes:
        owner: what messages call this collector, e.g.
            ``activation_post_process_3 (output of 'layer1.0.conv1')``.
    """

    min_val: Tensor
    max_val: Tensor
    num_batches: Tensor
    num_nonfinite: Tensor
    owner: str

    def __init__(self, *, device: torch.device | str | None = None, channels: bool = False) -> None:
        super().__init__()
        shape = (0,) if channels else ()
        self.owner = ""
        self.register_buffer("min_val", torch.full(shape, math.inf, device=device))
        self.register_buffer("max_val", torch.full(shape, -math.inf, device=device))
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches", zero)
        self.register_buffer("num_nonfinite", zero.clone())

    @property
    def was_observed(self) -> bool:
        """Whether at least one non-empty tensor has been seen."""
        return int(self.num_batches) > 0

    # TorchScript would compile properties; nothing scripted reads this one.
    __jit_unused_properties__ = ["was_observed"]  # noqa: RUF012

    def forward(self, x: Tensor) -> None:
        """Take ``x`` into the statistics; see :meth:`observe`."""
        self.observe(x)

    def observe(self, x: Tensor) -> None:
        """Take ``x`` into the statistics.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)
        self.num_batches.zero_()
        self.num_nonfinite.zero_()

    def absorb(self, other: "Collector") -> None:
        """Unite the statistics of ``other`` with these, as if both streams had been seen here.

        Raises:
            ConfigError: ``other`` is of another kind.
        """
        if type(other) is not type(self):
            raise ConfigError(
                f"cannot unite statistics of {type(self).__name__} and {type(other).__name__}"
                f"{self._where()}: give the tensors that share parameters the same observer"
            )
        if not other.was_observed:
            self.num_nonfinite += other.num_nonfinite.to(self.num_nonfinite.device)
            return
        self._absorb_statistics(other)
        self.num_batches += other.num_batches.to(self.num_batches.device)
        self.num_nonfinite += other.num_nonfinite.to(self.num_nonfinite.device)

    def _absorb_statistics(self, other: "Collector") -> None:
        low, high = other.min_val.to(self.min_val), other.max_val.to(self.max_val)
        self._widen(low, high)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        torch.minimum(self.min_val, low, out=self.min_val)
        torch.maximum(self.max_val, high, out=self.max_val)

    def _finite(self, low: Tensor, high: Tensor, x: Tensor) -> tuple[float, float]:
        """The smallest and the largest value of ``x``, refused when there is no such thing."""
        # A NaN anywhere in x is in low and high as well, so no pass over x is needed.
        smallest, largest = float(low), float(high)
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            if is_scripting():
                raise ValueError("NaN or Inf reached observer " + self.owner)
            self._refuse(x)
        return smallest, largest

    @torch.jit.unused
    def _refuse(self, x: Tensor) -> None:
        values = x.detach().to(torch.float32)
        nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
        self.num_nonfinite += nans + infs
        shape = ", ".join(str(s) for s in x.shape)
        raise NonFiniteStatisticError(
            f"observer{self._where() or ' without a name'} got {nans} NaN and {infs} Inf among "
            f"{values.numel()} values of shape [{shape}] in batch {int(self.num_batches) + 1}; "
            "no range can be made of them: look for the layer that makes them, or drop the batch"
        )

    def _where(self) -> str:
        return f" {self.owner}" if self.owner else ""

    def extra_repr(self) -> str:
        """The statistics in one line."""
        return f"min_val={_brief(self.min_val)}, max_val={_brief(self.max_val)}"


class MinMaxCollector(Collector):
    """Smallest and largest value of everything seen."""

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        super().__init__(device=device)

    def observe(self, x: Tensor) -> None:
        """Take ``x``, of any shape, into the statistics.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        if x.numel() == 0:
            return
        low, high = torch.aminmax(_flat(x))
        smallest, largest = self._finite(low, high, x)
        if smallest < float(self.min_val) or largest > float(self.max_val):
            self._widen(low, high)
        self.num_batches += 1


class MovingAverageMinMaxCollector(Collector):
    """Exponential average of each batch's smallest and largest value.

    The first batch sets both; afterwards ``m <- m + c * (batch - m)``.

    Args:
        averaging_constant: ``c`` above, in (0, 1].
        device: where the statistics live.
    """

    averaging_constant: float

    def __init__(
        self, averaging_constant: float = 0.01, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(device=device)
        self.averaging_constant = _averaging_constant(averaging_constant)

    def observe(self, x: Tensor) -> None:
        """Take ``x``, of any shape, into the averages.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        if x.numel() == 0:
            return
        low, high = torch.aminmax(_flat(x))
        self._finite(low, high, x)
        if int(self.num_batches) == 0:
            self._widen(low, high)
        else:
            self.min_val += self.averaging_constant * (low - self.min_val)
            self.max_val += self.averaging_constant * (high - self.max_val)
        self.num_batches += 1


class PerChannelMinMaxCollector(Collector):
    """Smallest and largest value of every slice along one axis.

    ``min_val`` and ``max_val`` have shape ``[0]`` until the first tensor, then ``[C]``.

    Args:
        ch_axis: the channel axis; may be negative.
        device: where the statistics live.
    """

    ch_axis: int

    def __init__(self, ch_axis: int = 0, *, device: torch.device | str | None = None) -> None:
        super().__init__(device=device, channels=True)
        self.ch_axis = ch_axis

    def observe(self, x: Tensor) -> None:
        """Take ``x``, with the same number of channels every time, into the statistics.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
            CalibrationError: ``x`` has no such axis, or another number of channels than before.
        """
        if x.numel() == 0:
            return
        low, high = self._channel_min_max(x)
        self._finite(torch.amin(low), torch.amax(high), x)
        self._fit_channels(low.numel())
        self._widen(low, high)
        self.num_batches += 1

    def reset(self) -> None:
        """Forget everything, the number of channels included."""
        self._set_channels(0)
        self.num_batches.zero_()
        self.num_nonfinite.zero_()

    def _channel_min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = self.ch_axis + x.dim() if self.ch_axis < 0 else self.ch_axis
        if axis < 0 or axis >= x.dim():
            self._refuse_shape(x, f"has no axis {self.ch_axis}")
        rows = x.detach().to(torch.float32).movedim(axis, 0).reshape(x.size(axis), -1)
        low, high = torch.amin(rows, dim=1), torch.amax(rows, dim=1)  # aminmax takes ten times that
        if self.min_val.numel() != 0 and self.min_val.numel() != low.numel():
            self._refuse_shape(x, f"has {low.numel()} channels, not {self.min_val.numel()}")
        return low, high

    @torch.jit.unused
    def _refuse_shape(self, x: Tensor, reason: str) -> None:
        raise CalibrationError(
            f"observer{self._where() or ' without a name'}: a tensor of shape {list(x.shape)} "
            f"{reason}"
        )

    def _fit_channels(self, channels: int) -> None:
        if self.min_val.numel() != channels:
            self._set_channels(channels)

    def _set_channels(self, channels: int) -> None:
        # In place: a buffer made under inference_mode could never be updated outside it.
        self.min_val.resize_(channels).fill_(math.inf)
        self.max_val.resize_(channels).fill_(-math.inf)

    def _absorb_statistics(self, other: "Collector") -> None:
        if self.min_val.numel() not in (0, other.min_val.numel()):
            raise ConfigError(
                f"cannot unite per-channel statistics{self._where()}: {self.min_val.numel()} and "
                f"{other.min_val.numel()} channels"
            )
        self._fit_channels(other.min_val.numel())
        super()._absorb_statistics(other)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The number of channels is part of the statistics, so the buffers take the loaded shape.
        loaded = state_dict.get(prefix + "min_val")
        if isinstance(loaded, Tensor) and loaded.dim() == 1:
            self._fit_channels(loaded.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MovingAveragePerChannelMinMaxCollector(PerChannelMinMaxCollector):
    """Exponential average of each batch's per-channel smallest and largest value.

    Args:
        averaging_constant: see :class:`MovingAverageMinMaxCollector`.
        ch_axis: the channel axis; may be negative.
        device: where the statistics live.
    """

    averaging_constant: float

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(ch_axis, device=device)
        self.averaging_constant = _averaging_constant(averaging_constant)

    def observe(self, x: Tensor) -> None:
        """Take ``x``, with the same number of channels every time, into the averages.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
            CalibrationError: ``x`` has no such axis, or another number of channels than before.
        """
        if x.numel() == 0:
            return
        low, high = self._channel_min_max(x)
        self._finite(torch.amin(low), torch.amax(high), x)
        if int(self.num_batches) == 0:
            self._fit_channels(low.numel())
            self._widen(low, high)
        else:
            self.min_val += self.averaging_constant * (low - self.min_val)
            self.max_val += self.averaging_constant * (high - self.max_val)
        self.num_batches += 1


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
        if not 2 <= bins <= 1 << 20:
            raise ConfigError(f"bins must be between 2 and {1 << 20}, got {bins}")
        self.bins = bins
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
        values = _flat(x)
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
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)
        self.num_batches.zero_()
        self.num_nonfinite.zero_()
        self.histogram.zero_()
        self.exponent.zero_()
        self.first_bin.zero_()

    def to_histogram(self) -> Histogram:
        """The occupied bins.

        Raises:
            CalibrationError: nothing has been observed.
        """
        if not self.was_observed:
            raise CalibrationError(f"observer{self._where()} has seen no data, so no histogram")
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
        if other.bins != self.bins:
            raise ConfigError(
                f"cannot unite histograms of {self.bins} and {other.bins} bins{self._where()}"
            )
        device = self.histogram.device
        theirs = copy.deepcopy(other).to(device)
        super()._absorb_statistics(theirs)
        self._fit_grid(int(theirs.exponent))
        theirs._widen(self.min_val, self.max_val)
        theirs._fit_grid(int(self.exponent))
        self.histogram += theirs.histogram


class SpanHistogramCollector(Collector):
    """Smallest and largest value, and a histogram of equal bins that span exactly these two.

    This is the histogram of torch.ao's ``HistogramObserver``, to the last count. When the range
    grows, every bin is cut into ``PARTS``, and each part goes whole to the new bin in which its
    middle lies; so the counts depend on the order of the batches.

    Buffer beyond those of the base: ``histogram`` (float32 ``[bins]``).

    Args:
        bins: how many, at least 2.
        device: where the statistics live.
    """

    PARTS: Final[int] = 16

    bins: int
    histogram: Tensor

    def __init__(self, bins: int = 2048, *, device: torch.device | str | None = None) -> None:
        super().__init__(device=device)
        if not 2 <= bins <= 1 << 20:
            raise ConfigError(f"bins must be between 2 and {1 << 20}, got {bins}")
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins, device=device))

    def observe(self, x: Tensor) -> None:
        """Take ``x``, of any shape, into the statistics.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        if x.numel() == 0:
            return
        values = x.detach().to(torch.float32)
        low, high = torch.aminmax(values)
        self._finite(low, high, x)
        self._stretch(low.to(self.min_val), high.to(self.max_val))
        self.histogram += torch.histc(
            values, self.bins, min=float(self.min_val), max=float(self.max_val)
        ).to(self.histogram)
        self.num_batches += 1

    def reset(self) -> None:
        """Forget everything."""
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)
        self.num_batches.zero_()
        self.num_nonfinite.zero_()
        self.histogram.zero_()

    def to_histogram(self) -> Histogram:
        """All bins.

        Raises:
            CalibrationError: nothing has been observed.
        """
        if not self.was_observed:
            raise CalibrationError(f"observer{self._where()} has seen no data, so no histogram")
        width = (self.max_val - self.min_val) / self.bins
        counts = self.histogram.to("cpu", torch.float64)
        low, high = float(self.min_val), float(self.max_val)
        return Histogram(counts, low, float(width), low, high)

    def _stretch(self, low: Tensor, high: Tensor) -> None:
        """Let the bins span ``low`` and ``high`` too."""
        old_low, old_high = self.min_val.clone(), self.max_val.clone()
        self._widen(low, high)
        grown = float(self.min_val) != float(old_low) or float(self.max_val) != float(old_high)
        if not grown or int(self.num_batches) == 0:
            return
        parts = self.histogram.repeat_interleave(self.PARTS) / self.PARTS
        width = (old_high - old_low) / (self.bins * self.PARTS)
        begin = torch.linspace(float(old_low), float(old_high), self.bins * self.PARTS + 1)
        edges = torch.linspace(float(self.min_val), float(self.max_val), self.bins + 1)
        middle = begin[:-1].to(parts.device) + 0.5 * width
        number = torch.bucketize(middle, edges.to(parts.device), right=True) - 1
        number = number.clamp(0, self.bins - 1)
        moved = torch.bincount(number, weights=parts, minlength=self.bins)
        self.histogram.copy_(moved)

    def _absorb_statistics(self, other: "Collector") -> None:
        assert isinstance(other, SpanHistogramCollector)  # absorb() compares the types
        if other.bins != self.bins:
            raise ConfigError(
                f"cannot unite histograms of {self.bins} and {other.bins} bins{self._where()}"
            )
        theirs = copy.deepcopy(other).to(self.histogram.device)
        self._stretch(theirs.min_val, theirs.max_val)
        theirs._stretch(self.min_val, self.max_val)
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
        HistogramCollector(bins)  # refuses what is no number of bins
        self.bins = bins
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
        if not self.was_observed:
            raise CalibrationError(f"observer{self._where()} has seen no data, so no histogram")
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


def merge(collectors: Sequence[Collector]) -> Collector:
    """A new collector with the united statistics of several: what a sharing group saw together.

    Min and max are the extremes of all members (of moving averages: the extremes of the
    averages); histograms are added on their common grid.

    Args:
        collectors: at least one, all of the same kind; left as they are.

    Raises:
        ConfigError: none given, or kinds, bins or channel counts differ.
    """
    if not collectors:
        raise ConfigError("merge() needs at least one collector")
    united = copy.deepcopy(collectors[0])
    for other in collectors[1:]:
        united.absorb(other)
    return united


@functools.lru_cache(maxsize=8)
def _cached_lane_starts(size: int, lanes: int, bins: int, device: torch.device) -> Tensor:
    """``[0, bins, 2 * bins, ..., 0, bins, ...]``: where each value's lane begins, float32.

    One row for all collectors; made outside inference mode, whose tensors cannot be used outside.
    """
    with torch.inference_mode(False):
        return (torch.arange(size, device=device) % lanes * bins).to(torch.float32)


def _flat(x: Tensor) -> Tensor:
    """All values of ``x`` as one float32 row, without a copy for the usual memory formats."""
    x = x.detach().to(torch.float32)
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)
        elif x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            x = x.permute(0, 2, 3, 4, 1)
    return x.reshape(-1)


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


def _averaging_constant(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"averaging_constant must be in (0, 1], got {value!r}")
    return float(value)


def _brief(values: Tensor) -> str:
    """A number, or how many channels and their extremes."""
    if values.dim() == 0:
        return f"{values.item():g}"
    if values.numel() == 0:
        return "[]"
    return f"[{values.numel()} channels, {values.min().item():g} to {values.max().item():g}]"
