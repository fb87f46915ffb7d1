"""to-reference: observers become ``dequantize(quantize(x))``, weights become integers.

The result runs in floating point on exactly the values that int8 kernels see, and shows every
scale, zero point and integer weight as a buffer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationWarning, NonFiniteStatisticError
from fxquant.functional import FUNCTIONS, functional_call
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.kernel_probe import dynamic_quant_max
from fxquant.metadata import (
    Annotation,
    TensorRecord,
    add_reason,
    fused_with,
    record_of,
    update_record,
)
from fxquant.observed import (
    in_half_precision,
    is_ready,
    qparams_of,
    spec_of_observer,
    unite,
)
from fxquant.op_view import Form, Op, attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, TO_DTYPE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.insert_observers import OBSERVER_PREFIX
from fxquant.qconfig_mapping import QConfigMapping, resolve
from fxquant.recurrent import weight_names
from fxquant.reference_modules import REFERENCE_BY_FLOAT, ReferenceRelu, reference_form
from fxquant.rewriter import GraphRewriter
from fxquant.specs import QParams, QuantSpec
from fxquant.weight_fit import WeightFitter, tell

BufferNames = Callable[[QuantGraphModule, fx.Node], tuple[str, str]]


@dataclass(frozen=True)
class ToReference(Pass):
    """Compute all parameters and put quantize and dequantize where observers were.

    Observers of one sharing group unite their statistics first, so the group's range is that of
    the union, whatever the order of the branches. A weight that several calls read is quantized
    once. Biases stay in floating point, as in PyTorch's kernels.

    Quantize saturates at the ends of the spec's range. A halved range (``0..127`` in uint8) decides
    the scale only where the target has kernels: they, and ONNX's QuantizeLinear, saturate at the
    ends of the storage (:meth:`fxquant.targets.table.Target.saturation`).

    Attributes:
        buffer_names: of the scale and the zero point, for the value that an observer watches.
        keep_modules: modules with weights become modules of :mod:`fxquant.reference_modules`
            instead of calls of functions on integers.
    """

    buffer_names: BufferNames = field(default_factory=lambda: names_of_value)
    keep_modules: bool = False

    name: ClassVar[str] = "to-reference"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Convert activations, then the values that share their parameters, then weights."""
        rewriter = GraphRewriter(gm, self.name)
        observers = [n for n in gm.graph.nodes if is_observer(n)]
        _observe_weights(gm, observers)
        _warn_uncalibrated(gm, observers, context)
        parameters = _Parameters(rewriter, observers, context, self.buffer_names)
        for node in observers:
            _replace_observer(rewriter, node, parameters)
        for node in list(gm.graph.nodes):
            _quantize_moved(rewriter, node, parameters)
        fitter = WeightFitter(gm, context.target.select_kernel, context.weights)
        (_ModuleWeights if self.keep_modules else _Weights)(rewriter, fitter).run()
        tell(gm, fitter.reductions, context.diagnostics, "weights were fitted to this machine")
        gm.update_state(stage=Stage.REFERENCE)
        rewriter.changes += 1
        return PassResult(changes=rewriter.finish())


def names_of_value(gm: QuantGraphModule, observer: fx.Node) -> tuple[str, str]:
    """``<value>_scale`` and ``<value>_zero_point``; numbered where they are taken."""
    value = observer.all_input_nodes[0].name
    return f"{value}_scale", f"{value}_zero_point"


