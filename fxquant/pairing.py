"""Which products an int8 kernel adds in 16 bits, found by asking the kernel.

Without VNNI, x86 multiplies unsigned by signed bytes with ``vpmaddubsw``, which adds *two*
neighbouring products in 16 bits and saturates: ``255 * 127 + 255 * 127`` becomes 32767. Which
products are neighbours is the kernel's choice of layout. It was measured on torch 2.13 with a
weight of 127 at two positions, zero elsewhere, for every pair of positions (107 geometries in one
to three dimensions, with and without padding, strides, dilation and groups; linear with 3 to 130
inputs)::

    oneDNN linear   SSE41, AVX2, AVX512_CORE     inputs 2i and 2i + 1
    fbgemm linear   AVX2, AVX512                 inputs 2i and 2i + 1
    oneDNN conv     SSE41, AVX2                  channels 2i and 2i + 1 of one tap; exact with one
                                                 channel a group, and where a group's channels are
                                                 no multiple of the vector
    oneDNN conv     AVX512_CORE                  channels 2i and 2i + 1 of one tap; with one channel
                                                 a group: conv2d and conv1d with several outputs a
                                                 group pair taps in (column, row) order, or of one
                                                 kernel row where there is no padding; conv3d
                                                 in (depth, row, column) order; the rest is exact
    fbgemm conv     AVX2, AVX512                 neighbours 2i and 2i + 1 in (tap, channel) order;
                                                 its kernels for groups of 4, 8 and 16 channels
                                                 (3 x 3, padding 1) are exact
    fbgemm depthwise, padded                     taps 2i and 2i + 1, with VNNI too
    fbgemm conv_transpose        AVX2            as its conv; depthwise is exact
    all others with VNNI (AVX2_VNNI, AVX512_CORE_VNNI; fbgemm AVX512_E1)    exact

Nothing of this is believed at run time: :func:`pairing_of` checks the kernel of each geometry with
weights that only the right pairing survives, and gives :attr:`Pairing.ANY` where none of the known
ones does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.engines import consume_deprecation_warning
from fxquant.packing import (
    pack_conv,
    pack_conv_transpose,
    pack_linear,
    pack_onednn_conv,
    pack_onednn_linear,
)

POINTWISE: Final = "pointwise"
"""The kernel family ``onednn::q*_pointwise``, beside the engines of ``quantized::``."""

_LARGEST: Final = 127
_STEP: Final = 4000
"""Of the 8-bit results; a pair that saturates is 32003 off."""
_WINDOW: Final = 240 * _STEP
_TRIALS: Final = 64
_MIDDLE: Final = 128


class Pairing(Enum):
    """Which two products of a sum a kernel adds in 16 bits."""

    NONE = "exact"
    """None: it adds in 32 bits."""
    CHANNELS = "channels 2i and 2i + 1 of one tap"
    FLAT = "neighbours in (tap, channel) order"
    ROWS = "taps 2i and 2i + 1 of one kernel row"
    COLUMNS = "neighbours in (column, row, channel) order"
    ANY = "unknown, so any two"
    """It saturates, and is right where no two products of the sum can overflow."""
    WRONG = "not to be trusted"
    """It is wrong even where no two products can overflow 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The shape of a convolution or linear: what decides which code a kernel runs.

    Attributes:
        inputs: input channels of one group.
        outputs: output channels of all groups.
        kernel: taps along each dimension; ``()`` for linear.
        size: input size along each dimension.
        stride: as packed.
        padding: as packed.
        dilation: as packed.
        output_padding: of a transposed convolution.
        groups: number of groups.
        transposed: a transposed convolution.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def form(self) -> str:
        """What :mod:`fxquant.kernel_probe` calls it."""
        if not self.kernel:
            return "linear"
        if self.groups == 1:
            return "conv"
        return "depthwise" if self.inputs == 1 else "grouped"

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as ``[outputs, inputs, *kernel]``, whatever the op's layout."""
        if not self.transposed:
            return weight
        split: Tensor = weight.unflatten(0, (self.groups, self.inputs))  # [g, I / g, O / g, ...]
        return split.transpose(1, 2).flatten(0, 1)

    def layout(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        if not self.transposed:
            return rows
        split: Tensor = rows.unflatten(0, (self.groups, -1))
        return split.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The kernel that is to run a layer here, and what it can overflow.

    Attributes:
        kernel: ``"onednn"`` or ``"fbgemm"``, or :data:`POINTWISE`.
        geometry: of the layer.
        pairing: of the kernel.
    """

    kernel: str
    geometry: Geometry
    pairing: Pairing

    def excess(self, weight: Tensor, high: int = 255) -> Tensor:
        """As :func:`excess`, of the op's integer weight in its own layout."""
        return excess(self.geometry.rows(weight), self.pairing, high)


@functools.cache
def pairs(inputs: int, kernel: tuple[int, ...], pairing: Pairing) -> tuple[Tensor, Tensor]:
    """The two positions of every pair, in a flattened weight row ``[inputs * taps]``."""
    taps = math.prod(kernel)
    positions = torch.arange(inputs * taps).reshape(inputs, taps)
    if pairing is Pairing.CHANNELS:
        order = positions[: inputs - inputs % 2].t().flatten()
    elif pairing is Pairing.FLAT:
        order = positions.t().flatten()
    elif pairing is Pairing.ROWS and kernel:
        order = positions.reshape(inputs, *kernel)[..., : kernel[-1] - kernel[-1] % 2].flatten()
    elif pairing is Pairing.COLUMNS:
        grid = positions.reshape(inputs, *kernel)
        order = grid.permute(*range(grid.dim() - 1, -1, -1)).flatten()
    else:
        order = positions[:0].flatten()
    order = order[: order.numel() - order.numel() % 2]
    return order[0::2], order[1::2]


def pair_sums(rows: Tensor, pairing: Pairing) -> Tensor:
    """The largest and smallest sum of weights that one 16-bit sum can hold, int64 ``[2, O]``.

    Products with unsigned activations: positive weights make the largest, negative the smallest.

    Args:
        rows: integers ``[O, I, *kernel]``.
        pairing: of the kernel; not ``NONE`` or ``WRONG``.
    """
    flat = rows.flatten(1).to(torch.int64)
    halves = []
    for sign in (1, -1):
        part = (sign * flat).clamp(min=0)
        if pairing is Pairing.ANY:
            largest = part.topk(min(2, part.shape[1]), dim=1).values.sum(1)
        else:
            first, second = pairs(rows.shape[1], tuple(rows.shape[2:]), pairing)
            both = part[:, first] + part[:, second]
            alone = part.amax(1)
            largest = torch.maximum(both.amax(1), alone) if both.shape[1] else alone
        halves.append(sign * largest)
    return torch.stack(halves)


def excess(rows: Tensor, pairing: Pairing, high: int) -> Tensor:
    """By what factor the worst 16-bit sum of every output channel overflows, float64 ``[O]``.

    Args:
        rows: integers ``[O, I, *kernel]``.
        pairing: of the kernel.
        high: the largest integer that an activation can be.

    Returns:
        1 and less: it cannot overflow.
    """
    if pairing is Pairing.NONE:
        return torch.zeros(rows.shape[0], dtype=torch.float64)
    top, bottom = pair_sums(rows, pairing).to(torch.float64) * high
    return torch.maximum(top / (2**15 - 1), -bottom / 2**15)


@functools.cache
def pairing_of(geometry: Geometry, kernel: str) -> Pairing:
    """How the kernel for ``geometry`` pairs products on this machine; asked once each.

    It multiplies activations of 255 with weights that overflow nothing under one pairing and, at
    random, many a pair under any other: 127 and 1 in either order for every pair. With 64 rows of
    them a single pair of another pairing goes unnoticed once in 10 ** 8.

    Args:
        geometry: with the sizes that the layer will see.
        kernel: ``"onednn"`` or ``"fbgemm"``, or :data:`POINTWISE`.
    """
    consume_deprecation_warning()
    shape = (geometry.outputs, geometry.inputs, *geometry.kernel)
    full = torch.full(shape, _LARGEST, dtype=torch.int8)
    if _is_right(geometry, kernel, full) and _is_right(geometry, kernel, -full):
        return Pairing.NONE
    for pairing in (Pairing.CHANNELS, Pairing.FLAT, Pairing.ROWS, Pairing.COLUMNS):
        if all(_is_right(geometry, kernel, rows) for rows in _survivors(geometry, pairing)):
            return pairing
    half = torch.full(shape, 64, dtype=torch.int8)
    return Pairing.ANY if _is_right(geometry, kernel, half) else Pairing.WRONG


def _survivors(geometry: Geometry, pairing: Pairing) -> list[Tensor]:
    """Weights that do not overflow under ``pairing``; more of them where there are few rows."""
    generator = torch.Generator().manual_seed(0)
    first, second = pairs(geometry.inputs, geometry.kernel, pairing)
    found = []
    for _ in range(-(-_TRIALS // geometry.outputs)):
        rows = torch.full(
            (geometry.outputs, geometry.inputs * math.prod(geometry.kernel)),
            _LARGEST,
            dtype=torch.int8,
        )
        heads = torch.rand(geometry.outputs, len(first), generator=generator) < 0.5
        rows[:, first] = torch.where(heads, _LARGEST, 1).to(torch.int8)
        rows[:, second] = torch.where(heads, 1, _LARGEST).to(torch.int8)
        found.append(rows.reshape(geometry.outputs, geometry.inputs, *geometry.kernel))
    return found


def _is_right(geometry: Geometry, kernel: str, rows: Tensor) -> bool:
    """Whether the kernel gives the exact sums of ``255 * rows``."""
    batches = (1,) if geometry.kernel else (1, 16)  # a vector times a matrix has its own code
    return all(_is_right_for(geometry, kernel, rows, batch) for batch in batches)


def _is_right_for(geometry: Geometry, kernel: str, rows: Tensor, batch: int) -> bool:
    weight = geometry.layout(rows).contiguous()
    channels = geometry.inputs * geometry.groups
    x = torch.full((batch, channels, *geometry.size), 255, dtype=torch.uint8)
    exact = _exact(geometry, x, weight)
    if kernel == POINTWISE:
        return bool(((_pointwise(geometry, x, weight) - exact).abs() < _STEP).all())
    return all(
        _is_right_near(geometry, kernel, x, weight, exact, middle)
        for middle in _middles(geometry, exact)
    )


def _middles(geometry: Geometry, exact: Tensor) -> list[Tensor]:
    """Around which sums to look, for every channel: 8 bits show a window of them only.

    The largest in magnitude are those of the interior of an image. The sums of a transposed
    convolution differ from pixel to pixel, and so do the products in them: all are looked at.
    """
    sums = exact.movedim(1, 0).flatten(1)
    low, high = sums.amin(1), sums.amax(1)
    if not geometry.transposed:
        return [torch.where(-low > high, low, high)]
    windows = int(((high - low).max() / _WINDOW).ceil()) + 1
    return [low + index * _WINDOW for index in range(windows)]


def _is_right_near(
    geometry: Geometry, kernel: str, x: Tensor, weight: Tensor, exact: Tensor, middle: Tensor
) -> bool:
    """Whether the sums of every channel within half a window of ``middle`` are exact."""
    given = _packed(geometry, kernel, x, weight, -middle)
    shift = middle.reshape(-1, *[1] * (exact.dim() - 2))
    expected = ((exact - shift) / _STEP).round() + _MIDDLE
    return bool(((given.double() - expected.clamp(0, 255)).abs() <= 1).all())


def _exact(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """The sums in float64, which holds them exactly."""
    if not geometry.kernel:
        return x.double() @ weight.double().t()
    dimensions = len(geometry.kernel)
    options = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
    }
    if geometry.transposed:
        options["output_padding"] = geometry.output_padding
    name = f"conv{'_transpose' if geometry.transposed else ''}{dimensions}d"
    result: Tensor = getattr(F, name)(x.double(), weight.double(), **options)
    return result


def _pointwise(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """``onednn::q*_pointwise`` with all scales 1 and a float32 result."""
    scale = torch.ones(geometry.outputs)
    zero_point = torch.zeros(geometry.outputs, dtype=torch.int32)
    after: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if not geometry.kernel:
        packed = pack_onednn_linear(weight)
        return torch.ops.onednn.qlinear_pointwise.default(  # type: ignore[no-any-return]  # torch has no types for it
            x, 1.0, 0, packed, scale, zero_point, None, *after
        )
    stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
    packed = pack_onednn_conv(weight, scale, stride, padding, dilation, geometry.groups)
    return torch.ops.onednn.qconv_pointwise.default(  # type: ignore[no-any-return]  # torch has no types for it
        _channels_last(x), 1.0, 0, packed, scale, zero_point, None, stride, padding,
        dilation, geometry.groups, *after,
    )  # fmt: skip


def _packed(geometry: Geometry, engine: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``quantized::conv*`` or ``linear`` with steps of :data:`_STEP` around :data:`_MIDDLE`."""
    source = torch._make_per_tensor_quantized_tensor(_channels_last(x), 1.0, 0)
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    bias = bias.float()
    if not geometry.kernel:
        packed = pack_linear(weight, one, zero, bias, engine)
        result = torch.ops.quantized.linear(source, packed, _STEP, _MIDDLE)
        return result.int_repr()  # type: ignore[no-any-return]  # torch has no types for it
    dimensions = len(geometry.kernel)
    before = (weight, one, zero, bias, dimensions, list(geometry.stride), list(geometry.padding))
    if geometry.transposed:
        output_padding = list(geometry.output_padding)
        packed = pack_conv_transpose(
            *before, output_padding, list(geometry.dilation), geometry.groups, engine
        )
        packet = getattr(torch.ops.quantized, f"conv_transpose{dimensions}d")
    else:
        packed = pack_conv(*before, list(geometry.dilation), geometry.groups, engine)
        packet = getattr(torch.ops.quantized, f"conv{dimensions}d")
    operator = packet.new if "new" in packet.overloads() else packet.default
    result = operator(source, packed, float(_STEP), _MIDDLE)
    return result.int_repr()  # type: ignore[no-any-return]  # torch has no types for it


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))
