"""calibrate: what is fed, what is refused, and that a failing batch leaves no trace."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxquant import calibration
from fxquant.calibration import calibrate
from fxquant.errors import (
    CalibrationError,
    CalibrationWarning,
    NonFiniteStatisticError,
    NotPreparedError,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx


class OneInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.conv(image).relu().mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) + self.right(b)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.fc(x)
        return y if shift is None else y + shift


class Log(nn.Module):
    """Gives NaN for negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.log(x))


def image(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared(seed: int = 0) -> QuantGraphModule:
    torch.manual_seed(seed)
    return prepare_fx(OneInput().eval(), None, (image(),))


def statistics(gm: QuantGraphModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gm.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# -- what is fed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        image(),
        (image(),),
        [image()],
        (image(), torch.tensor([0, 1])),
        [image(), torch.tensor([0, 1]), "a.png"],
        {"image": image()},
    ],
    ids=["tensor", "tuple", "list", "labels", "more", "dict"],
)
def test_one_input(batch: Any) -> None:
    gm, expected = prepared(), prepared()
    with torch.no_grad():
        expected(image())
    assert calibrate(gm, [batch]) is gm
    assert_same(statistics(gm), statistics(expected))


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 4), torch.full((2, 4), 2.0)),
        (torch.ones(2, 4), torch.full((2, 4), 2.0), torch.zeros(2)),
        {"b": torch.full((2, 4), 2.0), "a": torch.ones(2, 4)},
    ],
    ids=["both", "labels", "dict"],
)
def test_two_inputs(batch: Any) -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    gm = prepare_fx(model, None, (torch.ones(2, 4), torch.ones(2, 4)))
    expected = prepare_fx(model, None, (torch.ones(2, 4), torch.ones(2, 4)))
    with torch.no_grad():
        expected(torch.ones(2, 4), torch.full((2, 4), 2.0))
    assert_same(statistics(calibrate(gm, [batch])), statistics(expected))


def test_an_optional_input_is_left_out_unless_the_examples_had_it() -> None:
    x, shift, label = torch.ones(2, 4), torch.full((2, 4), 3.0), torch.tensor([0, 1])
    model = Optional().eval()
    seen: list[tuple[Any, ...]] = []

    def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args)

    for examples, batch in (((x,), (x, label)), ((x, shift), (x, shift, label))):
        gm = prepare_fx(model, None, examples)
        handle = gm.register_forward_pre_hook(remember)
        calibrate(gm, [batch])
        handle.remove()
    assert [len(args) for args in seen] == [1, 2]


def test_data_loader_and_generator_give_the_same() -> None:
    images, labels = image(batch=6), torch.arange(6)
    by_loader = calibrate(prepared(), DataLoader(TensorDataset(images, labels), batch_size=2))
    by_generator = calibrate(prepared(), (part for part in images.split(2)))
    assert_same(statistics(by_loader), statistics(by_generator))


def test_num_batches_takes_no_more_out_of_a_generator() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for number in range(5):
            taken.append(number)
            yield image(number)

    calibrate(prepared(), batches(), num_batches=2)
    assert taken == [0, 1]
    taken.clear()
    calibrate(prepared(), batches())
    assert taken == [0, 1, 2, 3, 4]


def test_forward_overrides_the_rule() -> None:
    gm, expected = prepared(), prepared()
    calibrate(expected, [image()])
    seen = []

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        seen.append((model is gm, torch.is_grad_enabled()))
        model(batch["pixels"]["rgb"])

    calibrate(gm, [{"pixels": {"rgb": image()}}], forward=forward)
    assert seen == [(True, False)]
    assert_same(statistics(gm), statistics(expected))


def test_other_shapes_are_fine_and_flags_stay() -> None:
    gm = prepared()
    gm.get_submodule("fc").train()
    flags = {name: module.training for name, module in gm.named_modules()}
    calibrate(gm, [torch.randn(1, 3, 5, 11), torch.randn(7, 3, 16, 16)])
    assert {name: module.training for name, module in gm.named_modules()} == flags
    convert_fx(gm)(torch.randn(3, 3, 9, 9))


