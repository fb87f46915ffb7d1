"""Fake quantizers: values and gradients from the definition, switches, scripting, torch.ao."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant.fake_quantize as module
from fxquant.errors import ConfigError, ConfigWarning, NonFiniteStatisticError
from fxquant.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_fused_act_fake_quant,
    default_histogram_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PartialFactory,
    PlaceholderObserver,
)
from fxquant.specs import fake_quantize

DEFAULTS = {
    name: value
    for name, value in vars(module).items()
    if isinstance(value, PartialFactory) and "fake_quant" in name
}
defaults = pytest.mark.parametrize("factory", DEFAULTS.values(), ids=DEFAULTS)
SCRIPTABLE = {name: f for name, f in DEFAULTS.items() if "histogram" not in name}


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator) * 2**k + 0.2 for k in range(count)]


# ----------------------------------------------------------------------- values and gradients


@defaults
def test_values_are_those_of_the_definition(factory: PartialFactory) -> None:
    fake = factory()
    for x in batches():
        out = fake(x)
        qparams = fake.qparams()
        qparams.validate()
        # No value of these is within half an ulp of a tie, where the kernels part.
        expected = fake_quantize(x, qparams)
        if qparams.spec.has_float_zero_point:
            # The kernel rounds (q - zero_point) * scale once less: a float32 step of the largest.
            largest = qparams.scale * (qparams.zero_point.abs() + qparams.spec.quant_max)
            assert float((out - expected).abs().max()) <= float(largest.max()) * 2**-23
        else:
            assert torch.equal(out, expected)


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    fake = FakeQuantize(MinMaxObserver)
    fake(torch.tensor([-1.0, 2.0]))
    fake.disable_observer()
    x = torch.tensor([-5.0, -1.0, -0.3, 0.0, 1.7, 2.0, 9.0], requires_grad=True)
    fake(x).backward(torch.arange(1.0, 8.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


def test_per_channel_gradients_stop_channel_by_channel() -> None:
    fake = default_per_channel_weight_fake_quant()
    fake(torch.tensor([[-1.0, 1.0], [-10.0, 10.0]]))
    fake.disable_observer()
    x = torch.full((2, 2), 5.0, requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    fake = default_fake_quant()
    x = torch.randn(8).to(dtype).requires_grad_()
    out = fake(x)
    out.sum().backward()
    assert (out.dtype, fake.scale.dtype) == (dtype, torch.float32)
    assert torch.equal(out, fake_quantize(x.detach(), fake.qparams()).to(dtype))


def test_empty_tensors_pass() -> None:
    fake = default_fake_quant()
    assert fake(torch.empty(0, 3)).shape == (0, 3)
    assert not fake.was_observed


def test_non_finite_values_name_the_fake_quantizer() -> None:
    fake = default_fake_quant()
    fake.owner = "weight of 'conv'"
    with pytest.raises(NonFiniteStatisticError, match="observer weight of 'conv' got 1 NaN"):
        fake(torch.tensor([1.0, float("nan")]))


def test_the_fused_name_trains_to_the_very_same_numbers() -> None:
    results = []
    for kind in (FakeQuantize, FusedMovingAvgObsFakeQuantize):
        torch.manual_seed(0)
        model = nn.Sequential(
            kind(quant_min=0, quant_max=255), nn.Linear(3, 5), kind(quant_min=0, quant_max=255)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append((model(batches()[0]), model[1].weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ----------------------------------------------------------------------------------- switches


def test_switches() -> None:
    fake = default_fake_quant()
    x, y = torch.randn(50), torch.randn(50) * 10
    fake.disable_fake_quant()
    assert fake(x) is x
    fake.enable_fake_quant()
    scale = fake.scale.clone()
    fake.disable_observer()
    fake(y)
    assert torch.equal(fake.scale, scale)
    fake.enable_observer()
    fake(y)
    assert not torch.equal(fake.scale, scale)


@pytest.mark.parametrize("script", [False, True], ids=["plain", "scripted"])
def test_apply_reaches_every_fake_quantizer(script: bool) -> None:
    plain = nn.Sequential(default_fake_quant(), nn.Sequential(default_weight_fake_quant()))
    model = torch.jit.script(plain) if script else plain
    fakes = [model[0], model[1][0]] if not script else [*model.children()]
    switches = [
        (disable_observer, "observer_enabled", 0),
        (enable_observer, "observer_enabled", 1),
        (disable_fake_quant, "fake_quant_enabled", 0),
        (enable_fake_quant, "fake_quant_enabled", 1),
    ]
    for function, name, value in switches:
        model.apply(function)
        buffers = {k: v for k, v in model.named_buffers() if k.endswith(name)}
        assert len(buffers) == len(fakes) == 2
        assert all(int(buffer) == value for buffer in buffers.values())
    x = torch.randn(50)
    model.apply(disable_fake_quant)
    assert torch.equal(model(x), x)


def test_apply_reaches_plain_observers() -> None:
    model = nn.Sequential(MinMaxObserver(), default_fake_quant())
    model.apply(disable_observer)
    model(torch.randn(5))
    assert not any(child.was_observed for child in model)
    model.apply(enable_observer)
    model(torch.randn(5))
    assert all(child.was_observed for child in model)


def test_switching_the_fake_quantizer_switches_its_observer() -> None:
    fake = default_fake_quant()
    fake.apply(disable_observer)  # reaches the inner observer as well
    fake.enable_observer()
    fake(torch.randn(5))
    assert fake.was_observed


# --------------------------------------------------------------------------------- persistence


@defaults
def test_state_dict_round_trip_is_strict(factory: PartialFactory) -> None:
    fake = factory()
    for x in batches():
        fake(x)
    fake.disable_observer()
    file = io.BytesIO()
    torch.save(fake.state_dict(), file)
    file.seek(0)
    fresh = factory()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = torch.randn(4, 3)
    assert torch.equal(fresh(x), fake(x))
    assert int(fresh.observer_enabled) == 0
    assert torch.equal(copy.deepcopy(fake)(x), fake(x))


@pytest.mark.parametrize("factory", SCRIPTABLE.values(), ids=SCRIPTABLE)
def test_scripted_is_the_same(factory: PartialFactory) -> None:
    plain = factory()
    scripted = torch.jit.script(nn.Sequential(factory()))
    for x in batches():
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = scripted(a), plain(b)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_parameters_in_use_are_those_of_the_last_observation() -> None:
    fake = FakeQuantize(MinMaxObserver)
    fake(torch.tensor([0.0, 1.0]))
    scale = float(fake.qparams().scale)
    fake.activation_post_process(torch.tensor([0.0, 9.0]))  # behind its back
    assert float(fake.qparams().scale) == scale
    assert float(fake.calculate_qparams()[0]) == pytest.approx(9 / 255)


def test_merged_fake_quantizers_have_seen_everything() -> None:
    a, b = (FakeQuantize(MinMaxObserver) for _ in range(2))
    a(torch.tensor([0.0, 1.0]))
    b(torch.tensor([-3.0, 0.5]))
    a.merge_from([b])
    whole = FakeQuantize(MinMaxObserver)
    whole(torch.tensor([-3.0, 1.0]))
    assert torch.equal(a.scale, whole.scale)
    assert torch.equal(a.zero_point, whole.zero_point)


# --------------------------------------------------------------------------------- arguments


def test_the_surface_of_torch_ao() -> None:
    fake = default_per_channel_weight_fake_quant()
    assert (fake.quant_min, fake.quant_max, fake.ch_axis) == (-128, 127, 0)
    assert (fake.dtype, fake.qscheme) == (torch.int8, torch.per_channel_symmetric)
    assert fake.is_per_channel
    assert not fake.is_dynamic
    assert isinstance(fake, FakeQuantizeBase)
    assert fake.spec.short() == "int8 per-channel(0) sym -128..127"
    assert "int8 per-channel(0) sym -128..127" in repr(fake)
    half = FakeQuantize(quant_min=0, quant_max=255, reduce_range=True)
    assert (half.quant_min, half.quant_max) == (0, 127)


def test_float_zero_points_stay_floats() -> None:
    for factory in (default_embedding_fake_quant, default_embedding_fake_quant_4bit):
        fake = factory()
        fake(torch.randn(6, 4))
        assert fake.zero_point.dtype == torch.float32
        assert fake.scale.shape == (6,)


def test_fixed_parameters_do_not_move() -> None:
    fake = default_fixed_qparams_range_neg1to1_fake_quant()
    fake(torch.randn(100) * 9)
    assert (fake.scale.tolist(), fake.zero_point.tolist()) == ([1 / 128], [128])
    assert fake.spec.fixed == (1 / 128, 128)


def test_dynamic_looks_at_the_newest_batch() -> None:
    with pytest.warns(ConfigWarning, match="averaging_constant is set to 1, not 0.01"):
        fake = FakeQuantize(is_dynamic=True)
    fake(torch.tensor([0.0, 100.0]))
    fake(torch.tensor([0.0, 1.0]))
    assert float(fake.scale) == pytest.approx(1 / 255)
    assert fake.spec.is_dynamic


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FakeQuantize(PlaceholderObserver), "got PlaceholderObserver"),
        (lambda: FixedQParamsFakeQuantize(MinMaxObserver), "needs a FixedQParamsObserver"),
        (
            lambda: FusedMovingAvgObsFakeQuantize(HistogramObserver),
            "needs a moving-average observer, got HistogramObserver",
        ),
    ],
)
def test_observers_that_do_not_fit_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_any_collecting_observer_fits() -> None:
    for observer in (MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver):
        fake = FakeQuantize(observer.with_args(quant_min=0, quant_max=15))
        fake(torch.randn(100))
        assert fake.quant_max == 15
    assert default_histogram_fake_quant()(torch.randn(9)).shape == (9,)
    assert default_fused_act_fake_quant().activation_post_process.averaging_constant == 0.01


# -------------------------------------------------------------------------------------- peer


@pytest.mark.peer
@pytest.mark.parametrize(
    ("observer", "arguments"),
    [
        ("MovingAverageMinMaxObserver", {"quant_min": 0, "quant_max": 255}),
        ("MovingAverageMinMaxObserver", {"reduce_range": True}),
        ("MinMaxObserver", {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}),
        (
            "MovingAveragePerChannelMinMaxObserver",
            {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0},
        ),
        (
            "MovingAveragePerChannelMinMaxObserver",
            {"qscheme": torch.per_channel_affine_float_qparams, "averaging_constant": 1},
        ),
    ],
)
def test_values_and_gradients_are_those_of_torch_ao(
    observer: str, arguments: dict[str, Any]
) -> None:
    peer = importlib.import_module("torch.ao.quantization")
    ours = FakeQuantize(getattr(module, observer, MinMaxObserver), **arguments)
    theirs = peer.FakeQuantize(getattr(peer, observer), **arguments)
    for x in batches():
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, other = ours(a), theirs(b)
        assert torch.equal(mine, other)
        mine.square().sum().backward()
        other.square().sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(ours.scale, theirs.scale)
        assert ours.zero_point.tolist() == theirs.zero_point.tolist()


@pytest.mark.peer
def test_every_default_of_torch_ao_is_here() -> None:
    peer = importlib.import_module("torch.ao.quantization.fake_quantize")
    names = {n for n in vars(peer) if n.startswith(("default_", "fused_")) and "fake" in n}
    assert {name for name in names if not hasattr(module, name)} == set()
