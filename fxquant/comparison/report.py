"""What a comparison found, and how it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final

from fxquant._version import __version__
from fxquant.comparison.measures import sqnr_of
from fxquant.errors import ConfigError, UnmatchedRuleError, did_you_mean
from fxquant.tables import Column, as_html, as_markdown, terminal_width, text_parts

_COLUMNS: Final = (
    Column(title="name", width=22),
    Column(title="layer", width=18, rank=2),
    Column(title="op", width=10, rank=3),
    Column(title="runs", width=8, rank=1),
    Column(title="SQNR", width=7),
    Column(title="channel", width=7),
    Column(title="own", width=7),
    Column(title="rounding", width=8, rank=5),
    Column(title="error", width=10),
    Column(title="at min", width=7, rank=4),
    Column(title="at max", width=7, rank=4),
    Column(title="clipped", width=7, rank=1),
    Column(title="unused range", width=8, rank=1),
    Column(title="outlier channels", width=16, rank=6),
    Column(title="starved weights", width=8, rank=7),
)
_LISTED: Final = 5


class Fault(Enum):
    """Where the error of a tensor comes from."""

    NONE = "exact"
    """There is none."""
    BORN = "born here"
    """At least half of the noise is what the op adds when it is fed the float values, and that is
    at least twice what rounding those values costs: an op that only moves them adds nothing."""
    GROWS = "grows here"
    """The op more than doubles the relative noise of what it reads, without adding it itself."""
    CARRIED = "carried"
    """It comes with what the op reads."""
    SKIPPED = "not compared"
    """The value has no counterpart of the same shape; see the row's note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRow:
    """One op of the float graph, or one input, and its value in the int8 model.

    Attributes:
        name: of the op in the float graph (of several in one kernel the last), or of the input.
        layer: path of the module whose kernel gives the value: of ``conv -> bn -> relu``, the
            conv's.
        op: what it is: module class, function or method; ``quantize`` where a value is only
            rounded; ``input``.
        runs: in which arithmetic: ``int8``, ``emulated``, ``fp32``, ...
        kernel: what runs it.
        sqnr: signal to noise of the value in dB, everything before it included.
        channel_sqnr: the same of the median channel. Far below ``sqnr``, it says that a few
            channels have the range and the others too few integers.
        own: ``sqnr`` where the op is fed the float values (rounded, where it reads integers): what
            the op itself loses.
        rounding: the same where the float value is only rounded to the op's output parameters;
            infinite for a float output. The best that ``own`` can be.
        growth: dB by which ``channel_sqnr`` is below the lowest among what it reads; 0 where it is
            not, or where that is exact.
        fault: where its error comes from, judged by the median channel.
        at_min: share of the integers that are the smallest possible one (after a ReLU: the zeros).
        at_max: share of the integers that are the largest possible one.
        clipped: share of float values more than half a step outside the range.
        unused: share of the integers that lie outside what was seen: one bit is lost at 0.5.
        outliers: channels whose largest value is far above the median channel's, with the multiple.
        starved: weight channels that use a sixteenth of their integers or less, of all channels.
        note: why nothing was compared.
    """

    name: str
    layer: str
    op: str
    runs: str
    kernel: str
    sqnr: float
    channel_sqnr: float
    own: float
    rounding: float
    growth: float
    fault: Fault
    at_min: float | None = None
    at_max: float | None = None
    clipped: float | None = None
    unused: float | None = None
    outliers: tuple[tuple[int, float], ...] = ()
    starved: tuple[int, int] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """What :func:`fxquant.compare` found; print it, or read ``rows``.

    Attributes:
        rows: one for each value of the int8 graph that the float graph has too, in graph order.
        stage: of the int8 model: ``lowered`` or ``reference``.
        output_sqnr: of the model's outputs, in dB.
        threshold: in dB; see :meth:`first_below`.
        batches: how many were run.
    """

    rows: tuple[CompareRow, ...]
    stage: str
    output_sqnr: float
    threshold: float
    batches: int

    def row(self, name: str) -> CompareRow:
        """The row of an op or input, or of a module by its path; of several, the first.

        Raises:
            UnmatchedRuleError: there is none; a ``LookupError``.
        """
        for row in self.rows:
            if name in (row.name, row.layer):
                return row
        known = [name for row in self.rows for name in (row.name, row.layer) if name]
        raise UnmatchedRuleError(f"no row is called {name!r}{did_you_mean(name, known)}")

    def first_below(self, threshold: float | None = None) -> CompareRow | None:
        """The first row, in graph order, whose SQNR is below ``threshold`` dB.

        Args:
            threshold: by default the report's.
        """
        limit = self.threshold if threshold is None else threshold
        return next((r for r in self._compared if r.sqnr < limit), None)

    def born(self, count: int = _LISTED) -> tuple[CompareRow, ...]:
        """The rows whose ops add the noise that they show, noisiest first."""
        rows = [row for row in self._compared if row.fault is Fault.BORN]
        return tuple(sorted(rows, key=lambda row: row.channel_sqnr)[:count])

    def grows(self, count: int = _LISTED) -> tuple[CompareRow, ...]:
        """The rows whose ops amplify the noise of what they read, worst first."""
        rows = [row for row in self._compared if row.fault is Fault.GROWS]
        return tuple(sorted(rows, key=lambda row: -row.growth)[:count])

    @property
    def _compared(self) -> tuple[CompareRow, ...]:
        return tuple(row for row in self.rows if not row.note)

    @property
    def summary(self) -> str:
        """Where the error is born, where it grows, and where it first passes the threshold."""
        first = self.first_below()
        lines = [
            f"{self.stage} model against the float model, {self.batches} batch(es): outputs at"
            f" {_db(self.output_sqnr)} dB",
            f"first below {self.threshold:g} dB: "
            + ("none" if first is None else f"{_label(first)} ({_db(first.sqnr)} dB)"),
        ]
        for title, rows in (("born", self.born()), ("grows", self.grows())):
            if rows:
                lines.append(f"{title}: " + ", ".join(_short(row, title) for row in rows))
        skipped = [row for row in self.rows if row.note]
        if skipped:
            listed = "; ".join(f"{row.name!r}: {row.note}" for row in skipped[:_LISTED])
            lines.append(f"not compared: {len(skipped)} ({listed})")
        return "\n".join(lines)

    def to_text(self, width: int | None = None) -> str:
        """The summary and a table.

        Args:
            width: the longest line wanted; the least important columns are left out to keep to it,
                and named below the table. ``None`` keeps everything.
        """
        return "\n\n".join([self.summary, *text_parts(_COLUMNS, self._cells(), width)])

    def to_markdown(self) -> str:
        """The summary as a list and the table in GitHub's Markdown, with all columns."""
        points = "\n".join(f"- {line}" for line in self.summary.splitlines())
        return f"{points}\n\n{as_markdown(_COLUMNS, self._cells())}"

    def to_json(self) -> str:
        """Everything, as JSON; a figure that is infinite is null."""
        first = self.first_below()
        return json.dumps(
            {
                "fxquant": __version__,
                "stage": self.stage,
                "batches": self.batches,
                "output_sqnr": _finite(self.output_sqnr),
                "threshold": self.threshold,
                "first_below": None if first is None else first.name,
                "born": [row.name for row in self.born()],
                "grows": [row.name for row in self.grows()],
                "rows": [_plain(row) for row in self.rows],
            },
            indent=2,
        )

    def _cells(self) -> list[list[str]]:
        return [_row_cells(row) for row in self.rows]

    def _repr_html_(self) -> str:
        lines = "<br>".join(self.summary.replace("<", "&lt;").splitlines())
        return f"<p>{lines}</p>{as_html(_COLUMNS, self._cells())}"

    def __str__(self) -> str:
        return self.to_text(terminal_width())


