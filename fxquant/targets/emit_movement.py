"""How ops that move, select, clamp or pool integers are emitted; all share the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.clamps import bounds_of
from fxquant.engine_free import clamp
from fxquant.lowering import IntValue, Lowering, Representation, Site
from fxquant.op_view import Op, attribute
from fxquant.targets.emit_common import (
    BYTES,
    FLOAT_INPUT,
    QUANTIZED,
    Emitter,
    clamp_epilogue,
    finish,
    finish_clamp,
)


def moved(
    function: Callable[..., Any],
    *names: str,
    held: Representation | None = None,
    view: bool = False,
) -> Emitter:
    """An emitter that calls ``function`` on the integers, with the named parameters after them."""

    def emit(site: Site) -> str | None:
        inputs = site.inputs()
        if inputs is None:
            return FLOAT_INPUT
        representation = held or inputs[0].representation
        source = site.lowering.held_as(inputs[0], representation, at=site.last)
        args = (source, *(site.op.arguments[name] for name in names))
        kernel = f"aten::{getattr(function, '__name__', site.op.name)} on {representation.value}"
        node = site.lowering.emit(site, function, args, kernel)
        site.lowering.result(site, node, representation, inputs[0].root if view else None)
        return None

    return emit


def emit_list(function: Callable[..., Any]) -> Emitter:
    """``cat`` and ``stack`` of bytes that have the same parameters, of tensors that have not."""

    def emit(site: Site) -> str | None:
        inputs = site.inputs()
        if inputs is None:
            return FLOAT_INPUT
        if not _same_parameters(site.lowering, inputs):
            tensors = [site.lowering.held_as(x, QUANTIZED, at=site.last) for x in inputs]
            args = (tensors, site.op.arguments["dim"])
            made = site.lowering.emit(site, function, args, f"aten::{site.op.name} on quantized")
            site.lowering.result(site, made, QUANTIZED)
            return None
        sources = [site.lowering.held_as(x, BYTES, at=site.last) for x in inputs]
        node = site.lowering.emit(
            site, function, (sources, site.op.arguments["dim"]), f"aten::{site.op.name} on bytes"
        )
        if site.epilogues:
            return finish_clamp(site, node, clamp_epilogue(site.epilogues), held=BYTES)
        finish(site, node, BYTES)
        return None

    return emit


def _same_parameters(lowering: Lowering, values: tuple[IntValue, ...]) -> bool:
    """Whether values have the same scale and zero point; kernels that choose theirs may not."""
    named = [(v.scale, v.zero_point) for v in values]
    if any(isinstance(scale, fx.Node) for scale, _ in named):
        return len(set(named)) == 1
    buffers = [tuple(attribute(lowering.gm, str(name)) for name in names) for names in named]
    return all(torch.equal(a, b) for pair in buffers for a, b in zip(pair, buffers[0], strict=True))


def emit_pad(site: Site) -> str | None:
    """Padding of bytes: zero is the zero point, exactly, and the other modes copy values."""
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    source = site.lowering.held_as(inputs[0], BYTES, at=site.last)
    pad, mode = site.op.arguments["pad"], site.op.arguments["mode"]
    if mode == "constant":
        args = (source, pad, inputs[0].bound_zero_point)
        kernel = "aten::constant_pad_nd on bytes"
        node = site.lowering.emit(site, torch.constant_pad_nd, args, kernel)
    else:
        node = site.lowering.emit(site, F.pad, (source, pad, mode), f"aten::pad[{mode}] on bytes")
    site.lowering.result(site, node, BYTES)
    return None


def emit_extremes(function: Callable[..., Any]) -> Emitter:
    """``maximum`` and ``minimum`` of bytes that have the same parameters."""

    def emit(site: Site) -> str | None:
        inputs = site.inputs()
        if inputs is None or len(inputs) != 2:
            return FLOAT_INPUT
        if not _same_parameters(site.lowering, inputs):
            return "its operands have different scales"
        sources = [site.lowering.held_as(x, BYTES, at=site.last) for x in inputs]
        kernel = f"aten::{site.op.name} on bytes"
        node = site.lowering.emit(site, function, tuple(sources), kernel)
        site.lowering.result(site, node, BYTES)
        return None

    return emit


def emit_clamp(site: Site) -> str | None:
    """A clamp alone, on integers."""
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    low, high = bounds_of(site.op)
    x = inputs[0]
    source = site.lowering.held_as(x, BYTES, at=site.last)
    args = (source, low, high, x.bound_scale, x.bound_zero_point)
    node = site.lowering.emit(site, clamp, args, "aten::clamp")
    site.lowering.result(site, node, BYTES)
    return None


def view_of(x: torch.Tensor, shape: Any) -> torch.Tensor:
    """``x.reshape(shape)`` as a function; ``x.view(y.shape)`` arrives as ``(y.shape,)``."""
    return x.reshape(*shape)


def expanded(x: torch.Tensor, sizes: Any) -> torch.Tensor:
    """``x.expand(sizes)`` as a function."""
    return x.expand(*sizes)


def permuted(x: torch.Tensor, dims: Any) -> torch.Tensor:
    """``x.permute(dims)`` as a function."""
    return x.permute(*dims)


def emit_interpolate(site: Site) -> str | None:
    """Nearest and bilinear resizing of int8 images."""
    inputs = site.inputs()
    if inputs is None:
        return FLOAT_INPUT
    arguments = site.op.arguments
    source = site.lowering.held_as(inputs[0], QUANTIZED, at=site.last)
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    node = site.lowering.emit(
        site, F.interpolate, (source, *(arguments[n] for n in names)), "aten::upsample on quantized"
    )
    site.lowering.result(site, node, QUANTIZED)
    return None


MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
AVG_POOL = (
    *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
)


def pool_with_stride(function: Callable[..., Any], *names: str) -> Emitter:
    """Pooling functions that want the default stride spelt out."""
    inner = moved(function, *names, held=QUANTIZED)

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
