"""Functions that lowered graphs call beside PyTorch's operators: views between representations.

TorchScript reads the annotations, so they are not postponed.
"""

from typing import Any

import torch
from torch import Tensor
from torch._jit_internal import is_scripting

from fxquant.errors import ShapeGuardError
from fxquant.script_kernels import bag_result


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a quantized tensor, sharing its memory (``int_repr`` would copy)."""
    return torch.empty(0, dtype=torch.uint8).set_(
        x.untyped_storage(), x.storage_offset(), x.size(), x.stride()
    )


def as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor with the given parameters from bytes."""
    return torch._make_per_tensor_quantized_tensor(x, scale, zero_point)


def to_quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """A quantized tensor of integers, with parameters that are tensors themselves."""
    return torch._make_per_tensor_quantized_tensor(x, float(scale), int(zero_point))


def accumulator(other: Tensor, x: Tensor) -> Tensor:
    """``other`` as a sum's accumulator: in channels_last, for every image of ``x``; else a copy."""
    expanded = other.expand(x.shape[0], -1, -1, -1)  # no copy, and nothing where it has them all
    return expanded.contiguous(memory_format=torch.channels_last)


def interleave(x: Tensor, height: int, width: int) -> Tensor:
    """``[N, height * width * C, H, W] -> [N, C, H * height, W * width]``, in channels_last.

    Each pixel becomes a block; the channels of ``x`` are the block's pixels in order, ``C`` of
    each (``pixel_shuffle`` has the channels in another order, and copies single bytes).
    """
    batch, channels, rows, columns = x.shape
    each = channels // (height * width)
    blocks = x.permute(0, 2, 3, 1).reshape(batch, rows, columns, height, width * each)
    pixels = blocks.transpose(2, 3).reshape(batch, rows * height, columns * width, each)
    return pixels.permute(0, 3, 1, 2)


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """``table[x]`` for bytes ``x`` and a table of 256 bytes, in the memory format of ``x``.

    ``index_select`` on flat integers takes a quarter of the time of ``table[x.long()]``.
    """
    last = x.dim() == 4 and not x.is_contiguous()
    flat = x.permute(0, 2, 3, 1) if last else x
    found = table.index_select(0, flat.reshape(-1).to(torch.int32)).reshape(flat.shape)
    return found.permute(0, 3, 1, 2) if last else found


def chunk(x: Tensor, chunks: int, dim: int, index: int) -> Tensor:
    """One piece of ``x.chunk(chunks, dim)``."""
    return x.chunk(chunks, dim)[index]


def split(x: Tensor, sizes: int | list[int], dim: int, index: int) -> Tensor:
    """One piece of ``x.split(sizes, dim)``."""
    return x.split(sizes, dim)[index]  # type: ignore[no-any-return]  # torch has no types for it


def tensor_split(x: Tensor, sections: int | list[int], dim: int, index: int) -> Tensor:
    """One piece of ``x.tensor_split(sections, dim)``."""
    return x.tensor_split(sections, dim)[index]


def checked_input(x: Tensor, name: str, rank: int) -> Tensor:
    """``x``, if the kernels behind it can take it.

    Raises:
        ShapeGuardError: fewer dimensions than ``rank``, or another dtype than float32, which the
            float model may take and int8 kernels do not.
    """
    if x.dim() < rank or x.dtype != torch.float32:
        if is_scripting():
            raise RuntimeError(
                f"input {name} is no float32 tensor of at least {rank} dimensions, which the int8"
                " model takes. Convert it (x.float(), x.unsqueeze(0))"
            )
        else:  # noqa: RET506  # TorchScript does not read this branch
            raise _wrong_input(x, name, rank)
    return x


def _wrong_input(x: Tensor, name: str, rank: int) -> ShapeGuardError:
    return ShapeGuardError(
        f"input {name!r} is {str(x.dtype).removeprefix('torch.')}{list(x.shape)}; the int8 model"
        f" takes float32 of at least {rank} dimensions. Convert it (x.float(), x.unsqueeze(0))"
    )


def in_format_of(y: Tensor, x: Tensor | None) -> Tensor:
    """``y`` contiguous, as the float model gives it, unless ``x`` came in channels_last."""
    if x is not None and not x.is_contiguous():
        return y
    return y.contiguous()


def embedding(packed: Any, indices: Tensor, bits: int, features: int) -> Tensor:
    """Rows of a packed table, for indices of any shape (the kernel takes one or two axes).

    4-bit rows are packed with an even number of features.
    """
    operators = torch.ops.quantized
    kernel = operators.embedding_4bit if bits == 4 else operators.embedding_byte
    rows: Tensor = kernel(packed, indices.reshape(-1))
    return rows[:, :features].reshape(*indices.shape, features)


def embedding_bag(
    packed: Any,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    include_last_offset: bool,
    mode: str,
    bits: int,
    features: int,
) -> Tensor:
    """Sums (or means) of rows of a packed table; the kernel itself gives sums in every mode."""
    operators = torch.ops.quantized
    kernel = operators.embedding_bag_4bit if bits == 4 else operators.embedding_bag_byte
    sums: Tensor = kernel(
        packed, indices, offsets, False, 0, False, weights, None, include_last_offset
    )
    return bag_result(sums, indices, offsets, include_last_offset, mode, features)
