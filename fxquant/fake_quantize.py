"""Fake quantizers: modules that round a tensor to what its integers can hold, and train through it.

Under torch.ao's names and with its parameters. A fake quantizer holds an observer
(``activation_post_process``), the scale and zero point it uses as buffers, and two switches, also
buffers so that they can be flipped on scripted models::

    model.apply(disable_observer)      # freeze scale and zero point
    model.apply(disable_fake_quant)    # pass tensors through, keep observing

Gradients pass straight through where a value is inside the range and stop where it is clipped.
Values are those of :func:`fxquant.specs.fake_quantize`, except where ``x / scale`` is within half
a float32 ulp of a tie: PyTorch's fake-quantize kernels round before they add the zero point, its
quantize kernels after, and the integers may differ by one there.
"""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import abc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ConfigError, ConfigWarning
from fxquant.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PartialFactory,
    UniformQuantizationObserverBase,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
)
from fxquant.observers.factory import WithArgs
from fxquant.specs import QParams, QuantSpec


class FakeQuantizeBase(WithArgs, abc.ABC):
    """The two switches that every fake quantizer has.

    Buffers: ``fake_quant_enabled`` and ``observer_enabled``, uint8 of shape ``[1]``.
    """

    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x``, and give it back rounded to what its integers can hold."""

    @abc.abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what was observed, each of shape ``[1]`` or ``[C]``."""

    @torch.jit.export
    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round what passes, or (``False``) let it through unchanged."""
        self.fake_quant_enabled.fill_(1 if enabled else 0)

    @torch.jit.export
    def disable_fake_quant(self) -> None:
        """Let tensors through unchanged."""
        self.enable_fake_quant(False)

    @torch.jit.export
    def enable_observer(self, enabled: bool = True) -> None:
        """Update scale and zero point from what passes, or (``False``) freeze them."""
        self.observer_enabled.fill_(1 if enabled else 0)

    @torch.jit.export
    def disable_observer(self) -> None:
        """Freeze scale and zero point."""
        self.enable_observer(False)


class FakeQuantize(FakeQuantizeBase):
    """Observes a tensor and rounds it to what its integers can hold.

    Args:
        observer: an observer class or factory.
        quant_min: smallest integer; with ``quant_max`` or not at all.
        quant_max: largest integer.
        is_dynamic: the range is that of the newest batch alone.
        **observer_kwargs: further arguments of the observer.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    ch_axis: int
    is_per_channel: bool
    is_dynamic: bool

    # TorchScript would compile properties; nothing scripted reads these.
    __jit_unused_properties__ = ["owner", "spec", "was_observed"]  # noqa: RUF012

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None or quant_max is not None:
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        if is_dynamic:
            observer_kwargs["is_dynamic"] = True
        inner = observer(**observer_kwargs)
        if is_dynamic and getattr(inner, "averaging_constant", 1) != 1:
            warnings.warn(
                "FakeQuantize(is_dynamic=True) looks at the newest batch alone: "
                f"averaging_constant is set to 1, not {inner.averaging_constant:g}",
                ConfigWarning,
                stacklevel=2,
            )
            inner = observer(**{**observer_kwargs, "averaging_constant": 1})
        if not isinstance(inner, UniformQuantizationObserverBase | FixedQParamsObserver):
            raise ConfigError(
                f"FakeQuantize needs one of fxquant's observers that chooses a scale, "
                f"got {type(inner).__name__}"
            )
        self._adopt(inner)

    def _adopt(self, inner: UniformQuantizationObserverBase | FixedQParamsObserver) -> None:
        spec = inner.spec
        self.activation_post_process = inner
        self.quant_min, self.quant_max = spec.quant_min, spec.quant_max
        self.dtype, self.qscheme = inner.dtype, inner.qscheme
        self.is_dynamic = spec.is_dynamic
        self.is_per_channel = spec.is_per_channel
        self.ch_axis = -1 if spec.ch_axis is None else spec.ch_axis
        zero_point = torch.float32 if spec.has_float_zero_point else torch.int32
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=zero_point))

    @property
    def spec(self) -> QuantSpec:
        """How the tensor is to be quantized."""
        return self.activation_post_process.spec

    @property
    def was_observed(self) -> bool:
        """Whether at least one non-empty tensor has been seen."""
        return self.activation_post_process.was_observed

    @property
    def owner(self) -> str:
        """What messages call this fake quantizer."""
        return self.activation_post_process.owner

    @owner.setter
    def owner(self, name: str) -> None:
        self.activation_post_process.owner = name

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x``, and give it back rounded to what its integers can hold.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        if int(self.observer_enabled) == 1 and x.numel() > 0:
            self.activation_post_process(x.detach())
            scale, zero_point = self.activation_post_process.calculate_qparams()
            if self.scale.shape != scale.shape:
                self.scale.resize_(scale.shape)
                self.zero_point.resize_(zero_point.shape)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        if int(self.fake_quant_enabled) == 1:
            return self._round(x)
        return x

    def _round(self, x: Tensor) -> Tensor:
        values = x.to(torch.float32)
        if self.is_per_channel:
            axis = self.ch_axis + x.dim() if self.ch_axis < 0 else self.ch_axis
            rounded = torch.fake_quantize_per_channel_affine(
                values, self.scale, self.zero_point, axis, self.quant_min, self.quant_max
            )
        else:
            rounded = torch.fake_quantize_per_tensor_affine(
                values, self.scale, self.zero_point, self.quant_min, self.quant_max
            )
        return rounded.to(x.dtype)

    @torch.jit.export
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what was observed, each of shape ``[1]`` or ``[C]``."""
        return self.activation_post_process.calculate_qparams()

    @torch.jit.unused
    def qparams(self) -> QParams:
        """Scale and zero point in use (not those of later observations), as ``QParams``."""
        shape = (-1,) if self.is_per_channel else ()
        return QParams(self.scale.reshape(shape), self.zero_point.reshape(shape), self.spec)

    @torch.jit.export
    def enable_observer(self, enabled: bool = True) -> None:
        """Update scale and zero point from what passes, or (``False``) freeze them."""
        self.observer_enabled.fill_(1 if enabled else 0)
        self.activation_post_process.enable_observer(enabled)

    @torch.jit.unused
    def merge_from(self, others: Iterable["FakeQuantize"]) -> None:
        """Unite the statistics of ``others`` with these, and update scale and zero point."""
        self.activation_post_process.merge_from(o.activation_post_process for o in others)
        if self.was_observed:
            scale, zero_point = self.calculate_qparams()
            self.scale.resize_(scale.shape).copy_(scale)
            self.zero_point.resize_(zero_point.shape).copy_(zero_point)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The number of channels is known only from data, so the buffers take the loaded shape.
        for name in ("scale", "zero_point"):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.dim() == 1:
                getattr(self, name).resize_(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Switches and spec in one line."""
        return (
            f"{self.spec.short()}, fake_quant_enabled={int(self.fake_quant_enabled)}, "
            f"observer_enabled={int(self.observer_enabled)}"
        )


