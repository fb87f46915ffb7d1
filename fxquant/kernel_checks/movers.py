"""Checks of the int8 kernels that keep the scale of their input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.engine_free import avg_pool2d, clamp
from fxquant.kernel_checks.every_byte import unary_check
from fxquant.kernel_checks.tally import Check
from fxquant.kernels import as_bytes, as_quantized


def movers() -> Iterator[tuple[str, Check]]:
    """Checks of the int8 kernels that compute with integers of one scale."""
    image, volume = (1, 3, 19, 17), (1, 3, 8, 10, 6)
    resize = F.interpolate
    checks: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
        "aten::relu on int8": (torch.relu, image),
        "quantized::max_pool1d": (lambda x: F.max_pool1d(x, 3, 2, 1), (1, 3, 301)),
        "quantized::max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), image),
        "aten::avg_pool3d on int8": (lambda x: F.avg_pool3d(x, 2, 2), volume),
        "aten::upsample on int8 (nearest)": (lambda x: resize(x, scale_factor=2), image),
        "aten::upsample on int8 (bilinear)": (
            lambda x: resize(x, scale_factor=2, mode="bilinear", align_corners=False),
            image,
        ),
    }
    for name, (function, shape) in checks.items():
        yield name, unary_check(function, function, shape)
    yield "aten::clamp on int8", unary_check(_clamp, lambda v: v.clamp(-4.0, 12.5), image)
    windows = {"": (2, 2, 0, False, True, None), " (padded)": (3, 1, 1, False, False, None)}
    for name, window in windows.items():
        yield f"aten::avg_pool2d on int8{name}", _pool_check(window, image)


def _clamp(x: Tensor) -> Tensor:
    held = clamp(as_bytes(x), -4.0, 12.5, x.q_scale(), x.q_zero_point())
    return as_quantized(held, x.q_scale(), x.q_zero_point())


def _pool_check(window: tuple[Any, ...], shape: Sequence[int]) -> Check:
    return unary_check(lambda x: avg_pool2d(x, *window), lambda v: F.avg_pool2d(v, *window), shape)
