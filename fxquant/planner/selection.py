"""From assignments to the one that keeps to a budget, by measuring, and its repair."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fxquant.graph_module import QuantGraphModule
from fxquant.planner.budget import Budget
from fxquant.planner.build import lowered
from fxquant.planner.judge import Figures, Judge, latencies
from fxquant.planner.pricing import Priced
from fxquant.planner.problem import Assignment, Costs
from fxquant.planner.search import Limits
from fxquant.sensitivity.network import CalibratedNetwork

_MARGIN: Final = 0.98
_KEPT: Final = 4
_FASTER: Final = 0.02


@dataclass
class Selection:
    """Measures plans of one network, each once, and picks by a budget.

    Attributes:
        network: calibrated.
        priced: predicted costs.
        judge: measures accuracy.
        budget: what is to be kept.
        bound: inputs of the call whose latency counts.
        repeats: timed calls of each model.
        limits: the budget in predicted costs; damage is not limited.
        scale: measured over predicted latency.
        known: what was measured so far.
        ends: the plans of :meth:`baseline`.
    """

    network: CalibratedNetwork
    priced: Priced
    judge: Judge
    budget: Budget
    bound: inspect.BoundArguments
    repeats: int
    limits: Limits = field(default_factory=Limits)
    scale: float = 1.0
    known: dict[tuple[tuple[str, str], ...], Figures] = field(default_factory=dict)
    ends: dict[str, Assignment] = field(default_factory=dict)
    _models: dict[Any, QuantGraphModule] = field(default_factory=dict)

    def baseline(self, assignments: Mapping[str, Assignment]) -> dict[str, Figures]:
        """Measure plans that are there in any case, and set the limits by the first of them.

        Args:
            assignments: name -> plan; ``"fp32"`` first.
        """
        timed = self.timed(assignments)
        ratios = []
        for name, assignment in assignments.items():
            seconds = timed[name].latency
            assert seconds is not None
            ratios.append(math.log(seconds / self.priced.costs(assignment).latency))
        self.scale = math.exp(sum(ratios) / len(ratios))
        floats = self.priced.costs(assignments["fp32"])
        latency = size = math.inf
        if self.budget.latency is not None:
            latency = self.budget.latency / self.scale
        elif self.budget.latency_ratio is not None:
            latency = self.budget.latency_ratio * floats.latency
        if self.budget.size is not None:
            size = self.budget.size
        elif self.budget.size_ratio is not None:
            size = self.budget.size_ratio * timed["fp32"].size
        self.limits = Limits(latency=latency, size=size)
        self.ends = dict(assignments)
        return timed

    def timed(self, assignments: Mapping[str, Assignment]) -> dict[str, Figures]:
        """Figures of several plans, with latencies measured in turns."""
        models = {name: self.model(assignment) for name, assignment in assignments.items()}
        times = latencies(models, self.bound, repeats=self.repeats)
        return {
            name: replace(
                self.figures(assignments[name], models[name]), latency=median, fastest=fastest
            )
            for name, (median, fastest) in times.items()
        }

    def model(self, assignment: Assignment) -> QuantGraphModule:
        """The int8 model of a plan; the last few are kept."""
        layers = self.priced.assignment(assignment)
        model = self._models.pop(layers.key, None)
        self._models[layers.key] = model = model or lowered(self.network, layers)
        if len(self._models) > _KEPT:
            del self._models[next(iter(self._models))]
        return model

    def figures(self, assignment: Assignment, model: QuantGraphModule | None = None) -> Figures:
        """What is measured of a plan, without its latency; once for plans of the same layers."""
        key = tuple(sorted(self.priced.assignment(assignment).layers.items()))
        if key not in self.known:
            self.known[key] = self.judge.figures(model or self.model(assignment))
        return self.known[key]

    # -- picking ----------------------------------------------------------------------------------

    def cost(self, assignment: Assignment) -> float:
        """What the budget makes small, as predicted."""
        return float(getattr(self.priced.costs(assignment), self.budget.objective))

    def fits(self, assignment: Assignment) -> bool:
        """Whether the predicted latency and size keep to the budget."""
        return self.limits.met_by(self.priced.costs(assignment))

    def accurate(self, assignment: Assignment) -> bool:
        """Whether the measured accuracy keeps to the budget."""
        drop = self.budget.accuracy_drop
        return drop is None or self.figures(assignment).drop <= drop + 1e-9

    def pick(self, candidates: Iterable[Assignment]) -> Assignment:
        """The candidate that costs least of those that keep to the budget; else the nearest one.

        Accuracy is taken to rise with what is paid for it, so that halving finds the place.
        """
        every = list(dict.fromkeys(candidates))
        fitting = sorted((a for a in every if self.fits(a)), key=self.cost)
        if not fitting:
            return min(every, key=self._excess)
        if self.budget.accuracy_drop is None:
            return fitting[0]
        low, high = 0, len(fitting)
        while low < high:
            middle = (low + high) // 2
            if self.accurate(fitting[middle]):
                high = middle
            else:
                low = middle + 1
        if low < len(fitting):
            return fitting[low]
        return min(fitting, key=lambda a: self.priced.costs(a).damage)

    def pick_timed(self, candidates: Iterable[Assignment], tries: int = 4) -> Assignment:
        """As :meth:`pick`; where a latency is limited, what was picked is timed.

        Predictions are off by some percent: the limit in predicted seconds is tightened by what
        the plan takes too long, and another one is picked.
        """
        every = list(candidates)
        best, least = self.pick(every), math.inf
        for _ in range(tries if math.isfinite(self.limits.latency) else 0):
            picked = self.pick(every)
            over = self.latency_excess(picked)
            if over < least:
                best, least = picked, over
            if over <= 1.0:
                break
            tightened = self.limits.latency / over * _MARGIN
            self.limits = replace(self.limits, latency=tightened)
        return best

    def fastest(
        self, start: Assignment, others: Mapping[str, Assignment]
    ) -> tuple[Assignment, tuple[str, ...]]:
        """Where latency is made small: the plan that takes least of those that keep to the budget.

        Args:
            start: a plan.
            others: name -> plan; one of them is taken where it is measured :data:`_FASTER` faster.

        Returns:
            The plan, and what was changed, in words.
        """
        if self.budget.objective != "latency" or not self.accurate(start):
            return start, ()
        rivals = {
            name: other
            for name, other in others.items()
            if other != start and self.fits(other) and self.accurate(other)
        }
        if not rivals:
            return start, ()
        timed = self.timed({"plan": start, **rivals})
        took = {name: figures.latency or 0.0 for name, figures in timed.items()}
        best = min(took, key=lambda name: took[name])
        if took[best] > (1 - _FASTER) * took["plan"]:
            return start, ()
        words = f"all layers as in {best!r}, {1e3 * took[best]:.3g} ms and not"
        return rivals[best], (f"{words} {1e3 * took['plan']:.3g} (measured)",)

    def latency_excess(self, assignment: Assignment) -> float:
        """Measured latency over what the budget allows."""
        timed = self.timed({"fp32": self.ends["fp32"], "plan": assignment})
        return excess_of(self.budget, timed["plan"], timed["fp32"])

    def _excess(self, assignment: Assignment) -> float:
        costs = self.priced.costs(assignment)
        return max(costs.latency / self.limits.latency, costs.size / self.limits.size)

    # -- repair -----------------------------------------------------------------------------------

    def repaired(self, start: Assignment, tries: int) -> tuple[Assignment, tuple[str, ...]]:
        """``start`` with single layers changed until the measured accuracy keeps to the budget.

        Where it does already, layers are made cheaper as long as it still does.

        Args:
            start: a plan.
            tries: how many plans may be measured.

        Returns:
            The plan, and what was changed, in words.
        """
        if self.budget.accuracy_drop is None or tries == 0:
            return start, ()
        if self.accurate(start):
            return self._cheaper(start, tries)
        return self._safer(start, tries)

    def _changes(self, assignment: Assignment) -> list[tuple[Assignment, int, Costs]]:
        """Plans that differ in one layer and fit, and what they cost more."""
        before = self.priced.costs(assignment)
        found = []
        for unit, choices in enumerate(self.priced.problem.choices):
            if self.priced.wiring.units[unit].layer is None:
                continue
            for number in range(len(choices)):
                if number == assignment[unit]:
                    continue
                changed = self.priced.settled((*assignment[:unit], number, *assignment[unit + 1 :]))
                if self.fits(changed):
                    after = self.priced.costs(changed)
                    more = [a - b for a, b in zip(after.vector, before.vector, strict=True)]
                    found.append((changed, unit, Costs(*more)))
        return found

    def _words(self, before: Assignment, after: Assignment, unit: int, why: str) -> str:
        options = self.priced.problem.choices[unit]
        name = self.priced.problem.names[unit]
        return f"{name!r} {options[before[unit]].name} -> {options[after[unit]].name} ({why})"

    def _safer(self, start: Assignment, tries: int) -> tuple[Assignment, tuple[str, ...]]:
        current, words = start, []
        for _ in range(tries):
            helping = [c for c in self._changes(current) if c[2].damage < 0]
            if not helping:
                break
            # The least that is paid for each noise taken away; what costs nothing comes first.
            changed, unit, _ = min(helping, key=lambda c: max(self._more(c[2]), 0.0) / -c[2].damage)
            drop = self.figures(changed).drop
            words.append(self._words(current, changed, unit, f"drop {drop:.2f}"))
            current = changed
            if self.accurate(current):
                break
        return current, tuple(words)

    def _cheaper(self, start: Assignment, tries: int) -> tuple[Assignment, tuple[str, ...]]:
        current, words, refused = start, [], set[tuple[int, int]]()
        for _ in range(tries):
            saving = [
                c
                for c in self._changes(current)
                if self._more(c[2]) < 0 and (c[1], c[0][c[1]]) not in refused
            ]
            if not saving:
                break
            changed, unit, _ = min(saving, key=lambda c: max(c[2].damage, 0.0) / -self._more(c[2]))
            if not self.accurate(changed):
                refused.add((unit, changed[unit]))
                continue
            words.append(self._words(current, changed, unit, "still within the budget"))
            current = changed
        return current, tuple(words)

    def _more(self, costs: Costs) -> float:
        return float(getattr(costs, self.budget.objective))


def excess_of(budget: Budget, mine: Figures, floats: Figures) -> float:
    """Measured latency over what a budget allows; 0 where it allows any.

    A latency in seconds is the median. One relative to FP32 compares the fastest calls, which are
    what the code costs where nothing interferes.
    """
    if budget.latency is not None:
        assert mine.latency is not None
        return mine.latency / budget.latency
    if budget.latency_ratio is not None:
        assert mine.fastest is not None
        assert floats.fastest is not None
        return mine.fastest / floats.fastest / budget.latency_ratio
    return 0.0
