"""Islands: what an untraceable module only calls is quantized, and everything else stays."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import (
    ArtifactError,
    CalibrationWarning,
    CaptureWarning,
    FxQuantWarning,
    QConfigMapping,
    QuantGraphModule,
    UnmatchedRuleError,
    assert_int8,
    audit,
    calibrate,
    convert_fx,
    convert_to_reference_fx,
    default_dynamic_qconfig,
    explain,
    float_qparams_weight_only_qconfig,
    fuse_fx,
    get_default_qconfig,
    load,
    prepare_fx,
    prepare_qat_fx,
    quantize,
    quantize_dynamic,
    save,
)
from fxquant.errors import ConfigError, StrictModeError, UntraceableError
from fxquant.graph_module import Stage, graphs_in, parts_below
from fxquant.inputs import bind_examples
from fxquant.kernel_trace import kernels_of_call
from fxquant.metadata import record_of
from fxquant.op_rows import Runs
from fxquant.parity import parity

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


class Decoder(nn.Module):
    """Three linears behind control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc1(x))
        if y.sum() > 0:
            y = self.fc2(y)
        while y.norm() > 1000:
            y = y / 2
        return self.fc3(y)


class Net(nn.Module):
    def __init__(self, island: nn.Module) -> None:
        super().__init__()
        self.pre = nn.Linear(16, 16)
        self.island = island
        self.post = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.post(F.relu(self.island(self.pre(x))))


