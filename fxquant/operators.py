"""The operators of the reference graph: ``fxquant::quantize``, ``dequantize``, and dynamic.

They are defined by the arithmetic of :mod:`fxquant.specs` and nothing else, on every device, with
fake implementations so that shapes propagate and graphs export.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxquant.specs import QParams, QuantSpec, choose_dynamic_qparams, dequantize, quantize

_LIBRARY = torch.library.Library("fxquant", "DEF")

_LIBRARY.define(
    "quantize(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max,"
    " ScalarType dtype, int? axis=None) -> Tensor"
)
_LIBRARY.define(
    "quantize_dynamic(Tensor input, int quant_min, int quant_max, ScalarType dtype,"
    " bool symmetric=False) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "dequantize(Tensor input, Tensor scale, Tensor zero_point, int? axis=None) -> Tensor"
)


def _spec(quant_min: int, quant_max: int, dtype: torch.dtype, axis: int | None) -> QuantSpec:
    scheme = torch.per_tensor_affine if axis is None else torch.per_channel_affine
    return QuantSpec(
        dtype=dtype, qscheme=scheme, quant_min=quant_min, quant_max=quant_max, ch_axis=axis
    )


def _quantize(
    input: Tensor,  # noqa: A002  # the operator's schema
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    axis: int | None = None,
) -> Tensor:
    spec = _spec(quant_min, quant_max, dtype, axis)
    if zero_point.is_floating_point():
        spec = replace(spec, qscheme=torch.per_channel_affine_float_qparams)
    return quantize(input, QParams(scale, zero_point, spec))


def _dequantize(
    input: Tensor,  # noqa: A002  # the operator's schema
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
) -> Tensor:
    info = torch.iinfo(input.dtype)
    spec = _spec(info.min, info.max, input.dtype, axis)
    if zero_point.is_floating_point():
        spec = replace(spec, qscheme=torch.per_channel_affine_float_qparams)
    return dequantize(input, QParams(scale, zero_point, spec))


def _quantize_dynamic(
    input: Tensor,  # noqa: A002  # the operator's schema
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    spec = QuantSpec(dtype=dtype, qscheme=scheme, quant_min=quant_min, quant_max=quant_max)
    qparams = choose_dynamic_qparams(input, spec)
    return quantize(input, qparams), qparams.scale, qparams.zero_point


_LIBRARY.impl("quantize_dynamic", _quantize_dynamic, "CompositeExplicitAutograd")
_LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("fxquant::quantize", lib=_LIBRARY)
def _quantize_fake(
    input: Tensor,  # noqa: A002  # the operator's schema
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    axis: int | None = None,
) -> Tensor:
    return torch.empty_like(input, dtype=dtype)


@torch.library.register_fake("fxquant::dequantize", lib=_LIBRARY)
def _dequantize_fake(
    input: Tensor,  # noqa: A002  # the operator's schema
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
) -> Tensor:
    return torch.empty_like(input, dtype=torch.float32)


@torch.library.register_fake("fxquant::quantize_dynamic", lib=_LIBRARY)
def _quantize_dynamic_fake(
    input: Tensor,  # noqa: A002  # the operator's schema
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = input.new_empty((), dtype=torch.float32)
    return torch.empty_like(input, dtype=dtype), scale, scale.to(torch.int32)


TO_DTYPE = torch.ops.aten.to.dtype
QUANTIZE = torch.ops.fxquant.quantize.default
DEQUANTIZE = torch.ops.fxquant.dequantize.default
QUANTIZE_DYNAMIC = torch.ops.fxquant.quantize_dynamic.default
