"""Searches for assignments: minimum cut, frontier search, Pareto fronts, greedy, all and random.

For given prices of latency, damage and bytes the cheapest assignment is found exactly: by a
minimum cut where there are two representations, by :func:`frontier` where there are more. Which
prices fit a budget is a search over them (:func:`sweep`), which finds the assignments on the convex
hull of what is possible; what lies inside the hull is found by :func:`pareto`.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import networkx as nx

from fxquant.errors import ConfigError, did_you_mean
from fxquant.planner.problem import FLOAT, OUTSIDE, Assignment, Choice, Costs, Edge, Prices, Problem

_WHOLE: Final = 1 << 40
"""Capacities are whole numbers up to this: sums of floats would depend on their order."""
_STATES: Final = 4096
_FRONT: Final = 48
EXHAUSTIVE_LIMIT: Final = 1 << 16
"""The most assignments that are tried one by one."""


@dataclass(frozen=True, slots=True)
class Found:
    """A result.

    Attributes:
        assignment: the choice of each unit.
        exact: no other assignment is cheaper at these prices.
    """

    assignment: Assignment
    exact: bool = True


def cheapest_by_class(problem: Problem, unit: int, prices: Prices) -> dict[tuple[str, str], int]:
    """(read, written representation) -> the cheapest choice of a unit that has them."""
    best: dict[tuple[str, str], int] = {}
    for number, choice in enumerate(problem.choices[unit]):
        key = (choice.reads, choice.writes)
        if key not in best or _price(problem, unit, number, prices) < _price(
            problem, unit, best[key], prices
        ):
            best[key] = number
    return best


def _price(problem: Problem, unit: int, number: int, prices: Prices) -> float:
    return prices.of(problem.choices[unit][number].costs)


# -- minimum cut ----------------------------------------------------------------------------------


def representations(problem: Problem) -> list[str]:
    """All that choices read or write, float first."""
    found = {r for choices in problem.choices for c in choices for r in (c.reads, c.writes)}
    return [FLOAT, *sorted(found - {FLOAT})]


def can_cut(problem: Problem) -> bool:
    """Whether :func:`min_cut` applies: two representations, the same read as written."""
    same = all(c.reads == c.writes for choices in problem.choices for c in choices)
    return same and len(representations(problem)) <= 2


def min_cut(problem: Problem, prices: Prices) -> Found:
    """The cheapest assignment of two representations, as a minimum cut.

    Units are nodes; those on the source's side stay in float. A tensor that float writes and
    several int8 units read is quantized once: an auxiliary node between the writer and its readers
    carries the cost, and unlimited edges tie it to the readers.

    Args:
        problem: for which :func:`can_cut` holds.
        prices: of the costs.

    Raises:
        ConfigError: there are more representations, or a choice reads another than it writes.
    """
    if not can_cut(problem):
        raise ConfigError(
            f"a minimum cut needs two representations, got {', '.join(representations(problem))}"
        )
    best = [cheapest_by_class(problem, unit, prices) for unit in range(len(problem.names))]
    other = representations(problem)[-1]
    network = _Network(problem, prices)
    for unit, classes in enumerate(best):
        float_, int8 = classes.get((FLOAT, FLOAT)), classes.get((other, other))
        if float_ is None:
            network.forbid(unit, "source")
        if int8 is None or other == FLOAT:
            network.forbid(unit, "sink")
        if float_ is not None and int8 is not None and other != FLOAT:
            both = [_price(problem, unit, number, prices) for number in (float_, int8)]
            network.add(unit, "sink", both[0] - min(both))
            network.add("source", unit, both[1] - min(both))
    for number, edge in enumerate(problem.edges):
        network.connect(number, edge, other, prices.latency)
    source_side = network.cut()
    return Found(
        tuple(
            classes[(FLOAT, FLOAT) if unit in source_side else (other, other)]
            for unit, classes in enumerate(best)
        )
    )


class _Network:
    """A flow network under construction."""

    def __init__(self, problem: Problem, prices: Prices) -> None:
        self.edges: list[tuple[Any, Any, float | None]] = []
        self.units = range(len(problem.names))

    def add(self, a: object, b: object, capacity: float | None) -> None:
        """An edge; ``None`` is unlimited."""
        if capacity is None or capacity > 0:
            self.edges.append((a, b, capacity))

    def forbid(self, unit: int, side: str) -> None:
        """Keep ``unit`` off one side of the cut."""
        if side == "source":
            self.add(unit, "sink", None)
        else:
            self.add("source", unit, None)

    def connect(self, number: int, edge: Edge, other: str, price: float) -> None:
        """The two conversions of a tensor, each paid once."""
        producer = _node(edge.producer)
        consumers = [_node(c) for c in edge.consumers]
        down = price * edge.conversions.get((FLOAT, other), 0.0)
        up = price * edge.conversions.get((other, FLOAT), 0.0)
        if down > 0:
            self.add(producer, ("down", number), down)
            for consumer in consumers:
                self.add(("down", number), consumer, None)
        if up > 0:
            self.add(("up", number), producer, up)
            for consumer in consumers:
                self.add(consumer, ("up", number), None)

    def cut(self) -> set[object]:
        """The nodes on the source's side of a minimum cut."""
        limited = [capacity for _, _, capacity in self.edges if capacity is not None]
        scale = _WHOLE / max(limited, default=1.0)
        graph: nx.DiGraph[Any] = nx.DiGraph()
        graph.add_nodes_from(("source", "sink", *self.units))
        for a, b, capacity in self.edges:
            if a == b:
                continue
            if capacity is None:
                graph.add_edge(a, b)  # without a capacity: unlimited
                continue
            known = graph.get_edge_data(a, b)
            if known is not None and "capacity" not in known:
                continue
            before = known["capacity"] if known is not None else 0
            graph.add_edge(a, b, capacity=before + round(capacity * scale))
        _, (source_side, _) = nx.minimum_cut(graph, "source", "sink")
        return set(source_side)


