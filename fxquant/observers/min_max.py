"""Observers whose range is the extremes of what they saw, or a moving average of them."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
from collections.abc import Mapping
from typing import Any

import torch

from fxquant.collectors import (
    MinMaxCollector,
    MovingAverageMinMaxCollector,
    MovingAveragePerChannelMinMaxCollector,
    PerChannelMinMaxCollector,
)
from fxquant.observers.base import UniformQuantizationObserverBase, device_of
from fxquant.range_rules import MinMaxRule
from fxquant.specs import DEFAULT_EPS


class MinMaxObserver(UniformQuantizationObserverBase):
    """Covers everything that was seen; per tensor.

    Args: see :class:`UniformQuantizationObserverBase`.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(
            MinMaxCollector(device=device_of(factory_kwargs)),
            MinMaxRule(),
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
        )


class MovingAverageMinMaxObserver(UniformQuantizationObserverBase):
    """Covers a moving average of each batch's extremes; per tensor.

    Args: ``averaging_constant``, the weight of the newest batch, in (0, 1]; else see
        :class:`UniformQuantizationObserverBase`.
    """

    averaging_constant: float

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        factory_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            MovingAverageMinMaxCollector(averaging_constant, device=device_of(factory_kwargs)),
            MinMaxRule(),
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
        )
        self.averaging_constant = float(averaging_constant)


class PerChannelMinMaxObserver(UniformQuantizationObserverBase):
    """Covers everything that was seen, for every slice along one axis.

    Args: ``ch_axis``, the channel axis; else see :class:`UniformQuantizationObserverBase`.
    """

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(
            PerChannelMinMaxCollector(ch_axis, device=device_of(factory_kwargs)),
            MinMaxRule(),
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            ch_axis=ch_axis,
        )


class MovingAveragePerChannelMinMaxObserver(UniformQuantizationObserverBase):
    """Covers a moving average of each batch's extremes, for every slice along one axis.

    Args: ``averaging_constant`` and ``ch_axis`` as above; else see
        :class:`UniformQuantizationObserverBase`.
    """

    averaging_constant: float

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        factory_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            MovingAveragePerChannelMinMaxCollector(
                averaging_constant, ch_axis, device=device_of(factory_kwargs)
            ),
            MinMaxRule(),
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            ch_axis=ch_axis,
        )
        self.averaging_constant = float(averaging_constant)
