"""analyze_sensitivity: its numbers against models converted one by one, and its options."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Attention, Gates, Recurrent, SmallResNet, batches, made
from torch import Tensor, nn

from fxquant import (
    HistogramObserver,
    PercentileRule,
    QConfig,
    analyze_sensitivity,
    calibrate,
    convert_to_reference_fx,
    default_dynamic_qconfig,
    default_per_channel_weight_observer,
    default_weight_observer,
    equalize,
    fuse_fx,
    get_default_qconfig,
    prepare_fx,
)
from fxquant.errors import (
    ArtifactError,
    CalibrationWarning,
    ConfigError,
    MissingExampleInputsError,
)
from fxquant.sensitivity import sweep as sweep_module
from fxquant.sensitivity.report import SensitivityReport

QCONFIG = get_default_qconfig("x86")
PER_TENSOR = QConfig(activation=QCONFIG.activation, weight=default_weight_observer)
FAST: dict[str, Any] = {"attribution": None, "cures": False, "costs": False}


def analyzed(kind: type[nn.Module] = SmallResNet, **options: Any) -> SensitivityReport:
    options = {"qconfig_mapping": {"": QCONFIG}, **FAST, **options}
    return analyze_sensitivity(made(kind), batches(kind), **options)


@pytest.fixture(scope="module")
def whole() -> SensitivityReport:
    """All layers, one at a time."""
    return analyzed()


def one_by_one(mapping: dict[str, Any], kind: type[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the float model, batch-norms folded, and of the one that ``mapping`` gives."""
    model, data = made(kind), batches(kind)
    prepared = prepare_fx(model, mapping, (data[0],))
    calibrate(prepared, data)
    reference = convert_to_reference_fx(prepared)
    floats = fuse_fx(model)
    with torch.no_grad():
        return [floats(x) for x in data], [reference(x) for x in data]


def sqnr(expected: list[Tensor], found: list[Tensor]) -> float:
    y, z = torch.cat(expected).double(), torch.cat(found).double()
    return 10 * math.log10(y.square().sum() / (y - z).square().sum())


def test_one_at_a_time_is_what_a_plain_loop_measures(whole: SensitivityReport) -> None:
    report = whole
    assert report.complete
    assert report.inputs == 12
    # layers that are whole modules, so that a plain mapping names them
    for name in ("stem.0", "tail.0", "fc"):
        expected = sqnr(*one_by_one({"": None, name: QCONFIG}, SmallResNet))
        assert report[name].measurements["int8"].output.sqnr == pytest.approx(expected, abs=1e-6)
        assert report.damage(name) == -report[name].measurements["int8"].output.sqnr


def test_all_but_one_is_what_a_plain_loop_measures() -> None:
    report = analyzed(direction="all_but_one")
    whole = sqnr(*one_by_one({"": QCONFIG}, SmallResNet))
    assert report.baseline["int8"].output.sqnr == pytest.approx(whole, abs=1e-6)
    for name in ("block1.conv1", "fc"):
        mapping = report.configuration.mapping(
            report.decisions(keep_fp32=(name,), keep_int8=others(report, name))
        )
        without = sqnr(*one_by_one(mapping, SmallResNet))
        assert report[name].measurements["int8"].output.sqnr == pytest.approx(without, abs=1e-6)
        assert report.damage(name) == pytest.approx(without - whole, abs=1e-6)


def others(report: SensitivityReport, name: str) -> tuple[str, ...]:
    return tuple(result.name for result in report.results if result.name != name)


def test_cumulative_ends_with_everything_lowered() -> None:
    report = analyzed(cumulative=True)
    assert [step.name for step in report.cumulative] == list(reversed(report.ranking()))
    shares = [step.int8_macs for step in report.cumulative]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    noises = [step.measurement.output.noise for step in report.cumulative]
    first = report[report.cumulative[0].name].measurements["int8"].output
    assert report.cumulative[0].measurement.output == first
    assert noises[-1] > noises[0]


def test_blocks_and_patterns_lower_their_layers_together() -> None:
    blocks = analyzed(granularity="block")
    assert [r.name for r in blocks.results] == [
        "stem.0",
        "block1",
        "block2",
        "tail.0",
        "tail.2",
        "fc",
    ]
    block = blocks["block1"]
    assert block.layer.members == ("block1.conv1", "block1.conv2")
    expected = sqnr(*one_by_one({"": None, "block1": QCONFIG}, SmallResNet))
    assert block.measurements["int8"].output.sqnr == pytest.approx(expected, abs=1e-6)
    patterns = analyzed(granularity="pattern")
    names = [r.name for r in patterns.results]
    assert "depthwise conv2d: conv2d-relu6" in names
    assert patterns["conv2d: conv2d-add-relu"].layer.members == ("block1.conv2", "block2.conv2")


