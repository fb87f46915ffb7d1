"""SAME padding against TensorFlow's definition, and the nets that use it at other sizes."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.models_zoo.efficientnet_lite0 import EfficientNetLite0
from fxquant.models_zoo.mobilenet_v2_folded import MobileNetV2Folded
from fxquant.models_zoo.same_padding import Conv2dSame, same_padding_total

SIZES = [5, 6, 7, 8, 13, 32, 33]


def tensorflow_total(size: int, kernel: int, stride: int) -> int:
    """The other form of the rule, as TensorFlow documents it: by the remainder of the size."""
    remainder = size % stride
    return max(kernel - (stride if remainder == 0 else remainder), 0)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_total_equals_the_documented_form(kernel: int, stride: int) -> None:
    for size in SIZES:
        assert same_padding_total(size, kernel, stride) == tensorflow_total(size, kernel, stride)


@pytest.mark.parametrize("size", SIZES)
def test_dilation_widens_the_kernel(size: int) -> None:
    assert same_padding_total(size, 3, 2, dilation=2) == same_padding_total(size, 5, 2)


def convolve_by_definition(x: Tensor, conv: Conv2dSame) -> Tensor:
    """``out[o] = bias + sum_k w[k] * x[o * stride - before + k]``, zero outside, in float64."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    rows, columns = x.shape[-2:]
    top, left = (tensorflow_total(n, kernel, stride) // 2 for n in (rows, columns))
    weight = conv.weight.detach().double()
    out = torch.zeros(
        x.shape[0], conv.out_channels, -(-rows // stride), -(-columns // stride), dtype=torch.double
    )
    per_group = conv.in_channels // conv.groups
    for channel in range(conv.out_channels):
        first = channel // (conv.out_channels // conv.groups) * per_group
        source = x[:, first : first + per_group].double()
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                for a in range(kernel):
                    for b in range(kernel):
                        row, column = i * stride - top + a, j * stride - left + b
                        if 0 <= row < rows and 0 <= column < columns:
                            products = source[:, :, row, column] * weight[channel, :, a, b]
                            out[:, channel, i, j] += products.sum(1)
        if conv.bias is not None:
            out[:, channel] += conv.bias.detach().double()[channel]
    return out


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("shape", [(7, 8), (6, 5)])
def test_convolution_equals_its_definition(
    kernel: int, stride: int, groups: int, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = Conv2dSame(4, 4, kernel, stride=stride, groups=groups)
    x = torch.randn(2, 4, *shape)
    # At most 100 float32 products of order 1 in a sum: 100 * 2**-24 * 4 is below 3e-5.
    torch.testing.assert_close(
        conv(x).double(), convolve_by_definition(x, conv), atol=3e-5, rtol=0.0
    )


def record_max(tracer_call: Callable[[], fx.Graph], monkeypatch: pytest.MonkeyPatch) -> fx.Graph:
    """Trace while the built-in ``max`` of a proxy becomes a node."""
    original = builtins.max

    def recording(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "max", recording)
        return tracer_call()


@pytest.mark.parametrize("factory", [EfficientNetLite0, MobileNetV2Folded])
@pytest.mark.parametrize("size", [(97, 130), (64, 64)])
def test_nets_trace_and_stay_right_at_other_sizes(
    factory: Callable[[], nn.Module], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = factory().eval()
    graph = record_max(lambda: fx.Tracer().trace(model), monkeypatch)
    traced = fx.GraphModule(model, graph)
    modules = {model.get_submodule(str(n.target)) for n in graph.find_nodes(op="call_module")}
    assert not any(isinstance(module, Conv2dSame) for module in modules)  # seen through
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("factory", "head"), [(EfficientNetLite0, "_conv_head"), (MobileNetV2Folded, "head")]
)
def test_five_halvings_round_up(factory: Callable[[], nn.Module], head: str) -> None:
    model = factory().eval()
    shapes: list[tuple[int, ...]] = []
    model.get_submodule(head).register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 3, 97, 130))
    assert shapes == [(1, 1280, 4, 5)]  # ceil(97 / 32), ceil(130 / 32)
