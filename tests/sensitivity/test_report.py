"""The report: what it prints, writes, reads back and hands out."""

from __future__ import annotations

import csv
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import SmallResNet, batches, made, planted

from fxquant import (
    QConfig,
    analyze_sensitivity,
    calibrate,
    convert_fx,
    convert_to_reference_fx,
    default_weight_observer,
    get_default_qconfig,
    prepare_fx,
)
from fxquant.errors import ArtifactError, ConfigError, MissingDependencyError, UnmatchedRuleError
from fxquant.planner.plan import FrontPoint
from fxquant.planner.problem import Costs
from fxquant.sensitivity.metrics import MetricSums
from fxquant.sensitivity.policy import Policy
from fxquant.sensitivity.report import SensitivityReport

PER_TENSOR = QConfig(
    activation=get_default_qconfig("x86").activation, weight=default_weight_observer
)


@pytest.fixture(scope="module")
def report() -> SensitivityReport:
    """Of a network with per-tensor weights, of which one layer's channels differ 300 times."""
    torch.manual_seed(0)
    return analyze_sensitivity(
        planted(),
        batches(SmallResNet),
        qconfig_mapping={"": PER_TENSOR},
        dtypes=("int8", "bf16"),
        estimates=("first-order",),
        cumulative=True,
        metrics={"answer": lambda model, data: 42.0},
    )


def test_the_table_is_ranked_and_says_why(report: SensitivityReport) -> None:
    text = report.to_text()
    rows = [line for line in text.splitlines() if re.match(r"\d+  ", line)]
    assert rows[0].split()[1] == "tail.0"
    assert "int8 with per-channel weights" in rows[0]
    assert "channel ranges of the weight spread 1:" in rows[0]
    assert report.ranking()[0] == "tail.0"
    damages = [report.damage(name) for name in report.ranking()]
    assert damages == sorted(damages, reverse=True)
    for title in ("rank", "type", "position", "parameters", "MACs", "SQNR", "MSE", "cosine", "KL"):
        assert title in text
    assert "stem.0 (first)" in text
    assert "fc (last)" in text
    assert "all layers in int8: SQNR" in text
    assert "what each choice costs" in text
    assert "first and last in FP32" in text
    assert max(map(len, report.to_text(120).splitlines())) <= 120
    assert "Left out at this width" in report.to_text(120)


def test_the_cure_was_tested_and_holds(report: SensitivityReport) -> None:
    result = report["tail.0"]
    before = result.measurements["int8"].output.sqnr
    after = result.cures["per-channel"].output.sqnr
    assert after > before + 6
    assert f"{before:.1f} -> {after:.1f} dB" in str(report.to_markdown())
    # the mapping that is handed out, through prepare and convert, makes the network better
    model, data = planted(), batches(SmallResNet)
    noises = {}
    for name, mapping in (("", {"": PER_TENSOR}), ("cured", report.qconfig_mapping())):
        prepared = prepare_fx(model, mapping, (data[0],))
        calibrate(prepared, data)
        reference = convert_to_reference_fx(prepared)
        sums = MetricSums()
        with torch.no_grad():
            for x in data:
                sums.add(model(x), reference(x))
        noises[name] = sums.result().sqnr
        with torch.no_grad():
            assert torch.isfinite(convert_fx(prepared)(data[0])).all()
    choice = next(c for c in report.choices if "verdicts" in c.name)
    assert choice.measurement is not None
    assert choice.measurement.output.sqnr == pytest.approx(noises["cured"], abs=1e-2)
    assert report.baseline["int8"].output.sqnr == pytest.approx(noises[""], abs=1e-2)
    assert noises["cured"] > noises[""]


