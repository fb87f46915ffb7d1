"""Functions that lowered graphs call beside PyTorch's operators: views between representations."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a quantized tensor, sharing its memory (``int_repr`` would copy)."""
    return torch.empty(0, dtype=torch.uint8).set_(
        x.untyped_storage(), x.storage_offset(), x.size(), x.stride()
    )


def as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor with the given parameters from bytes."""
    return torch._make_per_tensor_quantized_tensor(x, scale, zero_point)


def accumulator(other: Tensor, x: Tensor) -> Tensor:
    """``other`` as a sum's accumulator: in channels_last, for every image of ``x``; else a copy."""
    if other.shape[0] != x.shape[0]:
        other = other.expand(x.shape[0], -1, -1, -1)
    return other.contiguous(memory_format=torch.channels_last)
