"""conv_transpose: fbgemm with per-tensor weights, in every geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lower = Callable[..., Any]

_TRANSPOSE: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_SIZES = {1: (17,), 2: (7, 9), 3: (4, 3, 5)}

_GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "doubling": {"stride": 2, "padding": 1, "output_padding": 1},
    "strided": {"stride": 3, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 6, "stride": 2, "padding": 1},
    "no bias": {"bias": False, "stride": 2},
}


def _model(dimensions: int, *, outputs: int = 12, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        _TRANSPOSE[dimensions](6, outputs, **{"kernel_size": 3, **options}),
        _CONV[dimensions](outputs, 5, 1),
    )


def _input(dimensions: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, *_SIZES[dimensions]) + 0.3


@pytest.mark.parametrize("name", _GEOMETRIES)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_geometry(lower: Lower, dimensions: int, name: str) -> None:
    case = lower(_model(dimensions, **_GEOMETRIES[name]), _input(dimensions))
    assert case.kernels[0] == f"quantized::conv_transpose{dimensions}d (fbgemm)"
    case.check(_input(dimensions))
    case.check(3 * torch.randn(3, 6, *(s + 2 for s in _SIZES[dimensions])))


@pytest.mark.parametrize("kernel", [(2, 2), (2, 3), (3, 3), (1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3), (4, 2)], ids=str)
def test_channels_in_eights(lower: Lower, kernel: Any, stride: Any) -> None:
    """Where fbgemm would take its wrong path, and next to it."""
    model = nn.Sequential(nn.ConvTranspose2d(8, 16, kernel, stride), nn.Conv2d(16, 3, 1))
    case = lower(model, torch.randn(2, 8, 7, 5))
    first = case.kernels[0]
    if kernel == stride:
        assert first == "quantized::conv2d (onednn)"
    elif kernel[0] == 2:
        assert first.endswith("-> fp32")
        assert "transposed convolution without padding is wrong" in case.reasons()
    else:
        assert first == "quantized::conv_transpose2d (fbgemm)"
    case.check(torch.randn(3, 8, 4, 6))
    case.check(torch.randn(1, 8, 7, 5).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("kernel", [2, 3, (3, 2)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_non_overlapping(lower: Lower, kernel: Any, *, bias: bool) -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(6, 5, kernel, kernel, bias=bias), nn.ReLU6(), nn.Conv2d(5, 3, 1)
    )
    case = lower(model, _input(2))
    assert case.kernels[:2] == ["quantized::conv2d (onednn)", "interleave on bytes"]
    case.check(3 * _input(2, batch=3))


@pytest.mark.parametrize("outputs", [2, 6, 18])
def test_channels(lower: Lower, outputs: int) -> None:
    lower(_model(2, outputs=outputs, stride=2), _input(2)).check(_input(2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_batch_norm_is_folded(lower: Lower, dimensions: int, groups: int) -> None:
    norm = _NORM[dimensions](12)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    model = nn.Sequential(
        _TRANSPOSE[dimensions](6, 12, 3, stride=2, groups=groups),
        norm,
        nn.ReLU(),
        _CONV[dimensions](12, 5, 1),
    )
    case = lower(model, _input(dimensions))
    assert len(case.kernels) == 2
    report = case.check(_input(dimensions, batch=3))
    assert not any("batch_norm" in row.kind for row in report.rows)


CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75),
    "clamp": lambda x: x.clamp(0.25, 0.75),
}


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("wide", [False, True])
def test_clamp(lower: Lower, name: str, *, wide: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(6, 8, 2, stride=2), nn.Conv2d(16, 3, 1)
            self.other = nn.ConvTranspose2d(6, 8, 2, stride=2)
            if wide:
                nn.init.normal_(self.other.weight, std=5.0)

        def forward(self, x: Tensor) -> Tensor:
            clamped = CLAMPS[name](self.up(x))
            other = self.other(x) if wide else clamped
            return self.head(torch.cat([clamped, other], 1))

    case = lower(Net(), _input(2))
    case.check(4 * _input(2, batch=3))
    clamped = name == "clamp" or (wide and name != "relu")
    assert ("aten::clamp on int8" in case.kernels) == clamped


def test_result_of_the_network(lower: Lower) -> None:
    """The kernel writes integers only: they are dequantized for the caller."""
    case = lower(nn.ConvTranspose2d(6, 4, 3, stride=2), _input(2))
    assert case.kernels == ["quantized::conv_transpose2d (fbgemm)"]
    case.check(_input(2, batch=1))


def test_output_size_argument(lower: Lower) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(6, 4, 3, stride=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(x, output_size=(16, 20)))

    case = lower(Sized(), _input(2))
    case.check(_input(2))


def test_decoder(lower: Lower) -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2 = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.merge, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            first = F.relu(self.down1(x))
            second = F.relu(self.down2(F.max_pool2d(first, 2)))
            return self.head(F.relu(self.merge(torch.cat([self.up(second), first], 1))))

    case = lower(UNet(), torch.randn(2, 6, 8, 12))
    report = case.check(torch.randn(3, 6, 16, 10))
    assert not any(row.kind == "dequantize" for row in report.rows)
