"""quantize in one call: the same as the steps by hand, with data, labels, loaders, or nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fxquant.calibration import calibrate
from fxquant.errors import (
    CalibrationError,
    CalibrationWarning,
    LoweringWarning,
    MissingExampleInputsError,
    StrictModeError,
)
from fxquant.graph_module import Stage
from fxquant.models_zoo.metrics import sqnr_db
from fxquant.quantize import quantize
from fxquant.quantize_fx import convert_fx, prepare_fx


class Odd(nn.Module):
    """Dropout, a branch nobody reads, a module listed twice, a frozen weight, a buffer read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.same = self.conv.weight  # the same parameter under a second name
        self.act = nn.ReLU()
        self.twice = nn.ModuleList([self.act, self.act])
        self.head = nn.Linear(8, 4)
        self.head.weight.requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("offset", torch.full((8,), 0.25))
        self.offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.twice[1](self.twice[0](self.conv(x))))
        self.unused(x.mean((2, 3)))
        return self.head(y.mean((2, 3)) + self.offset)  # type: ignore[no-any-return]  # nn.Module is untyped


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


def _batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(count)]


def test_it_is_the_steps_by_hand(model: nn.Module) -> None:
    batches = _batches()
    prepared = prepare_fx(model, None, (batches[0],))
    calibrate(prepared, batches, progress=False)
    by_hand, one_call = convert_fx(prepared), quantize(model, batches, progress=False)
    assert torch.equal(by_hand(batches[0]), one_call(batches[0]))
    assert one_call.state.stage is Stage.LOWERED


def test_odd_parts_of_a_model_come_out_right(model: nn.Module) -> None:
    batches = _batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    int8 = quantize(model, batches, progress=False)
    with torch.no_grad():
        assert sqnr_db(model(batches[1]), int8(batches[1])) > 30
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_parameter("head.weight").requires_grad


def test_a_generator_loses_no_batch_to_the_example_inputs(model: nn.Module) -> None:
    batches = _batches()

    def stream() -> Iterator[Tensor]:
        yield from batches

    x = batches[0]
    assert torch.equal(quantize(model, stream())(x), quantize(model, batches)(x))


def test_labels_are_left_out(model: nn.Module) -> None:
    pairs = [(batch, torch.zeros(4)) for batch in _batches()]
    x = pairs[0][0]
    assert torch.equal(quantize(model, pairs)(x), quantize(model, _batches())(x))


def test_a_forward_of_ones_own(model: nn.Module) -> None:
    wrapped = [{"image": batch} for batch in _batches()]
    int8 = quantize(
        model, wrapped, example_inputs=(_batches()[0],), forward=lambda m, b: m(b["image"])
    )
    x = _batches()[0]
    assert torch.equal(int8(x), quantize(model, _batches())(x))


def test_no_batch_and_no_inputs_are_errors(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        quantize(model, [])
    with pytest.raises(MissingExampleInputsError, match="example_inputs"):
        quantize(model, None)


def test_without_data_says_so_and_what_it_costs(model: nn.Module) -> None:
    x = (_batches()[0],)
    with pytest.warns(CalibrationWarning, match="without data.*costs"):
        quantize(model, None, example_inputs=x)
    with pytest.raises(StrictModeError, match="without data"):
        quantize(model, None, example_inputs=x, strict=True)


def test_ops_that_stay_in_fp32_are_named() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.conv.register_forward_hook(lambda module, inputs, output: output)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x))  # type: ignore[no-any-return]  # nn.Module is untyped

    with pytest.warns(LoweringWarning, match=r"1 op\(s\).*'conv' \(Conv2d\).*hook"):
        quantize(Watched().eval(), _batches())
