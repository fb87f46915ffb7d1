"""Kernels that only the ``x86-compat`` target uses: ops that ``x86`` runs faster in float."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.kernels import as_quantized
from fxquant.lowering import IntValue, Representation, Site
from fxquant.op_view import attribute
from fxquant.targets.emit_common import FLOAT_INPUT, QUANTIZED, Emitter, clamp_epilogue
from fxquant.targets.emit_elementwise import constant_node, emit_binary

_FLOAT_RESULT = "its result is read in floating point, and the kernel writes integers"


def _source(site: Site) -> fx.Node | str:
    """The int8 input, or the reason why there is no kernel to call."""
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    if site.quantize is None:
        return _FLOAT_RESULT
    return site.lowering.held_as(inputs[0], QUANTIZED, at=site.last)


def with_own_scale(name: str, *options: str, constants: tuple[str, ...] = ()) -> Emitter:
    """``quantized::name(x, options..., constants..., scale, zero_point)``.

    Args:
        name: of the operator.
        options: parameters of the op that come after the input; ``eps`` after the constants.
        constants: its tensors, by name.
    """
    target = getattr(torch.ops.quantized, name).default

    def emit(site: Site) -> str | None:
        source = _source(site)
        if isinstance(source, str):
            return source
        tensors = [_optional_constant(site, constant) for constant in constants]
        before = [site.op.arguments[option] for option in options if option != "eps"]
        after = [float(site.op.arguments["eps"])] if "eps" in options else []
        args = (source, *before, *tensors, *after, site.output_scale, site.output_zero_point)
        node = site.lowering.emit(site, target, args, f"quantized::{name}")
        site.lowering.result(site, node, QUANTIZED)
        return None

    return emit


def _optional_constant(site: Site, name: str) -> fx.Node | None:
    if site.op.constant(name) is None:
        return None
    return constant_node(site.lowering, site.op, name, at=site.last)


def emit_elu(site: Site) -> str | None:
    """``elu``; its operator takes the output's parameters first."""
    source = _source(site)
    if isinstance(source, str):
        return source
    args = (source, site.output_scale, site.output_zero_point, site.op.arguments["alpha"])
    node = site.lowering.emit(site, torch.ops.quantized.elu.default, args, "quantized::elu")
    site.lowering.result(site, node, QUANTIZED)
    return None


def with_fixed_scale(function: Any) -> Emitter:
    """Functions whose int8 kernel chooses scale and zero point: ``sigmoid`` and its like."""

    def emit(site: Site) -> str | None:
        source = _source(site)
        if isinstance(source, str):
            return source
        node = site.lowering.emit(
            site, function, (source,), f"aten::{site.op.name} on {Representation.QUANTIZED.value}"
        )
        register_as_given(site, node)
        return None

    return emit


def emit_dropout(site: Site) -> str | None:
    """Nothing, as ``quantized::dropout``, whatever the mode: int8 models do not train."""
    inputs = site.inputs()
    if inputs is None or site.quantize is None:
        return FLOAT_INPUT
    site.lowering.values[site.quantize] = inputs[0]
    return None


def emit_arithmetic(site: Site) -> str | None:
    """``add`` and ``mul``, of two tensors or of one and a number."""
    return emit_scalar(site) if len(site.op.activations) == 1 else emit_binary(site)


def emit_scalar(site: Site) -> str | None:
    """``x + 2`` and ``x * 2``: the kernel moves the parameters, not the integers."""
    number = next(
        value
        for name in ("other", "input")
        if not isinstance(value := site.op.arguments[name], fx.Node)
    )
    if not isinstance(number, (int, float)) or site.op.arguments.get("alpha", 1) != 1:
        return "its second operand is no number"
    source = _source(site)
    if isinstance(source, str):
        return source
    relu = clamp_epilogue(site.epilogues) is not None
    name = f"{site.op.name}{'_relu' if relu else ''}"
    target = getattr(torch.ops.quantized, name).Scalar
    node = site.lowering.emit(site, target, (source, number), f"quantized::{name}.Scalar")
    register_as_given(site, node)
    return None


def register_as_given(site: Site, node: fx.Node) -> None:
    """Register a result whose parameters the kernel chose, from those of its input."""
    lowering = site.lowering
    inputs = site.inputs()
    assert inputs is not None and site.quantize is not None
    x = inputs[0]
    if isinstance(x.scale, fx.Node) or isinstance(x.zero_point, fx.Node):
        lowering.values[site.quantize] = lowering.describing_itself(node)
        return
    scale, zero_point = (attribute(lowering.gm, name) for name in (x.scale, x.zero_point))
    probe = as_quantized(torch.zeros(1, 1, dtype=torch.uint8), float(scale), int(zero_point))
    assert callable(node.target)
    made = node.target(probe, *node.args[1:])
    store = lowering.rewriter.new_buffer
    name = site.op.node.name
    lowering.values[site.quantize] = IntValue(
        node=node,
        representation=QUANTIZED,
        scale=store(f"{name}_kernel_scale", torch.tensor(made.q_scale())),
        zero_point=store(
            f"{name}_kernel_zero_point", torch.tensor(made.q_zero_point(), dtype=torch.int32)
        ),
        root=node,
    )


def repeat(x: torch.Tensor, sizes: Any) -> torch.Tensor:
    """``x.repeat(sizes)`` as a function."""
    return x.repeat(*sizes)


def repeat_interleave(x: torch.Tensor, repeats: Any, dim: Any) -> torch.Tensor:
    """``x.repeat_interleave(repeats, dim)`` as a function."""
    return x.repeat_interleave(repeats, dim)


def hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    """``F.hardsigmoid`` on integers."""
    return F.hardsigmoid(x)


def same(x: torch.Tensor) -> torch.Tensor:
    """``nn.Identity``."""
    return x
