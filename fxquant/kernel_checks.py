"""Every kernel of the ``x86`` target against integer arithmetic, in the worst cases it can meet.

Scales are powers of two, so that the definition is exact in 64-bit integers and float64::

    v = (sum of (x - z_x) * w) * s_x * s_w / s_y + bias / s_y + z_y
    expected = clamp(round_half_even(v), 0, 255)

Sums come from the largest integers in patterns that 16-bit pairs cannot hold (255 with ±127, signs
by pairs of channels), and from every byte with steps so fine that results lie on, and next to, the
boundary between two integers. A kernel may break a tie another way; anything else counts as wrong.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.dynamic_checks import dynamic_checks
from fxquant.engine_free import add, add_relu, avg_pool2d, clamp
from fxquant.engines import available, consume_deprecation_warning
from fxquant.kernels import as_bytes, as_quantized
from fxquant.packing import (
    pack_conv,
    pack_conv_transpose,
    pack_linear,
    pack_onednn_conv,
    pack_onednn_linear,
)
from fxquant.pairing import POINTWISE, Geometry

_X_SCALE: Final = 2.0**-6
_W_SCALE: Final = 2.0**-8
_MIDDLE: Final = 129
"""Zero points are odd: with an even one it does not show whether it is added before rounding."""
_TIE: Final = 1e-4
"""How near to a boundary float32 arithmetic may decide: 255 * 2 ** -24 for each of few roundings,
and the approximations of oneDNN's functions (2 ** -19 of their argument)."""
_FLOAT32: Final = 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCheck:
    """One kernel against the definition.

    Attributes:
        kernel: as ``explain`` and ``audit`` name it.
        elements: how many results were compared.
        wrong: how many are not the expected integer, nor its neighbour at a tie.
        ties: how many ties were broken another way than half to even.
        worst: the largest difference, in steps of the output.
        absent: this build of torch does not have the kernel.
    """

    kernel: str
    elements: int
    wrong: int
    ties: int
    worst: float
    absent: bool = False

    @property
    def exact(self) -> bool:
        """Whether every result is right."""
        return not self.absent and self.wrong == 0

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.absent:
            return "not in this build"
        if self.wrong == 0:
            return "exact" if not self.ties else "exact but for ties"
        if self.worst > 1:
            return f"saturates or is wrong, by up to {self.worst:.0f} steps"
        return "rounds wrongly"


@dataclass
class _Tally:
    elements: int = 0
    wrong: int = 0
    ties: int = 0
    worst: float = 0.0

    def integers(self, given: Tensor, exact: Tensor) -> None:
        """Compare uint8 results with float64 values before rounding."""
        expected = exact.round().clamp(0, 255)
        difference = (given.to(torch.float64) - expected).abs()
        tie = ((exact - exact.floor()) - 0.5).abs() <= _TIE
        self._count(difference, tie & (difference <= 1))

    def floats(self, given: Tensor, exact: Tensor) -> None:
        """Compare float32 results with float64 values, in units of the largest one's rounding."""
        unit = _FLOAT32 * float(exact.abs().max().clamp(min=1e-30))
        difference = (given.to(torch.float64) - exact).abs() / unit
        self._count(torch.where(difference <= 1, 0.0, difference), difference < 0)

    def _count(self, difference: Tensor, tie: Tensor) -> None:
        bad = difference > 0
        self.elements += difference.numel()
        self.ties += int((bad & tie).sum())
        self.wrong += int((bad & ~tie).sum())
        self.worst = max(self.worst, float(difference.max()))


def check_kernels(engines: tuple[str, ...] = ()) -> tuple[KernelCheck, ...]:
    """Run every check on this machine; takes a second or two.

    Args:
        engines: of ``quantized::``, as :attr:`fxquant.targets.table.Target.engines`; empty for
            those of x86, and oneDNN's own operators.
    """
    consume_deprecation_warning()
    found = []
    layers = _layers_of(engines) if engines else _layers()
    dynamic = () if engines else _dynamic()
    for kernel, run in itertools.chain(layers, _elementwise(), _movers(), dynamic):
        tally = _Tally()
        absent = False
        try:
            run(tally)
        except (AttributeError, NotImplementedError, _AbsentError):
            absent = True
        found.append(
            KernelCheck(
                kernel=kernel,
                elements=tally.elements,
                wrong=tally.wrong,
                ties=tally.ties,
                worst=tally.worst,
                absent=absent,
            )
        )
    return tuple(found)