class FixedQParamsFakeQuantize(FakeQuantize):
    """Rounds to a fixed scale and zero point: behind sigmoid, tanh, softmax, hardsigmoid.

    Args:
        observer: a factory of :class:`~fxquant.observers.FixedQParamsObserver`.
    """

    def __init__(self, observer: Callable[..., Any]) -> None:
        super().__init__(observer=observer)
        inner = self.activation_post_process
        if not isinstance(inner, FixedQParamsObserver):
            raise ConfigError(
                f"FixedQParamsFakeQuantize needs a FixedQParamsObserver, got {type(inner).__name__}"
            )
        self.scale.copy_(inner.scale)
        self.zero_point.copy_(inner.zero_point)


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """:class:`FakeQuantize` over a moving average, under the name of torch.ao's fused version.

    The numbers are exactly those of :class:`FakeQuantize`.

    Args:
        observer: a moving-average observer class or factory, per tensor or per channel.
        quant_min: smallest integer.
        quant_max: largest integer.
        **observer_kwargs: further arguments of the observer.
    """

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        inner = self.activation_post_process
        if not isinstance(
            inner, MovingAverageMinMaxObserver | MovingAveragePerChannelMinMaxObserver
        ):
            raise ConfigError(
                "FusedMovingAvgObsFakeQuantize needs a moving-average observer, got "
                f"{type(inner).__name__}"
            )


def enable_fake_quant(module: nn.Module) -> None:
    """Switch rounding on; for ``model.apply(enable_fake_quant)``, also on scripted models."""
    _switch(module, "fake_quant_enabled", True)


def disable_fake_quant(module: nn.Module) -> None:
    """Switch rounding off; for ``model.apply(disable_fake_quant)``, also on scripted models."""
    _switch(module, "fake_quant_enabled", False)


def enable_observer(module: nn.Module) -> None:
    """Switch observing on, in fake quantizers and plain observers; for ``model.apply``."""
    _switch(module, "observer_enabled", True)
    if isinstance(module, ObserverBase):
        module.enable_observer()


def disable_observer(module: nn.Module) -> None:
    """Switch observing off, in fake quantizers and plain observers; for ``model.apply``."""
    _switch(module, "observer_enabled", False)
    if isinstance(module, ObserverBase):
        module.disable_observer()


def _switch(module: nn.Module, name: str, on: bool) -> None:
    # By buffer, not by type: scripted modules have lost theirs.
    buffers = dict(module.named_buffers(recurse=False))
    if {"fake_quant_enabled", "observer_enabled"} <= buffers.keys():
        buffers[name].fill_(int(on))


def _weights(**kwargs: Any) -> PartialFactory:
    return FakeQuantize.with_args(quant_min=-128, quant_max=127, dtype=torch.int8, **kwargs)


default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    dtype=torch.uint8,
    qscheme=torch.per_tensor_affine,
)
default_histogram_fake_quant = default_fake_quant.with_args(observer=HistogramObserver)
default_weight_fake_quant = _weights(
    observer=MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric
)
default_per_channel_weight_fake_quant = _weights(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
)
default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    is_dynamic=True,
    dtype=torch.uint8,
    averaging_constant=1,
)
default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    ch_axis=0,
    averaging_constant=1,
)
default_embedding_fake_quant_4bit = default_embedding_fake_quant.with_args(
    quant_min=0, quant_max=15
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.uint8
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.int8,
    qscheme=torch.per_tensor_symmetric,
)
default_fused_per_channel_wt_fake_quant = default_fused_wt_fake_quant.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric
)
fused_wt_fake_quant_range_neg_127_to_127 = default_fused_wt_fake_quant.with_args(
    quant_min=-127, quant_max=127, eps=2**-12
)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = (
    default_fused_per_channel_wt_fake_quant.with_args(quant_min=-127, quant_max=127, eps=2**-12)
)
