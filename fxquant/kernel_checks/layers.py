"""Checks of the kernels with a weight: convolutions and linears."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.engines import available
from fxquant.kernel_checks.definition import exact_sums
from fxquant.kernel_checks.tally import AbsentError, Check, Tally
from fxquant.kernel_checks.worst_cases import (
    FORMS,
    LINEAR,
    MIDDLE,
    W_SCALE,
    X_SCALE,
    geometry_of,
    images,
    ladder,
    weights,
)
from fxquant.packing import (
    pack_conv,
    pack_conv_transpose,
    pack_linear,
    pack_onednn_conv,
    pack_onednn_linear,
)
from fxquant.pairing import POINTWISE, Geometry


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


def layers() -> Iterator[tuple[str, Check]]:
    """Checks of every kernel with a weight."""
    for dimensions, (form, shape) in itertools.product((1, 2, 3), FORMS.items()):
        geometry = geometry_of(dimensions, *shape)
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
        geometry = geometry_of(dimensions, 6, 8, transposed=True)
        yield f"quantized::conv_transpose{dimensions}d (fbgemm)", _layer_check(geometry, "fbgemm")
    for post in _CONV_POST_OPS:
        geometry = geometry_of(2, *FORMS[""])
        check = _layer_check(geometry, POINTWISE, post=post)
        yield f"onednn::qconv_pointwise[{post.name}]", check
    for relu in (False, True):
        name = f"onednn::qconv2d_pointwise.binary[sum{', relu' if relu else ''}]"
        yield name, _residual_check(relu)
    for engine, relu in itertools.product(("fbgemm", "onednn"), (False, True)):
        name = f"quantized::linear{'_relu' if relu else ''} ({engine})"
        yield name, _layer_check(LINEAR, engine, relu)
    for post in _LINEAR_POST_OPS:
        label = f"{post.name}{f' {post.algorithm}' if post.algorithm else ''}"
        check = _layer_check(LINEAR, POINTWISE, post=post)
        yield f"onednn::qlinear_pointwise[{label}]", check
    name = "onednn::qlinear_pointwise[none] -> fp32"
    yield name, _layer_check(LINEAR, POINTWISE, floating=True)


def layers_of(engines: tuple[str, ...]) -> Iterator[tuple[str, Check]]:
    """Checks of the kernels with a weight that write integers, for other engines than x86's."""
    for engine in engines:
        for dimensions, (form, shape) in itertools.product((1, 2, 3), FORMS.items()):
            check = _layer_check(geometry_of(dimensions, *shape), engine)
            yield f"quantized::conv{dimensions}d ({form}{engine})", check
        for dimensions in (1, 2):
            check = _layer_check(geometry_of(dimensions, 6, 8, transposed=True), engine)
            yield f"quantized::conv_transpose{dimensions}d ({engine})", check
        for relu in (False, True):
            ending = "_relu" if relu else ""
            check = _layer_check(geometry_of(2, *FORMS[""]), engine, relu)
            yield f"quantized::conv2d{ending} ({engine})", check
            yield f"quantized::linear{ending} ({engine})", _layer_check(LINEAR, engine, relu)


def _layer_check(
    geometry: Geometry,
    kernel: str,
    relu: bool = False,
    *,
    post: _PostOp = _NONE,
    floating: bool = False,
) -> Check:
    """Worst-case sums, then the ladder of ties."""
    function = F.relu if relu else post.function

    def run(tally: Tally) -> None:
        if not available("onednn" if kernel == POINTWISE else kernel):
            raise AbsentError
        for rows, (x, zero_point) in itertools.product(weights(geometry), images(geometry)):
            compare(tally, x, rows, zero_point, None)
        x, rows = ladder(geometry)
        compare(tally, x, rows, 3, 4 * X_SCALE * W_SCALE)

    def compare(tally: Tally, x: Tensor, rows: Tensor, zero_point: int, step: float | None) -> None:
        sums = exact_sums(geometry, x.to(torch.int64) - zero_point, rows).to(torch.float64)
        bias = torch.linspace(-1, 1, geometry.outputs).mul(64).round() / 64 * (step is None)
        shape = (-1, *[1] * len(geometry.kernel))
        exact = function(sums * (X_SCALE * W_SCALE) + bias.to(torch.float64).reshape(shape))
        top = float(exact.abs().max())
        scale = step or 2.0 ** math.ceil(math.log2(max(top, 2.0**-12) / 120))
        if floating:
            tally.floats(_run_pointwise(geometry, x, rows, zero_point, bias, post, None), exact)
            return
        if kernel == POINTWISE:
            given = _run_pointwise(geometry, x, rows, zero_point, bias, post, scale)
        else:
            given = _run_packed(geometry, kernel, x, rows, zero_point, bias, relu, scale)
        tally.integers(given, exact / scale + MIDDLE)

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
    output = (1.0, 0, torch.float32) if scale is None else (scale, MIDDLE, torch.uint8)
    ends = (*output, post.name, list(post.scalars), post.algorithm)
    made: Tensor
    if not geometry.kernel:
        made = torch.ops.onednn.qlinear_pointwise.default(
            x, X_SCALE, zero_point, pack_onednn_linear(rows), scales, zeros, bias, *ends
        )
    else:
        packed = pack_onednn_conv(rows, scales, stride, padding, dilation, geometry.groups)
        made = torch.ops.onednn.qconv_pointwise.default(
            x, X_SCALE, zero_point, packed, scales, zeros, bias,
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
    source = torch._make_per_tensor_quantized_tensor(x, X_SCALE, zero_point)
    made: Tensor = operator(source, packed, scale, MIDDLE)
    return made.int_repr()


def _weight_parameters(geometry: Geometry) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(geometry.outputs, dtype=torch.int32)
    return torch.full((geometry.outputs,), W_SCALE), zeros


def _residual_check(relu: bool) -> Check:
    """``conv(x) + other`` in ``other``'s memory."""
    geometry = geometry_of(2, *FORMS[""])
    stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
    other_scale, other_zero = 0.25, 100

    def run(tally: Tally) -> None:
        if not available("onednn"):
            raise AbsentError
        generator = torch.Generator().manual_seed(2)
        scales = torch.full((geometry.outputs,), W_SCALE)
        zeros = torch.zeros(geometry.outputs, dtype=torch.int32)
        for rows, (x, zero_point) in itertools.product(weights(geometry), images(geometry)):
            sums = exact_sums(geometry, x.to(torch.int64) - zero_point, rows).to(torch.float64)
            other = torch.randint(0, 256, sums.shape, generator=generator).to(torch.uint8)
            exact = sums * (X_SCALE * W_SCALE) + (other.double() - other_zero) * other_scale
            exact = exact.clamp(min=0) if relu else exact
            scale = 2.0 ** math.ceil(math.log2(float(exact.abs().max()) / 120))
            packed = pack_onednn_conv(rows, scales, stride, padding, dilation, geometry.groups)
            given = torch.ops.onednn.qconv2d_pointwise.binary(
                x.contiguous(memory_format=torch.channels_last), X_SCALE, zero_point, packed,
                scales, zeros, other.contiguous(memory_format=torch.channels_last), None,
                stride, padding, dilation, geometry.groups, scale, MIDDLE, torch.uint8,
                other_scale, other_zero, "sum", 1.0,
                "relu" if relu else "none", [], "",
            )  # fmt: skip
            tally.integers(given, exact / scale + MIDDLE)

    return run
