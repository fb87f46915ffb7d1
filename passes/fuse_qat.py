"""fuse-qat: a batch-norm trains inside the convolution or linear that it will be folded into.

::

    y = bn(conv(x))        y = QatConvBn2d(x), with conv's name and parameters and bn's as ``.bn``

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import Form, Op, attribute
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.fold_batch_norm import tell_refusals
from fxquant.patterns.library import QAT_FUSION_PATTERNS, QAT_PATTERNS, with_any_operand
from fxquant.patterns.listed import listed_fold
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.matcher import match_all
from fxquant.patterns.pattern import guard
from fxquant.qat_modules import QatLinearBn1d, training_form
from fxquant.rewriter import GraphRewriter

_MODULES: Final[Mapping[str, type[Any]]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
    "linear": nn.Linear,
}
TRANSPOSED: Final = frozenset(kind for kind in _MODULES if kind.startswith("conv_transpose"))
_OPTIONS: Final = ("stride", "padding", "output_padding", "dilation", "groups")


@guard
def trains_as_module(match: Match) -> Reason | None:
    """The batch-norm is a module, and what a function is called with are numbers."""
    base, norm = match.ops
    if norm.form is not Form.MODULE:
        return because(
            "{node!r} calls F.batch_norm, whose mode the trace fixed to training={mode}; use a"
            " BatchNorm module to train it fused",
            norm.node.name,
            node=norm.node.name,
            mode=norm.arguments["training"],
        )
    if base.form is Form.MODULE:
        return None
    for name in _OPTIONS:
        value = base.arguments.get(name)
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, fx.Node):
                return because(
                    "{name} of {node!r} is computed in the graph by {source!r}",
                    item.name,
                    name=name,
                    node=base.node.name,
                    source=item.name,
                )
    return None


@guard
def no_linear_batch_norm(match: Match) -> Reason | None:
    """torch.ao trains a linear and its batch-norm without the activation behind them."""
    node = match.first
    module = match.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, QatLinearBn1d):
        return None
    return because("{node!r} trains with its batch-norm, and alone", node=node.name)


TORCH_FUSION_PATTERNS: Final = tuple(
    replace(pattern, guards=(no_linear_batch_norm, *pattern.guards))
    for pattern in with_any_operand(QAT_FUSION_PATTERNS)
)
"""Chains that torch.ao observes as one while they train."""


@dataclass(frozen=True)
class FuseQat(Pass):
    """Put every batch-norm that would be folded into a module that trains with the folded weight.

    Module, function and mixed forms, in training and in evaluation mode. Refuses, with the reason,
    where the value between is read by others, where the weight or the statistics belong to more
    than this call, and where one of the two trains and the other does not.

    Attributes:
        refused: kinds behind which a batch-norm is an error.

    Raises:
        ConfigError: a batch-norm follows one of ``refused``.
    """

    refused: frozenset[str] = frozenset()

    name: ClassVar[str] = "fuse-qat"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.NO_IDENTITIES})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BATCH_NORM_FOLDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fuse every match; batch-norms that stay say why in their record."""
        rewriter = GraphRewriter(gm, self.name)
        listed = listed_fold(context.target)
        report = match_all(
            gm,
            [
                replace(pattern, guards=(*listed, *pattern.guards, trains_as_module))
                for pattern in QAT_PATTERNS
            ],
        )
        for match in report.matches:
            base, norm = match.ops
            self._check(base, norm)
            _fuse(rewriter, base, norm)
        refusals = tell_refusals(rewriter, report, "not trained fused")
        return PassResult(changes=rewriter.finish(), refusals=refusals)

    def _check(self, base: Op, norm: Op) -> None:
        if base.name in self.refused:
            raise ConfigError(
                "Fusing ConvTranspose+BatchNorm not yet supported in QAT."
                f" ({base.node.name!r} and {norm.node.name!r}: torch.ao has no such module;"
                " fxquant.prepare_qat_fx has)"
            )


def _fuse(rewriter: GraphRewriter, base: Op, norm: Op) -> None:
    gm = rewriter.gm
    norm_module = gm.get_submodule(str(norm.node.target))
    if base.form is Form.MODULE:
        path = str(base.node.target)
        fused = training_form(gm.get_submodule(path), norm_module)
    else:
        path = _path_for(rewriter, base)
        fused = training_form(_as_module(base), norm_module)
        fused.training = norm_module.training
        constants = [a for a in base.node.all_input_nodes if a.op == "get_attr"]
        rewriter.retarget_module(base.node, path, (base.arguments["input"],))
        rewriter.erase_dead(constants)
    rewriter.set_module(path, fused)
    rewriter.absorb(base.node, norm.node)


def _as_module(base: Op) -> nn.Module:
    """The module of a function call, with the very parameters that the call reads."""
    weight = base.constant("weight")
    assert weight is not None
    made_of = _MODULES[base.name]
    if base.name == "linear":
        module: Any = made_of(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        groups = int(base.arguments["groups"])
        channels = [int(weight.shape[0]), int(weight.shape[1])]
        transposed = base.name.startswith("conv_transpose")
        channels[1] *= groups
        options = {name: base.arguments[name] for name in _OPTIONS if name in base.arguments}
        inputs, outputs = channels if transposed else reversed(channels)
        module = made_of(
            inputs, outputs, tuple(weight.shape[2:]), **options, bias=False, device="meta"
        )
    for name in ("weight", "bias"):
        value = base.constant(name)
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        module._parameters[name] = value
    return module  # type: ignore[no-any-return]  # one of the classes above


def _path_for(rewriter: GraphRewriter, base: Op) -> str:
    """Where the module of a function goes: where its weight is, if nothing else is there."""
    weight = base.constant_path("weight")
    assert weight is not None
    holder, _, name = weight.rpartition(".")
    own = {"weight": weight, "bias": base.constant_path("bias")}
    if holder and name == "weight" and own["bias"] in (None, f"{holder}.bias"):
        module = attribute(rewriter.gm, holder)
        held = {*module._parameters, *module._buffers, *module._modules}
        if held <= {"weight", "bias"}:
            return holder
    return rewriter.fresh_path(base.node.name)