def _dynamic() -> Iterator[tuple[str, _Check]]:
    for kernel, run in dynamic_checks():
        yield kernel, functools.partial(_run_floats, run)


def _run_floats(run: Callable[[Callable[[Tensor, Tensor], None]], None], tally: _Tally) -> None:
    run(tally.floats)


class _AbsentError(Exception):
    """This build of torch has no such kernel."""


_Check = Callable[[_Tally], None]


# -- convolution and linear -----------------------------------------------------------------------


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


def _geometry(
    dimensions: int, inputs: int, outputs: int, groups: int = 1, *, transposed: bool = False
) -> Geometry:
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


FORMS: Final = {"": (32, 16, 1), "grouped ": (32, 16, 4), "depthwise ": (16, 16, 16)}
_LINEAR: Final = Geometry(inputs=64, outputs=16)


def _weights(geometry: Geometry) -> Iterator[Tensor]:
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


def _images(geometry: Geometry) -> Iterator[tuple[Tensor, int]]:
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


def _ladder(geometry: Geometry) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True, slots=True)
class _PostOp:
    """A function that runs inside ``onednn::q*_pointwise``, and what it computes."""

    name: str
    function: Callable[[Tensor], Tensor]
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


_NONE: Final = _PostOp("none", lambda v: v)
_CONV_POST_OPS: Final = (
    _NONE,
    _PostOp("relu", F.relu),
    _PostOp("hardtanh", lambda v: v.clamp(-1.5, 2.0), (-1.5, 2.0)),
    _PostOp("hardswish", F.hardswish),
    _PostOp("swish", F.silu),
)
_LINEAR_POST_OPS: Final = (
    *_CONV_POST_OPS,
    _PostOp("leaky_relu", lambda v: F.leaky_relu(v, 0.25), (0.25,)),
    _PostOp("tanh", torch.tanh),
    _PostOp("gelu", F.gelu, (), "none"),
    _PostOp("gelu", lambda v: F.gelu(v, approximate="tanh"), (), "tanh"),
)


def _layers() -> Iterator[tuple[str, _Check]]:
    """Checks of every kernel with a weight."""
    for dimensions, (form, shape) in itertools.product((1, 2, 3), FORMS.items()):
        geometry = _geometry(dimensions, *shape)
        for engine, relu in itertools.product(("onednn", "fbgemm"), (False, True)):
            if relu and (dimensions, form) != (2, ""):
                continue
            name = f"quantized::conv{dimensions}d{'_relu' if relu else ''} ({form}{engine})"
            yield name, _layer_check(geometry, engine, relu)
        yield (
            f"onednn::qconv_pointwise[none] -> fp32 ({form}{dimensions}d)",
            _layer_check(geometry, POINTWISE, floating=True),
        )
    for dimensions in (1, 2, 3):
        geometry = _geometry(dimensions, 6, 8, transposed=True)
        yield f"quantized::conv_transpose{dimensions}d (fbgemm)", _layer_check(geometry, "fbgemm")
    for post in _CONV_POST_OPS:
        geometry = _geometry(2, *FORMS[""])
        check = _layer_check(geometry, POINTWISE, post=post)
        yield f"onednn::qconv_pointwise[{post.name}]", check
    for relu in (False, True):
        name = f"onednn::qconv2d_pointwise.binary[sum{', relu' if relu else ''}]"
        yield name, _residual_check(relu)
    for engine, relu in itertools.product(("fbgemm", "onednn"), (False, True)):
        name = f"quantized::linear{'_relu' if relu else ''} ({engine})"
        yield name, _layer_check(_LINEAR, engine, relu)
    for post in _LINEAR_POST_OPS:
        label = f"{post.name}{f' {post.algorithm}' if post.algorithm else ''}"
        check = _layer_check(_LINEAR, POINTWISE, post=post)
        yield f"onednn::qlinear_pointwise[{label}]", check
    name = "onednn::qlinear_pointwise[none] -> fp32"
    yield name, _layer_check(_LINEAR, POINTWISE, floating=True)


