"""spell-as-torch: ``dequantize`` and casts to float16 as the calls that people look for.

::

    torch.dequantize(q)                  ->  q.dequantize()
    h = to(x, float16); to(h, float32)   ->  h = x.to(float16); h.dequantize()
    the same, of what is rounded         ->  h = quantize_per_tensor_dynamic(x, float16, True);
    at run time                              h.dequantize()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.operators import TO_DTYPE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

DEQUANTIZING_METHOD: Final = "dequantize"
_CASTING_METHOD: Final = "to"


@dataclass(frozen=True)
class SpellAsTorch(Pass):
    """Give a finished graph of ``fxquant.compat`` the calls that torch.ao's graphs have.

    Code that counts the steps of a graph looks for them by name. The values are the same.
    """

    name: ClassVar[str] = "spell-as-torch"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Rename calls in place, in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        for node in list(gm.graph.nodes):
            if node.target is torch.dequantize:
                rewriter.retarget_method(node, DEQUANTIZING_METHOD)
            elif node.target is TO_DTYPE and node.args[1] is torch.float16:
                _spell_rounding(rewriter, node)
            elif node.target is TO_DTYPE and node.all_input_nodes[0].op != "get_attr":
                rewriter.replace_arguments(node, (node.args[0],))
                rewriter.retarget_method(node, DEQUANTIZING_METHOD)
        return PassResult(changes=rewriter.finish())


def is_spelt_cast(node: fx.Node) -> bool:
    """Whether ``node`` is a cast to float16 that this pass spelt, and none of the user's."""
    if node.op == "call_method" and node.target == _CASTING_METHOD:
        return node.args[1:] == (torch.float16,) and bool(record_of(node).made_by)
    return node.target is torch.quantize_per_tensor_dynamic and node.args[1] is torch.float16


def _spell_rounding(rewriter: GraphRewriter, half: fx.Node) -> None:
    if any(map(_is_rounded_at_run_time, half.users)):
        args = (half.args[0], torch.float16, True)
        rewriter.retarget(half, torch.quantize_per_tensor_dynamic, args)
    else:
        rewriter.retarget_method(half, _CASTING_METHOD)


def _is_rounded_at_run_time(value: fx.Node) -> bool:
    """Whether an op reads ``value``, no weight, that asks for its float16 input at run time."""
    annotations = [record_of(user).annotation for user in value.users]
    specs = [spec for a in annotations if a is not None for spec in a.inputs if spec is not None]
    source = value.all_input_nodes[0].all_input_nodes[0]
    return source.op != "get_attr" and any(s.is_dynamic and s.is_float for s in specs)