def _node(unit: int) -> object:
    return "source" if unit == OUTSIDE else unit


# -- frontier search ------------------------------------------------------------------------------

_EdgeState = tuple[str | None, frozenset[str]]
"""What a tensor that is still open was written as, and what it was read as so far."""


class _Frontier:
    """Which edges are open before and after each unit."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.touched: list[list[int]] = [[] for _ in problem.names]
        self.last: dict[int, int] = {}
        for number, edge in enumerate(problem.edges):
            units = sorted({edge.producer, *edge.consumers} - {OUTSIDE})
            for unit in units:
                self.touched[unit].append(number)
            if units:
                self.last[number] = units[-1]

    def opened(self, number: int) -> _EdgeState:
        """The state of an edge before any unit touched it."""
        edge = self.problem.edges[number]
        written = FLOAT if edge.producer == OUTSIDE else None
        return written, frozenset({FLOAT} if OUTSIDE in edge.consumers else ())

    def step(
        self, state: dict[int, _EdgeState], unit: int, choice: Choice
    ) -> tuple[dict[int, _EdgeState], float]:
        """The state after ``unit`` takes ``choice``, and the seconds of conversions it adds."""
        after, seconds = dict(state), 0.0
        for number in self.touched[unit]:
            edge = self.problem.edges[number]
            written, read = after.get(number) or self.opened(number)
            before = 0.0 if written is None else edge.latency(written, set(read))
            if edge.producer == unit:
                written = choice.writes
            if unit in edge.consumers:
                read = read | {choice.reads}
            if written is not None:
                seconds += edge.latency(written, set(read)) - before
            after[number] = (written, read)
            if self.last[number] == unit:
                del after[number]
        return after, seconds


def frontier(problem: Problem, prices: Prices, *, states: int = _STATES) -> Found:
    """The cheapest assignment of any number of representations, unit by unit.

    What is ahead depends on what is behind only through the tensors that are still to be read; for
    each way in which these may be held, the cheapest past is kept. Networks are narrow (one or two
    open tensors in a ResNet), so that this is exact; where more than ``states`` ways are possible,
    the cheapest are kept and the result is not called exact.
    """
    walk, exact = _Frontier(problem), True
    current: dict[Any, tuple[float, tuple[Any, ...] | None, dict[int, _EdgeState]]] = {
        (): (0.0, None, {})
    }
    for unit in range(len(problem.names)):
        following: dict[Any, tuple[float, tuple[Any, ...] | None, dict[int, _EdgeState]]] = {}
        classes = cheapest_by_class(problem, unit, prices)
        for price, past, state in current.values():
            for number in classes.values():
                choice = problem.choices[unit][number]
                after, seconds = walk.step(state, unit, choice)
                total = price + prices.of(choice.costs) + prices.latency * seconds
                key = tuple(sorted((n, w, tuple(sorted(r))) for n, (w, r) in after.items()))
                if key not in following or total < following[key][0]:
                    following[key] = (total, (past, number), after)
        if len(following) > states:
            kept = sorted(following, key=lambda k: following[k][0])[:states]
            following, exact = {key: following[key] for key in kept}, False
        current = following
    _, past, _ = min(current.values(), key=lambda item: item[0])
    return Found(_unrolled(past), exact)


def _unrolled(past: tuple[Any, ...] | None) -> Assignment:
    found: list[int] = []
    while past is not None:
        past, number = past
        found.append(number)
    return tuple(reversed(found))


def best_at(problem: Problem, prices: Prices) -> Found:
    """The cheapest assignment at given prices, by whichever search applies."""
    return min_cut(problem, prices) if can_cut(problem) else frontier(problem, prices)


# -- prices and budgets ---------------------------------------------------------------------------

Solver = Callable[[Prices], Found]


def sweep(
    problem: Problem, solve: Solver, *, costly: str, other: str, steps: int = 24
) -> list[Assignment]:
    """The assignments on the convex hull of two costs, cheapest in ``costly`` first.

    Between two neighbours the price is set at which both cost the same; what is cheaper than both
    lies between them, and where nothing is they are neighbours on the hull.

    Args:
        problem: what is solved.
        solve: finds the cheapest assignment at given prices.
        costly: attribute of :class:`Costs` that is paid for less of ``other``.
        other: attribute of :class:`Costs`.
        steps: how often a price is tried.
    """

    def at(price: float) -> Assignment:
        return solve(Prices(**{"latency": 0.0, costly: 1.0, other: price})).assignment

    def figures(assignment: Assignment) -> tuple[float, float]:
        costs = problem.costs(assignment)
        return float(getattr(costs, costly)), float(getattr(costs, other))

    first = at(0.0)
    last = solve(Prices(**{"latency": 0.0, other: 1.0, costly: 1e-9})).assignment
    found, pending, used = [first, last], [(first, last)], 0
    while pending and used < steps:
        a, b = pending.pop(0)
        (ca, oa), (cb, ob) = figures(a), figures(b)
        if not (cb > ca and oa > ob):
            continue
        middle = at((cb - ca) / (oa - ob))
        used += 1
        if middle not in (a, b) and middle not in found:
            found.append(middle)
            pending += [(a, middle), (middle, b)]
    return sorted(dict.fromkeys(found), key=lambda item: figures(item)[0])


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that an assignment may cost; infinite does not ask."""

    latency: float = math.inf
    damage: float = math.inf
    size: float = math.inf

    def met_by(self, costs: Costs) -> bool:
        """Whether ``costs`` keep to all limits."""
        limits = (self.latency, self.damage, self.size)
        return all(c <= limit for c, limit in zip(costs.vector, limits, strict=True))


