"""The invariants of every graph between passes."""

from __future__ import annotations

import warnings

import torch
from torch import fx

from fxquant.dataflow import reads_only_shape
from fxquant.errors import GraphError
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.kernels import to_quantized
from fxquant.metadata import TensorRecord, record_of
from fxquant.op_view import attribute
from fxquant.operators import DEQUANTIZE, QUANTIZE


def verify(gm: QuantGraphModule, *, made_by: str) -> None:
    """Check the graph of ``gm`` against every invariant.

    Args:
        gm: the module.
        made_by: the pass that ran last, named in the error.

    Raises:
        GraphError: an invariant is broken; the message names the pass, the node and the invariant.
    """
    problems = [
        *_lint(gm),
        *_signature(gm),
        *_dead_nodes(gm),
        *_records(gm),
        *_quantization(gm),
    ]
    if problems:
        raise GraphError(f"after pass {made_by!r}: {'; '.join(problems)}")


def _lint(gm: QuantGraphModule) -> list[str]:
    with gm.packing_put_off(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packed constants are neither parameters nor buffers
        try:
            gm.graph.lint()
        except RuntimeError as error:
            return [f"lint: {error}"]
    return []


def _signature(gm: QuantGraphModule) -> list[str]:
    names = tuple(str(n.target) for n in gm.graph.nodes if n.op == "placeholder")
    if gm.state.signature and names != gm.state.signature:
        return [f"the inputs were {gm.state.signature} and are now {names}"]
    return []


def _dead_nodes(gm: QuantGraphModule) -> list[str]:
    return [
        f"node {node.name!r} ({node.target}) is dead: nobody reads it"
        for node in gm.graph.nodes
        if not node.users
        and node.op not in ("placeholder", "output")
        and record_of(node).made_by  # what the user's code computes in vain is the user's
    ]


def _records(gm: QuantGraphModule) -> list[str]:
    if not gm.state.shapes_known:
        return []
    return [
        f"node {node.name!r} has no value record"
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_module", "call_method")
        and not record_of(node).has_value
    ]


def _quantization(gm: QuantGraphModule) -> list[str]:
    problems: list[str] = []
    lowered = gm.state.stage is Stage.LOWERED
    for node in gm.graph.nodes:
        if node.target is QUANTIZE:
            problems.extend(_quantize(gm, node, lowered=lowered))
        elif node.target is DEQUANTIZE:
            problems.extend(_dequantize(gm, node))
    return problems


def _quantize(gm: QuantGraphModule, node: fx.Node, *, lowered: bool) -> list[str]:
    _, scale, zero_point, quant_min, quant_max, dtype, *axis = node.args
    problems = _parameters(gm, node, scale, zero_point, (quant_min, quant_max))
    problems.extend(_axis(gm, node, scale, *axis))
    value = record_of(node).value
    if isinstance(value, TensorRecord) and value.dtype != dtype:
        problems.append(
            f"quantize {node.name!r} gives {dtype}, its value record says {value.dtype}"
        )
    strangers = [
        user.name
        for user in node.users
        if user.target not in (DEQUANTIZE, to_quantized) and not reads_only_shape(user)
    ]
    if strangers and not lowered:
        problems.append(
            f"quantize {node.name!r} dangles: {', '.join(strangers)} read integers without a"
            " dequantize"
        )
    return problems


def _dequantize(gm: QuantGraphModule, node: fx.Node) -> list[str]:
    source, scale, zero_point, *axis = node.args
    problems = _parameters(gm, node, scale, zero_point, None)
    problems.extend(_axis(gm, node, scale, *axis))
    value = record_of(source).value if isinstance(source, fx.Node) else None
    if isinstance(value, TensorRecord) and value.dtype.is_floating_point:
        problems.append(f"dequantize {node.name!r} reads {value.dtype}, not integers")
    if isinstance(source, fx.Node) and source.target is QUANTIZE:
        wanted = source.args[1:3]
        if (str(wanted[0]), str(wanted[1])) != (str(scale), str(zero_point)):
            if _same_constants(wanted, (scale, zero_point)):
                return problems
            problems.append(
                f"dequantize {node.name!r} reads {source.name!r} with other parameters"
                f" ({scale}, {zero_point}) than it was quantized with ({wanted[0]}, {wanted[1]})"
            )
    return problems


def _same_constants(left: tuple[object, ...], right: tuple[object, ...]) -> bool:
    return all(
        isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.target == b.target
        for a, b in zip(left, right, strict=True)
    )


def _parameters(
    gm: QuantGraphModule,
    node: fx.Node,
    scale: object,
    zero_point: object,
    bounds: tuple[object, object] | None,
) -> list[str]:
    problems = []
    scale_value, zero_value = _constant(gm, scale), _constant(gm, zero_point)
    if scale_value is not None:
        wrong = scale_value[~(torch.isfinite(scale_value) & (scale_value > 0))]
        if wrong.numel():
            problems.append(
                f"{node.name!r} has scale {wrong[0].item()}; a scale must be finite and > 0"
            )
    if zero_value is not None and bounds is not None:
        low, high = bounds
        assert isinstance(low, int) and isinstance(high, int)
        wrong = zero_value[(zero_value < low) | (zero_value > high)]
        if wrong.numel():
            problems.append(f"{node.name!r} has zero point {wrong[0].item()} outside {low}..{high}")
    return problems


def _axis(gm: QuantGraphModule, node: fx.Node, scale: object, axis: object = None) -> list[str]:
    value = record_of(node).value
    if not isinstance(axis, int) or not isinstance(value, TensorRecord):
        return []
    if not 0 <= axis < len(value.shape):
        return [f"{node.name!r} has axis {axis}, its shape is {value.shape}"]
    scales = _constant(gm, scale)
    if scales is not None and scales.numel() != value.shape[axis]:
        return [
            f"{node.name!r} has {scales.numel()} scales for {value.shape[axis]} channels on axis"
            f" {axis}"
        ]
    return []


def _constant(gm: QuantGraphModule, argument: object) -> torch.Tensor | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        value = attribute(gm, str(argument.target))
        return value if isinstance(value, torch.Tensor) else None
    return None
