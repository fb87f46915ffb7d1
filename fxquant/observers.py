"""Observers: modules that watch tensors pass and say how to quantize them.

Under torch.ao's names and with its parameters. Each one is a collector (what is remembered,
:mod:`fxquant.collectors`) and a rule (which range is made of it, :mod:`fxquant.range_rules`);
``HistogramObserver(rule=...)`` takes any rule, also after calibration.

Where fxquant differs from torch.ao on purpose:

* NaN and Inf raise :class:`~fxquant.errors.NonFiniteStatisticError` instead of becoming a range.
* ``HistogramObserver`` minimizes the squared error over both ends (``MSERule``);
  ``TorchHistogramRule`` gives torch.ao's choice.
* The default dtypes are ``uint8`` and ``int8``; ``quint8`` and the like are understood.
* The ``default_*`` observers use the full integer range; ``reduce_range=True`` halves it.
"""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import abc
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.collectors import (
    Collector,
    HistogramCollector,
    MinMaxCollector,
    MovingAverageMinMaxCollector,
    MovingAveragePerChannelMinMaxCollector,
    PerChannelHistogramCollector,
    PerChannelMinMaxCollector,
    SpanHistogramCollector,
)
from fxquant.errors import CalibrationWarning, ConfigError, ConfigWarning, SpecError
from fxquant.range_rules import MinMaxRule, MSERule, RangeRule, TorchHistogramRule
from fxquant.specs import (
    DEFAULT_EPS,
    QParams,
    QuantSpec,
    choose_qparams,
    default_range,
    find_schemes,
    name_schemes,
    range_to_qparams,
    storage_dtype,
)

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)

_Class = TypeVar("_Class", bound="WithArgs")


