"""round-biases: ``b -> round(b / (s_x * s_w)) * s_x * s_w`` where the engine keeps integer biases.

QNNPACK adds the bias to the integer sum. Rounding it in the reference graph makes both compute with
the same number; oneDNN and FBGEMM keep biases in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import attribute
from fxquant.operators import DEQUANTIZE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter
from fxquant.weight_fit import weighted_ops


@dataclass(frozen=True)
class RoundBiases(Pass):
    """Round the biases of convolutions and linears to steps of their sums; nothing for x86.

    Refused where the input or the weight stayed in floating point: there are no steps.
    """

    name: ClassVar[str] = "round-biases"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Give every op with a bias one of its own, rounded; a bias may serve several calls."""
        rewriter = GraphRewriter(gm, self.name)
        if not context.target.integer_biases:
            return PassResult(changes=0)
        for node, op in weighted_ops(gm):
            bias = op.arguments.get("bias")
            scales = [_scale(gm, op.arguments.get(name)) for name in ("input", "weight")]
            if not isinstance(bias, fx.Node) or scales[0] is None or scales[1] is None:
                continue
            step = (scales[0] * scales[1]).to(torch.float64)
            value = attribute(gm, str(bias.target)).detach().to(torch.float64)
            rounded = ((value / step).round() * step).to(torch.float32)
            if torch.equal(rounded.to(torch.float64), value):
                continue
            name = rewriter.new_buffer(f"{node.name}_bias_rounded", rounded)
            made = rewriter.get_attr(name, before=node, like=bias)
            rewriter.replace_argument(node, bias, made)
            rewriter.erase_dead([bias])
        return PassResult(changes=rewriter.finish())


def _scale(gm: QuantGraphModule, argument: object) -> Tensor | None:
    """The scale of a dequantized argument, or ``None`` for a float one."""
    if not isinstance(argument, fx.Node) or argument.target is not DEQUANTIZE:
        return None
    source = argument.args[1]
    assert isinstance(source, fx.Node)
    if source.op != "get_attr":
        return None
    value = attribute(gm, str(source.target))
    return value if isinstance(value, Tensor) else None
