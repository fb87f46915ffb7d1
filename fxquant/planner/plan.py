"""A plan: which layer gets which precision, what that costs, and what else was possible."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fxquant._version import __version__
from fxquant.errors import ConfigError, MissingDependencyError
from fxquant.graph_module import QuantGraphModule
from fxquant.planner.budget import Budget
from fxquant.planner.build import lowered
from fxquant.planner.judge import Figures
from fxquant.planner.problem import Costs
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.sensitivity.network import Assignment, CalibratedNetwork
from fxquant.tables import Column, as_html, as_markdown, as_text, terminal_width, text_parts

_LAYERS: Final = (
    Column(title="layer", width=26),
    Column(title="kind", width=14, rank=2),
    Column(title="precision", width=12),
    Column(title="damage", width=8),
    Column(title="latency", width=9),
    Column(title="of FP32", width=9, rank=3),
    Column(title="size", width=8, rank=1),
    Column(title="others", width=34, rank=4),
)
_MODELS: Final = (
    Column(title="model", width=12),
    Column(title="accuracy", width=8),
    Column(title="drop", width=6),
    Column(title="SQNR", width=6),
    Column(title="latency", width=9),
    Column(title="predicted", width=9),
    Column(title="size", width=8),
    Column(title="int8 MACs", width=8),
)
_FRONT: Final = (
    Column(title="accuracy", width=8),
    Column(title="latency", width=9),
    Column(title="size", width=8),
    Column(title="damage", width=8),
    Column(title="layers", width=30),
    Column(title="measured", width=8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        name: path of its module, or of its node in the float graph.
        kind: what it computes.
        precision: the candidate that was chosen.
        macs: multiply-accumulates; ``None`` where unknown.
        costs: candidate -> latency, damage and size of the layer in it.
    """

    name: str
    kind: str
    precision: str
    macs: int | None
    costs: Mapping[str, Costs]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """A plan that no other one of the front beats in latency, damage and size.

    Attributes:
        layers: layer -> candidate.
        predicted: its costs.
        measured: what was measured of it; ``None`` where it was not.
    """

    layers: Mapping[str, str]
    predicted: Costs
    measured: Figures | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What :func:`fxquant.plan_mixed_precision` found; print it, or take its mapping.

    Attributes:
        budget: what it was to keep to.
        strategy: how it was searched.
        feasible: the measured figures keep to the budget.
        exact: the search found the cheapest plan at each price it tried.
        layers: every layer, in graph order.
        models: ``fp32``, ``int8`` (all layers), ``first-last`` (those two in FP32, all others in
            int8), ``greedy`` and ``plan``: what was measured.
        predicted: the same -> costs from those of layers and conversions.
        choices: the same -> layer -> candidate.
        front: plans between the extremes, fastest first.
        gap: how much more the search's plan costs than the best one of all plans, as a share, by
            predicted costs; ``None`` where there are too many plans to try.
        bound: the least that any plan within the predicted limits costs (seconds, bytes or damage).
        repairs: layers that were changed after measuring, in words.
        history: each plan that was measured on the way: predicted damage, and drop.
    """

    budget: Budget
    strategy: str
    feasible: bool
    exact: bool
    layers: tuple[PlannedLayer, ...]
    models: Mapping[str, Figures]
    predicted: Mapping[str, Costs]
    choices: Mapping[str, Mapping[str, str]]
    front: tuple[FrontPoint, ...]
    gap: float | None
    bound: float
    repairs: tuple[str, ...]
    history: tuple[tuple[float, float], ...]
    network: CalibratedNetwork = field(repr=False)

    @property
    def precisions(self) -> dict[str, str]:
        """Layer -> the candidate that was chosen."""
        return {layer.name: layer.precision for layer in self.layers}

    def qconfig_mapping(self) -> QConfigMapping:
        """The mapping to give :func:`fxquant.prepare_fx`."""
        return self.network.mapping(Assignment(self.precisions))

    def convert(self, model: str = "plan") -> QuantGraphModule:
        """The int8 model of the plan, with the calibration that the plan was made with.

        Args:
            model: one of :attr:`models`: ``"greedy"`` is what stands beside the plan.

        Raises:
            ConfigError: there is no such model.
        """
        if model not in self.choices:
            known = ", ".join(map(repr, self.choices))
            raise ConfigError(f"a plan has no model {model!r}; it has {known}")
        return lowered(self.network, Assignment(self.choices[model]))

    @property
    def summary(self) -> str:
        """The budget and whether it is met, the choices, and how sure the search is."""
        counts = Counter(layer.precision for layer in self.layers)
        chosen = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        verdict = "met" if self.feasible else "NOT met"
        lines = [
            f"budget: {self.budget} ({verdict}); made small: {self.budget.objective}",
            f"strategy {self.strategy!r}: {chosen}",
        ]
        search = "each search exact" if self.exact else "bounded search"
        if self.gap is not None:
            search += f"; {100 * self.gap:.2f} % above the best of all plans (predicted)"
        else:
            mine = getattr(self.predicted["plan"], self.budget.objective)
            if self.bound > 0 and mine >= self.bound:
                above = 100 * (mine / self.bound - 1)
                search += f"; at most {above:.1f} % above the best of all plans (predicted)"
        lines.append(f"{search}; {len(self.history)} plans measured")
        lines += [f"repaired: {text}" for text in self.repairs]
        return "\n".join(lines)

    def to_text(self, width: int | None = None) -> str:
        """The summary, the models that were measured, and the layers.

        Args:
            width: the longest line wanted; ``None`` wraps nothing.
        """
        parts = [self.summary]
        for columns, rows in self._tables():
            parts += text_parts(columns, rows, width)
        return "\n\n".join(parts)

    def front_table(self, width: int | None = None) -> str:
        """The Pareto front as a table."""
        return as_text(_FRONT, self._front_cells(), width)[0]

    def to_markdown(self) -> str:
        """Everything, as lists and tables in GitHub's Markdown."""
        points = "\n".join(f"- {line}" for line in self.summary.splitlines())
        tables = [as_markdown(columns, rows) for columns, rows in self._tables()]
        front = as_markdown(_FRONT, self._front_cells())
        return "\n\n".join([points, *tables, "Pareto front:", front])

    def to_json(self) -> str:
        """Everything but the model, as JSON; a figure that is infinite is null."""
        return json.dumps(
            _finite(
                {
                    "fxquant": __version__,
                    "budget": asdict(self.budget),
                    "strategy": self.strategy,
                    "feasible": self.feasible,
                    "exact": self.exact,
                    "gap": self.gap,
                    "bound": self.bound,
                    "repairs": list(self.repairs),
                    "layers": [asdict(layer) for layer in self.layers],
                    "choices": {name: dict(found) for name, found in self.choices.items()},
                    "models": {name: asdict(found) for name, found in self.models.items()},
                    "predicted": {name: asdict(c) for name, c in self.predicted.items()},
                    "front": [asdict(point) for point in self.front],
                }
            ),
            indent=2,
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the Pareto front: damage over latency, size as area, the models marked.

        Args:
            path: where the picture is written; ``None`` only draws.

        Returns:
            matplotlib's figure.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError(
                "Plan.plot needs matplotlib, which is not installed: pip install 'fxquant[plot]'"
            ) from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        largest = max(point.predicted.size for point in self.front) or 1.0
        axes.scatter(
            [1e3 * point.predicted.latency for point in self.front],
            [_sqnr(point.predicted.damage) for point in self.front],
            s=[20 + 180 * point.predicted.size / largest for point in self.front],
            alpha=0.4,
            label="Pareto front (area: size)",
        )
        marked: dict[tuple[float, float], list[str]] = {}
        for name, costs in self.predicted.items():
            marked.setdefault((1e3 * costs.latency, _sqnr(costs.damage)), []).append(name)
        for place, names in marked.items():
            axes.scatter(*place, marker="x")
            label = ", ".join(names)
            axes.annotate(label, place, textcoords="offset points", xytext=(5, 5))
        axes.set_xlabel("predicted latency in ms")
        axes.set_ylabel("predicted SQNR of the outputs in dB")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure

    def _tables(self) -> list[tuple[tuple[Column, ...], list[list[str]]]]:
        models = [_model_cells(n, f, self.predicted[n]) for n, f in self.models.items()]
        return [(_MODELS, models), (_LAYERS, [_layer_cells(layer) for layer in self.layers])]

    def _front_cells(self) -> list[list[str]]:
        return [_front_row(point) for point in self.front]

    def _repr_html_(self) -> str:
        lines = "<br>".join(self.summary.replace("<", "&lt;").splitlines())
        tables = "".join(as_html(columns, rows) for columns, rows in self._tables())
        return f"<p>{lines}</p>{tables}{as_html(_FRONT, self._front_cells())}"

    def __str__(self) -> str:
        return self.to_text(terminal_width())


