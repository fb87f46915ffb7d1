"""cast-half: ops that run in half precision get half constants, and casts where regions end.

``f(x; W) -> float32(f(half(x); half(W)))``, and ``half(float32(h)) -> h``, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxquant.dataflow import is_float_tensor, reads_only_shape
from fxquant.graph_module import QuantGraphModule
from fxquant.half import NORMALIZATIONS
from fxquant.metadata import TensorRecord, add_reason, record_of, update_record
from fxquant.op_view import attribute, kind_of
from fxquant.operators import TO_DTYPE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class CastHalf(Pass):
    """Cast what the marked ops read and give; between two of them nothing is cast.

    Constants are cast once, here; what float16 cannot hold is saturated, and said. Parameters of
    normalizations stay in float32, which their kernels take.
    """

    name: ClassVar[str] = "cast-half"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE, Fact.MODULES_INLINED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.HALF_CAST})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Cast in graph order, then take out what cancels."""
        if any(record_of(node).made_by == self.name for node in gm.graph.nodes):
            return PassResult(changes=0)  # marks are made before, all of them at once
        rewriter = GraphRewriter(gm, self.name)
        marked = [node for node in gm.graph.nodes if record_of(node).runs_in is not None]
        constants: dict[tuple[str, torch.dtype], str] = {}
        for node in marked:
            dtype = record_of(node).runs_in
            assert dtype is not None
            _cast_inputs(rewriter, node, dtype, constants)
            _cast_output(rewriter, node, dtype)
        _cancel(rewriter)
        return PassResult(changes=rewriter.finish())


def _cast_inputs(
    rewriter: GraphRewriter,
    node: fx.Node,
    dtype: torch.dtype,
    constants: dict[tuple[str, torch.dtype], str],
) -> None:
    kind = kind_of(rewriter.gm, node)
    keeps = kind is not None and kind.name in NORMALIZATIONS
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            value = attribute(rewriter.gm, str(source.target))
            wide = isinstance(value, torch.Tensor) and value.dtype is torch.float32
            if not wide or keeps:
                continue
            made = _half_constant(rewriter, node, source, dtype, constants)
        elif source.target is TO_DTYPE or is_float_tensor(rewriter.gm, source):
            made = rewriter.call(TO_DTYPE, (source, dtype), before=node, like=source, dtype=dtype)
        else:
            continue
        rewriter.replace_argument(node, source, made)
        if source.op == "get_attr":
            rewriter.erase_dead([source])


def _half_constant(
    rewriter: GraphRewriter,
    node: fx.Node,
    source: fx.Node,
    dtype: torch.dtype,
    constants: dict[tuple[str, torch.dtype], str],
) -> fx.Node:
    path = str(source.target)
    value = attribute(rewriter.gm, path).detach()
    limit = torch.finfo(dtype).max
    beyond = int((value.abs() > limit).sum())
    if beyond:
        add_reason(node, f"{beyond} value(s) of {path!r} are cut to +-{limit:g}")
    if (path, dtype) not in constants:
        half = value.clamp(-limit, limit).to(dtype)
        if half.dim() == 4:  # kernels repack the weight at every call, in half the time from this
            half = torch.empty_like(half, memory_format=torch.channels_last).copy_(half)
        constants[path, dtype] = rewriter.new_buffer(f"{path}_{_short(dtype)}", half)
    return rewriter.get_attr(constants[path, dtype], before=node, like=source)


def _cast_output(rewriter: GraphRewriter, node: fx.Node, dtype: torch.dtype) -> None:
    value = record_of(node).value
    if isinstance(value, TensorRecord):
        update_record(node, value=replace(value, dtype=dtype))
    readers = [u for u in node.users if not reads_only_shape(u) or u.args[-1:] == ("dtype",)]
    made = rewriter.call(
        TO_DTYPE, (node, torch.float32), after=node, like=node, dtype=torch.float32
    )
    for reader in readers:
        rewriter.replace_argument(reader, node, made)


def _cancel(rewriter: GraphRewriter) -> None:
    """``half(float32(h)) -> h``, and one cast for all who want the same."""
    seen: dict[object, fx.Node] = {}
    own = CastHalf.name
    casts = [n for n in rewriter.gm.graph.nodes if record_of(n).made_by == own and n.args[1:]]
    for node in casts:
        source, dtype = node.args
        assert isinstance(source, fx.Node)
        inner = source.args[0] if source.target is TO_DTYPE else None
        if isinstance(inner, fx.Node) and record_of(inner).runs_in is dtype:
            rewriter.replace_uses(node, inner)
            continue
        first = seen.setdefault((source, dtype), node)
        if first is not node:
            rewriter.replace_uses(node, first)
    rewriter.erase_dead(list(reversed(casts)))


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
