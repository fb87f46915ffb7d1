"""torch.ao's histogram: equal bins that span exactly what was seen."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import copy
from typing import Final

import torch
from torch import Tensor

from fxquant.collectors.base import Collector, checked_bins
from fxquant.collectors.histogram import Histogram


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
        self.bins = checked_bins(bins)
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
        super().reset()
        self.histogram.zero_()

    def to_histogram(self) -> Histogram:
        """All bins.

        Raises:
            CalibrationError: nothing has been observed.
        """
        self._refuse_unobserved()
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
        self._refuse_other_bins(self.bins, other.bins)
        theirs = copy.deepcopy(other).to(self.histogram.device)
        self._stretch(theirs.min_val, theirs.max_val)
        theirs._stretch(self.min_val, self.max_val)
        self.histogram += theirs.histogram
