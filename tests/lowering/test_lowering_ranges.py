"""Parameters at their limits: narrow ranges, extreme zero points, dead channels, empty batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.observers import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from fxquant.operators import QUANTIZE
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import get_default_qconfig_mapping

Lower = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.a(x))
        y = F.relu(self.b(y) + y)
        y = F.hardtanh(F.max_pool2d(self.c(y), 2), -0.2, 0.5)
        return self.head(y.mean((2, 3)))


def _weight(*, low: int = -127, high: int = 127) -> Any:
    return PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=high
    )


def test_a_halved_range_decides_the_scale_and_kernels_saturate_at_their_storage(
    lower: Lower,
) -> None:
    """A relu6 that ``0..127`` would express is not free: the kernel goes on to 255."""
    activation = MinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=127)
    x = 10 * torch.randn(2, 3, 9, 9)
    case = lower(Net(), x, mapping={"": QConfig(activation=activation, weight=_weight())})
    assert "aten::clamp on int8" in case.kernels
    case.check(5 * torch.randn(2, 3, 9, 9))
    case.check(30 * torch.randn(2, 3, 9, 9))
    ranges = {n.args[3:5] for n in case.reference.graph.nodes if n.target is QUANTIZE}
    assert ranges == {(0, 255)}


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_defaults_of_every_backend(lower: Lower, backend: str) -> None:
    x = torch.randn(2, 3, 9, 9)
    case = lower(Net(), x, mapping=get_default_qconfig_mapping(backend))
    case.check(2 * torch.randn(3, 3, 11, 8))


@pytest.mark.parametrize("low", [-128, -127, -64])
def test_weight_ranges(lower: Lower, low: int) -> None:
    qconfig = QConfig(
        activation=HistogramObserver, weight=_weight(low=low, high=-low if low > -128 else 127)
    )
    lower(Net(), torch.randn(2, 3, 9, 9), mapping={"": qconfig}).check(torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("offset", [-50.0, -1.0, 0.0, 1.0, 50.0])
def test_zero_points_from_end_to_end(lower: Lower, offset: float) -> None:
    x = torch.rand(2, 3, 9, 9) + offset
    lower(Net(), x).check(torch.rand(2, 3, 9, 9) + offset)


def test_symmetric_activations(lower: Lower) -> None:
    qconfig = QConfig(
        activation=MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_symmetric),
        weight=_weight(),
    )
    lower(Net(), torch.randn(2, 3, 9, 9), mapping={"": qconfig}).check(torch.randn(2, 3, 9, 9))


def test_values_that_are_all_zero(lower: Lower) -> None:
    model = Net()
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.a.bias)
    case = lower(model, torch.zeros(2, 3, 9, 9))
    case.check(torch.zeros(2, 3, 9, 9))
    case.check(torch.randn(2, 3, 9, 9))


def test_dead_and_loud_channels(lower: Lower) -> None:
    model = Net()
    with torch.no_grad():
        model.a.weight[0] = 0
        model.a.weight[1] *= 1e-6
        model.a.weight[2] *= 1e4
        model.b.bias[3] = 1e3
    case = lower(model, torch.randn(2, 3, 9, 9))
    case.check(torch.randn(2, 3, 9, 9))


def test_values_of_any_magnitude(lower: Lower) -> None:
    for magnitude in (1e-6, 1e-3, 1e4, 1e8):
        x = magnitude * torch.randn(2, 3, 9, 9)
        lower(Net(), x).check(2 * magnitude * torch.randn(2, 3, 9, 9))


def test_largest_sums_do_not_overflow(lower: Lower) -> None:
    """512 x 9 products of 255 x 127 are far from 2**31; they must come out exact."""
    model = nn.Sequential(nn.Conv2d(512, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    for parameter in model.parameters():
        parameter.data.abs_()
    x = torch.rand(1, 512, 5, 5)
    lower(model, x).check(torch.ones(1, 512, 5, 5))
