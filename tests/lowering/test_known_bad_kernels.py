"""Kernels of PyTorch that the target avoids. A test that fails here means that torch mended one:
then the guard or the choice of engine that its docstring names can go.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.engines import engine
from fxquant.kernel_probe import exact_engine, is_exact

SCALE, ZERO_POINT = 0.02, 7


def _integers(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _quantized(values: Tensor, scale: float = SCALE, zero_point: int = ZERO_POINT) -> Tensor:
    return torch._make_per_tensor_quantized_tensor(values, scale, zero_point)


@pytest.mark.parametrize("name", ["fbgemm", "onednn"])
def test_per_channel_transposed_convolution_is_refused(name: str) -> None:
    """``annotate`` quantizes these weights per tensor (``weight_axis=None`` in the table)."""
    weight = torch._make_per_channel_quantized_tensor(
        torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8),
        torch.rand(4, dtype=torch.float64) / 100,
        torch.zeros(4, dtype=torch.int64),
        1,
    )
    prepack = torch.ops.quantized.conv_transpose2d_prepack
    with engine(name), pytest.raises(RuntimeError, match=r"(?i)per.channel"):
        prepack(weight, None, [1, 1], [0, 0], [0, 0], [1, 1], 1)


def test_onednn_transposed_convolution_is_wrong() -> None:
    """``emit_convolution_transpose`` packs for fbgemm whatever the engine."""
    torch.manual_seed(0)
    wrong = {}
    for outputs in (6, 4):
        integers = torch.randint(-127, 128, (6, outputs, 3, 3), dtype=torch.int8)
        x = _integers(2, 6, 7, 5)
        exact = F.conv_transpose2d(x.double() - ZERO_POINT, integers.double(), stride=2, padding=1)
        scale = float(exact.abs().max()) * SCALE / 120
        for name in ("fbgemm", "onednn"):
            with engine(name):
                packed = torch.ops.quantized.conv_transpose2d_prepack(
                    torch._make_per_tensor_quantized_tensor(integers, 1.0, 0),
                    None,
                    [2, 2],
                    [1, 1],
                    [0, 0],
                    [1, 1],
                    1,
                )
                given = torch.ops.quantized.conv_transpose2d(_quantized(x), packed, scale, 128)
            expected = (exact * SCALE / scale + 128).round().clamp(0, 255)
            wrong[name, outputs] = float((given.int_repr() - expected).abs().max())
    assert wrong["fbgemm", 6] <= 1
    assert wrong["fbgemm", 4] <= 1
    assert wrong["onednn", 4] > 50


def _transposed_error(outputs: int, kernel: list[int], stride: list[int], padding: int) -> float:
    """The largest difference of fbgemm's kernel from the exact sum, in LSB."""
    integers = torch.randint(-127, 128, (8, outputs, *kernel), dtype=torch.int8)
    x = _integers(2, 8, 7, 5)
    exact = F.conv_transpose2d(x.double() - 3, integers.double(), stride=stride, padding=padding)
    scale = float(exact.abs().max()) / 120
    with engine("fbgemm"):
        packed = torch.ops.quantized.conv_transpose2d_prepack(
            torch._make_per_tensor_quantized_tensor(integers, 1.0, 0),
            None, stride, [padding, padding], [0, 0], [1, 1], 1,
        )  # fmt: skip
    given = torch.ops.quantized.conv_transpose2d(_quantized(x, 1.0, 3), packed, scale, 128)
    expected = (exact / scale + 128).round().clamp(0, 255)
    return float((given.int_repr() - expected).abs().max())


def test_fbgemm_direct_transposed_convolution_is_wrong() -> None:
    """``no_wrong_fast_path`` keeps these in FP32; 2 x 2 with stride 2 becomes a 1 x 1 convolution.

    The path is taken for 8n to 8m channels, kernel height 2, stride up to 2 and no padding.
    """
    torch.manual_seed(0)
    assert _transposed_error(8, [2, 2], [2, 2], 0) > 50
    assert _transposed_error(8, [2, 2], [1, 1], 0) > 50
    assert _transposed_error(16, [2, 3], [2, 1], 0) > 50
    assert _transposed_error(8, [2, 2], [2, 2], 1) <= 1
    assert _transposed_error(6, [2, 2], [2, 2], 0) <= 1
    assert _transposed_error(8, [3, 3], [2, 2], 0) <= 1


def test_onednn_transposed_convolution_refuses_output_padding() -> None:
    weight = torch._make_per_tensor_quantized_tensor(
        torch.ones(4, 4, 3, 3, dtype=torch.int8), 1.0, 0
    )
    prepack = torch.ops.quantized.conv_transpose2d_prepack
    with engine("onednn"), pytest.raises(RuntimeError, match="zero output_padding"):
        prepack(weight, None, [2, 2], [1, 1], [1, 1], [1, 1], 1)