def _layers_of(engines: tuple[str, ...]) -> Iterator[tuple[str, _Check]]:
    """Checks of the kernels with a weight that write integers, for other engines than x86's."""
    for engine in engines:
        for dimensions, (form, shape) in itertools.product((1, 2, 3), FORMS.items()):
            check = _layer_check(_geometry(dimensions, *shape), engine)
            yield f"quantized::conv{dimensions}d ({form}{engine})", check
        for dimensions in (1, 2):
            check = _layer_check(_geometry(dimensions, 6, 8, transposed=True), engine)
            yield f"quantized::conv_transpose{dimensions}d ({engine})", check
        for relu in (False, True):
            ending = "_relu" if relu else ""
            check = _layer_check(_geometry(2, *FORMS[""]), engine, relu)
            yield f"quantized::conv2d{ending} ({engine})", check
            yield f"quantized::linear{ending} ({engine})", _layer_check(_LINEAR, engine, relu)


def _layer_check(
    geometry: Geometry,
    kernel: str,
    relu: bool = False,
    *,
    post: _PostOp = _NONE,
    floating: bool = False,
) -> _Check:
    """Worst-case sums, then the ladder of ties."""
    function = F.relu if relu else post.function

    def run(tally: _Tally) -> None:
        if not available("onednn" if kernel == POINTWISE else kernel):
            raise _AbsentError
        for rows, (x, zero_point) in itertools.product(_weights(geometry), _images(geometry)):
            compare(tally, x, rows, zero_point, None)
        x, rows = _ladder(geometry)
        compare(tally, x, rows, 3, 4 * _X_SCALE * _W_SCALE)

    def compare(
        tally: _Tally, x: Tensor, rows: Tensor, zero_point: int, step: float | None
    ) -> None:
        sums = exact_sums(geometry, x.to(torch.int64) - zero_point, rows).to(torch.float64)
        bias = torch.linspace(-1, 1, geometry.outputs).mul(64).round() / 64 * (step is None)
        shape = (-1, *[1] * len(geometry.kernel))
        exact = function(sums * (_X_SCALE * _W_SCALE) + bias.to(torch.float64).reshape(shape))
        top = float(exact.abs().max())
        scale = step or 2.0 ** math.ceil(math.log2(max(top, 2.0**-12) / 120))
        if floating:
            tally.floats(_run_pointwise(geometry, x, rows, zero_point, bias, post, None), exact)
            return
        if kernel == POINTWISE:
            given = _run_pointwise(geometry, x, rows, zero_point, bias, post, scale)
        else:
            given = _run_packed(geometry, kernel, x, rows, zero_point, bias, relu, scale)
        tally.integers(given, exact / scale + _MIDDLE)

    return run


def _run_pointwise(
    geometry: Geometry,
    x: Tensor,
    rows: Tensor,
    zero_point: int,
    bias: Tensor,
    post: _PostOp,
    scale: float | None,
) -> Tensor:
    """``onednn::q*_pointwise``; ``scale=None`` for float32 results."""
    scales, zeros = _weight_parameters(geometry)
    stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
    output = (1.0, 0, torch.float32) if scale is None else (scale, _MIDDLE, torch.uint8)
    ends = (*output, post.name, list(post.scalars), post.algorithm)
    made: Tensor
    if not geometry.kernel:
        made = torch.ops.onednn.qlinear_pointwise.default(
            x, _X_SCALE, zero_point, pack_onednn_linear(rows), scales, zeros, bias, *ends
        )
    else:
        packed = pack_onednn_conv(rows, scales, stride, padding, dilation, geometry.groups)
        made = torch.ops.onednn.qconv_pointwise.default(
            x, _X_SCALE, zero_point, packed, scales, zeros, bias,
            stride, padding, dilation, geometry.groups, *ends,
        )  # fmt: skip
    return made


