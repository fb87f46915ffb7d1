"""The searches against all assignments, on random graphs."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import ConfigError
from fxquant.planner.problem import FLOAT, OUTSIDE, Choice, Costs, Edge, Prices, Problem
from fxquant.planner.search import (
    Limits,
    best_at,
    blended,
    can_cut,
    exhaustive,
    frontier,
    gap_to_exhaustive,
    greedy,
    lower_bound,
    min_cut,
    nondominated,
    pareto,
    polished,
    sampled,
    sweep,
    under,
)

INT8 = "int8"
HALF = "half"
NUMBERS = st.integers(0, 50).map(float)


@st.composite
def problems(
    draw: st.DrawFn, *, units: int = 12, representations: tuple[str, ...] = (FLOAT, INT8)
) -> Problem:
    """A random directed acyclic graph whose tensors have any number of readers."""
    count = draw(st.integers(1, units))
    choices = []
    for _ in range(count):
        kinds = draw(
            st.lists(st.sampled_from(representations), min_size=1, max_size=4).filter(bool)
        )
        choices.append(
            tuple(
                Choice(f"{kind}{i}", Costs(*(draw(NUMBERS) for _ in range(3))), kind, kind)
                for i, kind in enumerate(kinds)
            )
        )
    edges = [_edge(draw, OUTSIDE, range(count), representations)]
    for unit in range(count):
        readers = [*range(unit + 1, count), OUTSIDE]
        if unit < count - 1 or draw(st.booleans()):
            edges.append(_edge(draw, unit, readers, representations))
    names = tuple(f"u{i}" for i in range(count))
    return Problem(names, tuple(choices), tuple(edges))


def _edge(
    draw: st.DrawFn, producer: int, readers: object, representations: tuple[str, ...]
) -> Edge:
    consumers = draw(st.lists(st.sampled_from(list(readers)), min_size=1, max_size=4, unique=True))  # type: ignore[call-overload]
    pairs = [(a, b) for a in representations for b in representations if a != b]
    return Edge(producer, tuple(consumers), {pair: draw(NUMBERS) for pair in pairs})


PRICES = st.builds(Prices, NUMBERS, NUMBERS, NUMBERS)


def cheapest(problem: Problem, prices: Prices) -> float:
    return min(prices.of(problem.costs(a)) for a in problem.assignments())


@settings(max_examples=60, deadline=None)
@given(problems(units=12).filter(lambda p: p.combinations <= 4096), PRICES)
def test_min_cut_is_what_trying_all_finds(problem: Problem, prices: Prices) -> None:
    found = min_cut(problem, prices)
    assert found.exact
    assert prices.of(problem.costs(found.assignment)) == pytest.approx(cheapest(problem, prices))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_min_cut_on_twelve_layers(seed: int) -> None:
    """Always twelve layers of two precisions: 4096 assignments."""
    r = random.Random(seed)
    choices = tuple(
        tuple(
            Choice(k, Costs(r.random(), 0.0 if k == FLOAT else r.random() / 3), k, k)
            for k in (FLOAT, INT8)
        )
        for _ in range(12)
    )
    edges = [Edge(OUTSIDE, (0,), {(FLOAT, INT8): r.random()})]
    for unit in range(12):
        ahead = [*range(unit + 1, 12), OUTSIDE]
        readers = tuple(r.sample(ahead, min(len(ahead), r.randint(1, 4))))
        edges.append(Edge(unit, readers, {(FLOAT, INT8): r.random(), (INT8, FLOAT): r.random()}))
    problem = Problem(tuple(map(str, range(12))), choices, tuple(edges))
    every = [problem.costs(a) for a in problem.assignments()]
    for price in (0.3, 1.0, 3.0):
        prices = Prices(latency=1.0, damage=price)
        found = prices.of(problem.costs(min_cut(problem, prices).assignment))
        assert found == pytest.approx(min(map(prices.of, every)), rel=1e-9)


def test_a_shared_quantize_costs_once() -> None:
    """One float unit, three int8 readers: one conversion of 2, not three."""
    source = (Choice("fp32", Costs()),)
    reader = (Choice("fp32", Costs(1.0)), Choice("int8", Costs(0.0), INT8, INT8))
    edges = (
        Edge(OUTSIDE, (0,)),
        Edge(0, (1, 2, 3), {(FLOAT, INT8): 2.0, (INT8, FLOAT): 2.0}),
        *(Edge(i, (OUTSIDE,), {(INT8, FLOAT): 0.1}) for i in (1, 2, 3)),
    )
    problem = Problem(("a", "b", "c", "d"), (source, reader, reader, reader), edges)
    assert problem.costs((0, 1, 1, 1)).latency == pytest.approx(2.3)
    assert problem.costs((0, 1, 0, 0)).latency == pytest.approx(4.1)
    for solve in (min_cut, frontier):
        assert solve(problem, Prices()).assignment == (0, 1, 1, 1)
    dear = Problem(
        problem.names,
        problem.choices,
        (edges[0], Edge(0, (1, 2, 3), {(FLOAT, INT8): 2.8}), *edges[2:]),
    )
    assert min_cut(dear, Prices()).assignment == (0, 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    problems(units=7, representations=(FLOAT, INT8, HALF)).filter(lambda p: p.combinations <= 4096),
    PRICES,
)
def test_frontier_search_is_what_trying_all_finds(problem: Problem, prices: Prices) -> None:
    found = frontier(problem, prices)
    assert found.exact
    assert prices.of(problem.costs(found.assignment)) == pytest.approx(cheapest(problem, prices))
    narrow = frontier(problem, prices, states=1)
    assert prices.of(problem.costs(narrow.assignment)) >= cheapest(problem, prices) - 1e-9


def test_frontier_search_where_a_reader_comes_first() -> None:
    """A module that is called twice reads what a later unit writes."""
    both = (Choice("fp32", Costs(1.0)), Choice("int8", Costs(0.9), INT8, INT8))
    loop = (
        Edge(1, (0,), {(FLOAT, INT8): 1.0, (INT8, FLOAT): 1.0}),
        Edge(0, (1, OUTSIDE), {(FLOAT, INT8): 1.0, (INT8, FLOAT): 0.05}),
    )
    problem = Problem(("a", "b"), (both, both), loop)
    assert problem.costs((1, 1)).latency == pytest.approx(1.85)
    for solve in (min_cut, frontier):
        assert solve(problem, Prices()).assignment == (1, 1)


@settings(max_examples=40, deadline=None)
@given(problems(units=6).filter(lambda p: p.combinations <= 1024), st.floats(0.1, 0.9))
def test_under_a_budget_the_gap_is_known(problem: Problem, share: float) -> None:
    """The hull, polished, against trying all; the Lagrangian bound is below both."""
    damages = [problem.costs(a).damage for a in problem.assignments()]
    limits = Limits(damage=min(damages) + share * (max(damages) - min(damages)))

    def solve(prices: Prices):  # type: ignore[no-untyped-def]
        return best_at(problem, prices)

    hull = sweep(problem, solve, costly="latency", other="damage")
    found = under(problem, hull, limits, "latency")
    assert found is not None
    better = polished(problem, found, limits, "latency")
    best = under(problem, problem.assignments(), limits, "latency")
    assert best is not None
    least = problem.costs(best).latency
    assert limits.met_by(problem.costs(better))
    assert problem.costs(better).latency >= least - 1e-9
    assert lower_bound(problem, solve, limits, "latency") <= least + 1e-6
    gap = gap_to_exhaustive(problem, better, limits, "latency")
    mine = problem.costs(better).latency
    assert gap == pytest.approx((mine - least) / least if least else float(mine > 0))


@settings(max_examples=60, deadline=None)
@given(
    problems(units=6, representations=(FLOAT, INT8, HALF)).filter(lambda p: p.combinations <= 512)
)
def test_the_front_is_what_trying_all_finds(problem: Problem) -> None:
    expected = [costs.vector for costs, _ in nondominated(problem, problem.assignments())]
    found = [problem.costs(a).vector for a in pareto(problem, front=10_000, states=10_000)]
    assert [pytest.approx(v) for v in found] == expected
    assert sorted(problem.costs(a).vector for a in exhaustive(problem)) == sorted(expected)


def chain(count: int) -> Problem:
    choices = tuple(
        (
            Choice("fp32", Costs(2.0, 0.0, 4.0)),
            Choice("int8", Costs(1.0, 0.1 * (i + 1), 1.0), INT8, INT8),
        )
        for i in range(count)
    )
    cost = {(FLOAT, INT8): 0.3, (INT8, FLOAT): 0.3}
    edges = [Edge(i - 1, (i if i < count else OUTSIDE,), cost) for i in range(count + 1)]
    return Problem(tuple(map(str, range(count))), choices, tuple(edges))


def test_greedy_sets_the_most_damaged_back() -> None:
    found = greedy(chain(4), "latency")
    assert found == [(1, 1, 1, 1), (1, 1, 1, 0), (1, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0)]


def test_a_blend_weighs_seconds_and_bytes() -> None:
    problem = chain(3)
    mixed = blended(problem, 0.5, 2.0)
    for assignment in problem.assignments():
        costs = problem.costs(assignment)
        expected = 0.5 * costs.latency + 2.0 * costs.size
        assert mixed.costs(assignment).latency == pytest.approx(expected)
        assert mixed.costs(assignment).damage == costs.damage


def test_random_samples_are_repeatable() -> None:
    problem = chain(6)
    first = sampled(problem, count=200, seed=3)
    assert first == sampled(problem, count=200, seed=3)
    costs = [problem.costs(a) for a in first]
    assert not any(a.dominates(b) for a in costs for b in costs)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ConfigError, match="no precision"):
        Problem(("a",), ((),), ())
    with pytest.raises(ConfigError, match="not there"):
        Problem(("a",), ((Choice("fp32", Costs()),),), (Edge(0, (1,)),))
    three = chain(2)
    half = Choice("half", Costs(), HALF, HALF)
    mixed = Problem(three.names, tuple((*c, half) for c in three.choices), three.edges)
    assert not can_cut(mixed)
    with pytest.raises(ConfigError, match="two representations"):
        min_cut(mixed, Prices())
    with pytest.raises(ConfigError, match="exhaustive"):
        exhaustive(chain(20))
    assert gap_to_exhaustive(chain(20), (0,) * 20, Limits(), "latency") is None
    assert math.isinf(Limits().latency)