def test_fbgemm_depthwise_convolution_saturates() -> None:
    """:mod:`fxquant.kernel_probe` finds it out, so depthwise convolutions go to oneDNN."""
    assert not is_exact("depthwise", "fbgemm")
    assert is_exact("depthwise", "onednn")
    assert exact_engine("depthwise") == "onednn"


def test_concatenation_of_quantized_tensors_takes_the_first_parameters() -> None:
    """``cat`` shares parameters and concatenates bytes instead."""
    small = _quantized(_integers(2, 4), 0.01, 0)
    large = _quantized(_integers(2, 4), 1.0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once, and goes on
        joined = torch.cat([small, large])
    assert joined.q_scale() == small.q_scale()
    assert float(joined.dequantize().max()) < 3  # of 255


def test_linear_takes_no_vectors() -> None:
    """``emit_linear`` uses oneDNN's pointwise kernel for them."""
    weight = torch._make_per_tensor_quantized_tensor(torch.ones(3, 4, dtype=torch.int8), 1.0, 0)
    with engine("fbgemm"):
        packed = torch.ops.quantized.linear_prepack(weight, None)
    with pytest.raises(RuntimeError, match="larger than or equal to 2"):
        torch.ops.quantized.linear(_quantized(_integers(4)), packed, 1.0, 0)


def test_sum_overwrites_its_accumulator() -> None:
    """Why ``_accumulator`` copies: the result *is* the second operand's memory."""
    weight = torch.randint(-127, 128, (4, 4, 1, 1), dtype=torch.int8)
    scale, zero_point = torch.full((4,), 0.01), torch.zeros(4, dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, [1, 1], [0, 0], [1, 1], 1, None)
    x, other = (
        _integers(1, 4, 5, 5).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    before = other.clone()
    made = torch.ops.onednn.qconv2d_pointwise.binary(
        x, SCALE, 0, packed, scale, zero_point, other, None, [1, 1], [0, 0], [1, 1], 1,
        0.1, 10, torch.uint8, SCALE, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip
    assert torch.equal(made, other)
    assert not torch.equal(other, before)


_PROBE = """
import torch, warnings
from torch import nn
from fxquant.kernel_probe import exact_engine, is_exact
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.parity import parity

print([form for form in ("conv", "grouped", "depthwise", "linear") if is_exact(form, "onednn")])
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=8), nn.SiLU(),
    nn.Conv2d(32, 32, 3, groups=32), nn.SiLU(), nn.Conv2d(32, 4, 1),
).eval()
for parameter in model.parameters():
    parameter.data.abs_()
x = torch.rand(2, 32, 12, 12) * 10
prepared = prepare_fx(model, None, (x,))
prepared(x)
report = parity(prepared, convert_fx(prepared), (x,))
print([row.kernel for row in report.rows if row.kind not in ("quantize", "dequantize")])
print(report.ok)
"""


def test_without_vnni_onednn_saturates_and_is_avoided() -> None:
    """What fbgemm can do goes to fbgemm; what only oneDNN can do gets weights that fit it."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True
    )
    exact, kernels, right = done.stdout.strip().splitlines()
    assert exact == "['depthwise']"
    silu = "onednn::qconv_pointwise[swish]"
    last = "onednn::qconv_pointwise[none] -> fp32"
    assert kernels == str(["quantized::conv2d (fbgemm)", silu, silu, last])
    assert right == "True"


@pytest.mark.parametrize("name", ["onednn", "fbgemm"])
@pytest.mark.parametrize("form", ["conv", "grouped", "linear"])
def test_kernels_that_are_relied_upon_are_exact(form: str, name: str) -> None:
    assert is_exact(form, name)


def test_the_packing_for_onednn_ignores_the_activation() -> None:
    """``pack_onednn_conv`` packs before the activation's parameters are known."""
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (8, 6, 3, 3), dtype=torch.int8)
    scale, zero_point = torch.rand(8) / 100 + 0.001, torch.zeros(8, dtype=torch.int32)
    x = _integers(2, 6, 9, 9).contiguous(memory_format=torch.channels_last)
    results = []
    for parameters in ((1.0, 0, None), (SCALE, ZERO_POINT, [2, 6, 9, 9]), (3.0, 200, None)):
        input_scale, input_zero_point, shape = parameters
        packed = torch.ops.onednn.qconv_prepack(
            weight, scale, input_scale, input_zero_point, [1, 1], [1, 1], [1, 1], 1, shape
        )
        results.append(
            torch.ops.onednn.qconv_pointwise.default(
                x,
                SCALE,
                ZERO_POINT,
                packed,
                scale,
                zero_point,
                None,
                [1, 1],
                [1, 1],
                [1, 1],
                1,
                0.5,
                100,
                torch.uint8,
                "none",
                [],
                "",
            )
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_transposed_convolutions_are_right_whatever_the_engine(
    lower: Callable[..., Any],
) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2), nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 6, 7, 5)
    with engine("onednn"):
        lower(model, x).check(x)
