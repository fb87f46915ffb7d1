"""``quantize`` on what models hold besides layers: it is right, or it says what it is not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import audit, explain, load, quantize, save
from fxquant.errors import CaptureWarning, ConfigWarning, StrictModeError, TrainingModeError

INPUT = (4, 3, 16, 16)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _quantized(model: nn.Module, x: Tensor, path: Path, *, sqnr: float = 30.0) -> Any:
    """The int8 model, without a warning, near the float model, kept in a file, same each call."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8 = quantize(model, [x], progress=False)
    given = int8(x)
    error = (given - expected).square().mean()
    assert float(10 * torch.log10(expected.square().mean() / error)) > sqnr
    assert torch.equal(int8(x), given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save(int8, path / "model.fxq")
    assert torch.equal(load(path / "model.fxq")(x), given)
    report = audit(int8)
    assert report.confirmed
    assert all(row.reason for row in report.fp32)
    return int8


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).mean((2, 3))


class Dropping(Base):
    """A module, a two-dimensional one and the function."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.one = nn.Dropout2d(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.conv(x))).mean((2, 3))
        return self.head(F.dropout(self.one(y), 0.3, self.training))


def test_dropout_is_taken_out(tmp_path: Path) -> None:
    int8 = _quantized(Dropping(), torch.randn(INPUT), tmp_path)
    for name in ("two", "one", "dropout"):
        assert explain(int8).row(name).fate == "removed: dropout does nothing in evaluation"


def test_dropout_in_training_mode_is_told() -> None:
    x = torch.randn(INPUT)
    message = r"3 op\(s\) drop values at random .* \('two', 'one', 'dropout'\).*model.eval\(\)"
    with pytest.warns(ConfigWarning, match=message):
        quantize(Dropping().train(), [x], progress=False)
    with pytest.raises(StrictModeError, match="drop values at random"):
        quantize(Dropping().train(), [x], progress=False, strict=True)
    never = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.0)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(never, [x], progress=False)


def test_a_batch_norm_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    with pytest.raises(TrainingModeError, match="eval"):
        quantize(model, [torch.randn(INPUT)], progress=False)


class NeverCalled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class ReadByNobody(NeverCalled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        self.spare(x).relu()
        return self.head(y)


class OnlyInTraining(NeverCalled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if self.training:
            return self.head(y) + self.spare(x).mean()
        return self.head(y)


@pytest.mark.parametrize("make", [NeverCalled, ReadByNobody, OnlyInTraining])
def test_an_unused_branch(make: type[nn.Module], tmp_path: Path) -> None:
    int8 = _quantized(make(), torch.randn(INPUT), tmp_path)
    assert "spare_weight" not in int8.state_dict()  # it has no int8 weight
    names = {row.name for row in explain(int8).rows}
    assert ("spare" in names) == (make is ReadByNobody)
    if make is ReadByNobody:
        assert explain(int8).row("spare").reason == "nobody reads its result"
    else:
        assert not any(name.startswith("spare") for name in int8.state_dict())


class Listed(nn.Module):
    """One convolution under three names, called four times, once before a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again, self.norm = self.conv, nn.BatchNorm2d(3)
        self.body = nn.Sequential(self.conv, nn.ReLU(), self.conv)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.again(self.conv(x)))).mean((2, 3)))


def _twice_in_a_sequence() -> nn.Module:
    relu, conv = nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, relu, conv, relu)


def _one_batch_norm_behind_two() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm)


def _tied() -> nn.Module:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize("make", [Listed, _twice_in_a_sequence, _one_batch_norm_behind_two, _tied])
def test_a_module_listed_twice(make: Any, tmp_path: Path) -> None:
    int8 = _quantized(make(), torch.randn(INPUT), tmp_path, sqnr=25)
    assert audit(int8).mac_coverage == 1.0
    if make is _twice_in_a_sequence:  # one copy of the integers
        weights = [n for n, v in int8.state_dict().items() if v.dtype is torch.int8]
        assert len(weights) == 1


class Frozen(Base):
    """A weight without gradients, and a parameter that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.randn(8), requires_grad=False)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x) * self.scale + self.shift)


def test_frozen_parameters(tmp_path: Path) -> None:
    model = Frozen()
    int8 = _quantized(model, torch.randn(INPUT), tmp_path)
    assert audit(int8).mac_coverage == 1.0
    assert not model.conv.weight.requires_grad
    assert not model.scale.requires_grad
    assert model.shift.requires_grad


class Reading(Base):
    """Buffers that normalize, mask, index and count; one of them is not saved by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.register_buffer("offset", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features((x - self.center) / self.deviation).masked_fill(self.mask, 0.0)
        return self.head(y + self.offset)[:, self.order]


def test_buffers_that_are_read(tmp_path: Path) -> None:
    int8 = _quantized(Reading(), torch.randn(INPUT), tmp_path)
    assert audit(int8).mac_coverage == 1.0
    assert {"center", "deviation", "mask", "offset", "order"} <= set(int8.state_dict())


# -- buffers that are written ---------------------------------------------------------------------


class Counting(Reading):
    def forward(self, x: Tensor) -> Tensor:
        self.offset += 1
        return super().forward(x)


class Replacing(Reading):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.center = x.mean((0, 2, 3), keepdim=True)
        return y


class Copying(Reading):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.center.copy_(x.mean((0, 2, 3), keepdim=True))
        return y


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Counting, "writes into the buffer 'offset' something that does not depend"),
        (Replacing, "stores a value that it computes in the attribute 'center'"),
    ],
)
def test_writes_that_a_graph_cannot_hold_are_told(
    make: type[nn.Module], message: str, tmp_path: Path
) -> None:
    model, x = make().eval(), torch.randn(INPUT)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(CaptureWarning, match=message):
        int8 = quantize(model, [x], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(int8(x), int8(x))
    first = before["offset"] + (make is Counting)  # of the first call
    assert torch.equal(int8.offset, first)
    assert torch.equal(int8.center, before["center"])


def test_writes_that_a_graph_holds_are_made() -> None:
    model, x = Copying().eval(), torch.randn(INPUT) + 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8 = quantize(model, [x], progress=False)
    other = torch.randn(INPUT) - 2
    first = int8(other)
    assert torch.allclose(int8.center, other.mean((0, 2, 3), keepdim=True))
    assert not torch.equal(int8(other), first)
    assert torch.equal(model.center, Reading().center)
