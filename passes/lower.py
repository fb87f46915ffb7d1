"""lower: every ``dequantize - op - quantize`` region becomes a kernel of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.engines import consume_deprecation_warning
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.kernel_table import KernelTable
from fxquant.kernels import to_quantized
from fxquant.lowering import Bound, IntValue, Lowering, Representation, Site
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.op_view import op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.patterns.aliasing import Aliasing
from fxquant.rewriter import GraphRewriter
from fxquant.targets.emit_elementwise import emit_lookup
from fxquant.targets.x86_kernels import EMITTERS


@dataclass(frozen=True)
class Lower(Pass):
    """Emit kernels in graph order; what an emitter refuses stays a float op and says why.

    Args:
        kernels: measured times to choose by; ``None`` for the usual kernels.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.REFERENCE, Fact.CANCELLED, Fact.WEIGHTS_FIT}
    )
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})

    kernels: KernelTable | None = None

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Lower ``gm``; integers flow between kernels, floats where a reader wants them."""
        consume_deprecation_warning()
        rewriter = GraphRewriter(gm, self.name)
        nodes = list(gm.graph.nodes)
        groups = _groups(nodes)
        lowering = Lowering(
            rewriter,
            order=_order(nodes, groups),
            engines=context.target.engines,
            kernels=self.kernels,
        )
        refusals = []
        dead_before = {node for node in nodes if not node.users}
        for node in nodes:
            if record_of(node).gives_quantized:
                lowering.values[node] = lowering.describing_itself(node)
                continue
            if _gives_bytes(node) and node not in lowering.values:
                _quantize_float(lowering, node)
                continue
            site = _site_ending_at(gm, node, groups, lowering)
            if site is None:
                continue
            row = context.target.row_of(site.op)
            refusal = None if row is None else row.kernel_refusal(site.op)
            looked_up = row is not None and row.looked_up
            reason = refusal or (emit_lookup if looked_up else EMITTERS[site.op.name])(site)
            if reason is not None:
                add_reason(site.op.node, f"not lowered: {reason}")
                refusals.append(Refusal(node=site.op.node.name, reason=reason))
        _deliver_floats(lowering, nodes)
        _reshape_instead_of_view(gm, rewriter)
        rewriter.erase_dead(_leftovers(gm, dead_before))
        gm.update_state(stage=Stage.LOWERED, limits=tuple(lowering.limits))
        rewriter.changes += 1
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _reshape_instead_of_view(gm: QuantGraphModule, rewriter: GraphRewriter) -> None:
    """``x.view(...) -> x.reshape(...)`` on floats: kernels give channels_last, which view refuses.

    Not where an op that could not be made functional writes the memory: a copy would not see it.
    """
    views = [n for n in gm.graph.nodes if n.op == "call_method" and _is_view_of_shape(n)]
    if not views:
        return
    aliasing = Aliasing(gm, {node: index for index, node in enumerate(gm.graph.nodes)})
    first, last = next(iter(gm.graph.nodes)), next(iter(reversed(gm.graph.nodes)))
    for node in views:
        if aliasing.writer_between(node, first, last, ()) is None:
            rewriter.retarget_method(node, _RESHAPING[str(node.target)])


_RESHAPING = {"view": "reshape", "view_as": "reshape_as"}


def _is_view_of_shape(node: fx.Node) -> bool:
    dtypes = any(isinstance(argument, torch.dtype) for argument in node.args)
    return node.target in _RESHAPING and not dtypes and not node.kwargs


def _leftovers(gm: QuantGraphModule, dead_before: set[fx.Node]) -> list[fx.Node]:
    """Nodes without readers that had some before: what kernels replaced."""
    return [
        node
        for node in reversed(gm.graph.nodes)
        if not node.users and node.op not in ("output", "placeholder") and node not in dead_before
    ]


def _groups(nodes: list[fx.Node]) -> dict[int, list[fx.Node]]:
    groups: dict[int, list[fx.Node]] = {}
    for node in nodes:
        fusion = record_of(node).fusion
        if fusion is not None:
            groups.setdefault(fusion.group, []).append(node)
    return groups


def _order(nodes: list[fx.Node], groups: dict[int, list[fx.Node]]) -> dict[fx.Node, int]:
    """When each node's kernel runs: members of a pattern all with the last of them."""
    order = {node: position for position, node in enumerate(nodes)}
    for members in groups.values():
        order.update(dict.fromkeys(members, order[members[-1]]))
    return order


def _site_ending_at(
    gm: QuantGraphModule,
    node: fx.Node,
    groups: dict[int, list[fx.Node]],
    lowering: Lowering,
) -> Site | None:
    """The annotated op, with its epilogues, whose last node is ``node``."""
    record = record_of(node)
    if record.annotation is None:
        return None
    members = groups[record.fusion.group] if record.fusion is not None else [node]
    if members[-1] is not node:
        return None
    ops = [op_of(gm, member) for member in members]
    known = [op for op in ops if op is not None]
    if len(known) != len(ops) or known[0].name not in EMITTERS:
        return None
    quantize = _only_quantize(node, lowering)
    if record.annotation.shares and quantize is None:
        return None  # its readers were satisfied otherwise
    return Site(op=known[0], epilogues=tuple(known[1:]), quantize=quantize, lowering=lowering)


def _only_quantize(node: fx.Node, lowering: Lowering) -> fx.Node | None:
    users = list(node.users)
    if len(users) == 1 and _gives_bytes(users[0]) and users[0] not in lowering.values:
        return users[0]
    return None


def _gives_bytes(node: fx.Node) -> bool:
    """Whether ``node`` quantizes to uint8, which kernels take; to others, it stays as it is."""
    return node.target is QUANTIZE and node.args[5] is torch.uint8


def _quantize_float(lowering: Lowering, node: fx.Node) -> None:
    """Quantize a float value: an input of the network, or the result of a float op."""
    source, scale, zero_point, *_ = node.args
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    scale_name, zero_name = str(scale.target), str(zero_point.target)
    made = lowering.call(
        torch.quantize_per_tensor,
        (source, Bound(scale_name), Bound(zero_name), torch.quint8),
        at=node,
        like=node,
        kernel="aten::quantize_per_tensor",
    )
    made, held, _ = lowering.within(node, made, Representation.QUANTIZED, None, at=node)
    update_record(made, stands_for=node.name)
    lowering.values[node] = IntValue(
        node=made,
        representation=held,
        scale=scale_name,
        zero_point=zero_name,
        root=made,
    )


def _deliver_floats(lowering: Lowering, nodes: list[fx.Node]) -> None:
    """Give float readers a dequantize of the lowered value, and shape readers the integers.

    Readers that were lowered themselves get one too; they are dead and go with it.
    """
    for node in nodes:
        if _gives_bytes(node):
            value = lowering.values[node]
            for user in list(node.users):
                if user.target is to_quantized:
                    source = lowering.held_as(value, Representation.QUANTIZED, at=user)
                    lowering.rewriter.replace_uses(user, source)
                elif user.target is not DEQUANTIZE:
                    lowering.rewriter.replace_argument(user, node, value.node)
        elif node.target is DEQUANTIZE and node.args[0] in lowering.values:
            value = lowering.values[node.args[0]]
            source = lowering.held_as(value, Representation.QUANTIZED, at=node)
            made = lowering.call(
                torch.dequantize,
                (source,),
                at=node,
                like=node,
                kernel="aten::dequantize",
                dtype=torch.float32,
            )
            update_record(made, stands_for=node.name)
            lowering.rewriter.replace_uses(node, made)