def under(
    problem: Problem, candidates: Iterable[Assignment], limits: Limits, objective: str
) -> Assignment | None:
    """Of the candidates that keep to the limits, the one that costs least."""
    found = [(problem.costs(a), a) for a in candidates]
    kept = [(getattr(costs, objective), a) for costs, a in found if limits.met_by(costs)]
    return min(kept)[1] if kept else None


def polished(
    problem: Problem, assignment: Assignment, limits: Limits, objective: str
) -> Assignment:
    """``assignment`` after single changes that keep to the limits and cost less, until none is."""
    current, costs = assignment, problem.costs(assignment)
    improved = True
    while improved:
        improved = False
        for changed in _neighbours(problem, current):
            other = problem.costs(changed)
            if limits.met_by(other) and getattr(other, objective) < getattr(costs, objective):
                current, costs, improved = changed, other, True
    return current


def _neighbours(problem: Problem, assignment: Assignment) -> Iterable[Assignment]:
    for unit, choices in enumerate(problem.choices):
        for number in range(len(choices)):
            if number != assignment[unit]:
                yield (*assignment[:unit], number, *assignment[unit + 1 :])


def lower_bound(problem: Problem, solve: Solver, limits: Limits, objective: str) -> float:
    """No assignment within one limit costs less than this: the best Lagrangian bound of a sweep.

    ``min (cost + price * (limited - limit))`` is a bound at every price. With several limits, or
    none, the bound of the first is given.
    """
    limited = next(
        (n for n in ("latency", "damage", "size") if math.isfinite(getattr(limits, n))), None
    )
    if limited is None or limited == objective:
        return 0.0
    limit = getattr(limits, limited)
    best = 0.0
    hull = sweep(problem, solve, costly=objective, other=limited)
    for a, b in itertools.pairwise(hull):
        ca, cb = problem.costs(a), problem.costs(b)
        gained = getattr(ca, limited) - getattr(cb, limited)
        if gained <= 0:
            continue
        price = (getattr(cb, objective) - getattr(ca, objective)) / gained
        prices = Prices(**{"latency": 0.0, objective: 1.0, limited: price})
        least = problem.costs(solve(prices).assignment)
        best = max(best, getattr(least, objective) + price * (getattr(least, limited) - limit))
    return best


