"""The smallest and the largest value, or moving averages of them."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import math
from typing import Any

import torch
from torch import Tensor

from fxquant.collectors.base import Collector, flat
from fxquant.errors import CalibrationError, ConfigError


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
        low, high = torch.aminmax(flat(x))
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
        low, high = torch.aminmax(flat(x))
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


def _averaging_constant(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"averaging_constant must be in (0, 1], got {value!r}")
    return float(value)
