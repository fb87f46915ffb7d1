"""How the ``x86`` target emits each op: a function from a site to nodes.

An emitter returns ``None`` when it lowered the site, or the reason why it left it in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.clamps import CLAMP_KINDS, bounds_of
from fxquant.kernel_probe import exact_engine, is_exact
from fxquant.kernels import (
    accumulator,
    as_bytes,
    as_quantized,
    chunk,
    interleave,
    split,
    tensor_split,
)
from fxquant.lowering import Bound, IntValue, Lowering, Representation, Site, Weight
from fxquant.metadata import add_reason, shape_of
from fxquant.op_view import Op, attribute
from fxquant.targets.guards import expand, is_non_overlapping, resolve_padding

Emitter = Callable[[Site], str | None]

_QUANTIZED, _BYTES = Representation.QUANTIZED, Representation.BYTES
_FLOAT_INPUT = "an input is in floating point, so there are no integers to compute with"
_FLOAT_WEIGHT = "its weight is in floating point"


# -- convolution and linear -----------------------------------------------------------------------


def emit_convolution(site: Site) -> str | None:
    """``conv{1,2,3}d`` with its epilogues."""
    inputs, weight = site.inputs(), site.weight()
    if inputs is None:
        return _FLOAT_INPUT
    if weight is None:
        return _FLOAT_WEIGHT
    residual = next((op for op in site.epilogues if op.name == "add"), None)
    if residual is not None:
        return _emit_residual(site, inputs[0], weight, residual)
    post = _post_op(site.epilogues, _CONVOLUTION_POST_OPS)
    if site.quantize is None:
        if post is None:
            return _emit_float_head(
                site, lambda s: _emit_pointwise_convolution(s, inputs[0], weight, ("none", [], ""))
            )
        return _emit_pointwise_convolution(site, inputs[0], weight, post)
    clamp = _clamp_epilogue(site.epilogues)
    if clamp is not None or not site.epilogues:
        return _emit_packed_convolution(site, inputs[0], weight, clamp)
    if post is not None and site.op.name == "conv2d":
        return _emit_pointwise_convolution(site, inputs[0], weight, post)
    return _emit_float_head(
        site, lambda s: _emit_pointwise_convolution(s, inputs[0], weight, ("none", [], ""))
    )


def _geometry(op: Op) -> tuple[list[int], list[int], list[int], int]:
    dimensions = int(op.name[-2])
    return (
        expand(op.arguments["stride"], dimensions),
        expand(resolve_padding(op) if "padding" in op.arguments else 0, dimensions),
        expand(op.arguments["dilation"], dimensions),
        int(op.arguments["groups"]),
    )


def _convolution_form(lowering: Lowering, weight: Weight, groups: int) -> str:
    """What :mod:`fxquant.kernel_probe` calls a convolution with this weight."""
    if groups == 1:
        return "conv"
    return "depthwise" if _tensor(lowering, weight.integers).shape[1] == 1 else "grouped"


def _tensor(lowering: Lowering, node: fx.Node) -> torch.Tensor:
    value = attribute(lowering.gm, str(node.target))
    assert isinstance(value, torch.Tensor)
    return value


def _saturates(form: str) -> str | None:
    """Kernels that only oneDNN has are refused where it saturates: int8 would be plainly wrong."""
    if is_exact(form, "onednn"):
        return None
    return (
        f"oneDNN's int8 kernel saturates on this CPU (no VNNI): {form} with a float result or a"
        " fused function has no exact kernel here"
    )


def _emit_packed_convolution(
    site: Site, x: IntValue, weight: Weight, clamp: Op | None
) -> str | None:
    lowering, op = site.lowering, site.op
    dimensions = int(op.name[-2])
    stride, padding, dilation, groups = _geometry(op)
    engine = exact_engine(_convolution_form(lowering, weight, groups))
    packed = lowering.pack(
        "conv",
        (
            weight.integers,
            weight.scale,
            weight.zero_point,
            op.arguments.get("bias"),
            dimensions,
            stride,
            padding,
            dilation,
            groups,
            engine,
        ),
        at=site.last,
    )
    relu = clamp is not None and bounds_of(clamp)[0] == 0.0
    name = f"conv{dimensions}d{'_relu' if relu else ''}"
    packet = getattr(torch.ops.quantized, name)
    source = lowering.held_as(x, _QUANTIZED, at=site.last)
    node = lowering.emit(
        site,
        packet.new if "new" in packet.overloads() else packet.default,
        (source, packed, site.output_scale, site.output_zero_point),
        f"quantized::{name} ({engine})",
    )
    return _finish_clamp(site, node, clamp, done="low" if relu else "")


def _emit_pointwise_convolution(
    site: Site, x: IntValue, weight: Weight, post: tuple[str, list[Any], str]
) -> str | None:
    lowering, op = site.lowering, site.op
    stride, padding, dilation, groups = _geometry(op)
    inexact = _saturates(_convolution_form(lowering, weight, groups))
    if inexact is not None:
        return inexact
    packed = lowering.pack(
        "onednn-conv",
        (weight.integers, weight.scale, stride, padding, dilation, groups),
        at=site.last,
    )
    attr, scalars, algorithm = post
    node = lowering.emit(
        site,
        torch.ops.onednn.qconv_pointwise.default,
        (
            lowering.held_as(x, _BYTES, at=site.last),
            Bound(x.scale),
            Bound(x.zero_point),
            packed,
            weight.scale,
            weight.zero_point,
            op.arguments.get("bias"),
            stride,
            padding,
            dilation,
            groups,
            site.output_scale,
            site.output_zero_point,
            torch.float32 if site.quantize is None else torch.uint8,
            attr,
            scalars,
            algorithm,
        ),
        f"onednn::qconv_pointwise[{attr}]" + (" -> fp32" if site.quantize is None else ""),
    )
    _finish(site, node, _BYTES)
    return None


def _emit_residual(site: Site, x: IntValue, weight: Weight, add: Op) -> str | None:
    """``conv(x) + other`` on the accumulator; ``other``'s memory takes the result."""
    lowering, op = site.lowering, site.op
    others = [site.integers(a) for a in add.activations]
    other = next((value for value in others if value is not None), None)
    if site.quantize is None or other is None:
        reason = "the sum is read in floating point" if site.quantize is None else _FLOAT_INPUT
        for node in site.members[1:]:
            add_reason(node, f"not fused into the convolution: {reason}")
        return _emit_float_head(
            site, lambda s: _emit_pointwise_convolution(s, x, weight, ("none", [], ""))
        )
    stride, padding, dilation, groups = _geometry(op)
    inexact = _saturates(_convolution_form(lowering, weight, groups))
    if inexact is not None:
        return inexact
    packed = lowering.pack(
        "onednn-conv",
        (weight.integers, weight.scale, stride, padding, dilation, groups),
        at=site.last,
    )
    target = _accumulator(site, x, other)
    clamp = next((epilogue for epilogue in site.epilogues if epilogue.name in CLAMP_KINDS), None)
    low, high = (None, None) if clamp is None else bounds_of(clamp)
    relu = low == 0.0
    node = lowering.emit(
        site,
        torch.ops.onednn.qconv2d_pointwise.binary,
        (
            lowering.held_as(x, _BYTES, at=site.last),
            Bound(x.scale),
            Bound(x.zero_point),
            packed,
            weight.scale,
            weight.zero_point,
            target,
            op.arguments.get("bias"),
            stride,
            padding,
            dilation,
            groups,
            site.output_scale,
            site.output_zero_point,
            torch.uint8,
            Bound(other.scale),
            Bound(other.zero_point),
            "sum",
            1.0,
            "relu" if relu else "none",
            [],
            "",
        ),
        f"onednn::qconv2d_pointwise.binary[sum{', relu' if relu else ''}]",
    )
    if high is None and (low is None or relu):
        _finish(site, node, _BYTES)
        return None
    quantized = lowering.call(
        as_quantized,
        (node, site.output_scale, site.output_zero_point),
        at=site.last,
        like=node,
        dtype=torch.uint8,
    )
    return _finish_clamp(site, quantized, clamp, done="low" if relu else "")