def fault_of(
    whole: float, own: float, inputs: Sequence[float], roundings: Sequence[float]
) -> Fault:
    """Where the noise of a value comes from; see :class:`Fault`.

    Args:
        whole: noise to signal of the value.
        own: noise to signal of the value where the op is fed the float values.
        inputs: noise to signal of what it reads.
        roundings: noise to signal of what it is fed for ``own``.
    """
    if whole == 0:
        return Fault.NONE
    if own >= whole / 2 and own >= 2 * max(roundings, default=0.0):
        return Fault.BORN
    return Fault.GROWS if whole > 2 * max(inputs, default=0.0) else Fault.CARRIED


def check_threshold(threshold: object) -> float:
    """``threshold`` as a number of dB.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise ConfigError(f"threshold is a number of dB, got {threshold!r}")
    if not math.isfinite(threshold):
        raise ConfigError(f"threshold must be finite, got {threshold!r}")
    return float(threshold)


def growth_of(whole: float, inputs: Sequence[float]) -> float:
    """How many dB a value is noisier than the noisiest of what it is made of; at least 0."""
    worst = max(inputs, default=0.0)
    if worst == 0 or whole <= worst:
        return 0.0
    return sqnr_of(worst) - sqnr_of(whole) if math.isfinite(whole) else math.inf


def _row_cells(row: CompareRow) -> list[str]:
    if row.note:
        return [row.name, row.layer, row.op, row.runs, *[""] * 4, row.fault.value, *[""] * 6]
    outliers = ", ".join(f"{i} ({multiple:.3g} x)" for i, multiple in row.outliers[:3])
    more = f" and {len(row.outliers) - 3} more" if len(row.outliers) > 3 else ""
    starved = "" if not row.starved or not row.starved[0] else "{} of {}".format(*row.starved)
    return [
        row.name,
        row.layer,
        row.op,
        row.runs,
        _db(row.sqnr),
        _db(row.channel_sqnr),
        _db(row.own),
        _db(row.rounding),
        row.fault.value,
        _percent(row.at_min),
        _percent(row.at_max),
        _percent(row.clipped),
        _percent(row.unused),
        outliers + more,
        starved,
    ]


def _short(row: CompareRow, title: str) -> str:
    if title == "born":
        return f"{_label(row)} ({_db(row.channel_sqnr)} dB)"
    return f"{_label(row)} ({_db(row.growth)} dB worse than what it reads)"


def _label(row: CompareRow) -> str:
    """``'layer1.conv1' as far as 'relu_3'``, or the op alone where it is no module's."""
    if row.layer in ("", row.name) or row.op == "quantize":
        return repr(row.name)
    return f"{row.layer!r} as far as {row.name!r}"


def _db(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else ("exact" if value > 0 else "lost")


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "<0.1 %"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(row: CompareRow) -> dict[str, Any]:
    plain = asdict(row) | {"fault": row.fault.value}
    return {k: _finite(v) if isinstance(v, float) else v for k, v in plain.items()}
