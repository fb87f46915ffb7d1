"""Fragile layers that are known beforehand, on real networks with per-tensor weights.

Half of a layer's output channels are multiplied by a factor and the input channels of the layer
behind it divided by it, so the network computes what it did. With one scale for all weights, the
rescaled layer loses its small channels, and its successor those of its weights and of its input
(the activation between the two). Each case names the two layers that have to come first.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import QConfig, analyze_sensitivity, default_weight_observer, get_default_qconfig
from fxquant.models_zoo.registry import load
from fxquant.sensitivity.report import SensitivityReport

PER_TENSOR = QConfig(
    activation=get_default_qconfig("x86").activation, weight=default_weight_observer
)
METRICS = ("sqnr", "mse", "cosine", "kl")
OPTIONS: dict[str, Any] = {
    "qconfig_mapping": {"": PER_TENSOR},
    "attribution": None,
    "cures": False,
    "costs": False,
}

# network -> for each case the batch-norm that is rescaled, and the layers expected first: the
# rescaled convolution and its successor
RESNET20 = [
    ("layer1.1.bn1", {"layer1.1.conv1", "layer1.1.conv2"}),
    ("layer2.1.bn1", {"layer2.1.conv1", "layer2.1.conv2"}),
    ("layer3.1.bn1", {"layer3.1.conv1", "layer3.1.conv2"}),
]
RESNET56 = [
    ("layer1.4.bn1", {"layer1.4.conv1", "layer1.4.conv2"}),
    # Later blocks of this stage change what classes come out by less than chance: found by SQNR,
    # MSE and cosine, but not by KL.
    ("layer2.1.bn1", {"layer2.1.conv1", "layer2.1.conv2"}),
    ("layer3.6.bn1", {"layer3.6.conv1", "layer3.6.conv2"}),
]


def plant(model: nn.Module, batch_norm: str, successor: str, factors: Tensor) -> None:
    """Rescale the channels between two layers."""
    rescaled, behind = model.get_submodule(batch_norm), model.get_submodule(successor)
    assert isinstance(rescaled, nn.BatchNorm2d)
    assert isinstance(behind, nn.Conv2d)
    with torch.no_grad():
        rescaled.weight *= factors
        rescaled.bias *= factors
        behind.weight /= factors.reshape(1, -1, 1, 1)


def half(count: int, seed: int, factor: float) -> Tensor:
    """``factor`` for half of the channels, 1 for the others."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, generator=generator) < 0.5
    return torch.where(chosen, factor, 1.0)


def planted(model: nn.Module, cases: list[tuple[str, set[str]]]) -> nn.Module:
    """A copy of ``model``, a ResNet of CIFAR-10, with every case planted."""
    made = copy.deepcopy(model)
    for seed, (batch_norm, _) in enumerate(cases):
        channels = made.get_submodule(batch_norm).weight.numel()  # type: ignore[union-attr, operator]  # a batch-norm's
        plant(made, batch_norm, batch_norm.replace("bn1", "conv2"), half(channels, seed, 100.0))
    return made


def check_function(model: nn.Module, made: nn.Module, data: list[Tensor]) -> None:
    """The rescaled network computes what the given one did, up to float rounding."""
    with torch.no_grad():
        for x in data:
            expected, found = model(x), made(x)
            assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()


def check_first(report: SensitivityReport, expected: set[str]) -> None:
    for metric in METRICS:
        first = report.ranking(metric)[: len(expected)]
        assert set(first) == expected, (metric, first)


def cifar(name: str, data_dir: Path, count: int) -> tuple[nn.Module, list[Tensor]]:
    entry = load(name, data_dir=data_dir)
    return entry.model, list(entry.calibration[0][:count].split(16))


def test_three_at_once_are_found_one_at_a_time(data_dir: Path) -> None:
    model, data = cifar("resnet20_cifar10", data_dir, 16)
    made = planted(model, RESNET20)
    check_function(model, made, data)
    report = analyze_sensitivity(made, data, **OPTIONS)
    check_first(report, set.union(*(expected for _, expected in RESNET20)))


def test_one_is_found_by_all_but_one(data_dir: Path) -> None:
    model, data = cifar("resnet20_cifar10", data_dir, 16)
    made = planted(model, RESNET20[1:2])
    check_function(model, made, data)
    report = analyze_sensitivity(made, data, direction="all_but_one", **OPTIONS)
    check_first(report, RESNET20[1][1])


@pytest.mark.slow
def test_resnet56_three_at_once(data_dir: Path) -> None:
    model, data = cifar("resnet56_cifar10", data_dir, 48)
    made = planted(model, RESNET56)
    check_function(model, made, data)
    report = analyze_sensitivity(made, data, **OPTIONS)
    check_first(report, set.union(*(expected for _, expected in RESNET56)))


@pytest.mark.slow
@pytest.mark.parametrize("case", RESNET56, ids=lambda case: case[0])
def test_resnet56_one_by_all_but_one(case: tuple[str, set[str]], data_dir: Path) -> None:
    model, data = cifar("resnet56_cifar10", data_dir, 48)
    made = planted(model, [case])
    check_function(model, made, data)
    report = analyze_sensitivity(made, data, direction="all_but_one", **OPTIONS)
    check_first(report, case[1])


