"""audit and assert_int8: the figures, and that the profiler catches what the graph does not do."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.audit import AuditReport, assert_int8, audit
from fxquant.calibration import calibrate
from fxquant.errors import (
    ConfigError,
    CoverageError,
    NotAGraphModuleError,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, set_record
from fxquant.models_zoo.registry import load
from fxquant.op_rows import Runs
from fxquant.qconfig import get_default_qconfig
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx


class Net(nn.Module):
    """conv1: 8*3*9 = 216 MACs a pixel of 14x14; conv2: 8*8*9 = 576 of 12x12; fc: 8*4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


CONV1, CONV2, FC = 216 * 14 * 14, 576 * 12 * 12, 32
X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def converted(
    model: nn.Module | None = None,
    mapping: Any = None,
    inputs: tuple[Any, ...] = (X,),
    **options: Any,
) -> QuantGraphModule:
    torch.manual_seed(0)
    model = (Net() if model is None else model).eval()
    prepared = prepare_fx(model, mapping, options.pop("example_inputs", inputs), **options)
    return convert_fx(calibrate(prepared, [inputs]))


# -- figures --------------------------------------------------------------------------------------


def test_all_int8_but_the_mean() -> None:
    gm = converted()
    report = audit(gm)
    assert report.confirmed
    assert report.discrepancies == ()
    assert report.mac_coverage == 1.0
    assert len(report.counted) == len(gm.state.ledger) == 8
    assert report.op_coverage == 7 / 8
    assert [row.name for row in report.fp32] == ["mean"]
    assert "average" in report.fp32[0].reason
    assert sum(report.int8_calls.values()) == 3
    assert report.float_calls == {}
    assert report.conversions["quantize"] == 2


def test_an_op_that_is_switched_off() -> None:
    mapping = {"": get_default_qconfig("x86"), "conv1": None}
    report = audit(converted(mapping=mapping))
    assert report.confirmed
    assert report.mac_coverage == (CONV2 + FC) / (CONV1 + CONV2 + FC)
    names = {row.name: row for row in report.fp32}
    assert {"conv1", "bn1", "mean"} == names.keys()
    assert "module_name 'conv1'" in names["conv1"].reason
    assert names["bn1"].carried_by == "conv1"  # folded: it is in FP32 with what carries it
    assert report.float_calls == {"aten::conv2d": 1}
    shown = str(report)
    assert "'conv1'" in shown
    assert "bn1" not in shown  # listed with what carries it


def test_folded_and_removed_ops_count_with_what_carries_them() -> None:
    int8 = {row.name: row for row in audit(converted()).int8}
    assert int8["bn1"].carried_by == "conv1"
    assert int8["relu"].carried_by == "conv1"
    assert int8["drop"].carried_by == "conv1"


def test_digits() -> None:
    entry = load("digits")
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    gm = convert_fx(calibrate(prepared, [entry.example_inputs]))
    report = assert_int8(gm, 0.99, min_op_coverage=0.95)
    assert report.confirmed
    assert report.mac_coverage == 1.0
    assert [row.name for row in report.fp32] == ["pool"]


