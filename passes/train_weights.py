"""train-weights: every weight that will be integers is rounded to them while it trains.

::

    conv(x)              QatConv2d(x), whose ``weight_fake_quant`` rounds the weight
    F.conv2d(x, w)       F.conv2d(x, weight_fake_quant_0(w))

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxquant.errors import ConfigWarning
from fxquant.fake_quantize import FakeQuantize
from fxquant.functional import FUNCTIONS
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observed import spec_of_observer
from fxquant.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from fxquant.op_view import Form, Op, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.insert_observers import device_of, on_device
from fxquant.qat_modules import QatModule, training_form
from fxquant.qconfig import Factory, QConfig
from fxquant.rewriter import GraphRewriter
from fxquant.specs import QuantSpec

WEIGHT_PREFIX = "weight_fake_quant_"


@dataclass(frozen=True)
class TrainWeights(Pass):
    """Give every op with a weight spec the weight fake quantizer of its qconfig.

    Modules become the modules of :mod:`fxquant.qat_modules`; the weight of a function is rounded
    in the graph. A module or weight that several calls read has one.
    """

    name: ClassVar[str] = "train-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ANNOTATED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_TRAIN})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Go through the ops in graph order; qconfigs that round nothing are told."""
        rewriter, device = GraphRewriter(gm, self.name), device_of(gm)
        unrounded: list[str] = []
        for node in list(gm.graph.nodes):
            record, op = record_of(node), op_of(gm, node)
            annotation, qconfig = record.annotation, record.qconfig
            if annotation is None or qconfig is None or op is None or op.name not in FUNCTIONS:
                continue
            if annotation.weight is None or annotation.weight.is_float:
                continue
            if op.form is not Form.MODULE and not _reads_weight(op):
                continue  # rounded already
            made = _fake_quantizer(qconfig, annotation.weight)
            if made is None:
                unrounded.append(node.name)
                continue
            made = on_device(made, device)
            if op.form is Form.MODULE:
                _round_in_module(rewriter, node, made)
            else:
                _round_in_graph(rewriter, op, made, qconfig)
        if unrounded:
            context.diagnostics.warn(_why_unrounded(gm, unrounded), ConfigWarning)
        return PassResult(changes=rewriter.finish())


def _fake_quantizer(qconfig: QConfig, spec: QuantSpec) -> nn.Module | None:
    """The qconfig's, or one of the same kind of range where the op table wants other axes."""
    made: Any = qconfig.weight()
    if not hasattr(made, "fake_quant_enabled"):
        return None
    if spec_of_observer(made) == spec:
        return made  # type: ignore[no-any-return]  # whatever the factory gave
    observer: Factory = MovingAverageMinMaxObserver
    options: dict[str, Any] = {}
    if spec.ch_axis is not None:
        observer, options = MovingAveragePerChannelMinMaxObserver, {"ch_axis": spec.ch_axis}
    return FakeQuantize(
        observer,
        spec.quant_min,
        spec.quant_max,
        dtype=spec.dtype,
        qscheme=spec.qscheme,
        eps=spec.eps,
        **options,
    )


def _reads_weight(op: Op) -> bool:
    weight = op.arguments["weight"]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _round_in_module(rewriter: GraphRewriter, node: fx.Node, made: nn.Module) -> None:
    gm, path = rewriter.gm, str(node.target)
    module = gm.get_submodule(path)
    if not isinstance(module, QatModule):
        module = training_form(module)
        rewriter.set_module(path, module)
    if module.weight_fake_quant is None:
        module.weight_fake_quant = made
        rewriter.changes += 1


def _round_in_graph(rewriter: GraphRewriter, op: Op, made: nn.Module, qconfig: QConfig) -> None:
    weight = op.arguments["weight"]
    assert isinstance(weight, fx.Node)
    rounded = next((user for user in weight.users if is_weight_observer(user)), None)
    if rounded is None:
        path = rewriter.fresh_name(f"{WEIGHT_PREFIX}0")
        rewriter.set_module(path, made)
        rounded = rewriter.module_call(path, (weight,), after=weight, like=weight, qconfig=qconfig)
    rewriter.replace_argument(op.node, weight, rounded)


def is_weight_observer(node: fx.Node) -> bool:
    """Whether ``node`` calls what :class:`TrainWeights` put behind a weight."""
    return node.op == "call_module" and is_weight_path(str(node.target))


def is_weight_path(path: str) -> bool:
    """Whether what is at ``path`` was put there by :class:`TrainWeights`."""
    return path.startswith(WEIGHT_PREFIX)


def _why_unrounded(gm: QuantGraphModule, names: list[str]) -> str:
    nodes = {node.name: node for node in gm.graph.nodes}
    qconfig = record_of(nodes[names[0]]).qconfig
    assert qconfig is not None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    with torch.no_grad():
        kind = type(qconfig.weight()).__name__
    return (
        f"the weight of {names[0]!r}{more} trains as it is: {kind}, which its qconfig names, only"
        " observes, so training does not see what rounding it costs. Use a qconfig of fake"
        " quantizers, such as get_default_qat_qconfig('x86')"
    )
