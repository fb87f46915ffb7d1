"""plan_mixed_precision: for every layer a precision, so that a budget is kept.

1. One calibration serves everything (:class:`~fxquant.sensitivity.network.CalibratedNetwork`).
2. Each layer in each precision gets a latency, a damage and a size, each tensor the latency of its
   conversions (:mod:`.pricing`).
3. A strategy searches assignments (:mod:`.search`); the one that costs least within the budget is
   found by measuring the accuracy of whole plans (:mod:`.selection`).
4. Layers interact, so the plan is measured and repaired, and a greedy plan stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from torch import nn
from tqdm import tqdm

from fxquant.autocast import outside_modes
from fxquant.calibration import Forward
from fxquant.errors import ConfigError, ConfigWarning, Diagnostics
from fxquant.inputs import bind_examples
from fxquant.machine_file import default_folder
from fxquant.planner.budget import Budget, parse_budget
from fxquant.planner.cache import LatencyCache
from fxquant.planner.candidates import DEFAULT, precisions_of
from fxquant.planner.damage import hessian_damages, measured_damages
from fxquant.planner.judge import Figures, Judge
from fxquant.planner.plan import FrontPoint, Plan, PlannedLayer
from fxquant.planner.pricing import Priced, price
from fxquant.planner.problem import Assignment, Prices, Problem
from fxquant.planner.search import (
    Found,
    Limits,
    best_at,
    blended,
    by_strategy,
    can_cut,
    exhaustive,
    gap_to_exhaustive,
    greedy,
    lower_bound,
    pareto,
    sampled,
    sweep,
    without_edges,
)
from fxquant.planner.selection import Selection, excess_of
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.sensitivity.feeding import bind_batches
from fxquant.sensitivity.metrics import UserMetric
from fxquant.sensitivity.network import FP32, INT8, CalibratedNetwork, Precision
from fxquant.sensitivity.network import Assignment as NetworkAssignment

STRATEGIES: Final = ("min-cut", "greedy", "hawq-v2", "pareto", "random", "exhaustive")
"""The searches, by name."""

FIRST_LAST: Final = "first-last"
"""Name of the plan that keeps the first and the last layer in FP32, and no other."""
_SAMPLES: Final = 2000
_FRONT: Final = 12
_SHARES: Final = (1.0, 0.75, 0.5, 0.25, 0.0)
_TINY: Final = 1e-12


@outside_modes
def plan_mixed_precision(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget: Budget | Mapping[str, Any] | str,
    candidates: Sequence[str] | Mapping[str, Precision] = DEFAULT,
    strategy: str = "min-cut",
    metric: str | UserMetric = "agreement",
    judge_data: Iterable[Any] | None = None,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
    example_inputs: Any = None,
    forward: Forward | None = None,
    num_batches: int | None = None,
    target: str = "x86",
    bias_correction: bool = True,
    repeats: int = 15,
    repairs: int = 8,
    measure_front: bool = False,
    seed: int = 0,
    cache: bool = True,
    progress: bool = True,
) -> Plan:
    """Choose a precision for every layer under a budget.

    Args:
        model: a float module in evaluation mode. It is not touched.
        data: batches to calibrate and to measure the damage of layers on, fed as
            :func:`fxquant.calibrate` feeds them; they are kept. A few dozen inputs do.
        budget: what the plan may cost: ``{"accuracy_drop": 0.5}`` (in points of ``metric``),
            ``{"latency": "0.8x"}`` (of FP32) or ``"3 ms"``, ``{"size": "0.4x"}`` or ``"12 MB"``, or
            two of them; also as text, ``"accuracy_drop <= 0.5, size <= 0.4x"``. Under an accuracy
            budget latency is made small, under accuracy and latency size, else the damage.
        candidates: the precisions: ``fp32``, ``int8`` (as ``qconfig_mapping`` says) and those of
            :data:`~.candidates.CANDIDATES`, or a dict from names of your own to qconfigs.
        strategy: ``min-cut`` (exact at each price: a minimum cut, or a frontier search where there
            are more than two representations), ``pareto`` (also what lies inside the convex hull),
            ``greedy``, ``hawq-v2`` (damages from Hessian traces, conversions not looked at),
            ``random``, or ``exhaustive`` for small models.
        metric: ``agreement`` (percent of rows with the FP32 model's class), ``error`` (``100 -``
            the relative RMS error in percent), or ``f(model, data) -> float``, larger is better.
        judge_data: batches that accuracy is judged on, and what ``metric`` is given; by default
            ``data``. Others than ``data`` keep the plan from fitting them.
        qconfig_mapping: what ``int8`` means, see :func:`fxquant.prepare_fx`.
        example_inputs: inputs of the call whose latency counts; by default the first batch.
        forward: see :func:`fxquant.calibrate`.
        num_batches: take at most so many batches of ``data``.
        target: see :func:`fxquant.prepare_fx`.
        bias_correction: see :func:`fxquant.prepare_fx`.
        repeats: how often each graph is timed.
        repairs: how many plans may be measured to repair, or to improve, the one that was found.
        measure_front: measure the accuracy of every plan of the Pareto front (a dozen), not only of
            those that were measured anyway.
        seed: of the strategy ``random``.
        cache: keep measured latencies in a file of this machine, in ``$FXQUANT_CACHE`` or the
            user's cache folder.
        progress: show a progress bar, on a terminal.

    Returns:
        A :class:`Plan`. Where nothing keeps to the budget, the nearest plan, with a warning and
        ``plan.feasible`` false.

    Raises:
        ConfigError: the budget, a candidate, the strategy or the metric makes no sense.
        CalibrationError: the data hold no batch, or one that does not fit.
    """
    limits, name = parse_budget(budget), by_strategy(STRATEGIES, strategy)
    precisions = precisions_of(candidates)
    _check_counts(repeats=repeats, repairs=repairs)
    batches = list(data)
    judged = batches if judge_data is None else list(judge_data)
    network = CalibratedNetwork(
        model,
        batches,
        qconfig_mapping,
        precisions={k: v for k, v in precisions.items() if k not in (FP32, INT8)},
        example_inputs=example_inputs,
        forward=forward,
        num_batches=num_batches,
        target=target,
        bias_correction=bias_correction,
    )
    bound = (
        network.batches[0]
        if example_inputs is None
        else bind_examples(network.graph, example_inputs)
    )
    floats = network.reference(NetworkAssignment(rest=FP32))
    judge = Judge(bind_batches(network.graph, judged, forward), metric, judged, floats)
    with _bar(shown=progress) as tick:
        priced = price(
            network,
            list(precisions),
            bound,
            lambda n, wanted: measured_damages(n, wanted, tick=tick),
            cache=LatencyCache(default_folder() if cache else None),
            repeats=repeats,
        )
        selection = Selection(network, priced, judge, limits, bound, repeats)
        search = _Search(network, priced, limits, list(precisions), seed, tick)
        plan = _plan(search, selection, name, repairs, measure_front=measure_front)
    if not plan.feasible:
        _warn_of(plan)
    return plan


class _Search:
    """The strategies, each giving assignments from which the budget picks one."""

    def __init__(
        self,
        network: CalibratedNetwork,
        priced: Priced,
        budget: Budget,
        precisions: Sequence[str],
        seed: int,
        tick: Callable[[], object],
    ) -> None:
        self.network = network
        self.priced = priced
        self.objective = budget.objective
        self.limited = budget.limited
        self.precisions = precisions
        self.seed = seed
        self.tick = tick
        self.exact = True

    def solve(self, prices: Prices) -> Found:
        """The cheapest assignment at given prices; notes where a search was bounded."""
        return self._solve(self.priced.problem, prices)

    def assignments(self, name: str) -> list[Assignment]:
        """What a strategy finds."""
        problem = self.priced.problem
        if name == "greedy":
            small = "size" in (self.objective, *self.limited)
            found = greedy(problem, "size" if small else "latency")
            return [self.priced.settled(assignment) for assignment in found]
        if name == "pareto":
            return pareto(problem)
        if name == "exhaustive":
            return exhaustive(problem)
        if name == "random":
            return sampled(problem, count=_SAMPLES, seed=self.seed)
        if name == "hawq-v2":
            return self._hawq(problem)
        return self._hulls(problem)

    def _hulls(self, problem: Problem) -> list[Assignment]:
        """The plans on the convex hulls of damage and what the budget weighs.

        That is latency, or size, or, where both matter, also shares of the two.
        """
        floats = self.priced.problem.costs(self.priced.problem.uniform([FP32]))
        found = []
        for share in self._shares():
            mixed = blended(
                problem,
                share / max(floats.latency, _TINY),
                (1.0 - share) / max(floats.size, _TINY),
            )
            found += sweep(mixed, partial(self._solve, mixed), costly="latency", other="damage")
        return list(dict.fromkeys(found))

    def _shares(self) -> tuple[float, ...]:
        """Shares of latency in what is paid for less damage."""
        weighed = {self.objective, *self.limited} - {"damage"}
        if weighed == {"latency"}:
            return (1.0,)
        return (0.0,) if weighed == {"size"} else _SHARES

    def _solve(self, problem: Problem, prices: Prices) -> Found:
        found = best_at(problem, prices)
        self.exact = self.exact and found.exact
        return found

    def _hawq(self, problem: Problem) -> list[Assignment]:
        wanted = {
            unit.layer.name: [c.name for c in choices if c.name != FP32]
            for unit, choices in zip(self.priced.wiring.units, problem.choices, strict=True)
            if unit.layer is not None
        }
        estimates = hessian_damages(self.network, wanted, tick=self.tick)
        choices = tuple(
            tuple(
                replace(c, costs=replace(c.costs, damage=estimates.get((name, c.name), 0.0)))
                for c in options
            )
            for name, options in zip(problem.names, problem.choices, strict=True)
        )
        return self._hulls(without_edges(Problem(problem.names, choices, problem.edges)))


def _plan(
    search: _Search, selection: Selection, name: str, repairs: int, *, measure_front: bool
) -> Plan:
    priced, budget = search.priced, selection.budget
    problem = priced.problem
    lowest = [n for n in (INT8, *search.precisions) if n != FP32]
    ends = {FP32: problem.uniform([FP32]), INT8: problem.uniform(lowest)}
    figures = selection.baseline(ends)
    by_hand = selection.pick(search.assignments("greedy"))
    beside = {FIRST_LAST: _first_last(priced, ends[INT8]), "greedy": by_hand}
    chosen = selection.pick_timed([*search.assignments(name), *ends.values()])
    repaired, words = selection.repaired(chosen, repairs)
    final, exchanged = selection.fastest(repaired, beside)
    limits = _limits(selection, chosen)
    found = {**ends, **beside, "plan": final}
    figures = selection.timed(found)
    return Plan(
        budget=budget,
        strategy=name if name != "min-cut" or can_cut(problem) else "min-cut (frontier search)",
        feasible=_keeps(selection, final, figures),
        exact=search.exact and name != "greedy",
        layers=_layers(priced, final),
        models=figures,
        predicted={model: priced.costs(a) for model, a in found.items()},
        choices={model: priced.assignment(a).layers for model, a in found.items()},
        front=_front(search, selection, [final], measure=measure_front),
        gap=gap_to_exhaustive(problem, chosen, limits, budget.objective),
        bound=_bound(search, limits, budget.objective),
        repairs=words + exchanged,
        history=tuple(_history(selection)),
        network=search.network,
    )


def _first_last(priced: Priced, lowest: Assignment) -> Assignment:
    """``lowest`` with the first and the last layer in FP32, as habit has it."""
    layers = [n for n, unit in enumerate(priced.wiring.units) if unit.layer is not None]
    found = list(lowest)
    for number in (layers[0], layers[-1]):
        names = [choice.name for choice in priced.problem.choices[number]]
        if FP32 in names:
            found[number] = names.index(FP32)
    return priced.settled(tuple(found))


def _warn_of(plan: Plan) -> None:
    mine = plan.models["plan"]
    assert mine.latency is not None
    Diagnostics().warn(
        f"no plan keeps to the budget ({plan.budget}); the nearest one loses {mine.drop:.3g}"
        f" points, takes {1e3 * mine.latency:.3g} ms and {mine.size:,} bytes. Allow more"
        " candidates, or a wider budget",
        ConfigWarning,
    )


def _limits(selection: Selection, chosen: Assignment) -> Limits:
    """The budget in predicted costs; the accuracy that was reached as the damage predicted."""
    found = selection.limits
    fixed = selection.priced.fixed
    damage = float("inf")
    if selection.budget.accuracy_drop is not None:
        damage = selection.priced.problem.costs(chosen).damage
    return Limits(found.latency - fixed.latency, damage, found.size - fixed.size)


def _bound(search: _Search, limits: Limits, objective: str) -> float:
    bound = lower_bound(search.priced.problem, search.solve, limits, objective)
    return bound + float(getattr(search.priced.fixed, objective)) if bound > 0 else 0.0


def _keeps(selection: Selection, final: Assignment, figures: Mapping[str, Figures]) -> bool:
    """Whether what was measured of the plan keeps to the budget."""
    budget, mine, floats = selection.budget, figures["plan"], figures[FP32]
    kept = selection.accurate(final) and excess_of(budget, mine, floats) <= 1.0
    if budget.size is not None:
        kept = kept and mine.size <= budget.size
    if budget.size_ratio is not None:
        kept = kept and mine.size <= budget.size_ratio * floats.size
    return kept


def _layers(priced: Priced, final: Assignment) -> tuple[PlannedLayer, ...]:
    found = []
    for unit, choices, number in zip(
        priced.wiring.units, priced.problem.choices, final, strict=True
    ):
        if unit.layer is not None:
            found.append(
                PlannedLayer(
                    name=unit.name,
                    kind=unit.layer.kind,
                    precision=choices[number].name,
                    macs=unit.layer.macs,
                    costs={choice.name: choice.costs for choice in choices},
                )
            )
    return tuple(found)


def _front(
    search: _Search, selection: Selection, also: Sequence[Assignment], *, measure: bool
) -> tuple[FrontPoint, ...]:
    priced = search.priced
    every = [*pareto(priced.problem), *also]
    step = max(1, len(every) // _FRONT)
    kept = dict.fromkeys([*every[::step], *also])
    points = []
    for assignment in sorted(kept, key=lambda a: priced.costs(a).latency):
        layers = priced.assignment(assignment).layers
        known = selection.known.get(tuple(sorted(layers.items())))
        measured = selection.figures(assignment) if measure else known
        points.append(
            FrontPoint(layers=layers, predicted=priced.costs(assignment), measured=measured)
        )
    return tuple(points)


def _history(selection: Selection) -> Iterable[tuple[float, float]]:
    for figures in selection.known.values():
        yield figures.noise, figures.drop


def _check_counts(*, repeats: int, repairs: int) -> None:
    for name, value, least in (("repeats", repeats, 1), ("repairs", repairs, 0)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} is a whole number >= {least}, got {value!r}")


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar that counts measurements, on a terminal only."""
    with tqdm(desc="plan", unit="run", disable=None if shown else True, leave=False) as bar:
        yield bar.update
