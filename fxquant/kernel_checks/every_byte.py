"""Checks of kernels that take quantized tensors: every byte, and every pair of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.kernel_checks.tally import Check, Tally


def quantized_bytes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Whole numbers from 0 to 255 as a quantized tensor."""
    return torch._make_per_tensor_quantized_tensor(x.to(torch.uint8), scale, zero_point)


def _all_pairs() -> tuple[Tensor, Tensor]:
    """Every pair of bytes, as ``[1, 4, 128, 128]``."""
    left = torch.arange(256).repeat_interleave(256)
    right = torch.arange(256).repeat(256)
    return left.reshape(1, 4, 128, 128), right.reshape(1, 4, 128, 128)


def _layouts(x: Tensor) -> tuple[Tensor, ...]:
    """Contiguous and channels_last: kernels have separate code, and separate ends of rows."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats:
        return (x,)
    return x, x.contiguous(memory_format=formats[x.dim()])


def binary_check(
    kernel: Callable[..., Tensor], combine: Callable[[Tensor, Tensor], Tensor], relu: bool
) -> Check:
    """``kernel`` of every pair of bytes, two scales and zero points, against ``combine``."""

    def run(tally: Tally) -> None:
        for left, right in zip(*map(_layouts, _all_pairs()), strict=True):
            for scale in (2.0**-2, 2.0**1, 2.0**3):
                a, b = quantized_bytes(left, 0.5, 3), quantized_bytes(right, 0.25, 200)
                exact = combine((left - 3) * 0.5, (right - 200) * 0.25).to(torch.float64)
                exact = exact.clamp(min=0) if relu else exact
                given = kernel(a, b, scale, 91).int_repr()
                tally.integers(given, exact / scale + 91)

    return run


def unary_check(
    run_kernel: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], shape: Sequence[int]
) -> Check:
    """``run_kernel`` of a quantized tensor (scale 0.25, zero point 101) against ``exact``.

    Args:
        run_kernel: gives a quantized tensor.
        exact: real values -> real values, in float64.
        shape: of the input, which holds every byte.
    """

    def run(tally: Tally) -> None:
        x = ((torch.arange(math.prod(shape)) * 37) % 256).reshape(*shape)
        for held in _layouts(x):
            result = run_kernel(quantized_bytes(held, 0.25, 101))
            value = exact((x.to(torch.float64) - 101) * 0.25)
            tally.integers(result.int_repr(), value / result.q_scale() + result.q_zero_point())

    return run