def test_dtypes_and_candidates_share_one_calibration() -> None:
    percentile = QConfig(
        activation=HistogramObserver.with_args(dtype=torch.uint8, rule=PercentileRule(0.99)),
        weight=default_per_channel_weight_observer,
    )
    report = analyzed(dtypes=("int8", "bf16", "p99"), candidates={"p99": percentile})
    for result in report.results:
        assert set(result.measurements) == {"int8", "bf16", "p99"}
    expected = sqnr(*one_by_one({"": None, "fc": percentile}, SmallResNet))
    assert report["fc"].measurements["p99"].output.sqnr == pytest.approx(expected, abs=1e-6)
    assert "bf16 SQNR" in report.to_text()


def test_functions_of_the_user_rank_and_are_reported() -> None:
    seen: list[int] = []

    def closeness(model: nn.Module, data: Any) -> float:
        seen.append(len(data))
        with torch.no_grad():
            return -float(torch.stack([model(x).abs().mean() for x in data]).mean())

    report = analyzed(metric=closeness, metrics={"zero": lambda model, data: 0.0})
    assert report.metric == "closeness"
    assert set(seen) == {3}
    model, data = made(SmallResNet), batches(SmallResNet)
    assert report.float_user["closeness"] == pytest.approx(closeness(model, data), abs=1e-5)
    worst = report[report.ranking()[0]].measurements["int8"].user["closeness"]
    assert worst == min(r.measurements["int8"].user["closeness"] for r in report.results)
    assert all(report.damage(r.name, "zero") == 0 for r in report.results)
    named = analyzed(metric="zero", metrics={"zero": lambda model, data: 0.0})
    assert named.metric == "zero"


def test_parts_say_where_the_error_comes_from() -> None:
    report = analyzed(qconfig_mapping={"": PER_TENSOR}, attribution="model")
    result = report["tail.0"]
    assert (
        set(result.parts) == set(result.model_parts) == {"weight", "input", "output", "activation"}
    )
    parts = {name: metrics.noise for name, metrics in result.parts.items()}
    assert parts["activation"] >= max(parts["input"], parts["output"]) * 0.5
    # noises of a layer's weight and input are nearly uncorrelated: they add up to the layer's
    whole = result.measurements["int8"].layer
    assert whole is not None
    assert parts["weight"] + parts["input"] == pytest.approx(whole.noise, rel=0.3)
    assert "weight" in report.to_markdown()


def test_what_convert_would_not_lower_alone_is_rounded_around() -> None:
    report = analyzed(Attention, attribution="layer", estimates=["first-order"], probes=32)
    kinds = {result.layer.kind for result in report.results}
    assert "matmul" in kinds
    for result in report.results:
        measured = result.measurements["int8"]
        assert measured.layer is not None
        assert math.isfinite(measured.output.sqnr), result.name
        assert math.isfinite(measured.layer.sqnr), result.name
        assert set(result.parts) >= {"input", "output"}
    matmul = next(r for r in report.results if r.layer.kind == "matmul")
    parts = {name: m.noise for name, m in matmul.parts.items()}
    whole = matmul.measurements["int8"].layer
    assert whole is not None
    assert whole.noise == pytest.approx(parts["activation"])
    # 12 inputs, 32 probes: a standard error of sqrt(2 / 384), and the network is not linear
    truth = matmul.measurements["int8"].output.mse
    assert matmul.estimates["first-order"] == pytest.approx(truth, rel=0.5)


def test_a_precision_that_a_layer_cannot_have_says_so() -> None:
    report = analyzed(
        Recurrent,
        dtypes=("int8", "dynamic"),
        candidates={"dynamic": default_dynamic_qconfig},
        attribution="layer",
    )
    found = report["lstm"].measurements
    assert found["int8"].output.sqnr == math.inf
    assert 20 < found["dynamic"].output.sqnr < math.inf
    record = next(r for r in report.records() if r["layer"] == "lstm")
    assert record["reason"] == "int8 rounds nothing here"
    assert report.ranking()[0] == "fc"


