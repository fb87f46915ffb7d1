"""share-parameters: number the groups of tensors that must have one scale and zero point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult


@dataclass(frozen=True)
class ShareParameters(Pass):
    """Group values by connected components of the sharing graph.

    An op that keeps the parameters of its inputs (pooling, reshape, cat, ...) is an edge between
    its output and each of its inputs.
    """

    name: ClassVar[str] = "share-parameters"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ANNOTATED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.SHARED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Write the group's number into the record of every value in a group."""
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        graph: nx.Graph[fx.Node] = nx.Graph()
        for _, last, sources in sharing_edges(gm):
            graph.add_node(last)
            graph.add_edges_from((source, last) for source in sources)
        changes = 0
        components = sorted(nx.connected_components(graph), key=lambda c: min(order[n] for n in c))
        for number, component in enumerate(components):
            for node in component:
                if record_of(node).share_group != number:
                    update_record(node, share_group=number)
                    changes += 1
        return PassResult(changes=changes)


def sharing_edges(
    gm: QuantGraphModule, value_of: Callable[[fx.Node], fx.Node] = lambda node: node
) -> Iterator[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
    """The ops that keep the parameters of their inputs.

    Args:
        gm: an annotated graph, with or without observers.
        value_of: what an argument stands for.

    Yields:
        The op, the last node of its pattern, whose value it gives, and the values that it reads.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    for node in gm.graph.nodes:
        annotation, fusion = record_of(node).annotation, record_of(node).fusion
        if annotation is None or not annotation.shares:
            continue
        if fusion is not None and fusion.first != node.name:
            continue
        op = op_of(gm, node)
        assert op is not None
        last = node if fusion is None else nodes[fusion.last]
        yield node, last, tuple(value_of(source) for source in op.activations)
