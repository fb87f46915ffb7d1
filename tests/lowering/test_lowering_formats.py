"""Memory formats: kernels give channels_last, and what follows must cope with it, fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.metadata import record_of

Lower = Callable[..., Any]


class Gate(nn.Module):
    """Squeeze-excitation (Hu et al. 2018), as torchvision writes it: the gate comes first."""

    def __init__(self, *, gate_first: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(self.squeeze(self.pool(x)).relu()).sigmoid()
        return self.head(gate * x if self.gate_first else x * gate)


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_gate_is_the_second_operand(lower: Lower, gate_first: bool, batch: int) -> None:
    x = torch.randn(batch, 3, 9, 7)
    case = lower(Gate(gate_first=gate_first), x)
    product = next(
        n for n in case.int8.graph.nodes if record_of(n).kernel.startswith("quantized::mul")
    )
    first, second = product.args[:2]
    assert record_of(first).value.shape == (batch, 8, 9, 7)
    assert record_of(second).value.shape == (batch, 8, 1, 1)
    assert record_of(product).value.shape == (batch, 8, 9, 7)
    case.check(x)
    case.check(torch.randn(2, 3, 5, 12))


def test_the_kernel_writes_in_the_format_of_its_first_operand() -> None:
    """Why operands are exchanged; when this fails, the exchange can go."""
    x = torch.randn(1, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    big = torch.quantize_per_tensor(x, 0.05, 128, torch.quint8)
    small = torch.quantize_per_tensor(torch.rand(1, 8, 1, 1), 1 / 255, 0, torch.quint8)
    fast = torch.ops.quantized.mul(big, small, 0.05, 128)
    slow = torch.ops.quantized.mul(small, big, 0.05, 128)
    assert torch.equal(fast.int_repr(), slow.int_repr())
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert not slow.is_contiguous(memory_format=torch.channels_last)


class Viewed(nn.Module):
    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.view = nn.Conv2d(3, 8, 3), view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.conv(x)).softmax(-1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.view(y.size(0), -1),
    "view of a tuple": lambda y: y.view((y.shape[0], -1)),
    "view_as": lambda y: y.view_as(y.flatten(1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_float_view_of_what_a_kernel_gives(lower: Lower, name: str) -> None:
    x = torch.randn(2, 3, 6, 7)
    case = lower(Viewed(VIEWS[name]), x)
    assert any("-> fp32" in kernel for kernel in case.kernels)
    case.check(x)
    case.check(torch.randn(4, 3, 5, 9))


def test_a_view_of_another_dtype_stays(lower: Lower) -> None:
    class AsIntegers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(torch.int32).view(torch.float32)

    x = torch.randn(2, 3, 6, 7)
    case = lower(AsIntegers(), x)
    assert [n.target for n in case.int8.graph.nodes if n.op == "call_method"] == ["view", "view"]
    case.check(x)


class Unit(nn.Module):
    """One unit of ShuffleNet v2 (Ma et al. 2018, figure 3 c)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)
        self.branch = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat((left, self.branch(right).relu()), dim=1)
        batch, channels, height, width = y.size()
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.head(y.view(batch, channels, height, width))


def test_a_shuffle_unit_stays_in_int8_and_in_channels_last(lower: Lower) -> None:
    x = torch.randn(2, 3, 9, 7)
    case = lower(Unit(), x)
    targets = [n.target for n in case.int8.graph.nodes]
    assert targets.count(torch.dequantize) == 0
    assert targets.count(torch.quantize_per_tensor) == 1
    assert "aten::chunk on bytes" in case.kernels
    assert "aten::channel_shuffle on bytes" in case.kernels
    formats = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if record_of(n).kernel == "aten::channel_shuffle on bytes":
                formats.append(value.is_contiguous(memory_format=torch.channels_last))
            return value

    Watch(case.int8).run(x)
    assert formats == [True]
    case.check(x)
    case.check(torch.randn(1, 3, 5, 12))
