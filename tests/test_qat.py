"""Quantization-aware training from end to end: prepare_qat_fx, some steps, convert_fx."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant import (
    ArtifactError,
    ConfigError,
    ConfigWarning,
    MissingExampleInputsError,
    QConfig,
    QConfigMapping,
    audit,
    compat,
    convert_fx,
    convert_to_reference_fx,
    default_dynamic_qat_qconfig,
    default_embedding_qat_qconfig,
    default_embedding_qat_qconfig_4bit,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    explain,
    freeze_bn_stats,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    load,
    parity,
    prepare_qat_fx,
    save,
)
from fxquant.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from fxquant.graph_module import QuantGraphModule
from fxquant.qat_modules import QatConvBn2d, holds_training_modules

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Conv-bn-relu, a residual, dropout, a function with a weight, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = F.relu(self.body(x) + x)
        x = self.dropout(F.relu(F.conv2d(x, self.kernel)))
        return self.head(F.conv2d(x, self.kernel).mean((2, 3)))


def rules(*by_type: tuple[Any, QConfig], everything: QConfig | None = None) -> QConfigMapping:
    mapping = QConfigMapping().set_global(everything)
    for kind, qconfig in by_type:
        mapping.set_object_type(kind, qconfig)
    return mapping


def seeded_net(**_: Any) -> Net:
    torch.manual_seed(0)
    return Net().train()


def train(model: nn.Module, steps: int, *, start: int = 0) -> list[float]:
    """Losses of some steps, the same for the same start."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in range(start, start + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 3, 8, 8)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def own(model: nn.Module, inputs: Any = (IMAGES,)) -> QuantGraphModule:
    return prepare_qat_fx(model, None, inputs)


def like_torch(model: nn.Module, inputs: Any = (IMAGES,)) -> QuantGraphModule:
    mapping = compat.get_default_qat_qconfig_mapping("onednn")  # the full range
    return compat.prepare_qat_fx(model, mapping, inputs)


PREPARE: dict[str, Callable[..., QuantGraphModule]] = {"own": own, "compat": like_torch}
CONVERT: dict[str, Callable[..., QuantGraphModule]] = {
    "own": convert_fx,
    "compat": compat.convert_fx,
}
REFERENCE: dict[str, Callable[..., QuantGraphModule]] = {
    "own": convert_to_reference_fx,
    "compat": compat.convert_to_reference_fx,
}
BOTH = pytest.mark.parametrize("profile", ["own", "compat"])


def same_state(left: nn.Module, right: nn.Module) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())


# -- the whole way --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_the_int8_model_computes_what_training_saw(profile: str, training: bool) -> None:
    model = seeded_net().train(training)
    prepared = PREPARE[profile](model)
    assert prepared.training is training
    train(prepared.train(), 6)
    prepared.apply(disable_observer)
    int8, reference = CONVERT[profile](prepared), REFERENCE[profile](prepared)
    expected = prepared.eval()(IMAGES)
    assert not holds_training_modules(int8)
    torch.testing.assert_close(reference.eval()(IMAGES), expected, rtol=1e-5, atol=1e-5)
    # The kernels sum integers, training sums floats: some sums are rounded to the other neighbour.
    bound = float(expected.abs().max().detach()) / 100
    if profile == "compat":  # the kernel of mean rounds to the wide scale of what it averages
        pooled, output = (
            float(prepared.get_submodule(f"activation_post_process_{n}").scale) for n in (8, 9)
        )
        bound = pooled * float(prepared.head.weight.abs().sum(1).max().detach()) + output
    torch.testing.assert_close(int8(IMAGES), expected, rtol=0, atol=bound)


@BOTH
def test_the_caller_s_model_is_left_alone(profile: str) -> None:
    model = seeded_net()
    before = copy.deepcopy(model)
    prepared = PREPARE[profile](model)
    train(prepared, 2)
    assert same_state(model, before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(m.training for m in model.modules())
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in prepared.parameters()
    }


@BOTH
def test_every_parameter_trains(profile: str) -> None:
    model = seeded_net()
    prepared = PREPARE[profile](model)
    names = {n for n, _ in prepared.named_parameters()}
    assert names == {
        n.replace("bn.", "conv.bn.") if n.startswith("bn.") else n
        for n, _ in model.named_parameters()
    }
    before = {n: p.detach().clone() for n, p in prepared.named_parameters()}
    train(prepared, 1)
    assert all(not torch.equal(p, before[n]) for n, p in prepared.named_parameters())


