"""How ``linear`` is emitted, with its epilogues."""

from __future__ import annotations

import torch

from fxquant.lowering import IntValue, Site, Weight
from fxquant.metadata import shape_of
from fxquant.op_view import Op
from fxquant.pairing import POINTWISE
from fxquant.targets.choice import faster
from fxquant.targets.emit_common import (
    BYTES,
    FLOAT_INPUT,
    FLOAT_WEIGHT,
    LINEAR_POST_OPS,
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
from fxquant.targets.emit_dynamic import emit_dynamic_linear, is_dynamic
from fxquant.targets.saturation import geometry_of, packed_kernel, pointwise_kernel


def emit_linear(site: Site) -> str | None:
    """``linear`` with its epilogues."""
    if is_dynamic(site):
        return emit_dynamic_linear(site)
    inputs, weight = site.inputs(), site.weight()
    if inputs is None:
        return FLOAT_INPUT
    if weight is None:
        return FLOAT_WEIGHT
    x = inputs[0]
    post = post_op(site.epilogues, LINEAR_POST_OPS)
    clamp = clamp_epilogue(site.epilogues)
    shape = shape_of(site.op.node)
    vector = shape is not None and len(shape) < 2  # quantized::linear takes no vectors
    if site.quantize is not None and (clamp is not None or not site.epilogues) and not vector:
        return _emit_packed_linear(site, x, weight, clamp, post)
    if post is not None:
        return _emit_pointwise_linear(site, x, weight, post)
    return emit_float_head(site, lambda s: _emit_pointwise_linear(s, x, weight, ("none", [], "")))


def _emit_packed_linear(
    site: Site, x: IntValue, weight: Weight, clamp: Op | None, post: PostOp | None
) -> str | None:
    lowering = site.lowering
    choice = faster(site, packed_kernel(geometry_of(site.op), engines_for_weight(site)))
    if choice.kernel == POINTWISE and post is not None:
        return _emit_pointwise_linear(site, x, weight, post)
    reason = refused(site, weight, choice)
    if reason is not None:
        return reason
    engine = choice.kernel
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
    relu = is_relu(clamp)
    operators = torch.ops.quantized
    operator = operators.linear_relu.default if relu else operators.linear.default
    node = emit_packed(site, operator, x, packed, engine)
    return finish_clamp(site, node, clamp, done="low" if relu else "")


def _emit_pointwise_linear(site: Site, x: IntValue, weight: Weight, post: PostOp) -> str | None:
    lowering = site.lowering
    if lowering.engines:
        return WRITES_INTEGERS
    reason = refused(site, weight, pointwise_kernel(geometry_of(site.op)))
    if reason is not None:
        return reason
    packed = lowering.pack("onednn-linear", (weight.integers,), at=site.last)
    scale = weight.scale
    if not weight.per_channel:
        scale = lowering.pack("vector", (scale,), at=site.last)
    attr, scalars, algorithm = post
    node = lowering.emit(
        site,
        torch.ops.onednn.qlinear_pointwise.default,
        (
            lowering.held_as(x, BYTES, at=site.last),
            x.bound_scale,
            x.bound_zero_point,
            packed,
            scale,
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
    finish(site, node, BYTES)
    return None