def net(island: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Net(island()).eval()


def prepared(
    model: nn.Module, mapping: Any = None, inputs: tuple[Any, ...] | None = (X,), **options: Any
) -> tuple[QuantGraphModule, str]:
    """The prepared model, and the one warning about its island."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = prepare_fx(model, mapping, inputs, **options)
    found = [str(w.message) for w in caught if issubclass(w.category, FxQuantWarning)]
    assert len(found) == 1, found
    return gm, found[0]


def parts(gm: QuantGraphModule) -> list[str]:
    return [
        path for path, module in gm.named_modules() if isinstance(module, QuantGraphModule) and path
    ]


def sqnr(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.detach(), found.detach()
    return float(10 * torch.log10(wanted.pow(2).sum() / (wanted - found).pow(2).sum()))


def int8_calls(gm: QuantGraphModule, *inputs: Any) -> int:
    return sum(kernels_of_call(gm, bind_examples(gm, inputs)).int8.values())


# -- the whole way --------------------------------------------------------------------------------


def test_three_linears_in_an_island_run_int8() -> None:
    model = net(Decoder)
    gm, _ = prepared(model)
    assert parts(gm) == ["island.fc1", "island.fc2", "island.fc3"]
    torch.testing.assert_close(gm(X), model(X))
    int8 = convert_fx(calibrate(gm, [(X,), (-X,)]))
    assert sqnr(model(X), int8(X)) > 35
    report = assert_int8(int8, 1.0)  # the profiler confirms every node of every part
    assert report.confirmed
    assert sum(report.int8_calls.values()) == 5
    assert all("linear" in name for name in report.int8_calls)
    assert not report.float_calls
    macs = {row.name: row.macs for row in report.rows}
    assert macs["island_fc1"] == 8 * 16 * 32
    assert macs["island_fc2"] == 8 * 32 * 32
    assert macs["island"] == 0  # its own: sums and norms


def test_it_is_told_once_with_file_and_line() -> None:
    _, message = prepared(net(Decoder))
    lines, first = inspect.getsourcelines(Decoder.forward)
    line = first + next(i for i, text in enumerate(lines) if "if y.sum() > 0" in text)
    assert f"{__file__}:{line}, in forward: if y.sum() > 0:" in message
    assert "module 'island' (Decoder)" in message
    assert "'island.fc1', 'island.fc2', 'island.fc3' quantized on their own" in message


def test_branches_that_the_examples_do_not_take_stay_right() -> None:
    model = net(Decoder)
    gm, _ = prepared(model)
    gm = calibrate(gm, [(X,), (-X,)])
    int8 = convert_fx(gm)
    quiet = X * 0 - 100 * torch.sign(model.island.fc1.weight.sum(0))  # type: ignore[union-attr]  # a Linear
    for x in (X, -X, X * 3000, quiet):
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-3)
        assert int8(x).shape == model(x).shape


def test_the_reference_emulates_it() -> None:
    gm, _ = prepared(net(Decoder))
    calibrate(gm, [(X,)])
    reference, int8 = convert_to_reference_fx(gm), convert_fx(gm)
    stages = [graph.state.stage for graph in graphs_in(reference)]
    assert stages == [Stage.REFERENCE] * 4
    torch.testing.assert_close(reference(X), int8(X), rtol=0, atol=1e-6)
    assert int8_calls(reference, X) == 0
    assert not audit(reference).int8


def test_the_model_and_the_prepared_module_are_not_touched() -> None:
    model = net(Decoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    gm, _ = prepared(model)
    calibrate(gm, [(X,)])
    y = gm(X)
    first, second = convert_fx(gm), convert_fx(gm)
    assert torch.equal(first(X), second(X))
    assert torch.equal(gm(X), y)
    assert [graph.state.stage for graph in graphs_in(gm)] == [Stage.PREPARED] * 4
    assert kinds == [type(module) for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_explain_covers_what_is_inside() -> None:
    gm, _ = prepared(net(Decoder))
    planned = explain(gm)
    assert [row.name for row in planned.rows] == [
        *("pre", "island", "island_fc1", "island_fc2", "island_fc3", "relu", "post")
    ]
    assert planned.row("island.fc2").runs is Runs.PLANNED
    calibrate(gm, [(X,)])
    found = explain(convert_fx(gm))
    assert found.row("island.fc2").runs is Runs.INT8
    assert "quantized in it: 'island.fc1', 'island.fc2', 'island.fc3'" in found.row("island").reason
    assert found.row("island").runs is Runs.FP32


def test_copies_pickles_and_states() -> None:
    gm, _ = prepared(net(Decoder))
    calibrate(gm, [(X,)])
    int8 = convert_fx(gm)
    assert torch.equal(copy.deepcopy(int8)(X), int8(X))
    file = io.BytesIO()
    torch.save(int8, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), int8(X))
    again, _ = prepared(net(Decoder))
    other = convert_fx(calibrate(again, [(3 * X,)]))
    assert not torch.equal(other(X), int8(X))
    other.load_state_dict(int8.state_dict())
    assert torch.equal(other(X), int8(X))
    again.load_state_dict(gm.state_dict())  # statistics too
    assert torch.equal(convert_fx(again)(X), int8(X))


def test_files(tmp_path: Path) -> None:
    """A file holds the graphs in an island and its tensors; the code comes from the caller."""
    torch.manual_seed(0)
    model = nn.Sequential(Net(ReadsWeight()), nn.Linear(4, 16), Deep()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        gm = prepare_fx(model, None, (X,))
    calibrate(gm, [(X,)])
    stages = [gm, convert_to_reference_fx(gm), convert_fx(gm)]
    modules = {"0.island": ReadsWeight(), "2": Deep()}
    for stage in stages:
        save(stage, tmp_path / "model.fxq")
        loaded = load(tmp_path / "model.fxq", islands=modules)
        assert loaded.state.stage is stage.state.stage
        assert torch.equal(loaded(X), stage(X))
        assert explain(loaded).to_json() == explain(stage).to_json()
    assert audit(load(tmp_path / "model.fxq", islands=modules))
    assert torch.equal(convert_fx(reloaded(stages[0], tmp_path, modules))(X), stages[2](X))
    with pytest.raises(ArtifactError, match=r"pass islands=\{'0\.island': ReadsWeight\(\.\.\.\)\}"):
        load(tmp_path / "model.fxq")
    with pytest.raises(ArtifactError, match=r"islands\['2'\] \(Decoder\) is not what was saved"):
        load(tmp_path / "model.fxq", islands={**modules, "2": Decoder()})
    more = {**modules, "3": Decoder()}
    with pytest.raises(ArtifactError, match="has no island '3'"):
        load(tmp_path / "model.fxq", islands=more)


def reloaded(gm: QuantGraphModule, folder: Path, modules: dict[str, nn.Module]) -> QuantGraphModule:
    save(gm, folder / "again.fxq")
    return load(folder / "again.fxq", islands=modules)


def test_a_failed_batch_leaves_no_trace_in_parts() -> None:
    class Fails(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if y.shape[0] == 3 and y.sum() != 0:
                raise ValueError("three")
            return y

    gm, _ = prepared(net(Fails))
    calibrate(gm, [(X,)])
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    with pytest.raises(ValueError, match="three"):
        calibrate(gm, [(X[:3] * 50,)])
    for name, value in gm.state_dict().items():
        assert torch.equal(value, before[name]), name


# -- rules ----------------------------------------------------------------------------------------


def test_rules_name_paths_of_the_model() -> None:
    qconfig = get_default_qconfig("x86")
    gm, message = prepared(net(Decoder), {"": qconfig, "island.fc2": None})
    assert parts(gm) == ["island.fc1", "island.fc3"]
    assert "'island.fc1', 'island.fc3' quantized on their own" in message
    assert "'island.fc2' is not: no qconfig: module_name 'island.fc2'" in message
    regex = QConfigMapping().set_module_name_regex(r"island\.fc[13]", qconfig)
    gm, _ = prepared(net(Decoder), regex)
    assert parts(gm) == ["island.fc1", "island.fc3"]
    gm, _ = prepared(net(Decoder), {nn.Linear: qconfig, "island": None})
    assert parts(gm) == []
    with pytest.raises(UnmatchedRuleError, match="did you mean 'island"):
        prepare_fx(net(Decoder), {"island.fc": qconfig}, (X,))


class Tagger(nn.Module):
    """An embedding, an LSTM and a linear behind control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        y, (h, _) = self.lstm(self.table(tokens))
        if h.sum() > 1e6:
            return h
        return self.head(y)


def test_dynamic_and_weight_only_layers_are_swapped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Tagger()).eval()
    tokens = torch.randint(0, 30, (2, 7))
    mapping = {
        nn.Linear: default_dynamic_qconfig,
        nn.LSTM: default_dynamic_qconfig,
        nn.Embedding: float_qparams_weight_only_qconfig,
    }
    gm, _ = prepared(model, mapping, (tokens,))
    assert parts(gm) == ["0.table", "0.lstm", "0.head"]
    int8 = convert_fx(gm)  # nothing to calibrate
    report = audit(int8)
    assert report.confirmed
    assert report.mac_coverage == 1.0
    assert {"aten::quantized_lstm", "quantized::linear_dynamic"} <= report.int8_calls.keys()
    assert any("embedding" in name for name in report.int8_calls)
    assert sqnr(model(tokens), int8(tokens)) > 30