def _accumulator(site: Site, x: IntValue, other: IntValue) -> fx.Node:
    """The bytes of ``other``, copied first where somebody still needs them.

    The kernel overwrites them, so they must not be read afterwards, nor be what it convolves.
    """
    lowering = site.lowering
    source = lowering.held_as(other, _BYTES, at=site.last)
    position, reader = lowering.last_reader(other)
    needed = position > lowering.order[site.last] or other.root is x.root
    source = lowering.call(
        accumulator,
        (source, lowering.held_as(x, _BYTES, at=site.last)),
        at=site.last,
        like=source,
        dtype=torch.uint8,
    )
    if needed:
        why = (
            "the convolution reads it too" if other.root is x.root else f"{reader!r} reads it later"
        )
        add_reason(site.op.node, f"the other operand of the sum is copied first: {why}")
        source = lowering.call(torch.clone, (source,), at=site.last, like=source, dtype=torch.uint8)
    return source


def emit_linear(site: Site) -> str | None:
    """``linear`` with its epilogues."""
    inputs, weight = site.inputs(), site.weight()
    if inputs is None:
        return _FLOAT_INPUT
    if weight is None:
        return _FLOAT_WEIGHT
    x = inputs[0]
    post = _post_op(site.epilogues, _LINEAR_POST_OPS)
    clamp = _clamp_epilogue(site.epilogues)
    shape = shape_of(site.op.node)
    vector = shape is not None and len(shape) < 2  # quantized::linear takes no vectors
    if site.quantize is not None and (clamp is not None or not site.epilogues) and not vector:
        return _emit_packed_linear(site, x, weight, clamp)
    if post is not None:
        return _emit_pointwise_linear(site, x, weight, post)
    return _emit_float_head(site, lambda s: _emit_pointwise_linear(s, x, weight, ("none", [], "")))


