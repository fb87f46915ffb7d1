"""inline-modules: ``self.pool(x) -> F.adaptive_avg_pool2d(x, 1)`` for ops that stay in FP32.

A function call spares the module's ``__call__`` and its attribute look-ups, and lets a graph be
saved without the classes of its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import Form, Op, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class InlineModules(Pass):
    """Turn calls of modules that the op catalogue knows into calls of their functions.

    Refuses modules that do more than their function: hooks, and padding modes of convolutions.
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
            reason = _refusal(gm.get_submodule(str(node.target)), op)
            if reason is not None:
                refusals.append(Refusal(node=node.name, reason=reason))
                continue
            rewriter.retarget(node, op.kind.functions[0], _arguments(rewriter, op))
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _refusal(module: nn.Module, op: Op) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return "the module has forward hooks, which a function call would not run"
    if op.arguments.get("padding_mode", "zeros") != "zeros":
        return f"padding_mode={op.arguments['padding_mode']!r} is not part of the function"
    return None


def _arguments(rewriter: GraphRewriter, op: Op) -> tuple[Any, ...]:
    arguments: list[Any] = []
    for name, default in op.kind.signature:
        if name not in op.kind.constants:
            arguments.append(op.arguments.get(name, default))
            continue
        path = op.constant_path(name)
        arguments.append(
            None if path is None else rewriter.get_attr(path, before=op.node, like=op.node)
        )
    return tuple(arguments)
