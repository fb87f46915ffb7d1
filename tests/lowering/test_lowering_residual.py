"""Residual adds: the kernel overwrites its accumulator, so who else reads it decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.qconfig_mapping import get_default_qconfig_mapping

Lower = Callable[..., Any]

SUM = "onednn::qconv2d_pointwise.binary[sum]"
SUM_RELU = "onednn::qconv2d_pointwise.binary[sum, relu]"


class Net(nn.Module):
    """``body(self, x)`` between convolutions that make int8 inputs and read int8 results."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.stem = nn.Conv2d(6, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.narrow = nn.Conv2d(8, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x))


def _input(*, batch: int = 2, size: tuple[int, int] = (9, 12)) -> Tensor:
    return torch.randn(batch, 6, *size) + 0.3


def _plain(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    return m.b(m.a(y)) + y


def _plain_relu(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    return F.relu(y + m.b(m.a(y)))


def _read_later(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    z = m.b(m.a(y)) + y
    return m.norm(F.max_pool2d(z, 1)) * y


def _read_later_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    view = y.flatten(2)
    z = F.relu(m.a(m.b(y)) + y)
    return m.a(z) * view.view(z.shape)


def _is_the_input(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return m.a(y) + y


def _is_a_view_of_the_input(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return F.relu(m.a(y.view(y.shape)) + y)


def _twice_the_same_residual(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.a(y)
    first = m.a(z) + y
    return F.relu(m.b(first) + y)


def _chain(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    y = F.relu(m.b(m.a(y)) + y)
    y = F.relu(m.b(m.a(y)) + y)
    return m.b(m.a(y)) + y


def _both_convolutions(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return F.relu(m.a(y) + m.b(y))


def _read_as_float_later(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.a(m.b(y)) + y
    return z * torch.softmax(y, 1)


def _clamped_sum(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return F.relu6(m.a(m.b(y)) + y)


def _after_pooling(m: Any, x: Tensor) -> Tensor:
    y = F.max_pool2d(m.stem(x), 3, 1, 1)
    return m.a(m.b(y)) + y


def _accumulator_in_a_concatenation(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.a(m.b(y)) + y
    return torch.cat([z, y], 1)[:, ::2]


def _read_by_a_kernel_that_runs_later(m: Any, x: Tensor) -> Tensor:
    """``b`` stands before the sum, but its kernel, with the silu, runs after it."""
    y = m.stem(x)
    other = m.b(y)
    z = m.a(m.a(y)) + y
    return F.silu(other) * z


CASES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "plain": (_plain, [SUM]),
    "relu, other first": (_plain_relu, [SUM]),
    "read later": (_read_later, [SUM]),
    "read later through a view": (_read_later_through_a_view, [SUM]),
    "is the convolution's input": (_is_the_input, [SUM]),
    "shares memory with the input": (_is_a_view_of_the_input, [SUM]),
    "used by two sums": (_twice_the_same_residual, [SUM, SUM]),
    "chain": (_chain, [SUM, SUM, SUM]),
    "both are convolutions": (_both_convolutions, [SUM]),
    "read in float later": (_read_as_float_later, [SUM]),
    "clamped sum": (_clamped_sum, [SUM]),
    "after pooling": (_after_pooling, [SUM]),
    "read by a kernel that runs later": (_read_by_a_kernel_that_runs_later, [SUM]),
    "in a concatenation": (_accumulator_in_a_concatenation, [SUM]),
}


@pytest.mark.parametrize("name", CASES)
def test_residual(lower: Lower, name: str) -> None:
    body, kernels = CASES[name]
    case = lower(Net(body), _input(), mapping=get_default_qconfig_mapping())
    found = [k for k in case.kernels if "binary" in k]
    assert [k.replace(", relu]", "]") for k in found] == kernels, case.kernels
    case.check(_input())
    case.check(2.5 * _input(batch=3, size=(8, 5)))
    last = _input().contiguous(memory_format=torch.channels_last)
    assert torch.equal(case.int8(last), case.int8(last))  # nothing of the caller's is overwritten
    case.check(last)


def test_a_graph_input_is_never_overwritten(lower: Lower) -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.head(self.conv(x) + other)

    x, other = torch.randn(2, 8, 9, 9), torch.randn(2, 8, 9, 9)
    case = lower(Direct(), x, other)
    case.check(x, other)
    kept = other.clone()
    first = case.int8(x, other)
    assert torch.equal(other, kept)
    assert torch.equal(case.int8(x, other), first)
    assert case.kernels[0] == SUM


def test_a_residual_that_broadcasts_is_refused(lower: Lower) -> None:
    case = lower(Net(lambda m, x: m.a(y := m.stem(x)) + m.narrow(y)), _input())
    assert not any("binary" in k for k in case.kernels)
    assert "quantized::add" in case.kernels
    case.check(_input())
    case.check(_input(batch=1, size=(5, 7)))


def test_a_residual_that_broadcasts_the_batch_only_at_run_time(lower: Lower) -> None:
    """Equal shapes in the example, another batch later: the sum must not write the wrong bytes."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.head(self.conv(x) + other)

    x, other = torch.randn(1, 8, 9, 9), torch.randn(1, 8, 9, 9)
    case = lower(Bias(), x, other)
    x = torch.randn(4, 8, 9, 9)
    case.check(x, other)


def test_without_shapes_nothing_is_fused(lower: Lower) -> None:
    from fxquant.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(Net(_plain).eval(), None, None)
    prepared(_input())
    int8 = convert_fx(prepared)
    assert not any("binary" in str(n.target) for n in int8.graph.nodes)


@pytest.mark.parametrize("relu", [False, True])
def test_relu_where_the_range_does_not_give_it(lower: Lower, *, relu: bool) -> None:
    """In a group whose range has negative values, the relu is the kernel's post-op."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        z = m.a(m.b(y)) + y
        return torch.cat([F.relu(z) if relu else z, y], 1)[:, 4:12]

    case = lower(Net(body), _input())
    assert (SUM_RELU if relu else SUM) in case.kernels
    case.check(_input(batch=3))


def test_sum_read_in_float(lower: Lower) -> None:
    class FloatSum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y

    case = lower(FloatSum(), _input())
    assert not any("binary" in k for k in case.kernels)
    case.check(_input(batch=1, size=(5, 5)))