def _emit_packed_linear(site: Site, x: IntValue, weight: Weight, clamp: Op | None) -> str | None:
    lowering = site.lowering
    engine = exact_engine("linear")
    packed = lowering.pack(
        "linear",
        (
            weight.integers,
            weight.scale,
            weight.zero_point,
            site.op.arguments.get("bias"),
            engine,
        ),
        at=site.last,
    )
    relu = clamp is not None and bounds_of(clamp)[0] == 0.0
    name = "linear_relu" if relu else "linear"
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (
            lowering.held_as(x, _QUANTIZED, at=site.last),
            packed,
            site.output_scale,
            site.output_zero_point,
        ),
        f"quantized::{name} ({engine})",
    )
    return _finish_clamp(site, node, clamp, done="low" if relu else "")


def _emit_pointwise_linear(
    site: Site, x: IntValue, weight: Weight, post: tuple[str, list[Any], str]
) -> str | None:
    lowering = site.lowering
    inexact = _saturates("linear")
    if inexact is not None:
        return inexact
    packed = lowering.pack("onednn-linear", (weight.integers,), at=site.last)
    attr, scalars, algorithm = post
    node = lowering.emit(
        site,
        torch.ops.onednn.qlinear_pointwise.default,
        (
            lowering.held_as(x, _BYTES, at=site.last),
            Bound(x.scale),
            Bound(x.zero_point),
            packed,
            weight.scale,
            weight.zero_point,
            site.op.arguments.get("bias"),
            site.output_scale,
            site.output_zero_point,
            torch.float32 if site.quantize is None else torch.uint8,
            attr,
            scalars,
            algorithm,
        ),
        f"onednn::qlinear_pointwise[{attr}]" + (" -> fp32" if site.quantize is None else ""),
    )
    _finish(site, node, _BYTES)
    return None


def emit_convolution_transpose(site: Site) -> str | None:
    """``conv_transpose{1,2,3}d``: fbgemm with per-tensor weights; oneDNN's kernel is wrong."""
    inputs, weight = site.inputs(), site.weight()
    if inputs is None:
        return _FLOAT_INPUT
    if weight is None:
        return _FLOAT_WEIGHT
    if site.quantize is None:
        return "its result is read in floating point, and the kernel writes integers"
    if is_non_overlapping(site.op):
        return _emit_non_overlapping(site, inputs[0], weight)
    lowering, op = site.lowering, site.op
    dimensions = int(op.name[-2])
    stride, padding, dilation, groups = _geometry(op)
    packed = lowering.pack(
        "conv-transpose",
        (
            weight.integers,
            weight.scale,
            weight.zero_point,
            op.arguments.get("bias"),
            dimensions,
            stride,
            padding,
            expand(op.arguments["output_padding"], dimensions),
            dilation,
            groups,
            "fbgemm",
        ),
        at=site.last,
    )
    name = f"conv_transpose{dimensions}d"
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (
            lowering.held_as(inputs[0], _QUANTIZED, at=site.last),
            packed,
            site.output_scale,
            site.output_zero_point,
        ),
        f"quantized::{name} (fbgemm)",
    )
    return _finish_clamp(site, node, _clamp_epilogue(site.epilogues))