@dataclass(frozen=True)
class TorchNames:
    """``<path>[_input]_scale_<k>`` as torch.ao names them, with the smallest free number.

    The path is that of the module that gives the value, a fused one's that of its first part, or,
    for a value without a qconfig (``_input``), that reads it; a function's is that of the module
    that calls it, and a functional linear speaks before other readers.

    Attributes:
        mapping: says whether attributes, which are no ops, have a qconfig.
    """

    mapping: QConfigMapping = field(default_factory=QConfigMapping)
    _next: WeakKeyDictionary[QuantGraphModule, dict[str, int]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __call__(self, gm: QuantGraphModule, observer: fx.Node) -> tuple[str, str]:
        """The names of scale and zero point for the value that ``observer`` watches."""
        value = observer.all_input_nodes[0]
        own = self._has_qconfig(value)
        speaker = _first_part(value) if own else _reader(gm, observer)
        path = str(speaker.target) if speaker.op == "call_module" else record_of(speaker).scope
        prefix = path.replace(".", "_") + ("" if own else "_input")
        numbers = self._next.setdefault(gm, {})  # below them all are taken
        number = numbers.get(prefix, 0)
        while hasattr(gm, f"{prefix}_scale_{number}"):
            number += 1
        numbers[prefix] = number
        return f"{prefix}_scale_{number}", f"{prefix}_zero_point_{number}"

    def _has_qconfig(self, value: fx.Node) -> bool:
        record = record_of(value)
        if value.op != "get_attr":
            return record.qconfig is not None
        return resolve(self.mapping, module_path=record.scope).qconfig is not None


def _first_part(value: fx.Node) -> fx.Node:
    """The module that ``value`` is fused into, else ``value``."""
    fusion = record_of(value).fusion
    if fusion is None:
        return value
    first = next(node for node in fused_with(value) if node.name == fusion.first)
    return first if first.op == "call_module" else value


def _reader(gm: QuantGraphModule, observer: fx.Node) -> fx.Node:
    """Who reads an observed value: a functional linear where there is one, else the first."""
    readers = list(observer.users)
    linears = [node for node in readers if node.target is torch.nn.functional.linear]
    return next(iter((*linears, *readers)), observer.all_input_nodes[0])


def is_observer(node: fx.Node) -> bool:
    """Whether ``node`` calls an observer that :class:`InsertObservers` inserted."""
    return node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)


def _observe_weights(gm: QuantGraphModule, observers: list[fx.Node]) -> None:
    """Let observers of weights in the graph look at the final weight, calibrated or not."""
    for node in observers:
        source = node.all_input_nodes[0]
        if reads_weight(gm, node):
            with torch.no_grad():
                gm.get_submodule(str(node.target))(attribute(gm, str(source.target)))


def reads_weight(gm: QuantGraphModule, node: fx.Node) -> bool:
    """Whether ``node`` looks at a tensor of the module that an op reads as its weight."""
    if node.all_input_nodes[0].op != "get_attr":
        return False
    ops = (op_of(gm, user) for user in node.users)
    return any(op is not None and op.arguments.get("weight") is node for op in ops)


def _warn_uncalibrated(
    gm: QuantGraphModule, observers: list[fx.Node], context: PassContext
) -> None:
    blind = [
        n.all_input_nodes[0].name
        for n in observers
        if not is_ready(gm.get_submodule(str(n.target)))
    ]
    if not blind:
        return
    shown = ", ".join(repr(name) for name in blind[:5])
    more = f" and {len(blind) - 5} more" if len(blind) > 5 else ""
    what = "no observer" if len(blind) == len(observers) else f"{len(blind)} observers"
    seen = "has seen data" if len(blind) == len(observers) else "have seen no data"
    context.diagnostics.warn(
        f"{what} {seen} ({shown}{more}): must run observer before calling calculate_qparams."
        " Returning default values. (scale 1, zero point 0). Run calibrate(prepared, data) before"
        " convert_fx, with data that reach these ops",
        CalibrationWarning,
    )


