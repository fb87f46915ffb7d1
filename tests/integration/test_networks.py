"""Whole networks: another resolution, the caller's model, the clamps that cost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.calibration import calibrate
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.models_zoo.efficientnet_lite0 import EfficientNetLite0
from fxquant.models_zoo.metrics import sqnr_db
from fxquant.models_zoo.mobilenet_v2_folded import MobileNetV2Folded
from fxquant.models_zoo.registry import load
from fxquant.models_zoo.torchvision_models import realistic_bn_statistics
from fxquant.parity import parity
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx


def _images(*shape: int) -> torch.Tensor:
    """Smooth seeded images, so that values are not white noise."""
    coarse = torch.randn(shape[0], 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False)


def _same_padding_net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = (EfficientNetLite0() if kind == "efficientnet_lite0" else MobileNetV2Folded()).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    realistic_bn_statistics(model, [_images(4, 96, 96)])
    return model.eval()


def _carriers(model: QuantGraphModule, kind: str) -> dict[str, str]:
    """Kernel of the node that carries out each op of a kind, by the op's name."""
    kernels = {
        origin: record_of(node).kernel
        for node in model.graph.nodes
        for origin in record_of(node).origins
    }
    return {e.name: kernels.get(e.name, "") for e in model.state.ledger if e.kind == kind}


@pytest.mark.parametrize("kind", ["efficientnet_lite0", "mobilenetv2_folded"])
def test_same_padding_networks_hold_at_a_second_resolution(kind: str) -> None:
    model = _same_padding_net(kind)
    example = _images(1, 96, 96)
    prepared = prepare_fx(model, None, (example,))
    calibrate(prepared, [_images(4, 96, 96)], progress=False)
    int8, reference = convert_fx(prepared), convert_to_reference_fx(prepared)

    other = _images(2, 75, 110)
    with torch.no_grad():
        torch.testing.assert_close(prepared(other), model(other), rtol=1e-4, atol=1e-4)
    report = parity(reference, int8, (other,))
    assert report.ok, str(report)
    convolutions = _carriers(int8, "conv2d")
    assert len(convolutions) > 45
    assert all(k.startswith(("quantized::", "onednn::")) for k in convolutions.values())
    norms = _carriers(int8, "batch_norm")
    assert all(norms.values())  # each is carried out by a kernel: folded
    assert not any("batch_norm" in str(n.target) for n in int8.graph.nodes)


def test_relu6_costs_nothing() -> None:
    entry = load("digits")
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    calibrate(prepared, entry.calibration, progress=False)
    int8 = convert_fx(prepared)
    names = [str(n.target) for n in int8.graph.nodes]
    assert not any("clamp" in name or "relu6" in name or "hardtanh" in name for name in names)


def test_neither_prepare_nor_convert_touches_the_callers_model() -> None:
    entry = load("digits")
    before = {name: value.clone() for name, value in entry.model.state_dict().items()}
    attributes = {name: sorted(module.__dict__) for name, module in entry.model.named_modules()}
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    calibrate(prepared, entry.calibration[:1], progress=False)
    statistics = {name: value.clone() for name, value in prepared.state_dict().items()}
    int8 = convert_fx(prepared)
    with torch.no_grad():
        for parameter in int8.buffers():
            parameter.zero_()
        for parameter in prepared.parameters():
            parameter.zero_()
    for name, value in entry.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert attributes == {
        name: sorted(module.__dict__) for name, module in entry.model.named_modules()
    }
    for name, value in prepared.named_buffers():
        assert torch.equal(value, statistics[name]), name


@pytest.mark.parametrize("name", ["resnet20_cifar10", "squeezenet1_1"])
def test_real_weights_survive(name: str, data_dir: Path) -> None:
    entry = load(name, data_dir=data_dir)
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    calibrate(prepared, entry.calibration[:1], progress=False)
    int8 = convert_fx(prepared)
    inputs, _ = entry.evaluation[0]
    with torch.no_grad():
        assert sqnr_db(entry.model(inputs), int8(inputs)) > 25