def _emit_non_overlapping(site: Site, x: IntValue, weight: Weight) -> str | None:
    """Every output pixel reads one input pixel: a 1 x 1 convolution, then pixels in their places.

    46 us where the float kernel takes 395 (64 to 32 channels, 2 x 2, 28 x 28), and exact where
    fbgemm's own kernel for it is wrong.
    """
    lowering, op = site.lowering, site.op
    engine = exact_engine("conv")
    packed = lowering.pack(
        "conv-transpose-non-overlapping",
        (weight.integers, weight.scale, weight.zero_point, op.arguments.get("bias"), engine),
        at=site.last,
    )
    clamp = _clamp_epilogue(site.epilogues)
    relu = clamp is not None and bounds_of(clamp)[0] == 0.0
    name = f"conv2d{'_relu' if relu else ''}"
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).new,
        (
            lowering.held_as(x, _QUANTIZED, at=site.last),
            packed,
            site.output_scale,
            site.output_zero_point,
        ),
        f"quantized::{name} ({engine})",
    )
    node = _clamped(site, node, clamp, done="low" if relu else "")
    source = lowering.call(as_bytes, (node,), at=site.last, like=node, dtype=torch.uint8)
    height, width = expand(op.arguments["stride"], 2)
    node = lowering.call(
        interleave,
        (source, height, width),
        at=site.last,
        like=node,
        dtype=torch.uint8,
        kernel="interleave on bytes",
    )
    _finish(site, node, _BYTES)
    return None


_PostOp = tuple[str, list[Any], str]


def _clamp_post_op(op: Op) -> _PostOp | None:
    low, high = bounds_of(op)
    if high is None:
        return ("relu", [], "") if low == 0.0 else None
    return None if low is None else ("hardtanh", [low, high], "")


_CONVOLUTION_POST_OPS: dict[str, Callable[[Op], _PostOp | None]] = {
    **dict.fromkeys(CLAMP_KINDS, _clamp_post_op),
    "hardswish": lambda op: ("hardswish", [], ""),
    "silu": lambda op: ("swish", [], ""),
}
_LINEAR_POST_OPS = _CONVOLUTION_POST_OPS | {
    "leaky_relu": lambda op: ("leaky_relu", [float(op.arguments["negative_slope"])], ""),
    "tanh": lambda op: ("tanh", [], ""),
    "gelu": lambda op: ("gelu", [], str(op.arguments["approximate"])),
}


def _post_op(
    epilogues: tuple[Op, ...], table: dict[str, Callable[[Op], _PostOp | None]]
) -> _PostOp | None:
    """The post-op of oneDNN that computes ``epilogues``, or ``None`` where there is none."""
    if not epilogues:
        return "none", [], ""
    if len(epilogues) > 1 or epilogues[0].name not in table:
        return None
    return table[epilogues[0].name](epilogues[0])


def _emit_float_head(site: Site, emit: Callable[[Site], str | None]) -> str | None:
    """Compute the first op in int8 with a float result; what follows stays in floating point."""
    refused = emit(Site(op=site.op, epilogues=(), quantize=None, lowering=site.lowering))
    for op in site.epilogues if refused is None else ():
        add_reason(
            op.node, "runs in FP32 on the kernel's float accumulator, before it is quantized"
        )
    return refused


# -- element-wise and the rest ------------------------------------------------------------------


