"""annotate: the input, weight and output specs of every op, from its qconfig and the op table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.nn.utils.parametrize import is_parametrized

from fxquant.backend_config import ObservationType
from fxquant.backend_fit import Misfit, fitting
from fxquant.dataflow import (
    has_float_input,
    looks_up,
    reads_only_shape,
    value_users,
)
from fxquant.errors import ConfigWarning, NonFiniteStatisticError
from fxquant.graph_module import QuantGraphModule
from fxquant.half import half_dtype
from fxquant.metadata import (
    Annotation,
    NodeRecord,
    TensorRecord,
    add_reason,
    record_of,
    update_record,
)
from fxquant.op_view import Op, kind_of, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.patterns.aliasing import Aliasing, written_value
from fxquant.qconfig import QConfig, spec_of
from fxquant.slices import all_finite
from fxquant.specs import QuantSpec
from fxquant.targets.table import OutputPolicy, Role, Row, Target
from fxquant.targets.x86 import NO_INT8_KERNEL

_OPS = ("call_module", "call_function", "call_method")
_OTHER_DTYPE = (
    "; int8 kernels quantize float32 and give float32. Convert the model with model.float()"
)


@dataclass(frozen=True)
class Annotate(Pass):
    """Give every op its specs, or a reason why it stays in floating point.

    Compute ops (convolution, linear, add, ...) take quantized inputs. An op whose output nobody
    reads as integers writes floating point where its kernel can, so the network's results are not
    rounded. Ops that only move values (pooling, reshape, cat, ...) are quantized where integers
    come in or are wanted.
    """

    name: ClassVar[str] = "annotate"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QCONFIGS, Fact.FUSED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.ANNOTATED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Annotate in two sweeps: what can be quantized, then what pays."""
        before = {node: record_of(node) for node in gm.graph.nodes}
        overwritten = overwritten_values(gm)
        plans = {}
        for node in gm.graph.nodes:
            if node.op in _OPS:
                plan = _plan(gm, node, context, overwritten)
                if plan is not None:
                    plans[node] = plan
        _warn_of_dtypes(gm, context)
        _Decision(gm, plans, context.target).decide()
        _warn_of_narrow_ranges(gm, context)
        changes = sum(record_of(node) != record for node, record in before.items())
        return PassResult(changes=changes)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What an op would be, were it quantized.

    Attributes:
        op: the op.
        row: what the target has for it.
        activation: spec of its inputs, and of its output where it writes integers.
        weight: spec of its weight.
        reads_floats: its kernel takes and gives float32, whatever is inside: activations are
            quantized at run time, or not at all.
    """

    op: Op
    row: Row
    activation: QuantSpec | None
    weight: QuantSpec | None
    reads_floats: bool = False


def overwritten_values(gm: QuantGraphModule) -> dict[fx.Node, fx.Node]:
    """Values whose memory an op writes later that could not be made functional, with that op."""
    nodes = list(gm.graph.nodes)
    if not any(written_value(gm, node) is not None for node in nodes):
        return {}
    aliasing = Aliasing(gm, {node: index for index, node in enumerate(nodes)})
    found = {node: aliasing.writer_between(node, node, nodes[-1], ()) for node in nodes}
    return {node: writer for node, writer in found.items() if writer is not None}


def _plan(
    gm: QuantGraphModule,
    node: fx.Node,
    context: PassContext,
    overwritten: dict[fx.Node, fx.Node],
) -> _Plan | None:
    record = record_of(node)
    fusion = record.fusion
    if fusion is not None and fusion.first != node.name:
        return None  # the first op of the pattern speaks for it
    if reads_only_shape(node) or not (
        has_float_input(gm, node, context.target.is_float) or looks_up(gm, node)
    ):
        return None
    if _decided_elsewhere(record, context):
        return None
    if record.qconfig is None:
        if record.rule:
            add_reason(node, f"no qconfig: {record.rule}")
        return None
    op = op_of(gm, node)
    row = context.target.row_of(op) if op is not None else _float_row(gm, node, context.target)
    if row is not None and row.role is Role.FLOAT:
        add_reason(node, row.reason)
        return None
    if op is None or row is None:
        _without_row(gm, node, record.qconfig, context)
        return None
    reason = (
        row.refusal(op)
        or _unusable_weight(op, row)
        or _unusable_inputs(gm, op, row)
        or hooked(gm, node)
        or written_in_place(node, overwritten)
    )
    if reason is not None:
        add_reason(node, reason)
        return None
    reason = row.misfit(op, record.qconfig)
    if reason is not None:
        add_reason(node, f"config cannot be honoured: {reason}")
        _warn_unhonoured(node, op, reason, context)
        return None
    return _specs(node, op, row, record.qconfig, context)


def _float_row(gm: QuantGraphModule, node: fx.Node, target: Target) -> Row | None:
    """The row of an op that is in FP32 by design, however it is called."""
    kind = kind_of(gm, node)
    row = None if kind is None else target.row(kind.name)
    return row if row is not None and row.role is Role.FLOAT else None


_BRANCHES = (
    "'{kind}' calls graphs of its own, which run in FP32; in Python's words, with 'if' or 'while'"
    " in a module of its own, what is called there is quantized"
)


def _without_row(
    gm: QuantGraphModule, node: fx.Node, qconfig: QConfig, context: PassContext
) -> None:
    """Say why an op that the target does not know stays in floating point."""
    kind = kind_of(gm, node)
    name = kind.name if kind is not None else str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        name = type(module).__name__
        if _quantized_around(node, type(module), qconfig, context):
            return
        if is_parametrized(module):
            add_reason(
                node,
                f"module {str(node.target)!r} computes its weight at every call; call"
                " torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') before",
            )
            return
    if isinstance(node.target, HigherOrderOperator):
        add_reason(node, _BRANCHES.format(kind=name))
        return
    add_reason(node, NO_INT8_KERNEL.format(kind=name))


def _quantized_around(node: fx.Node, kind: type, qconfig: QConfig, context: PassContext) -> bool:
    """Quantize what a module reads and gives that a backend config lists and no kernel serves."""
    allow = context.target.allow
    pattern = None if allow is None else allow.modules.get(kind)
    factory = spec_of(qconfig.activation)
    if pattern is None or factory is None or factory.spec is None or factory.spec.is_dynamic:
        return False
    if isinstance(fitting(qconfig, pattern.dtype_configs, weighted=False), Misfit):
        return False
    add_reason(node, f"{kind.__name__} has no int8 kernel; it runs between quantized values")
    shares = pattern.observation is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    inputs = (factory.spec,) * len(node.all_input_nodes)
    update_record(node, annotation=Annotation(inputs=inputs, output=factory.spec, shares=shares))
    return True


def _decided_elsewhere(record: NodeRecord, context: PassContext) -> bool:
    """Whether an op is quantized on its own, or an island, or a matter of annotate-half."""
    if record.takes_quantized:
        return True
    if any(reason.startswith("opaque island") for reason in record.reasons):
        return True
    return bool(context.target.half_kinds) and half_dtype(record.qconfig) is not None


def _unusable_weight(op: Op, row: Row) -> str | None:
    if not row.weight_dtypes:
        return None
    if op.computes("weight"):
        return "the weight is computed in the graph, so it cannot be packed"
    if op.constant("weight") is None:
        return "the op has no weight tensor"
    if op.computes("bias"):
        return "the bias is computed in the graph, so it cannot be packed"
    return None


def _unusable_inputs(gm: QuantGraphModule, op: Op, row: Row) -> str | None:
    for source in op.activations:
        value = record_of(source).value
        if isinstance(value, TensorRecord) and value.dtype != torch.float32:
            return f"{source.name!r} is {_short(value.dtype)}{_OTHER_DTYPE}"
    return None


def _warn_of_dtypes(gm: QuantGraphModule, context: PassContext) -> None:
    found = [
        (node, reason)
        for node in gm.graph.nodes
        for reason in record_of(node).reasons
        if reason.endswith(_OTHER_DTYPE) and not reason.startswith("behind")
    ]
    if found:
        node, reason = found[0]
        context.diagnostics.warn(
            f"{len(found)} op(s) cannot be quantized because of their dtype, the first is"
            f" {node.name!r}: {reason}",
            ConfigWarning,
        )


def _warn_of_narrow_ranges(gm: QuantGraphModule, context: PassContext) -> None:
    """Say once that halved activations buy nothing: see :mod:`fxquant.weight_fit`."""
    narrow = [
        (node, spec)
        for node in gm.graph.nodes
        for spec in (getattr(record_of(node).annotation, "output", None),)
        if spec is not None and spec.dtype is torch.uint8 and spec.levels == 128
    ]
    if not narrow or not context.target.executes:
        return
    node, spec = narrow[0]
    context.diagnostics.warn(
        f"{len(narrow)} activation(s), the first is {node.name!r}, use {spec.quant_min}.."
        f"{spec.quant_max} of 0..255, which guards against kernels that saturate. Those of a CPU"
        " with VNNI do not, and elsewhere convert_fx fits the weights of the channels that could"
        " overflow, so half of the precision is lost for nothing. Use"
        " get_default_qconfig_mapping('x86') of fxquant, or reduce_range=False",
        ConfigWarning,
    )


def hooked(gm: QuantGraphModule, node: fx.Node) -> str | None:
    """Why a module with forward hooks is left as it is, or ``None``."""
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if not hooks:
        return None
    names = [getattr(hook, "__name__", type(hook).__name__) for hook in hooks]
    cures = {
        "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
        "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
    }
    cure = next((cures[name] for name in names if name in cures), "remove them before")
    return (
        f"module {str(node.target)!r} has the forward hook(s) {', '.join(names)}, which an int8"
        f" kernel would not run; {cure}"
    )


def written_in_place(node: fx.Node, overwritten: dict[fx.Node, fx.Node]) -> str | None:
    """Why an op on memory that is written later is left as it is, or ``None``."""
    for value in (node, *node.all_input_nodes):
        writer = overwritten.get(value)
        if writer is not None:
            return (
                f"{writer.name!r} writes in place what may be the memory of {value.name!r}; use the"
                " form that is not in place"
            )
    return None


def _specs(node: fx.Node, op: Op, row: Row, qconfig: QConfig, context: PassContext) -> _Plan | None:
    factory = spec_of(qconfig.activation)
    if factory is not None and factory.reuse_input and row.role is Role.SHARES:
        return _Plan(op=op, row=row, activation=None, weight=None)
    activation = None if factory is None else factory.spec
    if not row.static or (activation is not None and activation.is_dynamic):
        return _float_interface(node, op, row, qconfig, context)
    if activation is None:
        lack = "the qconfig observes no activation, and a weight alone cannot be quantized"
        add_reason(node, f"{lack} ({record_of(node).rule})")
        if row.weight_dtypes and qconfig.weight is not None and not _says_nothing(qconfig):
            _warn_unhonoured(node, op, f"{lack} by target {context.target.name!r}", context)
        return None
    _check_finite(node, op)
    problem = _unusable_activation(activation, row)
    weight: QuantSpec | None = None
    if problem is None and row.weight_dtypes:
        weight_factory = spec_of(qconfig.weight)
        weight = None if weight_factory is None else weight_factory.spec
        problem = "its qconfig has no weight observer" if weight is None else None
        if weight is not None and weight.dtype not in row.weight_dtypes:
            problem = (
                f"weight {weight.short()} is not served (possible:"
                f" {', '.join(map(_short, row.weight_dtypes))})"
            )
        elif (
            weight is not None
            and row.symmetric_weight
            and not (weight.is_symmetric or weight.is_float)
        ):
            problem = (
                f"weight {weight.short()} is not served: the kernels ignore a weight's zero point"
                " (possible: torch.per_channel_symmetric, torch.per_tensor_symmetric)"
            )
    if problem is not None:
        text = f"{problem} by target {context.target.name!r}"
        add_reason(node, f"config cannot be honoured: {text}")
        _warn_unhonoured(node, op, text, context)
        return None
    if weight is not None:
        if weight.is_per_channel and row.weight_axis not in (None, weight.ch_axis):
            context.diagnostics.warn(
                f"the weight of {node.name!r} ({op.name}) is quantized per channel along axis"
                f" {row.weight_axis}, where its output channels are, not along {weight.ch_axis} as"
                f" {record_of(node).rule} says. Set ch_axis={row.weight_axis} there",
                ConfigWarning,
            )
        weight = _fit_weight(node, weight, row)
    return _Plan(op=op, row=row, activation=activation, weight=weight)


def _float_interface(
    node: fx.Node, op: Op, row: Row, qconfig: QConfig, context: PassContext
) -> _Plan | None:
    """The plan of an op that reads and writes floats around integers of its own."""
    factory, weight_factory = spec_of(qconfig.activation), spec_of(qconfig.weight)
    activation = None if factory is None else factory.spec
    weight = None if weight_factory is None else weight_factory.spec
    if row.weight_only:
        if weight is None or not weight.has_float_zero_point:
            add_reason(
                node,
                "a table is quantized by a qconfig with a float zero point per row only, such as"
                f" float_qparams_weight_only_qconfig ({record_of(node).rule} has another)",
            )
            return None
        return _Plan(op=op, row=row, activation=None, weight=weight, reads_floats=True)
    if activation is None or not activation.is_dynamic:
        add_reason(
            node,
            f"{row.kind} has no kernel for activations with calibrated parameters; it takes a"
            " dynamic qconfig such as default_dynamic_qconfig",
        )
        return None
    problem = _unusable_dynamic(activation, weight, row)
    if problem is not None:
        if not (op.kind.constants or row.dynamic):
            add_reason(node, "activations are quantized at run time for ops with weights only")
            return None
        text = f"{problem} by target {context.target.name!r}"
        add_reason(node, f"config cannot be honoured: {text}")
        _warn_unhonoured(node, op, text, context)
        return None
    assert weight is not None
    _check_finite(node, op)
    if activation.quant_max > row.dynamic_quant_max:
        add_reason(node, f"activations are quantized to 0..{row.dynamic_quant_max} at run time")
        activation = replace(activation, quant_max=row.dynamic_quant_max)
    if not weight.is_float:
        weight = _fit_weight(node, weight, row)
    return _Plan(op=op, row=row, activation=activation, weight=weight, reads_floats=True)


def _unusable_dynamic(activation: QuantSpec, weight: QuantSpec | None, row: Row) -> str | None:
    """Why activations that are quantized at run time, with this weight, are not served."""
    if not row.dynamic:
        return f"dynamic activation {activation.short()} is not served for {row.kind!r}"
    if weight is None:
        return "a dynamic activation without a weight spec is not served"
    possible = "possible: uint8 affine with int8 weights, float16 with float16 weights"
    if activation.is_float or weight.is_float:
        if activation.dtype is weight.dtype is torch.float16:
            return None
        return (
            f"dynamic {activation.short()} with weight {weight.short()} is not served ({possible})"
        )
    if activation.dtype is not torch.uint8 or activation.is_symmetric or activation.is_per_channel:
        return f"activation {activation.short()} is not served ({possible})"
    if (activation.quant_min, activation.quant_max) not in ((0, 255), (0, 127)):
        return f"activation {activation.short()} is not served (possible: 0..255 and 0..127)"
    if weight.dtype is not torch.int8 or not weight.is_symmetric:
        return f"weight {weight.short()} is not served ({possible}, symmetric)"
    return None


def _says_nothing(qconfig: QConfig) -> bool:
    """Whether a qconfig asks for no integers at all, such as one of no-op observers."""
    weight = spec_of(qconfig.weight)
    return weight is None or weight.spec is None or weight.spec.is_float


def _warn_unhonoured(node: fx.Node, op: Op, text: str, context: PassContext) -> None:
    context.diagnostics.warn(
        f"{node.name!r} ({op.name}) stays in FP32: {text}; its qconfig comes from"
        f" {record_of(node).rule}. Choose a spec that the target has, or set None there",
        ConfigWarning,
    )


def _check_finite(node: fx.Node, op: Op) -> None:
    """Refuse NaN and Inf in a weight before its consequences are blamed on the data."""
    for name in op.kind.constants:
        value = op.constant(name)
        if value is not None and not all_finite(value):
            raise NonFiniteStatisticError(
                f"the {name} {op.constant_path(name)!r} of {node.name!r} holds NaN or Inf; it"
                " cannot be quantized. Check the checkpoint, and the running variance of a"
                " batch-norm folded into it"
            )


def _unusable_activation(spec: QuantSpec, row: Row) -> str | None:
    if spec.is_dynamic:
        return f"dynamic activation {spec.short()} is not served for {row.kind!r}"
    if spec.dtype not in row.input_dtypes:
        possible = ", ".join(map(_short, row.input_dtypes))
        return f"activation {spec.short()} is not served (possible: {possible})"
    if spec.is_per_channel:
        return f"activation {spec.short()} is per channel, kernels take per-tensor activations"
    return None


def _fit_weight(node: fx.Node, weight: QuantSpec, row: Row) -> QuantSpec:
    """The weight spec on the axis that the kernel wants, per tensor where it must be."""
    if not weight.is_per_channel:
        return weight
    if row.weight_axis is None:
        scheme = torch.per_tensor_symmetric if weight.is_symmetric else torch.per_tensor_affine
        add_reason(
            node,
            "weight per tensor instead of per channel: PyTorch has no right kernel for per-channel"
            f" weights of {row.kind!r}",
        )
        return replace(weight, qscheme=scheme, ch_axis=None)
    return replace(weight, ch_axis=row.weight_axis)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Decision:
    """Which planned ops are quantized in the end, and whether their outputs are."""

    def __init__(self, gm: QuantGraphModule, plans: dict[fx.Node, _Plan], target: Target) -> None:
        self.gm = gm
        self.target = target
        self.plans = plans
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.groups: dict[int, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            fusion = record_of(node).fusion
            if fusion is not None:
                self.groups.setdefault(fusion.group, []).append(node)
        self.wanted = self._wanted()
        self.quantized: set[fx.Node] = set()  # first nodes of quantized ops

    def decide(self) -> None:
        """Annotate in graph order."""
        for node in self.gm.graph.nodes:
            plan = self.plans.get(node)
            if plan is None:
                continue
            annotation = self._annotation(node, plan)
            if annotation is not None:
                self.quantized.add(node)
                self._annotate(node, annotation)
        for members in self.groups.values():
            self._explain(members)

    def _explain(self, members: list[fx.Node]) -> None:
        """Give the ops behind one that stays in floating point its reasons too."""
        first, *others = members
        if record_of(first).annotation is not None:
            return
        for node in others:
            for reason in record_of(first).reasons:
                add_reason(node, f"behind {first.name!r}: {reason}")

    def _annotate(self, node: fx.Node, annotation: Annotation) -> None:
        fusion = record_of(node).fusion
        for member in (node,) if fusion is None else self.groups[fusion.group]:
            update_record(member, annotation=annotation)

    def _last(self, node: fx.Node) -> fx.Node:
        fusion = record_of(node).fusion
        return node if fusion is None else self.nodes[fusion.last]

    def _wanted(self) -> dict[fx.Node, bool]:
        """For every value: whether a compute op will read it as integers, maybe through movers."""
        wanted: dict[fx.Node, bool] = {}
        for node in reversed(self.gm.graph.nodes):
            users = value_users(node)
            wanted[node] = any(self._reads_integers(user, node, wanted) for user in users)
        return wanted

    def _reads_integers(self, user: fx.Node, value: fx.Node, wanted: dict[fx.Node, bool]) -> bool:
        head = self._head_of(user)
        plan = self.plans.get(head)
        if plan is None or plan.reads_floats:
            return False
        if plan.row.role is Role.COMPUTE:
            if plan.row.output is OutputPolicy.DEMANDED and not plan.row.float_output:
                return wanted.get(self._last(head), False)
            # The other operand of a residual add is read as integers only where the sum is written
            # as integers; else the kernel writes float and the add is a float add.
            return head is user or wanted.get(self._last(head), False)
        return wanted.get(self._last(head), False) or plan.row.worth_alone

    def _head_of(self, node: fx.Node) -> fx.Node:
        fusion = record_of(node).fusion
        return node if fusion is None else self.nodes[fusion.first]

    def _annotation(self, node: fx.Node, plan: _Plan) -> Annotation | None:
        last = self._last(node)
        if not last.users:
            add_reason(node, "nobody reads its result")
            return None
        if plan.reads_floats:
            dynamic = () if plan.activation is None else (plan.activation,)
            return Annotation(inputs=dynamic, weight=plan.weight)
        wanted = self.wanted[last]
        inputs = tuple(plan.activation for _ in plan.op.activations)
        if plan.row.role is Role.SHARES:
            always = plan.row.output is OutputPolicy.ALWAYS
            return self._sharing(node, plan, wanted=wanted or always)
        if wanted or plan.row.output is OutputPolicy.ALWAYS:
            output: QuantSpec | None = plan.activation
        elif plan.row.float_output:
            output = None
        else:
            readers = ", ".join(repr(user.name) for user in last.users) or "nobody"
            add_reason(
                node,
                f"its result is only read in floating point (by {readers}), so int8 would add a"
                " quantize and a dequantize",
            )
            return None
        return Annotation(inputs=inputs, weight=plan.weight, output=output)

    def _sharing(self, node: fx.Node, plan: _Plan, *, wanted: bool) -> Annotation | None:
        sources = plan.op.activations
        incoming = [self._gives_integers(source) for source in sources]
        if not sources:
            return None
        if not wanted and not (plan.row.worth_alone and all(incoming)):
            add_reason(
                node,
                "it keeps the scale of its input, and nobody reads integers after it"
                if any(incoming)
                else "no integers come in and none are wanted, so int8 would add conversions only",
            )
            return None
        own = plan.activation
        given = [found for source in sources if (found := self._output_spec(source)) is not None]
        if plan.row.output is OutputPolicy.ALWAYS and own is not None:
            # A qconfig of another dtype is honoured: what comes in is quantized anew for this op.
            given = given if all(found.dtype is own.dtype for found in given) else []
        spec = given[0] if given else own
        other = next((found for found in given if not self._same(found, given[0])), None)
        if other is not None:
            add_reason(
                node,
                f"its inputs are quantized differently ({given[0].short()}, {other.short()}), and"
                " its output cannot keep both; give what comes in one qconfig",
            )
            return None
        if spec is None:
            add_reason(
                node,
                f"it reuses its input's parameters, and its input {sources[0].name!r}"
                " is in floating point",
            )
            return None
        specs = tuple(spec for _ in sources)
        return Annotation(inputs=specs, output=spec, shares=True)

    def _same(self, left: QuantSpec, right: QuantSpec) -> bool:
        """Whether both mean the same integers."""
        ends = self.target.saturation
        return left.dtype is right.dtype and ends(left) == ends(right)

    def _gives_integers(self, value: fx.Node) -> bool:
        return self._output_spec(value) is not None

    def _output_spec(self, value: fx.Node) -> QuantSpec | None:
        annotation = record_of(value).annotation
        return annotation.output if annotation is not None else None