def test_quantize_and_quantize_dynamic() -> None:
    model = net(Decoder)
    with pytest.warns(CaptureWarning, match="opaque island"):
        int8 = quantize(model, [(X,)], progress=False)
    assert audit(int8).mac_coverage == 1.0
    with pytest.warns(CaptureWarning, match="opaque island"):
        int8 = quantize_dynamic(model, example_inputs=(X,))
    assert audit(int8).mac_coverage == 1.0


def test_without_data() -> None:
    """Made-up inputs reach what is in the island, as calibration would."""
    model = net(Decoder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        int8 = quantize(model, None, example_inputs=(X,), progress=False)
    assert not any("did not reach" in str(w.message) for w in caught)
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(X), int8(X)) > 25


def test_training() -> None:
    """What the island's layers train is what the rest of the model sees, and what is converted."""
    model = net(Decoder)
    model.post.weight = nn.Parameter(torch.randn(4, 16))
    with pytest.warns(CaptureWarning, match="opaque island"):
        gm = prepare_qat_fx(model.train(), None, (X,))
    assert parts(gm) == ["island.fc1", "island.fc2", "island.fc3"]
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    assert sum(name.startswith("island.") for name in before) == 6
    for _ in range(3):
        optimizer.zero_grad()
        gm(X).pow(2).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in gm.named_parameters())
    int8 = convert_fx(gm)
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(gm.eval()(X), int8(X)) > 30


