"""``QConfig``: how the activation and the weight of an op are to be observed and quantized.

A qconfig names two factories; :func:`spec_of` calls one, once, and reads what it made into a frozen
:class:`~fxquant.specs.QuantSpec`. That function and :func:`as_qconfig` are the only code of fxquant
that knows the objects of torch.ao (by their attributes; nothing is imported from it).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from fxquant.errors import ConfigError, SpecError, UnsupportedBackendError, did_you_mean
from fxquant.fake_quantize import (
    FusedMovingAvgObsFakeQuantize,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PartialFactory,
    PlaceholderObserver,
    TorchHistogramObserver,
    default_debug_observer,
    default_dynamic_quant_observer,
    default_float_qparams_observer,
    default_float_qparams_observer_4bit,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_reuse_input_observer,
    default_weight_observer,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)
from fxquant.observers.base import integer_range
from fxquant.specs import DEFAULT_EPS, QuantSpec, storage_dtype

#: Something that makes an observer or a fake quantizer when called without arguments.
Factory = Callable[..., Any]


class _Fields(NamedTuple):
    activation: Any
    weight: Any


class QConfig(_Fields):
    """How to observe and quantize the activation and the weight of an op.

    Equal by value: two qconfigs whose factories have the same class and arguments are equal.

    Args:
        activation: class or factory of an observer or fake quantizer; ``None`` for none.
        weight: likewise for the weight.

    Raises:
        ConfigError: an instance was given instead of a class or factory.
    """

    __slots__ = ()

    def __new__(cls, activation: Factory | None, weight: Factory | None) -> QConfig:
        """Check both factories, then build the tuple."""
        for name, factory in (("activation", activation), ("weight", weight)):
            if factory is not None and not callable(factory):
                raise ConfigError(
                    f"QConfig needs an observer class or factory as {name}, got {factory!r}"
                )
        return cls.as_given(activation, weight)

    @classmethod
    def as_given(cls, activation: Any, weight: Any) -> QConfig:
        """A qconfig of what may be no factory, as torch.ao has it; it is refused where it is used.

        Raises:
            ConfigError: an instance was given instead of a class or factory.
        """
        for name, factory in (("activation", activation), ("weight", weight)):
            if isinstance(factory, nn.Module):
                raise ConfigError(
                    f"QConfig received observer instance ({name}={type(factory).__name__}(...)), "
                    "please pass observer class instead. Use MyObserver.with_args(x=1) to "
                    "override arguments to constructor if needed"
                )
        return _Fields.__new__(cls, activation, weight)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple) or len(other) != 2:
            return NotImplemented
        return all(
            _factory_key(mine) == _factory_key(theirs)
            for mine, theirs in zip(self, other, strict=True)
        )

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return hash(tuple(_hash_of(factory) for factory in self))

    def __repr__(self) -> str:
        return f"QConfig(activation={_shown(self.activation)}, weight={_shown(self.weight)})"


def _shown(factory: Any) -> str:
    return factory.__name__ if isinstance(factory, type) else repr(factory)


def _factory_key(factory: Any) -> Any:
    """What makes two factories the same: class and arguments, through every kind of partial."""
    if isinstance(factory, PartialFactory):
        return (factory.target, _arguments_key(factory.arguments), dict(factory.callables))
    wrapped = getattr(factory, "p", None)
    if isinstance(wrapped, functools.partial) and not wrapped.args:  # torch.ao's with_args
        callables = dict(getattr(factory, "callable_args", {}))
        return (wrapped.func, _arguments_key(wrapped.keywords), callables)
    if isinstance(factory, functools.partial) and not factory.args:
        return (factory.func, _arguments_key(factory.keywords), {})
    if isinstance(factory, type):
        return (factory, {}, {})
    return factory


def _arguments_key(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _argument_key(value) for name, value in arguments.items()}


def _argument_key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    return _factory_key(value) if callable(value) and not isinstance(value, nn.Module) else value


def _hash_of(factory: Any) -> int:
    """Equal for equal factories; arguments that cannot be hashed do not take part."""
    key = _factory_key(factory)
    if isinstance(key, tuple) and len(key) == 3:
        return hash((key[0], frozenset(key[1])))
    return hash(key)


def as_qconfig(value: object, where: str) -> QConfig | None:
    """``value`` as fxquant's ``QConfig``: one of ours, one of torch.ao's, or ``None``.

    Args:
        value: what the user gave.
        where: the key it was given for, for the message.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None or isinstance(value, QConfig):
        return value
    if not isinstance(value, type) and hasattr(value, "activation") and hasattr(value, "weight"):
        return QConfig.as_given(value.activation, value.weight)
    hint = ""
    if isinstance(value, type | PartialFactory) or callable(value):
        hint = "; an observer alone is not enough, use QConfig(activation=..., weight=...)"
    raise ConfigError(f"{where} needs a QConfig or None, got {value!r}{hint}")


