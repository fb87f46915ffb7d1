"""linear in every form, rank and with every epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lower = Callable[..., Any]


class TwoLinears(nn.Module):
    def __init__(self, *, bias: bool = True, epilogue: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(23, 37, bias=bias)
        self.second = nn.Linear(37, 11)
        self.epilogue = epilogue or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.epilogue(self.first(x)))


class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(37, 23) / 4)
        self.bias = nn.Parameter(torch.randn(37))
        self.second = nn.Linear(37, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(F.linear(x, self.weight, bias=self.bias)))


def _input(*shape: int) -> Tensor:
    return torch.randn(*(shape or (16,)), 23) + 0.2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (2, 5), (2, 3, 4), (1,), ()], ids=str)
def test_ranks(lower: Lower, shape: tuple[int, ...], *, bias: bool) -> None:
    case = lower(TwoLinears(bias=bias), torch.randn(*shape, 23))
    packed, head = "quantized::linear (fbgemm)", "onednn::qlinear_pointwise[none] -> fp32"
    assert case.kernels == [packed if shape else "onednn::qlinear_pointwise[none]", head]
    case.check(torch.randn(*shape, 23))
    if shape:
        case.check(3 * torch.randn(7, *shape[1:], 23))


def test_functional_form(lower: Lower) -> None:
    case = lower(FunctionalLinear(), _input())
    assert len(case.kernels) == 2
    case.check(_input(3, 4))


def test_inputs_that_are_not_contiguous(lower: Lower) -> None:
    case = lower(TwoLinears(), _input(4, 5))
    case.check(_input(5, 4).transpose(0, 1))
    case.check(torch.randn(23, 6, 5).permute(2, 1, 0))


def test_weights_that_are_not_contiguous(lower: Lower) -> None:
    model = TwoLinears()
    for linear in (model.first, model.second):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
        assert not linear.weight.is_contiguous()
    case = lower(model, _input())
    case.check(_input(3, 4))


EPILOGUES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "relu": (F.relu, "quantized::linear (", "relu"),
    "relu6": (F.relu6, "quantized::linear", "hardtanh"),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.75), "quantized::linear", "hardtanh"),
    "clamp": (lambda x: x.clamp(-0.3, 0.9), "quantized::linear", "hardtanh"),
    "hardswish": (F.hardswish, "onednn::qlinear_pointwise[hardswish]", "hardswish"),
    "silu": (F.silu, "onednn::qlinear_pointwise[swish]", "swish"),
    "gelu": (F.gelu, "onednn::qlinear_pointwise[gelu]", "gelu"),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"), "onednn::qlinear_pointwise[gelu]", "gelu",
    ),
    "sigmoid": (torch.sigmoid, "onednn::qlinear_pointwise[none] -> fp32", ""),
    "tanh": (torch.tanh, "onednn::qlinear_pointwise[tanh]", "tanh"),
    "leaky_relu": (
        lambda x: F.leaky_relu(x, 0.1), "onednn::qlinear_pointwise[leaky_relu]", "leaky_relu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogue(lower: Lower, name: str) -> None:
    function, kernel, _ = EPILOGUES[name]
    case = lower(TwoLinears(epilogue=function), _input(64))
    assert case.kernels[0].startswith(kernel)
    case.check(_input(64))
    case.check(5 * _input(3, 9))


@pytest.mark.parametrize("name", EPILOGUES)
def test_float_head(lower: Lower, name: str) -> None:
    function, _, post_op = EPILOGUES[name]
    model = TwoLinears()

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return function(self.model(x))

    case = lower(Head(), _input(64))
    assert case.kernels[-1] == f"onednn::qlinear_pointwise[{post_op or 'none'}] -> fp32"
    case.check(_input(64))
    case.check(5 * _input(3, 9))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 7), (7, 1), (1280, 3), (3, 129)])
def test_widths(lower: Lower, inputs: int, outputs: int) -> None:
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, 2))
    case = lower(model, torch.randn(9, inputs))
    case.check(torch.randn(5, inputs))


def test_relu_in_a_group_with_negative_values(lower: Lower) -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(23, 8), nn.Linear(23, 8), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([F.relu(self.a(x)), self.b(x)], -1))

    case = lower(Group(), _input(32))
    assert case.kernels[0] == "quantized::linear_relu (fbgemm)"
    case.check(_input(5))
