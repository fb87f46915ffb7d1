"""compare: every figure equals its definition, and a planted fault is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from fxquant import (
    CalibrationError,
    ConfigError,
    NotAGraphModuleError,
    QConfig,
    QuantGraphModule,
    TrainingModeError,
    UnmatchedRuleError,
    bfloat16_static_qconfig,
    calibrate,
    compare,
    convert_fx,
    convert_to_reference_fx,
    default_dynamic_qconfig,
    default_qconfig,
    fuse_fx,
    get_default_qconfig,
    prepare_fx,
    quantize_dynamic,
)
from fxquant import compat as fxcompat
from fxquant.comparison.report import CompareReport, Fault, fault_of
from fxquant.observers import MinMaxObserver, default_weight_observer
from fxquant.specs import QParams, QuantSpec, fake_quantize

MINMAX = QConfig(
    activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=default_weight_observer
)


class Chain(nn.Module):
    """conv, relu in place, conv, mean over the image, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.relu = nn.ReLU(inplace=True)
        self.b = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.relu(self.a(x))).relu_()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def prepared_of(model: nn.Module, x: Tensor, qconfig: QConfig | None = None) -> QuantGraphModule:
    mapping = None if qconfig is None else {"": qconfig}
    prepared = prepare_fx(model, mapping, (x,), bias_correction=False)
    return calibrate(prepared, [x], progress=False)


def sqnr(exact: Tensor, found: Tensor) -> float:
    exact, found = exact.double(), found.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - found).square().sum()))


