"""What was measured, and what follows from it: medians, intervals and ratios within each run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.speed.protocol import Built


@dataclass(frozen=True, slots=True)
class Interval:
    """A median over runs, with the smallest and the largest run.

    Of five runs these two hold the true median with a confidence of 94 %: it lies outside only when
    all five fall on one side of it, ``2 / 2**5``.
    """

    median: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Of at least one run."""
    return Interval(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One peer on one network.

    Attributes:
        built: how it was set up and how right it is; ``None`` where it cannot take part.
        medians: of each run, milliseconds of a call: the median of the turns' medians.
        minima: of each run, milliseconds of the fastest call.
        waited: of all turns, the median part of the time spent waiting for a core.
        failure: why it cannot take part.
    """

    built: Built | None = None
    medians: tuple[float, ...] = ()
    minima: tuple[float, ...] = ()
    waited: float = 0.0
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All peers on one network with one number of threads.

    Attributes:
        network: its name.
        threads: that a call may use, as many cores being all there are.
        weights: where the network's weights are from.
        machine: processor, and what torch finds in it.
        versions: package -> version.
        plan: runs, rounds of a run, and seconds of a turn.
        rows: peer -> what was measured, in the order of the report.
    """

    network: str
    threads: int
    weights: str
    machine: str
    versions: Mapping[str, str]
    plan: tuple[int, int, float]
    rows: Mapping[str, Row] = field(default_factory=dict)

    def ratio(self, one: str, other: str, *, fastest: bool = False) -> Interval | None:
        """Latency of ``one`` over that of ``other``, formed within each run.

        Args:
            one: a peer.
            other: a peer.
            fastest: of the fastest calls, instead of the medians.

        Returns:
            ``None`` where one of them did not take part.
        """
        if not all(name in self.rows and self.rows[name].medians for name in (one, other)):
            return None
        rows = self.rows[one], self.rows[other]
        pairs = [row.minima if fastest else row.medians for row in rows]
        return interval([a / b for a, b in zip(*pairs, strict=True)])

    @property
    def waited(self) -> float:
        """Of all peers, the median part of the time in which a core was missing."""
        return statistics.median([row.waited for row in self.rows.values() if row.medians] or [0.0])

    def fastest(self, names: Sequence[str]) -> str | None:
        """The one of ``names`` with the lowest median; ``None`` where none took part."""
        there = [name for name in names if name in self.rows and self.rows[name].medians]
        return min(there, key=lambda name: statistics.median(self.rows[name].medians), default=None)


Tables: TypeAlias = dict[tuple[str, int], Table]


def read_tables(path: Path) -> Tables:
    """``(network, threads)`` -> table; empty where there is no file."""
    if not path.exists():
        return {}
    tables = [_table(fields) for fields in json.loads(path.read_text())]
    return {(table.network, table.threads): table for table in tables}


def write_tables(path: Path, tables: Tables) -> None:
    """Everything, as a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(table) for table in tables.values()], indent=1) + "\n")


def _table(fields: dict[str, Any]) -> Table:
    rows = {name: _row(row) for name, row in fields.pop("rows").items()}
    return Table(**{**fields, "plan": tuple(fields["plan"])}, rows=rows)


def _row(fields: dict[str, Any]) -> Row:
    built = fields["built"]
    return Row(
        built=None if built is None else Built(**built),
        medians=tuple(fields["medians"]),
        minima=tuple(fields["minima"]),
        waited=fields["waited"],
        failure=fields["failure"],
    )
