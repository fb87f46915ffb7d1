"""How transposed convolutions are emitted."""

from __future__ import annotations

import torch

from fxquant.kernels import as_bytes, interleave
from fxquant.lowering import IntValue, Site, Weight
from fxquant.targets.emit_common import (
    BYTES,
    FLOAT_INPUT,
    FLOAT_WEIGHT,
    QUANTIZED,
    WRITES_INTEGERS,
    clamp_epilogue,
    clamped,
    emit_packed,
    engines_for_weight,
    finish,
    finish_clamp,
    is_relu,
    refused,
)
from fxquant.targets.emit_convolution import geometry
from fxquant.targets.guards import expand, is_non_overlapping
from fxquant.targets.saturation import transposed_kernel


def emit_convolution_transpose(site: Site) -> str | None:
    """``conv_transpose{1,2,3}d``: fbgemm with per-tensor weights; oneDNN's kernel is wrong."""
    inputs, weight = site.inputs(), site.weight()
    if inputs is None:
        return FLOAT_INPUT
    if weight is None:
        return FLOAT_WEIGHT
    if site.quantize is None:
        return WRITES_INTEGERS
    choice = transposed_kernel(site.op, engines_for_weight(site))
    reason = refused(site, weight, choice)
    if reason is not None:
        return reason
    if is_non_overlapping(site.op):
        return _emit_non_overlapping(site, inputs[0], weight, choice.kernel)
    lowering, op = site.lowering, site.op
    dimensions = int(op.name[-2])
    stride, padding, dilation, groups = geometry(op)
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
            choice.kernel,
        ),
        at=site.last,
    )
    name = f"conv_transpose{dimensions}d"
    operator = getattr(torch.ops.quantized, name).default
    node = emit_packed(site, operator, inputs[0], packed, choice.kernel)
    return finish_clamp(site, node, clamp_epilogue(site.epilogues))


def _emit_non_overlapping(site: Site, x: IntValue, weight: Weight, engine: str) -> str | None:
    """Every output pixel reads one input pixel: a 1 x 1 convolution, then pixels in their places.

    46 us where the float kernel takes 395 (64 to 32 channels, 2 x 2, 28 x 28), and exact where
    fbgemm's own kernel for it is wrong.
    """
    lowering, op = site.lowering, site.op
    packed = lowering.pack(
        "conv-transpose-non-overlapping",
        (weight.integers, weight.scale, weight.zero_point, op.arguments.get("bias"), engine),
        at=site.last,
    )
    clamp = clamp_epilogue(site.epilogues)
    relu = is_relu(clamp)
    operators = torch.ops.quantized
    operator = operators.conv2d_relu.new if relu else operators.conv2d.new
    node = emit_packed(site, operator, x, packed, engine)
    source, held = clamped(site, node, clamp, done="low" if relu else "")
    if held is QUANTIZED:
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
    finish(site, node, BYTES)
    return None