def median_sqnr(exact: Tensor, found: Tensor) -> float:
    """Of the channels of images, the one in the middle (the better one of two)."""
    pairs = zip(exact.unbind(1), found.unbind(1), strict=True)
    return sorted((sqnr(a, b) for a, b in pairs), reverse=True)[(exact.shape[1] - 1) // 2]


def rounded(x: Tensor, gm: QuantGraphModule, name: str) -> Tensor:
    """``x`` on the grid of the scale buffers called ``name``."""
    spec = QuantSpec(dtype=torch.uint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=255)
    scale, zero_point = getattr(gm, f"{name}_scale"), getattr(gm, f"{name}_zero_point")
    return fake_quantize(x, QParams(scale, zero_point, spec))


def weight_of(gm: QuantGraphModule, name: str) -> Tensor:
    integers, scale = getattr(gm, f"{name}_weight"), getattr(gm, f"{name}_weight_scale")
    return integers.float() * scale.reshape(-1, *[1] * (integers.dim() - 1))


def test_figures_equal_their_definition() -> None:
    model, x = Chain().eval(), torch.randn(4, 3, 12, 12)
    reference = convert_to_reference_fx(prepared_of(model, x))
    report = compare(model, reference, [x])
    with torch.no_grad():
        first = model.a(x).relu()
        second = model.b(first).relu()
        x_q = rounded(x, reference, "x")
        a_q = rounded(
            nn.functional.conv2d(x_q, weight_of(reference, "a"), reference.a_bias).relu(),
            reference,
            "relu",
        )

        def b_of(value: Tensor) -> Tensor:
            made = nn.functional.conv2d(value, weight_of(reference, "b"), reference.b_bias)
            return made.relu()  # the kernel writes floats: the mean over them runs in FP32

        expected = {
            ("x", "sqnr"): sqnr(x, x_q),
            ("x", "own"): sqnr(x, x_q),
            ("relu", "sqnr"): sqnr(first, a_q),
            ("relu", "own"): sqnr(first, a_q),
            ("relu", "rounding"): sqnr(first, rounded(first, reference, "relu")),
            ("relu", "channel_sqnr"): median_sqnr(first, a_q),
            ("relu_", "sqnr"): sqnr(second, b_of(a_q)),
            ("relu_", "own"): sqnr(second, b_of(rounded(first, reference, "relu"))),
            ("relu_", "channel_sqnr"): median_sqnr(second, b_of(a_q)),
            ("relu_", "growth"): max(0, median_sqnr(first, a_q) - median_sqnr(second, b_of(a_q))),
        }
        found = {(name, figure): getattr(report.row(name), figure) for name, figure in expected}
        assert found == pytest.approx(expected, abs=1e-3)
        assert report.output_sqnr == pytest.approx(sqnr(model(x), reference(x)), abs=1e-4)
        assert report.row("head").sqnr == pytest.approx(report.output_sqnr, abs=1e-4)


def test_batches_add_up() -> None:
    model, x = Chain().eval(), torch.randn(6, 3, 12, 12)
    int8 = convert_fx(prepared_of(model, x))
    whole, parts = compare(model, int8, [x]), compare(model, int8, [x[:2], x[2:]])
    assert parts.batches == 2
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert (a.sqnr, a.own, a.at_min) == pytest.approx((b.sqnr, b.own, b.at_min), abs=1e-6)
    assert compare(model, int8, [x[:2], x[2:]], num_batches=1).batches == 1


def test_lowered_prepared_and_reference_say_the_same() -> None:
    model, x = Chain().eval(), torch.randn(4, 3, 12, 12)
    prepared = prepared_of(model, x)
    lowered = compare(model, convert_fx(prepared), [x])
    for other in (convert_to_reference_fx(prepared), prepared):
        for row in compare(fuse_fx(model, example_inputs=(x,)), other, [x]).rows:
            if row.op != "quantize" or row.name == "x":
                of_kernel = [r for r in lowered.rows if (r.name, r.op) == (row.name, row.op)]
                assert of_kernel[-1].fault is row.fault or row.name == "mean"
    same = [row.name for row in lowered.rows if row.op != "quantize"]
    assert same == ["relu", "relu_", "mean", "head"]
    assert {row.runs for row in lowered.rows if row.name in ("relu", "relu_", "head")} == {"int8"}


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
        with torch.no_grad():
            # The third layer's output is divided by what the fourth multiplies with.
            factor = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
            self.layers[2].weight *= factor.reshape(-1, 1, 1, 1)
            self.layers[2].bias *= factor
            self.layers[3].weight /= factor.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_a_planted_fault_is_named() -> None:
    model, x = Fragile().eval(), torch.randn(8, 8, 6, 6)
    report = compare(model, convert_fx(prepared_of(model, x, default_qconfig)), [x])
    clean = [report.row(name) for name in ("relu", "relu_1")]
    assert min(row.channel_sqnr for row in clean) > 25
    # Seven channels of layer 2 have a hundredth of the range: too few integers, in its weight and
    # in its output, which the last layer weighs like the others. Its own SQNR hides them.
    broken = report.row("relu_2")
    assert broken.starved == (7, 8)
    assert broken.outliers[0][0] == 0
    assert broken.sqnr > 25
    assert broken.channel_sqnr < 15
    assert broken.fault is Fault.BORN
    assert report.born(1) == (broken,)
    assert report.row("layers.2") is broken
    last = report.row("relu_3")
    assert last.fault is Fault.CARRIED
    assert report.first_below(last.sqnr + 0.1) is last
    assert report.first_below(5) is None
    per_channel = compare(model, convert_fx(prepared_of(model, x, get_default_qconfig())), [x])
    assert per_channel.row("relu_2").starved == (0, 8)


class Cancelling(nn.Module):
    """Channels that are nearly equal, and then their differences."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1)
        self.b = nn.Conv2d(4, 3, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.randn(1, 4, 1, 1) + 0.2 * torch.randn(4, 4, 1, 1))
            self.b.weight.copy_((torch.eye(4)[:3] - torch.eye(4)[1:])[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_growth_is_told_from_birth() -> None:
    assert fault_of(0.1, 0.06, [0.01], [0.001]) is Fault.BORN
    assert fault_of(0.1, 0.01, [0.01], [0.001]) is Fault.GROWS
    assert fault_of(0.1, 0.01, [0.08], [0.001]) is Fault.CARRIED
    assert fault_of(0.1, 0.1, [0.1], [0.1]) is Fault.CARRIED  # it only moves what it reads
    assert fault_of(0.0, 0.0, [0.0], [0.0]) is Fault.NONE
    # Weights of 4 bits make the error in the first layer; the difference of nearly equal channels
    # makes it large.
    model, x = Cancelling().eval(), torch.randn(2, 4, 16, 16)
    coarse = MinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-7, quant_max=7
    )
    bad = QConfig(activation=MINMAX.activation, weight=coarse)
    prepared = prepare_fx(model, {"": get_default_qconfig(), "a": bad}, (x,), bias_correction=False)
    report = compare(model, convert_fx(calibrate(prepared, [x], progress=False)), [x])
    assert report.row("a").fault is Fault.BORN
    last = report.row("b")
    assert last.fault is Fault.GROWS
    assert last.growth == pytest.approx(report.row("a").channel_sqnr - last.channel_sqnr)
    assert last.growth > 6
    assert report.grows() == (last,)


def test_saturation_and_dead_range_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(4, 3, 8, 8)
    int8 = convert_fx(prepared_of(model, x, MINMAX))
    scale, zero_point = int8.input_1_scale, int(int8.input_1_zero_point)
    wide = compare(model, int8, [3 * x]).rows[0]
    exact = 3 * x / scale + zero_point
    integers = exact.round().clamp(0, 255)
    assert wide.clipped == pytest.approx(float(((exact < -0.5) | (exact > 255.5)).float().mean()))
    assert wide.clipped > 0.2
    assert wide.at_min == pytest.approx(float((integers == 0).float().mean()))
    assert wide.at_max == pytest.approx(float((integers == 255).float().mean()))
    narrow = compare(model, int8, [x / 4]).rows[0]
    seen = (x / 4 / scale + zero_point).round()
    assert narrow.unused == pytest.approx(1 - float(seen.max() - seen.min() + 1) / 256)
    assert narrow.unused > 0.7
    assert narrow.clipped == 0


def test_outlier_channels() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(4, 6, 8, 8)
    x[:, 2] *= 50
    int8 = convert_fx(prepared_of(model, x))
    peaks = x.abs().amax((0, 2, 3))
    row = compare(model, int8, [x[:2], x[2:]]).rows[0]
    assert row.outliers == ((2, pytest.approx(float(peaks[2] / peaks.median()))),)
    assert compare(model, int8, [x], outlier_factor=1e4).rows[0].outliers == ()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.stem(x)))
        z = torch.cat([self.act(self.body(y) + y), y], 1)
        return nn.functional.max_pool2d(z, 2)


def test_kernels_that_overwrite_what_they_read() -> None:
    model, x = Residual().eval(), torch.randn(4, 3, 12, 12).contiguous()
    prepared = prepared_of(model, x)
    reference = compare(model, convert_to_reference_fx(prepared), [x])
    lowered = compare(model, convert_fx(prepared), [x])
    for row in reference.rows:
        kernel = lowered.row(row.name)
        assert (kernel.sqnr, kernel.own) == pytest.approx((row.sqnr, row.own), abs=0.2)
    assert {"act", "act_1", "cat", "max_pool2d"} <= {row.name for row in lowered.rows}


class Shuffled(nn.Module):
    """Pieces, a channel shuffle, and an identity, which become other ops in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = nn.functional.dropout(self.a(x), training=False).chunk(2, dim=1)
        y = torch.cat([first, self.b(second).relu()], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def test_ops_that_become_others() -> None:
    model, x = Shuffled().eval(), torch.randn(2, 4, 6, 6)
    prepared = prepared_of(model, x)
    for other in (convert_fx(prepared), prepared):
        report = compare(model, other, [x])
        assert [row.note for row in report.rows] == [""] * len(report.rows)
        assert {"getitem", "getitem_1", "cat", "relu"} <= {row.name for row in report.rows}
        assert all(row.sqnr > 25 for row in report.rows)


def test_what_is_not_static_int8() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 16, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.lstm(x)[0])
            return out

    model, x = Tagger().eval(), torch.randn(2, 5, 8)
    report = compare(model, quantize_dynamic(model, example_inputs=(x,)), [x])
    assert [(row.name, row.op, row.runs) for row in report.rows] == [
        ("lstm", "LSTM", "int8"),
        ("getitem", "getitem", "fp32"),
        ("head", "Linear", "int8"),
    ]
    assert 10 < report.row("head").sqnr < 70
    assert report.row("lstm").at_min is None
    chain, image = Chain().eval(), torch.randn(2, 3, 12, 12)
    half = prepare_fx(chain, {"": bfloat16_static_qconfig}, (image,))
    row = compare(chain, convert_fx(half), [image]).row("head")
    assert row.runs == "bf16"
    assert 20 < row.sqnr < 70
    mixed = prepare_fx(chain, {"": None, "head": default_dynamic_qconfig}, (image,))
    rows = {row.name: row for row in compare(chain, convert_fx(mixed), [image]).rows}
    assert rows["a"].fault is Fault.NONE
    assert rows["a"].sqnr == math.inf
    assert rows["head"].fault is Fault.BORN


@pytest.mark.filterwarnings("ignore::fxquant.ConfigWarning")
def test_what_does_not_fit_is_refused() -> None:
    model, x = Chain().eval(), torch.randn(2, 3, 12, 12)
    prepared = prepared_of(model, x)
    int8 = convert_fx(prepared)
    with pytest.raises(NotAGraphModuleError):
        compare(model, model, [x])
    with pytest.raises(ConfigError, match="this one is fused"):
        compare(model, fuse_fx(model, example_inputs=(x,)), [x])
    with pytest.raises(ConfigError, match="takes the float model first"):
        compare(int8, int8, [x])
    with pytest.raises(ConfigError, match="do not belong together"):
        compare(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), int8, [x])
    with pytest.raises(TrainingModeError):
        compare(Chain(), int8, [x])
    with pytest.raises(CalibrationError, match="no batch"):
        compare(model, int8, [])
    with pytest.raises(CalibrationError, match="does not fit"):
        compare(model, int8, ["text"])
    for wrong in (math.nan, "20", True):
        with pytest.raises(ConfigError, match="threshold"):
            compare(model, int8, [x], threshold=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="outlier_factor"):
        compare(model, int8, [x], outlier_factor=1.0)
    with pytest.raises(ConfigError, match="num_batches"):
        compare(model, int8, [x], num_batches=0)
    theirs = fxcompat.prepare_fx(model, fxcompat.get_default_qconfig_mapping("x86"), (x,))
    with pytest.raises(ConfigError, match="compat"):
        compare(model, theirs, [x])


