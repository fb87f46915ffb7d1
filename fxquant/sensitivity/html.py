"""A report as one page that needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, Final

from fxquant.errors import ConfigError
from fxquant.sensitivity import svg
from fxquant.sensitivity.metrics import METRICS
from fxquant.tables import as_html

if TYPE_CHECKING:
    from fxquant.sensitivity.report import SensitivityReport

_STYLE: Final = """
body { font-family: sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: 3px 7px; text-align: left; }
th { background: #eef; cursor: pointer; }
details { margin: 4px 0; } summary { cursor: pointer; }
"""
# Cells are compared as numbers where both begin with one, units k, M and G counted.
_SCRIPT: Final = """
const size = {k: 1e3, M: 1e6, G: 1e9};
function number(text) {
  const found = /^(-?(?:[0-9.]+(?:e[-+]?[0-9]+)?|inf))(?: ([kMG]))?/.exec(text);
  if (!found) return NaN;
  return Number(found[1].replace('inf', 'Infinity')) * (size[found[2]] || 1);
}
document.querySelectorAll('th').forEach(head => head.addEventListener('click', () => {
  const table = head.closest('table'), body = table.tBodies[0];
  const at = Array.from(head.parentNode.children).indexOf(head);
  const down = head.dataset.down !== 'yes';
  head.dataset.down = down ? 'yes' : 'no';
  Array.from(body.rows).sort((a, b) => {
    const x = a.cells[at].innerText, y = b.cells[at].innerText;
    const p = number(x), q = number(y);
    const order = isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
    return down ? -order : order;
  }).forEach(row => body.appendChild(row));
}));
"""


def page(report: SensitivityReport, plan: Any = None) -> str:
    """The page; see :meth:`SensitivityReport.to_html`."""
    columns, rows = report._table()
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<title>Sensitivity</title>",
        f"<style>{_STYLE}</style></head><body><h1>Sensitivity</h1>",
        "".join(f"<p>{escape(line)}</p>" for line in report.summary.splitlines()),
        as_html(columns, rows),
    ]
    for title, others, cells in report._more_tables():
        parts += [f"<h2>{escape(title.capitalize())}</h2>", as_html(others, cells)]
    parts += ["<h2>Damage per layer</h2>", _damages(report)]
    parts += _choices(report)
    if plan is not None:
        parts += ["<h2>Pareto front</h2>", pareto(plan)]
    parts += ["<h2>Distributions and clip ranges</h2>", *_distributions(report)]
    return "".join([*parts, f"<script>{_SCRIPT}</script></body></html>\n"])


def _damages(report: SensitivityReport) -> str:
    decisions = report.decisions()
    names = [result.name for result in report.results]
    measured = any(result.measurements for result in report.results)
    drawn = []
    metrics = dict.fromkeys([report.metric, *(METRICS if measured else ())])
    for metric in metrics:
        try:
            values = [report.damage(name, metric) for name in names]
        except ConfigError:  # not defined for this output
            continue
        if all(math.isnan(v) for v in values):
            continue
        unit = "minus SQNR, dB" if metric == "sqnr" else f"damage by {metric}"
        marked = [decisions[name].fragile for name in names]
        drawn.append(svg.bars(names, values, marked, unit))
    return "".join(f"<p>{picture}</p>" for picture in drawn)


def _choices(report: SensitivityReport) -> Iterable[str]:
    points = [
        (choice.milliseconds, choice.measurement.output.sqnr, choice.name, False)
        for choice in report.choices
        if choice.milliseconds is not None and choice.measurement is not None
    ]
    if points:
        yield "<h2>Choices</h2>"
        yield svg.scatter(points, "ms per batch", "SQNR, dB")


def pareto(plan: Any) -> str:
    """The Pareto front of a plan: latency and noise of its points, and of the models beside it.

    Args:
        plan: what ``plan_mixed_precision`` returned; read are ``front``, of points with
            ``predicted``, and ``predicted``, model -> costs; costs have ``latency`` and ``damage``.

    Raises:
        ConfigError: it is no such plan.
    """
    try:
        points = [("", point.predicted, True) for point in plan.front]
        points += [(name, costs, False) for name, costs in plan.predicted.items()]
        drawn = [(1e3 * c.latency, _decibels(c.damage), name, on) for name, c, on in points]
    except AttributeError as error:
        raise ConfigError(
            "to_html(plan=...) takes what plan_mixed_precision returned, got"
            f" {type(plan).__name__} ({error})"
        ) from error
    return svg.scatter(drawn, "predicted ms", "predicted SQNR, dB")


def _decibels(noise: float) -> float:
    return -10 * math.log10(noise) if noise > 0 else math.inf


def _distributions(report: SensitivityReport) -> Iterable[str]:
    for name in report.ranking():
        ranges = report[name].ranges
        pictures = [
            svg.histogram(title, values)
            for title, values in (("weight", ranges.weight), ("input", ranges.input))
            if values is not None
        ]
        if pictures:
            yield f"<details><summary>{escape(name)}</summary>{''.join(pictures)}</details>"