class _Parameters:
    """Scale and zero-point buffers per observer, and per sharing group."""

    def __init__(
        self,
        rewriter: GraphRewriter,
        observers: list[fx.Node],
        context: PassContext,
        buffer_names: BufferNames,
    ) -> None:
        self.buffer_names = buffer_names
        self.rewriter = rewriter
        self.context = context
        self.groups: dict[int, list[fx.Node]] = {}
        for node in observers:
            group = record_of(node).share_group
            if group is not None:
                self.groups.setdefault(group, []).append(node)
        self.made: dict[object, tuple[str, str, QuantSpec]] = {}

    def of_observer(self, node: fx.Node) -> tuple[str, str, QuantSpec]:
        """Buffer names and spec for one observer's value."""
        group = record_of(node).share_group
        if group is not None:
            return self.of_group(group)
        if node not in self.made:
            observer = self.rewriter.gm.get_submodule(str(node.target))
            self.made[node] = self._store(node, qparams_of(observer, spec_of_observer(observer)))
        return self.made[node]

    def of_group(self, group: int) -> tuple[str, str, QuantSpec]:
        """Buffer names and spec for all values of a sharing group."""
        if group not in self.made:
            nodes = self.groups[group]
            modules = [self.rewriter.gm.get_submodule(str(n.target)) for n in nodes]
            self.made[group] = self._store(nodes[0], unite(modules))
        return self.made[group]

    def _warn_of_tiny_range(self, node: fx.Node, qparams: QParams) -> None:
        """Say that values below the smallest scale become zero."""
        observer = self.rewriter.gm.get_submodule(str(node.target))
        low, high = (getattr(observer, name, None) for name in ("min_val", "max_val"))
        if not isinstance(low, torch.Tensor) or not isinstance(high, torch.Tensor) or low.dim():
            return
        eps = qparams.spec.eps
        if 0 < float(high - low) < eps and float(qparams.scale) <= eps * (1 + 1e-6):
            self.context.diagnostics.warn(
                f"the values of {node.all_input_nodes[0].name!r} lie in {float(low):.3g}.."
                f"{float(high):.3g}, below the smallest scale {eps:.3g}: all of them become zero in"
                " int8. Scale the model's inputs or weights, or set None for the ops that read it",
                CalibrationWarning,
            )

    def _store(self, node: fx.Node, qparams: QParams) -> tuple[str, str, QuantSpec]:
        source = node.all_input_nodes[0]
        if not bool(torch.isfinite(qparams.scale).all()):
            raise NonFiniteStatisticError(
                f"the observer of {source.name!r} gives scale {qparams.scale}: its statistics are"
                " not finite. Look for NaN or Inf in the calibration data"
            )
        qparams.validate()
        self._warn_of_tiny_range(node, qparams)
        names = self.buffer_names(self.rewriter.gm, node)
        scale = self.rewriter.new_buffer(names[0], qparams.scale.clone())
        zero = self.rewriter.new_buffer(names[1], qparams.zero_point.clone())
        low, high = self.context.target.saturation(qparams.spec)
        return scale, zero, replace(qparams.spec, quant_min=low, quant_max=high)

    def of_weight(self, node: fx.Node) -> tuple[str, str, QuantSpec]:
        """Buffer names and spec for a weight that is observed in the graph."""
        observer = self.rewriter.gm.get_submodule(str(node.target))
        if node not in self.made:
            spec = spec_of_observer(observer)
            scale, zero, _ = self._store(node, qparams_of(observer, spec))
            self.made[node] = (scale, zero, spec)
        return self.made[node]


def _insert_pair(
    rewriter: GraphRewriter,
    value: fx.Node,
    after: fx.Node,
    parameters: tuple[str, str, QuantSpec],
    readers: list[fx.Node],
) -> fx.Node:
    """Insert quantize and dequantize of ``value`` after ``after``; ``readers`` read the result."""
    scale_name, zero_name, spec = parameters
    axis = () if spec.ch_axis is None else (spec.ch_axis,)
    following = after.next
    scale = rewriter.get_attr(scale_name, before=following, like=value)
    zero = rewriter.get_attr(zero_name, before=following, like=value)
    quantized = rewriter.call(
        QUANTIZE,
        (value, scale, zero, spec.quant_min, spec.quant_max, spec.dtype, *axis),
        before=following,
        like=value,
        name=f"{value.name}_quantize",
        dtype=spec.dtype,
    )
    dequantized = rewriter.call(
        DEQUANTIZE,
        (quantized, scale, zero, *axis),
        before=following,
        like=value,
        name=f"{value.name}_dequantize",
    )
    for reader in readers:
        rewriter.replace_argument(reader, value, dequantized)
    return dequantized


