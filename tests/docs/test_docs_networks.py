"""The page on networks is what was measured, and what was measured is good enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.memory import MemoryCost
from benchmarks.networks import (
    NETWORKS,
    LatencyRecord,
    NetworkRecord,
    cells,
    page,
    read_records,
    write_record,
)

ROOT = Path(__file__).parents[2]
RECORDS = read_records(ROOT / "docs/networks.json")


def test_the_page_is_what_the_records_say() -> None:
    assert (ROOT / "docs/networks.md").read_text() == page(RECORDS)


def test_every_network_is_there() -> None:
    assert tuple(RECORDS) == NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_it_keeps_what_is_promised(name: str) -> None:
    record = RECORDS[name]
    assert record.coverage >= 0.99
    assert not record.failures or record.peers
    assert record.sqnr >= max(record.peers.values()) - 1.0
    if record.state > 40e6:  # graph and scales are a few hundred kilobytes anywhere
        assert record.share <= 0.27


def test_resnet50_is_a_quarter() -> None:
    assert RECORDS["resnet50"].share <= 0.26


def test_memory_where_it_is_not_all_overhead() -> None:
    large = [r.memory for r in RECORDS.values() if r.memory and r.memory.parameters > 90e6]
    assert large
    assert all(cost.prepare <= 1.1 and cost.convert <= 0.4 for cost in large)


def _record() -> NetworkRecord:
    return NetworkRecord(
        pictures="seeded pictures",
        machine="torch 9",
        coverage=0.995,
        floats=(("mean", "of a scale of its own", 2), ("mean", "nobody reads it", 1)),
        sqnr=20.0,
        peers={"x86": 11.0, "onednn": 12.5},
        together={"fxquant": 19.0, "x86": 10.0, "onednn": 11.0},
        artifact=26_000_000,
        state=100_000_000,
    )


def test_runs_add_to_the_records(tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    assert read_records(path) == {}
    latency = LatencyRecord(
        threads=2, machine="m", float_contiguous=12.0, float_channels_last=10.0, int8=4.0
    )
    memory = MemoryCost(
        parameters=1, prepare=1.05, prepared=1, convert=0.3, converted=0.28, first_call=0.3
    )
    first = _record()
    write_record("resnet50", first, path)
    write_record("alexnet", NetworkRecord(**{**_fields(first), "latency": latency}), path)
    write_record("resnet18", NetworkRecord(**{**_fields(first), "memory": memory}), path)
    found = read_records(path)
    assert tuple(found) == ("resnet18", "resnet50", "alexnet")
    assert found["resnet50"] == first
    assert found["alexnet"].latency == latency
    assert found["resnet18"].memory == memory
    assert json.loads(path.read_text())["alexnet"]["latency"]["int8"] == 4.0
    assert latency.ratio == 0.4  # of the faster float
    text = page(found)
    assert "2 thread(s), m" in text
    assert "4 `mean`" not in text
    assert "6 `mean`: of a scale of its own." in text


def test_columns_nobody_measured_are_left_out() -> None:
    text = page({"resnet50": _record()})
    assert "| 12.50 (onednn)" in text
    assert "26.0 %" in text
    assert "latency, int8 / float" not in text
    assert cells("resnet50", _record())[2] == "3 mean"


def _fields(record: NetworkRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in NetworkRecord.__dataclass_fields__}
