"""What guards ask about a graph, each answer computed at most once per run of the matcher.

The facts describe the graph as it was when they were computed; nothing here is stored on nodes.
"""

from __future__ import annotations

from functools import cached_property

from torch import fx

from fxquant.op_catalog import OpKind
from fxquant.op_view import Op, kind_of, op_of
from fxquant.patterns.aliasing import Aliasing
from fxquant.patterns.ownership import ParameterOwners


class GraphFacts:
    """Positions, ops, users, memory and parameter owners of one graph.

    Args:
        gm: the module that owns the graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.position: dict[fx.Node, int] = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._kinds: dict[fx.Node, OpKind | None] = {}
        self._ops: dict[fx.Node, Op | None] = {}
        self._users: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def kind(self, node: fx.Node) -> OpKind | None:
        """The kind of ``node``."""
        if node not in self._kinds:
            self._kinds[node] = kind_of(self.gm, node)
        return self._kinds[node]

    def op(self, node: fx.Node) -> Op | None:
        """The view of ``node``."""
        if node not in self._ops:
            self._ops[node] = op_of(self.gm, node)
        return self._ops[node]

    def users(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The users of ``node`` in graph order."""
        if node not in self._users:
            self._users[node] = tuple(sorted(node.users, key=self.position.__getitem__))
        return self._users[node]

    @cached_property
    def aliasing(self) -> Aliasing:
        """Which values share memory, and who writes it."""
        return Aliasing(self.gm, self.position)

    @cached_property
    def owners(self) -> ParameterOwners:
        """Which nodes read which parameter."""
        return ParameterOwners(self.gm)
