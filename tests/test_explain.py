"""explain: one row for every op of the float graph, and a reason for every op in FP32."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.calibration import calibrate
from fxquant.errors import (
    CaptureWarning,
    MissingDependencyError,
    NotAGraphModuleError,
    UnmatchedRuleError,
)
from fxquant.explain import Explanation, explain
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.registry import load
from fxquant.op_rows import NO_REASON, OpRow, Runs
from fxquant.qconfig import get_default_qconfig
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx
from fxquant.tables import Column, as_markdown, as_text
from fxquant.timing import threads


class Island(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Net(nn.Module):
    """Something of everything: folded, fused, free, removed, refused, switched off, opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()
        self.island = Island()
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.gelu = nn.GELU()
        self.off = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(F.max_pool2d(self.drop(x), 2))  # the second relu is free: nothing is negative
        x = self.gelu(self.conv2(x))
        x = F.relu(self.off(self.island(x)))
        return self.fc(x.mean((2, 3))) + 1


OFF = {"": get_default_qconfig("x86"), "off": None}


@pytest.fixture(scope="module")
def stages() -> dict[str, QuantGraphModule]:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(2, 3, 16, 16)
    with pytest.warns(CaptureWarning, match="opaque island"):
        prepared = prepare_fx(model, OFF, (x,))
    with pytest.warns(CaptureWarning, match="opaque island"):
        fused = fuse_fx(model)
    calibrate(prepared, [x])
    return {
        "fused": fused,
        "prepared": prepared,
        "reference": convert_to_reference_fx(prepared),
        "lowered": convert_fx(prepared),
    }


@pytest.mark.parametrize("stage", ["fused", "prepared", "reference", "lowered"])
def test_a_row_for_every_op(stages: dict[str, QuantGraphModule], stage: str) -> None:
    found = explain(stages[stage])
    entries = [e.name for e in stages[stage].state.ledger]
    if stage != "fused":
        entries.insert(entries.index("island") + 1, "island_conv")  # its only part
    assert [row.name for row in found.rows] == entries
    assert found.stage == stage
    assert_complete(found)


def test_lowered(stages: dict[str, QuantGraphModule]) -> None:
    found = explain(stages["lowered"])
    assert [(row.name, row.runs.value) for row in found.rows if row.runs is Runs.FP32] == [
        ("gelu", "fp32"),
        ("island", "fp32"),
        ("off", "fp32"),
        ("relu_2", "fp32"),
        ("mean", "fp32"),
        ("add", "fp32"),
    ]
    conv1 = found.row("conv1")
    assert (conv1.op, conv1.pattern, conv1.rule) == ("Conv2d", "conv2d-relu", "global")
    assert (conv1.input, conv1.output) == ("uint8 affine 0..255", "uint8 affine 0..255")
    assert conv1.weight.startswith("int8 per-channel(0) sym")
    assert conv1.kernel.startswith("quantized::conv2d")
    assert conv1.reason == conv1.fate == ""
    assert found.row("bn1").fate == "folded into 'conv1'"
    assert found.row("relu").fate == "free: saturation of 'conv1'"
    assert found.row("drop").fate == "removed: dropout does nothing in evaluation"
    assert found.row("relu_1").fate == "free: saturation of 'max_pool2d'"
    assert found.row("conv2").output == "fp32"


def test_reasons_name_what_to_look_at(stages: dict[str, QuantGraphModule]) -> None:
    found = explain(stages["lowered"])
    assert "no qconfig: module_name 'off'" in found.row("off").reason
    assert found.row("off").rule == "module_name 'off'"
    assert "opaque island" in found.row("island").reason
    assert "return self.conv(x) if x.sum() > 0 else x" in found.row("island").reason
    assert "float accumulator" in found.row("gelu").reason
    assert "operand 1 is a number" in found.row("add").reason
    assert "average" in found.row("mean").reason
    relu = found.row("relu_2").reason
    assert "no integers come in" in relu or "no qconfig" in relu


