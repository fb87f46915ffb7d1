"""Whether kernels of floats give what torch gives on this machine, bit by bit: by trying.

The order in which torch sums in an attention is that of the matrix product it was built with (MKL,
OpenBLAS, ...), which chooses by processor and shape; so is whose gelu it calls. A plan uses a
kernel of its own where the results on random numbers agree in every bit, and torch's elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.native.plan import PlanBuilder, Value

MASK_KINDS: Final = {"none": 0, "floats": 1, "booleans": 2}
"""What a mask consists of -> its number in C++."""

_LONGEST: Final = 512
"""More keys than these, and torch takes the softmax piece by piece."""


@functools.cache
def agrees_on_gelu() -> bool:
    """Whether ``F.gelu`` computes what the kernel computes."""
    x = torch.cat((_random(4096) * 4, torch.tensor([0.0, -0.0, 1e-30, 40.0, -40.0, 6.0, -6.0])))
    x = x[: x.numel() // 16 * 16 + 7].reshape(1, -1)
    builder, values, out = _one_step([x], x.shape)
    builder.add("float_map", {"a": values[0], "b": values[0]}, out, function=4)
    return torch.equal(_run(builder, [x], x.shape), F.gelu(x))


@functools.cache
def agrees_on_mean(shape: tuple[int, int, int, int], pooled: bool) -> bool:
    """Whether the mean over the pixels of images, channels last, is what the kernel computes.

    Args:
        shape: ``[N, C, H, W]``.
        pooled: whether by ``F.adaptive_avg_pool2d``, and not by ``torch.mean``.
    """
    x = _random(*shape).to(memory_format=torch.channels_last)
    builder, values, out = _one_step([x], shape[:2])
    builder.add("global_mean", {"a": values[0]}, out)
    expected = F.adaptive_avg_pool2d(x, 1).flatten(1) if pooled else x.mean((2, 3))
    return torch.equal(_run(builder, [x], shape[:2]), expected)


@functools.cache
def agrees_on_layer_norm(width: int) -> bool:
    """Whether ``F.layer_norm`` of rows of ``width`` elements is what the kernel computes."""
    if width % 8:
        return False
    x, weight, bias = _random(5, width) * 3 + 1, _random(width), _random(width)
    builder, values, out = _one_step([x], x.shape)
    builder.add(
        "layer_norm", {"a": values[0]}, out,
        table=weight.data_ptr(), term=bias.data_ptr(), epsilon=1e-5,
    )  # fmt: skip
    return torch.equal(_run(builder, [x], x.shape), F.layer_norm(x, (width,), weight, bias, 1e-5))


@functools.cache
def agrees_on_attention(
    shape: tuple[int, int, int, int, int], scale: float, mask_kind: str = "none"
) -> bool:
    """Whether ``F.scaled_dot_product_attention`` is what the kernel computes.

    Args:
        shape: images, queries, keys, heads and size of a head.
        scale: of the scores.
        mask_kind: a key of :data:`MASK_KINDS`.
    """
    images, queries, keys, heads, size = shape
    if keys % 16 or size % 16 or max(keys, size) > _LONGEST:
        return False
    given = [_random(images, length, heads * size) for length in (queries, keys, keys)]
    mask: Tensor | None = None if mask_kind == "none" else _random(1, 1, queries, keys)
    if mask is not None and mask_kind == "booleans":
        mask = mask > -1
    builder, values, out = _one_step(given if mask is None else [*given, mask], given[0].shape)
    reads = dict(zip(("query", "key", "value", "mask"), values, strict=False))
    builder.add(
        "attention", reads, out, images=images, heads=heads, scale=scale,
        mask_kind=MASK_KINDS[mask_kind], mask_query=keys, mask_key=1,
    )  # fmt: skip
    split = [x.unflatten(2, (heads, size)).transpose(1, 2) for x in given]
    mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], mask, scale=scale)
    found = _run(builder, given if mask is None else [*given, mask], given[0].shape)
    return torch.equal(found, mixed.transpose(1, 2).flatten(2))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _one_step(
    given: Sequence[Tensor], shape: Sequence[int]
) -> tuple[PlanBuilder, list[Value], Value]:
    builder = PlanBuilder()
    values = [builder.external(x.shape, torch.float32) for x in given]
    return builder, values, builder.external(shape, torch.float32)


def _run(builder: PlanBuilder, given: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    made, plan = torch.empty(tuple(shape)), builder.build()
    slots = (ctypes.c_void_p * plan.slots)()
    for slot, x in enumerate((*given, made), 1):
        slots[slot] = x.data_ptr()
    plan.run(slots, 0, 1, 1)
    return made
