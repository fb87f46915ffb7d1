"""A report as a figure of matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fxquant.errors import MissingDependencyError

if TYPE_CHECKING:
    import matplotlib.figure

    from fxquant.sensitivity.report import SensitivityReport


def figure(report: SensitivityReport, metric: str | None = None) -> matplotlib.figure.Figure:
    """Damage per layer; the cumulative sweep and the choices where the report has them.

    Args:
        report: what is drawn.
        metric: of the damages; ``None`` is that of the report.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plot needs matplotlib: pip install 'fxquant[plot]'"
        ) from error
    timed = [c for c in report.choices if c.milliseconds is not None and c.measurement is not None]
    panels = 1 + bool(report.cumulative) + bool(timed)
    drawn = Figure(figsize=(10, 3.5 * panels), layout="constrained")
    axes = list(drawn.subplots(panels, 1, squeeze=False)[:, 0])
    _draw_damages(axes.pop(0), report, report.metric if metric is None else metric)
    if report.cumulative:
        axis = axes.pop(0)
        sqnr = [step.measurement.output.sqnr for step in report.cumulative]
        axis.plot(range(1, len(sqnr) + 1), sqnr, marker=".")
        axis.set(xlabel="layers lowered, most robust first", ylabel="SQNR, dB")
    if timed:
        axis = axes.pop(0)
        for choice in timed:
            assert choice.measurement is not None
            axis.scatter(choice.milliseconds, choice.measurement.output.sqnr, label=choice.name)
        axis.set(xlabel="ms per batch", ylabel="SQNR, dB")
        axis.legend(fontsize=8)
    return drawn


def _draw_damages(axis: object, report: SensitivityReport, metric: str) -> None:
    names = [result.name for result in report.results]
    values = [report.damage(name, metric) for name in names]
    heights = [v if math.isfinite(v) else 0.0 for v in values]
    decisions = report.decisions()
    colors = ["tab:red" if decisions[name].fragile else "tab:blue" for name in names]
    axis.bar(range(len(names)), heights, color=colors)  # type: ignore[attr-defined]  # no stubs
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)  # type: ignore[attr-defined]  # no stubs
    unit = "minus SQNR, dB" if metric == "sqnr" else f"damage by {metric}"
    axis.set(ylabel=unit)  # type: ignore[attr-defined]  # no stubs
