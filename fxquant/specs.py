"""What a tensor is quantized to, and the arithmetic of it, from the definition.

A :class:`QuantSpec` says *how* a tensor is to be represented (storage dtype, scheme, integer
range); a :class:`QParams` adds the numbers (scale and zero point). The four functions below
them are the definition that every fake quantizer, reference operator and kernel of fxquant is
tested against::

    quantize:    q = clamp(round_half_even(x / scale + zero_point), quant_min, quant_max)
    dequantize:  x = (q - zero_point) * scale
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.errors import SpecError

#: The smallest scale ``choose_qparams`` returns when the spec does not say otherwise.
DEFAULT_EPS: Final[float] = torch.finfo(torch.float32).eps

_FLOAT_DTYPES: Final = (torch.float16, torch.bfloat16)
_INTEGER_DTYPES: Final = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32)
_PER_TENSOR: Final = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_PER_CHANNEL: Final = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
_SYMMETRIC: Final = (torch.per_tensor_symmetric, torch.per_channel_symmetric)

# Name of a torch quantized dtype -> what its integers are stored in, and their default range.
# By name, so that a torch without these dtypes still imports this module.
_QUANTIZED_DTYPES: Final[dict[str, tuple[torch.dtype, int, int]]] = {
    "quint8": (torch.uint8, 0, 255),
    "qint8": (torch.int8, -128, 127),
    "qint32": (torch.int32, -(2**31), 2**31 - 1),
    "quint4x2": (torch.uint8, 0, 15),
    "quint2x4": (torch.uint8, 0, 3),
}


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The plain dtype that holds the values of ``dtype``: ``quint8 -> uint8``, ``uint8 -> uint8``.

    Args:
        dtype: any dtype; the quantized ones of torch are replaced, others pass through.
    """
    entry = _QUANTIZED_DTYPES.get(_dtype_name(dtype))
    return dtype if entry is None else entry[0]


def default_range(dtype: torch.dtype) -> tuple[int, int]:
    """``(quant_min, quant_max)`` of an integer or quantized dtype: ``quint4x2 -> (0, 15)``.

    Floating-point dtypes have no integer range and give ``(0, 0)``.

    Raises:
        SpecError: the dtype is not one that a tensor can be quantized to.
    """
    entry = _QUANTIZED_DTYPES.get(_dtype_name(dtype))
    if entry is not None:
        return entry[1], entry[2]
    if dtype in _FLOAT_DTYPES:
        return 0, 0
    if dtype in _INTEGER_DTYPES:
        info = torch.iinfo(dtype)
        return info.min, info.max
    raise SpecError(_unknown_dtype(dtype))


def _unknown_dtype(dtype: object) -> str:
    known = ", ".join(_dtype_name(d) for d in (*_INTEGER_DTYPES, *_FLOAT_DTYPES))
    quantized = ", ".join(_QUANTIZED_DTYPES)
    return f"dtype {dtype} is no quantization dtype; use one of {known} (or torch's {quantized})"


@dataclass(frozen=True, slots=True)
class SchemeName:
    """Stands for a ``torch.qscheme`` in pickles.

    torch's own schemes do not know their module, so that pickle asks every loaded module for
    them: slow, and it trips over modules that load on demand.
    """

    name: str


