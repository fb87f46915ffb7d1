"""lay-out-weights: a convolution in floating point has ``w``, and so its result, by rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, fx, nn

from fxquant.attribute_paths import set_attribute
from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import attribute, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

_CONVOLUTION: Final = "conv2d"


@dataclass(frozen=True)
class LayOutWeights(Pass):
    """Hold the weights of 2-d convolutions that stay in floating point in channels_last.

    Then such a convolution writes channels_last whatever it reads, as int8 kernels do, and nothing
    is laid out anew between the two; oneDNN's convolutions are faster that way, too. Values stay
    as they are. A weight that something else reads as well stays as it is.
    """

    name: ClassVar[str] = "lay-out-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_LAID_OUT})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Lay out every weight once."""
        rewriter = GraphRewriter(gm, self.name)
        others = {str(node.target) for node in gm.graph.nodes if _is_read_otherwise(gm, node)}
        for node in gm.graph.nodes:
            path = str(node.target)
            if node.op != "get_attr" or path in others:
                continue
            weight = attribute(gm, path)
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 4:
                rewriter.changes += _lay_out(gm, path, weight)
        return PassResult(changes=rewriter.finish())


def _is_read_otherwise(gm: QuantGraphModule, node: fx.Node) -> bool:
    """Whether something that is no convolution in floating point reads a constant."""
    if node.op != "get_attr":
        return False
    for user in node.users:
        op = op_of(gm, user)
        if op is None or op.name != _CONVOLUTION or op.arguments["weight"] is not node:
            return True
    return False


def _lay_out(gm: QuantGraphModule, path: str, weight: Tensor) -> bool:
    """Replace a weight where that makes it another one."""
    laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
    if laid_out.stride() == weight.stride():
        return False
    if isinstance(weight, nn.Parameter):
        laid_out = nn.Parameter(laid_out, requires_grad=weight.requires_grad)
    set_attribute(gm, path, laid_out)
    return True