# EfficientNet-Lite0: where nothing, or a ReLU6 that is not reached, lies between the two layers.
# The last number is the factor for all-but-one: 100 at the first pair leaves nothing of the network
# (-2.7 dB), and then the rescaled layer in FP32 saves nothing either, as its successor loses all.
LITE0 = [
    (
        "_blocks.0._bn2",
        "_blocks.1._expand_conv",
        {"_blocks.0._project_conv", "_blocks.1._expand_conv"},
        16.0,
    ),
    (
        "_blocks.8._bn1",
        "_blocks.8._project_conv",
        {"_blocks.8._depthwise_conv", "_blocks.8._project_conv"},
        100.0,
    ),
    ("_blocks.15._bn2", "_conv_head", {"_blocks.15._project_conv", "_conv_head"}, 100.0),
]


def lite0(data_dir: Path, count: int) -> tuple[nn.Module, list[Tensor]]:
    entry = load("efficientnet_lite0", data_dir=data_dir)
    return entry.model, list(entry.calibration[0][:count].split(8))


def planted_lite0(
    model: nn.Module, data: list[Tensor], cases: list[tuple[str, str, set[str], float]]
) -> nn.Module:
    """A copy of ``model`` with every case planted."""
    made = copy.deepcopy(model)
    for seed, (batch_norm, successor, _, factor) in enumerate(cases):
        norm = made.get_submodule(batch_norm)
        assert isinstance(norm, nn.BatchNorm2d)
        if batch_norm.endswith("_bn2"):  # linear
            plant(made, batch_norm, successor, half(norm.num_features, seed, factor))
            continue
        # relu6(x / 100) is relu6(x) / 100 for channels that never reach 6
        largest = torch.zeros(norm.num_features)

        def watch(_: nn.Module, __: Any, value: Tensor, largest: Tensor = largest) -> None:
            torch.maximum(largest, value.amax((0, 2, 3)), out=largest)

        handle = norm.register_forward_hook(watch)
        with torch.no_grad():
            for x in data:
                made(x)
        handle.remove()
        assert int((largest < 6).sum()) > norm.num_features // 2
        factors = torch.where(largest < 6, half(norm.num_features, seed, 1 / factor), 1.0)
        plant(made, batch_norm, successor, factors)
    return made


@pytest.mark.slow
def test_lite0_three_at_once(data_dir: Path) -> None:
    model, data = lite0(data_dir, 16)
    made = planted_lite0(model, data, [(*case[:3], 100.0) for case in LITE0])
    check_function(model, made, data)
    report = analyze_sensitivity(made, data, **OPTIONS)
    check_first(report, set.union(*(expected for _, _, expected, _ in LITE0)))


@pytest.mark.slow
@pytest.mark.parametrize("case", LITE0, ids=lambda case: case[0])
def test_lite0_one_by_all_but_one(case: tuple[str, str, set[str], float], data_dir: Path) -> None:
    model, data = lite0(data_dir, 16)
    made = planted_lite0(model, data, [case])
    check_function(model, made, data)
    report = analyze_sensitivity(made, data, direction="all_but_one", **OPTIONS)
    check_first(report, case[2])


@pytest.mark.slow
def test_mobilenet_names_the_depthwise_layers_their_spread_and_the_cure(data_dir: Path) -> None:
    entry = load("mobilenetv2_folded", data_dir=data_dir)
    data = list(entry.calibration[0][:16].split(8))
    report = analyze_sensitivity(entry.model, data, qconfig_mapping={"": PER_TENSOR})
    records = {record["layer"]: record for record in report.records()}
    worst = report.ranking()[:5]
    assert all(report[name].layer.kind == "depthwise conv2d" for name in worst)
    for name in worst:
        ranges = report[name].ranges
        assert ranges.per_tensor
        assert ranges.channel_spread is not None
        assert ranges.channel_spread > 30
        assert report[name].parts["weight"].sqnr < report[name].parts["activation"].sqnr - 10
        assert "channel ranges of the weight spread 1:" in records[name]["reason"]
        assert "per-channel weights" in records[name]["verdict"]
        before = report[name].measurements["int8"].output.sqnr
        cured = report.decisions()[name].cure
        assert report[name].cures[cured].output.sqnr > before + 10
    choices = {choice.name: choice.measurement for choice in report.choices}
    everything, verdicts = report.baseline["int8"], choices["the verdicts"]
    assert verdicts is not None
    assert verdicts.output.sqnr > everything.output.sqnr + 10
    # relu6 stands between all layers: as it is, nothing can be equalized
    kept, opened = (choices[f"everything in int8, equalized{w}"] for w in ("", ", relu6='relu'"))
    assert kept is not None
    assert opened is not None
    assert kept.output.sqnr == pytest.approx(everything.output.sqnr, abs=1)
    assert max(kept.output.sqnr, opened.output.sqnr) < verdicts.output.sqnr - 10