def emit_binary(site: Site) -> str | None:
    """``add`` and ``mul`` of two int8 tensors, with their relu."""
    inputs = site.inputs()
    if inputs is None or len(inputs) != 2:
        return _FLOAT_INPUT
    if site.quantize is None:
        return "its result is read in floating point, and the kernel writes integers"
    clamp = _clamp_epilogue(site.epilogues)
    relu = clamp is not None and bounds_of(clamp)[0] == 0.0
    name = f"{site.op.name}{'_relu' if relu else ''}"
    if _is_broadcast(site.op):
        inputs = inputs[::-1]
    left, right = (site.lowering.held_as(x, _QUANTIZED, at=site.last) for x in inputs)
    node = site.lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (left, right, site.output_scale, site.output_zero_point),
        f"quantized::{name}",
    )
    return _finish_clamp(site, node, clamp, done="low" if relu else "")


def _is_broadcast(op: Op) -> bool:
    """Whether the first operand is the smaller one, such as the gate of a squeeze-excitation.

    The kernel writes in the memory format of its first operand: ``gate * x`` takes 346 us and
    leaves channels_last, ``x * gate`` takes 37 (1 x 64 x 56 x 56). Both are commutative exactly.
    """
    left, right = (shape_of(operand) for operand in op.activations)
    return left is not None and right is not None and math.prod(left) < math.prod(right)


def emit_matmul(site: Site) -> str | None:
    """``matmul`` of two int8 tensors."""
    return _emit_plain(site, torch.ops.quantized.matmul.default, "quantized::matmul")


def emit_leaky_relu(site: Site) -> str | None:
    """``leaky_relu`` with an output scale of its own."""
    slope = float(site.op.arguments["negative_slope"])
    return _emit_plain(
        site, torch.ops.quantized.leaky_relu.default, "quantized::leaky_relu", slope, False
    )


def _emit_plain(site: Site, target: Any, kernel: str, *options: Any) -> str | None:
    inputs = site.inputs()
    if inputs is None:
        return _FLOAT_INPUT
    if site.quantize is None:
        return "its result is read in floating point, and the kernel writes integers"
    sources = [site.lowering.held_as(x, _QUANTIZED, at=site.last) for x in inputs]
    node = site.lowering.emit(
        site, target, (*sources, *options, site.output_scale, site.output_zero_point), kernel
    )
    _finish(site, node, _QUANTIZED)
    return None


def emit_batch_norm(site: Site) -> str | None:
    """A batch-norm that nothing folds, with its relu."""
    inputs = site.inputs()
    if inputs is None:
        return _FLOAT_INPUT
    if site.quantize is None:
        return "its result is read in floating point, and the kernel writes integers"
    lowering, op = site.lowering, site.op
    clamp = _clamp_epilogue(site.epilogues)
    relu = clamp is not None and bounds_of(clamp)[0] == 0.0
    name = f"batch_norm{_spatial_dimensions(op)}d{'_relu' if relu else ''}"
    constants = [
        _constant_node(lowering, op, c, at=site.last)
        for c in ("weight", "bias", "running_mean", "running_var")
    ]
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (
            lowering.held_as(inputs[0], _QUANTIZED, at=site.last),
            *constants,
            float(op.arguments["eps"]),
            site.output_scale,
            site.output_zero_point,
        ),
        f"quantized::{name}",
    )
    return _finish_clamp(site, node, clamp, done="low" if relu else "")


def _spatial_dimensions(op: Op) -> int:
    """The rank decides the operator; without value records the module's class tells it."""
    shape = shape_of(op.node)
    if shape is not None:
        return len(shape) - 2
    module = op.owner.get_submodule(str(op.node.target))
    return 3 if isinstance(module, torch.nn.BatchNorm3d) else 2


def _constant_node(lowering: Lowering, op: Op, name: str, *, at: fx.Node) -> fx.Node:
    value = op.constant(name)
    assert value is not None
    buffer = lowering.rewriter.new_buffer(f"{op.node.name}_{name}", value.detach().clone())
    return lowering.rewriter.get_attr(buffer, before=at, like=at)


# -- clamps behind a kernel ---------------------------------------------------------------------


def _clamp_epilogue(epilogues: tuple[Op, ...]) -> Op | None:
    if len(epilogues) == 1 and epilogues[0].name in CLAMP_KINDS:
        return epilogues[0]
    return None


def _finish_clamp(site: Site, node: fx.Node, clamp: Op | None, *, done: str = "") -> str | None:
    """Register the result, with an integer clamp for the bounds that the kernel did not do."""
    _finish(site, _clamped(site, node, clamp, done=done), _QUANTIZED)
    return None


