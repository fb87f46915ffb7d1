"""Whether a qconfig fits what a backend serves: a :class:`QConfig` against a :class:`DTypeConfig`.

The messages contain the words of torch.ao's. Where torch.ao says nothing (a dtype that the backend
lacks) there is a message too, marked as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from fxquant.dtype_config import DTypeConfig, DTypeWithConstraints
from fxquant.qconfig import Factory, QConfig, spec_of

_FIXED_QPARAMS: Final = ("FixedQParamsObserver", "FixedQParamsFakeQuantize")
_USE_DEFAULTS: Final = (
    ". get_default_qconfig_mapping and get_default_qat_qconfig_mapping have the right ones"
)
# Names of dtypes of the same integers: torch's quantized dtype, and what they are stored in.
_STORAGE: Final = {"quint8": "uint8", "qint8": "int8", "qint32": "int32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverTraits:
    """What a backend looks at in an observer or fake quantizer.

    Attributes:
        name: its class.
        dtype: of the integers, ``torch.float32`` where the tensor is not quantized.
        quant_min: smallest integer, or ``None`` where it says nothing.
        quant_max: largest integer, likewise.
        eps: smallest scale, likewise.
        is_dynamic: quantized with parameters computed at run time.
        fixed: scale and zero point of a fixed-qparams observer.
    """

    name: str
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    eps: float | None = None
    is_dynamic: bool = False
    fixed: tuple[float, int] | None = None


_FLOAT: Final = ObserverTraits(name="None", dtype=torch.float32)


def traits_of(factory: Factory | None) -> ObserverTraits:
    """Read what a factory of observers makes; calls it.

    Args:
        factory: ``qconfig.activation`` or ``qconfig.weight``, of fxquant or torch.ao.

    Raises:
        ConfigError: it makes no observer.
    """
    known = spec_of(factory)
    if known is None:
        return _FLOAT
    made: Any = known()
    dtype = getattr(made, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        return ObserverTraits(name=known.name, dtype=torch.float32)
    inner = getattr(made, "activation_post_process", made)
    is_fixed = {base.__name__ for base in type(made).__mro__} & set(_FIXED_QPARAMS)
    eps = getattr(made, "eps", getattr(inner, "eps", None))
    return ObserverTraits(
        name=known.name,
        dtype=dtype,
        quant_min=_whole(getattr(made, "quant_min", None)),
        quant_max=_whole(getattr(made, "quant_max", None)),
        eps=None if eps is None else float(eps),
        is_dynamic=bool(getattr(made, "is_dynamic", False)),
        fixed=(float(inner.scale), int(inner.zero_point)) if is_fixed else None,
    )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Why a qconfig does not fit.

    Attributes:
        message: with what was wanted and what is possible.
        about_dtype: the backend lacks the dtype; torch.ao passes over such an op in silence.
    """

    message: str
    about_dtype: bool = False


def misfit(qconfig: QConfig, config: DTypeConfig, *, weighted: bool) -> Misfit | None:
    """Why ``qconfig`` does not fit one combination of dtypes, or ``None``.

    The activation must have the dtype of the input, and that of the output where the activation is
    not dynamic (a dynamic op gives float32); integers and the smallest scale must keep within the
    bounds, fixed parameters must be those asked for. The weight likewise.

    Args:
        qconfig: of fxquant or torch.ao.
        config: what the backend serves; an unset dtype constrains nothing.
        weighted: the op has a weight, and perhaps a bias.

    Raises:
        ConfigError: a factory of the qconfig makes no observer.
    """
    activation, weight = _traits(qconfig)
    wants_dynamic = bool(config.is_dynamic)
    if activation.is_dynamic != wants_dynamic and config.input_dtype is not None:
        asked = "dynamic" if activation.is_dynamic else "static"
        served = "dynamic" if wants_dynamic else "static"
        return Misfit(
            message=f"QConfig activation is {asked}, the backend's is {served}", about_dtype=True
        )
    found = _mismatch(activation, config.input_dtype_with_constraints, "activation", qconfig)
    if found is None and activation.is_dynamic:
        found = _dtype_mismatch(_FLOAT, config.output_dtype_with_constraints, "output")
    elif found is None:
        found = _mismatch(activation, config.output_dtype_with_constraints, "activation", qconfig)
    if found is not None or not weighted:
        return found
    found = _mismatch(weight, config.weight_dtype_with_constraints, "weight", qconfig)
    if found is None and config.bias_dtype is not None:
        # Bias stays float32, but for a model in float16 throughout.
        half = activation.dtype is torch.float16 and not activation.is_dynamic
        bias = ObserverTraits(name="bias", dtype=torch.float16 if half else torch.float32)
        found = _dtype_mismatch(bias, DTypeWithConstraints(config.bias_dtype), "bias")
    return found


