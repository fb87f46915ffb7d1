"""inline-references: modules of a reference graph as the steps that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.functional import functional_call
from fxquant.graph_module import QuantGraphModule, derive
from fxquant.metadata import record_of
from fxquant.op_view import op_of
from fxquant.operators import DEQUANTIZE, TO_DTYPE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.spell_as_torch import DEQUANTIZING_METHOD, is_spelt_cast
from fxquant.reference_modules import ReferenceModule, ReferenceRelu
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class InlineReferences(Pass):
    """``self.conv(x) -> F.conv2d(x, dequantize(integers, ...), self.conv.bias)``.

    What compares and writes graphs reads steps; callers of ``fxquant.compat`` look for modules, and
    for the casts of :class:`SpellAsTorch`, which become casts by ``aten::to`` again.
    """

    name: ClassVar[str] = "inline-references"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Inline in graph order."""
        return PassResult(changes=_inline(gm))


def inlined(gm: QuantGraphModule) -> QuantGraphModule:
    """``gm``, or a copy of it without modules of :mod:`fxquant.reference_modules`."""
    calls = (gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module")
    has_modules = any(isinstance(module, (ReferenceModule, ReferenceRelu)) for module in calls)
    if not has_modules and not any(map(is_spelt_cast, gm.graph.nodes)):
        return gm
    copied = derive(gm)
    _inline(copied)
    return copied


def _inline(gm: QuantGraphModule) -> int:
    rewriter = GraphRewriter(gm, InlineReferences.name)
    for node in list(gm.graph.nodes):
        if is_spelt_cast(node):
            _inline_cast(rewriter, node)
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if isinstance(module, ReferenceRelu):
            path = str(node.target)
            rewriter.retarget_module(node, f"{path}.0", node.args, dict(node.kwargs))
            _put_relu_behind(rewriter, node)
            module = gm.get_submodule(str(node.target))
        if isinstance(module, ReferenceModule):
            _inline_one(rewriter, node, module)
    return rewriter.finish()


def _inline_cast(rewriter: GraphRewriter, half: fx.Node) -> None:
    for whole in list(half.users):
        if whole.op == "call_method" and whole.target == DEQUANTIZING_METHOD:
            rewriter.retarget(whole, TO_DTYPE, (half, torch.float32))
    rewriter.retarget(half, TO_DTYPE, (half.args[0], torch.float16))


def _put_relu_behind(rewriter: GraphRewriter, node: fx.Node) -> None:
    fusion = record_of(node).fusion
    assert fusion is not None
    relu = rewriter.call(F.relu, (node,), after=node, like=node, name=fusion.last, fusion=fusion)
    rewriter.replace_uses(node, relu)


def _inline_one(rewriter: GraphRewriter, node: fx.Node, module: ReferenceModule) -> None:
    op, path = op_of(rewriter.gm, node), str(node.target)
    assert op is not None

    def read(name: str) -> fx.Node:
        return rewriter.get_attr(name, before=node, like=node)

    stored = read(rewriter.new_buffer(f"{node.name}_weight", module.stored_weight()))
    steps: tuple[Any, ...] = (TO_DTYPE, stored, torch.float32)
    if not module.is_half:
        axis = () if module.axis is None else (module.axis,)
        parameters = (read(f"{path}.{name}") for name in ("weight_scale", "weight_zero_point"))
        steps = (DEQUANTIZE, stored, *parameters, *axis)
    whole = rewriter.call(steps[0], steps[1:], before=node, like=stored, dtype=torch.float32)
    bias = None if getattr(module, "bias", None) is None else read(f"{path}.bias")
    target, args = functional_call(op, weight=whole, bias=bias)
    rewriter.retarget(node, target, args)