def _clamped(site: Site, node: fx.Node, clamp: Op | None, *, done: str) -> fx.Node:
    """``node`` with an integer clamp for the bounds of ``clamp`` that the kernel did not do."""
    if clamp is None:
        return node
    low, high = bounds_of(clamp)
    low = None if done == "low" else low
    if low is None and high is None:
        return node
    add_reason(clamp.node, "an integer clamp: the shared output range does not express it")
    return site.lowering.call(
        torch.clamp,
        (node, low, high),
        at=site.last,
        like=site.last,
        dtype=torch.uint8,
        kernel="aten::clamp on int8",
        origins=(),
    )


def _finish(site: Site, node: fx.Node, held: Representation) -> None:
    if site.quantize is None:
        site.lowering.result_float(site, node)
    else:
        site.lowering.result(site, node, held)


# -- ops that move values -----------------------------------------------------------------------


def _moved(
    function: Callable[..., Any],
    *names: str,
    held: Representation | None = None,
    view: bool = False,
) -> Emitter:
    """An emitter that calls ``function`` on the integers, with the named parameters after them."""

    def emit(site: Site) -> str | None:
        inputs = site.inputs()
        if inputs is None:
            return _FLOAT_INPUT
        representation = held or inputs[0].representation
        source = site.lowering.held_as(inputs[0], representation, at=site.last)
        args = (source, *(site.op.arguments[name] for name in names))
        kernel = f"aten::{getattr(function, '__name__', site.op.name)} on {representation.value}"
        node = site.lowering.emit(site, function, args, kernel)
        site.lowering.result(site, node, representation, inputs[0].root if view else None)
        return None

    return emit


def _emit_list(function: Callable[..., Any]) -> Emitter:
    """``cat`` and ``stack`` of bytes that have the same parameters."""

    def emit(site: Site) -> str | None:
        inputs = site.inputs()
        if inputs is None:
            return _FLOAT_INPUT
        sources = [site.lowering.held_as(x, _BYTES, at=site.last) for x in inputs]
        node = site.lowering.emit(
            site, function, (sources, site.op.arguments["dim"]), f"aten::{site.op.name} on bytes"
        )
        if site.epilogues:
            bytes_value = IntValue(
                node=node,
                representation=_BYTES,
                scale=inputs[0].scale,
                zero_point=inputs[0].zero_point,
                root=node,
            )
            quantized = site.lowering.held_as(bytes_value, _QUANTIZED, at=site.last)
            return _finish_clamp(site, quantized, _clamp_epilogue(site.epilogues))
        _finish(site, node, _BYTES)
        return None

    return emit


def emit_pad(site: Site) -> str | None:
    """Zero padding of bytes: zero is the zero point, exactly."""
    inputs = site.inputs()
    if inputs is None:
        return _FLOAT_INPUT
    source = site.lowering.held_as(inputs[0], _BYTES, at=site.last)
    node = site.lowering.emit(
        site,
        torch.constant_pad_nd,
        (source, site.op.arguments["pad"], Bound(inputs[0].zero_point)),
        "aten::constant_pad_nd on bytes",
    )
    site.lowering.result(site, node, _BYTES)
    return None


def emit_clamp(site: Site) -> str | None:
    """A clamp alone, on integers."""
    inputs = site.inputs()
    if inputs is None:
        return _FLOAT_INPUT
    low, high = bounds_of(site.op)
    source = site.lowering.held_as(inputs[0], _QUANTIZED, at=site.last)
    node = site.lowering.emit(site, torch.clamp, (source, low, high), "aten::clamp on quantized")
    site.lowering.result(site, node, _QUANTIZED)
    return None


def view_of(x: torch.Tensor, shape: Any) -> torch.Tensor:
    """``x.reshape(shape)`` as a function; ``x.view(y.shape)`` arrives as ``(y.shape,)``."""
    return x.reshape(*shape)


def permuted(x: torch.Tensor, dims: Any) -> torch.Tensor:
    """``x.permute(dims)`` as a function."""
    return x.permute(*dims)


