"""remove-identities: ``Dropout(x) -> x`` in evaluation, ``Identity(x) -> x``, ``detach(x) -> x``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Take out ops that give their input unchanged.

    Dropout goes only where it is in evaluation mode or has probability 0.
    """

    name: ClassVar[str] = "remove-identities"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_IDENTITIES})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Erase identities; their fate is kept for reports."""
        rewriter = GraphRewriter(gm, self.name)
        for node in list(gm.graph.nodes):
            op = op_of(gm, node)
            if op is None or op.name not in ("identity", "dropout", "detach"):
                continue
            if op.name == "dropout" and op.arguments["training"] and op.arguments["p"] != 0:
                continue
            rewriter.replace_uses(node, op.activations[0])
            rewriter.erase(node)
            gm.add_fate(node.name, f"removed: {op.name} does nothing in evaluation")
        return PassResult(changes=rewriter.finish())