# -- fronts ---------------------------------------------------------------------------------------


def nondominated(
    problem: Problem, assignments: Iterable[Assignment]
) -> list[tuple[Costs, Assignment]]:
    """Those that no other one dominates, fastest first."""
    scored = [(problem.costs(a), a) for a in dict.fromkeys(assignments)]
    return _unbeaten(scored)


_Item = TypeVar("_Item")


def _unbeaten(scored: list[tuple[Costs, _Item]]) -> list[tuple[Costs, _Item]]:
    """Those whose costs no other ones beat or equal, fastest first.

    In the order of latency, one is beaten if one before it costs no more damage and no more bytes;
    of those before, a staircase of falling size over rising damage says that.
    """
    damages: list[float] = []
    sizes: list[float] = []
    kept = []
    for costs, item in sorted(scored, key=lambda pair: pair[0].vector):
        at = bisect.bisect_right(damages, costs.damage)
        if at and sizes[at - 1] <= costs.size:
            continue
        kept.append((costs, item))
        at = bisect.bisect_left(damages, costs.damage)
        end = at
        while end < len(sizes) and sizes[end] >= costs.size:
            end += 1
        damages[at:end], sizes[at:end] = [costs.damage], [costs.size]
    return kept


def pareto(problem: Problem, *, front: int = _FRONT, states: int = 64) -> list[Assignment]:
    """Assignments that no other one beats in latency, damage and size together.

    As :func:`frontier`, with the pasts that no other past of the same state beats. At most
    ``front`` of them are kept for a state, spread over the latencies, and at most ``states``
    states; then the front may have gaps.
    """
    walk = _Frontier(problem)
    current: dict[Any, tuple[dict[int, _EdgeState], list[tuple[Costs, Any]]]] = {
        (): ({}, [(Costs(), None)])
    }
    for unit, choices in enumerate(problem.choices):
        following: dict[Any, tuple[dict[int, _EdgeState], list[tuple[Costs, Any]]]] = {}
        for state, pasts in current.values():
            for number, choice in enumerate(choices):
                after, seconds = walk.step(state, unit, choice)
                key = tuple(sorted((n, w, tuple(sorted(r))) for n, (w, r) in after.items()))
                added = choice.costs + Costs(latency=seconds)
                entry = following.setdefault(key, (after, []))
                entry[1].extend((costs + added, (past, number)) for costs, past in pasts)
        thinned = {key: (after, _thinned(p, front)) for key, (after, p) in following.items()}
        kept = sorted(thinned, key=lambda k: min(c.latency for c, _ in thinned[k][1]))[:states]
        current = {key: thinned[key] for key in kept}
    found = [_unrolled(past) for _, pasts in current.values() for _, past in pasts]
    return [assignment for _, assignment in nondominated(problem, found)]


