"""The region of the reference graph that a kernel stands for, evaluated in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import Op, attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE_DYNAMIC, TO_DTYPE
from fxquant.parity.recording import Values

ROUNDINGS: Final[int] = 16
"""Float32 roundings between the exact sum and the integer, each of half an ulp of the largest term.

A convolution with a residual has eight (the sum, ``s_x * s_w``, their product, the bias, two for
the residual, ``1 / s_y``, the zero point); some of their operands are rounded themselves.
"""

APPROXIMATION: Final[Mapping[str, float]] = {
    "sigmoid": 2**-20,
    "tanh": 2**-20,
    "silu": 2**-20,
    "gelu": 2**-19,
}
"""Kind -> how far oneDNN's approximation of the function is off, relative to its argument."""

UNIT: Final[float] = 2.0**-24
_DEQUANTIZING: Final = (torch.dequantize, "dequantize")


class Region:
    """Evaluates reference nodes in float64, back to what the lowered graph has in their place.

    Attributes:
        ops: the ops evaluated, in order, with their float64 results.
        addends: largest magnitudes of terms that enter a sum beside the op's own result.
    """

    def __init__(self, gm: QuantGraphModule, values: Values, last: fx.Node) -> None:
        self.gm = gm
        self.values = values
        self.last = last
        self.ops: list[tuple[Op, Tensor]] = []
        self.addends = 0.0
        self._known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The float64 value of ``node``."""
        if node not in self._known:
            self._known[node] = wide(self._evaluate(node))
        return self._known[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.target is DEQUANTIZE:
            return self._dequantize(node)
        if node.target in _DEQUANTIZING and node.all_input_nodes[0].name in self.values:
            return self._read(node.all_input_nodes[0].name)
        if node.name in self.values and node is not self.last:
            return self.values[node.name]
        if node.op == "get_attr":
            return attribute(self.gm, str(node.target))
        if node.target is QUANTIZE_DYNAMIC:
            return self._quantize_dynamic(node)
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        if node.op == "call_module":
            module = copy.deepcopy(self.gm.get_submodule(str(node.target)))
            result = module.to(torch.float64)(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        op = op_of(self.gm, node)
        if op is not None and isinstance(result, Tensor):
            self.ops.append((op, result))
            self._add_terms(op)
        return result

    def _quantize_dynamic(self, node: fx.Node) -> Any:
        """Integers, scale and zero point of a float value as the kernel was given it."""
        source, *options = node.args
        assert isinstance(source, fx.Node)
        return QUANTIZE_DYNAMIC(self.value(source).to(torch.float32), *options)

    def _dequantize(self, node: fx.Node) -> Tensor:
        source, scale_node, zero_node, *axis = node.args
        assert isinstance(source, fx.Node)
        if source.name in self.values.parameters:
            return self._read(source.name)
        integers = self.values[source.name] if source.name in self.values else self.value(source)
        scale, zero_point = (self.parameter(a) for a in (scale_node, zero_node))
        if axis and axis[0] is not None:
            shape = [1] * integers.dim()
            assert isinstance(axis[0], int)
            shape[axis[0]] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        wide: Tensor = integers.to(torch.float64) - zero_point.to(torch.float64)
        return wide * scale.to(torch.float64)

    def _read(self, name: str) -> Tensor:
        """The float value of a quantized tensor, by the parameters that it has."""
        scale, zero_point = self.values.parameters[name]
        integers = self.values[name].to(torch.float64) - zero_point.to(torch.float64)
        return integers * scale.to(torch.float64)  # type: ignore[no-any-return]  # values are Any

    def parameter(self, argument: object) -> Tensor:
        """A scale or zero point: a buffer, or what was chosen at run time."""
        assert isinstance(argument, fx.Node)
        value = self.value(argument)
        assert isinstance(value, Tensor)
        return value

    def _add_terms(self, op: Op) -> None:
        """Note what is added to the sum in float32, whose rounding the result inherits."""
        if op.name == "add":
            for argument in op.activations:
                self.addends += self._reach(argument)
        elif op.name == "batch_norm":
            mean, var, weight, bias = (
                wide(op.constant(n)) for n in ("running_mean", "running_var", "weight", "bias")
            )
            factor = weight / (var + float(op.arguments["eps"])).sqrt()
            reach = self._reach(op.activations[0])
            self.addends += float((bias.abs() + (mean * factor).abs()).max())
            self.addends += float(factor.abs().max()) * reach
        elif not op.kind.activations:  # a table: scale * q and the offset meet
            self.addends += self._reach(op.arguments["weight"])
        else:
            bias = op.arguments.get("bias")
            if isinstance(bias, fx.Node):
                self.addends += float(self.value(bias).abs().max())
            weight = op.arguments.get("weight")
            if isinstance(weight, fx.Node) and weight.target in (TO_DTYPE, "dequantize"):
                self.addends += self._sum_of_magnitudes(op.activations[0], weight)

    def _sum_of_magnitudes(self, x: fx.Node, weight: fx.Node) -> float:
        """The largest sum of ``|x| * |w|`` of a linear: its kernel adds in float32."""
        sums = torch.nn.functional.linear(self.value(x).abs(), self.value(weight).abs())
        return float(sums.max()) if sums.numel() else 0.0

    def _reach(self, node: fx.Node) -> float:
        """The largest magnitude while dequantizing ``node``: ``q * s`` and ``z * s`` meet there."""
        value = self.value(node)
        if not isinstance(value, Tensor) or value.numel() == 0:
            return 0.0
        offset = 0.0
        if node.target in (DEQUANTIZE, *_DEQUANTIZING):
            source = node.all_input_nodes[0].name
            scale, zero_point = self.values.parameters.get(source) or tuple(
                self.parameter(a) for a in node.args[1:3]
            )
            offset = float((scale * zero_point).abs().max())
        return float(value.abs().max()) + offset

    def error(self, result: Tensor) -> Tensor:
        """How far float32 arithmetic may take each element of ``result`` from its value."""
        magnitude = torch.zeros_like(result)
        approximation = torch.zeros_like(result)
        previous: Tensor | None = None
        for op, value in self.ops:
            if value.shape == result.shape:
                magnitude += value.abs()
            if op.name in APPROXIMATION and previous is not None:
                approximation += APPROXIMATION[op.name] * previous.abs()
            if op.name == "interpolate":  # source indices are float32 numbers of that size
                magnitude += value.abs().max() * max(value.shape[2:])
            previous = value if value.shape == result.shape else None
        return ROUNDINGS * UNIT * (magnitude + self.addends) + approximation


def wide(value: Any) -> Any:
    """A float tensor in float64; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value
