"""Groups with one range: what a clamp, a pool and a concatenation mean inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lower = Callable[..., Any]


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.wide = nn.Conv2d(3, 8, 1)
        nn.init.normal_(self.wide.weight, std=8.0)
        self.head = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x))


def _input(*, batch: int = 2, size: tuple[int, int] = (10, 14)) -> Tensor:
    return torch.randn(batch, 3, *size)


CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -1.0, 1.5),
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "clamp above zero": lambda x: x.clamp(0.25, 2.0),
    "clamp below zero": lambda x: x.clamp(-2.0, -0.25),
    "clamp_max": lambda x: torch.clamp_max(x, 1.0),
    "clamp_min": lambda x: torch.clamp_min(x, -0.3),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamp_narrower_than_its_group(lower: Lower, name: str) -> None:
    """The group's range is that of ``wide`` (tens); the clamp must still hold at its bound."""
    function = CLAMPS[name]
    case = lower(
        Net(lambda m, x: torch.cat([function(m.a(x)), m.wide(x)], 1), channels=16), _input()
    )
    report = case.check(5 * _input(batch=3))
    assert any("clamp" in row.kernel or "relu" in row.kernel for row in report.rows), f"\n{report}"


@pytest.mark.parametrize("name", CLAMPS)
def test_clamped_sum_narrower_than_its_group(lower: Lower, name: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.cat([CLAMPS[name](m.c(y) + y), m.wide(x)], 1)

    case = lower(Net(body, channels=16), _input())
    assert any("binary" in k for k in case.kernels)
    case.check(5 * _input(batch=3))


def test_a_clamped_value_never_leaves_the_clamp(lower: Lower) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(lambda m, x: x)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu6(self.net.a(x))
            z = torch.cat([y, self.net.wide(x)], 1)
            return z[:, :8] + self.net.head(z[:, 8:]).sum() * 0

    case = lower(Outputs(), 3 * _input())
    given = case.int8(10 * _input())
    step = float(given.unique().diff().min())
    assert step < 2
    assert float(given.min()) == 0
    assert abs(float(given.max()) - 6) <= step / 2


@pytest.mark.parametrize("clamp", [F.relu, F.relu6])
def test_clamps_that_the_range_expresses_are_free(lower: Lower, clamp: Any) -> None:
    case = lower(Net(lambda m, x: clamp(m.a(x))), 30 * _input())
    assert case.kernels[0] == "quantized::conv2d (onednn)"
    assert not any("clamp" in k for k in case.kernels)
    case.check(90 * _input())


def test_relu_of_a_concatenation(lower: Lower) -> None:
    case = lower(Net(lambda m, x: F.relu(torch.cat([m.a(x), m.b(x)], 1)), channels=16), _input())
    report = case.check(3 * _input(batch=3))
    assert any(row.kind == "cat+relu" for row in report.rows), f"\n{report}"


def test_concatenation_of_one_value_with_itself(lower: Lower) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.cat([y, y], 1)

    lower(Net(body, channels=16), _input()).check(3 * _input(batch=3))


def test_concatenation_of_a_network_input(lower: Lower) -> None:
    case = lower(Net(lambda m, x: torch.cat([m.a(x), x], 1), channels=11), _input())
    case.check(3 * _input(batch=3))
    assert "aten::cat on bytes" in case.kernels


def test_dense_block(lower: Lower) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        z = F.relu(m.b(x))
        first = torch.cat([y, z], 1)
        return torch.cat([first, F.max_pool2d(first, 3, 1, 1), m.wide(x)], 1)

    lower(Net(body, channels=40), _input()).check(3 * _input(batch=3, size=(7, 5)))


def test_groups_are_joined_through_pools_and_views(lower: Lower) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(m.a(x), 2)
        z = F.interpolate(m.b(x), scale_factor=0.5)
        w = F.pad(m.wide(x), (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
        return torch.cat([y, z, F.avg_pool2d(w, 2)], 1)

    case = lower(Net(body, channels=24), _input())
    report = case.check(3 * _input(batch=3))
    assert not any(row.kind == "dequantize" for row in report.rows)


def test_a_shape_computed_in_the_graph(lower: Lower) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        batch, channels, height, width = y.shape
        z = y.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        z = z.reshape(batch, -1, height, width)
        return F.interpolate(z, size=(y.size(2) + 3, y.shape[3] * 2)) * 1.0 + z.mean()

    case = lower(Net(body), _input())
    case.check(_input(batch=5, size=(7, 3)))


def test_shuffle_unit(lower: Lower) -> None:
    """ShuffleNet: split, convolve one half, concatenate, shuffle."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.stem(x).chunk(2, dim=1)
            return self.head(F.channel_shuffle(torch.cat([left, F.relu(self.conv(right))], 1), 2))

    lower(Unit(), _input()).check(_input(batch=3, size=(6, 7)))


def test_a_view_whose_memory_is_reused(lower: Lower) -> None:
    """The sum overwrites ``y``; the slice of ``y`` is read after it."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.b, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(self.stem(x), 1)
            part = y[:, ::2]
            z = self.a(self.b(y)) + y
            return self.head(torch.cat([part, z[:, 4:]], 1))

    case = lower(Views(), _input())
    assert any("binary" in k for k in case.kernels)
    case.check(_input(batch=3))
    case.check(_input().contiguous(memory_format=torch.channels_last))


def test_a_3d_pool_without_a_batch_stays_in_float(lower: Lower) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.AvgPool3d(2), nn.Linear(4, 3))
    case = lower(model, torch.randn(2, 4, 6, 8))
    assert "has no batch dimension" in case.reasons()
    case.check(torch.randn(2, 4, 6, 8))


UNREAD: dict[str, Callable[[Any, Tensor], Any]] = {
    "convolution": lambda m, y: m.c(y),
    "convolution and relu": lambda m, y: F.relu(m.c(y)),
    "transposed convolution": lambda m, y: m.up(y),
    "sum": lambda m, y: m.c(y) + y,
    "pool": lambda m, y: F.max_pool2d(y, 2),
    "concatenation": lambda m, y: torch.cat([y, y]),
    "shape": lambda m, y: y.shape,
    "float": lambda m, y: torch.softmax(y, 1),
    "clamp": lambda m, y: F.relu6(F.max_pool2d(y, 1)),
    "pieces": lambda m, y: y.chunk(2, 1),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_result_that_nobody_reads(lower: Lower, name: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        UNREAD[name](m, y)
        return y

    lower(Net(body), _input()).check(_input(batch=3))
