"""fit-weights: integer weights that would overflow the 16-bit sums of this CPU's kernels shrink.

``convert_fx`` fits weights when it quantizes them (to-reference), from their float values. This
pass does it for a graph that was quantized on another machine: its integers are quantized anew with
larger scales, in the channels that need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_view import Op, attribute
from fxquant.operators import DEQUANTIZE
from fxquant.pairing import KernelChoice, Pairing
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter
from fxquant.specs import QParams, dequantize, quantize
from fxquant.weight_fit import Reduction, chosen, fit, fused_ops, tell, weighted_ops


@dataclass(frozen=True)
class FitWeights(Pass):
    """Enlarge the scales of the output channels that a kernel of this machine could overflow.

    Nothing where the kernels add in 32 bits, and nothing on a graph that was quantized here.

    Args:
        made_on: where the graph was quantized, for the warning.
    """

    name: ClassVar[str] = "fit-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_FIT})

    made_on: str = ""

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fit every weight to all the kernels that will read it."""
        select = context.target.select_kernel
        if select is None:
            return PassResult(changes=0)
        rewriter = GraphRewriter(gm, self.name)
        fused = fused_ops(gm)
        readers: dict[str, list[tuple[fx.Node, Op, KernelChoice]]] = {}
        for node, op in weighted_ops(gm):
            source = op.arguments["weight"]
            if not isinstance(source, fx.Node) or source.target is not DEQUANTIZE:
                continue
            choice = chosen(node, op, select, fused)
            if choice.pairing not in (Pairing.NONE, Pairing.WRONG):
                path = str(source.all_input_nodes[0].target)
                readers.setdefault(path, []).append((node, op, choice))
        reductions: dict[str, Reduction] = {}
        for found in readers.values():
            node, op, _ = found[0]
            reduction = _fit(rewriter, node, op, [choice for _, _, choice in found])
            if reduction is not None:
                reductions[node.name] = reduction
        origin = f" ({self.made_on})" if self.made_on else ""
        cause = f"the model was quantized for a CPU with other kernels{origin}"
        tell(gm, reductions, context.diagnostics, cause)
        return PassResult(changes=rewriter.finish())


def _fit(
    rewriter: GraphRewriter, node: fx.Node, op: Op, choices: list[KernelChoice]
) -> Reduction | None:
    annotation = record_of(node).annotation
    assert annotation is not None and annotation.weight is not None
    paths = [str(source.target) for source in op.arguments["weight"].all_input_nodes]
    integers, scale, zero_point = (_tensor(rewriter, path) for path in paths)
    qparams = QParams(scale, zero_point, annotation.weight)
    values = dequantize(integers, qparams)
    fitted, reduction = fit(values, qparams, choices)
    if reduction is not None:
        made = (quantize(values, fitted), fitted.scale, fitted.zero_point)
        for path, tensor in zip(paths, made, strict=True):
            rewriter.set_tensor(path, tensor)
    return reduction


def _tensor(rewriter: GraphRewriter, path: str) -> Tensor:
    value = attribute(rewriter.gm, path)
    assert isinstance(value, Tensor)
    return value