def test_choices_have_latencies_and_shares(report: SensitivityReport) -> None:
    names = [choice.name for choice in report.choices]
    assert names[0] == "FP32"
    assert "everything in int8" in names
    assert names[-1] == "everything in int8, equalized, relu6='relu'"  # the kernels of int8
    assert all(c.milliseconds for c in report.choices if "equalized" not in c.name)
    ends = next(c for c in report.choices if c.name.startswith("first and last"))
    assert ends.fp32_layers == ("stem.0", "fc")
    macs = {r.name: r.layer.macs or 0 for r in report.results}
    kept = macs["stem.0"] + macs["fc"]
    assert ends.int8_macs == pytest.approx(1 - kept / sum(macs.values()))


def test_the_dict_and_the_code_say_what_the_mapping_says(report: SensitivityReport) -> None:
    policy = Policy(keep_fp32=("block1.conv2", "fc"), keep_first_last_fp32=False)
    mapping = report.qconfig_mapping(policy)
    data = batches(SmallResNet)
    given = report.qconfig_dict(policy)
    assert set(given) <= {"", "object_type", "module_name", "module_name_object_type_order"}
    code = report.qconfig_code(policy)
    space: dict[str, Any] = {}
    exec(code, space)  # what a user does who pastes it
    assert space["qconfig_dict"] == given
    outputs = []
    for form in (mapping, given, space["qconfig_dict"]):
        prepared = prepare_fx(planted(), form, (data[0],))
        calibrate(prepared, data)
        with torch.no_grad():
            outputs.append(convert_to_reference_fx(prepared)(data[0]))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_json_gives_the_same_report(report: SensitivityReport, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report.to_json(file)
    for source in (file, str(file), file.read_text()):
        read = SensitivityReport.from_json(source)
        assert read.results == report.results
        assert read.to_text() == report.to_text()
        assert read.qconfig_mapping() == report.qconfig_mapping()
        assert read.qconfig_dict(top_k=3) == report.qconfig_dict(top_k=3)
    with pytest.raises(ArtifactError, match="no sensitivity report"):
        SensitivityReport.from_json("{}")
    with pytest.raises(ArtifactError, match="format 99"):
        SensitivityReport.from_json('{"format": 99}')


def test_observers_without_names_are_written_without_a_mapping() -> None:
    local = QConfig(activation=lambda: PER_TENSOR.activation(), weight=default_weight_observer)
    made_here = analyze_sensitivity(
        made(SmallResNet),
        batches(SmallResNet),
        qconfig_mapping={"": local},
        attribution=None,
        cures=False,
        costs=False,
    )
    assert made_here.qconfig_mapping().global_qconfig == local
    read = SensitivityReport.from_json(made_here.to_json())
    assert read.results == made_here.results
    with pytest.raises(ConfigError, match="lambda"):
        read.qconfig_mapping()
    with pytest.raises(ConfigError, match="cannot be written as code"):
        made_here.qconfig_code()


def test_csv_and_records_have_a_row_for_each_layer(report: SensitivityReport) -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["layer"] for row in rows] == list(report.ranking())
    assert rows[0]["rank"] == "1"
    first = report[rows[0]["layer"]]
    assert float(rows[0]["sqnr"]) == first.measurements["int8"].output.sqnr
    assert float(rows[0]["bf16_sqnr"]) == first.measurements["bf16"].output.sqnr
    assert float(rows[0]["answer"]) == 42.0
    assert float(rows[0]["weight_sqnr"]) == first.parts["weight"].sqnr
    assert float(rows[0]["estimate_first-order"]) == first.estimates["first-order"]


def test_a_dataframe_where_pandas_is_there(
    report: SensitivityReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Frame:
        def __init__(self, records: list[dict[str, Any]]) -> None:
            self.records = records

    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=Frame))
    frame: Any = report.to_dataframe()
    assert frame.records == report.records()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="dataframe"):
        report.to_dataframe()


def test_a_figure_where_matplotlib_is_there(
    report: SensitivityReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="plot"):
        report.plot()


