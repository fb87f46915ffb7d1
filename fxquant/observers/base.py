"""What observers have in common: all of them, and those that make a range of statistics."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import abc
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._jit_internal import is_scripting
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.collectors import Collector
from fxquant.errors import CalibrationWarning, ConfigError, SpecError
from fxquant.observers.factory import WithArgs
from fxquant.range_rules import RangeRule
from fxquant.specs import (
    DEFAULT_EPS,
    QParams,
    QuantSpec,
    choose_qparams,
    default_range,
    range_to_qparams,
    storage_dtype,
)

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)


class ObserverBase(WithArgs, abc.ABC):
    """What every observer has.

    Args:
        dtype: the dtype the tensor is to be quantized to.
        is_dynamic: parameters are chosen at run time.

    Attributes:
        owner: what messages call the observer, e.g.
            ``activation_post_process_3 (output of 'layer1.0.conv1')``; set by the inserter.
        observer_enabled: whether ``forward`` looks at what passes.
    """

    observer_enabled: bool
    is_dynamic: bool

    # TorchScript would compile properties; nothing scripted reads these.
    __jit_unused_properties__ = ["max_val", "min_val", "owner", "spec", "was_observed"]  # noqa: RUF012

    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.is_dynamic = is_dynamic
        self.observer_enabled = True
        self._owner = ""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Look at ``x`` and give it back unchanged."""

    @abc.abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each of shape ``[1]`` or ``[C]``."""

    @property
    def spec(self) -> QuantSpec | None:
        """How the tensor is to be quantized; ``None`` where it stays in floating point."""
        return None

    @property
    def was_observed(self) -> bool:
        """Whether at least one non-empty tensor has been seen."""
        return False

    @property
    def owner(self) -> str:
        """What messages call this observer."""
        return self._owner

    @owner.setter
    def owner(self, name: str) -> None:
        self._owner = name

    def enable_observer(self, enabled: bool = True) -> None:
        """Look at what passes, or (``False``) stop looking."""
        self.observer_enabled = enabled

    def disable_observer(self) -> None:
        """Stop looking at what passes; the statistics stay."""
        self.enable_observer(False)

    def merge_from(self, others: Iterable["ObserverBase"]) -> None:
        """Unite the statistics of ``others`` with these; observers without any ignore it."""


class UniformQuantizationObserverBase(ObserverBase):
    """Base of the observers that choose a scale and a zero point from statistics.

    Args:
        collector: what is remembered.
        rule: which range is made of it.
        dtype: e.g. ``torch.uint8``; torch's quantized dtypes are understood.
        qscheme: see :class:`fxquant.specs.QuantSpec`.
        reduce_range: halve the integer range, against accumulators that saturate.
        quant_min: smallest integer; with ``quant_max`` or not at all.
        quant_max: largest integer.
        eps: smallest scale.
        is_dynamic: parameters are chosen at run time.
        ch_axis: channel axis of the per-channel schemes.
    """

    qscheme: torch.qscheme
    reduce_range: bool
    quant_min: int
    quant_max: int
    eps: float
    is_symmetric: bool
    symmetric_zero_point: int
    has_float_zero_point: bool

    def __init__(
        self,
        collector: Collector,
        rule: RangeRule,
        *,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        allowed = _PER_TENSOR if ch_axis is None else _PER_CHANNEL
        if qscheme not in allowed:
            raise SpecError(
                f"{type(self).__name__} supports {', '.join(str(s) for s in allowed)}, "
                f"not {qscheme}"
            )
        self.qscheme = qscheme
        self.reduce_range = reduce_range
        self.has_customized_qrange = quant_min is not None and quant_max is not None
        self.quant_min, self.quant_max = integer_range(
            dtype, quant_min, quant_max, reduce_range=reduce_range
        )
        self.eps = float(eps)
        self.ch_axis = -1 if ch_axis is None else ch_axis
        self.collector = collector
        self.rule = rule
        spec = self.spec  # validates
        self.is_symmetric = spec.is_symmetric
        self.symmetric_zero_point = spec.symmetric_zero_point
        self.has_float_zero_point = spec.has_float_zero_point

    @property
    def spec(self) -> QuantSpec:
        """How the tensor is to be quantized."""
        return QuantSpec(
            dtype=storage_dtype(self.dtype),
            qscheme=self.qscheme,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            ch_axis=self.ch_axis if self.qscheme in _PER_CHANNEL else None,
            is_dynamic=self.is_dynamic,
            eps=self.eps,
        )

    @property
    def min_val(self) -> Tensor:
        """Smallest value seen: 0-d, or ``[C]``; ``inf`` or empty before."""
        return self.collector.min_val

    @property
    def max_val(self) -> Tensor:
        """Largest value seen: 0-d, or ``[C]``; ``-inf`` or empty before."""
        return self.collector.max_val

    @property
    def was_observed(self) -> bool:
        """Whether at least one non-empty tensor has been seen."""
        return self.collector.was_observed

    @property
    def owner(self) -> str:
        """What messages call this observer."""
        return self.collector.owner

    @owner.setter
    def owner(self, name: str) -> None:
        self.collector.owner = name

    def forward(self, x: Tensor) -> Tensor:
        """Take ``x`` into the statistics and give it back unchanged.

        Raises:
            NonFiniteStatisticError: ``x`` holds a NaN or an infinite value.
        """
        # Fake and meta tensors, with which shapes are inferred, have no values to look at.
        if not is_scripting() and (isinstance(x, FakeTensor) or x.is_meta):
            return x
        if self.observer_enabled:
            self.collector.observe(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), each of shape ``[1]`` or ``[C]``.

        Before anything was observed: 1 and 0, with a :class:`CalibrationWarning`.
        """
        if int(self.collector.num_batches) == 0:
            if is_scripting():
                warnings.warn(
                    "must run observer before calling calculate_qparams. Returning default values.",
                    stacklevel=2,
                )
            else:
                self._warn_unobserved()
            like = self.collector.min_val
            return (
                torch.ones([1], device=like.device),
                torch.zeros([1], dtype=torch.int32, device=like.device),
            )
        low, high = self._range()
        scale, zero_point = range_to_qparams(
            low,
            high,
            self.quant_min,
            self.quant_max,
            self.eps,
            self.is_symmetric,
            self.symmetric_zero_point,
            self.has_float_zero_point,
        )
        return scale.reshape(-1), zero_point.reshape(-1)

    def qparams(self) -> QParams:
        """The same as :class:`fxquant.specs.QParams`, 0-d per tensor.

        Before anything was observed: 1 and 0 per tensor, with a :class:`CalibrationWarning`.
        """
        if not self.was_observed:
            scale, zero_point = self.calculate_qparams()
            if not self.spec.is_per_channel:
                scale, zero_point = scale.reshape(()), zero_point.reshape(())
            if self.has_float_zero_point:
                zero_point = zero_point.to(torch.float32)
            return QParams(scale, zero_point, self.spec)
        low, high = self._range()
        return choose_qparams(low, high, self.spec)

    def reset_min_max_vals(self) -> None:
        """Forget everything that was observed."""
        self.collector.reset()

    def merge_from(self, others: Iterable[ObserverBase]) -> None:
        """Unite the statistics of ``others`` with these, as if all had been seen here.

        Raises:
            ConfigError: an observer keeps other statistics than this one.
        """
        for other in others:
            if not isinstance(other, UniformQuantizationObserverBase):
                raise ConfigError(
                    f"cannot unite statistics of {type(self).__name__} and {type(other).__name__}"
                )
            self.collector.absorb(other.collector)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.collector.min_val, self.collector.max_val

    @torch.jit.unused
    def _warn_unobserved(self) -> None:
        where = f"{self.owner}: " if self.owner else ""
        warnings.warn(
            f"{where}must run observer before calling calculate_qparams. "
            "Returning default values. (scale 1, zero point 0; calibrate the prepared model first)",
            CalibrationWarning,
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        """The spec in one line."""
        return self.spec.short()


def integer_range(
    dtype: torch.dtype,
    quant_min: int | None,
    quant_max: int | None,
    *,
    reduce_range: bool = False,
) -> tuple[int, int]:
    """The integers an observer may use: those given, else those of the dtype; halved on demand.

    Raises:
        SpecError: one end without the other, or a dtype that cannot be quantized to.
    """
    if (quant_min is None) != (quant_max is None):
        raise SpecError(
            f"quant_min and quant_max go together, got quant_min={quant_min}, quant_max={quant_max}"
        )
    low, high = default_range(dtype)
    if quant_min is not None and quant_max is not None:
        low, high = quant_min, quant_max
    return (low // 2, high // 2) if reduce_range else (low, high)


def device_of(factory_kwargs: Mapping[str, Any] | None) -> torch.device | str | None:
    """The device in torch.ao's ``factory_kwargs``; its dtype is ignored: statistics are float32."""
    given = dict(factory_kwargs or {})
    unknown = sorted(set(given) - {"device", "dtype"})
    if unknown:
        raise ConfigError(f"factory_kwargs may hold 'device' and 'dtype', got {unknown}")
    device: torch.device | str | None = given.get("device")
    return device
