"""Working on a large tensor a few rows at a time, so that what lies between stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.specs import QParams, quantize

_ELEMENTS = 1 << 16  # 256 KiB of float32: what lies between stays in the cache too


def row_slices(x: Tensor) -> Iterator[slice]:
    """Slices of dimension 0 that together are all of ``x``, about 2**16 elements each."""
    rows = x.shape[0]
    step = max(1, _ELEMENTS * rows // max(1, x.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_rows(x: Tensor, dtype: torch.dtype, function: Callable[[slice], Tensor]) -> Tensor:
    """What ``function`` gives for each slice of rows of ``x``, as one tensor of its shape.

    Args:
        x: at least one-dimensional.
        dtype: of the result.
        function: takes a slice of dimension 0, gives values of the shape of ``x[slice]``.
    """
    result = torch.empty_like(x, dtype=dtype, requires_grad=False)
    for part in row_slices(x):
        result[part] = function(part)
    return result


def all_finite(x: Tensor) -> bool:
    """Whether ``x`` holds no NaN and no Inf (``isfinite`` makes two tensors of its size)."""
    if bool(torch.isfinite(x.detach().sum())):  # no sum with NaN or Inf is finite
        return True
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all())


def scaled_rows(weight: Tensor, factor: Tensor) -> Tensor:
    """``weight * factor``, computed in float64 and rounded once.

    Args:
        weight: float, any shape.
        factor: float64, with the dimensions of ``weight``; the first is 1 or as long.
    """
    weight = weight.detach()
    spread = factor.expand(weight.shape[0], *factor.shape[1:])
    return by_rows(weight, weight.dtype, lambda part: weight[part].to(torch.float64) * spread[part])


def quantize_rows(weight: Tensor, qparams: QParams) -> Tensor:
    """:func:`fxquant.specs.quantize`, a few rows at a time.

    Args:
        weight: float, at least one-dimensional.
        qparams: per tensor, or per channel along any axis.
    """
    weight = weight.detach()
    return by_rows(
        weight,
        qparams.spec.dtype,
        lambda part: quantize(weight[part].to(torch.float32), rows_of(qparams, part, weight.dim())),
    )


def rows_of(qparams: QParams, part: slice, dimensions: int) -> QParams:
    """The parameters of a slice of dimension 0 of a tensor of so many dimensions."""
    if qparams.spec.ch_axis not in (0, -dimensions):
        return qparams
    return replace(qparams, scale=qparams.scale[part], zero_point=qparams.zero_point[part])