def _replace_observer(rewriter: GraphRewriter, node: fx.Node, parameters: _Parameters) -> None:
    value = node.all_input_nodes[0]
    spec = spec_of_observer(rewriter.gm.get_submodule(str(node.target)))
    if spec.is_float:
        made = value
        # Kernels with float16 weights compute on float32 activations: nothing is rounded there.
        if not spec.is_dynamic or parameters.context.target.rounds_half_inputs:
            made = _insert_half_pair(rewriter, node)
    elif spec.is_dynamic:
        made = _insert_dynamic_pair(rewriter, node, _as_read(node, spec))
    else:
        of_weight = reads_weight(rewriter.gm, node)
        pair = parameters.of_weight(node) if of_weight else parameters.of_observer(node)
        made = _insert_pair(rewriter, value, node, pair, [])
    rewriter.replace_uses(node, made)
    rewriter.erase(node)


def _as_read(node: fx.Node, spec: QuantSpec) -> QuantSpec:
    """``spec``, in the range of the kernels that read the integers at run time."""
    annotations = (record_of(user).annotation for user in node.users)
    specs = [s for a in annotations if a is not None for s in a.inputs if s is not None]
    ends = [s.quant_max for s in specs if s.is_dynamic]
    return replace(spec, quant_max=min((spec.quant_max, *ends)))


def _insert_half_pair(rewriter: GraphRewriter, node: fx.Node) -> fx.Node:
    """Round to float16, and read float32 again, before the observer ``node``."""
    value = node.all_input_nodes[0]
    half, whole = torch.float16, torch.float32
    rounded = rewriter.call(TO_DTYPE, (value, half), before=node, like=value, dtype=half)
    return rewriter.call(TO_DTYPE, (rounded, whole), before=node, like=value, dtype=whole)


def _insert_dynamic_pair(rewriter: GraphRewriter, node: fx.Node, spec: QuantSpec) -> fx.Node:
    """Quantize by parameters chosen at run time, and dequantize, before the observer ``node``."""
    value = node.all_input_nodes[0]
    low, high = spec.quant_min, dynamic_quant_max(spec)
    made = rewriter.call(
        QUANTIZE_DYNAMIC,
        (value, low, high, spec.dtype, spec.is_symmetric),
        before=node,
        like=value,
        name=f"{value.name}_quantize_dynamic",
    )
    record = record_of(value).value
    scalars = [TensorRecord(shape=(), dtype=d) for d in (torch.float32, torch.int32)]
    integers = replace(record, dtype=spec.dtype) if isinstance(record, TensorRecord) else record
    update_record(made, value=(integers, *scalars))
    parts = [
        rewriter.call(
            operator.getitem, (made, index), before=node, like=value, name=f"{value.name}_{name}"
        )
        for index, name in enumerate(("integers", "scale", "zero_point"))
    ]
    for part, part_record in zip(parts, (integers, *scalars), strict=True):
        update_record(part, value=part_record)
    return rewriter.call(
        DEQUANTIZE, tuple(parts), before=node, like=value, name=f"{value.name}_dequantize"
    )


def _quantize_moved(rewriter: GraphRewriter, node: fx.Node, parameters: _Parameters) -> None:
    """Quantize the result of an op that only moves values, with its group's parameters."""
    record = record_of(node)
    if record.annotation is None or not record.annotation.shares or record.share_group is None:
        return
    if record.fusion is not None and record.fusion.last != node.name:
        return
    readers = list(node.users)
    _insert_pair(rewriter, node, node, parameters.of_group(record.share_group), readers)