def _thinned(pasts: list[tuple[Costs, Any]], front: int) -> list[tuple[Costs, Any]]:
    kept = _unbeaten(pasts)
    if len(kept) <= front:
        return kept
    return [kept[round(i * (len(kept) - 1) / (front - 1))] for i in range(front)]


def exhaustive(problem: Problem) -> list[Assignment]:
    """Every assignment that no other one beats, by trying all.

    Raises:
        ConfigError: there are more than :data:`EXHAUSTIVE_LIMIT`.
    """
    if problem.combinations > EXHAUSTIVE_LIMIT:
        raise ConfigError(
            f"strategy 'exhaustive' tries all plans, and {len(problem.names)} units have"
            f" {problem.combinations:.3g}, more than {EXHAUSTIVE_LIMIT}. Choose 'min-cut' or"
            " 'pareto', fewer candidates, or a model of fewer layers"
        )
    return [assignment for _, assignment in nondominated(problem, problem.assignments())]


def sampled(problem: Problem, *, count: int, seed: int) -> list[Assignment]:
    """The best of ``count`` random assignments, each with its own share of every choice."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        share = generator.random()
        found.append(
            tuple(
                generator.randrange(len(choices)) if generator.random() < share else 0
                for choices in problem.choices
            )
        )
    return [assignment for _, assignment in nondominated(problem, found)]


def greedy(problem: Problem, objective: str) -> list[Assignment]:
    """What is done by hand: the cheapest choice everywhere, then the most damaged unit set back.

    Conversions are not looked at. One assignment for each unit that was set back.
    """
    current = [
        min(range(len(c)), key=lambda n: (getattr(c[n].costs, objective), c[n].costs.damage))
        for c in problem.choices
    ]
    found = [tuple(current)]
    order = sorted(range(len(current)), key=lambda u: -problem.choices[u][current[u]].costs.damage)
    for unit in order:
        choices = problem.choices[unit]
        safest = min(range(len(choices)), key=lambda n: choices[n].costs.damage)
        if safest != current[unit]:
            current[unit] = safest
            found.append(tuple(current))
    return found


def without_edges(problem: Problem) -> Problem:
    """The problem as it is seen by searches that know no conversions."""
    return Problem(problem.names, problem.choices, ())


def blended(problem: Problem, latency: float, size: float) -> Problem:
    """The problem in which latencies are weighted sums of latency and bytes.

    Its hull has the plans that are worth it where both are limited.

    Args:
        problem: units and tensors.
        latency: weight of a second.
        size: weight of a byte.
    """
    choices = tuple(
        tuple(
            replace(
                c,
                costs=replace(c.costs, latency=latency * c.costs.latency + size * c.costs.size),
            )
            for c in options
        )
        for options in problem.choices
    )
    edges = tuple(
        replace(e, conversions={pair: latency * s for pair, s in e.conversions.items()})
        for e in problem.edges
    )
    return Problem(problem.names, choices, edges)


def gap_to_exhaustive(
    problem: Problem, assignment: Assignment, limits: Limits, objective: str
) -> float | None:
    """How much more ``assignment`` costs than the best one, as a share; ``None`` if too many."""
    if problem.combinations > EXHAUSTIVE_LIMIT:
        return None
    best = under(problem, problem.assignments(), limits, objective)
    if best is None:
        return None
    least = getattr(problem.costs(best), objective)
    mine = getattr(problem.costs(assignment), objective)
    return (mine - least) / least if least else float(mine > 0)


def by_strategy(names: Sequence[str], name: str) -> str:
    """``name``, if it is a strategy.

    Raises:
        ConfigError: it is not.
    """
    if name in names:
        return name
    raise ConfigError(
        f"there is no strategy {name!r}{did_you_mean(str(name), names)}; known are"
        f" {', '.join(map(repr, names))}"
    )
