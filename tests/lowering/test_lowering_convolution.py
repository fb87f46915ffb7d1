"""conv1d, conv2d and conv3d in every form, geometry, layout and with every epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lower = Callable[..., Any]

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTION: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SIZES = {1: (31,), 2: (13, 17), 3: (7, 9, 6)}
_OTHER_SIZES = {1: (18,), 2: (16, 11), 3: (5, 6, 8)}


class TwoConvolutions(nn.Module):
    """The second convolution reads what the first wrote; the first is the one that is tested."""

    def __init__(self, dimensions: int, first: nn.Module, epilogue: Any = None) -> None:
        super().__init__()
        self.first = first
        self.epilogue = epilogue or (lambda x: x)
        channels = first.weight.shape[0]
        self.second = _CONV[dimensions](channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.epilogue(self.first(x)))


class FunctionalConvolution(nn.Module):
    def __init__(self, dimensions: int, **options: Any) -> None:
        super().__init__()
        self.dimensions, self.options = dimensions, options
        groups = options.get("groups", 1)
        self.weight = nn.Parameter(torch.randn(12, 6 // groups, *[3] * dimensions) / 6)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return _FUNCTION[self.dimensions](x, self.weight, self.bias, **self.options)


def _input(dimensions: int, *, batch: int = 2, channels: int = 6, other: bool = False) -> Tensor:
    sizes = (_OTHER_SIZES if other else _SIZES)[dimensions]
    return torch.randn(batch, channels, *sizes) + 0.4


_GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "padding": 1},
    "depthwise strided": {"groups": 6, "padding": 1, "stride": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "no bias": {"bias": False},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("name", _GEOMETRIES)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_geometry(lower: Lower, dimensions: int, name: str) -> None:
    options = {"kernel_size": 3, **_GEOMETRIES[name]}
    case = lower(
        TwoConvolutions(dimensions, _CONV[dimensions](6, 12, **options)), _input(dimensions)
    )
    assert case.kernels[0].startswith(f"quantized::conv{dimensions}d (")
    assert len(case.kernels) == 2
    case.check(_input(dimensions))
    case.check(3 * _input(dimensions, batch=1, other=True))
    case.check(_input(dimensions, batch=3, other=True))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": (1, 5), "padding": (0, 2)},
        {"kernel_size": (5, 1), "dilation": (2, 1)},
        {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 3)},
    ],
    ids=str,
)
def test_unequal_sides(lower: Lower, options: dict[str, Any]) -> None:
    options = {"kernel_size": 3, **options}
    case = lower(TwoConvolutions(2, nn.Conv2d(6, 12, **options)), _input(2))
    assert len(case.kernels) == 2
    case.check(_input(2))
    case.check(_input(2, batch=1, other=True))


def test_padding_same_that_is_uneven_stays_in_float_and_says_why(lower: Lower) -> None:
    case = lower(TwoConvolutions(2, nn.Conv2d(6, 12, 4, padding="same")), _input(2))
    assert len(case.kernels) == 1
    assert "pads more after than before" in case.reasons()
    case.check(_input(2))


@pytest.mark.parametrize("name", ["plain", "strided", "depthwise", "grouped", "dilated"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_functional_form(lower: Lower, dimensions: int, name: str) -> None:
    case = lower(
        TwoConvolutions(dimensions, FunctionalConvolution(dimensions, **_GEOMETRIES[name])),
        _input(dimensions),
    )
    assert len(case.kernels) == 2
    case.check(_input(dimensions, batch=3, other=True))


@pytest.mark.parametrize("channels", [3, 6, 16])
def test_layouts(lower: Lower, channels: int) -> None:
    x = torch.randn(2, channels, 13, 17)
    last = x.contiguous(memory_format=torch.channels_last)
    case = lower(TwoConvolutions(2, nn.Conv2d(channels, 12, 3, padding=1)), x)
    case.check(x)
    case.check(last)
    assert torch.equal(case.int8(x), case.int8(last))
    case.check(torch.randn(2, 17, 13, channels).permute(0, 3, 2, 1))  # a view of something else
    case.check(torch.randn(2, channels, 26, 17)[:, :, ::2])


EPILOGUES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    # name: function, kernel with integers out, and behind a float head
    "relu": (F.relu, "quantized::conv2d (", "relu"),
    "relu6": (F.relu6, "quantized::conv2d", "hardtanh"),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.75), "quantized::conv2d", "hardtanh"),
    "clamp": (lambda x: x.clamp(-0.3, 0.9), "quantized::conv2d", "hardtanh"),
    "clamp_min": (lambda x: torch.clamp(x, min=-0.25), "quantized::conv2d", ""),
    "clamp_max": (lambda x: torch.clamp_max(x, 0.4), "quantized::conv2d", ""),
    "hardswish": (F.hardswish, "onednn::qconv_pointwise[hardswish]", "hardswish"),
    "silu": (F.silu, "onednn::qconv_pointwise[swish]", "swish"),
    "gelu": (F.gelu, "onednn::qconv_pointwise[none] -> fp32", ""),
    "sigmoid": (torch.sigmoid, "onednn::qconv_pointwise[none] -> fp32", ""),
    "tanh": (torch.tanh, "onednn::qconv_pointwise[none] -> fp32", ""),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), "onednn::qconv_pointwise[none] -> fp32", ""),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("groups", [1, 6])
def test_epilogue(lower: Lower, name: str, groups: int) -> None:
    function, kernel, _ = EPILOGUES[name]
    case = lower(
        TwoConvolutions(2, nn.Conv2d(6, 12, 3, padding=1, groups=groups), function), _input(2)
    )
    assert case.kernels[0].startswith(kernel)
    case.check(_input(2))
    case.check(4 * _input(2, batch=3, other=True))


@pytest.mark.parametrize("name", EPILOGUES)
def test_float_head(lower: Lower, name: str) -> None:
    function, _, post_op = EPILOGUES[name]
    first = nn.Conv2d(6, 8, 3, padding=1)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = first, nn.Conv2d(8, 7, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.head(self.first(x)))

    case = lower(Head(), _input(2))
    assert case.kernels[-1] == f"onednn::qconv_pointwise[{post_op or 'none'}] -> fp32"
    case.check(_input(2))
    case.check(4 * _input(2, batch=3, other=True))


@pytest.mark.parametrize("name", ["relu", "relu6", "hardswish", "silu", "gelu", "leaky_relu"])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_epilogue_in_other_dimensions(lower: Lower, dimensions: int, name: str) -> None:
    function = EPILOGUES[name][0]
    case = lower(
        TwoConvolutions(dimensions, _CONV[dimensions](6, 12, 3), function), _input(dimensions)
    )
    case.check(_input(dimensions))
    case.check(4 * _input(dimensions, batch=3, other=True))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_float_head_in_all_dimensions(lower: Lower, dimensions: int) -> None:
    case = lower(_CONV[dimensions](6, 12, 3, stride=2, padding=1), _input(dimensions))
    assert case.kernels == ["onednn::qconv_pointwise[none] -> fp32"]
    case.check(_input(dimensions))
    case.check(4 * _input(dimensions, batch=3, other=True))


def test_padding_of_zero_points_is_zero_in_float(lower: Lower) -> None:
    """What is padded is the value 0, which is the integer ``zero_point``, never the integer 0."""
    first = nn.Conv2d(6, 12, 3, padding=2)
    x = torch.rand(2, 6, 9, 9) - 3.0  # zero point 255
    case = lower(TwoConvolutions(2, first), x)
    case.check(x)
    x = torch.rand(2, 6, 9, 9) + 3.0  # zero point 0
    lower(TwoConvolutions(2, nn.Conv2d(6, 12, 3, padding=2)), x).check(x)


def test_one_weight_in_two_calls(lower: Lower) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(F.relu(self.conv(x))))

    case = lower(Twice(), _input(2))
    assert len(case.kernels) == 3
    assert sum(name.endswith("conv_weight") for name, _ in case.int8.named_buffers()) == 1
    case.check(_input(2, batch=1, other=True))


def test_per_tensor_weights(lower: Lower) -> None:
    from fxquant.observers import HistogramObserver, MinMaxObserver
    from fxquant.qconfig import QConfig

    qconfig = QConfig(
        activation=HistogramObserver,
        weight=MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
    )
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(),
                          nn.Conv2d(8, 4, 1))  # fmt: skip
    case = lower(model, _input(2), mapping={"": qconfig})
    assert len(case.kernels) == 3
    case.check(_input(2, other=True))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_an_input_without_a_batch_stays_in_float_and_says_why(
    lower: Lower, dimensions: int
) -> None:
    x = _input(dimensions)[0]
    case = lower(TwoConvolutions(dimensions, _CONV[dimensions](6, 12, 3)), x)
    assert case.kernels == []
    assert "has no batch dimension" in case.reasons()
    case.check(x)


def test_an_empty_batch(lower: Lower) -> None:
    x = _input(2)
    case = lower(TwoConvolutions(2, nn.Conv2d(6, 12, 3), F.silu), x)
    assert case.int8(x[:0]).shape == (0, *case.int8(x).shape[1:])
    case.check(x[:0])


def test_one_output_pixel_and_one_channel(lower: Lower) -> None:
    lower(TwoConvolutions(2, nn.Conv2d(1, 1, 3)), torch.randn(2, 1, 3, 3)).check(
        torch.randn(1, 1, 3, 3)
    )
