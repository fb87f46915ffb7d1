"""One default configuration on real networks with labelled data: the figures users are promised."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from fxquant.audit import audit
from fxquant.calibration import calibrate
from fxquant.explain import explain
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.evaluation import Accuracy, compare
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.parity import parity
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

# network -> points of top-1 that may be lost, agreement in percent, logit SQNR in dB
PROMISES = {
    "resnet20_cifar10": (0.3, 98.5, 29.58),  # torch.ao's best engine (onednn) reaches 29.58
    "resnet56_cifar10": (0.3, 98.5, 28.85),  # torch.ao's best engine (onednn) reaches 28.85
    "efficientnet_lite0": (1.0, 96.5, 18.0),
    "mobilenetv2_folded": (1.0, 96.5, 21.0),
    "squeezenet1_1": (1.5, 91.0, 28.0),
}

pytestmark = pytest.mark.slow


@cache
def _loaded(name: str, folder: Path) -> ZooEntry:
    return load(name, data_dir=folder)


@cache
def _prepared(name: str, folder: Path) -> QuantGraphModule:
    entry = _loaded(name, folder)
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    return calibrate(prepared, entry.calibration, progress=False)


@cache
def _measured(name: str, folder: Path) -> tuple[Accuracy, QuantGraphModule]:
    model = convert_fx(_prepared(name, folder))
    return compare(_loaded(name, folder), model), model


@pytest.mark.parametrize("name", PROMISES)
def test_accuracy_agreement_and_noise(name: str, data_dir: Path) -> None:
    accuracy, _ = _measured(name, data_dir)
    drop, agreement, sqnr = PROMISES[name]
    assert accuracy.drop <= drop, accuracy
    assert accuracy.agreement >= agreement, accuracy
    assert accuracy.sqnr_db >= sqnr, accuracy


@pytest.mark.parametrize("name", PROMISES)
def test_coverage_and_reasons(name: str, data_dir: Path) -> None:
    _, model = _measured(name, data_dir)
    report = audit(model)
    assert report.mac_coverage >= 0.99
    assert report.confirmed, report.discrepancies
    for row in explain(model).rows:
        assert row.kernel or row.fate or row.reason, row


@pytest.mark.parametrize("name", PROMISES)
def test_lowered_against_reference_fed_the_same_integers(name: str, data_dir: Path) -> None:
    prepared = _prepared(name, data_dir)
    entry = _loaded(name, data_dir)
    inputs, _ = entry.evaluation[0]
    report = parity(convert_to_reference_fx(prepared), _measured(name, data_dir)[1], (inputs[:8],))
    assert report.ok, str(report)
