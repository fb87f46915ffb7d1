"""What all collectors have in common, and how the statistics of several become one."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import copy
import math
from collections.abc import Sequence

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

    def _refuse_unobserved(self) -> None:
        if not self.was_observed:
            raise CalibrationError(f"observer{self._where()} has seen no data, so no histogram")

    def _refuse_other_bins(self, bins: int, others: int) -> None:
        if others != bins:
            raise ConfigError(f"cannot unite histograms of {bins} and {others} bins{self._where()}")

    def _where(self) -> str:
        return f" {self.owner}" if self.owner else ""

    def extra_repr(self) -> str:
        """The statistics in one line."""
        return f"min_val={_brief(self.min_val)}, max_val={_brief(self.max_val)}"


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


def checked_bins(bins: int) -> int:
    """A number of bins that makes a histogram.

    Raises:
        ConfigError: ``bins`` is none.
    """
    if not 2 <= bins <= 1 << 20:
        raise ConfigError(f"bins must be between 2 and {1 << 20}, got {bins}")
    return bins


def flat(x: Tensor) -> Tensor:
    """All values of ``x`` as one float32 row, without a copy for the usual memory formats."""
    x = x.detach().to(torch.float32)
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)
        elif x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            x = x.permute(0, 2, 3, 4, 1)
    return x.reshape(-1)


def _brief(values: Tensor) -> str:
    """A number, or how many channels and their extremes."""
    if values.dim() == 0:
        return f"{values.item():g}"
    if values.numel() == 0:
        return "[]"
    return f"[{values.numel()} channels, {values.min().item():g} to {values.max().item():g}]"
