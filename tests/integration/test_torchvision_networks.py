"""Networks of torchvision, with seeded weights: all of their convolutions and linears run int8."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks.networks import NETWORKS, sqnrs
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
from tests.integration.fresh_process import stored, values

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)

# network -> side of the pictures, and the SQNR in dB that is held there
QUICK = {
    "resnet18": (64, 21.0),
    "mobilenet_v3_small": (64, 9.0),
    "shufflenet_v2_x1_0": (64, 3.0),
    "squeezenet1_1": (64, 13.5),
}
LARGE = {"resnet50": 64}  # saved and loaded, beside those
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


@dataclass(frozen=True)
class Case:
    """A network at three stages."""

    entry: ZooEntry
    prepared: QuantGraphModule
    int8: QuantGraphModule

    @property
    def inputs(self) -> torch.Tensor:
        """Two pictures."""
        return self.entry.evaluation[0][0][:2]


def _case(entry: ZooEntry) -> Case:
    prepared = _prepared(entry)
    return Case(entry, prepared, convert_fx(prepared, strict=True))


@pytest.fixture(scope="module")
def quick() -> dict[str, Case]:
    sides = {name: side for name, (side, _) in QUICK.items()} | LARGE
    return {name: _case(_entry(name, side)) for name, side in sides.items()}


def _check(case: Case, folder: Path) -> None:
    """Everything but the noise."""
    entry, model = case.entry, case.int8
    report = audit(model, entry.example_inputs)
    assert report.mac_coverage == 1.0, str(report)
    assert report.confirmed, str(report)
    floats = {row.op for row in report.fp32 if not row.carried_by}
    assert floats <= BY_DESIGN, str(report)
    assert all(row.reason or row.fate for row in report.fp32)

    inputs = case.inputs
    steps = parity(convert_to_reference_fx(case.prepared), model, (inputs,))
    assert steps.ok, str(steps)

    artifact.save(model, folder / "model.fxq")
    loaded = artifact.load(folder / "model.fxq")
    assert torch.equal(entry.logits(loaded, [inputs]), entry.logits(model, [inputs]))
    assert isinstance(loaded(inputs), dict) == bool(entry.output)


def _check_in_a_fresh_process(cases: Mapping[str, Case], folder: Path) -> None:
    """Identical integers and outputs where neither torchvision nor the zoo is imported."""
    for name, case in cases.items():
        (folder / name).mkdir()
        artifact.save(case.int8, folder / name / "model.fxq")
        torch.save(case.inputs, folder / name / "inputs.pt")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/integration/fresh_process.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["strangers"] == []
    assert found["models"].keys() == cases.keys()
    for name, case in cases.items():
        there = found["models"][name]
        assert there["stored"] == stored(case.int8), name
        assert there["values"] == values(case.int8, case.inputs), name
        kinds = {dtype for _, dtype, _ in there["values"]}
        assert "torch.quint8" in kinds, name
        assert there["values"][-1][1] == "torch.float32", name  # the output


@pytest.mark.parametrize("name", QUICK)
def test_small_pictures(name: str, quick: dict[str, Case], tmp_path: Path) -> None:
    case = quick[name]
    _check(case, tmp_path)
    assert logit_sqnr(case.entry, case.int8) >= QUICK[name][1]


def test_saved_networks_in_a_fresh_process(quick: dict[str, Case], tmp_path: Path) -> None:
    _check_in_a_fresh_process(quick, tmp_path)


def test_the_file_of_resnet50_is_a_quarter(quick: dict[str, Case], tmp_path: Path) -> None:
    case = quick["resnet50"]
    artifact.save(case.int8, tmp_path / "int8.fxq")
    torch.save(case.entry.model.state_dict(), tmp_path / "fp32.pt")
    sizes = [(tmp_path / name).stat().st_size for name in ("int8.fxq", "fp32.pt")]
    assert sizes[0] <= 0.26 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_own_resolution(name: str, tmp_path: Path) -> None:
    case = _case(_entry(name))
    _check(case, tmp_path)
    _check_in_a_fresh_process({name: case}, tmp_path)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share")
def test_no_noisier_than_torch_ao(name: str) -> None:
    entry = _entry(name)
    images = replace(entry.images, calibration_count=48, evaluation_count=16)  # type: ignore[type-var]  # a dataclass, as _entry asserts
    entry = replace(entry, images=images)
    # Every picture counts alike: RegNetY gives one of them a thousand times the usual power.
    ours, _ = sqnrs(entry, convert_fx(_prepared(entry)))
    best = max(sqnrs(entry, torch_ao(entry, engine))[0] for engine in TORCH_AO_ENGINES)
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
    case = _case(entry)
    _check(case, tmp_path)
    _check_in_a_fresh_process({"lraspp": case}, tmp_path)
    model = case.int8
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
