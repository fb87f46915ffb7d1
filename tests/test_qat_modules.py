"""Modules that train with rounded weights: values, gradients, statistics and the fold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.fake_quantize import FakeQuantize, default_weight_fake_quant
from fxquant.observers import MovingAveragePerChannelMinMaxObserver
from fxquant.qat_modules import (
    FLOAT_BY_QAT,
    QatBatchNormed,
    TrainedQParams,
    freeze_bn_stats,
    holds_training_modules,
    training_form,
    update_bn_stats,
)
from fxquant.qconfig import spec_of


def _seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


WEIGHTED: dict[str, tuple[nn.Module, nn.Module | None, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), _seeded(3, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), _seeded(2, 3, 7, 7)),
    "conv2d reflect": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4, momentum=None),
        _seeded(2, 3, 6, 6),
    ),
    "conv3d": (
        nn.Conv3d(2, 4, 3, bias=False),
        nn.BatchNorm3d(4, affine=False),
        _seeded(2, 2, 5, 5, 5),
    ),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), _seeded(3, 4, 9)),
    "transposed2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(6),
        _seeded(2, 4, 5, 5),
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), _seeded(2, 2, 4, 4, 4)),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), _seeded(7, 5)),
    "embedding": (nn.Embedding(7, 4, padding_idx=2), None, torch.tensor([[1, 2], [6, 0]])),
    "embedding_bag": (nn.EmbeddingBag(7, 4, mode="sum"), None, torch.tensor([[1, 2], [6, 0]])),
}


def lively(name: str, *, training: bool) -> tuple[nn.Module, Any, Tensor]:
    module, norm, x = WEIGHTED[name]
    module, norm = copy.deepcopy(module), copy.deepcopy(norm)
    generator = torch.Generator().manual_seed(0)
    if norm is not None:
        norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        norm.train(training)
    return module.train(training), norm, x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WEIGHTED)
def test_without_a_fake_quantizer_it_computes_what_the_two_modules_do(
    name: str, training: bool
) -> None:
    module, norm, x = lively(name, training=training)
    made = training_form(copy.deepcopy(module), copy.deepcopy(norm))
    expected = module(x) if norm is None else norm(module(x))
    torch.testing.assert_close(made(x), expected, rtol=0, atol=0)
    assert isinstance(made, type(module))
    assert FLOAT_BY_QAT[type(made)] is type(module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [n for n, (_, norm, _) in WEIGHTED.items() if norm is not None])
def test_scaling_by_running_statistics_changes_nothing_but_the_rounding(
    name: str, training: bool
) -> None:
    module, norm, x = lively(name, training=training)
    made = training_form(copy.deepcopy(module), copy.deepcopy(norm))
    made.weight_fake_quant = default_weight_fake_quant()
    made.weight_fake_quant.disable_fake_quant()
    # Multiplying and dividing by one factor costs a few float32 roundings of values near 1.
    torch.testing.assert_close(made(x), norm(module(x)), rtol=1e-5, atol=1e-5)
    assert isinstance(made, QatBatchNormed)
    torch.testing.assert_close(made.bn.running_mean, norm.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.bn.running_var, norm.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, (_, norm, _) in WEIGHTED.items() if norm is not None])
def test_the_rounded_weight_is_the_folded_one(name: str) -> None:
    """In evaluation the module computes with the weight that convert keeps, rounded.

    It scales by ``g / sqrt(v)`` and folds by ``g * rsqrt(v)``, as torch.ao does, so the two differ
    by float32 roundings, and their integers where a value is within these of a tie.
    """
    module, norm, x = lively(name, training=False)
    made = training_form(module, norm)
    made.weight_fake_quant = FakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        -128,
        127,
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    made(x)
    made.weight_fake_quant.disable_observer()
    plain = made.to_float()
    assert type(plain) is FLOAT_BY_QAT[type(made)]
    assert not holds_training_modules(plain)
    seen: list[tuple[Tensor, Tensor]] = []
    made.weight_fake_quant.register_forward_hook(lambda _, i, o: seen.append((i[0], o)))
    expected = made(x)
    scaled, rounded = seen[0]
    torch.testing.assert_close(plain.weight, scaled, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        assert plain.weight is not made.weight
        kept = made.weight_fake_quant(plain.weight)
        other = kept != rounded
        assert other.float().mean() < 0.05
        halfway = (kept + rounded)[other] / 2
        torch.testing.assert_close(scaled[other], halfway, rtol=1e-5, atol=1e-7)
        plain.weight.copy_(rounded)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_definition() -> None:
    module, norm, x = lively("conv2d", training=True)
    made = training_form(copy.deepcopy(module), copy.deepcopy(norm))
    made.weight_fake_quant = default_weight_fake_quant()
    made(x).square().sum().backward()

    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    scaled = module.weight * factor.reshape(-1, 1, 1, 1)
    rounded = default_weight_fake_quant()(scaled)
    y = F.conv2d(x, rounded, stride=module.stride) / factor.reshape(1, -1, 1, 1)
    norm(y + module.bias.reshape(1, -1, 1, 1)).square().sum().backward()
    torch.testing.assert_close(made.weight.grad, module.weight.grad, rtol=0, atol=0)
    assert isinstance(made, QatBatchNormed)
    torch.testing.assert_close(made.bn.weight.grad, norm.weight.grad, rtol=0, atol=0)
    torch.testing.assert_close(made.bn.bias.grad, norm.bias.grad, rtol=0, atol=0)


def test_a_channel_of_gamma_zero_trains() -> None:
    """torch.ao divides by gamma: zero_init_residual gives NaN there."""
    module, norm, x = lively("conv2d", training=True)
    with torch.no_grad():
        norm.weight[1] = 0
    made = training_form(module, norm)
    made.weight_fake_quant = default_weight_fake_quant()
    y = made(x)
    torch.testing.assert_close(y[:, 1], norm.bias[1].expand_as(y[:, 1]), rtol=0, atol=0)
    (y * _seeded(*y.shape)).sum().backward()
    assert norm.weight.grad is not None
    assert float(norm.weight.grad[1].detach()) != 0
    assert torch.isfinite(module.weight.grad).all()
    assert not torch.count_nonzero(made.final_parameters()[0][1])


def test_frozen_statistics_stay_through_train_and_eval() -> None:
    module, norm, x = lively("conv2d", training=True)
    made = training_form(module, norm)
    made.weight_fake_quant = default_weight_fake_quant()
    model = nn.Sequential(made)
    model.apply(freeze_bn_stats)
    before = norm.running_mean.clone()
    for mode in (True, False, True):
        model.train(mode)
        assert (norm.training, made.training) == (False, mode)
    model(x)
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)
    model.apply(update_bn_stats)
    assert norm.training
    model(x)
    assert not torch.equal(norm.running_mean, before)
    model.eval()
    model.apply(update_bn_stats)
    assert not norm.training


@pytest.mark.parametrize("name", WEIGHTED)
def test_scripts(name: str) -> None:
    module, norm, x = lively(name, training=True)
    made = training_form(module, norm)
    made.weight_fake_quant = default_weight_fake_quant()
    expected = copy.deepcopy(made)(x)
    torch.testing.assert_close(torch.jit.script(made)(x), expected, rtol=0, atol=0)


def test_output_size_of_a_transposed_convolution() -> None:
    module = nn.ConvTranspose2d(2, 3, 3, stride=2)
    made = training_form(copy.deepcopy(module))
    x = _seeded(1, 2, 4, 4)
    torch.testing.assert_close(
        made(x, output_size=[10, 10]), module(x, output_size=[10, 10]), rtol=0, atol=0
    )


def test_it_is_the_module_it_was_with_its_attributes_and_hooks() -> None:
    module = nn.Linear(2, 3)
    module.note = "kept"  # type: ignore[assignment]  # users write what they like
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    made = training_form(module)
    assert made.weight is module.weight
    assert made.note == "kept"
    made(torch.ones(1, 2))
    assert calls == [1]
    made.weight_fake_quant = default_weight_fake_quant()
    assert "weight_fake_quant" not in module._modules
    assert made.to_float().weight is module.weight


def test_trained_parameters_are_read_like_an_observer() -> None:
    spec = default_weight_fake_quant().spec
    factory = TrainedQParams.with_args(
        spec=spec, scale=torch.tensor(0.5), zero_point=torch.tensor(0, dtype=torch.int32)
    )
    read = spec_of(factory)
    assert read is not None
    assert read.spec == spec
    made = factory()
    assert made(torch.full((2,), 1e6)).tolist() == [1e6, 1e6]
    assert float(made.qparams().scale) == 0.5