# -- estimates ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Linear layers and nothing else: the first order is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def test_the_first_order_is_the_truth_of_a_linear_network() -> None:
    torch.manual_seed(3)
    model, data = Chain().eval(), [torch.randn(50, 6) for _ in range(2)]
    options = {"qconfig_mapping": {"": PER_TENSOR}, **FAST, "estimates": ["first-order"]}
    report = analyze_sensitivity(model, data, probes=64, **options)
    for result in report.results:
        # 100 inputs times 64 probes of a squared normal: a standard error of sqrt(2 / 6400)
        truth = result.measurements["int8"].output.mse
        assert result.estimates["first-order"] == pytest.approx(truth, rel=5 * math.sqrt(2 / 6400))
    assert report.rank_correlation("first-order") == pytest.approx(1)


def test_the_hessian_is_the_trace_of_the_definition() -> None:
    torch.manual_seed(3)
    model, data = Chain().eval(), [torch.randn(40, 6)]
    options = {"qconfig_mapping": {"": PER_TENSOR}, **FAST}
    report = analyze_sensitivity(model, data, mode="hessian", probes=400, **options)
    assert report.metric == "hessian"
    assert not report.baseline
    model.requires_grad_(False)
    weight, x = model.b.weight, model.a(data[0])
    # H of b's weight: J J^T, J[k, (i, j)] = c[k, i] x[j]; its trace: |c|^2 |x|^2
    mean_trace = model.c.weight.square().sum() * x.square().sum(1).mean() / weight.numel()
    step = weight.abs().max() / 127.5
    error = (torch.round(weight / step) * step - weight).square().sum()
    # H of b's input: W^T c^T c W, and every value of it is rounded alike
    inside = (model.c.weight @ weight).square().sum()
    assert report["b"].estimates["hessian"] > float(mean_trace * error) * 0.9
    calibrated = report["b"].ranges.input
    assert calibrated is not None
    scale = (calibrated.high - calibrated.low) / 255
    expected = float(mean_trace * error) + float(inside) * scale**2 / 12
    assert report["b"].estimates["hessian"] == pytest.approx(expected, rel=0.15)


def test_estimates_repeat_by_their_seed() -> None:
    runs = [
        analyzed(Gates, mode="first-order", estimates=["hessian"], probes=2, seed=seed)
        for seed in (1, 1, 2)
    ]
    values = [{r.name: dict(r.estimates) for r in run.results} for run in runs]
    assert values[0] == values[1] != values[2]
    with pytest.raises(ConfigError, match="rank correlation"):
        runs[0].rank_correlation("first-order", "sqnr")


# -- going on after an interruption ---------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, **options: Any) -> SensitivityReport:
    measure = sweep_module.Sweep.measure
    calls = 0

    def counted(self: sweep_module.Sweep, group: Any) -> Any:
        nonlocal calls
        if calls == after:
            raise KeyboardInterrupt
        calls += 1
        return measure(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(sweep_module.Sweep, "measure", counted)
        return analyzed(**options)


def test_an_interruption_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, whole: SensitivityReport
) -> None:
    part = interrupted(monkeypatch, 3)
    assert not part.complete
    assert part.results == whole.results[:3]
    assert "interrupted" in str(part)
    assert part.qconfig_mapping() is not None


def test_a_resumed_sweep_measures_only_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: SensitivityReport
) -> None:
    file = tmp_path / "sweep.json"
    assert not interrupted(monkeypatch, 5, resume=file).complete
    assert len(json.loads(file.read_text())["results"]) == 5
    left = len(whole.results) - 5
    # not one layer more than is missing may be measured
    resumed = interrupted(monkeypatch, left, resume=file)
    assert resumed.complete
    assert resumed.results == whole.results
    again = interrupted(monkeypatch, 0, resume=file)
    assert again.results == whole.results


