"""The embedded demo: size, accuracy, and that its training script runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.errors import DataNotFoundError, MissingDependencyError
from fxquant.models_zoo import digits, train_digits
from fxquant.models_zoo.digits import DigitsNet, DigitsSource, digits_net_trained
from fxquant.models_zoo.registry import load


def test_weights_are_small_and_batch_norms_not_folded() -> None:
    assert digits.WEIGHTS.stat().st_size < 300_000
    norms = [m for m in digits_net_trained().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 10
    assert all(not torch.equal(n.running_var, torch.ones_like(n.running_var)) for n in norms)  # type: ignore[arg-type]


def test_most_work_is_in_wide_convolutions() -> None:
    work: dict[nn.Conv2d, int] = {}

    def count(conv: nn.Module, _: object, out: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        work[conv] = conv.weight[0].numel() * out[0].numel()

    net = DigitsNet().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    net(digits.example_input())
    wide = sum(n for conv, n in work.items() if conv.in_channels >= 32 and conv.groups == 1)
    assert wide / sum(work.values()) > 0.85


def test_top1_on_held_out_digits() -> None:
    entry = load("digits")
    assert entry.metric(entry.model) >= 98.0
    assert entry.metric(entry.model) == pytest.approx(entry.reference_metric, abs=100 / 599 + 0.005)


def test_splits_do_not_overlap() -> None:
    source = DigitsSource()
    held_out, labels = source.evaluation_images()
    training, training_labels = source.training_images()
    assert (len(held_out), len(training)) == (599, 1198)
    assert (len(labels), len(training_labels)) == (599, 1198)
    assert torch.equal(source.calibration_images(), training[:200])
    assert not {i.numpy().tobytes() for i in held_out} & {i.numpy().tobytes() for i in training}


def test_inputs_are_32_by_32_in_minus_one_to_one() -> None:
    inputs = digits.upsampled(DigitsSource().calibration_images())
    assert inputs.shape == (200, *digits.example_input().shape[1:])
    assert (inputs.min().item(), inputs.max().item()) == (-1.0, 1.0)


def test_loading_needs_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    entry = load("digits")
    assert entry.model(*entry.example_inputs).shape == (1, 10)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*pip install 'fxquant\[zoo\]'"):
        _ = entry.calibration


def test_missing_weights_are_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path / "digits.safetensors")
    with pytest.raises(DataNotFoundError, match="train_digits"):
        load("digits")


def test_training_script_writes_loadable_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made" / "digits.safetensors"
    images, labels = DigitsSource().training_images()
    monkeypatch.setattr(DigitsSource, "training_images", lambda self: (images[:128], labels[:128]))
    train_digits.main([str(output), "--epochs", "1"])
    assert "held-out top-1" in capsys.readouterr().out
    monkeypatch.setattr(digits, "WEIGHTS", output)
    assert not digits_net_trained().training
