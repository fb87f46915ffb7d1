"""fold-batch-norm: ``BN(Conv(x; W, b)) -> Conv(x; W*g/s, (b - m)*g/s + beta)``.

``g``, ``beta``, ``m`` and ``v`` are those of the batch-norm, and ``s = sqrt(v + eps)``.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.errors import CaptureWarning, TrainingModeError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of, shape_of
from fxquant.op_view import Op, kind_of
from fxquant.parameters import store_parameter
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.patterns.library import FOLD_PATTERNS
from fxquant.patterns.listed import listed_fold
from fxquant.patterns.matcher import MatchReport, match_all
from fxquant.rewriter import GraphRewriter
from fxquant.slices import scaled_rows


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch-norms into the convolution or linear before them.

    Module, function and mixed forms. Refuses, with the reason, where the value between is read by
    others, or where the weight belongs to more than this call.

    Raises:
        TrainingModeError: a batch-norm that would be folded is in training mode.
    """

    name: ClassVar[str] = "fold-batch-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.NO_IDENTITIES})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BATCH_NORM_FOLDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fold every match; batch-norms that stay say why in their record."""
        rewriter = GraphRewriter(gm, self.name)
        while (report := _matches(gm, context)).matches:
            for match in report.matches:  # another batch-norm may follow each
                base, norm = match.ops
                fold(rewriter, base, norm)
        nodes = {node.name: node for node in gm.graph.nodes}
        refusals = []
        for refusal in report.refusals:
            if not refusal.guard:
                continue  # no batch-norm follows: nothing was refused
            refusals.append(
                Refusal(node=refusal.anchor, reason=refusal.reason, culprits=refusal.culprits)
            )
            for user in nodes[refusal.anchor].users:
                kind = kind_of(gm, user)
                if kind is not None and kind.name == "batch_norm":
                    before = record_of(user)
                    add_reason(user, f"not folded: {refusal.reason}")
                    rewriter.changes += record_of(user) != before
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _matches(gm: QuantGraphModule, context: PassContext) -> MatchReport:
    listed = listed_fold(context.target)
    patterns = [replace(pattern, guards=(*listed, *pattern.guards)) for pattern in FOLD_PATTERNS]
    report = match_all(gm, patterns)
    _refuse_training(gm, report)
    _warn_of_rank(report, context)
    return report


def _refuse_training(gm: QuantGraphModule, report: MatchReport) -> None:
    """Stop at a batch-norm that trains for now; one that is written to train stays as it is."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for refusal in report.refusals:
        if refusal.guard != "evaluation_mode":
            continue
        if nodes[refusal.bound[-1]].op == "call_module" or gm.training:
            raise TrainingModeError(
                f"Fusion only for eval! {refusal.reason}, or use quantization-aware training to"
                " keep training it"
            )


def _warn_of_rank(report: MatchReport, context: PassContext) -> None:
    """Say where the channels are taken for dimension 1 because no shape is known."""
    for match in report.matches:
        base, norm = match.ops
        if base.name == "linear" and shape_of(base.node) is None:
            context.diagnostics.warn(
                f"{norm.node.name!r} is folded into {base.node.name!r} as if its input were (N, F);"
                " on (N, L, F) it normalises L, and the result is wrong. Pass example_inputs, from"
                " which the shape is known",
                CaptureWarning,
            )


def fold(rewriter: GraphRewriter, base: Op, norm: Op) -> None:
    """Fold ``norm`` into ``base`` and erase it.

    Args:
        rewriter: of the graph that holds both.
        base: convolution, transposed convolution or linear whose weight is its own.
        norm: batch-norm in evaluation mode that alone reads ``base``.
    """
    weight, bias = base.constant("weight"), base.constant("bias")
    assert weight is not None
    factor, shift = affine_of(norm)
    new_weight = scaled_rows(weight, spread_over_outputs(base, weight, factor))
    old_bias = torch.zeros_like(factor) if bias is None else bias.detach().to(torch.float64)
    new_bias = old_bias * factor + shift
    store_parameter(rewriter, base, "weight", new_weight, weight)
    store_parameter(rewriter, base, "bias", new_bias.to(weight.dtype), weight)
    constants = [a for a in norm.node.all_input_nodes if a.op == "get_attr"]
    rewriter.absorb(base.node, norm.node)
    rewriter.erase_dead(constants)


def affine_of(norm: Op) -> tuple[Tensor, Tensor]:
    """``(factor, shift)`` in float64 with ``BN(x) = x * factor + shift``, shapes ``[C]``."""
    mean, variance = norm.constant("running_mean"), norm.constant("running_var")
    assert mean is not None and variance is not None
    gamma, beta = norm.constant("weight"), norm.constant("bias")
    wide = torch.float64
    factor = (variance.detach().to(wide) + float(norm.arguments["eps"])).rsqrt()
    if gamma is not None:
        factor = factor * gamma.detach().to(wide)
    shift = -mean.detach().to(wide) * factor
    if beta is not None:
        shift = shift + beta.detach().to(wide)
    return factor, shift


def spread_over_outputs(base: Op, weight: Tensor, factor: Tensor) -> Tensor:
    """``factor`` shaped to multiply ``weight`` along its output channels."""
    if not base.name.startswith("conv_transpose"):
        return factor.reshape(-1, *[1] * (weight.dim() - 1))
    groups = int(base.arguments["groups"])
    per_group = factor.reshape(groups, 1, -1)  # weight is [in, out / groups, ...]
    spread = per_group.expand(groups, weight.shape[0] // groups, -1)
    return spread.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
