"""The layers that are checked, and their weights and images: the worst that kernels can meet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from fxquant.pairing import Geometry

X_SCALE: Final = 2.0**-6
W_SCALE: Final = 2.0**-8
MIDDLE: Final = 129
"""Zero points are odd: with an even one it does not show whether it is added before rounding."""

FORMS: Final = {"": (32, 16, 1), "grouped ": (32, 16, 4), "depthwise ": (16, 16, 16)}
LINEAR: Final = Geometry(inputs=64, outputs=16)


def geometry_of(
    dimensions: int, inputs: int, outputs: int, groups: int = 1, *, transposed: bool = False
) -> Geometry:
    """A layer with kernels of 3, which a transposed one places two apart."""
    each = (1,) * dimensions
    return Geometry(
        inputs=inputs // groups,
        outputs=outputs,
        kernel=(3,) * dimensions,
        size=(6,) * dimensions if dimensions < 3 else (4, 4, 4),
        stride=tuple(2 * s for s in each) if transposed else each,
        padding=each,
        dilation=each,
        output_padding=(0,) * dimensions if transposed else (),
        groups=groups,
        transposed=transposed,
    )


def weights(geometry: Geometry) -> Iterator[Tensor]:
    """Rows that overflow 16-bit pairs, whichever neighbours are paired, and random ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (geometry.outputs, geometry.inputs, *geometry.kernel)
    count = geometry.inputs * math.prod(geometry.kernel)
    full = torch.full((geometry.outputs, count), 127)
    position = torch.arange(count)
    signs = torch.where(torch.arange(geometry.outputs) % 2 == 0, 1, -1)[:, None]
    taps = math.prod(geometry.kernel)
    by_channels = torch.where((position // taps // 2) % 2 == 0, 1, -1)
    by_taps = torch.where((position // 2) % 2 == 0, 1, -1)
    bits = torch.randint(0, 2, (geometry.outputs, count), generator=generator) * 2 - 1
    noise = torch.randint(-128, 128, (geometry.outputs, count), generator=generator)
    for rows in (full * signs, full * by_channels, full * by_taps, full * bits, noise):
        yield rows.to(torch.int8).reshape(shape)


def images(geometry: Geometry) -> Iterator[tuple[Tensor, int]]:
    """Bytes and a zero point: the largest, the largest in one channel of two, and random ones."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, geometry.inputs * geometry.groups, *geometry.size)
    full = torch.full(shape, 255)
    half = full.clone()
    half[:, 1::2] = 0
    for x, zero_point in (
        (full, 0),
        (half, 0),
        (torch.randint(0, 2, shape, generator=generator) * 255, 128),
        (torch.randint(0, 256, shape, generator=generator), 7),
    ):
        yield x.to(torch.uint8), zero_point


def ladder(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """A weight of 1 in one place and every byte below it: sums that lie on every fourth of a step.

    Returns:
        Bytes ``[N, channels, *size]`` and rows.
    """
    channels = geometry.inputs * geometry.groups
    cells = channels * math.prod(geometry.size)
    batch = -(-256 // max(cells // channels, 1))
    count = batch * cells
    x = (torch.arange(count) % 256).reshape(batch, channels, *geometry.size)
    rows = torch.zeros(geometry.outputs, geometry.inputs * math.prod(geometry.kernel))
    middle = math.prod(geometry.kernel) // 2
    rows[:, middle] = torch.where(torch.arange(geometry.outputs) % 2 == 0, 1.0, -1.0)
    shape = (geometry.outputs, geometry.inputs, *geometry.kernel)
    return x.to(torch.uint8), rows.to(torch.int8).reshape(shape)
