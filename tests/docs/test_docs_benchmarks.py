"""The page on speed shows what its JSON says."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed.peers import PEERS
from benchmarks.speed.report import BEGIN, END, markdown
from benchmarks.speed.results import read_tables

PAGE = Path(__file__).parents[2] / "docs/benchmarks.md"


def test_the_tables_are_what_the_records_say() -> None:
    tables = read_tables(PAGE.with_suffix(".json"))
    assert tables
    _, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, _ = rest.partition(END)
    assert written == f"\n\n{markdown(tables, PAGE.with_suffix(''))}\n"


def test_accuracy_stands_beside_every_time() -> None:
    known = {peer.name for peer in PEERS}
    for table in read_tables(PAGE.with_suffix(".json")).values():
        assert set(table.rows) <= known
        for row in table.rows.values():
            assert bool(row.failure) == (row.built is None) == (not row.medians)
            assert len(row.medians) == len(row.minima)