def _run_packed(
    geometry: Geometry,
    engine: str,
    x: Tensor,
    rows: Tensor,
    zero_point: int,
    bias: Tensor,
    relu: bool,
    scale: float,
) -> Tensor:
    """``quantized::conv*``, ``conv_transpose*`` or ``linear``."""
    weight = geometry.layout(rows).contiguous()
    scales, zeros = _weight_parameters(geometry)
    dimensions, suffix = len(geometry.kernel), "_relu" if relu else ""
    stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
    if not geometry.kernel:
        packed = pack_linear(weight, scales, zeros, bias, engine)
        operator = getattr(torch.ops.quantized, f"linear{suffix}")
    elif geometry.transposed:
        packed = pack_conv_transpose(
            weight, scales[0], zeros[0], bias, dimensions, stride, padding,
            list(geometry.output_padding), dilation, geometry.groups, engine,
        )  # fmt: skip
        operator = getattr(torch.ops.quantized, f"conv_transpose{dimensions}d")
    else:
        packed = pack_conv(
            weight, scales, zeros, bias, dimensions, stride, padding, dilation, geometry.groups,
            engine,
        )  # fmt: skip
        packet = getattr(torch.ops.quantized, f"conv{dimensions}d{suffix}")
        operator = packet.new if "new" in packet.overloads() else packet.default
    source = torch._make_per_tensor_quantized_tensor(x, _X_SCALE, zero_point)
    made: Tensor = operator(source, packed, scale, _MIDDLE)
    return made.int_repr()


def _weight_parameters(geometry: Geometry) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(geometry.outputs, dtype=torch.int32)
    return torch.full((geometry.outputs,), _W_SCALE), zeros


def _residual_check(relu: bool) -> _Check:
    """``conv(x) + other`` in ``other``'s memory."""
    geometry = _geometry(2, *FORMS[""])
    stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
    other_scale, other_zero = 0.25, 100

    def run(tally: _Tally) -> None:
        if not available("onednn"):
            raise _AbsentError
        generator = torch.Generator().manual_seed(2)
        scales = torch.full((geometry.outputs,), _W_SCALE)
        zeros = torch.zeros(geometry.outputs, dtype=torch.int32)
        for rows, (x, zero_point) in itertools.product(_weights(geometry), _images(geometry)):
            sums = exact_sums(geometry, x.to(torch.int64) - zero_point, rows).to(torch.float64)
            other = torch.randint(0, 256, sums.shape, generator=generator).to(torch.uint8)
            exact = sums * (_X_SCALE * _W_SCALE) + (other.double() - other_zero) * other_scale
            exact = exact.clamp(min=0) if relu else exact
            scale = 2.0 ** math.ceil(math.log2(float(exact.abs().max()) / 120))
            packed = pack_onednn_conv(rows, scales, stride, padding, dilation, geometry.groups)
            given = torch.ops.onednn.qconv2d_pointwise.binary(
                x.contiguous(memory_format=torch.channels_last), _X_SCALE, zero_point, packed,
                scales, zeros, other.contiguous(memory_format=torch.channels_last), None,
                stride, padding, dilation, geometry.groups, scale, _MIDDLE, torch.uint8,
                other_scale, other_zero, "sum", 1.0,
                "relu" if relu else "none", [], "",
            )  # fmt: skip
            tally.integers(given, exact / scale + _MIDDLE)

    return run


# -- element-wise ---------------------------------------------------------------------------------


def _quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
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


def _binary_check(
    kernel: Callable[..., Tensor], combine: Callable[[Tensor, Tensor], Tensor], relu: bool
) -> _Check:
    def run(tally: _Tally) -> None:
        for left, right in zip(*map(_layouts, _all_pairs()), strict=True):
            for scale in (2.0**-2, 2.0**1, 2.0**3):
                a, b = _quantized(left, 0.5, 3), _quantized(right, 0.25, 200)
                exact = combine((left - 3) * 0.5, (right - 200) * 0.25).to(torch.float64)
                exact = exact.clamp(min=0) if relu else exact
                given = kernel(a, b, scale, 91).int_repr()
                tally.integers(given, exact / scale + 91)

    return run