def test_convert_ends_in_evaluation_and_leaves_the_prepared_model_training() -> None:
    prepared = own(seeded_net())
    train(prepared, 2)
    again = copy.deepcopy(prepared)
    first = convert_fx(prepared)
    assert prepared.training
    assert not first.training
    assert same_state(prepared, again)
    assert not any("dropout" in str(n.target) for n in first.graph.nodes)
    torch.testing.assert_close(first(IMAGES), first(IMAGES), rtol=0, atol=0)
    assert train(prepared, 2, start=2) == train(again, 2, start=2)
    assert not torch.equal(convert_fx(prepared)(IMAGES), first(IMAGES))


def test_dropout_does_not_break_int8() -> None:
    """What dropout passes on are the integers that came in, as in evaluation."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)).train()
    prepared = own(chain)
    prepared(IMAGES)
    int8 = convert_fx(prepared)
    calls = [n for n in int8.graph.nodes if n.op == "call_function"]
    assert sum("quantize_per_tensor" in n.name for n in calls) == 1
    assert audit(int8).op_coverage == 1


def test_reference_and_kernels_agree() -> None:
    prepared = own(seeded_net())
    train(prepared, 4)
    int8 = convert_fx(prepared)
    reference = convert_to_reference_fx(prepared)
    for report in (parity(prepared, int8, (IMAGES,)), parity(reference, int8, (IMAGES,))):
        assert report.rows
        assert report.ok, str(report)
    assert "folded into 'conv'" in str(explain(prepared))
    assert "int8" in str(explain(int8))


def test_batch_norms_of_all_kinds_are_handled() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
            self.norms = nn.ModuleList(
                (
                    nn.BatchNorm2d(3, momentum=None),
                    nn.BatchNorm2d(3, affine=False),
                    nn.BatchNorm2d(3, track_running_stats=False),
                    nn.BatchNorm2d(3),
                )
            )
            self.alone = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(x))
            return F.relu(self.alone(x))

    prepared = own(Norms().train())
    fused = [n for n, m in prepared.named_modules() if isinstance(m, QatConvBn2d)]
    assert fused == ["convs.0", "convs.1", "convs.3"]
    before = int(prepared.get_submodule("convs.0.bn").num_batches_tracked)
    train_on_images = [prepared(IMAGES + step) for step in range(3)]
    assert len(train_on_images) == 3
    assert int(prepared.get_submodule("convs.0.bn").num_batches_tracked) == before + 3
    prepared.apply(disable_observer)
    int8 = convert_fx(prepared)
    expected = prepared.eval()(IMAGES)
    scale = float(prepared.get_submodule("activation_post_process_0").scale)
    assert float((int8(IMAGES) - expected).abs().max().detach()) <= 2 * scale
    assert "no running_mean" in str(explain(int8).to_markdown())


# -- switches -------------------------------------------------------------------------------------


@pytest.mark.statement("S10.3a")
@BOTH
@pytest.mark.parametrize("scripted", [False, True])
def test_switches_reach_every_fake_quantizer(profile: str, scripted: bool) -> None:
    prepared = PREPARE[profile](seeded_net())
    prepared(IMAGES)
    count = sum(isinstance(m, FakeQuantize) for m in prepared.modules())
    assert count >= 7
    model = torch.jit.script(prepared) if scripted else prepared
    for switch, buffer, value in (
        (disable_fake_quant, "fake_quant_enabled", 0),
        (disable_observer, "observer_enabled", 0),
        (enable_fake_quant, "fake_quant_enabled", 1),
        (enable_observer, "observer_enabled", 1),
    ):
        model.apply(switch)
        found = [int(b) for n, b in model.named_buffers() if n.endswith(buffer)]
        assert found == [value] * len(found)
        assert len(found) >= count


@BOTH
def test_without_rounding_it_computes_the_float_model(profile: str) -> None:
    model = seeded_net().eval()
    prepared = PREPARE[profile](model)
    prepared.apply(disable_fake_quant)
    torch.testing.assert_close(prepared(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    prepared.apply(enable_fake_quant)
    assert float((prepared(IMAGES) - model(IMAGES)).abs().max().detach()) > 1e-4


@BOTH
def test_a_scripted_model_trains_alike(profile: str) -> None:
    prepared = PREPARE[profile](seeded_net())
    other = copy.deepcopy(prepared)
    assert train(torch.jit.script(prepared), 3) == train(other, 3)


@pytest.mark.statement("S10.3a")
def test_a_scripted_model_shows_its_fake_quantizers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 5))
            self.second = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    mapping = rules(everything=compat.get_default_qat_qconfig("onednn"))
    prepared = compat.prepare_qat_fx(Two().train(), mapping, (torch.randn(5, 5),))
    text = str(torch.jit.script(prepared).graph)
    assert text.count('FakeQuantize = prim::GetAttr[name="') == 4


def test_statistics_freeze_and_thaw() -> None:
    prepared = own(seeded_net())
    train(prepared, 2)
    prepared.apply(freeze_bn_stats)
    before = prepared.get_submodule("conv.bn").running_var.clone()
    weight = prepared.conv.weight.detach().clone()
    train(prepared.train(), 2, start=2)
    assert torch.equal(prepared.get_submodule("conv.bn").running_var, before)
    assert not torch.equal(prepared.conv.weight, weight)


# -- saving and loading ---------------------------------------------------------------------------


@BOTH
def test_training_goes_on_after_a_copy_a_pickle_and_a_state_dict(profile: str) -> None:
    prepared = PREPARE[profile](seeded_net())
    train(prepared, 3)
    fresh = PREPARE[profile](seeded_net())
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    pickled = io.BytesIO()
    torch.save(prepared, pickled)
    pickled.seek(0)
    others = [copy.deepcopy(prepared), fresh, torch.load(pickled, weights_only=False)]
    int8 = CONVERT[profile](prepared)(IMAGES)
    assert all(torch.equal(CONVERT[profile](other)(IMAGES), int8) for other in others)
    losses = train(prepared, 2, start=3)
    for other in others:
        assert train(other, 2, start=3) == losses
        assert same_state(other, prepared)


def test_a_file_holds_the_result_not_the_training(tmp_path: Path) -> None:
    prepared = own(seeded_net())
    prepared(IMAGES)
    with pytest.raises(ArtifactError, match=r"'conv' \(QatConvBn2d\) trains"):
        save(prepared, tmp_path / "prepared")
    int8 = convert_fx(prepared)
    save(int8, tmp_path / "int8")
    torch.testing.assert_close(load(tmp_path / "int8")(IMAGES), int8(IMAGES), rtol=0, atol=0)


# -- configurations -------------------------------------------------------------------------------


@pytest.mark.statement("S10.3b")
def test_fake_quantize_classes_train_alike() -> None:
    results = []
    for kind in (FakeQuantize, FusedMovingAvgObsFakeQuantize):
        qconfig = get_default_qat_qconfig("x86")
        made = QConfig(
            kind.with_args(**qconfig.activation.arguments),
            kind.with_args(**qconfig.weight.arguments),
        )
        prepared = prepare_qat_fx(seeded_net(), {"": made}, (IMAGES,))
        results.append((train(prepared, 4), prepared))
    assert results[0][0] == results[1][0]
    assert same_state(results[0][1], results[1][1])


def test_an_empty_mapping_trains_in_floating_point() -> None:
    model = seeded_net()
    for prepared in (
        compat.prepare_qat_fx(model, QConfigMapping(), (IMAGES,)),
        prepare_qat_fx(model, QConfigMapping(), (IMAGES,)),
    ):
        assert not any(isinstance(m, FakeQuantize) for m in prepared.modules())
        assert train(prepared, 2) == train(copy.deepcopy(model), 2)


def test_a_layer_without_a_qconfig_stays_in_float() -> None:
    mapping = get_default_qat_qconfig_mapping("x86").set_module_name("body", None)
    prepared = prepare_qat_fx(seeded_net(), mapping, (IMAGES,))
    assert type(prepared.body) is nn.Conv2d
    train(prepared, 2)
    assert "no qconfig: module_name 'body'" in explain(convert_fx(prepared)).to_markdown()


def test_shared_parameters_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).train()
    model[2].weight = model[0].weight
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    prepared = own(model, (x,))
    assert len(list(prepared.parameters())) == 3
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared(x).square().sum().backward()
    optimizer.step()
    assert prepared.get_submodule("0").weight is prepared.get_submodule("2").weight
    prepared.apply(disable_observer)
    expected = prepared.eval()(x)
    bound = float(expected.abs().max().detach()) / 50
    torch.testing.assert_close(convert_fx(prepared)(x), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("linear", [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 4), nn.ReLU())])
def test_dynamic(linear: nn.Module) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for prepare, convert in (
        (prepare_qat_fx, convert_fx),
        (compat.prepare_qat_fx, compat.convert_fx),
    ):
        prepared = prepare(linear.train(), rules(everything=default_dynamic_qat_qconfig), (x,))
        prepared(x)
        int8 = convert(prepared)
        assert any(
            "linear" in str(n.target) and "dynamic" in str(n.target) for n in int8.graph.nodes
        )
        expected = prepared.eval()(x)
        # Both quantize x by its own range, and may round it to different neighbours.
        step = float(x.max() - x.min()) / 255
        weight = next(p for n, p in linear.named_parameters() if n.endswith("weight")).detach()
        bound = step * float(weight.abs().sum(1).max())
        torch.testing.assert_close(int8(x), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("qconfig", "levels"),
    [(default_embedding_qat_qconfig, 255), (default_embedding_qat_qconfig_4bit, 15)],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("seed", [0, 84])
def test_tables(
    kind: type[nn.Embedding] | type[nn.EmbeddingBag], qconfig: QConfig, levels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    table = kind(10, 4)
    ids = torch.tensor([[1, 2], [9, 0]] if kind is nn.Embedding else [[1], [2], [9], [0]])
    for prepare, convert in (
        (prepare_qat_fx, convert_fx),
        (compat.prepare_qat_fx, compat.convert_fx),
    ):
        model = nn.Sequential(copy.deepcopy(table)).train()
        prepared = prepare(model, rules((type(table), qconfig)), (ids,))
        optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            prepared(ids).square().sum().backward()
            optimizer.step()
        expected = prepared.eval()(ids)
        fake = next(m for m in prepared.modules() if isinstance(m, FakeQuantize))
        scale, zero_point = (
            t[ids].reshape(*expected.shape[:-1], 1) for t in fake.calculate_qparams()
        )
        weight = next(p for p in prepared.parameters() if p.shape == (10, 4)).detach()
        steps = weight[ids].reshape(expected.shape) / scale + zero_point
        int8 = convert(prepared)
        assert [b.dtype for n, b in int8.named_buffers() if n.endswith("weight")] == [torch.uint8]
        # 4-bit kernels keep scales and offsets in float16, of 11 bits: levels move by at most 15
        # rounded scales and an offset, and what lies as near to a tie may round the other way.
        moved = 0.0 if levels == 255 else 2**-11 * (15 + float(zero_point.abs().max()))
        is_tie = (steps - steps.floor() - 0.5).abs() <= moved
        bound = 1e-6 + scale * (moved + is_tie)
        assert bool(((int8(ids) - expected).abs() <= bound).all())
        assert float(is_tie.float().mean()) < 0.25


@pytest.mark.statement("S8.5b")
def test_a_table_with_a_wrong_qconfig() -> None:
    model = nn.Sequential(nn.Embedding(10, 4)).train()
    mapping = get_default_qat_qconfig_mapping("x86")
    ids = (torch.tensor([1]),)
    words = r"Embedding weights requires a qscheme of torch.per_channel_affine_float_qparams"
    with pytest.raises(AssertionError, match=words):
        compat.prepare_qat_fx(model, mapping, ids)
    assert type(prepare_qat_fx(model, mapping, ids).get_submodule("0")) is nn.Embedding


@pytest.mark.statement("S4.2b")
def test_transposed_convolutions_train_fused_but_in_compat() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)).train()
    words = r"Fusing ConvTranspose\+BatchNorm not yet supported in QAT\."
    with pytest.raises(ConfigError, match=words):
        compat.prepare_qat_fx(model, get_default_qat_qconfig_mapping("qnnpack"), (IMAGES,))
    prepared = own(model)
    train(prepared, 2)
    prepared.apply(disable_observer)
    expected = prepared.eval()(IMAGES)
    bound = float(expected.abs().max().detach()) / 50
    torch.testing.assert_close(convert_fx(prepared)(IMAGES), expected, rtol=0, atol=bound)


@pytest.mark.statement("S2.1a")
def test_what_is_listed_as_non_traceable_stays_as_it_is() -> None:
    model = seeded_net()
    model.add_module("conv", nn.Sequential(model.conv))
    custom = compat.PrepareCustomConfig().set_non_traceable_module_names(["conv"])
    mapping = compat.get_default_qat_qconfig_mapping("onednn")
    prepared = compat.prepare_qat_fx(model, mapping, (IMAGES,), custom)
    assert type(prepared.get_submodule("conv.0")) is nn.Conv2d
    prepared(IMAGES)
    assert type(compat.convert_fx(prepared).get_submodule("conv.0")) is nn.Conv2d


# -- what is told ---------------------------------------------------------------------------------


def test_functions_traced_in_training_mode_are_told() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(torch.matmul(x, x), 0.5, self.training)

    with pytest.warns(ConfigWarning, match=r"1 function call\(s\) were traced with training=True"):
        prepare_qat_fx(Functional().train(), None, (torch.randn(3, 3),))
    prepare_qat_fx(Functional().eval(), None, (torch.randn(3, 3),))


def test_example_inputs_are_required() -> None:
    with pytest.raises(MissingExampleInputsError, match=r"prepare_qat_fx\(\) misses"):
        prepare_qat_fx(Net())
    with pytest.raises(TypeError):
        compat.prepare_qat_fx(Net(), {})  # type: ignore[call-arg]  # left out on purpose


def test_a_prepared_model_is_not_prepared_again() -> None:
    prepared = own(seeded_net())
    with pytest.raises(ConfigError, match="prepare_qat_fx got a model that is prepared already"):
        prepare_qat_fx(prepared, None, (IMAGES,))


def test_a_graph_module_will_do() -> None:
    prepared = own(fx.symbolic_trace(seeded_net()))
    assert isinstance(prepared.conv, QatConvBn2d)
    assert train(prepared, 2) == train(own(seeded_net()), 2)