def test_no_gradients_and_no_hook_stay() -> None:
    gm = calibrate(prepared(), [image()])
    assert not gm._forward_pre_hooks
    assert all(parameter.grad is None for parameter in gm.parameters())


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (image().numpy(), r"the batch is a numpy array.*torch\.from_numpy"),
        ((image().numpy(), 1), r"item 0 is a numpy array.*torch\.from_numpy"),
        ({"image": np.zeros((1, 3, 8, 8))}, r"'image' is a numpy array.*torch\.from_numpy"),
        ({"imag": image()}, r"'imag' is no input.*did you mean 'image'"),
        ({"image": image(), "labels": torch.zeros(2)}, r"'labels' is no input of the model"),
        ({}, r"needs 'image': 'image' missing"),
        ((), r"has 0 item\(s\), the model needs 'image'"),
        ("a.png", r"pass forward=lambda model, batch"),
        (
            torch.zeros(2, 4, 8, 8),
            r"batch 2 \(float32\[2, 4, 8, 8\]\).*at node 'conv' \(call_module conv\): .*3 channels",
        ),
        (image().long(), r"batch 2 \(int64\[2, 3, 8, 8\]\).*at node 'conv'"),
    ],
)
def test_a_batch_that_does_not_fit(batch: Any, message: str) -> None:
    gm = calibrate(prepared(), [image()])
    expected = calibrate(prepared(), [image(), image(1)])
    with pytest.raises(CalibrationError, match=message) as caught:
        calibrate(gm, [image(1), batch])
    assert "(1 batch(es) seen)" in str(caught.value)
    assert_same(statistics(gm), statistics(expected))


def test_what_is_missing_for_two_inputs_is_named() -> None:
    gm = prepare_fx(TwoInputs().eval(), None, (torch.ones(2, 4), torch.ones(2, 4)))
    with pytest.raises(CalibrationError, match="one tensor, the model needs 'a', 'b'"):
        calibrate(gm, [torch.ones(2, 4)])
    with pytest.raises(CalibrationError, match="'b' missing"):
        calibrate(gm, [(torch.ones(2, 4),)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "pass at least one"),
        (iter([]), "a generator can be used once only"),
        (image(), r"float32\[2, 3, 8, 8\], not batches.*pass \[batch\]"),
        (image().numpy(), r"pass \[batch\]"),
        ({"image": image()}, r"pass \[batch\]"),
        (3, "an iterable of batches"),
    ],
)
def test_data_that_are_no_batches(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(prepared(), data)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_num_batches_must_be_a_number(number: Any) -> None:
    with pytest.raises(CalibrationError, match="num_batches must be"):
        calibrate(prepared(), [image()], num_batches=number)


def test_nan_in_the_data_leaves_no_trace() -> None:
    gm = calibrate(prepared(), [image()])
    before = statistics(gm)
    bad = image(1)
    bad[0, 1, 2, 3] = float("nan")
    with pytest.raises(
        NonFiniteStatisticError,
        match=r"batch 1 .*activation_post_process_0 \(output of 'image'\) got 1 NaN.*the batch"
        r" itself holds NaN.*drop the batch",
    ):
        calibrate(gm, [bad])
    assert_same(statistics(gm), before)


def test_nan_made_by_the_model_is_told_apart() -> None:
    gm = prepare_fx(Log().eval(), None, (torch.ones(2, 4),))
    calibrate(gm, [torch.ones(2, 4)])
    before = statistics(gm)
    with pytest.raises(NonFiniteStatisticError, match=r"'log'.*the model makes them"):
        calibrate(gm, [-torch.ones(2, 4)])
    assert_same(statistics(gm), before)


def test_an_interrupt_takes_the_batch_back() -> None:
    gm = calibrate(prepared(), [image()])
    before = statistics(gm)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(gm, [image(1)], forward=forward)
    assert_same(statistics(gm), before)


def test_an_error_of_the_users_forward_keeps_its_cause() -> None:
    with pytest.raises(CalibrationError, match="division by zero") as caught:
        calibrate(prepared(), [image()], forward=lambda model, batch: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OneInput, "got OneInput: call prepare_fx"),
        (lambda: fuse_fx(OneInput().eval()), "this one is fused"),
        (lambda: convert_fx(calibrate(prepared(), [image()])), "this one is lowered"),
        (lambda: convert_to_reference_fx(calibrate(prepared(), [image()])), "is reference"),
    ],
)
def test_only_a_prepared_model(make: Any, message: str) -> None:
    with pytest.raises(NotPreparedError, match=message):
        calibrate(make(), [image()])


def test_observers_that_saw_nothing_are_named() -> None:
    with pytest.warns(CalibrationWarning, match=r"observers of 'image'.* have seen no data") as got:
        calibrate(prepared(), [image()], forward=lambda model, batch: None)
    assert got[0].filename == __file__


# -- progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "progress", "shown"), [(0.0, True, True), (0.0, False, False), (2.0, True, False)]
)
def test_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, seconds: float, progress: bool, shown: bool
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(calibration, "_SECONDS_BEFORE_PROGRESS", seconds)
    calibrate(prepared(), [image()] * 3, progress=progress)
    assert ("calibrate" in terminal.getvalue()) is shown


def test_nothing_is_printed_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "_SECONDS_BEFORE_PROGRESS", 0.0)
    calibrate(prepared(), [image()] * 3)
    assert capfd.readouterr() == ("", "")
