"""correct-bias: ``b -> b - sum((Q(W) - W) * E[x])``: rounding a weight no longer shifts the output.

``E[x]`` is the mean input per channel over the calibration data; borders count like the interior.
Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.channel_mean import ChannelMean
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import Annotation, add_reason, record_of
from fxquant.op_view import Op, op_of
from fxquant.parameters import store_parameter
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.rewriter import GraphRewriter
from fxquant.slices import row_slices, rows_of
from fxquant.specs import dequantize
from fxquant.weight_fit import WeightFitter


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct the biases of convolutions and linears, and take the channel means out.

    Refuses where a bias or weight serves several calls, whose inputs have different means, and
    where no calibration data came by.
    """

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BIAS_CORRECTED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Correct in graph order; the size of each correction is kept in the op's reasons."""
        rewriter = GraphRewriter(gm, self.name)
        uses = _uses(gm)
        fitter = WeightFitter(gm, context.target.select_kernel, context.weights)
        refusals = []
        for node in list(gm.graph.nodes):
            if node.op != "call_module":
                continue
            watcher = gm.get_submodule(str(node.target))
            if not isinstance(watcher, ChannelMean):
                continue
            source = node.all_input_nodes[0]
            for reader in list(node.users):
                reason = self._correct(rewriter, reader, watcher.mean, uses, fitter)
                if reason is not None:
                    refusals.append(Refusal(node=reader.name, reason=reason))
            rewriter.replace_uses(node, source)
            rewriter.erase(node)
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))

    def _correct(
        self,
        rewriter: GraphRewriter,
        node: fx.Node,
        mean: Tensor | None,
        uses: dict[str, int],
        fitter: WeightFitter,
    ) -> str | None:
        op, annotation = op_of(rewriter.gm, node), record_of(node).annotation
        if op is None or annotation is None or annotation.weight is None:
            return None
        if mean is None:
            return "its input was never seen, so its mean is unknown"
        for name in ("weight", "bias"):
            path = op.constant_path(name)
            if path is not None and uses[path] > 1:
                return f"its {name} {path!r} serves {uses[path]} calls with inputs of their own"
        correction = weight_shift(node, op, annotation, mean, fitter)
        weight, bias = op.constant("weight"), op.constant("bias")
        assert weight is not None
        old = torch.zeros_like(correction) if bias is None else bias.detach().to(torch.float64)
        like = weight if bias is None else bias
        store_parameter(rewriter, op, "bias", (old - correction).to(weight.dtype), like)
        add_reason(node, f"bias corrected by up to {float(correction.abs().max()):.3g}")
        return None


def weight_shift(
    node: fx.Node, op: Op, annotation: Annotation, mean: Tensor, fitter: WeightFitter
) -> Tensor:
    """Mean output error of rounding the weight: ``sum((Q(W) - W) * mean)``, float64 ``[O]``.

    Args:
        node: the op's node, whose qconfig makes the weight observer.
        op: convolution (weight ``[O, I / groups, ...]``) or linear (``[O, I]``).
        annotation: with the weight's spec.
        mean: mean input per channel, float64 ``[I]``.
        fitter: gives the weight's parameters.
    """
    path = op.constant_path("weight")
    weight, qconfig = op.constant("weight"), record_of(node).qconfig
    assert weight is not None and qconfig is not None and annotation.weight is not None
    assert path is not None
    weight = weight.detach()
    qparams = fitter.qparams(node, path, weight, annotation.weight, qconfig)
    integers = fitter.integers(path, weight, qparams)
    groups = int(op.arguments.get("groups", 1))
    means = mean.reshape(groups, -1)
    group_of = torch.arange(weight.shape[0]) // (weight.shape[0] // groups)
    shifts = []
    for part in row_slices(weight):
        own = rows_of(qparams, part, weight.dim())
        error = dequantize(integers[part], own).sub_(weight[part]).to(torch.float64)
        per_input = error.flatten(2).sum(2) if error.dim() > 2 else error
        per_group = means if groups == 1 else means[group_of[part]]
        shifts.append((per_input * per_group).sum(1))
    return torch.cat(shifts)


def _uses(gm: QuantGraphModule) -> dict[str, int]:
    """How many calls read each weight and bias."""
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        op = op_of(gm, node)
        if op is None:
            continue
        for name in ("weight", "bias"):
            path = op.constant_path(name) if name in op.kind.constants else None
            if path is not None:
                counts[path] = counts.get(path, 0) + 1
    return counts
