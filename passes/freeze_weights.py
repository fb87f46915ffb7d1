"""freeze-weights: what trained becomes a float module, its weight's integers those of training.

``BN(conv(x; W, b))`` becomes ``conv(x; W*g/s, (b - m)*g/s + beta)``, as fold-batch-norm has it, and
the scale and zero point are those that the weight fake quantizer arrived at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxquant.functional import FUNCTIONS
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.observed import qparams_of, was_observed
from fxquant.op_view import attribute, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.train_weights import is_weight_observer
from fxquant.qat_modules import QatModule, TrainedQParams
from fxquant.qconfig import Factory, QConfig
from fxquant.rewriter import GraphRewriter
from fxquant.specs import QuantSpec


@dataclass(frozen=True)
class FreezeWeights(Pass):
    """End quantization-aware training: modules that train go, and so do observers of weights.

    The weight fake quantizer looks once more at the final weight, as in training, unless it was
    told not to observe. A model that was not trained has none, and stays as it is.
    """

    name: ClassVar[str] = "freeze-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_FROZEN})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Freeze in graph order."""
        work = _Work(GraphRewriter(gm, self.name))
        for node in list(gm.graph.nodes):
            if node.op == "call_module":
                work.freeze_module(node)
                continue
            op = op_of(gm, node)
            weight = op.arguments["weight"] if op is not None and op.name in FUNCTIONS else None
            if isinstance(weight, fx.Node) and is_weight_observer(weight):
                work.freeze_read(node, weight)
        return PassResult(changes=work.rewriter.finish())


@dataclass
class _Work:
    """One run of the pass.

    Attributes:
        rewriter: of the graph.
        made: what trained -> the factory of its parameters, and for whose spec it was made.
    """

    rewriter: GraphRewriter
    made: dict[str, Factory | None] = field(default_factory=dict)

    def freeze_module(self, node: fx.Node) -> None:
        """Give ``node`` its float module back."""
        gm, path = self.rewriter.gm, str(node.target)
        module = gm.get_submodule(path)
        if isinstance(module, QatModule):
            plain = module.to_float()
            self.made[path] = self._factory(node, module.weight_fake_quant, plain.weight)
            self.rewriter.set_module(path, plain)
        self._set_weight(node, self.made.get(path))

    def freeze_read(self, node: fx.Node, rounded: fx.Node) -> None:
        """Let ``node`` read its weight as it is."""
        gm, path = self.rewriter.gm, str(rounded.target)
        weight = rounded.all_input_nodes[0]
        if path not in self.made:
            value = attribute(gm, str(weight.target))
            self.made[path] = self._factory(node, gm.get_submodule(path), value)
        self._set_weight(node, self.made[path])
        self.rewriter.replace_argument(node, rounded, weight)
        self.rewriter.erase_dead([rounded])

    def _factory(self, node: fx.Node, trained: Any, weight: Any) -> Factory | None:
        annotation = record_of(node).annotation
        if trained is None or annotation is None or annotation.weight is None:
            return None
        return trained_parameters(trained, weight, annotation.weight)

    def _set_weight(self, node: fx.Node, factory: Factory | None) -> None:
        qconfig = record_of(node).qconfig
        if factory is None or qconfig is None:
            return
        update_record(node, qconfig=QConfig(qconfig.activation, factory))
        self.rewriter.changes += 1


def trained_parameters(trained: nn.Module, weight: Tensor, spec: QuantSpec) -> Factory:
    """A factory of observers with the parameters of a weight fake quantizer.

    Args:
        trained: the fake quantizer; it observes ``weight`` where it observes at all, or never did.
        weight: final.
        spec: how the weight is to be quantized.
    """
    if not was_observed(trained):
        trained.enable_observer()  # type: ignore[operator]  # every fake quantizer has it
    with torch.no_grad():
        trained(weight)
    found = qparams_of(trained, spec)
    scale, zero_point = found.scale.clone(), found.zero_point.clone()
    return TrainedQParams.with_args(spec=spec, scale=scale, zero_point=zero_point)
