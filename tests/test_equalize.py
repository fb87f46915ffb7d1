"""equalize: per-tensor weights on the float model that it gives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fxquant import compat
from fxquant.calibration import calibrate
from fxquant.equalize import equalize
from fxquant.errors import ConfigError, TrainingModeError
from fxquant.models_zoo.metrics import sqnr_db
from fxquant.observers import default_weight_observer
from fxquant.qconfig import QConfig, get_default_qconfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.quantize_fx import convert_fx, prepare_fx


def separable() -> nn.Sequential:
    """Depthwise and pointwise layers whose batch-norms leave channels of very different ranges."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU()]
        layers += [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, -4, 4)
            module.running_var.exp_()
    return model.eval()


X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def noise(model: nn.Module, reference: Tensor) -> float:
    default = get_default_qconfig("x86")
    qconfig = QConfig(activation=default.activation, weight=default_weight_observer)
    prepared = prepare_fx(model, QConfigMapping().set_global(qconfig), (X,))
    return sqnr_db(reference, convert_fx(calibrate(prepared, [X], progress=False))(X))


def test_gains_many_decibels() -> None:
    model = separable()
    before = copy.deepcopy(model.state_dict())
    expected = model(X).detach()
    equalized = equalize(model, (X,))
    torch.testing.assert_close(equalized(X).detach(), expected, rtol=1e-4, atol=1e-5)
    assert noise(equalized, expected) > noise(model, expected) + 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_example_inputs() -> None:
    model = separable()
    torch.testing.assert_close(equalize(model)(X), model(X), rtol=1e-4, atol=1e-5)


def test_wrong_choice() -> None:
    with pytest.raises(ConfigError, match="relu6 needs to be one of keep, relu, got 'clip'"):
        equalize(separable(), (X,), relu6="clip")


def test_training_models_are_refused() -> None:
    with pytest.raises(TrainingModeError, match="Fusion only for eval"):
        equalize(separable().train(), (X,))


def test_the_error_of_the_other_api_points_here() -> None:
    mapping = compat.get_default_qconfig_mapping("onednn")
    with pytest.raises(ConfigError, match=r"fxquant\.equalize"):
        compat.prepare_fx(separable(), mapping, (X,), None, {"": None})


def test_spread_of_ranges_shrinks() -> None:
    def spread(weight: Tensor) -> float:
        ranges = weight.detach().abs().flatten(1).amax(1)
        return math.log2(float(ranges.max() / ranges.min()))

    equalized = equalize(separable(), (X,))
    folded = separable()
    norm, conv = folded[4], folded[3]
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(conv, nn.Conv2d)
    assert norm.running_var is not None
    before = spread(conv.weight * (norm.running_var + norm.eps).rsqrt().reshape(-1, 1, 1, 1))
    assert spread(equalized.get_parameter("3.weight")) < before / 1.5