def _is_dequantized(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target is DEQUANTIZE


class _Weights:
    """Turns every annotated weight into integers and its op into a function call."""

    def __init__(self, rewriter: GraphRewriter, fitter: WeightFitter) -> None:
        self.rewriter = rewriter
        self.fitter = fitter
        self.made: dict[tuple[str, QuantSpec], tuple[str, str, str]] = {}
        self.tensors: dict[int, tuple[str, Tensor]] = {}

    def run(self) -> None:
        """Convert all ops of the graph that carry a weight spec."""
        gm = self.rewriter.gm
        for node in list(gm.graph.nodes):
            record = record_of(node)
            op = op_of(gm, node)
            if op is None or record.annotation is None or record.annotation.weight is None:
                continue
            if op.name in FUNCTIONS:
                self._convert(node, op, record.annotation.weight)
            elif op.kind.definition:
                self._convert_recurrent(node, op, record.annotation)

    def _convert(self, node: fx.Node, op: Op, spec: QuantSpec) -> None:
        if op.computes("weight"):
            return  # observed in the graph, and quantized there
        path = op.constant_path("weight")
        assert path is not None
        weight = self._quantized(node, path, spec, "weight")
        target, args = functional_call(op, weight=weight, bias=self._bias(node, op))
        constants = [a for a in node.all_input_nodes if a.op == "get_attr"]
        self.rewriter.retarget(node, target, args)
        self.rewriter.erase_dead([c for c in constants if c not in node.all_input_nodes])

    def _convert_recurrent(self, node: fx.Node, op: Op, annotation: Annotation) -> None:
        """``nn.LSTM`` and its like become their definition on quantized weights and activations."""
        rewriter, spec, activation = self.rewriter, annotation.weight, annotation.inputs[0]
        assert spec is not None and activation is not None
        module = rewriter.gm.get_submodule(str(node.target))
        weights: list[fx.Node | None] = []
        for name in weight_names(module):
            path = f"{node.target}.{name}"
            if getattr(module, name, None) is None:
                weights.append(None)
            elif name.startswith("bias"):
                value = attribute(rewriter.gm, path).detach().clone()
                buffer = rewriter.new_buffer(f"{node.name}_{name}", value)
                weights.append(rewriter.get_attr(buffer, before=node, like=node))
            else:
                weights.append(self._quantized(node, path, spec, name))
        levels = None
        if not activation.is_float:
            levels = (activation.quant_min, dynamic_quant_max(activation))
        rounded = levels is not None and _is_dequantized(op.arguments["input"])
        given = {"weights": weights, "levels": levels, "rounded": rounded}
        arguments = {**op.arguments, **given}
        args = tuple(arguments[name] for name, _ in op.kind.signature)
        rewriter.retarget(node, op.kind.functions[0], args)

    def _quantized(self, node: fx.Node, path: str, spec: QuantSpec, name: str) -> fx.Node:
        """The weight at ``path``, of which ``node`` reads the float value of its integers."""
        rewriter = self.rewriter
        if spec.is_float:
            return self._half(node, path, spec, name)
        weight_name, scale_name, zero_name = self._integers(node, path, spec, name)
        weight = rewriter.get_attr(weight_name, before=node, like=node)
        scale = rewriter.get_attr(scale_name, before=node, like=node)
        zero = rewriter.get_attr(zero_name, before=node, like=node)
        return rewriter.call(
            DEQUANTIZE,
            (weight, scale, zero, spec.ch_axis),
            before=node,
            like=weight,
            name=f"{weight_name}_dequantize",
            dtype=torch.float32,
            origins=(),
        )

    def _half(self, node: fx.Node, path: str, spec: QuantSpec, name: str) -> fx.Node:
        """A float16 weight, saturated as kernels do it, read as float32."""
        rewriter = self.rewriter
        if (path, spec) not in self.made:
            value = attribute(rewriter.gm, path).detach()
            limit = torch.finfo(spec.dtype).max
            half = value.clamp(-limit, limit).to(spec.dtype)
            self.made[path, spec] = (rewriter.new_buffer(f"{node.name}_{name}", half), "", "")
        stored = rewriter.get_attr(self.made[path, spec][0], before=node, like=node)
        return rewriter.call(
            TO_DTYPE,
            (stored, torch.float32),
            before=node,
            like=stored,
            dtype=torch.float32,
            origins=(),
        )

    def _bias(self, node: fx.Node, op: Op) -> fx.Node | None:
        bias = op.constant("bias")
        if bias is None:
            return None
        path = op.constant_path("bias")
        assert path is not None
        if op.form is not Form.MODULE:
            found = op.arguments["bias"]
            assert isinstance(found, fx.Node)
            return found
        name = self.rewriter.new_buffer(f"{node.name}_bias", bias.detach().clone())
        return self.rewriter.get_attr(name, before=node, like=node)

    def _integers(
        self, node: fx.Node, path: str, spec: QuantSpec, name: str
    ) -> tuple[str, str, str]:
        weight = attribute(self.rewriter.gm, path)
        first, _ = self.tensors.setdefault(id(weight), (path, weight))  # tied: one for both
        key = (first, spec)
        if key not in self.made:
            weight = weight.detach()
            qparams = self._parameters(node, weight, path, spec)
            store = self.rewriter.new_buffer
            self.made[key] = (
                store(
                    f"{node.name}_{name}", self.fitter.integers(path, weight, qparams).contiguous()
                ),
                store(f"{node.name}_{name}_scale", qparams.scale.clone()),
                store(f"{node.name}_{name}_zero_point", qparams.zero_point.clone()),
            )
        else:
            other = "another call" if first == path else repr(first)
            add_reason(node, f"shares its quantized weight with {other}")
        return self.made[key]

    def _parameters(self, node: fx.Node, weight: Tensor, path: str, spec: QuantSpec) -> QParams:
        qconfig = record_of(node).qconfig
        assert qconfig is not None
        qparams = self.fitter.qparams(node, path, weight, spec, qconfig)
        four_bits = spec.has_float_zero_point and spec.levels == 16
        return in_half_precision(qparams) if four_bits else qparams


class _ModuleWeights(_Weights):
    """Turns modules with weights into reference modules, and a relu fused behind into their end."""

    def __init__(self, rewriter: GraphRewriter, fitter: WeightFitter) -> None:
        super().__init__(rewriter, fitter)
        self.calls: dict[tuple[str, QuantSpec, bool], list[fx.Node]] = {}

    def run(self) -> None:
        """Convert all ops of the graph that carry a weight spec."""
        super().run()
        gm = self.rewriter.gm
        ours = {node for nodes in self.calls.values() for node in nodes}
        taken = {str(n.target) for n in gm.graph.nodes if n.op == "call_module" and n not in ours}
        # All are made before the first takes the place of a module that another is made of.
        made = {call: self._form(*call, nodes[0]) for call, nodes in self.calls.items()}
        for call, nodes in self.calls.items():
            path = call[0]
            place = self.rewriter.fresh_path(path) if path in taken else path
            taken.add(path)
            self.rewriter.set_module(place, made[call])
            for node in nodes:
                self.rewriter.retarget_module(node, place, node.args, dict(node.kwargs))
                relu = _relu_behind(gm, node)
                if relu is not None:
                    self.rewriter.absorb(node, relu)

    def _form(
        self, path: str, spec: QuantSpec, with_relu: bool, node: fx.Node
    ) -> nn.Module:  # parts of one key
        module = self.rewriter.gm.get_submodule(path)
        qparams = None
        if not spec.is_float:
            weight = attribute(module, "weight").detach()
            qparams = self._parameters(node, weight, f"{path}.weight", spec)
        made: nn.Module = reference_form(module, spec, qparams)
        if with_relu:
            made = ReferenceRelu(made, nn.ReLU())
        return made.train(module.training)

    def _convert(self, node: fx.Node, op: Op, spec: QuantSpec) -> None:
        gm, path = self.rewriter.gm, str(node.target)
        if op.form is Form.MODULE and type(gm.get_submodule(path)) in REFERENCE_BY_FLOAT:
            relu = _relu_behind(gm, node)
            self.calls.setdefault((path, spec, relu is not None), []).append(node)
        else:
            super()._convert(node, op, spec)


def _relu_behind(gm: QuantGraphModule, node: fx.Node) -> fx.Node | None:
    """The relu that is fused with ``node``, and nothing between them."""
    fusion = record_of(node).fusion
    reader = next(iter(node.users), None)
    if fusion is None or reader is None or reader.name != fusion.last:
        return None
    op = op_of(gm, reader)
    return reader if op is not None and op.name == "relu" else None
