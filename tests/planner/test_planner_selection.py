"""Picking by a budget and repairing, with figures that are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from fxquant.planner.budget import Budget, parse_budget
from fxquant.planner.judge import Figures, Judge
from fxquant.planner.pricing import Priced
from fxquant.planner.problem import Assignment, Choice, Costs, Problem
from fxquant.planner.search import Limits
from fxquant.planner.selection import Selection, excess_of
from fxquant.planner.units import Unit, Wiring
from tests.made_layers import made_layer

COUNT = 6


def priced() -> Priced:
    """Int8 saves a second a layer; layer ``i`` does the damage ``i + 1``."""
    names = tuple(f"l{i}" for i in range(COUNT))
    choices = tuple(
        (Choice("fp32", Costs(2.0, 0.0, 4.0)), Choice("int8", Costs(1.0, i + 1.0, 1.0)))
        for i in range(COUNT)
    )
    units = tuple(Unit(n, (n,), n, made_layer(n, i)) for i, n in enumerate(names))
    return Priced(Problem(names, choices, ()), Wiring(units, ()), Costs(), 0)


class Made(Selection):
    """Its models are their assignments."""

    def model(self, assignment: Assignment) -> Any:
        return assignment


class MadeJudge:
    """Drops by a rule; counts what it is asked."""

    def __init__(self, rule: Callable[[Assignment], float]) -> None:
        self.rule = rule
        self.asked: list[Assignment] = []

    def figures(self, assignment: Assignment) -> Figures:
        self.asked.append(assignment)
        drop = self.rule(assignment)
        return Figures(accuracy=100 - drop, drop=drop, noise=0.0, size=0, int8_share=0.0)


def total(assignment: Assignment) -> float:
    return float(sum(i + 1 for i, choice in enumerate(assignment) if choice))


def selection(budget: Any, rule: Callable[[Assignment], float] = total) -> tuple[Made, MadeJudge]:
    judge = MadeJudge(rule)
    made = Made(
        cast(Any, None), priced(), cast(Judge, judge), parse_budget(budget), cast(Any, None), 1
    )
    return made, judge


CHAIN = [tuple(int(i < kept) for i in range(COUNT)) for kept in range(COUNT + 1)]
"""From all in FP32 to all in int8, the harmless ones first."""


def test_the_cheapest_accurate_plan_is_found_by_halving() -> None:
    made, judge = selection({"accuracy_drop": 7})
    assert made.pick(CHAIN) == (1, 1, 1, 0, 0, 0)  # 1 + 2 + 3
    assert len(judge.asked) <= 3
    made.pick(CHAIN)
    assert len(judge.asked) <= 3  # known by then


def test_limits_of_predicted_costs_come_first() -> None:
    made, judge = selection({"accuracy_drop": 100, "size": "10 B"})
    made.limits = Limits(size=10.0)
    picked = made.pick(CHAIN)
    assert made.priced.costs(picked).size <= 10
    made.limits = Limits(size=1.0)  # impossible: the nearest
    assert made.pick(CHAIN) == CHAIN[-1]
    assert judge.asked


def test_without_an_accuracy_budget_the_least_damage_is_taken() -> None:
    made, judge = selection({"latency": "9 s"})
    made.limits = Limits(latency=9.0)
    assert made.pick(CHAIN) == (1, 1, 1, 0, 0, 0)
    assert judge.asked == []


def interacting(assignment: Assignment) -> float:
    """Layers 0 and 1 are harmless alone and not together."""
    return total(assignment) + (20.0 if assignment[0] and assignment[1] else 0.0)


def test_layers_that_interact_are_repaired() -> None:
    made, _ = selection({"accuracy_drop": 5}, interacting)
    start = (1, 1, 0, 0, 0, 0)
    final, words = made.repaired(start, 8)
    assert made.accurate(final)
    assert sum(final) == 1
    assert len(words) == 1
    assert "int8 -> fp32" in words[0]
    assert made.repaired(start, 0) == (start, ())


def test_room_is_used() -> None:
    made, judge = selection({"accuracy_drop": 7}, interacting)
    final, words = made.repaired((0, 0, 0, 0, 0, 0), 8)
    assert final == (1, 0, 1, 0, 0, 0)  # 1 + 3; 1 + 2 would cost 20, and 4 more is too much
    assert [word.split()[0] for word in words] == ["'l0'", "'l2'"]
    assert (1, 1, 0, 0, 0, 0) in judge.asked


def test_a_latency_that_was_predicted_too_short_is_tightened() -> None:
    made, _ = selection({"latency": "9 s"})
    made.limits = Limits(latency=9.0)
    measured: list[Assignment] = []

    def excess(assignment: Assignment) -> float:
        measured.append(assignment)
        return 1.25 * made.priced.costs(assignment).latency / 9.0

    made.latency_excess = excess  # type: ignore[method-assign]
    picked = made.pick_timed(CHAIN)
    assert measured[0] == (1, 1, 1, 0, 0, 0)
    assert excess(picked) <= 1.0
    assert picked == (1, 1, 1, 1, 1, 0)  # 7 s, which take 8.75


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(latency=2.0), 1.5),
        (Budget(latency_ratio=0.5), 1.0),
        (Budget(accuracy_drop=1.0), 0.0),
    ],
)
def test_latencies_over_the_budget(budget: Budget, expected: float) -> None:
    mine = Figures(0.0, 0.0, 0.0, 0, 0.0, latency=3.0, fastest=1.0)
    floats = Figures(0.0, 0.0, 0.0, 0, 0.0, latency=9.0, fastest=2.0)
    assert excess_of(budget, mine, floats) == pytest.approx(expected)


def timed_by(made: Made, seconds: Callable[[Assignment], float]) -> None:
    """Let ``made`` measure latencies by a rule."""

    def timed(assignments: Mapping[str, Assignment]) -> dict[str, Figures]:
        return {
            name: replace(made.figures(a), latency=seconds(a)) for name, a in assignments.items()
        }

    made.timed = timed  # type: ignore[method-assign]


def test_another_accurate_plan_is_taken_where_it_is_measured_faster() -> None:
    start, fast, wrong = (1, 1, 1, 0, 0, 0), (1, 1, 0, 1, 0, 0), (1, 1, 1, 1, 1, 1)
    made, _ = selection({"accuracy_drop": 7})
    seconds = {start: 3.0, fast: 2.0, wrong: 1.0}
    timed_by(made, lambda a: seconds[a])
    found, words = made.fastest(start, {"fast": fast, "wrong": wrong})
    assert found == fast
    assert words == ("all layers as in 'fast', 2e+03 ms and not 3e+03 (measured)",)
    assert made.fastest(fast, {"start": start, "wrong": wrong}) == (fast, ())
    seconds[fast] = 2.97  # no more than noise
    assert made.fastest(start, {"fast": fast}) == (start, ())
    assert made.fastest(wrong, {"fast": fast}) == (wrong, ())  # that is for the repair


def test_what_is_not_made_small_is_not_measured() -> None:
    made, judge = selection({"accuracy_drop": 7, "latency": "99 s"})
    assert made.fastest((0,) * COUNT, {"other": (1,) + (0,) * (COUNT - 1)}) == ((0,) * COUNT, ())
    assert judge.asked == []
