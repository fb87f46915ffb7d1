"""parity: every int8 kernel against the definition of its op, fed the same integers.

The lowered graph runs once, and each kernel's inputs and output are kept. For every result, the
region of the reference graph that it stands for (``dequantize - op - epilogues - quantize``) is
then evaluated *in float64 on the integers that the kernel was given*, so differences do not
accumulate and each belongs to one kernel::

    v = f(dequantize(q1), dequantize(q2), ...) / scale + zero_point        the definition, float64
    expected = clamp(round_half_even(v), quant_min, quant_max)

PyTorch's kernels sum integers exactly and then requantize in float32: one rounding each for
``s_x * s_w``, the product with the sum, the float bias, ``1 / s_y`` and the zero point. They can
differ from ``expected`` only where ``v`` is so close to a rounding boundary that these roundings
decide (:data:`ROUNDINGS`), or where it is exactly halfway and a kernel breaks the tie another way
(``aten::avg_pool2d`` rounds before it adds the zero point on channels_last inputs). Such elements
are counted as *ties*: both integers are half a step from the truth. Everything else is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fxquant.autocast import outside_modes
from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule, Stage, parts_below
from fxquant.kernels import as_bytes, as_quantized
from fxquant.metadata import record_of
from fxquant.op_view import Op, attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, TO_DTYPE
from fxquant.passes.inline_references import inlined
from fxquant.passes.lower import Lower
from fxquant.passes.prepack import Prepack
from fxquant.passes.shift_signed import shifted
from fxquant.quantize_fx import convert_to_reference_fx
from fxquant.shapes import as_arguments
from fxquant.specs import QParams, QuantSpec, quantize

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

_UNIT: Final[float] = 2.0**-24
_FINISHING: Final = ("aten::clamp on int8", "aten::clamp on bytes", "interleave on bytes")
_MADE_HERE: Final = (Lower.name, Prepack.name)
_DEQUANTIZING: Final = (torch.dequantize, "dequantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One kernel against the definition.

    Attributes:
        name: the last op that the kernel carries out.
        kind: the kinds of all of them, such as ``conv2d+relu``.
        kernel: what ran.
        elements: how many were compared.
        off_by_one: how many integers differ by one.
        ties: how many of these are halfway, or within float32 rounding of it.
        more: how many differ by more than one.
        max_lsb: the largest difference. For a kernel that writes floats: in units of its rounding
            error bound.
        floating: the kernel writes floats; then ``more`` counts elements beyond the error bound.
    """

    name: str
    kind: str
    kernel: str
    elements: int
    off_by_one: int
    ties: int
    more: int
    max_lsb: float
    floating: bool = False

    @property
    def fraction(self) -> float:
        """The part of the elements that differ."""
        return (self.off_by_one + self.more) / max(self.elements, 1)

    @property
    def unexplained(self) -> int:
        """How many elements differ and are no ties."""
        return self.off_by_one - self.ties + self.more

    @property
    def ok(self) -> bool:
        """Whether every difference is a tie."""
        return self.unexplained == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All kernels of a model against their definitions; ``print`` shows a table.

    Attributes:
        rows: one per kernel, in the order in which they ran.
    """

    rows: tuple[ParityRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[ParityRow, ...]:
        """The rows that are not."""
        return tuple(row for row in self.rows if not row.ok)

    def __str__(self) -> str:
        table = [
            (
                row.name,
                row.kind,
                row.kernel,
                row.elements,
                row.off_by_one,
                row.ties,
                row.more,
                f"{row.max_lsb:.3g}" + (" of bound" if row.floating else ""),
                f"{100 * row.fraction:.3f} %",
                "ok" if row.ok else "WRONG",
            )
            for row in self.rows
        ]
        headers = (
            "op", "kind", "kernel", "elements", "off by 1", "of them ties", "more", "max LSB",
            "differ", "",
        )  # fmt: skip
        return tabulate(table, headers=headers, disable_numparse=True)


@outside_modes
def parity(
    prepared_or_reference: QuantGraphModule, int8_model: QuantGraphModule, inputs: Any
) -> ParityReport:
    """Compare every kernel of ``int8_model`` with the definition of its op.

    Args:
        prepared_or_reference: the prepared model that ``int8_model`` was converted from, or the
            result of :func:`fxquant.convert_to_reference_fx` on it.
        int8_model: the result of :func:`fxquant.convert_fx`.
        inputs: as ``example_inputs`` of :func:`fxquant.prepare_fx`.

    Returns:
        One row per kernel, in the order in which they ran; those in an island behind the others.

    Raises:
        ConfigError: the two models are not what they should be, or do not belong together.
    """
    args, kwargs = as_arguments(inputs)
    with torch.no_grad():
        rows = tuple(_rows(_reference(prepared_or_reference), int8_model, args, kwargs))
    return ParityReport(rows=rows)


def _rows(
    whole: QuantGraphModule,
    lowered: QuantGraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Iterator[ParityRow]:
    """The kernels of a graph, then those of the graphs in its islands, each at its first call."""
    reference = shifted(inlined(whole))
    _check_lowered(reference, lowered)
    nodes = {node.name: node for node in reference.graph.nodes}
    recorder = _Recorder(lowered, nodes)
    parts = list(parts_below(lowered))
    with _first_calls(parts) as calls:
        recorder.run(*_in_order(lowered, args, kwargs))
    for name, node in recorder.kernels.items():
        yield _compare(reference, nodes[name], node, recorder.values)
    for theirs, part in zip(parts_below(whole), parts, strict=True):
        if id(part) in calls:
            yield from _rows(theirs, part, *calls[id(part)])


@contextmanager
def _first_calls(
    parts: Iterable[nn.Module],
) -> Iterator[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Notes the arguments of the first call of each module, by its id."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in found:
            found[id(module)] = copy.deepcopy((args, kwargs))

    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _in_order(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments as an interpreter takes them, by position."""
    inputs = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
    values = list(args)
    for name in list(inputs)[len(args) :]:
        if name in kwargs:
            values.append(kwargs[name])
        elif inputs[name].args:
            values.append(inputs[name].args[0])
    return values


