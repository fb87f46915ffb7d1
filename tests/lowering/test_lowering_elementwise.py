"""add, mul, matmul, batch_norm and leaky_relu: broadcasting, epilogues and what stays in float."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lower = Callable[..., Any]


class Binary(nn.Module):
    """``head(body(pool(a(x)), pool(b(x))))``: the pools keep convolutions from fusing the sum."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Tensor], *, narrow: int = 8) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, narrow, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)
        self.constant = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = F.max_pool2d(self.a(x), 2), F.max_pool2d(self.b(x), 2)
        return self.head(self.body(self, y, z))


def _input(*, batch: int = 2, size: tuple[int, int] = (10, 14)) -> Tensor:
    return torch.randn(batch, 3, *size)


BROADCASTS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "channel": (lambda z: z, 1),
    "image": (lambda z: F.max_pool2d(z, (5, 7)), 8),
    "row": (lambda z: z[:, :, :1], 8),
    "column": (lambda z: z[:, :, :, 1:2], 8),
    "batch": (lambda z: z[:1], 8),
    "missing dimension": (lambda z: z[0], 8),
    "pixel": (lambda z: F.max_pool2d(z, (5, 7)), 1),
    "strided": (lambda z: torch.cat([z, z], 3)[:, :, :, ::2], 8),
}


@pytest.mark.parametrize("name", BROADCASTS)
@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_broadcasting(lower: Lower, op: Callable[..., Tensor], name: str) -> None:
    shrink, narrow = BROADCASTS[name]
    for swap in (False, True):

        def body(m: Any, y: Tensor, z: Tensor, swap: bool = swap) -> Tensor:
            return op(shrink(z), y) if swap else op(y, shrink(z))

        case = lower(Binary(body, narrow=narrow), _input())
        assert f"quantized::{op.__name__}" in case.kernels
        case.check(_input())
        case.check(3 * _input(batch=3))


EPILOGUES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (F.relu, ""),
    "relu6": (F.relu6, ""),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.75), ""),
    "clamp": (lambda x: x.clamp(-0.3, 0.9), ""),
    "clamp above zero": (lambda x: x.clamp(0.25, 0.9), "aten::clamp on int8"),
    "clamp_min": (lambda x: torch.clamp_min(x, -0.1), ""),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_epilogue(lower: Lower, op: Callable[..., Tensor], name: str) -> None:
    function, clamp = EPILOGUES[name]
    case = lower(Binary(lambda m, y, z: function(op(y, z))), _input())
    assert f"quantized::{op.__name__}" in case.kernels
    assert (not clamp) or clamp in case.kernels
    case.check(_input(batch=1, size=(16, 6)))
    case.check(4 * _input())


@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_relu_that_the_range_does_not_give_runs_in_the_kernel(
    lower: Lower, op: Callable[..., Tensor]
) -> None:
    case = lower(Binary(lambda m, y, z: torch.cat([F.relu(op(y, z)), z], 1)[:, 4:12]), _input())
    assert f"quantized::{op.__name__}_relu" in case.kernels
    case.check(4 * _input(batch=3))


@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_a_value_with_itself(lower: Lower, op: Callable[..., Tensor]) -> None:
    case = lower(Binary(lambda m, y, z: op(y, y) + op(z, z)), _input())
    case.check(_input(batch=3))


IN_FLOAT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "number": (lambda m, y, z: y + 1.5, "is a number"),
    "number first": (lambda m, y, z: 2 * y, "is a number"),
    "alpha": (lambda m, y, z: torch.add(y, z, alpha=2), "alpha=2"),
    "constant": (lambda m, y, z: y + m.constant, "is a constant tensor"),
}


@pytest.mark.parametrize("name", IN_FLOAT)
def test_stays_in_float_and_says_why(lower: Lower, name: str) -> None:
    body, reason = IN_FLOAT[name]
    case = lower(Binary(body), _input())
    assert not any(k.startswith(("quantized::add", "quantized::mul")) for k in case.kernels)
    assert reason in case.reasons()
    case.check(_input(batch=3))


@pytest.mark.parametrize(
    "spelling",
    [torch.matmul, operator.matmul, lambda y, z: y.matmul(z), lambda y, z: y @ z],
)
def test_matmul_ranks(lower: Lower, spelling: Callable[..., Tensor]) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(9, 16), nn.Linear(9, 16), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(spelling(self.a(x), self.b(x).transpose(-1, -2)))

    for shape in ((6, 9), (4, 6, 9), (2, 3, 6, 9)):
        case = lower(Product(), torch.randn(shape))
        assert "quantized::matmul" in case.kernels
        case.check(2 * torch.randn(shape))
        if len(shape) > 2:
            case.check(torch.randn(5, *shape[1:]))


@pytest.mark.parametrize("spelling", [torch.mm, lambda y, z: y.mm(z)])
def test_mm(lower: Lower, spelling: Callable[..., Tensor]) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(9, 16), nn.Linear(9, 16), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(spelling(self.a(x), self.b(x).t().t().transpose(0, 1)))

    case = lower(Product(), torch.randn(6, 9))
    case.check(2 * torch.randn(6, 9))


@pytest.mark.parametrize("name", ["none", *EPILOGUES])
def test_batch_norm(lower: Lower, name: str) -> None:
    function = EPILOGUES.get(name, (lambda x: x, ""))[0]
    case = lower(Binary(lambda m, y, z: function(m.norm(y))), _input())
    assert any(k.startswith("quantized::batch_norm2d") for k in case.kernels)
    case.check(_input(batch=3, size=(6, 6)))
    case.check(4 * _input().contiguous(memory_format=torch.channels_last))


def test_batch_norm_3d(lower: Lower) -> None:
    model = nn.Sequential(nn.MaxPool3d(1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1))
    model[1].running_mean.normal_()
    case = lower(model, torch.randn(2, 4, 3, 5, 4))
    assert any(k.startswith("quantized::batch_norm3d") for k in case.kernels)
    case.check(torch.randn(3, 4, 4, 2, 5))


def test_batch_norm_1d_stays_in_float(lower: Lower) -> None:
    model = nn.Sequential(nn.MaxPool1d(1), nn.BatchNorm1d(4), nn.Conv1d(4, 3, 1))
    case = lower(model, torch.randn(2, 4, 9))
    assert "BatchNorm1d has no int8 kernel" in case.reasons()
    case.check(torch.randn(3, 4, 5))
