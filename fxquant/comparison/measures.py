"""What is counted about one tensor, batch by batch: noise, saturation, unused range, channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from fxquant.comparison.sites import Site

_FEW_CHANNELS: Final = 3
"""With fewer there is no median channel to speak of."""


@dataclass(slots=True)
class Noise:
    """Power of a signal, and of what differs from it.

    Attributes:
        signal: sum of squares of the float values.
        noise: sum of squares of the differences.
        finite: whether all differences are.
        channels: the same two sums for every channel, ``[2, C]``; ``None`` where the tensor has no
            channels, or their number changes.
    """

    signal: float = 0.0
    noise: float = 0.0
    finite: bool = True
    channels: Tensor | None = None
    _given_up: bool = False

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Count two tensors of one shape."""
        exact = expected.double()
        power, difference = exact.square(), (found.double() - exact).square()
        self.signal += float(power.sum())
        noise = float(difference.sum())
        self.finite = self.finite and math.isfinite(noise)
        self.noise += noise
        if exact.dim() < 2 or self._given_up:
            return
        sums = torch.stack([by_channel(power).sum(1), by_channel(difference).sum(1)])
        if self.channels is None:
            self.channels = sums
        elif self.channels.shape == sums.shape:
            self.channels += sums
        else:
            self.channels, self._given_up = None, True

    @property
    def ratio(self) -> float:
        """Noise to signal: 0 for none; infinite where there is no signal, or NaN was met."""
        if not self.finite:
            return math.inf
        if self.noise == 0:
            return 0.0
        return self.noise / self.signal if self.signal else math.inf

    @property
    def typical(self) -> float:
        """Noise to signal of the median channel; of the whole where there are fewer than three.

        A channel whose values are a hundred times those of the others drowns their noise in its
        signal, though the next layer may weigh all of them alike.
        """
        if self.channels is None or not self.finite:
            return self.ratio
        signal, noise = self.channels
        alive = signal > 0
        if int(alive.sum()) < _FEW_CHANNELS:
            return self.ratio
        return float((noise[alive] / signal[alive]).median())

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB; infinite where nothing differs."""
        return sqnr_of(self.ratio)


def by_channel(x: Tensor) -> Tensor:
    """``x`` as ``[C, n]``: channels are dimension 1 of images and volumes, else the last one."""
    axis = 1 if x.dim() in (4, 5) else x.dim() - 1
    return x.transpose(0, axis).flatten(1)


def sqnr_of(ratio: float) -> float:
    """A noise-to-signal ratio as SQNR in dB."""
    if ratio == 0:
        return math.inf
    return -10 * math.log10(ratio) if math.isfinite(ratio) else -math.inf


@dataclass(slots=True)
class Range:
    """How a tensor uses the integers it has.

    Attributes:
        elements: integers seen.
        at_min: of them, the smallest one that the tensor can hold.
        at_max: of them, the largest one.
        low: smallest integer seen.
        high: largest integer seen.
        beyond: float values that lie more than half a step outside the range.
    """

    elements: int = 0
    at_min: int = 0
    at_max: int = 0
    low: int = 1 << 40
    high: int = -(1 << 40)
    beyond: int = 0

    def add(self, integers: Tensor, exact: Tensor, scale: float, zero_point: int, s: Site) -> None:
        """Count the integers of a batch, and the float values that they stand for."""
        if not integers.numel():
            return
        self.elements += integers.numel()
        self.at_min += int((integers == s.quant_min).sum())
        self.at_max += int((integers == s.quant_max).sum())
        self.low = min(self.low, int(integers.min()))
        self.high = max(self.high, int(integers.max()))
        lowest = (s.quant_min - 0.5 - zero_point) * scale
        highest = (s.quant_max + 0.5 - zero_point) * scale
        self.beyond += int(((exact < lowest) | (exact > highest)).sum())

    def share(self, count: int) -> float:
        """``count`` as a share of all elements."""
        return count / self.elements if self.elements else 0.0

    def unused(self, site: Site) -> float:
        """Share of the integers between smallest and largest that lie outside what was seen."""
        if not self.elements:
            return 0.0
        whole = site.quant_max - site.quant_min + 1
        return 1 - (self.high - self.low + 1) / whole


@dataclass(slots=True)
class Channels:
    """The largest magnitude of every channel.

    Attributes:
        peaks: ``[C]``, or ``None`` where the tensor has no channels or their number changes.
    """

    peaks: Tensor | None = None
    _given_up: bool = False

    def add(self, exact: Tensor) -> None:
        """Count a batch; see :func:`by_channel`."""
        if exact.dim() < 2 or not exact.numel() or self._given_up:
            return
        peaks = by_channel(exact.abs()).amax(1)
        if self.peaks is None:
            self.peaks = peaks
        elif self.peaks.shape == peaks.shape:
            self.peaks = torch.maximum(self.peaks, peaks)
        else:
            self.peaks, self._given_up = None, True

    def outliers(self, factor: float) -> tuple[tuple[int, float], ...]:
        """Channels that reach ``factor`` times the median channel: index and multiple, by size."""
        if self.peaks is None or len(self.peaks) < _FEW_CHANNELS:
            return ()
        median = float(self.peaks.median())
        if median == 0:
            return ()
        multiples = self.peaks / median
        found = [(int(i), float(multiples[i])) for i in (multiples >= factor).nonzero().flatten()]
        return tuple(sorted(found, key=lambda item: -item[1]))


@dataclass(slots=True)
class Counters:
    """Everything that is counted about one site.

    Attributes:
        whole: what the int8 model gives, against the float model.
        own: what the op gives when it is fed the float model's values.
        rounding: what rounding the float value to the op's output parameters alone does.
        range: of the integers.
        channels: of the float value.
        skipped: why nothing could be compared; empty where it could.
    """

    whole: Noise = field(default_factory=Noise)
    own: Noise = field(default_factory=Noise)
    rounding: Noise = field(default_factory=Noise)
    range: Range = field(default_factory=Range)
    channels: Channels = field(default_factory=Channels)
    skipped: str = ""
