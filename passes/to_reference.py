"""to-reference: observers become ``dequantize(quantize(x))``, weights become integers.

The result runs in floating point on exactly the values that int8 kernels see, and shows every
scale, zero point and integer weight as a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import CalibrationWarning, NonFiniteStatisticError
from fxquant.functional import FUNCTIONS, functional_call
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import add_reason, record_of
from fxquant.observed import (
    qparams_of,
    spec_of_observer,
    unite,
    was_observed,
    weight_qparams,
)
from fxquant.op_view import Form, Op, attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.insert_observers import OBSERVER_PREFIX
from fxquant.qconfig import QConfig
from fxquant.rewriter import GraphRewriter
from fxquant.specs import QParams, QuantSpec, quantize


@dataclass(frozen=True)
class ToReference(Pass):
    """Compute all parameters and put quantize and dequantize where observers were.

    Observers of one sharing group unite their statistics first, so the group's range is that of
    the union, whatever the order of the branches. A weight that several calls read is quantized
    once. Biases stay in floating point, as in PyTorch's kernels.

    Quantize saturates at the ends of the spec's range. A halved range (``0..127`` in uint8) decides
    the scale only where the target has kernels: they, and ONNX's QuantizeLinear, saturate at the
    ends of the storage (:meth:`fxquant.targets.table.Target.saturation`).
    """

    name: ClassVar[str] = "to-reference"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Convert activations, then the values that share their parameters, then weights."""
        rewriter = GraphRewriter(gm, self.name)
        observers = [n for n in gm.graph.nodes if is_observer(n)]
        _warn_uncalibrated(gm, observers, context)
        parameters = _Parameters(rewriter, observers, context)
        for node in observers:
            _replace_observer(rewriter, node, parameters)
        for node in list(gm.graph.nodes):
            _quantize_moved(rewriter, node, parameters)
        _Weights(rewriter).run()
        gm.update_state(stage=Stage.REFERENCE)
        rewriter.changes += 1
        return PassResult(changes=rewriter.finish())


def is_observer(node: fx.Node) -> bool:
    """Whether ``node`` calls an observer that :class:`InsertObservers` inserted."""
    return node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)


def _warn_uncalibrated(
    gm: QuantGraphModule, observers: list[fx.Node], context: PassContext
) -> None:
    blind = [
        n.all_input_nodes[0].name
        for n in observers
        if not was_observed(gm.get_submodule(str(n.target)))
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
        self, rewriter: GraphRewriter, observers: list[fx.Node], context: PassContext
    ) -> None:
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
        scale = self.rewriter.new_buffer(f"{source.name}_scale", qparams.scale.clone())
        zero = self.rewriter.new_buffer(f"{source.name}_zero_point", qparams.zero_point.clone())
        low, high = self.context.target.saturation(qparams.spec)
        return scale, zero, replace(qparams.spec, quant_min=low, quant_max=high)


def _insert_pair(
    rewriter: GraphRewriter,
    value: fx.Node,
    after: fx.Node,
    parameters: tuple[str, str, QuantSpec],
    readers: list[fx.Node],
) -> fx.Node:
    """Insert quantize and dequantize of ``value`` after ``after``; ``readers`` read the result."""
    scale_name, zero_name, spec = parameters
    following = after.next
    scale = rewriter.get_attr(scale_name, before=following, like=value)
    zero = rewriter.get_attr(zero_name, before=following, like=value)
    quantized = rewriter.call(
        QUANTIZE,
        (value, scale, zero, spec.quant_min, spec.quant_max, spec.dtype),
        before=following,
        like=value,
        name=f"{value.name}_quantize",
        dtype=spec.dtype,
    )
    dequantized = rewriter.call(
        DEQUANTIZE,
        (quantized, scale, zero),
        before=following,
        like=value,
        name=f"{value.name}_dequantize",
    )
    for reader in readers:
        rewriter.replace_argument(reader, value, dequantized)
    return dequantized


def _replace_observer(rewriter: GraphRewriter, node: fx.Node, parameters: _Parameters) -> None:
    value = node.all_input_nodes[0]
    pair = parameters.of_observer(node)
    dequantized = _insert_pair(rewriter, value, node, pair, [])
    rewriter.replace_uses(node, dequantized)
    rewriter.erase(node)


def _quantize_moved(rewriter: GraphRewriter, node: fx.Node, parameters: _Parameters) -> None:
    """Quantize the result of an op that only moves values, with its group's parameters."""
    record = record_of(node)
    if record.annotation is None or not record.annotation.shares or record.share_group is None:
        return
    if record.fusion is not None and record.fusion.last != node.name:
        return
    readers = list(node.users)
    _insert_pair(rewriter, node, node, parameters.of_group(record.share_group), readers)


class _Weights:
    """Turns every annotated weight into integers and its op into a function call."""

    def __init__(self, rewriter: GraphRewriter) -> None:
        self.rewriter = rewriter
        self.made: dict[tuple[str, QuantSpec], tuple[str, str, str]] = {}

    def run(self) -> None:
        """Convert all ops of the graph that carry a weight spec."""
        gm = self.rewriter.gm
        for node in list(gm.graph.nodes):
            record = record_of(node)
            op = op_of(gm, node)
            if op is None or record.annotation is None or record.annotation.weight is None:
                continue
            if op.name not in FUNCTIONS:
                continue
            assert record.qconfig is not None
            self._convert(node, op, record.annotation.weight, record.qconfig)

    def _convert(self, node: fx.Node, op: Op, spec: QuantSpec, qconfig: QConfig) -> None:
        rewriter = self.rewriter
        path = op.constant_path("weight")
        assert path is not None
        weight_name, scale_name, zero_name = self._integers(node, path, op, spec, qconfig)
        weight = rewriter.get_attr(weight_name, before=node, like=node)
        scale = rewriter.get_attr(scale_name, before=node, like=node)
        zero = rewriter.get_attr(zero_name, before=node, like=node)
        dequantized = rewriter.call(
            DEQUANTIZE,
            (weight, scale, zero, spec.ch_axis),
            before=node,
            like=weight,
            name=f"{weight_name}_dequantize",
            dtype=torch.float32,
            origins=(),
        )
        target, args = functional_call(
            op, input=op.activations[0], weight=dequantized, bias=self._bias(node, op)
        )
        constants = [a for a in node.all_input_nodes if a.op == "get_attr"]
        rewriter.retarget(node, target, args)
        rewriter.erase_dead([c for c in constants if c not in node.all_input_nodes])

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
        self, node: fx.Node, path: str, op: Op, spec: QuantSpec, qconfig: QConfig
    ) -> tuple[str, str, str]:
        key = (path, spec)
        if key not in self.made:
            weight = attribute(self.rewriter.gm, path).detach()
            qparams = weight_qparams(weight, spec, qconfig, node.name)
            store = self.rewriter.new_buffer
            self.made[key] = (
                store(f"{node.name}_weight", quantize(weight.to(torch.float32), qparams)),
                store(f"{node.name}_weight_scale", qparams.scale.clone()),
                store(f"{node.name}_weight_zero_point", qparams.zero_point.clone()),
            )
        else:
            add_reason(node, "shares its quantized weight with another call")
        return self.made[key]
