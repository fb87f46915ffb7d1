"""fold-batch-norm: ``BN(Conv(x; W, b)) -> Conv(x; W*g/s, (b - m)*g/s + beta)``.

``g``, ``beta``, ``m`` and ``v`` are those of the batch-norm, and ``s = sqrt(v + eps)``.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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

    Attributes:
        arithmetic: new weight and bias of an op from it and the batch-norm behind it.

    Raises:
        TrainingModeError: a batch-norm that would be folded is in training mode.
    """

    arithmetic: Callable[[Op, Op], tuple[Tensor, Tensor]] = field(
        default_factory=lambda: folded_exactly
    )

    name: ClassVar[str] = "fold-batch-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.NO_IDENTITIES})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BATCH_NORM_FOLDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fold every match; batch-norms that stay say why in their record."""
        rewriter = GraphRewriter(gm, self.name)
        while (report := _matches(gm, context)).matches:
            for match in report.matches:  # another batch-norm may follow each
                base, norm = match.ops
                fold(rewriter, base, norm, self.arithmetic)
        refusals = tell_refusals(rewriter, report, "not folded")
        return PassResult(changes=rewriter.finish(), refusals=refusals)


def tell_refusals(
    rewriter: GraphRewriter, report: MatchReport, consequence: str
) -> tuple[Refusal, ...]:
    """Write the reasons for which batch-norms stay to their records.

    Args:
        rewriter: of the graph; counts the records that changed.
        report: of patterns that end in a batch-norm.
        consequence: what became of the batch-norm: ``not folded``.

    Returns:
        What the pass refused.
    """
    gm, found = rewriter.gm, []
    nodes = {node.name: node for node in gm.graph.nodes}
    for refusal in report.refusals:
        if not refusal.guard:
            continue  # no batch-norm follows: nothing was refused
        found.append(Refusal(node=refusal.anchor, reason=refusal.reason, culprits=refusal.culprits))
        for user in nodes[refusal.anchor].users:
            kind = kind_of(gm, user)
            if kind is not None and kind.name == "batch_norm":
                before = record_of(user)
                add_reason(user, f"{consequence}: {refusal.reason}")
                rewriter.changes += record_of(user) != before
    return tuple(found)


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


def fold(
    rewriter: GraphRewriter,
    base: Op,
    norm: Op,
    arithmetic: Callable[[Op, Op], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Fold one batch-norm into the op before it.

    Args:
        rewriter: of their graph.
        base: convolution or linear.
        norm: batch-norm in evaluation mode that alone reads ``base``.
        arithmetic: see :class:`FoldBatchNorm`.
    """
    weight = base.constant("weight")
    assert weight is not None
    new_weight, new_bias = (arithmetic or folded_exactly)(base, norm)
    store_parameter(rewriter, base, "weight", new_weight, weight)
    store_parameter(rewriter, base, "bias", new_bias, weight)
    constants = [a for a in norm.node.all_input_nodes if a.op == "get_attr"]
    rewriter.absorb(base.node, norm.node)
    rewriter.erase_dead(constants)


def folded_exactly(base: Op, norm: Op) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, rounded once."""
    weight, bias = base.constant("weight"), base.constant("bias")
    assert weight is not None
    factor, shift = affine_of(norm)
    new_weight = scaled_rows(weight, spread_over_outputs(base, weight, factor))
    old_bias = torch.zeros_like(factor) if bias is None else bias.detach().to(torch.float64)
    return new_weight, (old_bias * factor + shift).to(weight.dtype)


def folded_as_torch(base: Op, norm: Op) -> tuple[Tensor, Tensor]:
    """Weight and bias in their own dtype, step by step as ``torch.nn.utils.fusion`` has it.

    The int8 weights of a network folded by PyTorch are then the same to the last bit.
    """
    weight, bias = base.constant("weight"), base.constant("bias")
    mean, variance = norm.constant("running_mean"), norm.constant("running_var")
    assert weight is not None and mean is not None and variance is not None
    gamma, beta = norm.constant("weight"), norm.constant("bias")
    gamma = torch.ones_like(mean) if gamma is None else gamma.detach()
    beta = torch.zeros_like(mean) if beta is None else beta.detach()
    old_bias = torch.zeros_like(mean) if bias is None else bias.detach()
    inverse = (variance.detach() + float(norm.arguments["eps"])).rsqrt()
    factor = gamma * inverse
    new_weight = weight.detach() * spread_over_outputs(base, weight, factor)
    centred = old_bias - mean.detach()
    if base.name == "linear":
        return new_weight, centred * factor + beta
    return new_weight, centred * inverse * gamma + beta


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
