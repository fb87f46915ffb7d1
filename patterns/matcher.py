"""Finds patterns in a graph, and says for every candidate that was not taken why.

Every node whose kind begins some pattern is an anchor. From an anchor each pattern follows users
forward; the first complete chain in graph order is put to the guards. What passes competes for
nodes: longer matches first, then patterns given earlier, then anchors later in the graph (of two
convolutions that meet in an addition the later one takes it, its accumulator being complete then).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx

from fxquant.errors import ConfigError
from fxquant.op_view import Op
from fxquant.patterns.facts import GraphFacts
from fxquant.patterns.match import Match, Reason, Refusal, because
from fxquant.patterns.pattern import Pattern, Step

CLAIMED = "claimed"
"""Stands for a guard's name in the refusal of a match whose nodes another match took."""


@dataclass(frozen=True, slots=True, eq=False)
class MatchReport:
    """What :func:`match_all` found.

    Attributes:
        matches: disjoint matches, in graph order of their first nodes.
        refusals: for every anchor outside all matches the nearest miss, in graph order; for an
            anchor inside one, a chain that reaches beyond it and that only a guard or the match
            itself stood in the way of.
        visits: how many nodes were looked at, counted once per look.
    """

    matches: tuple[Match, ...]
    refusals: tuple[Refusal, ...]
    visits: int = 0
    _misses: Mapping[str, Refusal] = field(default_factory=dict, repr=False)
    _claims: Mapping[str, Match] = field(default_factory=dict, repr=False)

    def match_of(self, node: fx.Node | str) -> Match | None:
        """The match that ``node`` belongs to, or ``None``."""
        return self._claims.get(node if isinstance(node, str) else node.name)

    def nearest_miss(self, node: fx.Node | str) -> Refusal | None:
        """Why no (longer) pattern took ``node``.

        Args:
            node: a node or its name; an anchor, or a later node of a chain that was refused.

        Returns:
            The refusal of the pattern that got furthest, or ``None`` where no pattern came near.
        """
        return self._misses.get(node if isinstance(node, str) else node.name)


def match_all(gm: fx.GraphModule, patterns: Iterable[Pattern]) -> MatchReport:
    """Find disjoint matches of ``patterns`` in the graph of ``gm``.

    The work is linear in the nodes and edges of the graph, for a given set of patterns of which
    only the first steps have any number of inputs (a ``cat``).

    Args:
        gm: the module that owns the graph; it is not changed.
        patterns: in order of preference among matches of equal length.

    Returns:
        Matches, refusals, and the nearest miss of every anchor.

    Raises:
        ConfigError: two patterns have one name.
    """
    matcher = _Matcher(gm, tuple(patterns))
    return matcher.run()


@dataclass(frozen=True, slots=True)
class _Chain:
    """The ops that fit the first steps of a pattern, and the other operands they bind."""

    ops: tuple[Op, ...] = ()
    operands: tuple[tuple[str, Any], ...] = ()


