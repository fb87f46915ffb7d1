"""One kernel's result beside what the definition makes of the same integers."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_view import Op, attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.parity.recording import Values
from fxquant.parity.region import ROUNDINGS, UNIT, Region
from fxquant.parity.report import ParityRow
from fxquant.specs import QParams, QuantSpec, quantize

_FINISHING: Final = ("aten::clamp on int8", "aten::clamp on bytes", "interleave on bytes")


def compare(gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: Values) -> ParityRow:
    """The row of the reference node ``node``: a quantize, or an op whose kernel writes floats."""
    if node.target is QUANTIZE:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.name in values:
            return _compare_quantize(gm, node, lowered, values[source.name], values[node.name])
        return _compare_integers(gm, node, lowered, values)
    if node.target is DEQUANTIZE:
        return _compare_dequantize(gm, node, lowered, values)
    return _compare_floats(gm, node, lowered, values)


def _constant(gm: nn.Module, argument: object) -> Tensor:
    assert isinstance(argument, fx.Node)
    value = attribute(gm, str(argument.target))
    assert isinstance(value, Tensor)
    return value


def _compare_quantize(
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, x: Tensor, given: Tensor
) -> ParityRow:
    """Quantizing a float value that both graphs have: exact, ties included."""
    _, scale, zero_point, low, high, dtype = node.args[:6]
    assert isinstance(low, int) and isinstance(high, int) and isinstance(dtype, torch.dtype)
    spec = QuantSpec(dtype=dtype, qscheme=torch.per_tensor_affine, quant_min=low, quant_max=high)
    expected = quantize(x, QParams(_constant(gm, scale), _constant(gm, zero_point), spec))
    distance = (given.to(torch.int32) - expected.to(torch.int32)).abs()
    name = str(node.all_input_nodes[0].name)
    return _row(name, "quantize", lowered, distance, torch.zeros_like(distance, dtype=torch.bool))


def _compare_dequantize(
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: Values
) -> ParityRow:
    """Integers that a float op, or the caller, reads: exact."""
    source = node.all_input_nodes[0]
    scale, zero_point = _parameters_of(gm, source, values)
    integers = values[source.name].to(torch.int32)
    distance = ((values[node.name] - (integers - zero_point) * scale) / scale).abs()
    name = source.all_input_nodes[0].name
    return _row(name, "dequantize", lowered, distance, torch.zeros_like(distance, dtype=torch.bool))


def _compare_integers(
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: Values
) -> ParityRow:
    last, _, _, low, high = node.args[:5]
    assert isinstance(last, fx.Node) and isinstance(low, int) and isinstance(high, int)
    region = Region(gm, values, last)
    result = region.value(last)
    scale, zero_point = (p.to(torch.float64) for p in _parameters_of(gm, node, values))
    exact = result / scale + zero_point
    expected = exact.round().clamp(low, high)
    distance = (values[node.name].to(torch.float64) - expected).abs()
    error = region.error(result) / scale + ROUNDINGS * UNIT * zero_point.abs()
    halfway = (exact - exact.floor() - 0.5).abs() <= error
    return _row(last.name, _kinds(region), lowered, distance, halfway)


def _compare_floats(
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: Values
) -> ParityRow:
    op = op_of(gm, node)
    if op is not None and op.kind.definition:
        return _compare_recurrent(gm, op, lowered, values)
    region = Region(gm, values, node)
    result = region.value(node)
    error = region.error(result)
    distance = (values[node.name].to(torch.float64) - result).abs() / error.clamp(min=1e-300)
    return _floating_row(node.name, _kinds(region), lowered, distance)


def _compare_recurrent(gm: QuantGraphModule, op: Op, lowered: fx.Node, values: Values) -> ParityRow:
    """A recurrent module against its definition in float32.

    A state that is quantized near a tie may be rounded the other way, and every later step sees
    that: the bound is two steps of the largest output.
    """
    region = Region(gm, values, op.node)

    def given(argument: fx.Node) -> Any:
        value = values[argument.name] if argument.name in values else region.value(argument)
        return fx.node.map_aggregate(value, _narrow)

    args = fx.map_arg(op.node.args, given)
    expected = _tensors(op.kind.functions[0](*args))
    found = _tensors(values[op.node.name])
    bounds = [2 * e.abs().max() / 127 if e.numel() else e for e in expected]
    parts = [
        ((f - e).abs() / bound.clamp(min=1e-30)).flatten()
        for f, e, bound in zip(found, expected, bounds, strict=True)
        if e.is_floating_point()
    ]
    distance = torch.cat(parts)
    return _floating_row(op.node.name, op.name, lowered, distance)


def _narrow(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.float64:
        return value.to(torch.float32)
    return value


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _parameters_of(
    gm: QuantGraphModule, quantize_node: fx.Node, values: Values
) -> tuple[Tensor, Tensor]:
    """With which the integers that stand for ``quantize_node`` were made.

    A kernel that moves integers keeps those of a quantized tensor that came from outside.
    """
    found = values.parameters.get(quantize_node.name)
    scale, zero_point = (_constant(gm, a) for a in quantize_node.args[1:3])
    return found or (scale, zero_point)


def _row(name: str, kind: str, lowered: fx.Node, distance: Tensor, halfway: Tensor) -> ParityRow:
    one = distance == 1
    return ParityRow(
        name=name,
        kind=kind,
        kernel=_kernel(lowered),
        elements=distance.numel(),
        off_by_one=int(one.sum()),
        ties=int((one & halfway).sum()),
        more=int((distance > 1).sum()),
        max_lsb=float(distance.max()) if distance.numel() else 0.0,
    )


def _floating_row(name: str, kind: str, lowered: fx.Node, distance: Tensor) -> ParityRow:
    """Of distances in units of the error bound."""
    return ParityRow(
        name=name,
        kind=kind,
        kernel=_kernel(lowered),
        elements=distance.numel(),
        off_by_one=0,
        ties=0,
        more=int((distance > 1).sum()),
        max_lsb=float(distance.max()) if distance.numel() else 0.0,
        floating=True,
    )


def _kinds(region: Region) -> str:
    return "+".join(op.name for op, _ in region.ops) or "none"


def _kernel(lowered: fx.Node) -> str:
    """The kernel of a lowered node, and what finishes its result: ``kernel, clamp, ...``."""
    found = [record_of(lowered).kernel]
    while found[0] in _FINISHING:
        source = lowered.args[0]
        assert isinstance(source, fx.Node)
        lowered = source
        if record_of(lowered).kernel:
            found.insert(0, record_of(lowered).kernel)
    return ", ".join(found)