def _model_cells(name: str, found: Figures, predicted: Costs) -> list[str]:
    return [
        name,
        f"{found.accuracy:.2f}",
        f"{found.drop:.2f}",
        _decibels(found.noise),
        "" if found.latency is None else _seconds(found.latency),
        _seconds(predicted.latency),
        _bytes(found.size),
        f"{100 * found.int8_share:.1f} %",
    ]


def _layer_cells(layer: PlannedLayer) -> list[str]:
    mine = layer.costs[layer.precision]
    floats = layer.costs.get("fp32")
    others = [
        f"{name} {_seconds(c.latency)}, {c.damage:.1e}"
        for name, c in layer.costs.items()
        if name not in (layer.precision, "fp32")
    ]
    return [
        layer.name,
        layer.kind,
        layer.precision,
        f"{mine.damage:.1e}" if mine.damage else "0",
        _seconds(mine.latency),
        "" if floats is None else _seconds(floats.latency),
        _bytes(mine.size),
        "; ".join(others),
    ]


def _front_row(point: FrontPoint) -> list[str]:
    counts = Counter(point.layers.values())
    return [
        "" if point.measured is None else f"{point.measured.accuracy:.2f}",
        _seconds(point.predicted.latency),
        _bytes(point.predicted.size),
        f"{point.predicted.damage:.2e}",
        ", ".join(f"{count} {name}" for name, count in counts.most_common()),
        "" if point.measured is None else f"{point.measured.drop:.2f} lost",
    ]


def _seconds(value: float) -> str:
    return f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


def _bytes(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def _sqnr(noise: float) -> float:
    """In dB; 100 where there is no noise, so that it can be drawn."""
    return -10 * math.log10(noise) if noise > 1e-10 else 100.0


def _decibels(noise: float) -> str:
    return f"{_sqnr(noise):.1f} dB" if noise else "exact"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
