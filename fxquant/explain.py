"""explain: for every op of the float graph, which rule governs it, and why it is int8 or not."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import nn

from fxquant._version import __version__
from fxquant.errors import UnmatchedRuleError, did_you_mean
from fxquant.op_rows import OpRow, checked, rows_of
from fxquant.tables import Column, as_html, as_markdown, terminal_width, text_parts
from fxquant.targets.choice import MEASURED

_COLUMNS: Final = (
    Column(title="name", width=26),
    Column(title="op", width=17, rank=1),
    Column(title="runs", width=13),
    Column(title="kernel, fate or reason", width=34),
    Column(title="rule", width=14, rank=2),
    Column(title="output", width=20, rank=3),
    Column(title="scale, zero point", width=17, rank=4),
    Column(title="weight", width=20, rank=5),
    Column(title="pattern", width=16, rank=6),
    Column(title="weight scale", width=17, rank=7),
    Column(title="input", width=20, rank=8),
)
_NOTES: Final = Column(title="notes", width=20)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What :func:`explain` found; print it, or read ``rows``.

    Attributes:
        stage: ``fused``, ``prepared``, ``reference`` or ``lowered``.
        target: what it was prepared for.
        rows: one for every op of the float graph that a float tensor enters, in graph order.
    """

    stage: str
    target: str
    rows: tuple[OpRow, ...]

    def row(self, name: str) -> OpRow:
        """The row of an op, by its name or by the path of its module.

        Raises:
            UnmatchedRuleError: there is none, or a path has several; a ``LookupError``.
        """
        by_name = {row.name: row for row in self.rows}
        if name in by_name:
            return by_name[name]
        found = [row for row in self.rows if row.path == name]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(repr(row.name) for row in found)
            raise UnmatchedRuleError(f"{name!r} has {len(found)} ops: {names}; name one of them")
        known = [*by_name, *(row.path for row in self.rows)]
        raise UnmatchedRuleError(
            f"the model has no op {name!r}{did_you_mean(name, known)}; rows are named like the"
            " nodes of the float graph, or like modules"
        )

    @property
    def summary(self) -> str:
        """One line: how many ops run how."""
        counts = Counter(row.runs.value for row in self.rows)
        ops = ", ".join(f"{count} {runs}" for runs, count in counts.most_common())
        target = f" for target {self.target!r}" if self.target else ""
        count = f"{len(self.rows)} ops of the float graph ({ops or 'none'})"
        return f"{self.stage} model{target}: {count}"

    def to_text(self, width: int | None = None) -> str:
        """A plain table.

        Args:
            width: the longest line wanted; the least important columns are left out to keep to it,
                and named below the table. ``None`` keeps everything.
        """
        rows = [_cells(row) for row in self.rows]
        return "\n\n".join([self.summary, *text_parts(_COLUMNS, rows, width)])

    def to_markdown(self) -> str:
        """A table in GitHub's Markdown, with all columns."""
        return f"{self.summary}\n\n{as_markdown((*_COLUMNS, _NOTES), self._all_cells())}"

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(
            {
                "fxquant": __version__,
                "stage": self.stage,
                "target": self.target,
                "ops": [_plain(row) for row in self.rows],
            },
            indent=2,
        )

    def _all_cells(self) -> list[list[str]]:
        return [[*_cells(row), "; ".join(row.notes)] for row in self.rows]

    def _repr_html_(self) -> str:
        return f"<p>{self.summary}</p>{as_html((*_COLUMNS, _NOTES), self._all_cells())}"

    def __str__(self) -> str:
        return self.to_text(terminal_width())


def explain(model: nn.Module) -> Explanation:
    """Say for every op of the float graph what became of it, and why.

    Args:
        model: what ``prepare_fx``, ``convert_fx``, ``convert_to_reference_fx`` or ``fuse_fx``
            returned. Before ``convert_fx`` it says what is planned.

    Returns:
        A printable :class:`Explanation`.

    Raises:
        NotAGraphModuleError: fxquant did not make ``model``.
    """
    gm = checked(model, "explain")
    return Explanation(stage=gm.state.stage.value, target=gm.state.target, rows=rows_of(gm))


def _cells(row: OpRow) -> list[str]:
    parameters = "" if row.scale is None else f"{row.scale:.4g}, {row.zero_point}"
    return [
        row.name,
        row.op,
        row.runs.value,
        row.reason or row.fate or _timed_kernel(row),
        row.rule,
        row.output,
        parameters,
        row.weight,
        row.pattern,
        _range(row.weight_scale),
        row.input,
    ]


def _timed_kernel(row: OpRow) -> str:
    """The kernel, and what it takes where that was measured; the notes have the others' times."""
    found = [re.search(r"([\d.]+ [mu]s), taken", n) for n in row.notes if n.startswith(MEASURED)]
    return ", ".join([row.kernel, *(match[1] for match in found if match)])


def _range(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return ""
    low, high = pair
    return f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"


def _plain(row: OpRow) -> dict[str, Any]:
    return asdict(row) | {"runs": row.runs.value}