@pytest.mark.parametrize("change", ["model", "data", "options", "nothing like it"])
def test_a_file_of_something_else_is_refused(change: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    analyzed(Gates, resume=file)
    model, data = made(Gates), batches(Gates)
    options: dict[str, Any] = {"qconfig_mapping": {"": QCONFIG}, **FAST}
    if change == "model":
        with torch.no_grad():
            model.a.weight[0, 0] += 1e-3
    elif change == "data":
        data[1][0, 0] += 1e-3
    elif change == "options":
        options["qconfig_mapping"] = {"": PER_TENSOR}
    else:
        file.write_text("{}")
    with pytest.raises(ArtifactError, match=r"sweep\.json (belongs to another|is no file)"):
        analyze_sensitivity(model, data, resume=file, **options)


# -- memory, determinism, refusals ----------------------------------------------------------------


def test_a_small_budget_gives_the_same_numbers(tmp_path: Path, whole: SensitivityReport) -> None:
    for options in ({"memory_budget": 0}, {"memory_budget": 5000, "spill_directory": tmp_path}):
        assert analyzed(**options).results == whole.results
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was() -> None:
    model = made(SmallResNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    analyze_sensitivity(model, batches(SmallResNet, 1), estimates=["hessian"], probes=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "both"}, "direction='both'"),
        ({"granularity": "layers"}, "granularity='layers'; did you mean 'layer'"),
        ({"metric": "snr"}, "metric='snr'; did you mean 'sqnr'"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"estimates": ["hesian"]}, "estimates='hesian'; did you mean 'hessian'"),
        ({"attribution": "none"}, "attribution='none'"),
        ({"dtypes": ["int4"]}, "dtypes='int4'"),
        ({"dtypes": []}, "dtypes is empty"),
        ({"candidates": {"int8": QCONFIG}}, "has its meaning already"),
        ({"candidates": {"percentile": QCONFIG}}, "has its meaning already"),
        ({"metrics": {"kl": lambda model, data: 0.0}}, "always there"),
        ({"mode": "hessian", "direction": "all_but_one"}, "direction='one'"),
        ({"distributed": True}, "torchrun"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        analyzed(Gates, **options)


def test_without_data_the_ends_stay_in_fp32_as_a_prior() -> None:
    model = made(SmallResNet)
    with pytest.raises(MissingExampleInputsError, match="example_inputs"):
        analyze_sensitivity(model, None)
    with pytest.warns(CalibrationWarning, match="nothing was measured"):
        report = analyze_sensitivity(model, None, example_inputs=torch.randn(1, 3, 16, 16))
    decisions = report.decisions()
    kept = [name for name, d in decisions.items() if d.precision == "fp32"]
    assert kept == ["stem.0", "fc"]
    assert "not measured" in str(report)
    everything = report.decisions(keep_first_last_fp32=False)
    assert all(d.precision == "int8" for d in everything.values())
    assert report.qconfig_mapping().module_name_qconfigs["fc"] is None


class Unlike(nn.Module):
    """Two convolutions between which a channel is 100 times the others; it may be clamped."""

    def __init__(self, *, clamped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.between = nn.ReLU6() if clamped else nn.ReLU()
        with torch.no_grad():
            self.a.weight[0] *= 100
            self.a.bias[0] *= 100
            self.b.weight[:, 0] /= 100

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.between(self.a(x)))
        return y.flatten(1)


@pytest.mark.parametrize("clamped", [False, True])
def test_equalization_is_tried_where_one_scale_serves_unlike_channels(*, clamped: bool) -> None:
    model = Unlike(clamped=clamped).eval()
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mapping = {"": PER_TENSOR}
    report = analyze_sensitivity(model, data, qconfig_mapping=mapping, attribution=None)
    found = {c.name: c.measurement for c in report.choices if c.measurement is not None}
    ways = {"everything in int8, equalized": "keep"}
    if clamped:
        ways["everything in int8, equalized, relu6='relu'"] = "relu"
    assert [name for name in found if "equalized" in name] == list(ways)
    for name, relu6 in ways.items():
        equal = equalize(model, (data[0],), relu6=relu6)
        reference = convert_to_reference_fx(
            calibrate(prepare_fx(equal, mapping, (data[0],)), data, progress=False)
        )
        with torch.no_grad():
            expected = sqnr([model(x) for x in data], [reference(x) for x in data])
        assert found[name].output.sqnr == pytest.approx(expected, abs=1e-4)
    gained = (
        found["everything in int8, equalized"].output.sqnr - report.baseline["int8"].output.sqnr
    )
    assert abs(gained) < 0.1 if clamped else gained > 6
    options: dict[str, Any] = {"cures": False, "attribution": None}
    none = analyze_sensitivity(model, data, qconfig_mapping=mapping, **options)
    assert not any("equalized" in choice.name for choice in none.choices)
    again = SensitivityReport.from_json(report.to_json())
    assert again.choices == report.choices