def test_parameters_are_those_of_the_graph(stages: dict[str, QuantGraphModule]) -> None:
    reference, lowered = explain(stages["reference"]), explain(stages["lowered"])
    gm = stages["lowered"]
    conv1 = lowered.row("conv1")
    assert conv1.scale == float(gm.relu_scale)  # type: ignore[arg-type]  # a buffer
    assert conv1.zero_point == int(gm.relu_zero_point)  # type: ignore[arg-type]  # a buffer
    scales = gm.get_buffer("conv1_weight_scale")
    assert conv1.weight_scale == (float(scales.min()), float(scales.max()))
    for row in lowered.rows:
        other = reference.row(row.name)
        assert (row.scale, row.zero_point) == (other.scale, other.zero_point), row.name
        assert row.weight_scale == other.weight_scale, row.name
        assert (row.input, row.weight, row.output) == (other.input, other.weight, other.output)


def test_plans_come_true(stages: dict[str, QuantGraphModule]) -> None:
    floats = [
        [row.name for row in explain(stages[stage]).rows if row.runs is Runs.FP32]
        for stage in ("prepared", "reference", "lowered")
    ]
    assert floats[0] == floats[1] == floats[2]


def test_prepared(stages: dict[str, QuantGraphModule]) -> None:
    found = explain(stages["prepared"])
    conv1 = found.row("conv1")
    assert conv1.runs is Runs.PLANNED
    assert conv1.kernel == "quantized::conv2d"
    assert (conv1.scale, conv1.weight_scale) == (None, None)
    assert found.row("relu").fate == "in the kernel of 'conv1'"
    assert found.row("conv2").output == "fp32"


def test_fused(stages: dict[str, QuantGraphModule]) -> None:
    found = explain(stages["fused"])
    assert {row.runs for row in found.rows} == {Runs.FP32}
    assert found.row("bn1").fate == "folded into 'conv1'"
    assert "nothing is quantized yet" in found.row("conv1").reason