class Ties(nn.Module):
    """The head's weight is the table's; the island holds one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.inner = Decoder()
        self.inner.fc3 = nn.Linear(32, 16)
        self.last = nn.Linear(32, 16)
        self.last.weight = self.inner.fc3.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.inner(self.first(x)), x], -1))


def test_ties_survive_training() -> None:
    torch.manual_seed(0)
    with pytest.warns(CaptureWarning, match="opaque island"):
        gm = prepare_qat_fx(Ties().train(), None, (X,))
    weights = [p for p in gm.parameters() if p.shape == (16, 32)]
    assert len(weights) == 1  # parameters() lists a tied one once


# -- what is only called, and what is not ---------------------------------------------------------


class Loops(nn.Module):
    """Modules in containers, called in loops."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.named = nn.ModuleDict({"a": nn.Linear(16, 16)})
        self.whole = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if x.sum() > 1e9:
            return x
        return self.whole(self.named["a"](x))


def test_containers() -> None:
    """A sequence that is called as a whole is one graph, with integers between its layers."""
    gm, _ = prepared(net(Loops))
    assert parts(gm) == ["island.layers.0", "island.layers.1", "island.named.a", "island.whole"]
    int8 = convert_fx(calibrate(gm, [(X,)]))
    assert audit(int8).mac_coverage == 1.0
    whole = int8.get_submodule("island.whole")
    assert isinstance(whole, QuantGraphModule)
    first = explain(int8).row("island.whole.0")
    assert first.output == "uint8 affine 0..255"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 1)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.relu(self.norm(self.conv(x * scale)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.block(x[:, :, None], scale=2.0).squeeze(-1)


def test_a_block_is_folded_and_fused_in_its_part() -> None:
    gm, _ = prepared(net(Blocks))
    assert parts(gm) == ["island.block"]
    int8 = convert_fx(calibrate(gm, [(X,)]))
    assert explain(int8).row("island.block.norm").fate == "folded into 'island_block_conv'"


class ReadsWeight(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(super().forward(x), self.fc3.weight.t())
        return self.fc3(y)


class ReadsInAnotherBranch(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.linear(y, self.fc3.weight) if y.sum() > 1e9 else y


def _helper(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


class ReadsInAHelper(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return _helper(self.fc3, y) if y.sum() > 1e9 else y


class CallsForward(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.fc3.forward(y) if y.sum() > 1e9 else y


class AsksForAttributes(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * getattr(self.fc3, "out_features") if y.sum() > 1e9 else y  # noqa: B009  # the point


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadsWeight, "its 'weight' is read, beside its calls"),
        (ReadsInAnotherBranch, "code of 'island' reads its 'weight'"),
        (CallsForward, "code of 'island' reads its 'forward'"),
    ],
)
def test_a_layer_whose_weight_is_read_stays(kind: type[nn.Module], reason: str) -> None:
    model = net(kind)
    gm, message = prepared(model)
    assert parts(gm) == ["island.fc1", "island.fc2"]
    assert f"'island.fc3' is not: {reason}" in message
    int8 = convert_fx(calibrate(gm, [(X,)]))
    assert reason in explain(int8).row("island").reason
    report = audit(int8)
    assert report.confirmed
    left = {row.name: row.macs for row in report.rows}["island"]
    assert left == 8 * 16 * 32 * (3 if kind is ReadsWeight else 1)  # products with fc3's weight
    assert sqnr(model(X), int8(X)) > 30


@pytest.mark.parametrize("kind", [ReadsInAHelper, AsksForAttributes])
def test_what_the_code_does_not_show_counts_for_all(kind: type[nn.Module]) -> None:
    gm, _ = prepared(net(kind))
    assert parts(gm) == []


class Walks(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(next(self.parameters()).dtype)


class WalksElsewhere(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.to(next(self.parameters()).dtype) if y.sum() > 1e9 else y


def test_walks_over_parameters() -> None:
    """``next(self.parameters())`` needs a parameter: it finds that of the first layer."""
    gm, message = prepared(net(Walks))
    assert parts(gm) == ["island.fc2", "island.fc3"]
    convert_fx(calibrate(gm, [(X,)]))(X)
    gm, message = prepared(net(WalksElsewhere))
    assert parts(gm) == []
    assert "reads the parameters of all modules" in message


class HoldsAList(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.kept = {"again": [self.fc3], "call": functools.partial(self.fc2)}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.kept["again"][0](y.repeat(1, 2)) if y.sum() > 1e9 else y  # type: ignore[index]  # a list


def test_a_layer_that_an_attribute_also_holds_stays() -> None:
    gm, message = prepared(net(HoldsAList))
    assert parts(gm) == ["island.fc1"]
    assert "'island.fc3' is not: the attribute 'kept' of the island also holds it" in message


class AsksForTypes(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if isinstance(self.fc1, nn.Linear) else -y


def test_tests_of_types() -> None:
    model = net(AsksForTypes)
    gm, message = prepared(model)
    assert "asks for types of modules" in message
    torch.testing.assert_close(gm(X), model(X))


def test_hooks_and_replaced_forwards() -> None:
    model = net(Decoder)
    island: Any = model.get_submodule("island")
    island.fc1.register_forward_hook(lambda module, args, result: result * 2)
    island.fc2.forward = lambda x: x
    gm, message = prepared(model)
    assert parts(gm) == ["island.fc3"]
    assert "it has forward hooks" in message
    assert "its forward is replaced on the object" in message
    torch.testing.assert_close(gm(X), model(X))


class Unreached(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc1(x))
        return self.fc3(self.fc2(y) if y.sum() < 0 else y)


def test_a_layer_that_no_example_reaches() -> None:
    """It is prepared all the same; where calibration does not reach it either, it stays FP32."""
    model = net(Unreached)
    gm, _ = prepared(model)
    assert parts(gm) == ["island.fc1", "island.fc2", "island.fc3"]
    with pytest.warns(CalibrationWarning, match=r"island_fc2|input"):
        calibrate(gm, [(X,)])
    with pytest.warns(CalibrationWarning, match="'island_fc2'.*calibration did not reach it"):
        int8 = convert_fx(gm)
    row = explain(int8).row("island.fc2")
    assert (row.runs, row.reason) == (Runs.FP32, "calibration did not reach it")
    fc2: Any = int8.get_submodule("island.fc2")
    y = torch.randn(2, 32)
    island: Any = model.get_submodule("island")
    torch.testing.assert_close(fc2(y), island.fc2(y))


def test_without_example_inputs_single_layers_are_found_by_the_code() -> None:
    gm, _ = prepared(net(Loops), None, None)
    assert parts(gm) == [
        *("island.layers.0", "island.layers.1", "island.named.a"),
        *("island.whole.0", "island.whole.2"),
    ]
    int8 = convert_fx(calibrate(gm, [(X,)]))
    assert int8_calls(int8, X) >= 5


class Wraps(nn.Module):
    """Can be traced, but for what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.inner = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.relu(self.fc(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wraps = Wraps()

    def forward(self, x: Tensor) -> Tensor:
        return self.wraps(x) if x.sum() < 1e9 else x


def test_an_island_in_an_island() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.inner = Decoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.fc(x)) if x.sum() < 1e9 else x

    gm, _ = prepared(net(Outer))
    assert parts(gm) == ["island.fc"] + [f"island.inner.fc{i}" for i in (1, 2, 3)]

    torch.manual_seed(0)
    model = Net(Deep()).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = prepare_fx(model, None, (X,))
    told = sorted(str(w.message).split("'")[1] for w in caught)
    assert told == ["island", "island.wraps.inner"]
    int8 = convert_fx(calibrate(gm, [(X,)]))
    report = audit(int8)
    assert report.confirmed
    assert report.mac_coverage == 1.0
    assert report.unknown_macs == ()
    assert explain(int8).row("island.wraps.inner.fc2").runs is Runs.INT8
    names = [row.name for row in report.rows]
    assert len(names) == len(set(names))


def test_an_island_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.island = Decoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.island(F.relu(self.island(x)))

    torch.manual_seed(0)
    model = Twice().eval()
    gm, _ = prepared(model)
    int8 = convert_fx(calibrate(gm, [(X,)]))
    report = audit(int8)
    assert report.confirmed
    assert [row.name for row in report.rows].count("island_fc1") == 1
    assert {row.name: row.macs for row in report.rows}["island_fc1"] == 2 * 8 * 16 * 32
    assert sqnr(model(X), int8(X)) > 30


# -- models that people have ----------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts: every token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen, result = self.gate(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            if mask.any():
                result[mask] = expert(x[mask])
        return result


def test_a_mixture_of_experts() -> None:
    model = net(Experts)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(5))
    gm, _ = prepared(model, None, (x,))
    assert parts(gm) == ["island.gate", *(f"island.experts.{i}" for i in range(4))]
    int8 = convert_fx(calibrate(gm, [(x,)]))
    assert audit(int8).mac_coverage == 1.0
    alike = (model(x) - int8(x)).abs().amax(-1) < 0.1  # but where the gate is close to a tie
    assert float(alike.float().mean()) > 0.9
    assert int8(x[:3]).shape == (3, 4)  # no number of tokens is baked in


class Greedy(nn.Module):
    """A decoder that feeds on its own output until it stops."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.cell = nn.GRUCell(16, 16)
        self.out = nn.Linear(16, 20)

    def forward(self, state: Tensor) -> Tensor:
        token = torch.zeros(state.shape[0], dtype=torch.long)
        results = []
        for _ in range(6):
            state = self.cell(self.table(token), state)
            results.append(self.out(state))
            token = results[-1].argmax(-1)
            if (token == 3).all():
                break
        return torch.stack(results, 1)


class Packs(nn.Module):
    """A packed sequence: the lengths are values."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.tolist(), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


def test_recurrent_networks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), Greedy()).eval()
    with pytest.warns(CaptureWarning, match="opaque island"):
        int8 = quantize_dynamic(model, example_inputs=(X,))
    calls = audit(int8).int8_calls
    assert calls["quantized::quantized_gru_cell_dynamic"] == 6
    assert calls["quantized::linear_dynamic"] == 1 + 6
    assert audit(int8).confirmed
    packs, inputs = Packs().eval(), (X[None].repeat(3, 1, 1), torch.tensor([8, 5, 2]))
    with pytest.warns(CaptureWarning, match="the model"):
        int8 = quantize_dynamic(packs, example_inputs=inputs)
    report = audit(int8, inputs)
    assert report.confirmed
    assert report.int8_calls == {"aten::quantized_lstm": 1}
    assert sqnr(packs(*inputs), int8(*inputs)) > 30


@dataclass
class Output:
    y: Tensor
    count: int


class Structured(nn.Module):
    """A result that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Output:
        y = self.fc(x)
        return Output(y, int((y > 0).sum()))


class TakesStructure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Structured()
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).y)


def test_results_that_are_no_tensors() -> None:
    torch.manual_seed(0)
    model = TakesStructure().eval()
    gm, _ = prepared(model)
    int8 = convert_fx(calibrate(gm, [(X,)]))
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(X), int8(X)) > 30
    file = io.BytesIO()
    torch.save(int8, file)


# -- what is no Python ----------------------------------------------------------------------------


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return Doubles.apply(self.fc(x))  # type: ignore[no-any-return]  # torch has no types for it


class Collects(nn.Module):
    """``*args`` that fx cannot unpack, and numpy, which is C."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, *inputs: Tensor) -> Tensor:
        total = sum(float(x.detach().numpy().sum()) for x in inputs)
        return self.fc(inputs[0]) + 0 * total


def test_extensions() -> None:
    model = net(Collects)
    gm, _ = prepared(model)
    assert parts(gm) == ["island.fc"]
    int8 = convert_fx(calibrate(gm, [(X,)]))
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(X), int8(X)) > 30


def test_autograd_functions() -> None:
    """Without gradients a trace keeps all of them; a model that trains keeps them as they are."""
    model = net(WithFunction)
    int8 = convert_fx(calibrate(prepare_fx(model, None, (X,)), [(X,)]))
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(X), int8(X)) > 30
    with pytest.warns(
        CaptureWarning, match="Doubles is an autograd function with its own gradient"
    ):
        gm = prepare_qat_fx(model.train(), None, (X,))
    assert parts(gm) == ["island.fc"]
    x = X.clone().requires_grad_()
    gm.get_submodule("island")(x).sum().backward()
    assert "DoublesBackward" in str(gm.get_submodule("island")(x).grad_fn)


def test_script_modules_stay() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.script = torch.jit.script(nn.Linear(16, 16))
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.script(x)) if x.sum() < 1e9 else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = net(Holds)
        scripted = nn.Sequential(torch.jit.script(nn.Linear(16, 16)), nn.Linear(16, 16)).eval()
    gm, message = prepared(model)
    assert parts(gm) == ["island.fc"]
    assert "'island.script' is not: it is TorchScript" in message
    gm, message = prepared(scripted)
    assert "'0' (RecursiveScriptModule) cannot be traced and stays in FP32" in message
    assert "TorchScript" in explain(gm).row("0").reason


# -- steering -------------------------------------------------------------------------------------


def test_listed_modules_stay_untouched() -> None:
    model = net(Decoder)
    for listed in (["island"], [Decoder]):
        gm = prepare_fx(model, None, (X,), leaf_modules=listed)
        assert parts(gm) == []
        assert type(gm.get_submodule("island")) is Decoder
        assert "listed in leaf_modules" in explain(gm).row("island").reason
    gm, message = prepared(model, leaf_modules=["island.fc2"])
    assert parts(gm) == ["island.fc1", "island.fc3"]
    assert "'island.fc2' is not: listed in leaf_modules" in message
    with pytest.raises(ConfigError, match="no submodule of Net; did you mean 'island'"):
        prepare_fx(model, None, (X,), leaf_modules=["iland"])
    with pytest.raises(ConfigError, match="leaf_modules takes paths and module classes"):
        prepare_fx(model, None, (X,), leaf_modules=[3])  # type: ignore[list-item]  # the point


def test_strict_capture() -> None:
    with pytest.raises(UntraceableError, match=r"module 'island' \(Decoder\) cannot be traced"):
        prepare_fx(net(Decoder), None, (X,), strict_capture=True)
    with pytest.raises(UntraceableError, match=r"Decoder\.forward cannot be traced"):
        prepare_fx(Decoder().eval(), None, (X,), strict_capture=True)
    with pytest.raises(StrictModeError):
        prepare_fx(net(Decoder), None, (X,), strict=True)


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor, mode: int) -> Tensor:
        return self.fc(x) if mode > 1 else self.other(x)


def test_concrete_args() -> None:
    model = Flagged().eval()
    gm = prepare_fx(model, None, (X, 3), concrete_args={"mode": 3})
    assert [n.target for n in gm.graph.nodes if n.op == "call_module" and "fc" in str(n.target)]
    torch.testing.assert_close(gm(X, 3), model(X, 3))
    with pytest.raises((AssertionError, ValueError), match="mode"):
        gm(X, 0)
    with pytest.raises(ConfigError, match=r"fixes 'mod'.*did you mean 'mode'"):
        prepare_fx(model, None, (X, 3), concrete_args={"mod": 3})


class Optional(Flagged):
    def forward(self, x: Tensor, mode: int = 0, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(x, mode) * scale


def test_a_fixed_input_need_not_be_given() -> None:
    model = Optional().eval()
    gm = prepare_fx(model, None, (X,), concrete_args={"mode": 3})
    torch.testing.assert_close(gm(X), model(X, 3))
    torch.testing.assert_close(gm(X, scale=2.0), model(X, 3, 2.0))
    with pytest.raises((AssertionError, ValueError), match="mode"):
        gm(X, 0)


def test_parity_looks_into_islands() -> None:
    torch.manual_seed(0)
    gm, _ = prepared(net(Decoder))
    gm(X)
    int8 = convert_fx(gm)
    report = parity(gm, int8, (X,))
    assert report.ok
    inside = {n.name: n for g in parts_below(int8) for n in g.graph.nodes if record_of(n).kernel}
    assert len(inside) >= 2
    kernels = {row.kernel for row in report.rows}
    assert {record_of(node).kernel for node in inside.values()} <= kernels
    part = next(parts_below(int8))
    node = next(n for n in part.graph.nodes if "qlinear" in record_of(n).kernel)
    node.args = (node.args[0], node.args[1] * 1.01, *node.args[2:])
    part.recompile()
    failures = parity(gm, int8, (X,)).failures
    assert [row.kernel for row in failures] == [record_of(node).kernel]


def test_fuse_fx_tells_of_islands() -> None:
    with pytest.warns(CaptureWarning, match="stays in FP32 as an opaque island"):
        fused = fuse_fx(net(Decoder))
    assert not list(parts_below(fused))