def _unary_check(
    run_kernel: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], shape: Sequence[int]
) -> _Check:
    """``run_kernel`` of a quantized tensor (scale 0.25, zero point 101) against ``exact``.

    Args:
        run_kernel: gives a quantized tensor.
        exact: real values -> real values, in float64.
        shape: of the input, which holds every byte.
    """

    def run(tally: _Tally) -> None:
        x = ((torch.arange(math.prod(shape)) * 37) % 256).reshape(*shape)
        for held in _layouts(x):
            result = run_kernel(_quantized(held, 0.25, 101))
            value = exact((x.to(torch.float64) - 101) * 0.25)
            tally.integers(result.int_repr(), value / result.q_scale() + result.q_zero_point())

    return run


def _elementwise() -> Iterator[tuple[str, _Check]]:
    """Checks of the kernels with an output scale of their own."""
    quantized = torch.ops.quantized
    for relu in (False, True):
        ending = "_relu" if relu else ""
        adds, multiplies = (add_relu, quantized.mul_relu) if relu else (add, quantized.mul)
        yield f"quantized::add{ending}", _binary_check(adds, torch.add, relu)
        yield f"quantized::mul{ending}", _binary_check(multiplies, torch.mul, relu)
        for dimensions in (2, 3):
            name = f"batch_norm{dimensions}d{ending}"
            yield f"quantized::{name}", _batch_norm_check(name, dimensions, relu)
    yield (
        "quantized::leaky_relu",
        _unary_check(
            lambda x: quantized.leaky_relu(x, 0.25, False, 0.5, 61),
            lambda v: F.leaky_relu(v, 0.25),
            (1, 3, 19, 17),
        ),
    )
    for name in ("group_norm", "instance_norm"):
        yield f"quantized::{name}", _statistics_check(name)
    yield "quantized::matmul", _matmul


def _batch_norm_check(name: str, dimensions: int, relu: bool) -> _Check:
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
    return _unary_check(kernel, definition, size)


def _statistics_check(name: str) -> _Check:
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

    return _unary_check(kernel, definition, (2, 4, 19, 17))


def _matmul(tally: _Tally) -> None:
    generator = torch.Generator().manual_seed(3)
    for top in (True, False):
        shapes = ((2, 9, 64), (2, 64, 12))
        a, b = (
            torch.full(s, 255) if top else torch.randint(0, 256, s, generator=generator)
            for s in shapes
        )
        exact = ((a - 3) @ (b - 130)).to(torch.float64) * (_X_SCALE * _W_SCALE)
        scale = 2.0 ** math.ceil(math.log2(float(exact.abs().max()) / 120))
        given = torch.ops.quantized.matmul(
            _quantized(a, _X_SCALE, 3), _quantized(b, _W_SCALE, 130), scale, _MIDDLE
        )
        tally.integers(given.int_repr(), exact / scale + _MIDDLE)


# -- ops that keep the scale ----------------------------------------------------------------------


def _movers() -> Iterator[tuple[str, _Check]]:
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
        yield name, _unary_check(function, function, shape)
    yield "aten::clamp on int8", _unary_check(_clamp, lambda v: v.clamp(-4.0, 12.5), image)
    windows = {"": (2, 2, 0, False, True, None), " (padded)": (3, 1, 1, False, False, None)}
    for name, window in windows.items():
        yield f"aten::avg_pool2d on int8{name}", _pool_check(window, image)


def _clamp(x: Tensor) -> Tensor:
    held = clamp(as_bytes(x), -4.0, 12.5, x.q_scale(), x.q_zero_point())
    return as_quantized(held, x.q_scale(), x.q_zero_point())


def _pool_check(window: tuple[Any, ...], shape: Sequence[int]) -> _Check:
    return _unary_check(lambda x: avg_pool2d(x, *window), lambda v: F.avg_pool2d(v, *window), shape)
