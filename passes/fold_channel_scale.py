"""fold-channel-scale: ``c * L(x; W, b) -> L(x; c W, c b)`` for a constant ``c`` per channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of
from fxquant.parameters import store_parameter
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.passes.fold_batch_norm import spread_over_outputs
from fxquant.patterns.channel_scale import factor_of
from fxquant.patterns.library import SCALE_PATTERNS
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.matcher import match_all
from fxquant.patterns.pattern import guard
from fxquant.qconfig import spec_of
from fxquant.rewriter import GraphRewriter
from fxquant.slices import scaled_rows


@guard
def a_scale_per_channel(match: Match) -> Reason | None:
    """Factors of their own go into channels that have scales of their own."""
    factor, qconfig = factor_of(match), record_of(match.first).qconfig
    if factor is None or factor.dim() == 0 or qconfig is None:
        return None
    made = spec_of(qconfig.weight)
    spec = None if made is None else made.spec
    transposed = match.op("base").name.startswith("conv_transpose")
    if spec is None or (spec.is_per_channel and not transposed):
        return None
    return because(
        "the weight of {node!r} has one scale for all channels, which would lose what small factors"
        " make small",
        match.first.name,
        node=match.first.name,
    )


@dataclass(frozen=True)
class FoldChannelScale(Pass):
    """Fold constant factors into the convolution or linear before them.

    The product has no int8 kernel (the factor is no activation), so without this the op before it
    writes floating point, and the product is quantized. Per-channel weights take the factor without
    any loss. Refuses, with the reason, where the factor is not constant per channel, where the
    value between is read by others, where the weight belongs to more than this call, or where it is
    quantized per tensor.
    """

    name: ClassVar[str] = "fold-channel-scale"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QCONFIGS, Fact.BATCH_NORM_FOLDED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.SCALES_FOLDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fold every match; products that stay say why in their record."""
        patterns = [
            replace(pattern, guards=(*pattern.guards, a_scale_per_channel))
            for pattern in SCALE_PATTERNS
        ]
        report = match_all(gm, patterns)
        rewriter = GraphRewriter(gm, self.name)
        for match in report.matches:
            _fold(rewriter, match)
        nodes = {node.name: node for node in gm.graph.nodes}
        refusals = []
        for refusal in report.refusals:
            if not refusal.guard:
                continue  # no product follows: nothing was refused
            product = nodes[refusal.bound[-1]]
            if not _has_constant(product):
                continue  # a product of two activations, which has an int8 kernel
            refusals.append(
                Refusal(node=refusal.anchor, reason=refusal.reason, culprits=refusal.culprits)
            )
            before = record_of(product)
            add_reason(product, f"not folded: {refusal.reason}")
            rewriter.changes += record_of(product) != before
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _has_constant(product: fx.Node) -> bool:
    return any(not isinstance(a, fx.Node) or a.op == "get_attr" for a in product.args)


def _fold(rewriter: GraphRewriter, match: Match) -> None:
    base, factor = match.op("base"), factor_of(match)
    weight, bias = base.constant("weight"), base.constant("bias")
    assert weight is not None and factor is not None
    outputs = weight.shape[0]
    if base.name.startswith("conv_transpose"):
        outputs = weight.shape[1] * int(base.arguments["groups"])
    factor = factor.to(weight.device).expand(outputs)
    new_weight = scaled_rows(weight, spread_over_outputs(base, weight, factor))
    store_parameter(rewriter, base, "weight", new_weight, weight)
    if bias is not None:
        store_parameter(
            rewriter, base, "bias", (bias.detach().to(torch.float64) * factor).to(bias.dtype), bias
        )
    product = match.last
    rewriter.gm.add_fates({product.name: f"folded into the weight of {match.first.name!r}"})
    constants = [a for a in product.all_input_nodes if a.op == "get_attr"]
    rewriter.absorb(match.nodes[-2], product)
    rewriter.erase_dead(constants)
