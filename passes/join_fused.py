"""join-fused: ``relu(conv(x)) -> conv(x)``, a module of both under the name of the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import fx, nn

from fxquant.fused_modules import FusedLayers, FusedSum
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class JoinFused(Pass):
    """Put the members of every match of fuse-patterns that begins with a module into one module.

    Other members disappear, with their modules. Refused where the first module is called
    elsewhere too, and for members that are neither modules nor ``F.relu`` nor a plain sum.
    """

    name: ClassVar[str] = "join-fused"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Join in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        groups: dict[int, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            fusion = record_of(node).fusion
            if fusion is not None:
                groups.setdefault(fusion.group, []).append(node)
        for members in groups.values():
            _join(rewriter, members)
        return PassResult(changes=rewriter.finish())


def _join(rewriter: GraphRewriter, members: list[fx.Node]) -> None:
    gm, (first, *others) = rewriter.gm, members
    path = str(first.target)
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and node.target == path]
    if first.op != "call_module" or calls != [first] or not others:
        return
    other = _other_operand(gm, first, others[0])
    after = [_module_of(gm, node) for node in (others if other is None else others[1:])]
    if any(module is None for module in after):
        return
    layer, behind = gm.get_submodule(path), [module for module in after if module is not None]
    made: nn.Module = FusedLayers(layer, *behind)
    arguments = first.args
    if other is not None:
        made, arguments = FusedSum(layer, nn.Sequential(*behind)), (*first.args, other)
    rewriter.set_module(path, made.train(layer.training))
    joined = rewriter.module_call(path, arguments, before=members[-1], like=members[-1])
    rewriter.replace_uses(members[-1], joined)
    rewriter.erase_dead([members[-1]])


def _other_operand(gm: QuantGraphModule, first: fx.Node, node: fx.Node) -> fx.Node | None:
    """What is added to the result of ``first``, or ``None`` where ``node`` is no such sum."""
    op = op_of(gm, node)
    if op is None or op.name != "add" or len(op.activations) != 2:
        return None
    if op.arguments.get("alpha", 1) != 1:
        return None
    return next((operand for operand in op.activations if operand is not first), None)


def _module_of(gm: QuantGraphModule, node: fx.Node) -> nn.Module | None:
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return nn.ReLU() if node.target is F.relu else None
