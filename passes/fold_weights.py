"""fold-weights: ``Q(w) -> q``, a constant, for a weight that the graph quantizes at every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_view import Op, attribute, op_of
from fxquant.operators import QUANTIZE, TO_DTYPE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Store the integers, or float16 values, of weights; the float tensor goes.

    Functions that read an attribute as their weight have it observed, and quantized, in the graph.
    Not where an op is in float16 throughout: no kernel reads such a weight.
    """

    name: ClassVar[str] = "fold-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_FOLDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fold in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        for node in list(gm.graph.nodes):
            op = op_of(gm, node)
            step = None if op is None else _rounding_of_weight(op)
            if step is not None and (step.target is QUANTIZE or _has_kernel(node)):
                _fold(rewriter, step, node)
        return PassResult(changes=rewriter.finish())


def _rounding_of_weight(op: Op) -> fx.Node | None:
    """What rounds the attribute that ``op`` reads as its weight, through a step back to float."""
    weight = op.arguments.get("weight")
    step = weight.args[0] if isinstance(weight, fx.Node) and weight.args else None
    if not isinstance(step, fx.Node) or not (step.target is QUANTIZE or _casts(step)):
        return None
    return step if step.all_input_nodes[0].op == "get_attr" else None


def _casts(step: fx.Node) -> bool:
    """Whether ``step`` rounds to another dtype, in either spelling."""
    return step.target is TO_DTYPE or (
        step.target == "to" and isinstance(step.args[1], torch.dtype)
    )


def _has_kernel(node: fx.Node) -> bool:
    annotation = record_of(node).annotation
    return annotation is not None and any(s is not None and s.is_dynamic for s in annotation.inputs)


def _fold(rewriter: GraphRewriter, step: fx.Node, reader: fx.Node) -> None:
    value = _tensor(rewriter, step.args[0]).detach()
    if _casts(step):
        made = _halved(value, step)
    else:
        scale, zero_point = (_tensor(rewriter, node) for node in step.args[1:3])
        made = QUANTIZE(value, scale, zero_point, *step.args[3:])
    name = rewriter.new_buffer(f"{reader.name}_weight", made)
    stored = rewriter.get_attr(name, before=step, like=step)
    rewriter.replace_uses(step, stored)
    rewriter.erase_dead([step])


def _halved(value: Tensor, step: fx.Node) -> Tensor:
    """In float16, saturated as kernels do it."""
    dtype = step.args[1]
    assert isinstance(dtype, torch.dtype)
    limit = torch.finfo(dtype).max
    return value.clamp(-limit, limit).to(dtype)


def _tensor(rewriter: GraphRewriter, node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    value = attribute(rewriter.gm, str(node.target))
    assert isinstance(value, Tensor)
    return value
