"""inline-modules: ``self.pool(x) -> F.adaptive_avg_pool2d(x, 1)`` for ops that stay in FP32.

A function call spares the module's ``__call__`` and its attribute look-ups, and lets a graph be
saved without the classes of its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import shape_of
from fxquant.op_catalog import REQUIRED
from fxquant.op_view import Form, Op, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.qat_modules import QatModule
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class InlineModules(Pass):
    """Turn calls of modules that the op catalogue knows into calls of their functions.

    Refuses modules that do more than their function: hooks, padding modes of convolutions, what
    depends on the training flag, and batch-norms without running statistics.
    """

    name: ClassVar[str] = "inline-modules"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULES_INLINED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Inline in graph order; parameters become reads of the same tensors."""
        rewriter = GraphRewriter(gm, self.name)
        refusals = []
        for node in list(gm.graph.nodes):
            op = op_of(gm, node)
            if op is None or op.form is not Form.MODULE or not op.kind.functions:
                continue
            reason = not_inlined(gm.get_submodule(str(node.target)), op)
            if reason is not None:
                refusals.append(Refusal(node=node.name, reason=reason))
                continue
            args, kwargs = _arguments(rewriter, op)
            rewriter.retarget(node, op.kind.functions[0], args, kwargs)
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def not_inlined(module: nn.Module, op: Op) -> str | None:
    """Why ``module`` does more than the function of ``op``, or ``None``."""
    if isinstance(module, QatModule):
        return "the module rounds its weight while it trains"
    if op.kind.definition:
        return f"the function of {op.name!r} only defines it; the module is faster"
    if module._forward_hooks or module._forward_pre_hooks:
        return "the module has forward hooks, which a function call would not run"
    if op.arguments.get("padding_mode", "zeros") != "zeros":
        return f"padding_mode={op.arguments['padding_mode']!r} is not part of the function"
    if op.arguments.get("training", False):
        return "the module is in training mode, which a function call would fix for good"
    if op.name == "instance_norm" and op.constant("running_mean") is not None:
        return "the instance-norm reads stored statistics in evaluation only"
    if op.name == "batch_norm" and shape_of(op.node) is None:
        return "without example inputs its class alone tells how many dimensions it normalizes"
    if op.name == "batch_norm" and op.constant("running_mean") is None:
        return "the batch-norm computes statistics at run time even in evaluation"
    return None


def _arguments(rewriter: GraphRewriter, op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Required parameters by position, others by name where they differ from the default.

    Some functions take options by name only (``gelu``), or not all that their kind has.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, default in op.kind.signature:
        value = op.arguments.get(name, default)
        if name in op.kind.constants:
            path = op.constant_path(name)
            value = None if path is None else rewriter.get_attr(path, before=op.node, like=op.node)
        if default is REQUIRED:
            args.append(value)
        elif value is not default and value != default:
            kwargs[name] = value
    return tuple(args), kwargs
