"""Two reports, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from fxquant.sensitivity.report import SensitivityReport
from fxquant.sensitivity.results import to_plain
from fxquant.tables import Column, as_html, as_markdown, as_text, terminal_width

_COLUMNS: Final = (
    Column(title="layer", width=24),
    Column(title="rank", width=9),
    Column(title="damage", width=18),
    Column(title="SQNR", width=14),
    Column(title="verdict", width=30),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffRow:
    """One layer before and after; ``None`` where a report does not have it.

    Attributes:
        layer: its name.
        rank: places in the two rankings, from 1.
        damage: by the metric of each report.
        sqnr: at the model's output, in dB.
        verdict: what the policy of each report says.
    """

    layer: str
    rank: tuple[int | None, int | None]
    damage: tuple[float | None, float | None]
    sqnr: tuple[float | None, float | None]
    verdict: tuple[str, str]

    @property
    def changed(self) -> bool:
        """Whether the verdict is another, or the layer is new or gone."""
        return self.verdict[0] != self.verdict[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportDiff:
    """What changed; ``print`` shows a table.

    Attributes:
        rows: every layer of both, in the ranking of the second, those that are gone last.
        metrics: the metric of each.
    """

    rows: tuple[DiffRow, ...]
    metrics: tuple[str, str]

    @property
    def changed(self) -> tuple[DiffRow, ...]:
        """The layers about which another decision is made."""
        return tuple(row for row in self.rows if row.changed)

    @property
    def summary(self) -> str:
        """One line."""
        by = self.metrics[0] if self.metrics[0] == self.metrics[1] else " and ".join(self.metrics)
        return f"{len(self.rows)} layer(s), {len(self.changed)} with another verdict; by {by}"

    def to_text(self, width: int | None = None) -> str:
        """A plain table."""
        return f"{self.summary}\n\n{as_text(_COLUMNS, self._cells(), width)[0]}"

    def to_markdown(self) -> str:
        """A table in GitHub's Markdown."""
        return f"{self.summary}\n\n{as_markdown(_COLUMNS, self._cells())}"

    def to_json(self) -> str:
        """Everything, as JSON."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return json.dumps(plain, indent=1)

    def _repr_html_(self) -> str:
        return f"<p>{self.summary}</p>{as_html(_COLUMNS, self._cells())}"

    def __str__(self) -> str:
        return self.to_text(terminal_width())

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.layer,
                _pair(row.rank, "d"),
                _pair(row.damage, ".3g"),
                _pair(row.sqnr, ".1f"),
                row.verdict[0] if not row.changed else f"{row.verdict[0]} -> {row.verdict[1]}",
            ]
            for row in self.rows
        ]


def compare_reports(before: SensitivityReport, after: SensitivityReport) -> ReportDiff:
    """Every layer of two reports."""
    sides = [_facts(before), _facts(after)]
    names = dict.fromkeys([*sides[1], *sides[0]])
    rows = []
    for name in names:
        left, right = (side.get(name, _ABSENT) for side in sides)
        rows.append(
            DiffRow(
                layer=name,
                rank=(left[0], right[0]),
                damage=(left[1], right[1]),
                sqnr=(left[2], right[2]),
                verdict=(left[3], right[3]),
            )
        )
    return ReportDiff(rows=tuple(rows), metrics=(before.metric, after.metric))


_Facts = tuple[int | None, float | None, float | None, str]
_ABSENT: Final[_Facts] = (None, None, None, "absent")


def _facts(report: SensitivityReport) -> dict[str, _Facts]:
    """Layer -> rank, damage, SQNR and verdict, in the order of the ranking."""
    return {
        record["layer"]: (
            record["rank"],
            record["damage"],
            record.get("sqnr"),
            record["verdict"],
        )
        for record in report.records()
    }


def _pair(values: tuple[Any, Any], form: str) -> str:
    left, right = ("-" if value is None else format(value, form) for value in values)
    return left if left == right else f"{left} -> {right}"
