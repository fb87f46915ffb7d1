"""split-shared: ``cat(a, b)`` shares one scale, or requantizes ``a``: whichever loses less."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
from torch import fx, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.observed import merged, unite, was_observed
from fxquant.observers import FixedQParamsObserver
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.insert_observers import OBSERVER_PREFIX
from fxquant.passes.share_parameters import sharing_edges
from fxquant.rewriter import GraphRewriter

_NOTICED = 1.05
"""How much wider a shared scale must be for a word about it."""


@dataclass(frozen=True)
class SplitShared(Pass):
    """Give an input of ``cat``, ``stack``, ``maximum`` or ``minimum`` its own scale where it pays.

    All values of a sharing group have the scale ``s`` of the union of their ranges. Rounding to
    multiples of ``s`` adds noise of power ``s**2 / 12`` to what each reader sees. With a scale
    ``s_a < s`` of its own, and requantized to ``s`` before the op that joins it, an input ``a``
    serves its own ``r_a`` readers with ``s_a**2 / 12``, and adds as much once more to the ``r``
    readers behind the joint::

        shared     (r_a + r) s**2
        apart      r_a s_a**2 + r (s**2 + s_a**2)
        apart if   r_a (s**2 - s_a**2) > r s_a**2

    So an input that nobody else reads shares. A scale that its observer fixes is never given up:
    such an input is always requantized. Groups that trained with one scale keep it.
    """

    name: ClassVar[str] = "split-shared"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.GROUPS_SPLIT})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Decide joint by joint, in graph order, on the statistics of the observers."""
        before = {node: record_of(node) for node in gm.graph.nodes}
        groups = _Groups(gm, GraphRewriter(gm, self.name))
        for joint, last, sources in groups.joints:
            for source in sources:
                groups.decide(joint, last, source)
        records = sum(record_of(n) != r for n, r in before.items() if not n._erased)
        return PassResult(changes=groups.rewriter.finish() + records)


class _Groups:
    """The sharing graph of a prepared model, and what its observers saw."""

    def __init__(self, gm: QuantGraphModule, rewriter: GraphRewriter) -> None:
        self.gm = gm
        self.rewriter = rewriter
        self.graph: nx.Graph[fx.Node] = nx.Graph()
        self.joints: list[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]] = []
        for first, last, sources in sharing_edges(gm, value_of=_value_of):
            self.graph.add_node(last)
            self.graph.add_edges_from((source, last) for source in sources)
            if len(set(sources)) > 1:
                self.joints.append((first, last, tuple(dict.fromkeys(sources))))
        self.observers: dict[fx.Node, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if _is_observer(node) and record_of(node).share_group is not None:
                self.observers.setdefault(_value_of(node), []).append(node)
        numbers = [record_of(node).share_group for node in gm.graph.nodes]
        self.free = max((n for n in numbers if n is not None), default=-1) + 1

    def decide(self, joint: fx.Node, last: fx.Node, source: fx.Node) -> None:
        """Cut ``source`` off ``joint`` and requantize it there, or leave both in one group."""
        if not self.graph.has_edge(source, last) or _is_observer(source):
            return  # it is requantized already
        self.graph.remove_edge(source, last)
        own, whole = (nx.node_connected_component(self.graph, n) for n in (source, last))
        if last in own or not self._calibrated(own) or not self._calibrated(whole):
            self.graph.add_edge(source, last)
            return
        modules = self._modules(own)
        alone = float(unite(modules).scale)
        shared = float(unite([*modules, *self._modules(whole)]).scale)
        readers, behind = self._readers(own), max(self._readers(whole), 1)
        fixed = self._is_fixed(modules) and not self._is_fixed(self._modules(whole))
        if fixed or readers * (shared**2 - alone**2) > behind * alone**2:
            self._cut(joint, source, own, record_of(last).share_group)
            why = (
                "which its observer fixes"
                if fixed
                else f"not {shared:.3g}: {readers} other reader(s) would lose more than this does"
            )
            add_reason(
                joint, f"{source.name!r} keeps its scale {alone:.3g}, {why}; it is requantized here"
            )
            return
        self.graph.add_edge(source, last)
        if shared > _NOTICED * alone:
            who = f"its {readers} other reader(s) lose less" if readers else "nobody else reads it"
            scales = f"the common scale {shared:.3g} instead of {alone:.3g}"
            add_reason(joint, f"{source.name!r} has {scales}: {who}")

    def _calibrated(self, component: Iterable[fx.Node]) -> bool:
        """Whether observers saw data there, and none of them rounded while it trained."""
        modules = self._modules(component)
        return bool(modules) and all(
            was_observed(m) and not hasattr(m, "fake_quant_enabled") for m in modules
        )

    def _modules(self, component: Iterable[fx.Node]) -> list[nn.Module]:
        nodes = [o for value in component for o in self.observers.get(value, [])]
        return [self.gm.get_submodule(str(node.target)) for node in nodes]

    def _is_fixed(self, modules: list[nn.Module]) -> bool:
        return any(isinstance(module, FixedQParamsObserver) for module in modules)

    def _readers(self, component: Iterable[fx.Node]) -> int:
        """How many ops compute on integers of the component's values."""
        found = set()
        for value in component:
            for reader in (value, *self.observers.get(value, [])):
                for user in reader.users:
                    annotation = record_of(user).annotation
                    if annotation is not None and not annotation.shares and any(annotation.inputs):
                        found.add(user)
        return len(found)

    def _cut(
        self, joint: fx.Node, source: fx.Node, own: Iterable[fx.Node], group: int | None
    ) -> None:
        """Put an observer of what ``own`` saw, of the joint's group, between the two."""
        given = next(a for a in joint.all_input_nodes if _value_of(a) is source)
        path = self._fresh_path()
        self.gm.add_module(path, merged(self._modules(own)))
        node = self.rewriter.module_call(
            path,
            (given,),
            before=joint,
            like=source,
            share_group=group,
            qconfig=record_of(source).qconfig or record_of(joint).qconfig,
        )
        self.rewriter.replace_argument(joint, given, node)
        self.graph.add_edge(node, joint)
        self.observers[node] = [node]
        for value in own:
            for member in (value, *self.observers.get(value, [])):
                update_record(member, share_group=self.free)
        self.free += 1

    def _fresh_path(self) -> str:
        taken = {name for name, _ in self.gm.named_children()}
        number = 0
        while f"{OBSERVER_PREFIX}{number}" in taken:
            number += 1
        return f"{OBSERVER_PREFIX}{number}"


def _is_observer(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)


def _value_of(node: fx.Node) -> fx.Node:
    """What an observer watches; another node, and an observer that requantizes, itself."""
    if not _is_observer(node):
        return node
    value = node.all_input_nodes[0]
    return value if record_of(value).share_group == record_of(node).share_group else node
