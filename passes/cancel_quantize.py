"""cancel-quantize: ``Q(DQ(q)) -> q`` under equal parameters, one DQ a value, none for a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import fx

from fxquant.dataflow import reads_only_shape
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, record_of, update_record
from fxquant.op_view import op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE, TO_DTYPE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class CancelQuantize(Pass):
    """Take out quantize and dequantize steps, and casts to float16, that change nothing.

    Equal means the same buffers and the same range: then quantizing what was just dequantized
    gives the same integers exactly.
    """

    name: ClassVar[str] = "cancel-quantize"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE, Fact.ABSORBED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CANCELLED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Four rewrites: equal pairs, casts, duplicates, and shapes read from integers."""
        rewriter = GraphRewriter(gm, self.name)
        _cancel_pairs(rewriter)
        _cancel_casts(rewriter)
        _merge_duplicates(rewriter)
        _read_shapes_from_integers(rewriter)
        return PassResult(changes=rewriter.finish())


def _cancel_pairs(rewriter: GraphRewriter) -> None:
    for node in list(rewriter.gm.graph.nodes):
        if node.target is not QUANTIZE:
            continue
        dequantize = node.args[0]
        if not isinstance(dequantize, fx.Node) or dequantize.target is not DEQUANTIZE:
            continue
        source = dequantize.args[0]
        if not isinstance(source, fx.Node) or source.target is not QUANTIZE:
            continue
        if _parameters(source) != _parameters(node):
            continue
        rewriter.replace_uses(node, source)
        rewriter.erase_dead([node])


def _cancel_casts(rewriter: GraphRewriter) -> None:
    """Let what only moves values move them in float16, where it reads and gives such values."""
    for node in list(rewriter.gm.graph.nodes):
        moved = _cast_from(node, torch.float16)
        op = None if moved is None else op_of(rewriter.gm, moved)
        if moved is None or op is None or op.name not in _MOVING or len(moved.users) != 1:
            continue
        whole = op.activations[0] if op.activations else moved
        half = _cast_from(whole, torch.float32)
        if half is None or _cast_from(half, torch.float16) is None:
            continue
        rewriter.replace_argument(moved, whole, half)
        record = record_of(moved).value
        if isinstance(record, TensorRecord):
            update_record(moved, value=replace(record, dtype=torch.float16))
        rewriter.replace_uses(node, moved)
        rewriter.erase_dead([node, whole])


_MOVING: Final = frozenset({"identity", "reshape", "flatten", "transpose", "permute", "view"})


def _cast_from(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """What ``node`` casts to ``dtype``, or ``None`` where it is no such cast."""
    if node.target is not TO_DTYPE or node.args[1] is not dtype:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def _merge_duplicates(rewriter: GraphRewriter) -> None:
    seen: dict[object, fx.Node] = {}
    for node in list(rewriter.gm.graph.nodes):
        if node.target not in (QUANTIZE, DEQUANTIZE):
            continue
        key = (node.target, node.args[0], _parameters(node))
        first = seen.setdefault(key, node)
        if first is not node:
            rewriter.replace_uses(node, first)
            rewriter.erase_dead([node])


def _read_shapes_from_integers(rewriter: GraphRewriter) -> None:
    for node in list(rewriter.gm.graph.nodes):
        dequantizes = node.target in (DEQUANTIZE, torch.dequantize)
        if not dequantizes or not isinstance(node.args[0], fx.Node):
            continue
        for user in list(node.users):
            if reads_only_shape(user) and user.args[-1:] != ("dtype",):
                rewriter.replace_argument(user, node, node.args[0])
        rewriter.erase_dead([node])


def _parameters(node: fx.Node) -> tuple[object, ...]:
    """What decides whether two quantizations are equal: buffer names, range, dtype, axis."""
    return tuple(a.target if isinstance(a, fx.Node) else a for a in node.args[1:])