def emit_interpolate(site: Site) -> str | None:
    """Nearest and bilinear resizing of int8 images."""
    inputs = site.inputs()
    if inputs is None:
        return _FLOAT_INPUT
    arguments = site.op.arguments
    source = site.lowering.held_as(inputs[0], _QUANTIZED, at=site.last)
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    node = site.lowering.emit(
        site, F.interpolate, (source, *(arguments[n] for n in names)), "aten::upsample on quantized"
    )
    site.lowering.result(site, node, _QUANTIZED)
    return None


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVG_POOL = (
    *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
)


def _pool_with_stride(function: Callable[..., Any], *names: str) -> Emitter:
    """Pooling functions that want the default stride spelt out."""
    inner = _moved(function, *names, held=_QUANTIZED)

    def emit(site: Site) -> str | None:
        arguments = dict(site.op.arguments)
        if arguments.get("stride") is None:
            arguments["stride"] = arguments["kernel_size"]
        op = Op(
            node=site.op.node,
            kind=site.op.kind,
            form=site.op.form,
            arguments=arguments,
            owner=site.op.owner,
        )
        return inner(
            Site(op=op, epilogues=site.epilogues, quantize=site.quantize, lowering=site.lowering)
        )

    return emit


def contiguous(x: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """``x.contiguous`` as a function."""
    return x.contiguous(memory_format=memory_format)


def item(x: torch.Tensor, index: Any) -> torch.Tensor:
    """``x[index]`` as a function."""
    return x[index]


def squeeze(x: torch.Tensor, dim: Any) -> torch.Tensor:
    """``x.squeeze()`` or ``x.squeeze(dim)``."""
    return x.squeeze() if dim is None else x.squeeze(dim)


EMITTERS: dict[str, Emitter] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), emit_convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), emit_convolution_transpose
    ),
    "linear": emit_linear,
    "matmul": emit_matmul,
    "batch_norm": emit_batch_norm,
    "add": emit_binary,
    "mul": emit_binary,
    "leaky_relu": emit_leaky_relu,
    **dict.fromkeys(("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), emit_clamp),
    "relu": _moved(torch.relu, held=_QUANTIZED),
    "max_pool1d": _pool_with_stride(torch.max_pool1d, *_MAX_POOL),
    "max_pool2d": _pool_with_stride(torch.max_pool2d, *_MAX_POOL),
    "avg_pool2d": _pool_with_stride(F.avg_pool2d, *_AVG_POOL),
    "avg_pool3d": _pool_with_stride(F.avg_pool3d, *_AVG_POOL),
    "interpolate": emit_interpolate,
    "pad": emit_pad,
    "cat": _emit_list(torch.cat),
    "stack": _emit_list(torch.stack),
    "flatten": _moved(torch.flatten, "start_dim", "end_dim", held=_BYTES, view=True),
    "reshape": _moved(view_of, "shape", held=_BYTES, view=True),
    "view": _moved(view_of, "shape", held=_BYTES, view=True),
    "permute": _moved(permuted, "dims", view=True),
    "transpose": _moved(torch.transpose, "dim0", "dim1", view=True),
    "squeeze": _moved(squeeze, "dim", view=True),
    "unsqueeze": _moved(torch.unsqueeze, "dim", view=True),
    "slice": _moved(item, "index", held=_BYTES, view=True),
    "chunk": _moved(chunk, "chunks", "dim", "index", held=_BYTES, view=True),
    "split": _moved(split, "sizes", "dim", "index", held=_BYTES, view=True),
    "tensor_split": _moved(tensor_split, "sections", "dim", "index", held=_BYTES, view=True),
    "select": _moved(torch.select, "dim", "index", held=_BYTES, view=True),
    "narrow": _moved(torch.narrow, "dim", "start", "length", held=_BYTES, view=True),
    "contiguous": _moved(contiguous, "memory_format", held=_BYTES, view=True),
    "pixel_shuffle": _moved(F.pixel_shuffle, "upscale_factor", held=_BYTES, view=True),
    "pixel_unshuffle": _moved(F.pixel_unshuffle, "downscale_factor", held=_BYTES, view=True),
    "channel_shuffle": _moved(F.channel_shuffle, "groups", held=_BYTES, view=True),
}
"""Kind -> emitter."""