class Island(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() != 0 else x


def test_an_opaque_module_is_counted_by_pytorch() -> None:
    gm = converted(nn.Sequential(Island(), nn.Conv2d(3, 8, 3)), leaf_modules=[Island])
    report = audit(gm)
    assert report.confirmed
    assert report.unknown_macs == ()
    inside, outside = 3 * 27 * 16 * 16, 216 * 14 * 14
    assert report.mac_coverage == outside / (inside + outside)


def test_attention_and_products_are_counted() -> None:
    """Attention is taken apart; what the catalogue cannot count, PyTorch does."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, x, x, need_weights=False)[0]
            return torch.tensordot(torch.einsum("bij,bkj->bik", self.fc(y), x), x, ([2, 0], [1, 0]))

    report = audit(converted(Mixed(), inputs=(torch.randn(2, 5, 8),)))
    assert report.confirmed
    assert report.unknown_macs == ()
    macs = {row.name: row.macs for row in report.rows}
    assert macs["einsum"] == 2 * 5 * 5 * 8
    projections, products = 4 * 2 * 5 * 8 * 8, 2 * 2 * 5 * 5 * 8
    inside = [row.macs or 0 for row in report.rows if row.path.startswith("attention")]
    assert sum(inside) == projections + products
    assert macs["tensordot"] == 2 * 5 * 5 * 8


def test_recurrent_macs() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0])

    report = audit(converted(Recurrent(), inputs=(torch.randn(5, 2, 8),)))
    assert report.confirmed
    lstm = 5 * 2 * 4 * 4 * (8 + 4)
    assert report.mac_coverage == 80 / (80 + lstm)
    assert report.fp32[0].name == "lstm"


def test_a_reference_graph_only_emulates() -> None:
    torch.manual_seed(0)
    prepared = calibrate(prepare_fx(Net().eval(), None, (X,)), [X])
    for gm in (
        convert_to_reference_fx(prepared),
        convert_fx(calibrate(prepare_fx(Net().eval(), None, (X,), target="reference"), [X])),
    ):
        report = audit(gm)
        assert (report.mac_coverage, report.op_coverage) == (0.0, 0.0)
        assert "emulated" in {row.name: row for row in report.fp32}["conv1"].reason
        with pytest.raises(CoverageError, match="emulated in floating point"):
            assert_int8(gm)


# -- confirmation ---------------------------------------------------------------------------------


def replace_by_float(gm: QuantGraphModule, *, keep_record: bool) -> fx.Node:
    """Swap conv1's kernel for dequantize -> F.conv2d -> quantize."""
    kernel = next(n for n in gm.graph.nodes if "conv1" in record_of(n).origins)
    source, _, scale, zero_point = kernel.args
    with gm.graph.inserting_before(kernel):
        x = gm.graph.call_function(torch.dequantize, (source,))
        weight = gm.graph.get_attr("conv1_weight")
        floats = gm.graph.call_method("float", (weight,))
        y = gm.graph.call_function(F.conv2d, (x, floats))
        q = gm.graph.call_function(torch.quantize_per_tensor, (y, scale, zero_point, torch.quint8))
    if keep_record:
        set_record(y, record_of(kernel))
    kernel.replace_all_uses_with(q)
    gm.graph.erase_node(kernel)
    return y


@pytest.mark.parametrize("keep_record", [False, True])
def test_a_float_convolution_in_place_of_a_kernel_is_noticed(keep_record: bool) -> None:
    gm = copy.deepcopy(converted())
    replace_by_float(gm, keep_record=keep_record)
    gm.recompile()
    report = audit(gm)
    assert report.confirmed is False
    assert any("aten::conv2d" in text for text in report.discrepancies)
    assert report.mac_coverage == (CONV2 + FC) / (CONV1 + CONV2 + FC)
    assert {"conv1", "bn1", "relu", "mean"} == {row.name for row in report.fp32} - {"drop"}
    if keep_record:
        assert "the profiler disproves it" in report.fp32[0].reason
        assert "claims quantized::conv2d and runs aten::conv2d" in report.discrepancies[0]
    else:
        assert "'conv1': no node of the graph carries it out" in report.discrepancies[0]
    assert "NOT confirmed" in str(report)
    with pytest.raises(CoverageError, match=r"profiler does not confirm.*conv2d"):
        assert_int8(gm, min_coverage=0.1)


def test_a_graph_that_was_not_recompiled_is_noticed() -> None:
    gm = copy.deepcopy(converted())
    replace_by_float(gm, keep_record=True)  # the compiled forward still runs the kernel
    report = audit(gm)
    assert report.confirmed is False
    assert any("recompile()" in text for text in report.discrepancies)


def test_a_value_that_is_no_integer_is_noticed() -> None:
    gm = copy.deepcopy(
        converted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)))
    )
    pool = next(n for n in gm.graph.nodes if "max_pool2d" in record_of(n).kernel)
    with gm.graph.inserting_before(pool):
        x = gm.graph.call_function(torch.dequantize, (pool.args[0],))
    pool.replace_input_with(pool.args[0], x)
    with gm.graph.inserting_after(pool):
        q = gm.graph.call_function(torch.quantize_per_tensor, (pool, 0.1, 0, torch.quint8))
    pool.replace_all_uses_with(q, delete_user_cb=lambda user: user is not q)
    gm.recompile()
    report = audit(gm)
    assert report.confirmed is False
    assert "gives torch.float32" in report.discrepancies[0]
    assert {row.name for row in report.fp32} == {"_1"}


# -- inputs of the profiled call ------------------------------------------------------------------


def test_without_shapes_there_is_no_call() -> None:
    gm = converted(example_inputs=None)
    report = audit(gm)
    assert report.confirmed is None
    assert "pass example_inputs" in report.discrepancies[0]
    assert "not confirmed" in str(report)
    assert audit(gm, X).confirmed
    assert math.isnan(audit(gm, X).mac_coverage)
    with pytest.raises(CoverageError, match="cannot be shown"):
        assert_int8(gm, example_inputs=X)
    assert assert_int8(gm, None, min_op_coverage=0.8, example_inputs=(X,)).confirmed


def test_integer_inputs_are_zeros() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.fc = nn.Linear(8, 4)

        def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc(self.table(ids)) * scale

    assert audit(converted(Embedded(), inputs=(torch.tensor([[9, 3]]),))).confirmed


def test_inputs_that_do_not_run_or_bind() -> None:
    gm = converted()
    report = audit(gm, torch.zeros(1, 5, 8, 8))
    assert report.confirmed is None
    assert "the profiled call failed" in report.discrepancies[0]
    with pytest.raises(TypeError, match="too many positional"):
        audit(gm, (X, X))
    assert audit(gm, {"x": X}).confirmed