def _reference(model: QuantGraphModule) -> QuantGraphModule:
    stage = model.state.stage if isinstance(model, QuantGraphModule) else None
    if stage is Stage.PREPARED and model.state.target != "x86-compat":
        return convert_to_reference_fx(model)
    if stage is Stage.REFERENCE:
        return model
    if stage is Stage.PREPARED:
        raise ConfigError(
            "parity() got a model that fxquant.compat prepared, which only fxquant.compat converts"
            " as its configs say: pass the result of its convert_to_reference_fx"
        )
    raise ConfigError(
        "parity() takes a prepared or a reference model first, got"
        f" {type(model).__name__ if stage is None else f'a model that is {stage.value}'}"
    )


def _check_lowered(reference: QuantGraphModule, lowered: QuantGraphModule) -> None:
    if not isinstance(lowered, QuantGraphModule) or lowered.state.stage is not Stage.LOWERED:
        raise ConfigError(
            f"parity() takes the result of convert_fx second, got {type(lowered).__name__}"
        )
    names = {node.name for node in reference.graph.nodes}
    strangers = [
        record_of(node).stands_for
        for node in lowered.graph.nodes
        if record_of(node).stands_for not in ("", *names)
    ]
    theirs = dict(reference.named_buffers())
    different = [
        name
        for name, value in lowered.named_buffers()
        if name in theirs and not torch.equal(value, theirs[name])
    ]
    if strangers or different:
        shown = ", ".join(repr(name) for name in (*strangers, *different)[:4])
        raise ConfigError(
            "the two models do not belong together: they differ in"
            f" {len(strangers) + len(different)} op(s) or buffer(s) ({shown}). Convert both from"
            " the same prepared model, without calibrating in between"
        )


class _Values(dict[str, Any]):
    """Reference node name -> integers, float tensor or plain value of the lowered graph.

    Attributes:
        parameters: the same -> scale and zero point, of quantized tensors that come from outside,
            and of what kernels only move of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, tuple[Tensor, Tensor]] = {}


class _Recorder(fx.Interpreter):
    """Runs the lowered graph and keeps what each reference node's value was there.

    Attributes:
        values: what was seen.
        foreign: lowered node -> the parameters that came with its value from outside.
        kernels: reference node name -> the lowered node that stands for it.
    """

    def __init__(self, lowered: QuantGraphModule, reference: Mapping[str, fx.Node]) -> None:
        super().__init__(lowered)
        self.reference = reference
        self.values = _Values()
        self.foreign: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.kernels: dict[str, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = record_of(n).stands_for
        if name:
            self.kernels[name] = n
        elif n.name in self.reference and record_of(n).made_by not in _MADE_HERE:
            name = n.name  # an op that stayed in floating point, or an input
        self._follow(n, value)
        if name:
            self.values[name] = _detached(value)
            if n in self.foreign:
                self.values.parameters[name] = self.foreign[n]
        return value

    def _follow(self, n: fx.Node, value: Any) -> None:
        """Note the parameters of a value from outside, and of what is only moved of it."""
        if not isinstance(value, Tensor):
            return
        record = record_of(n)
        moves = record.annotation is not None and record.annotation.shares
        known = [self.foreign[source] for source in n.all_input_nodes if source in self.foreign]
        if record.gives_quantized and value.is_quantized:
            self.foreign[n] = _parameters(value)
        elif known and (moves or n.target in (as_bytes, as_quantized)):
            self.foreign[n] = _parameters(value) if value.is_quantized else known[0]


def _detached(value: Any) -> Any:
    """A copy of a tensor, as integers where it is quantized: kernels overwrite their inputs."""
    if isinstance(value, (tuple, list)):
        return fx.node.map_aggregate(value, _detached)
    if not isinstance(value, Tensor):
        return value
    return value.int_repr() if value.is_quantized else value.clone()


def _parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a quantized tensor, which keeps the scale in float64."""
    scale = torch.tensor(x.q_scale(), dtype=torch.float64).to(torch.float32)
    return scale, torch.tensor(x.q_zero_point(), dtype=torch.int32)


