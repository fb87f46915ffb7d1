"""Inputs made up to look like data: pictures for images, normal noise for other floats.

Half of the pictures are dead leaves, rectangles that cover each other, whose sizes follow the power
law of natural images: edges at all scales, and plain areas. The other half is noise of all scales
added up, with amplitudes that fall with frequency: texture. Sources: Lee et al. 2001, "Occlusion
Models for Natural Images"; Baradad et al. 2021, "Learning to See by Looking at Noise".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAVES = 300  # enough to cover a picture
_CHROMA = 0.35  # how much colours differ between channels, relative to how much pictures differ
_GRAIN = 0.1  # noise of a sensor
_LIMIT = 2.2  # deviations from the mean at which pixels are cut off, as bytes are
_SLOPES = (0.25, 0.5)  # amplitude falls with frequency to this power


def synthetic_like(
    example: Tensor, count: int, *, mean: float, deviation: float, generator: torch.Generator
) -> Tensor:
    """A batch of ``count`` made-up inputs of the shape of ``example`` behind the batch axis.

    Args:
        example: float ``[N, ...]``. Of four or more dimensions, the last two are those of pictures.
        count: how many.
        mean: of all values.
        deviation: of all values.
        generator: of all randomness.
    """
    shape = (count, *example.shape[1:])
    if example.dim() < 4:
        made = torch.randn(shape, generator=generator)
    else:
        channels = max(1, example[0, ..., 0, 0].numel())
        height, width = example.shape[-2:]
        half = (count + 1) // 2
        parts = [
            dead_leaves(half, channels, height, width, generator=generator),
            textures(count - half, channels, height, width, generator=generator),
        ]
        made = torch.cat(parts).reshape(shape)
    return (mean + deviation * made).to(example.dtype)


def dead_leaves(
    count: int, channels: int, height: int, width: int, *, generator: torch.Generator
) -> Tensor:
    """Pictures of rectangles over each other: mean 0, deviation 1, ``[count, C, H, W]``."""
    pictures = torch.zeros(count, channels, height, width)
    longest = max(height, width)
    smallest = min(2 / longest, 0.5)
    for picture in pictures:
        brightness = 2 * torch.rand(_LEAVES, 1, generator=generator) - 1
        colours = brightness + _CHROMA * torch.randn(_LEAVES, channels, generator=generator)
        # sizes s of density s**-3: areas of all scales are covered alike
        spread = torch.rand(_LEAVES, generator=generator) * (smallest**-2 - 1) + 1
        size = spread.rsqrt() * longest / 1.5
        sides = size[:, None] * (0.5 + torch.rand(_LEAVES, 2, generator=generator)) + 1
        extent = torch.tensor([height, width]) + size[:, None]
        corners = torch.rand(_LEAVES, 2, generator=generator) * extent - size[:, None]
        first = corners.floor().clamp_min(0).long().tolist()
        last = (corners.floor() + sides.floor()).clamp_min(0).long().tolist()
        for (top, left), (bottom, right), colour in zip(first, last, colours, strict=True):
            picture[:, top:bottom, left:right] = colour[:, None, None]
    grain = torch.randn(pictures.shape, generator=generator)
    return _exposed(_standardized(pictures) + _GRAIN * grain)


def textures(
    count: int, channels: int, height: int, width: int, *, generator: torch.Generator
) -> Tensor:
    """Pictures of noise at all scales: mean 0, deviation 1, ``[count, C, H, W]``."""
    slopes = torch.tensor(_SLOPES)[torch.arange(count) % len(_SLOPES)].reshape(-1, 1, 1, 1)
    pictures = torch.zeros(count, channels, height, width)
    grid = 1
    while grid <= min(height, width):
        grey = torch.randn(count, 1, grid, grid, generator=generator)
        colour = torch.randn(count, channels, grid, grid, generator=generator)
        noise = (grey + _CHROMA * colour) * float(grid) ** -slopes
        pictures += F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)
        grid *= 2
    return _exposed(pictures)


def _exposed(pictures: Tensor) -> Tensor:
    """Standardized, and cut off at both ends."""
    return _standardized(_standardized(pictures).clamp(-_LIMIT, _LIMIT))


def _standardized(pictures: Tensor) -> Tensor:
    """All of them together with mean 0 and deviation 1."""
    if not pictures.numel():
        return pictures
    return (pictures - pictures.mean()) / pictures.std(correction=0).clamp_min(1e-6)