class _Matcher:
    def __init__(self, gm: fx.GraphModule, patterns: tuple[Pattern, ...]) -> None:
        self.gm = gm
        self.facts = GraphFacts(gm)
        self.visits = 0
        self._followers: dict[tuple[str, ...], str] = {}
        self.rank = {pattern.name: rank for rank, pattern in enumerate(patterns)}
        if len(self.rank) != len(patterns):
            names = [pattern.name for pattern in patterns]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"two patterns are named {', '.join(map(repr, twice))}")
        self.starting_with: dict[str, list[Pattern]] = {}
        for pattern in patterns:
            for kind in sorted(pattern.steps[0].kinds):
                self.starting_with.setdefault(kind, []).append(pattern)

    def run(self) -> MatchReport:
        candidates: list[Match] = []
        misses: dict[fx.Node, Refusal] = {}
        for node in self.facts.position:
            self.visits += 1
            kind = self.facts.kind(node)
            for pattern in self.starting_with.get(kind.name, ()) if kind is not None else ():
                found = self.attempt(pattern, node)
                if isinstance(found, Match):
                    candidates.append(found)
                else:
                    _keep_nearest(misses, node, found)
        claims = self.claim(candidates, misses)
        return self.report(claims, misses)

    def attempt(self, pattern: Pattern, anchor: fx.Node) -> Match | Refusal:
        """Match one pattern at one anchor: structure first, then the guards in order."""
        fitting = self.extend(pattern, _Chain(), anchor)
        bound = tuple(op.node.name for op in fitting.ops)
        if len(bound) < len(pattern.steps):
            return Refusal(
                pattern,
                self.structure_reason(pattern, fitting, anchor),
                anchor.name,
                len(bound),
                bound=bound,
            )
        operands = MappingProxyType(dict(fitting.operands))
        match = Match(pattern, self.gm, fitting.ops, operands, self.facts)
        for check in pattern.guards:
            why = check(match)
            if why is not None:
                return Refusal(pattern, why, anchor.name, len(bound), check.name, bound)
        return match

    def extend(self, pattern: Pattern, chain: _Chain, node: fx.Node) -> _Chain:
        """The first complete chain in graph order, or the longest incomplete one.

        Args:
            pattern: the pattern.
            chain: what fits so far.
            node: a user of the last op of ``chain`` that may be the next step.
        """
        self.visits += 1
        step = pattern.steps[len(chain.ops)]
        kind = self.facts.kind(node)
        op = self.facts.op(node) if kind is not None and kind.name in step.kinds else None
        if op is None or (chain.ops and chain.ops[-1].node not in op.activations):
            return chain
        operands = chain.operands + _other_operand(step, op, chain)
        best = _Chain((*chain.ops, op), operands)
        if len(best.ops) == len(pattern.steps):
            return best
        longest = best
        for user in self.facts.users(node):
            longer = self.extend(pattern, best, user)
            if len(longer.ops) == len(pattern.steps):
                return longer
            if len(longer.ops) > len(longest.ops):
                longest = longer
        return longest

    def structure_reason(self, pattern: Pattern, fitting: _Chain, anchor: fx.Node) -> Reason:
        """What stands where the next step should be."""
        wanted = pattern.steps[len(fitting.ops)].kinds
        if not fitting.ops:
            return _unknown_arguments(anchor)
        node = fitting.ops[-1].node
        for user in self.facts.users(node):
            kind = self.facts.kind(user)
            if kind is not None and kind.name in wanted:
                return _unknown_arguments(user)
        users = tuple(user.name for user in self.facts.users(node))
        template = "nothing uses the output of {node!r}; what may follow is {kinds}"
        if users:
            template = "the output of {node!r} goes to {users}; what may follow is {kinds}"
        kinds = self.followers(tuple(op.name for op in fitting.ops))
        return because(template, *users, node=node.name, users=users, kinds=kinds)

    def followers(self, kinds: tuple[str, ...]) -> str:
        """The kinds that some pattern takes after these."""
        if kinds not in self._followers:
            depth = len(kinds)
            found = {
                follower
                for pattern in self.starting_with[kinds[0]]
                if len(pattern.steps) > depth
                and all(
                    kind in step.kinds for kind, step in zip(kinds, pattern.steps, strict=False)
                )
                for follower in pattern.steps[depth].kinds
            }
            self._followers[kinds] = ", ".join(sorted(found))
        return self._followers[kinds]

    def claim(
        self, candidates: list[Match], misses: dict[fx.Node, Refusal]
    ) -> dict[fx.Node, Match]:
        """Give every node to one match at most; what lies inside a longer match is no loss."""

        def preference(match: Match) -> tuple[int, int, int]:
            first = self.facts.position[match.first]
            return -len(match.ops), self.rank[match.pattern.name], -first

        claims: dict[fx.Node, Match] = {}
        for match in sorted(candidates, key=preference):
            taken = [node for node in match.nodes if node in claims]
            if not taken:
                claims.update(dict.fromkeys(match.nodes, match))
            elif any(claims.get(node) is not claims[taken[0]] for node in match.nodes):
                _keep_nearest(misses, match.first, _claimed(match, taken, claims))
        return claims

    def report(self, claims: dict[fx.Node, Match], misses: dict[fx.Node, Refusal]) -> MatchReport:
        position = self.facts.position
        matches = sorted(
            {id(match): match for match in claims.values()}.values(),
            key=lambda match: position[match.first],
        )
        refusals: list[Refusal] = []
        by_name: dict[str, Refusal] = {}
        for node in sorted(misses, key=position.__getitem__):
            miss = misses[node]
            taken = claims.get(node)
            if taken is not None and not _reaches_beyond(miss, taken):
                continue
            refusals.append(miss)
            by_name[node.name] = miss
        for miss in refusals:
            for name in miss.bound:
                by_name.setdefault(name, miss)
        return MatchReport(
            tuple(matches),
            tuple(refusals),
            self.visits,
            MappingProxyType(by_name),
            MappingProxyType({node.name: match for node, match in claims.items()}),
        )


def _keep_nearest(misses: dict[fx.Node, Refusal], node: fx.Node, miss: Refusal) -> None:
    """Claimed before guard before structure, then the deeper; the first of equals stays."""
    known = misses.get(node)
    if known is None or _nearness(miss) > _nearness(known):
        misses[node] = miss


def _nearness(miss: Refusal) -> tuple[int, int]:
    return (2 if miss.guard == CLAIMED else 1 if miss.guard else 0), miss.depth


def _reaches_beyond(miss: Refusal, taken: Match) -> bool:
    """Whether a complete chain was refused that has nodes outside the match of its anchor."""
    return bool(miss.guard) and not {node.name for node in taken.nodes}.issuperset(miss.bound)


def _unknown_arguments(node: fx.Node) -> Reason:
    return because(
        "{node!r} takes its inputs as something other than activations, "
        "or has arguments that fxquant does not know",
        node.name,
        node=node.name,
    )


def _claimed(match: Match, taken: list[fx.Node], claims: dict[fx.Node, Match]) -> Refusal:
    winner = claims[taken[0]]
    why = because(
        "the match of {winner!r} that begins at {first!r} has already taken {taken}",
        *(node.name for node in taken),
        taken=tuple(node.name for node in taken),
        winner=winner.pattern.name,
        first=winner.first.name,
    )
    bound = tuple(node.name for node in match.nodes)
    return Refusal(match.pattern, why, match.first.name, len(bound), CLAIMED, bound)


def _other_operand(step: Step, op: Op, chain: _Chain) -> tuple[tuple[str, Any], ...]:
    """The operand of a binary op that does not come from the step before; nothing on others."""
    if step.other is None:
        return ()
    left, right = (op.arguments.get(name) for name in op.kind.activations)
    return ((step.other, right if left is chain.ops[-1].node else left),)