def test_the_figure_draws_every_layer(report: SensitivityReport) -> None:
    pytest.importorskip("matplotlib")
    figure = report.plot(metric="mse")
    bars, steps, choices = figure.axes
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == [report.damage(r.name, "mse") for r in report.results]
    assert len(steps.lines[0].get_xdata()) == len(report.results)
    timed = [c for c in report.choices if c.measurement and c.milliseconds]
    assert len(choices.collections) == len(timed) > 1


class Page(HTMLParser):
    """Counts tags and collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_is_self_contained(report: SensitivityReport, tmp_path: Path) -> None:
    front = [
        FrontPoint(layers={}, predicted=Costs(latency=1e-3 * ms, damage=noise))
        for ms, noise in ((1, 0.1), (2, 0.01), (3, 0.001))
    ]
    plan: Any = SimpleNamespace(front=front, predicted={"int8": front[0].predicted})
    file = tmp_path / "report.html"
    text = report.to_html(file, plan=plan)
    assert file.read_text(encoding="utf-8") == text
    page = Page()
    page.feed(text)
    assert page.links == []
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "@import" not in text
    # one bar per layer and metric, one histogram for each weight and input, and its two clip lines
    with_weight = sum(r.ranges.weight is not None for r in report.results)
    with_input = sum(r.ranges.input is not None for r in report.results)
    assert with_weight == with_input == len(report.results)
    assert text.count('class="clip"') == 2 * (with_weight + with_input)
    assert page.count["line"] == 2 * (with_weight + with_input)
    assert text.count('class="front"') == 1
    assert "<title>int8: 1, 10</title>" in text  # ms, and dB of a tenth
    assert "addEventListener('click'" in text
    assert "Pareto front" not in report.to_html()
    with pytest.raises(ConfigError, match="plan_mixed_precision"):
        report.to_html(plan=object())


def test_histograms_hold_all_weights_and_the_clip_range(report: SensitivityReport) -> None:
    ranges = report["tail.0"].ranges
    assert ranges.weight is not None
    assert sum(ranges.weight.counts) == 8 * 9
    assert ranges.per_tensor
    assert ranges.channel_spread is not None
    assert ranges.channel_spread > 100
    assert ranges.starved_channels == 7
    assert ranges.weight.low == pytest.approx(-ranges.weight.high * 128 / 127, rel=1e-5)
    assert ranges.input is not None
    seen = sum(x.numel() for x in batches(SmallResNet)) // 3 * 8 // 4
    assert sum(ranges.input.counts) == pytest.approx(seen, rel=0.01)


def test_the_notebook_form_escapes_and_has_every_table(report: SensitivityReport) -> None:
    page = Page()
    page.feed(report._repr_html_())
    assert page.count["table"] == 3
    assert page.count["tr"] >= len(report.results) + 1


def test_two_reports_differ_layer_by_layer(report: SensitivityReport) -> None:
    same = report.diff(report)
    assert not same.changed
    other = analyze_sensitivity(
        planted(),
        batches(SmallResNet),
        attribution=None,
        cures=False,
        costs=False,
    )
    diff = report.diff(other)
    changed = {row.layer: row for row in diff.changed}
    assert "tail.0" in changed
    row = changed["tail.0"]
    assert row.verdict == ("int8 with per-channel weights", "int8")
    assert row.rank[0] == 1
    assert row.sqnr[0] == report["tail.0"].measurements["int8"].output.sqnr
    assert f"{len(diff.changed)} with another verdict" in str(diff)
    assert "->" in diff.to_markdown()
    assert '"layer": "tail.0"' in diff.to_json()


def test_what_the_report_does_not_have_is_refused(report: SensitivityReport) -> None:
    with pytest.raises(UnmatchedRuleError, match=r"did you mean 'tail\.0'"):
        report["tail0"]
    with pytest.raises(UnmatchedRuleError, match="no layer 'stem'"):
        report.qconfig_mapping(keep_fp32=("stem",))
    with pytest.raises(ConfigError, match="no such option"):
        report.qconfig_mapping(topk=3)
