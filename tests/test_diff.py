"""diff, run records and the gate: what differs is counted, and every limit can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant import (
    ArtifactError,
    ConfigError,
    Gate,
    QuantGraphModule,
    RunRecord,
    calibrate,
    convert_fx,
    diff,
    get_default_qconfig,
    load,
    prepare_fx,
    record_run,
    save,
)
from fxquant.cli import main
from fxquant.run_record import size_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(3))


def int8_of(model: nn.Module, fp32: tuple[str, ...] = (), x: Tensor = X) -> QuantGraphModule:
    mapping = {"": get_default_qconfig("x86"), **dict.fromkeys(fp32)}
    prepared = prepare_fx(model, mapping, (x,), bias_correction=False)
    return convert_fx(calibrate(prepared, [x], progress=False))


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


def test_the_same_model_differs_in_nothing(model: nn.Module, tmp_path: Path) -> None:
    int8 = int8_of(model)
    save(int8, tmp_path / "a.fxq")
    record_run(int8).save(tmp_path / "a.json")
    for other in (int8, load(tmp_path / "a.fxq"), tmp_path / "a.fxq", str(tmp_path / "a.json")):
        report = diff(int8, other)
        assert report.changes == ()
        assert report.ops == 6
        assert "0 of 6 ops differ" in str(report)
    assert report.regressions(Gate(min_coverage=1.0, max_size_ratio=1.0)) == ()


def test_a_layer_that_fell_back_is_named(model: nn.Module) -> None:
    report = diff(int8_of(model), int8_of(model, ("b",)))
    changes = {change.name: change for change in report.changes}
    assert {"b", "relu_1"} <= changes.keys()
    assert changes["b"].slower
    assert {"runs", "kernel"} <= set(changes["b"].kinds)
    assert any("runs int8 -> fp32" in text and "no qconfig" in text for text in changes["b"].how)
    assert "head" not in changes or "runs" not in changes["head"].kinds
    macs = {"a": 8 * 8 * 8 * 27 * 2, "b": 6 * 6 * 8 * 72 * 2, "head": 2 * 32}
    expected = 1 - macs["b"] / sum(macs.values())
    assert report.b.coverage == pytest.approx(expected)
    assert report.regressions(Gate(min_coverage=expected - 0.001)) == ()
    (text,) = report.regressions(Gate(min_coverage=expected + 0.001))
    assert "int8 covers" in text
    assert report.a.size is not None
    assert report.b.size is not None
    ratio = report.b.size / report.a.size
    assert ratio > 1.5  # the weights of the largest layer are floats
    assert report.regressions(Gate(max_size_ratio=ratio)) == ()
    assert len(report.regressions(Gate(max_size_ratio=ratio - 0.01))) == 1


def test_integers_that_differ_are_counted(model: nn.Module) -> None:
    int8 = int8_of(model)
    other = int8_of(model)
    with torch.no_grad():
        other.b_weight.flatten()[:5] -= 3
        other.head_bias += 0.5
    report = diff(int8, other)
    changes = {change.name: change for change in report.changes}
    assert changes.keys() == {"b", "head"}
    (weight,) = changes["b"].constants
    assert (weight.name, weight.differing, weight.elements, weight.largest) == (
        "weight", 5, 576, 3.0,
    )  # fmt: skip
    (bias,) = changes["head"].constants
    assert (bias.name, bias.differing, bias.largest) == ("bias", 4, pytest.approx(0.5))
    as_records = diff(record_run(int8), RunRecord.load_text(record_run(other).to_json()))
    assert [c.name for c in as_records.changes] == ["b", "head"]
    assert as_records.changes[0].constants[0].differing is None
    assert "weight differs" in str(as_records)


def test_another_range_shows_as_scale(model: nn.Module) -> None:
    report = diff(int8_of(model), int8_of(model, x=2 * X))
    changes = {change.name: change for change in report.changes}
    assert changes["a"].kinds == ("scale",)
    assert "(x 1.9" in changes["a"].how[0] or "(x 2" in changes["a"].how[0]


def test_ops_of_one_side(model: nn.Module) -> None:
    report = diff(int8_of(model), int8_of(nn.Sequential(nn.Conv2d(3, 8, 3)).eval()))
    kinds = {change.name: change.kinds for change in report.changes}
    assert kinds["b"] == ("only in A",)
    assert kinds["_0"] == ("only in B",)


def test_figures_of_records(model: nn.Module) -> None:
    record = record_run(int8_of(model), accuracy=91.5, latency=2.0)
    worse = replace(record, accuracy=91.0, latency=3.0)
    report = diff(record, worse)
    assert report.regressions(Gate(max_accuracy_drop=0.5, max_latency_ratio=1.5)) == ()
    accuracy, latency = report.regressions(Gate(max_accuracy_drop=0.4, max_latency_ratio=1.4))
    assert "accuracy fell by 0.5 (91.5 to 91)" in accuracy
    assert "latency is 1.5 times A's (2 to 3 ms)" in latency
    assert diff(worse, record).regressions(Gate(max_accuracy_drop=0, max_latency_ratio=1)) == ()
    elsewhere = replace(worse, made_on={**worse.made_on, "machine": "aarch64"})
    assert "different machines" in diff(record, elsewhere).summary
    unknown = replace(record, accuracy=None, latency=None, coverage=None)
    for gate, what in (
        (Gate(max_accuracy_drop=1), "accuracy of B"),
        (Gate(max_latency_ratio=1), "latency of B"),
        (Gate(min_coverage=1), "coverage of B"),
    ):
        with pytest.raises(ConfigError, match=what):
            diff(record, unknown).regressions(gate)


def test_latencies_are_measured_together(model: nn.Module) -> None:
    int8 = int8_of(model)
    report = diff(int8, int8, measure_latency=True, example_inputs=(X,))
    assert report.a.latency is not None
    assert report.b.latency is not None
    assert 0.2 < report.b.latency / report.a.latency < 5
    with pytest.raises(ConfigError, match="of two models only"):
        diff(int8, record_run(int8), measure_latency=True)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_accuracy_drop": -1},
        {"max_accuracy_drop": float("nan")},
        {"min_coverage": 95},
        {"max_size_ratio": 0},
        {"max_latency_ratio": "1.1"},
        {"max_size_ratio": True},
    ],
)
def test_a_gate_that_makes_no_sense(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Gate(**limits)


def test_records_that_cannot_be_read(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text, message in (
        ("{", "no run record"),
        ("[]", "no run record"),
        ('{"ops": []}', "no run record"),
        ('{"format": 99}', "Upgrade"),
    ):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            RunRecord.load(path)
    with pytest.raises(ConfigError, match="accuracy"):
        record_run(int8_of(model), accuracy=float("nan"))
    record = record_run(int8_of(model), accuracy=1, latency=2)
    record.save(path)
    again = RunRecord.load(path)
    assert replace(record, constants={}) == again


def test_size_is_that_of_the_tensors() -> None:
    shared = nn.Linear(4, 4)
    assert size_of(shared) == 4 * (16 + 4)
    assert size_of(nn.Sequential(shared, shared)) == 4 * (16 + 4)


def test_the_report_prints(model: nn.Module) -> None:
    report = diff(int8_of(model), int8_of(model, ("b",)))
    assert max(map(len, report.to_text(100).splitlines()[-8:])) <= 100
    assert "| b " in report.to_markdown()
    plain = json.loads(report.to_json())
    assert [c["name"] for c in plain["changes"]] == [c.name for c in report.changes]
    assert "<table>" in report._repr_html_()


def test_the_command(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, text = (str(tmp_path / name) for name in ("good.fxq", "bad.fxq", "good.json"))
    save(int8_of(model), good)
    save(int8_of(model, ("b",)), bad)
    record_run(int8_of(model), accuracy=90.0).save(text)

    def status(*arguments: str) -> int:
        return main(["diff", *arguments])

    assert status(good, good) == 0
    assert "0 of 6 ops differ" in capsys.readouterr().out
    assert status(good, bad) == 0  # no limit, no regression
    assert status(good, bad, "--min-coverage", "0.9") == 1
    assert "regression: int8 covers" in capsys.readouterr().err
    assert status(good, text, "--max-size-ratio", "1.0") == 0
    assert status(text, text, "--max-accuracy-drop", "0") == 0
    capsys.readouterr()
    assert status(good, bad, "--max-latency-ratio", "1000", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["a"]["latency"] > 0
    assert status(good, bad, "--max-accuracy-drop", "1") == 2
    assert "accuracy of A, which is not known" in capsys.readouterr().err
    assert status(good, str(tmp_path / "none.fxq")) == 2
    assert status(good, str(tmp_path / "none.json")) == 2
    assert status(good, bad, "--min-coverage", "95") == 2
    with pytest.raises(SystemExit) as error:
        status(good, bad, "--min-coverage", "much")
    assert error.value.code == 2