class _Region:
    """Evaluates reference nodes in float64, back to what the lowered graph has in their place.

    Attributes:
        ops: the ops evaluated, in order, with their float64 results.
        addends: largest magnitudes of terms that enter a sum beside the op's own result.
    """

    def __init__(self, gm: QuantGraphModule, values: _Values, last: fx.Node) -> None:
        self.gm = gm
        self.values = values
        self.last = last
        self.ops: list[tuple[Op, Tensor]] = []
        self.addends = 0.0
        self._known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The float64 value of ``node``."""
        if node not in self._known:
            self._known[node] = _wide(self._evaluate(node))
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
                _wide(op.constant(n)) for n in ("running_mean", "running_var", "weight", "bias")
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
        return ROUNDINGS * _UNIT * (magnitude + self.addends) + approximation


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value


def _constant(gm: nn.Module, argument: object) -> Tensor:
    assert isinstance(argument, fx.Node)
    value = attribute(gm, str(argument.target))
    assert isinstance(value, Tensor)
    return value


def _compare(gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: _Values) -> ParityRow:
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
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: _Values
) -> ParityRow:
    """Integers that a float op, or the caller, reads: exact."""
    source = node.all_input_nodes[0]
    scale, zero_point = _parameters_of(gm, source, values)
    integers = values[source.name].to(torch.int32)
    distance = ((values[node.name] - (integers - zero_point) * scale) / scale).abs()
    name = source.all_input_nodes[0].name
    return _row(name, "dequantize", lowered, distance, torch.zeros_like(distance, dtype=torch.bool))


def _compare_integers(
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: _Values
) -> ParityRow:
    last, _, _, low, high = node.args[:5]
    assert isinstance(last, fx.Node) and isinstance(low, int) and isinstance(high, int)
    region = _Region(gm, values, last)
    result = region.value(last)
    scale, zero_point = (p.to(torch.float64) for p in _parameters_of(gm, node, values))
    exact = result / scale + zero_point
    expected = exact.round().clamp(low, high)
    distance = (values[node.name].to(torch.float64) - expected).abs()
    error = region.error(result) / scale + ROUNDINGS * _UNIT * zero_point.abs()
    halfway = (exact - exact.floor() - 0.5).abs() <= error
    return _row(last.name, _kinds(region), lowered, distance, halfway)


def _compare_floats(
    gm: QuantGraphModule, node: fx.Node, lowered: fx.Node, values: _Values
) -> ParityRow:
    op = op_of(gm, node)
    if op is not None and op.kind.definition:
        return _compare_recurrent(gm, op, lowered, values)
    region = _Region(gm, values, node)
    result = region.value(node)
    error = region.error(result)
    distance = (values[node.name].to(torch.float64) - result).abs() / error.clamp(min=1e-300)
    return ParityRow(
        name=node.name,
        kind=_kinds(region),
        kernel=_kernel(lowered),
        elements=distance.numel(),
        off_by_one=0,
        ties=0,
        more=int((distance > 1).sum()),
        max_lsb=float(distance.max()) if distance.numel() else 0.0,
        floating=True,
    )


def _compare_recurrent(
    gm: QuantGraphModule, op: Op, lowered: fx.Node, values: _Values
) -> ParityRow:
    """A recurrent module against its definition in float32.

    A state that is quantized near a tie may be rounded the other way, and every later step sees
    that: the bound is two steps of the largest output.
    """
    region = _Region(gm, values, op.node)

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
    return ParityRow(
        name=op.node.name,
        kind=op.name,
        kernel=_kernel(lowered),
        elements=distance.numel(),
        off_by_one=0,
        ties=0,
        more=int((distance > 1).sum()),
        max_lsb=float(distance.max()) if distance.numel() else 0.0,
        floating=True,
    )


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
    gm: QuantGraphModule, quantize_node: fx.Node, values: _Values
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


def _kinds(region: _Region) -> str:
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
