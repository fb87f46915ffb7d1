"""Statistics through files: whole states, statistics alone, and what does not fit."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, CalibrationWarning
from fxquant.fake_quantize import FakeQuantize
from fxquant.graph_module import QuantGraphModule
from fxquant.observer_state import get_observer_state_dict, load_observer_state_dict
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    default_per_channel_weight_observer,
    default_weight_observer,
)
from fxquant.qconfig import QConfig
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
QCONFIGS = {
    "default": None,
    "minmax": QConfig(MinMaxObserver, default_weight_observer),
    "moving": QConfig(MovingAverageMinMaxObserver, default_per_channel_weight_observer),
    "histogram": QConfig(HistogramObserver, default_per_channel_weight_observer),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Sigmoid()
    ).eval()


def _prepared(name: str, *, calibrated: bool) -> QuantGraphModule:
    prepared = prepare_fx(_model(), QCONFIGS[name], (X,))
    if calibrated:
        with torch.no_grad():
            prepared(X)
            prepared(X * 1.5)
    return prepared


def _through_a_file(state: Any, *, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def _run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)  # type: ignore[no-any-return]  # a module


def _same_states(left: nn.Module, right: nn.Module) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


# -- whole states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QCONFIGS)
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_calibrated_state_loads_into_a_fresh_model(name: str, weights_only: bool) -> None:
    calibrated = _prepared(name, calibrated=True)
    fresh = _prepared(name, calibrated=False)
    assert not _same_states(fresh, calibrated)
    state = _through_a_file(calibrated.state_dict(), weights_only=weights_only)
    fresh.load_state_dict(state)  # strict
    assert _same_states(fresh, calibrated)
    assert torch.equal(_run(convert_fx(fresh)), _run(convert_fx(calibrated)))


def test_a_state_of_another_model_is_refused() -> None:
    calibrated = _prepared("minmax", calibrated=True)
    with pytest.raises(RuntimeError, match="activation_post_process_0"):
        _prepared("histogram", calibrated=False).load_state_dict(calibrated.state_dict())


@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_converted_states_are_plain_tensors(convert: Any) -> None:
    first = convert(_prepared("default", calibrated=True))
    other = prepare_fx(_model(), None, (X,))
    with torch.no_grad():
        other(X * 9)
    second = convert(other)
    assert not torch.equal(_run(first), _run(second))
    state = _through_a_file(first.state_dict())
    assert all(type(value) is Tensor for value in state.values())
    second.load_state_dict(state)
    assert torch.equal(_run(first), _run(second))


# -- statistics alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", QCONFIGS)
@pytest.mark.parametrize("weights_only", [True, False])
def test_statistics_alone_give_the_same_integers(name: str, weights_only: bool) -> None:
    calibrated = _prepared(name, calibrated=True)
    statistics = get_observer_state_dict(calibrated)
    assert isinstance(statistics, OrderedDict)
    fresh = _prepared(name, calibrated=False)
    load_observer_state_dict(fresh, _through_a_file(statistics, weights_only=weights_only))
    assert torch.equal(_run(convert_fx(fresh)), _run(convert_fx(calibrated)))


def test_statistics_are_all_but_the_weights() -> None:
    calibrated = _prepared("default", calibrated=True)
    statistics = get_observer_state_dict(calibrated)
    rest = set(calibrated.state_dict()) - set(statistics)
    assert rest == {"0.weight", "0.bias", "3.weight", "3.bias"}
    paths = {key.partition(".")[0].rpartition("_")[0] for key in statistics}
    assert paths == {"activation_post_process", "channel_mean"}


def test_weights_stay_as_they_are() -> None:
    calibrated, fresh = (_prepared("minmax", calibrated=c) for c in (True, False))
    with torch.no_grad():
        fresh.get_parameter("0.weight").add_(1)
    before = fresh.get_parameter("0.weight").clone()
    load_observer_state_dict(fresh, get_observer_state_dict(calibrated))
    assert torch.equal(fresh.get_parameter("0.weight"), before)


def test_statistics_of_a_scripted_model() -> None:
    calibrated = _prepared("minmax", calibrated=True)
    found = get_observer_state_dict(torch.jit.script(calibrated))
    wanted = get_observer_state_dict(calibrated)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_fake_quantizers_have_statistics() -> None:
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    model = nn.Sequential(nn.Linear(8, 8), fake())
    model(X)
    fresh = nn.Sequential(nn.Linear(8, 8), fake())
    load_observer_state_dict(fresh, get_observer_state_dict(model))
    assert torch.equal(fresh[1].scale, model[1].scale)
    assert float(fresh[1].scale) != 1.0


def test_what_does_not_agree_is_told() -> None:
    calibrated = _prepared("minmax", calibrated=True)
    statistics = get_observer_state_dict(calibrated)
    first = next(iter(statistics))
    lacking = OrderedDict((key, value) for key, value in statistics.items() if key != first)
    fresh = _prepared("minmax", calibrated=False)
    with pytest.warns(CalibrationWarning, match=f"1 are missing, the first is '{first}'"):
        load_observer_state_dict(fresh, lacking)
    further = {**statistics, "activation_post_process_0.colector.min_val": torch.zeros(())}
    with pytest.warns(CalibrationWarning, match="belong to no observer.*did you mean"):
        load_observer_state_dict(fresh, further)
    with pytest.raises(CalibrationError, match="are not those of this model"):
        load_observer_state_dict(fresh, further, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_observer_state_dict(fresh, statistics, strict=True)


def test_a_wrong_shape_is_an_error() -> None:
    calibrated = _prepared("minmax", calibrated=True)
    statistics = get_observer_state_dict(calibrated)
    key = next(key for key in statistics if key.endswith("min_val"))
    statistics[key] = torch.zeros(7)
    with pytest.raises(CalibrationError, match="do not fit this model"):
        load_observer_state_dict(_prepared("minmax", calibrated=False), statistics)


def test_a_saved_file_on_disk(tmp_path: Path) -> None:
    calibrated = _prepared("default", calibrated=True)
    torch.save(get_observer_state_dict(calibrated), tmp_path / "statistics.pt")
    fresh = _prepared("default", calibrated=False)
    load_observer_state_dict(fresh, torch.load(tmp_path / "statistics.pt", weights_only=True))
    assert _same_states(fresh, calibrated)
