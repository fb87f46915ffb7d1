"""remove-identities: ``Dropout(x) -> x`` in evaluation, ``Identity(x)`` and ``detach(x) -> x``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

_RANDOM = ("dropout", "stochastic_depth")
"""Kinds that drop values while they train, and give their input unchanged in evaluation."""

WITHOUT_GRADIENT = (*_RANDOM, "identity")
"""Kinds that do nothing for gradients either, which ``detach`` stops."""


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Take out ops that give their input unchanged.

    Dropout, and the stochastic depth of torchvision, go only where they are in evaluation mode or
    have probability 0; a module with forward hooks stays, for their sake.

    Attributes:
        kinds: what goes.
    """

    kinds: tuple[str, ...] = (*WITHOUT_GRADIENT, "detach")

    name: ClassVar[str] = "remove-identities"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_IDENTITIES})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Erase identities; their fate is kept for reports."""
        rewriter = GraphRewriter(gm, self.name)
        fates = {}
        for node in list(gm.graph.nodes):
            op = op_of(gm, node)
            if op is None or op.name not in self.kinds:
                continue
            if op.name in _RANDOM and op.arguments["training"] and op.arguments["p"] != 0:
                continue
            source = op.arguments["input"]  # a tuple of values goes through an Identity too
            if not isinstance(source, fx.Node) or _has_hooks(gm, node):
                continue
            rewriter.absorb(source, node)  # whoever gives the value carries the op in reports
            fates[node.name] = f"removed: {op.name} does nothing in evaluation"
        gm.add_fates(fates)
        return PassResult(changes=rewriter.finish())


def _has_hooks(gm: QuantGraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = gm.get_submodule(str(node.target))
    return bool(module._forward_hooks or module._forward_pre_hooks)