@dataclass(frozen=True, slots=True)
class ObserverFactory:
    """A factory, and what the observers it makes want, read from one of them.

    Attributes:
        spec: how the tensor is to be quantized; ``None`` where it stays in floating point, and
            for ``reuse_input``.
        factory: what to call for an observer.
        reuse_input: the output shares the observer of the input (``ReuseInputObserver``).
        collects: the observers gather statistics, so they are worth inserting.
        is_fake_quantize: the observers also round (QAT).
        name: the class that the factory makes, for messages.
    """

    spec: QuantSpec | None
    factory: Factory
    reuse_input: bool = False
    collects: bool = False
    is_fake_quantize: bool = False
    name: str = ""

    def __call__(self) -> Any:
        """A new observer or fake quantizer."""
        return _make(self.factory)


def spec_of(factory: Factory | None) -> ObserverFactory | None:
    """Read a factory's observer into a frozen spec; instantiates it once, and ours once for all.

    Understands fxquant's and torch.ao's observers and fake quantizers, and anything that has
    their attributes (``dtype``, ``qscheme``, ``quant_min``, ``quant_max``, ``ch_axis``,
    ``is_dynamic``, ``eps``, and ``scale`` and ``zero_point`` where they are fixed).

    Args:
        factory: ``qconfig.activation`` or ``qconfig.weight``.

    Returns:
        ``None`` for ``None``, which says nothing about the tensor.

    Raises:
        ConfigError: it makes something without a dtype, or a spec that cannot be honoured.
    """
    if factory is None:
        return None
    if not _makes_equals(factory):
        return read_observer(_make(factory), factory)
    assert isinstance(factory, PartialFactory)
    if factory.known is None:
        factory.known = read_observer(_make(factory), factory)
    found: ObserverFactory = factory.known
    return found


def _makes_equals(factory: Factory) -> bool:
    """Whether everything that ``factory`` makes is alike: it is immutable, and calls a class."""
    if not isinstance(factory, PartialFactory):
        return False
    inner = [value for value in factory.arguments.values() if isinstance(value, PartialFactory)]
    constant = isinstance(factory.target, type) and not factory.callables
    return constant and all(map(_makes_equals, inner))


def read_observer(made: object, factory: Factory) -> ObserverFactory:
    """What an observer or fake quantizer wants; see :func:`spec_of`.

    Args:
        made: the observer.
        factory: what made it.
    """
    name = type(made).__name__
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{_shown(factory)} makes a {name}, not an observer module")
    if isinstance(made, nn.Identity):
        return ObserverFactory(None, factory, name=name)
    if not hasattr(made, "dtype"):
        raise ConfigError(f"{name} is no observer: it has no dtype")
    kinds = {base.__name__ for base in type(made).__mro__}
    if "ReuseInputObserver" in kinds:
        return ObserverFactory(None, factory, reuse_input=True, name=name)
    if kinds & {"NoopObserver", "RecordingObserver"}:
        return ObserverFactory(None, factory, collects="RecordingObserver" in kinds, name=name)
    try:
        spec = _read_spec(made)
    except SpecError as error:
        raise SpecError(f"{_shown(factory)}: {error}") from error
    return ObserverFactory(
        spec,
        factory,
        collects=not kinds & {"PlaceholderObserver"},
        is_fake_quantize=hasattr(made, "fake_quant_enabled"),
        name=name,
    )


def _make(factory: Factory) -> Any:
    if not callable(factory):
        raise ConfigError(f"QConfig needs observer classes or factories, got {factory!r}")
    with warnings.catch_warnings():
        # torch.ao's observers announce their own deprecations; the user did not make this one.
        warnings.filterwarnings("ignore", message=r"Please use quant_min and quant_max")
        warnings.filterwarnings("ignore", module=r"torch(\..*)?$")
        return factory()


