"""Convolutions and linears in 64-bit integers, from the definition."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.pairing import Geometry


def exact_sums(geometry: Geometry, x: Tensor, rows: Tensor) -> Tensor:
    """The sums of a convolution or linear in 64-bit integers, from the definition.

    Args:
        geometry: of the layer; ``size`` is not read.
        x: integers ``[N, inputs * groups, *size]``, zero point taken off.
        rows: integers ``[outputs, inputs, *kernel]``.

    Returns:
        int64 ``[N, outputs, ...]``.
    """
    x, rows = x.to(torch.int64), rows.to(torch.int64)
    if not geometry.kernel:
        return x @ rows.t()
    dimensions, groups = len(geometry.kernel), geometry.groups
    padding = [p for size in reversed(geometry.padding) for p in (size, size)]
    if geometry.transposed:
        return _exact_transposed(geometry, x, rows)
    x = F.pad(x, padding).unflatten(1, (groups, -1))
    weight = rows.unflatten(0, (groups, -1))
    total: Tensor | None = None
    for tap in itertools.product(*(range(k) for k in geometry.kernel)):
        piece = x
        for d in range(dimensions):
            step, gap = geometry.stride[d], geometry.dilation[d]
            last = x.shape[3 + d] - gap * (geometry.kernel[d] - 1)
            start = tap[d] * gap
            positions = torch.arange(start, start + last, step)
            piece = piece.index_select(3 + d, positions)
        part = torch.einsum("ngi...,goi->ngo...", piece, weight[(slice(None),) * 3 + tap])
        total = part if total is None else total + part
    assert total is not None
    return total.flatten(1, 2)


def _exact_transposed(geometry: Geometry, x: Tensor, rows: Tensor) -> Tensor:
    sizes, dimensions = x.shape[2:], len(geometry.kernel)
    full = [
        (sizes[d] - 1) * geometry.stride[d]
        + geometry.dilation[d] * (geometry.kernel[d] - 1)
        + geometry.output_padding[d]
        + 1
        for d in range(dimensions)
    ]
    total = torch.zeros((x.shape[0], rows.shape[0], *full), dtype=torch.int64)
    grouped, weight = (
        x.unflatten(1, (geometry.groups, -1)),
        rows.unflatten(0, (geometry.groups, -1)),
    )
    for tap in itertools.product(*(range(k) for k in geometry.kernel)):
        part = torch.einsum("ngi...,goi->ngo...", grouped, weight[(slice(None),) * 3 + tap])
        place: list[Any] = [slice(None), slice(None)]
        for d in range(dimensions):
            start = tap[d] * geometry.dilation[d]
            stop = start + (sizes[d] - 1) * geometry.stride[d] + 1
            place.append(slice(start, stop, geometry.stride[d]))
        total[tuple(place)] += part.flatten(1, 2)
    crop = [slice(p, size - p) for p, size in zip(geometry.padding, full, strict=True)]
    window = (slice(None), slice(None), *crop)
    return total[window]