@pytest.mark.filterwarnings("ignore::fxquant.ConfigWarning")
def test_results_of_compat_are_compared() -> None:
    model, x = Chain().eval(), torch.randn(2, 3, 12, 12)
    prepared = fxcompat.prepare_fx(model, fxcompat.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    report = compare(model, fxcompat.convert_fx(prepared), [x])
    assert report.row("head").sqnr > 20


def test_nothing_is_touched() -> None:
    model, x = Chain().eval(), torch.randn(2, 3, 12, 12)
    int8 = convert_fx(prepared_of(model, x))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given, result = x.clone(), int8(x)
    compare(model, int8, [x])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(given, x)
    assert torch.equal(result, int8(x))


def report_of() -> CompareReport:
    model, x = Fragile().eval(), torch.randn(8, 8, 6, 6)
    int8 = convert_fx(prepared_of(model, x, default_qconfig))
    return compare(model, int8, [x], threshold=30)


def test_the_report_prints() -> None:
    report = report_of()
    assert "first below 30 dB: 'layers.3' as far as 'relu_3'" in report.summary
    assert max(map(len, report.to_text(80).splitlines()[5:-1])) <= 80
    assert "Left out at this width" in report.to_text(80)
    assert "7 of 8" in report.to_markdown()
    assert report.to_markdown().count("\n| ") == len(report.rows) + 1
    plain = json.loads(report.to_json())
    assert [row["name"] for row in plain["rows"]] == [row.name for row in report.rows]
    assert plain["first_below"] == "relu_3"
    assert "<table>" in report._repr_html_()
    assert str(report)
    with pytest.raises(UnmatchedRuleError, match="did you mean 'relu_3'"):
        report.row("relu_33")