def _read_spec(observer: nn.Module) -> QuantSpec | None:
    own = getattr(observer, "spec", None)
    if isinstance(own, QuantSpec):
        return own
    dtype = observer.dtype
    if dtype in (torch.float32, torch.float64) or not isinstance(dtype, torch.dtype):
        return None
    low, high = integer_range(
        dtype,
        _whole(getattr(observer, "quant_min", None)),
        _whole(getattr(observer, "quant_max", None)),
    )
    qscheme = getattr(observer, "qscheme", None) or torch.per_tensor_affine
    per_channel = "per_channel" in str(qscheme)
    return QuantSpec(
        dtype=storage_dtype(dtype),
        qscheme=qscheme,
        quant_min=low,
        quant_max=high,
        ch_axis=int(getattr(observer, "ch_axis", 0)) if per_channel else None,
        is_dynamic=bool(getattr(observer, "is_dynamic", False)),
        eps=_eps_of(observer),
        fixed=_fixed_of(observer),
    )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _eps_of(observer: nn.Module) -> float:
    """Fake quantizers keep it in the observer inside them; torch.ao keeps it in a tensor."""
    inner = getattr(observer, "activation_post_process", observer)
    eps = getattr(inner, "eps", None)
    value = DEFAULT_EPS if eps is None else float(eps)
    return value if math.isfinite(value) and value > 0 else DEFAULT_EPS


def _fixed_of(observer: nn.Module) -> tuple[float, int] | None:
    inner: Any = getattr(observer, "activation_post_process", observer)
    if "FixedQParamsObserver" not in {base.__name__ for base in type(inner).__mro__}:
        return None
    return float(inner.scale), int(inner.zero_point)


default_qconfig = QConfig(activation=default_observer, weight=default_weight_observer)
default_debug_qconfig = QConfig(activation=default_debug_observer, weight=default_weight_observer)
default_per_channel_qconfig = QConfig(
    activation=default_observer, weight=default_per_channel_weight_observer
)
default_dynamic_qconfig = QConfig(
    activation=default_dynamic_quant_observer, weight=default_weight_observer
)
per_channel_dynamic_qconfig = QConfig(
    activation=default_dynamic_quant_observer, weight=default_per_channel_weight_observer
)
float16_dynamic_qconfig = QConfig(
    activation=PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True),
    weight=PlaceholderObserver.with_args(dtype=torch.float16),
)
float16_static_qconfig = QConfig(
    activation=PlaceholderObserver.with_args(dtype=torch.float16),
    weight=PlaceholderObserver.with_args(dtype=torch.float16),
)
bfloat16_static_qconfig = QConfig(
    activation=PlaceholderObserver.with_args(dtype=torch.bfloat16),
    weight=PlaceholderObserver.with_args(dtype=torch.bfloat16),
)
float_qparams_weight_only_qconfig = QConfig(
    activation=default_placeholder_observer, weight=default_float_qparams_observer
)
float_qparams_weight_only_qconfig_4bit = QConfig(
    activation=default_placeholder_observer, weight=default_float_qparams_observer_4bit
)
default_weight_only_qconfig = QConfig(activation=nn.Identity, weight=default_weight_fake_quant)
default_activation_only_qconfig = QConfig(activation=default_fake_quant, weight=nn.Identity)
default_reuse_input_qconfig = QConfig(activation=default_reuse_input_observer, weight=NoopObserver)
default_quint8_weight_qconfig = QConfig(activation=HistogramObserver, weight=MinMaxObserver)
default_qat_qconfig = QConfig(activation=default_fake_quant, weight=default_weight_fake_quant)
default_qat_qconfig_v2 = QConfig(
    activation=default_fused_act_fake_quant, weight=default_fused_wt_fake_quant
)
default_per_channel_qat_qconfig = QConfig(
    activation=default_fake_quant, weight=default_per_channel_weight_fake_quant
)
default_dynamic_qat_qconfig = QConfig(
    activation=default_dynamic_fake_quant, weight=default_weight_fake_quant
)
default_embedding_qat_qconfig = QConfig(
    activation=NoopObserver.with_args(dtype=torch.float32), weight=default_embedding_fake_quant
)
default_embedding_qat_qconfig_4bit = QConfig(
    activation=NoopObserver.with_args(dtype=torch.float32),
    weight=default_embedding_fake_quant_4bit,
)

# qnnpack's symmetric kernels want int8 activations and weights without -128.
_SYMMETRIC_EPS: Final = 2**-12
_int8_histogram = TorchHistogramObserver.with_args(dtype=torch.int8, eps=_SYMMETRIC_EPS)
_int8_fused = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.int8,
    eps=_SYMMETRIC_EPS,
)
default_symmetric_qnnpack_qconfig = QConfig(
    activation=_int8_histogram, weight=weight_observer_range_neg_127_to_127
)
default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    activation=_int8_histogram, weight=per_channel_weight_observer_range_neg_127_to_127
)
default_symmetric_qnnpack_qat_qconfig = QConfig(
    activation=_int8_fused, weight=fused_wt_fake_quant_range_neg_127_to_127
)
default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    activation=_int8_fused, weight=fused_per_channel_wt_fake_quant_range_neg_127_to_127
)