def test_values_taken_out_of_a_tuple() -> None:
    """A dropout behind an RNN is carried by a getitem, which has no reason of its own."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.RNN(8, 8, batch_first=True)
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.layer(x)
            return self.drop(y)

    x = torch.randn(2, 3, 8)
    found = explain(convert_fx(calibrate(prepare_fx(Recurrent().eval(), None, (x,)), [x])))
    assert_complete(found)
    assert "'layer'" in found.row("drop").reason
    assert found.row("layer").reason in found.row("drop").reason


def test_a_removed_op_right_behind_an_input() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    prepared = calibrate(prepare_fx(model, None, (x,)), [x])
    for gm, runs in ((prepared, Runs.PLANNED), (convert_fx(prepared), Runs.INT8)):
        row = explain(gm).rows[0]
        assert (row.runs, row.carried_by) == (runs, "input")


@pytest.mark.parametrize("name", ["digits", "torchvision/mobilenet_v3_small"])
def test_networks(name: str) -> None:
    with threads(1):
        try:
            entry = load(name)
        except MissingDependencyError as error:
            pytest.skip(str(error))
        prepared = prepare_fx(entry.model, None, entry.example_inputs)
        calibrate(prepared, [entry.example_inputs])
    reference, lowered = convert_to_reference_fx(prepared), convert_fx(prepared)
    for gm in (prepared, reference, lowered):
        assert_complete(explain(gm))
    for row in explain(lowered).rows:
        other = explain(reference).row(row.name)
        assert (row.scale, row.weight_scale, row.output) == (
            other.scale,
            other.weight_scale,
            other.output,
        )


def assert_complete(found: Explanation) -> None:
    """Every row says how its op runs, and in FP32 why."""
    for row in found.rows:
        assert row.runs is not Runs.NOTHING, row
        assert row.rule, row
        if row.runs is Runs.FP32:
            assert len(row.reason.split()) > 2, row
            assert NO_REASON.partition("{")[0] not in row.reason, row
        elif row.carried_by:
            assert row.fate, row
        else:
            assert "" not in (row.kernel, row.input, row.output), row
            assert row.runs is Runs.PLANNED or row.output == "fp32" or row.scale is not None, row


# -- the object -----------------------------------------------------------------------------------


def test_row_by_path_and_unknown() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.block(self.act(x)))

    found = explain(prepare_fx(Twice().eval(), None, (torch.randn(2, 4),)))
    assert found.row("block.0") is found.row("block_0")
    assert found.row("act").name == "act"
    assert found.row("act_1").path == "act"
    with pytest.raises(UnmatchedRuleError, match="no op 'blok_0'; did you mean 'block_0'"):
        found.row("blok_0")
    with pytest.raises(LookupError):
        found.row("conv9")


def test_a_path_with_several_ops() -> None:
    rows = tuple(
        OpRow(name=name, op="relu", kind="relu", path="block", runs=Runs.FP32, reason="why")
        for name in ("relu", "relu_1")
    )
    with pytest.raises(UnmatchedRuleError, match="'block' has 2 ops: 'relu', 'relu_1'"):
        Explanation("prepared", "x86", rows).row("block")


def test_json_holds_everything(stages: dict[str, QuantGraphModule]) -> None:
    found = explain(stages["lowered"])
    read = json.loads(found.to_json())
    assert (read["stage"], read["target"]) == ("lowered", "x86")
    conv1 = next(op for op in read["ops"] if op["name"] == "conv1")
    assert conv1["runs"] == "int8"
    assert conv1["scale"] == found.row("conv1").scale
    assert len(read["ops"]) == len(found.rows)


def test_markdown_and_html(stages: dict[str, QuantGraphModule]) -> None:
    found = explain(stages["lowered"])
    lines = found.to_markdown().splitlines()
    assert len(lines) == 2 + 2 + len(found.rows)
    assert lines[0] == found.summary
    html = found._repr_html_()
    assert "<table>" in html
    assert "x.sum() &gt; 0" in html


@pytest.mark.parametrize("width", [80, 100, 240])
def test_text_keeps_to_the_width(stages: dict[str, QuantGraphModule], width: int) -> None:
    text = explain(stages["lowered"]).to_text(width)
    table = text.split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= width
    assert "folded into 'conv1'" in text
    assert ("Left out at this width" in text) is (width < 240)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_print_uses_the_terminals_width(
    stages: dict[str, QuantGraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explain(stages["lowered"])
    monkeypatch.setenv("COLUMNS", "90")
    assert str(found) == found.to_text(90)


def test_a_model_without_ops() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    gm = prepare_fx(Nothing().eval(), {}, (torch.ones(2),))
    found = explain(gm)
    assert found.rows == ()
    assert "0 ops" in str(found)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), torch.fx.symbolic_trace(nn.Linear(2, 2)), 3])
def test_only_fxquants_models(model: object) -> None:
    with pytest.raises(NotAGraphModuleError, match="explain takes a model that fxquant made"):
        explain(model)  # type: ignore[arg-type]  # the point of the test


def test_a_copy_explains_the_same(stages: dict[str, QuantGraphModule]) -> None:
    import copy
    import pickle

    lowered = stages["lowered"]
    assert explain(copy.deepcopy(lowered)) == explain(lowered)
    plain = convert_fx(calibrate(prepare_fx(nn.Linear(2, 2).eval(), None, (X,)), [X]))
    assert explain(pickle.loads(pickle.dumps(plain))) == explain(plain)


X = torch.ones(3, 2)

# -- tables ---------------------------------------------------------------------------------------

COLUMNS = (
    Column(title="a", width=4),
    Column(title="b", width=6, rank=1),
    Column(title="c", width=6, rank=2),
    Column(title="empty", width=9, rank=3),
)
ROWS = [["one", "two three four", "five|six", ""], ["1", "2", "3", ""]]


def test_columns_go_by_rank() -> None:
    whole, none = as_text(COLUMNS, ROWS)
    assert "five|six" in whole
    assert "empty" not in whole
    assert none == ()
    narrow, left_out = as_text(COLUMNS, ROWS, 12)
    assert left_out == ("c",)
    assert max(map(len, narrow.splitlines())) <= 12
    assert as_text(COLUMNS, ROWS, 3)[1] == ("b", "c")


def test_markdown_escapes_bars() -> None:
    assert "five\\|six" in as_markdown(COLUMNS, ROWS)
