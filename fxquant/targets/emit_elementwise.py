"""How element-wise ops, ``matmul`` and a batch-norm of its own are emitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

from fxquant.engine_free import add, add_relu
from fxquant.kernels import lookup
from fxquant.lowering import Lowering, Site
from fxquant.metadata import shape_of
from fxquant.op_view import Op
from fxquant.targets.emit_common import (
    BYTES,
    FLOAT_INPUT,
    QUANTIZED,
    WRITES_INTEGERS,
    clamp_epilogue,
    finish,
    finish_clamp,
    is_relu,
)

_BINARY: Final[dict[str, Callable[..., Any]]] = {
    "add": add,
    "add_relu": add_relu,
    "mul": torch.ops.quantized.mul.default,
    "mul_relu": torch.ops.quantized.mul_relu.default,
}


def emit_binary(site: Site) -> str | None:
    """``add`` and ``mul`` of two int8 tensors, with their relu."""
    inputs = site.inputs()
    if inputs is None or len(inputs) != 2:
        return FLOAT_INPUT
    if site.quantize is None:
        return WRITES_INTEGERS
    clamp = clamp_epilogue(site.epilogues)
    relu = is_relu(clamp)
    name = f"{site.op.name}{'_relu' if relu else ''}"
    if _is_broadcast(site.op):
        inputs = inputs[::-1]
    left, right = (site.lowering.held_as(x, QUANTIZED, at=site.last) for x in inputs)
    node = site.lowering.emit(
        site,
        _BINARY[name],
        (left, right, site.output_scale, site.output_zero_point),
        f"quantized::{name}",
    )
    return finish_clamp(site, node, clamp, done="low" if relu else "")


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


def emit_lookup(site: Site) -> str | None:
    """An element-wise function of 256 integers, looked up."""
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    if site.quantize is None:
        return WRITES_INTEGERS
    lowering, x = site.lowering, inputs[0]
    if not isinstance(x.scale, str) or not isinstance(x.zero_point, str):
        return "the scale of its input is known at run time only, and its table is made before"
    options = [
        value
        for name, value in site.op.arguments.items()
        if name not in (*site.op.kind.activations, "inplace")
    ]
    _, scale, zero_point, low, high, *_ = site.quantize.args
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    names = (x.scale, x.zero_point, str(scale.target), str(zero_point.target))
    buffers = [lowering.rewriter.get_attr(n, before=site.last, like=site.last) for n in names]
    made = (*buffers, site.op.name, options, low, high)
    table = lowering.pack("lookup", made, at=site.last)
    source = lowering.held_as(x, BYTES, at=site.last)
    node = lowering.emit(site, lookup, (source, table), f"lookup of {site.op.name}")
    finish(site, node, BYTES)
    return None


def emit_leaky_relu(site: Site) -> str | None:
    """``leaky_relu`` with an output scale of its own."""
    slope = float(site.op.arguments["negative_slope"])
    return _emit_plain(
        site, torch.ops.quantized.leaky_relu.default, "quantized::leaky_relu", slope, False
    )


def _emit_plain(site: Site, target: Any, kernel: str, *options: Any) -> str | None:
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    if site.quantize is None:
        return WRITES_INTEGERS
    sources = [site.lowering.held_as(x, QUANTIZED, at=site.last) for x in inputs]
    node = site.lowering.emit(
        site, target, (*sources, *options, site.output_scale, site.output_zero_point), kernel
    )
    finish(site, node, QUANTIZED)
    return None


def emit_batch_norm(site: Site) -> str | None:
    """A batch-norm that nothing folds, with its relu."""
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    if site.quantize is None:
        return WRITES_INTEGERS
    lowering, op = site.lowering, site.op
    clamp = clamp_epilogue(site.epilogues)
    relu = is_relu(clamp)
    name = f"batch_norm{_spatial_dimensions(op)}d{'_relu' if relu else ''}"
    constants = [
        constant_node(lowering, op, c, at=site.last)
        for c in ("weight", "bias", "running_mean", "running_var")
    ]
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (
            lowering.held_as(inputs[0], QUANTIZED, at=site.last),
            *constants,
            float(op.arguments["eps"]),
            site.output_scale,
            site.output_zero_point,
        ),
        f"quantized::{name}",
    )
    return finish_clamp(site, node, clamp, done="low" if relu else "")


def _spatial_dimensions(op: Op) -> int:
    """The rank decides the operator; without value records the module's class tells it."""
    shape = shape_of(op.node)
    if shape is not None:
        return len(shape) - 2
    module = op.owner.get_submodule(str(op.node.target))
    return 3 if isinstance(module, torch.nn.BatchNorm3d) else 2


def constant_node(lowering: Lowering, op: Op, name: str, *, at: fx.Node) -> fx.Node:
    """A read of a copy of the constant ``name`` of ``op``, before ``at``."""
    value = op.constant(name)
    assert value is not None
    buffer = lowering.rewriter.new_buffer(f"{op.node.name}_{name}", value.detach().clone())
    return lowering.rewriter.get_attr(buffer, before=at, like=at)