# Without -128 the range is symmetric, as ONNX runtimes want it. The factories of this range under
# torch.ao's names are qnnpack's: their eps of 2**-12 would coarsen channels of small weights.
_weight_127 = default_per_channel_weight_observer.with_args(quant_min=-127, quant_max=127)
_fused_weight_127 = default_fused_per_channel_wt_fake_quant.with_args(quant_min=-127, quant_max=127)
_full_range = HistogramObserver.with_args(dtype=torch.uint8)
_torch_full_range = TorchHistogramObserver.with_args(dtype=torch.uint8)
_torch_half_range = _torch_full_range.with_args(reduce_range=True)
_fused_half_range = default_fused_act_fake_quant.with_args(reduce_range=True)


@dataclass(frozen=True, slots=True)
class BackendDefaults:
    """What a backend's users get who say nothing: the rows of :data:`BACKENDS`.

    Attributes:
        ptq: for post-training quantization.
        qat: for quantization-aware training.
        dynamic: for activations that are quantized at run time.
    """

    ptq: QConfig
    qat: QConfig
    dynamic: QConfig = default_dynamic_qconfig


def _backend(
    activation: Factory,
    weight: Factory,
    qat_activation: Factory,
    qat_weight: Factory,
    dynamic_weight: Factory = default_weight_observer,
) -> BackendDefaults:
    return BackendDefaults(
        ptq=QConfig(activation, weight),
        qat=QConfig(qat_activation, qat_weight),
        dynamic=QConfig(default_dynamic_quant_observer, dynamic_weight),
    )


#: Defaults by backend. "x86" is fxquant's: the full range 0..255 and the least squared error for
#: activations, -127..127 for weights.
#: The others are torch.ao's, "x86-compat" being what it calls "x86".
BACKENDS: Final[Mapping[str, BackendDefaults]] = {
    "x86": _backend(
        _full_range,
        _weight_127,
        default_fused_act_fake_quant,
        _fused_weight_127,
        _weight_127,
    ),
    "x86-compat": _backend(
        _torch_half_range,
        default_per_channel_weight_observer,
        _fused_half_range,
        default_fused_per_channel_wt_fake_quant,
    ),
    "fbgemm": _backend(
        _torch_half_range,
        default_per_channel_weight_observer,
        _fused_half_range,
        default_fused_per_channel_wt_fake_quant,
    ),
    "onednn": _backend(
        _torch_full_range,
        default_per_channel_weight_observer,
        default_fused_act_fake_quant,
        default_fused_per_channel_wt_fake_quant,
    ),
    "qnnpack": _backend(
        _torch_full_range,
        default_weight_observer,
        default_fused_act_fake_quant,
        default_fused_wt_fake_quant,
    ),
}


def backend_defaults(backend: str) -> BackendDefaults:
    """The row of :data:`BACKENDS`.

    Raises:
        ConfigError: there is none (also an ``AssertionError``).
    """
    if backend not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise UnsupportedBackendError(
            f"backend {backend!r} is not supported, use one of {known}"
            f"{did_you_mean(str(backend), BACKENDS)}"
        )
    return BACKENDS[backend]


def get_default_qconfig(backend: str = "x86") -> QConfig:
    """The default for post-training quantization on a backend.

    Args:
        backend: ``x86``, ``x86-compat``, ``fbgemm``, ``onednn`` or ``qnnpack``.

    Raises:
        ConfigError: another one.
    """
    return backend_defaults(backend).ptq


def get_default_qat_qconfig(backend: str = "x86") -> QConfig:
    """The default for quantization-aware training on a backend.

    Args:
        backend: ``x86``, ``x86-compat``, ``fbgemm``, ``onednn`` or ``qnnpack``.

    Raises:
        ConfigError: another one.
    """
    return backend_defaults(backend).qat


def get_default_dynamic_qconfig(backend: str = "x86") -> QConfig:
    """The default for dynamic quantization on a backend: activations are quantized at run time.

    ``x86`` has weights per channel within -127..127, the others torch.ao's per-tensor ones.

    Args:
        backend: ``x86``, ``x86-compat``, ``fbgemm``, ``onednn`` or ``qnnpack``.

    Raises:
        ConfigError: another one.
    """
    return backend_defaults(backend).dynamic
