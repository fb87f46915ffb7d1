"""Networks of torchvision, with seeded weights: all of their convolutions and linears run int8."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.networks import NETWORKS
from benchmarks.peers import TORCH_AO_ENGINES, torch_ao
from fxquant import artifact
from fxquant.audit import audit
from fxquant.calibration import calibrate
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.evaluation import logit_sqnr
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.models_zoo.torchvision_models import SyntheticSource
from fxquant.parity import parity
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)

# network -> side of the pictures, and the SQNR in dB that is held there
QUICK = {
    "resnet18": (64, 17.0),
    "mobilenet_v3_small": (64, 5.0),
    "shufflenet_v2_x1_0": (64, 3.0),
    "squeezenet1_1": (64, 13.5),
}
SLOW = [name for name in NETWORKS if name not in QUICK]

BY_DESIGN = {
    *("AdaptiveAvgPool2d", "adaptive_avg_pool2d", "mean"),  # averages have a scale of their own
    *("Hardsigmoid", "Sigmoid"),  # gates: float is no slower, and exact
    *("layer_norm", "LayerNorm"),  # there is no int8 kernel
    "permute",  # ConvNeXt moves floats between its normalizations and residual sums
    *("add", "relu", "ReLU", "BatchNorm2d", "flatten", "interpolate"),  # read as floats only
}
"""Ops that may stay in FP32: none of them multiplies and accumulates."""


def _entry(name: str, side: int | None = None) -> ZooEntry:
    entry = load(f"torchvision/{name}", side=side)
    assert isinstance(entry.images, SyntheticSource)
    images = replace(entry.images, calibration_count=16, evaluation_count=8)
    return replace(entry, images=images, batch_size=8)


def _prepared(entry: ZooEntry) -> QuantGraphModule:
    prepared = prepare_fx(entry.model, None, entry.example_inputs, strict=True)
    return calibrate(prepared, entry.calibration, progress=False)


def _check(entry: ZooEntry, folder: Path) -> QuantGraphModule:
    """Everything but the noise; gives the int8 model."""
    prepared = _prepared(entry)
    model = convert_fx(prepared, strict=True)

    report = audit(model, entry.example_inputs)
    assert report.mac_coverage == 1.0, str(report)
    assert report.confirmed, str(report)
    floats = {row.op for row in report.fp32 if not row.carried_by}
    assert floats <= BY_DESIGN, str(report)
    assert all(row.reason or row.fate for row in report.fp32)

    inputs = entry.evaluation[0][0][:2]
    steps = parity(convert_to_reference_fx(prepared), model, (inputs,))
    assert steps.ok, str(steps)

    artifact.save(model, folder / "model.fxq")
    loaded = artifact.load(folder / "model.fxq")
    assert torch.equal(entry.logits(loaded, [inputs]), entry.logits(model, [inputs]))
    assert isinstance(loaded(inputs), dict) == bool(entry.output)
    return model


@pytest.mark.parametrize("name", QUICK)
def test_small_pictures(name: str, tmp_path: Path) -> None:
    side, sqnr = QUICK[name]
    entry = _entry(name, side)
    model = _check(entry, tmp_path)
    assert logit_sqnr(entry, model) >= sqnr


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_own_resolution(name: str, tmp_path: Path) -> None:
    _check(_entry(name), tmp_path)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share")
def test_no_noisier_than_torch_ao(name: str) -> None:
    entry = _entry(name)
    images = replace(entry.images, calibration_count=48, evaluation_count=16)  # type: ignore[type-var]  # a dataclass, as _entry asserts
    entry = replace(entry, images=images)
    ours = logit_sqnr(entry, convert_fx(_prepared(entry)))
    best = max(logit_sqnr(entry, torch_ao(entry, engine)) for engine in TORCH_AO_ENGINES)
    assert ours >= best - 1.0


def test_a_network_that_transforms_its_input() -> None:
    entry = _entry("googlenet", 64)
    entry.model.transform_input = True  # type: ignore[assignment]  # as with trained weights
    model = convert_fx(_prepared(entry))
    report = audit(model, entry.example_inputs)
    assert report.mac_coverage == 1.0
    assert report.confirmed, str(report)
    assert logit_sqnr(entry, model) > 12


def test_auxiliary_heads_are_left_out_in_evaluation() -> None:
    entry = _entry("googlenet", 64)
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    assert hasattr(entry.model, "aux1")
    assert not any(name.startswith("aux") for name, _ in prepared.named_modules())


def test_a_dict_of_outputs_stays_one(tmp_path: Path) -> None:
    entry = _entry("lraspp_mobilenet_v3_large", 64)
    model = _check(entry, tmp_path)
    x = entry.example_inputs[0]
    given, wanted = model(x), entry.model(x)
    assert given.keys() == wanted.keys() == {"out"}
    assert given["out"].shape == wanted["out"].shape == (1, 21, 64, 64)


def test_other_sizes_and_batches() -> None:
    entry = _entry("shufflenet_v2_x1_0", 64)
    prepared = _prepared(entry)
    steps = parity(
        convert_to_reference_fx(prepared), convert_fx(prepared), (torch.randn(3, 3, 80, 48),)
    )
    assert steps.ok, str(steps)
