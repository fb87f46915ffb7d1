"""How convolutions are emitted: ``conv{1,2,3}d`` with their epilogues and residual sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.clamps import CLAMP_KINDS
from fxquant.kernels import accumulator
from fxquant.lowering import IntValue, Site, Weight
from fxquant.metadata import add_reason, record_of, shape_of
from fxquant.op_view import Op, attribute
from fxquant.packing import scalar
from fxquant.pairing import POINTWISE
from fxquant.targets.choice import faster
from fxquant.targets.emit_common import (
    BYTES,
    CONVOLUTION_POST_OPS,
    FLOAT_INPUT,
    FLOAT_WEIGHT,
    WRITES_INTEGERS,
    PostOp,
    clamp_epilogue,
    emit_float_head,
    emit_packed,
    engines_for_weight,
    finish,
    finish_clamp,
    is_relu,
    post_op,
    refused,
)
from fxquant.targets.guards import expand, resolve_padding
from fxquant.targets.saturation import geometry_of, packed_kernel, pointwise_kernel


def emit_convolution(site: Site) -> str | None:
    """``conv{1,2,3}d`` with its epilogues."""
    inputs, weight = site.inputs(), site.weight()
    if inputs is None:
        return FLOAT_INPUT
    if weight is None:
        return FLOAT_WEIGHT
    residual = next((op for op in site.epilogues if op.name == "add"), None)
    if residual is not None:
        return _emit_residual(site, inputs[0], weight, residual)
    post = post_op(site.epilogues, CONVOLUTION_POST_OPS)
    if site.quantize is None:
        if post is None:
            return emit_float_head(
                site, lambda s: _emit_pointwise_convolution(s, inputs[0], weight, ("none", [], ""))
            )
        return _emit_pointwise_convolution(site, inputs[0], weight, post)
    clamp = clamp_epilogue(site.epilogues)
    if clamp is not None or not site.epilogues:
        return _emit_packed_convolution(site, inputs[0], weight, clamp, post)
    if post is not None and site.op.name == "conv2d":
        return _emit_pointwise_convolution(site, inputs[0], weight, post)
    return emit_float_head(
        site, lambda s: _emit_pointwise_convolution(s, inputs[0], weight, ("none", [], ""))
    )


def geometry(op: Op) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a convolution, as numbers per dimension."""
    dimensions = int(op.name[-2])
    return (
        expand(op.arguments["stride"], dimensions),
        expand(resolve_padding(op) if "padding" in op.arguments else 0, dimensions),
        expand(op.arguments["dilation"], dimensions),
        int(op.arguments["groups"]),
    )


def _emit_packed_convolution(
    site: Site, x: IntValue, weight: Weight, clamp: Op | None, post: PostOp | None
) -> str | None:
    lowering, op = site.lowering, site.op
    dimensions = int(op.name[-2])
    stride, padding, dilation, groups = geometry(op)
    choice = faster(site, packed_kernel(geometry_of(op), engines_for_weight(site)))
    if choice.kernel == POINTWISE and post is not None:
        return _emit_pointwise_convolution(site, x, weight, post)
    reason = refused(site, weight, choice)
    if reason is not None:
        return reason
    engine = choice.kernel
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
    relu = is_relu(clamp)
    packet = getattr(torch.ops.quantized, f"conv{dimensions}d{'_relu' if relu else ''}")
    operator = packet.new if "new" in packet.overloads() else packet.default
    node = emit_packed(site, operator, x, packed, engine)
    return finish_clamp(site, node, clamp, done="low" if relu else "")


def _emit_pointwise_convolution(
    site: Site, x: IntValue, weight: Weight, post: PostOp
) -> str | None:
    lowering, op = site.lowering, site.op
    stride, padding, dilation, groups = geometry(op)
    if lowering.engines:
        return WRITES_INTEGERS
    reason = refused(site, weight, pointwise_kernel(geometry_of(op)))
    if reason is not None:
        return reason
    packed = lowering.pack("onednn-conv", _for_pointwise(site, x, weight), at=site.last)
    attr, scalars, algorithm = post
    node = lowering.emit(
        site,
        torch.ops.onednn.qconv_pointwise.default,
        (
            lowering.held_as(x, BYTES, at=site.last),
            x.bound_scale,
            x.bound_zero_point,
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
    finish(site, node, BYTES)
    return None


def _for_pointwise(site: Site, x: IntValue, weight: Weight) -> tuple[Any, ...]:
    """What a weight is packed from, in the order that the operator wants for this input."""
    zero_point = x.zero_point
    at_zero = scalar(attribute(site.lowering.gm, zero_point)) if isinstance(zero_point, str) else 0
    shape = list(shape_of(site.op.activations[0]) or ())
    return (weight.integers, weight.scale, *geometry(site.op), at_zero, shape)


def _emit_residual(site: Site, x: IntValue, weight: Weight, add: Op) -> str | None:
    """``conv(x) + other`` on the accumulator; ``other``'s memory takes the result."""
    lowering, op = site.lowering, site.op
    others = [site.integers(a) for a in add.activations]
    other = next((value for value in others if value is not None), None)
    if site.quantize is None or other is None:
        reason = "the sum is read in floating point" if site.quantize is None else FLOAT_INPUT
        for node in site.members[1:]:
            add_reason(node, f"not fused into the convolution: {reason}")
        return emit_float_head(
            site, lambda s: _emit_pointwise_convolution(s, x, weight, ("none", [], ""))
        )
    stride, padding, dilation, groups = geometry(op)
    inexact = refused(site, weight, pointwise_kernel(geometry_of(op)))
    if inexact is not None:
        return inexact
    packed = lowering.pack("onednn-conv", _for_pointwise(site, x, weight), at=site.last)
    target = _accumulator(site, x, other)
    clamp = next((epilogue for epilogue in site.epilogues if epilogue.name in CLAMP_KINDS), None)
    relu = is_relu(clamp)
    node = lowering.emit(
        site,
        torch.ops.onednn.qconv2d_pointwise.binary,
        (
            lowering.held_as(x, BYTES, at=site.last),
            x.bound_scale,
            x.bound_zero_point,
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
            other.bound_scale,
            other.bound_zero_point,
            "sum",
            1.0,
            "relu" if relu else "none",
            [],
            "",
        ),
        f"onednn::qconv2d_pointwise.binary[sum{', relu' if relu else ''}]",
    )
    return finish_clamp(site, node, clamp, done="low" if relu else "", held=BYTES)


def _accumulator(site: Site, x: IntValue, other: IntValue) -> fx.Node:
    """The bytes of ``other``, copied first where somebody still needs them.

    The kernel overwrites them, so they must not be read afterwards, nor be what it convolves.
    """
    lowering = site.lowering
    source = lowering.held_as(other, BYTES, at=site.last)
    position, reader = lowering.last_reader(other)
    foreign = record_of(other.root).gives_quantized
    needed = foreign or position > lowering.order[site.last] or other.root is x.root
    source = lowering.call(
        accumulator,
        (source, lowering.held_as(x, BYTES, at=site.last)),
        at=site.last,
        like=source,
        dtype=torch.uint8,
    )
    if needed:
        why = (
            f"{other.root.name!r} belongs to others"
            if foreign
            else "the convolution reads it too"
            if other.root is x.root
            else f"{reader!r} reads it later"
        )
        add_reason(site.op.node, f"the other operand of the sum is copied first: {why}")
        source = lowering.call(torch.clone, (source,), at=site.last, like=source, dtype=torch.uint8)
    return source