def test_the_profiler_prints_nothing_and_leaves_the_environment(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    before = dict(os.environ)
    audit(converted())
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


# -- what is refused ------------------------------------------------------------------------------


def test_only_converted_models() -> None:
    with pytest.raises(ConfigError, match="this one is prepared: call convert_fx first"):
        audit(prepare_fx(Net().eval(), None, (X,)))
    with pytest.raises(NotAGraphModuleError, match="audit takes a model that fxquant made"):
        audit(Net())


# -- assert_int8 ----------------------------------------------------------------------------------


def test_enough_int8_gives_the_report() -> None:
    report = assert_int8(converted())
    assert isinstance(report, AuditReport)
    assert assert_int8(converted(), 1.0, min_op_coverage=7 / 8).confirmed


def test_too_little_by_macs() -> None:
    gm = converted(mapping={"": get_default_qconfig("x86"), "conv2": None})
    with pytest.raises(CoverageError) as caught:
        assert_int8(gm)
    text = str(caught.value)
    assert "int8 covers 33.81 % of the multiply-accumulates, less than 95.00 %" in text
    assert "'conv2' (Conv2d): " in text
    assert "module_name 'conv2'" in text
    assert isinstance(caught.value, AssertionError)
    assert assert_int8(gm, 0.3).confirmed


def test_too_little_by_ops() -> None:
    with pytest.raises(CoverageError, match=r"int8 covers 87.50 % of the ops, less than 90.00 %"):
        assert_int8(converted(), min_op_coverage=0.9)


def test_an_unknown_share_in_fp32_fails() -> None:
    """Without the call, PyTorch cannot count the island: it could be most of the work."""
    gm = converted(nn.Sequential(Island(), nn.Conv2d(3, 8, 3)), leaf_modules=[Island])
    with pytest.raises(CoverageError, match="those of '_0' are unknown"):
        assert_int8(gm, example_inputs=torch.zeros(1, 7, 8, 8))


class Adds(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x + y)


def test_a_model_without_products_is_judged_by_its_ops() -> None:
    gm = converted(Adds(), inputs=(X, X))
    assert math.isnan(audit(gm).mac_coverage)
    with pytest.raises(CoverageError, match=r"of the ops, less than 95\.00 %"):
        assert_int8(gm)
    assert assert_int8(gm, None).op_coverage == 0.0


@pytest.mark.parametrize("share", [95, -0.1, 1.01])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 1 \(0.95 is 95 %\)"):
        assert_int8(converted(), share)
    with pytest.raises(ConfigError, match="min_op_coverage"):
        assert_int8(converted(), min_op_coverage=share)


# -- the object -----------------------------------------------------------------------------------


def test_json_and_html() -> None:
    report = audit(converted())
    read = json.loads(report.to_json())
    assert (read["mac_coverage"], read["confirmed"]) == (1.0, True)
    assert read["macs"] == CONV1 + CONV2 + FC
    assert [op["name"] for op in read["fp32"]] == ["mean"]
    assert "<table>" in report._repr_html_()
    unknown = json.loads(audit(converted(example_inputs=None)).to_json())
    assert unknown["mac_coverage"] is None


def test_text() -> None:
    text = audit(converted()).to_text(80)
    assert "int8 coverage: 100.00 % of multiply-accumulates" in text
    assert "87.50 % of ops (7 of 8)" in text
    assert "confirmed by the profiler: 3 quantized kernel calls and 0 float ones" in text
    table = text.split("\n\n", 1)[1]
    assert max(map(len, table.splitlines())) <= 80
    assert "Left out" not in text
    narrow = audit(converted()).to_text(70)
    assert "Left out at this width (see .to_text()): type" in narrow


def test_nearly_all_is_not_all() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 512)
            self.off = nn.Linear(512, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.off(self.fc(x))

    mapping = {"": get_default_qconfig("x86"), "off": None}
    report = audit(converted(Big(), mapping, (torch.randn(4, 512),)))
    assert 0.998 < report.mac_coverage < 1
    assert "100.00 %" not in report.summary
    assert {row.name for row in report.rows if row.runs is Runs.INT8} == {"fc"}


def test_an_audit_leaves_the_first_call_to_the_user() -> None:
    """oneDNN prepares convolutions for the first batch that it sees, so audit's does not count."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    int8 = convert_fx(calibrate(prepare_fx(model, None, (x,)), [x]))
    names = {pack.name for pack in int8.state.packs}
    assert len(names) == 2
    assert audit(int8).confirmed
    assert set(int8.unpacked) == names
    int8(x[:1])
    held = {name: getattr(int8, name) for name in names}
    assert audit(int8).confirmed
    assert all(getattr(int8, name) is held[name] for name in names)