class PartialFactory:
    """A class and keyword arguments for it; call it to make an instance.

    Two factories are equal when class and arguments are, so qconfigs can be compared by value.
    Made by ``SomeObserver.with_args(...)``; immutable.

    Args:
        target: the class, or another callable, to be called.
        arguments: keyword arguments.
        callables: keyword arguments that are computed by a call each time.
    """

    __slots__ = ("arguments", "callables", "known", "target")

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    callables: Mapping[str, Callable[[], Any]]
    known: Any  # what fxquant.qconfig.spec_of read from an instance

    def __init__(
        self,
        target: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        callables: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self.target = target
        self.arguments = dict(arguments or {})
        self.callables = dict(callables or {})
        self.known = None

    def __reduce__(self) -> tuple[object, ...]:
        values = (self.target, name_schemes(self.arguments), self.callables)
        return _unpickle_factory, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make an instance; arguments given here win over the stored ones."""
        computed = {k: make() for k, make in self.callables.items() if k not in kwargs}
        return self.target(*args, **{**self.arguments, **computed, **kwargs})

    def with_args(self, **kwargs: Any) -> "PartialFactory":
        """A factory with more, or other, arguments."""
        return PartialFactory(self.target, {**self.arguments, **kwargs}, self.callables)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> "PartialFactory":
        """A factory with arguments that are computed whenever it is called."""
        return PartialFactory(self.target, self.arguments, {**self.callables, **kwargs})

    def _key(self) -> tuple[Any, ...]:
        arguments = tuple((k, _hashable(v)) for k, v in sorted(self.arguments.items()))
        return (self.target, arguments, tuple(sorted(self.callables.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartialFactory) and self._key() == other._key()

    def __hash__(self) -> int:
        target, arguments, callables = self._key()
        return hash((target, arguments, tuple(name for name, _ in callables)))

    def __repr__(self) -> str:
        name = getattr(self.target, "__name__", repr(self.target))
        shown = [f"{k}={_shown(v)}" for k, v in (*self.arguments.items(), *self.callables.items())]
        return f"{name}({', '.join(shown)})"


def _unpickle_factory(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    callables: Mapping[str, Callable[[], Any]],
) -> PartialFactory:
    return PartialFactory(target, find_schemes(arguments), callables)


def _hashable(value: Any) -> Any:
    """``value`` in a form that compares and hashes by content."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist()))
    if isinstance(value, Mapping):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    return value


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


class WithArgs(nn.Module):
    """Base of observers and fake quantizers: factories of a class, and pickles without qschemes."""

    def __getstate__(self) -> dict[str, Any]:
        return name_schemes(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(find_schemes(state))  # type: ignore[no-untyped-call]

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialFactory:
        """A factory of this class with the given arguments: ``MinMaxObserver.with_args(...)``."""
        return PartialFactory(cls, kwargs)

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> PartialFactory:
        """A factory whose given arguments are computed whenever it is called."""
        return PartialFactory(cls, None, kwargs)


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


def _device_of(factory_kwargs: Mapping[str, Any] | None) -> torch.device | str | None:
    """The device in torch.ao's ``factory_kwargs``; its dtype is ignored: statistics are float32."""
    given = dict(factory_kwargs or {})
    unknown = sorted(set(given) - {"device", "dtype"})
    if unknown:
        raise ConfigError(f"factory_kwargs may hold 'device' and 'dtype', got {unknown}")
    device: torch.device | str | None = given.get("device")
    return device


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
            MinMaxCollector(device=_device_of(factory_kwargs)),
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
            MovingAverageMinMaxCollector(averaging_constant, device=_device_of(factory_kwargs)),
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
            PerChannelMinMaxCollector(ch_axis, device=_device_of(factory_kwargs)),
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
                averaging_constant, ch_axis, device=_device_of(factory_kwargs)
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


class HistogramObserver(UniformQuantizationObserverBase):
    """Keeps a histogram and lets a rule choose the range; per tensor.

    Args: ``bins``, the most histogram bins; ``rule``, any of :mod:`fxquant.range_rules`, default
        :class:`~fxquant.range_rules.MSERule`; ``count_limit``, the most values counted of one
        tensor (``None``: all), see :class:`~fxquant.collectors.HistogramCollector`; else see
        :class:`UniformQuantizationObserverBase`. The attribute ``rule`` may be replaced after
        calibration.
    """

    bins: int

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        *,
        rule: RangeRule | None = None,
        count_limit: int | None = 1 << 16,
    ) -> None:
        super().__init__(
            HistogramCollector(bins, count_limit=count_limit, device=_device_of(factory_kwargs)),
            MSERule() if rule is None else rule,
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
        )
        self.bins = bins

    @torch.jit.unused
    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self.rule.choose(self.collector, self.spec)
        return low.to(self.min_val.device), high.to(self.min_val.device)


class TorchHistogramObserver(HistogramObserver):
    """torch.ao's ``HistogramObserver``: its histogram and its search, to the last bit.

    ``fxquant.compat`` exports it under that name. The range depends on the order of the batches;
    :class:`HistogramObserver` does not, and takes a range of less error.

    Args: see :class:`HistogramObserver`, without its keyword-only ones.
    """

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        UniformQuantizationObserverBase.__init__(
            self,
            SpanHistogramCollector(bins, device=_device_of(factory_kwargs)),
            TorchHistogramRule(),
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
        )
        self.bins = bins


class PerChannelHistogramObserver(UniformQuantizationObserverBase):
    """Keeps a histogram of every slice along one axis and lets a rule choose each range.

    For weights, of few bits above all: on normally distributed ones with 576 to 4608 values a
    channel, ``MSERule`` gains 2 to 3 dB over min-max at four bits, 6 at two and 0.1 at eight.

    Args: ``ch_axis``, the channel axis; ``bins``, the most bins per channel; ``rule``, any of
        :mod:`fxquant.range_rules`, default :class:`~fxquant.range_rules.MSERule`; else see
        :class:`UniformQuantizationObserverBase`. A rule takes about a millisecond a channel.
    """

    def __init__(
        self,
        ch_axis: int = 0,
        bins: int = 2048,
        dtype: torch.dtype = torch.int8,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        *,
        rule: RangeRule | None = None,
    ) -> None:
        super().__init__(
            PerChannelHistogramCollector(bins, ch_axis, device=_device_of(factory_kwargs)),
            MSERule() if rule is None else rule,
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            ch_axis=ch_axis,
        )
        self.bins = bins

    @torch.jit.unused
    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self.rule.choose(self.collector, self.spec)
        return low.to(self.min_val.device), high.to(self.min_val.device)


class FixedQParamsObserver(ObserverBase):
    """Scale and zero point that the op dictates: sigmoid, tanh, softmax, hardsigmoid.

    Args:
        scale: the scale.
        zero_point: the zero point.
        dtype: dtype of the integers.
        qscheme: ``torch.per_tensor_affine`` or ``per_tensor_symmetric``.
        quant_min: smallest integer.
        quant_max: largest integer.
        is_dynamic: kept for torch.ao's signature.
    """

    scale: Tensor
    zero_point: Tensor
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))
        _ = self.spec  # validates

    @property
    def spec(self) -> QuantSpec:
        """How the tensor is to be quantized, with ``fixed`` set."""
        return QuantSpec(
            dtype=storage_dtype(self.dtype),
            qscheme=self.qscheme,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            is_dynamic=self.is_dynamic,
            fixed=(float(self.scale), int(self.zero_point)),
        )

    @property
    def was_observed(self) -> bool:
        """Always: nothing needs to be seen."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back; nothing depends on it."""
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The fixed scale and zero point, each of shape ``[1]``."""
        return self.scale, self.zero_point

    def qparams(self) -> QParams:
        """The same as :class:`fxquant.specs.QParams`, 0-d."""
        return QParams(self.scale.reshape(()), self.zero_point.reshape(()), self.spec)

    def extra_repr(self) -> str:
        """The spec in one line."""
        return self.spec.short()


class PlaceholderObserver(ObserverBase):
    """Looks at nothing and only says which dtype is wanted: dynamic, float16, or none at all.

    Args:
        dtype: what to quantize to; float32 and float64 mean "leave it in floating point".
        custom_op_name: kept for torch.ao's signature; stored as ``custom_op``.
        compute_dtype: an old spelling of ``is_dynamic=True``.
        quant_min: smallest integer, where ``dtype`` is one.
        quant_max: largest integer.
        qscheme: default ``torch.per_tensor_affine``.
        eps: smallest scale.
        is_dynamic: parameters are chosen at run time.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic or compute_dtype is not None)
        if compute_dtype is not None:
            warnings.warn(
                "PlaceholderObserver(compute_dtype=...) is an old spelling of is_dynamic=True",
                ConfigWarning,
                stacklevel=2,
            )
        self.custom_op = custom_op_name
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        self.eps = DEFAULT_EPS if eps is None else float(eps)
        _ = self.spec  # validates

    @property
    def spec(self) -> QuantSpec | None:
        """How the tensor is to be quantized; ``None`` for float32 and float64."""
        if self.dtype in (torch.float32, torch.float64):
            return None
        low, high = integer_range(self.dtype, self.quant_min, self.quant_max)
        return QuantSpec(
            dtype=storage_dtype(self.dtype),
            qscheme=self.qscheme,
            quant_min=low,
            quant_max=high,
            is_dynamic=self.is_dynamic,
            eps=self.eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back without a look."""
        return x

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Never: there are no statistics.

        Raises:
            ConfigError: always.
        """
        raise _no_qparams(self)

    def extra_repr(self) -> str:
        """The dtype in one line."""
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"


class NoopObserver(ObserverBase):
    """Looks at nothing and wants nothing: the tensor stays in floating point.

    Args:
        dtype: kept for torch.ao's signature.
        custom_op_name: kept for torch.ao's signature; stored as ``custom_op``.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype)
        self.custom_op = custom_op_name

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back without a look."""
        return x

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Never: there are no statistics.

        Raises:
            ConfigError: always.
        """
        raise _no_qparams(self)


class ReuseInputObserver(ObserverBase):
    """Says that an op's output shares the observer of its input; is never inserted itself."""

    def __init__(self) -> None:
        super().__init__(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back without a look."""
        return x

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Never: the input's observer has the numbers.

        Raises:
            ConfigError: always.
        """
        raise _no_qparams(self)


class RecordingObserver(ObserverBase):
    """Keeps a copy of every tensor, for debugging; its memory grows with every batch.

    Args:
        dtype: kept for torch.ao's signature.
    """

    def __init__(self, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__(dtype)
        self.tensor_val: list[Tensor] = []

    @property
    def was_observed(self) -> bool:
        """Whether at least one tensor has been recorded."""
        return bool(self.tensor_val)

    @torch.jit.unused
    def forward(self, x: Tensor) -> Tensor:
        """Record a copy of ``x`` and give it back."""
        if self.observer_enabled:
            self.tensor_val.append(x.detach().clone())
        return x

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Never: tensors are recorded, not summarized.

        Raises:
            ConfigError: always.
        """
        raise _no_qparams(self)

    @torch.jit.unused
    def get_tensor_value(self) -> list[Tensor]:
        """The recorded tensors, in order."""
        return self.tensor_val


def _no_qparams(observer: ObserverBase) -> ConfigError:
    return ConfigError(f"calculate_qparams should not be called for {type(observer).__name__}")


default_observer = MinMaxObserver.with_args(dtype=torch.uint8)
default_histogram_observer = HistogramObserver.with_args(dtype=torch.uint8)
default_placeholder_observer = PlaceholderObserver
default_debug_observer = RecordingObserver
default_reuse_input_observer = ReuseInputObserver
default_weight_observer = MinMaxObserver.with_args(
    dtype=torch.int8, qscheme=torch.per_tensor_symmetric
)
weight_observer_range_neg_127_to_127 = default_weight_observer.with_args(
    quant_min=-127, quant_max=127, eps=2**-12
)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=torch.per_channel_symmetric
)
per_channel_weight_observer_range_neg_127_to_127 = default_per_channel_weight_observer.with_args(
    quant_min=-127, quant_max=127, eps=2**-12
)
default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.uint8, quant_min=0, quant_max=255, is_dynamic=True
)
default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.uint8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)
default_float_qparams_observer_4bit = default_float_qparams_observer.with_args(
    quant_min=0, quant_max=15
)
default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1.0 / 256.0, zero_point=0, dtype=torch.uint8, quant_min=0, quant_max=255
)
default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2.0 / 256.0, zero_point=128, dtype=torch.uint8, quant_min=0, quant_max=255
)
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer
default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