def name_schemes(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with every qscheme replaced by its name; undone by :func:`find_schemes`."""
    return {
        key: SchemeName(str(value).removeprefix("torch."))
        if isinstance(value, torch.qscheme)
        else value
        for key, value in values.items()
    }


def find_schemes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`name_schemes`."""
    return {
        key: getattr(torch, value.name) if isinstance(value, SchemeName) else value
        for key, value in values.items()
    }


def _unpickle_spec(values: dict[str, Any]) -> QuantSpec:
    return QuantSpec(**find_schemes(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one tensor is represented: everything about quantization but the numbers.

    Attributes:
        dtype: storage dtype; one of uint8, int8, int16, uint16, int32, float16, bfloat16.
            Narrower integers keep the 8-bit storage with a narrower range.
        qscheme: ``torch.per_tensor_affine``, ``per_tensor_symmetric``, ``per_channel_affine``,
            ``per_channel_symmetric`` or ``per_channel_affine_float_qparams`` (a float zero point
            per row, for embeddings).
        quant_min: smallest integer used; 0 for the floating-point dtypes.
        quant_max: largest integer used; 0 for the floating-point dtypes.
        ch_axis: the channel axis (may be negative), exactly for the per-channel schemes.
        is_dynamic: parameters are chosen at run time from the tensor itself.
        eps: smallest scale that is chosen.
        fixed: ``(scale, zero_point)`` where the op dictates them (sigmoid, tanh, softmax).

    Raises:
        SpecError: a value that cannot be honoured, named in the message.
    """

    dtype: torch.dtype
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int
    ch_axis: int | None = None
    is_dynamic: bool = False
    eps: float = DEFAULT_EPS
    fixed: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        """Refuse what no kernel, reference or fake quantizer could honour."""
        if self.dtype not in (*_INTEGER_DTYPES, *_FLOAT_DTYPES):
            raise SpecError(_unknown_dtype(self.dtype))
        if self.qscheme not in (*_PER_TENSOR, *_PER_CHANNEL):
            known = ", ".join(str(s) for s in (*_PER_TENSOR, *_PER_CHANNEL))
            raise SpecError(f"qscheme {self.qscheme!r} is not known; use one of {known}")
        if self.is_per_channel and self.ch_axis is None:
            raise SpecError(f"{self.qscheme} needs a channel axis, got ch_axis=None")
        if not self.is_per_channel and self.ch_axis is not None:
            raise SpecError(f"{self.qscheme} has no channel axis, got ch_axis={self.ch_axis}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise SpecError(f"eps is the smallest scale and must be > 0, got {self.eps!r}")
        self._check_range()
        if self.fixed is not None:
            self._check_fixed(*self.fixed)

    def __reduce__(self) -> tuple[object, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _unpickle_spec, (name_schemes(values),)

    def _check_range(self) -> None:
        low, high = self.quant_min, self.quant_max
        if self.is_float:
            if (low, high) != (0, 0):
                raise SpecError(
                    f"{_dtype_name(self.dtype)} has no integer range: quant_min and quant_max "
                    f"must be 0, got {low}..{high}"
                )
            return
        info = torch.iinfo(self.dtype)
        if not low < high:
            raise SpecError(f"quant_min must be less than quant_max, got {low}..{high}")
        if low < info.min or high > info.max:
            raise SpecError(
                f"range {low}..{high} does not fit {_dtype_name(self.dtype)} "
                f"({info.min}..{info.max})"
            )
        if not low <= 0 <= high:
            raise SpecError(f"range {low}..{high} must include 0")

    def _check_fixed(self, scale: float, zero_point: int) -> None:
        if self.is_per_channel or self.is_float:
            raise SpecError(f"fixed parameters need a per-tensor integer spec, got {self.short()}")
        if not (math.isfinite(scale) and scale > 0):
            raise SpecError(f"a fixed scale must be finite and > 0, got {scale!r}")
        if not self.quant_min <= zero_point <= self.quant_max:
            raise SpecError(
                f"fixed zero_point {zero_point} is outside {self.quant_min}..{self.quant_max}"
            )

    @property
    def is_float(self) -> bool:
        """Whether quantizing is a cast to float16 or bfloat16."""
        return self.dtype in _FLOAT_DTYPES

    @property
    def is_per_channel(self) -> bool:
        """Whether every slice along ``ch_axis`` has its own scale and zero point."""
        return self.qscheme in _PER_CHANNEL

    @property
    def is_symmetric(self) -> bool:
        """Whether the zero point is fixed in the middle of the range."""
        return self.qscheme in _SYMMETRIC

    @property
    def has_float_zero_point(self) -> bool:
        """Whether the zero point is a float (embedding tables only)."""
        return self.qscheme == torch.per_channel_affine_float_qparams

    @property
    def levels(self) -> int:
        """How many integers the range holds."""
        return self.quant_max - self.quant_min + 1

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of a symmetric scheme: 0, or the middle for unsigned storage.

        The middle of the full ``0..255`` is 128, as torch.ao has it (of ``0..65535``: 32768); of a
        narrower unsigned range it is ``(quant_min + quant_max) // 2``.
        """
        if self.dtype.is_signed:
            return 0
        if (self.quant_min, self.quant_max) == default_range(self.dtype):
            return (self.quant_max + 1) // 2
        return (self.quant_min + self.quant_max) // 2

    def short(self) -> str:
        """One readable line, e.g. ``int8 per-channel(0) sym -127..127`` or ``float16 dynamic``."""
        parts = [_dtype_name(self.dtype)]
        if not self.is_float:
            if self.is_per_channel:
                parts.append(f"per-channel({self.ch_axis})")
            kind = "sym" if self.is_symmetric else "affine"
            parts.append("float-qparams" if self.has_float_zero_point else kind)
            parts.append(f"{self.quant_min}..{self.quant_max}")
        if self.fixed is not None:
            parts.append(f"fixed(scale={self.fixed[0]:g}, zero_point={self.fixed[1]})")
        if self.is_dynamic:
            parts.append("dynamic")
        return " ".join(parts)


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """The numbers of a quantized tensor.

    Attributes:
        scale: float32, 0-d per tensor or ``[C]`` per channel.
        zero_point: int32 of the same shape (float32 for ``per_channel_affine_float_qparams``).
        spec: the representation they belong to.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def validate(self) -> None:
        """Check shape, dtype, scale and zero point.

        Raises:
            SpecError: a scale that is not finite and > 0, a zero point out of range, or shapes
                that do not agree with each other or with the scheme.
        """
        spec, scale, zero_point = self.spec, self.scale, self.zero_point
        if scale.shape != zero_point.shape or scale.dim() != int(spec.is_per_channel):
            raise SpecError(
                f"{spec.short()}: scale {list(scale.shape)} and zero_point "
                f"{list(zero_point.shape)} must both be {'1-d' if spec.is_per_channel else '0-d'}"
            )
        expected = torch.float32 if spec.has_float_zero_point else torch.int32
        if scale.dtype != torch.float32 or zero_point.dtype != expected:
            raise SpecError(
                f"{spec.short()}: scale and zero_point must be float32 and "
                f"{_dtype_name(expected)}, got {scale.dtype} and {zero_point.dtype}"
            )
        good = torch.isfinite(scale) & (scale > 0)
        if not bool(good.all()):
            culprit = scale[~good].flatten()[0].item()
            raise SpecError(f"{spec.short()}: scale must be finite and > 0, got {culprit}")
        if spec.has_float_zero_point:
            inside = torch.isfinite(zero_point)
        else:
            inside = (zero_point >= spec.quant_min) & (zero_point <= spec.quant_max)
        if not bool(inside.all()):
            culprit = zero_point[~inside].flatten()[0].item()
            raise SpecError(
                f"{spec.short()}: zero_point {culprit} is outside "
                f"{spec.quant_min}..{spec.quant_max}"
            )


def choose_qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point that cover ``[min_val, max_val]``.

    With ``a = min(min_val, 0)``, ``b = max(max_val, 0)`` (zero is always representable) and
    ``n = quant_max - quant_min``::

        affine:         scale = max((b - a) / n, eps)
                        zero_point = clamp(quant_min - round_half_even(a / scale))
        symmetric:      scale = max(max(-a, b) / (n / 2), eps), zero_point as the spec says
        float qparams:  scale = (max_val - min_val) / n, or 1 where that is <= eps
                        zero_point = -min_val / scale

    All in float32, so the numbers are those of torch.ao's observers.

    Args:
        min_val: smallest value, 0-d, or ``[C]`` for a per-channel spec.
        max_val: largest value, of the same shape.
        spec: an integer spec. ``spec.fixed`` wins over the range.

    Raises:
        SpecError: a float spec, shapes that do not fit it, ``min_val > max_val``, or non-finite
            values.
    """
    if spec.is_float:
        raise SpecError(f"{spec.short()} is a cast and has no scale and zero point")
    low, high = min_val.detach().to(torch.float32), max_val.detach().to(torch.float32)
    _check_min_max(low, high, spec)
    if spec.fixed is not None:
        scale = torch.full_like(low, spec.fixed[0])
        return QParams(scale, torch.full_like(low, spec.fixed[1], dtype=torch.int32), spec)
    scale, zero_point = range_to_qparams(
        low,
        high,
        spec.quant_min,
        spec.quant_max,
        spec.eps,
        spec.is_symmetric,
        spec.symmetric_zero_point,
        spec.has_float_zero_point,
    )
    return QParams(scale, zero_point, spec)


def range_to_qparams(
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    eps: float,
    symmetric: bool,
    symmetric_zero_point: int,
    float_zero_point: bool,
) -> tuple[Tensor, Tensor]:
    """The arithmetic of :func:`choose_qparams` on plain values, which TorchScript can compile.

    Args:
        low: smallest values, float32, any shape.
        high: largest values, of the same shape.
        quant_min: smallest integer.
        quant_max: largest integer.
        eps: smallest scale.
        symmetric: fix the zero point.
        symmetric_zero_point: where to.
        float_zero_point: the ``float qparams`` line of the formula.

    Returns:
        scale (float32) and zero point (int32, or float32), both of the shape of ``low``.
    """
    steps = float(quant_max - quant_min)
    if float_zero_point:
        scale = (high - low) / steps
        scale = torch.where(scale > eps, scale, torch.ones_like(scale))
        return scale, -low / scale
    below, above = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        scale = (torch.maximum(-below, above) / (steps / 2)).clamp(min=eps)
        return scale, torch.full_like(scale, symmetric_zero_point, dtype=torch.int32)
    scale = ((above - below) / steps).clamp(min=eps)
    zero_point = quant_min - torch.round(below / scale).to(torch.int32)
    return scale, zero_point.clamp(quant_min, quant_max)


def choose_dynamic_qparams(x: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point of a tensor that is quantized at run time, from its own values.

    For affine uint8, those of PyTorch's dynamic kernels (``torch._choose_qparams_per_tensor``):
    the scale is computed in float64, is 0.1 where all values are 0 and never below 6.1e-5 (the
    range is widened to it), and the zero point is taken from the end of the range where it is off
    by less. Otherwise :func:`choose_qparams` of the smallest and the largest value.

    Args:
        x: float tensor of any shape, finite; an empty one has the range 0..0.
        spec: a per-tensor integer spec.

    Raises:
        SpecError: another spec, or values that are not finite.
    """
    if spec.is_float or spec.is_per_channel:
        raise SpecError(f"{spec.short()}: only per-tensor integers can be chosen at run time")
    values = x.detach().to(torch.float32)
    low, high = torch.aminmax(values) if x.numel() else (values.new_zeros(()),) * 2
    if spec.dtype is not torch.uint8 or spec.is_symmetric:
        return choose_qparams(low, high, spec)
    _check_min_max(low, high, spec)
    scale, zero_point = _kernel_qparams(float(low), float(high), spec.quant_min, spec.quant_max)
    return QParams(values.new_tensor(scale), values.new_tensor(zero_point).to(torch.int32), spec)


_SMALLEST_DYNAMIC_SCALE: Final = 6.1e-5
_float32 = struct.Struct("f")


def _rounded(value: float) -> float:
    """``value`` as a float32."""
    return float(_float32.unpack(_float32.pack(value))[0])


def _kernel_qparams(low: float, high: float, quant_min: int, quant_max: int) -> tuple[float, int]:
    """The rule of PyTorch's dynamic kernels on plain numbers."""
    low, high = min(low, 0.0), max(high, 0.0)
    steps = quant_max - quant_min
    scale = (high - low) / steps
    if _rounded(scale) == 0.0 or _rounded(scale) < 1 / torch.finfo(torch.float32).max:
        scale = 0.1
    smallest = _rounded(_SMALLEST_DYNAMIC_SCALE)
    if scale < smallest:
        widen = smallest / scale
        low, high = _widened(low, high, smallest * steps, widen)
        scale = smallest
    from_low, from_high = quant_min - low / scale, quant_max - high / scale
    error_low = abs(quant_min) - abs(low / scale)
    error_high = abs(quant_max) - abs(high / scale)
    zero_point = round(from_low if error_low < error_high else from_high)
    return scale, min(max(zero_point, quant_min), quant_max)


def _widened(low: float, high: float, width: float, times: float) -> tuple[float, float]:
    if low == 0.0:
        return low, _rounded(width)
    if high == 0.0:
        return _rounded(-width), high
    return _rounded(low * times), _rounded(high * times)


def _check_min_max(low: Tensor, high: Tensor, spec: QuantSpec) -> None:
    wanted = 1 if spec.is_per_channel else 0
    if low.shape != high.shape or low.dim() != wanted:
        raise SpecError(
            f"{spec.short()} needs min and max of {wanted} dimension(s), got shapes "
            f"{list(low.shape)} and {list(high.shape)}"
        )
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise SpecError(f"{spec.short()}: min and max must be finite, got {low} and {high}")
    if not bool((low <= high).all()):
        raise SpecError(f"{spec.short()}: min must not exceed max, got {low} and {high}")


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The integers (or half floats) that represent ``x``.

    ``clamp(round_half_even(x * (1 / scale) + zero_point), quant_min, quant_max)``, with the
    reciprocal rounded to float32 first. Bit-exact with ``torch.quantize_per_tensor`` (uint8 and
    int8: one rounding of product and sum, a fused multiply-add) and with
    ``torch.quantize_per_channel`` and int32 (product and sum rounded one after the other), also
    for ties. ``torch.fake_quantize_*`` rounds before it adds the zero point, so its integers
    differ by one where ``x / scale`` is within half a float32 ulp of a tie. No kernel of torch
    gives int16 or uint16: there the only rounding is the one to an integer.

    Args:
        x: float tensor of any shape, finite.
        qparams: parameters; per-channel ones run along ``qparams.spec.ch_axis``.

    Returns:
        A tensor of the shape of ``x`` and dtype ``qparams.spec.dtype``.
    """
    spec = qparams.spec
    if spec.is_float:
        return x.to(spec.dtype)
    inverse = _along_axis(qparams.scale, x, spec).reciprocal()
    zero_point = _along_axis(qparams.zero_point, x, spec)
    values = x.to(torch.float32)
    narrow = spec.dtype.itemsize == 1
    if narrow and not bool(zero_point.any()):  # then all ways below round the product, once
        rounded = (values * inverse).round_()
        return rounded.clamp_(spec.quant_min, spec.quant_max).to(spec.dtype)
    if (spec.is_per_channel and narrow) or spec.dtype == torch.int32:
        rounded = torch.round(values * inverse + zero_point.to(torch.float32))
    else:
        # float64 holds the 48-bit product and the sum exactly: one rounding to float32 follows.
        exact = values.to(torch.float64).mul_(inverse.to(torch.float64))
        exact.add_(zero_point.to(torch.float64))
        rounded = (exact.to(torch.float32) if narrow else exact).round_()
    if spec.dtype == torch.int32:  # 2**31 - 1 is no float32
        rounded = rounded.to(torch.float64)
    return rounded.clamp_(spec.quant_min, spec.quant_max).to(spec.dtype)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """The float32 values that ``q`` stands for: ``(q - zero_point) * scale``.

    Args:
        q: integers as :func:`quantize` returns them, any shape.
        qparams: the parameters they were quantized with.

    Returns:
        A float32 tensor of the shape of ``q``.
    """
    spec = qparams.spec
    if spec.is_float:
        return q.to(torch.float32)
    scale = _along_axis(qparams.scale, q, spec)
    zero_point = _along_axis(qparams.zero_point, q, spec)
    if spec.has_float_zero_point:
        return (q.to(torch.float32) - zero_point) * scale
    if spec.dtype.itemsize < 4:  # differences of less than 2**24 are float32 numbers
        return q.to(torch.float32).sub_(zero_point).mul_(scale)
    return (q.to(torch.int64) - zero_point.to(torch.int64)).to(torch.float32) * scale


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """``dequantize(quantize(x))``: ``x`` moved to the nearest values the integers can hold."""
    return dequantize(quantize(x, qparams), qparams)


def _along_axis(values: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape ``[C]`` to broadcast along ``spec.ch_axis`` of ``x``."""
    if spec.ch_axis is None:
        return values
    rank = x.dim()
    axis = spec.ch_axis + rank if spec.ch_axis < 0 else spec.ch_axis
    if not 0 <= axis < rank or x.shape[axis] != values.numel():
        raise SpecError(
            f"{spec.short()}: {values.numel()} channel(s) do not fit axis {spec.ch_axis} "
            f"of shape {list(x.shape)}"
        )
    shape = [1] * rank
    shape[axis] = -1
    return values.view(shape)
