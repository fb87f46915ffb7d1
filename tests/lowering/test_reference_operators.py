"""``fxquant::quantize`` and ``dequantize`` against the definition and against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.specs import QParams, QuantSpec, dequantize, quantize

_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_TORCH = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def _values(scale: float, zero_point: int, seed: int) -> Tensor:
    """Random values, exact ties and their neighbours, and what lies far outside of the range."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(500, generator=generator) * scale * 150
    ties = (torch.arange(-300, 301) + 0.5) * scale
    near = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    return torch.cat([random, near, torch.tensor([0.0, -0.0, 1e30, -1e30]) * scale])


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2**-20, 1024, width=32),
    position=st.floats(0, 1),
    dtype=st.sampled_from([torch.uint8, torch.int8]),
    seed=st.integers(0, 1000),
)
def test_per_tensor(scale: float, position: float, dtype: torch.dtype, seed: int) -> None:
    low, high = _RANGES[dtype]
    zero_point = low + round(position * (high - low))
    x = _values(scale, zero_point, seed)
    spec = QuantSpec(dtype=dtype, qscheme=torch.per_tensor_affine, quant_min=low, quant_max=high)
    scale_tensor, zero = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    qparams = QParams(scale_tensor, zero, spec)
    integers = QUANTIZE(x, scale_tensor, zero, low, high, dtype)
    assert torch.equal(integers, quantize(x, qparams))
    theirs = torch.quantize_per_tensor(x, scale, zero_point, _TORCH[dtype])
    assert torch.equal(integers, theirs.int_repr())
    values = DEQUANTIZE(integers, scale_tensor, zero)
    assert torch.equal(values, dequantize(integers, qparams))
    assert torch.equal(values, theirs.dequantize())


@settings(max_examples=30, deadline=None)
@given(
    scales=st.lists(st.floats(2**-20, 1024, width=32), min_size=1, max_size=5),
    axis=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_per_channel(scales: list[float], axis: int, seed: int) -> None:
    scale = torch.tensor(scales)
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(-128, 128, (len(scales),), generator=generator, dtype=torch.int32)
    shape = [3, 4, 5]
    shape[axis] = len(scales)
    broadcast = [1, 1, 1]
    broadcast[axis] = -1
    x = torch.randn(shape, generator=generator) * 100 * scale.view(broadcast)
    integers = QUANTIZE(x, scale, zero, -128, 127, torch.int8, axis)
    theirs = torch.quantize_per_channel(x, scale.double(), zero.long(), axis, torch.qint8)
    assert torch.equal(integers, theirs.int_repr())
    assert torch.equal(DEQUANTIZE(integers, scale, zero, axis), theirs.dequantize())


def test_a_range_within_the_storage_is_kept() -> None:
    x = torch.linspace(-3, 3, 100)
    integers = QUANTIZE(x, torch.tensor(0.1), torch.tensor(5, dtype=torch.int32), 0, 9, torch.uint8)
    assert (int(integers.min()), int(integers.max())) == (0, 9)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "empty"])
def test_layouts_and_fake_tensors(layout: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x[:, :, ::2, 1:],
        "empty": x[:0],
    }[layout]
    scale, zero = torch.tensor(0.02), torch.tensor(100, dtype=torch.int32)
    integers = QUANTIZE(x, scale, zero, 0, 255, torch.uint8)
    assert integers.shape == x.shape
    assert torch.equal(integers, QUANTIZE(x.contiguous(), scale, zero, 0, 255, torch.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = QUANTIZE(mode.from_tensor(x), scale, zero, 0, 255, torch.uint8)
        back = DEQUANTIZE(fake, scale, zero)
    assert (fake.shape, fake.dtype) == (integers.shape, torch.uint8)
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
