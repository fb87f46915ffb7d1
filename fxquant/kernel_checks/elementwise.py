"""Checks of the kernels with an output scale of their own, and no packed weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.engine_free import add, add_relu
from fxquant.kernel_checks.every_byte import binary_check, quantized_bytes, unary_check
from fxquant.kernel_checks.tally import Check, Tally
from fxquant.kernel_checks.worst_cases import MIDDLE, W_SCALE, X_SCALE


def elementwise() -> Iterator[tuple[str, Check]]:
    """Checks of the kernels with an output scale of their own."""
    quantized = torch.ops.quantized
    for relu in (False, True):
        ending = "_relu" if relu else ""
        adds, multiplies = (add_relu, quantized.mul_relu) if relu else (add, quantized.mul)
        yield f"quantized::add{ending}", binary_check(adds, torch.add, relu)
        yield f"quantized::mul{ending}", binary_check(multiplies, torch.mul, relu)
        for dimensions in (2, 3):
            name = f"batch_norm{dimensions}d{ending}"
            yield f"quantized::{name}", _batch_norm_check(name, dimensions, relu)
    yield (
        "quantized::leaky_relu",
        unary_check(
            lambda x: quantized.leaky_relu(x, 0.25, False, 0.5, 61),
            lambda v: F.leaky_relu(v, 0.25),
            (1, 3, 19, 17),
        ),
    )
    for name in ("group_norm", "instance_norm"):
        yield f"quantized::{name}", _statistics_check(name)
    yield "quantized::matmul", _matmul


def _batch_norm_check(name: str, dimensions: int, relu: bool) -> Check:
    weight, bias = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.5, 0.25, -3.0])
    mean, variance = torch.tensor([1.0, -2.0, 0.5]), torch.full((3,), 0.1875)  # + eps = 0.5 ** 2
    shape = (-1, *[1] * dimensions)

    def definition(v: Tensor) -> Tensor:
        normal = (v - mean.reshape(shape)) / 0.5
        result = normal * weight.reshape(shape) + bias.reshape(shape)
        return result.clamp(min=0) if relu else result

    def kernel(x: Tensor) -> Tensor:
        operator = getattr(torch.ops.quantized, name)
        result: Tensor = operator(x, weight, bias, mean, variance, 0.0625, 1.0, 111)
        return result

    size = (1, 3, 19, 17) if dimensions == 2 else (1, 3, 5, 9, 7)
    return unary_check(kernel, definition, size)


def _statistics_check(name: str) -> Check:
    """Of a norm by the statistics of its input: of two groups, or of every channel."""
    weight, bias, eps = (
        torch.tensor([1.0, -0.5, 2.0, 0.25]),
        torch.tensor([0.5, 0.25, -3.0, 0]),
        2e-5,
    )
    groups = (2,) if name == "group_norm" else ()

    def definition(v: Tensor) -> Tensor:
        result: Tensor = getattr(F, name)(
            v, *groups, weight=weight.to(v.dtype), bias=bias.to(v.dtype), eps=eps
        )
        return result

    def kernel(x: Tensor) -> Tensor:
        result: Tensor = getattr(torch.ops.quantized, name)(
            x, *groups, weight, bias, eps, 0.03125, 111
        )
        return result

    return unary_check(kernel, definition, (2, 4, 19, 17))


def _matmul(tally: Tally) -> None:
    generator = torch.Generator().manual_seed(3)
    for top in (True, False):
        shapes = ((2, 9, 64), (2, 64, 12))
        a, b = (
            torch.full(s, 255) if top else torch.randint(0, 256, s, generator=generator)
            for s in shapes
        )
        exact = ((a - 3) @ (b - 130)).to(torch.float64) * (X_SCALE * W_SCALE)
        scale = 2.0 ** math.ceil(math.log2(float(exact.abs().max()) / 120))
        given = torch.ops.quantized.matmul(
            quantized_bytes(a, X_SCALE, 3), quantized_bytes(b, W_SCALE, 130), scale, MIDDLE
        )
        tally.integers(given.int_repr(), exact / scale + MIDDLE)