@functools.lru_cache(maxsize=256)
def _traits(qconfig: QConfig) -> tuple[ObserverTraits, ObserverTraits]:
    """Of the activation and of the weight; a model asks for few qconfigs many times."""
    return traits_of(qconfig.activation), traits_of(qconfig.weight)


def fitting(
    qconfig: QConfig, configs: Sequence[DTypeConfig], *, weighted: bool
) -> DTypeConfig | Misfit:
    """The first combination of dtypes that ``qconfig`` fits, else why the nearest does not.

    Args:
        qconfig: of fxquant or torch.ao.
        configs: what the backend serves for a pattern.
        weighted: the op has a weight.

    Returns:
        One of ``configs``, or a misfit; one about a range says more than one about a dtype.
    """
    refusals: list[Misfit] = []
    for config in configs:
        found = misfit(qconfig, config, weighted=weighted)
        if found is None:
            return config
        refusals.append(found)
    nearest = next((r for r in refusals if not r.about_dtype), None)
    if nearest is not None:
        return nearest
    messages = list(dict.fromkeys(refusal.message for refusal in refusals))
    listed = "; ".join(messages) or "the backend serves no dtypes at all"
    return Misfit(message=listed, about_dtype=True)


def _mismatch(
    observer: ObserverTraits, wanted: DTypeWithConstraints, part: str, qconfig: QConfig
) -> Misfit | None:
    found = _dtype_mismatch(observer, wanted, part)
    if found is not None or wanted.dtype is None:
        return found
    text = _range_mismatch(observer, wanted, part) or _scale_mismatch(observer, wanted, part)
    if text is not None:
        return Misfit(message=f"{text}, ignoring {qconfig!r}")
    text = _fixed_mismatch(observer, wanted)
    return None if text is None else Misfit(message=f"{text}, ignoring {qconfig!r}{_USE_DEFAULTS}")


def _dtype_mismatch(
    observer: ObserverTraits, wanted: DTypeWithConstraints, part: str
) -> Misfit | None:
    if wanted.dtype is None or _same_integers(observer, wanted.dtype):
        return None
    asked, served = _name(observer.dtype), _name(wanted.dtype)
    message = f"QConfig {part} is {asked}, the backend's is {served}"
    return Misfit(message=message, about_dtype=True)


def _same_integers(observer: ObserverTraits, dtype: torch.dtype) -> bool:
    mine, theirs = _name(observer.dtype), _name(dtype)
    if theirs == "quint4x2" and mine == "uint8":  # fxquant holds 4 bits in bytes
        return (observer.quant_min, observer.quant_max) == (0, 15)
    return _STORAGE.get(mine, mine) == _STORAGE.get(theirs, theirs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _range_mismatch(
    observer: ObserverTraits, wanted: DTypeWithConstraints, part: str
) -> str | None:
    lower, upper = wanted.quant_min_lower_bound, wanted.quant_max_upper_bound
    if lower is None and upper is None:
        return None
    low, high = observer.quant_min, observer.quant_max
    if low is None or high is None:
        return f"QConfig {part} must specify 'quant_min' and 'quant_max'"
    if low >= (-math.inf if lower is None else lower) and high <= (
        math.inf if upper is None else upper
    ):
        return None
    return (
        f"QConfig {part} quantization range must fall within the backend's:\n"
        f"QConfig range = ({low}, {high}), BackendConfig range = ({lower}, {upper})"
    )


def _scale_mismatch(
    observer: ObserverTraits, wanted: DTypeWithConstraints, part: str
) -> str | None:
    bound = wanted.scale_min_lower_bound
    if bound is None:
        return None
    if observer.eps is None:
        return f"QConfig {part} must specify 'eps'"
    if observer.eps >= bound:
        return None
    return (
        f"QConfig {part} eps ({observer.eps}) must be greater than or equal to the backend's min"
        f" scale value ({bound})"
    )


def _fixed_mismatch(observer: ObserverTraits, wanted: DTypeWithConstraints) -> str | None:
    scale, zero_point = wanted.scale_exact_match, wanted.zero_point_exact_match
    if scale is None or zero_point is None:
        return None
    if observer.fixed is None:
        return (
            "QConfig must specify a FixedQParamsObserver or a FixedQParamsFakeQuantize for fixed"
            " qparams ops"
        )
    if math.isclose(observer.fixed[0], scale, rel_tol=1e-6) and observer.fixed[1] == zero_point:
        return None
    return (
        f"QConfig fixed scale ({observer.fixed[0]}) and zero point ({observer.fixed[1]}) do not"
        f" match the backend's ({scale} and {zero_point})"
    )
