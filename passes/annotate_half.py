"""annotate-half: which ops run in float16 or bfloat16, as their qconfig asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.dataflow import has_float_input, is_float_tensor, reads_only_shape
from fxquant.errors import ConfigWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.half import half_dtype
from fxquant.metadata import TensorRecord, add_reason, record_of, update_record
from fxquant.op_catalog import COMPUTE_KINDS
from fxquant.op_view import Form, Op, op_of, type_name
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.annotate import hooked, overwritten_values, written_in_place
from fxquant.passes.inline_modules import not_inlined

_OPS = ("call_module", "call_function", "call_method")


@dataclass(frozen=True)
class AnnotateHalf(Pass):
    """Mark the ops that run in half precision; the others say why not.

    Products (convolution, linear, matmul) always do. Other ops follow: they run in the dtype of
    what comes in, where their own qconfig asks for the same; alone they would only add casts. In a
    pattern the first op's qconfig governs.
    """

    name: ClassVar[str] = "annotate-half"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QCONFIGS, Fact.FUSED, Fact.ANNOTATED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.HALF_ANNOTATED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Decide in graph order."""
        before = {node: record_of(node) for node in gm.graph.nodes}
        nodes = {node.name: node for node in gm.graph.nodes}
        wishes = {}
        for node in nodes.values():
            fusion = record_of(node).fusion
            governing = node if fusion is None else nodes[fusion.first]
            dtype = half_dtype(record_of(governing).qconfig)
            reads = has_float_input(gm, node) and not reads_only_shape(node)
            if dtype is not None and node.op in _OPS and reads:
                wishes[node] = dtype
        overwritten = overwritten_values(gm) if wishes else {}
        for node, dtype in wishes.items():
            _decide(gm, node, dtype, overwritten, context)
        changes = sum(record_of(node) != record for node, record in before.items())
        return PassResult(changes=changes)


def _decide(
    gm: QuantGraphModule,
    node: fx.Node,
    dtype: torch.dtype,
    overwritten: dict[fx.Node, fx.Node],
    context: PassContext,
) -> None:
    wish = str(dtype).removeprefix("torch.")
    op = op_of(gm, node)
    if op is None or op.name not in context.target.half_kinds:
        name = op.name if op is not None else type_name(gm, node)
        problem: str | None = f"target {context.target.name!r} runs no '{name}' in {wish}"
    else:
        problem = (
            _unusable_inputs(gm, op)
            or _module_at_work(gm, op)
            or hooked(gm, node)
            or written_in_place(node, overwritten)
        )
    if problem is not None:
        add_reason(node, f"config cannot be honoured: {problem}")
        if op is not None and op.name in COMPUTE_KINDS:
            context.diagnostics.warn(
                f"{node.name!r} ({op.name}) stays in FP32: {problem}; its qconfig, from"
                f" {record_of(node).rule}, asks for {wish}. Set None there",
                ConfigWarning,
            )
        return
    assert op is not None
    sources = [s for s in op.activations if is_float_tensor(gm, s)]
    follows = any(record_of(source).runs_in is dtype for source in sources)
    if op.name not in COMPUTE_KINDS and not follows:
        add_reason(node, f"what comes in is no {wish}, so {wish} would add casts only")
        return
    update_record(node, runs_in=dtype)


def _unusable_inputs(gm: QuantGraphModule, op: Op) -> str | None:
    for source in op.activations:
        value = record_of(source).value
        if isinstance(value, TensorRecord) and value.dtype is not torch.float32:
            shown = str(value.dtype).removeprefix("torch.")
            return f"its input {source.name!r} is {shown}, and casts are made from float32"
    if op.name in COMPUTE_KINDS and any(op.computes(n) for n in ("weight", "bias")):
        return "its weight or bias is computed in the graph"
    return None


def _module_at_work(gm: QuantGraphModule, op: Op) -> str | None:
    if op.form is not Form.MODULE:
        return None
    if not op.kind.functions:
        return f"{type_name(gm, op.node)} has no function to be called with half weights"
    return not_inlined(gm.get_submodule(str(op.node.target)), op)
