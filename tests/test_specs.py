"""Specs, and the arithmetic of quantization against its definition in exact fractions."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import SpecError
from fxquant.specs import (
    DEFAULT_EPS,
    QParams,
    QuantSpec,
    choose_qparams,
    default_range,
    dequantize,
    fake_quantize,
    quantize,
    storage_dtype,
)


def spec(
    dtype: torch.dtype = torch.uint8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    low: int | None = None,
    high: int | None = None,
    **rest: object,
) -> QuantSpec:
    default = default_range(dtype)
    return QuantSpec(
        dtype=dtype,
        qscheme=qscheme,
        quant_min=default[0] if low is None else low,
        quant_max=default[1] if high is None else high,
        **rest,  # type: ignore[arg-type]
    )


U8 = spec()
S8 = spec(torch.int8, torch.per_tensor_symmetric, -127, 127)


def round_half_even(value: Fraction) -> int:
    floor = math.floor(value)
    rest = value - floor
    if rest == Fraction(1, 2):
        return floor + floor % 2
    return floor + (rest > Fraction(1, 2))


def as_float32(value: Fraction) -> Fraction:
    """The nearest float32; through float64, whose own rounding is 2**29 times finer."""
    return Fraction(float(torch.tensor(float(value), dtype=torch.float64).to(torch.float32)))


def quantize_by_definition(x: Tensor, qparams: QParams) -> list[int]:
    """Per tensor, 8 bits: one rounding to float32 of ``x * (1 / scale) + zero_point``."""
    inverse = as_float32(1 / Fraction(float(qparams.scale)))
    zero_point, s = int(qparams.zero_point), qparams.spec
    return [
        min(max(round_half_even(as_float32(Fraction(v) * inverse + zero_point)), s.quant_min),
            s.quant_max)
        for v in x.flatten().tolist()
    ]  # fmt: skip


def near_ties(scale: float, count: int) -> Tensor:
    """Values around every ``(k + 0.5) * scale``, up to two float32 steps away."""
    generator = torch.Generator().manual_seed(count)
    k = torch.randint(-300, 300, (count,), generator=generator, dtype=torch.float64)
    x = ((k + 0.5) * scale).to(torch.float32)
    steps = torch.randint(-2, 3, (count,), generator=generator, dtype=torch.int32)
    return (x.view(torch.int32) + steps).view(torch.float32)


# ------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is no quantization dtype"),
        ({"dtype": torch.quint8}, "dtype torch.quint8 is no quantization dtype"),
        ({"qscheme": "affine"}, "qscheme 'affine' is not known"),
        ({"quant_min": 5, "quant_max": 5}, "quant_min must be less than quant_max, got 5..5"),
        ({"quant_min": 0, "quant_max": 256}, "range 0..256 does not fit uint8"),
        ({"quant_min": 1, "quant_max": 5}, "range 1..5 must include 0"),
        ({"ch_axis": 1}, "torch.per_tensor_affine has no channel axis, got ch_axis=1"),
        ({"qscheme": torch.per_channel_affine}, "needs a channel axis"),
        ({"eps": 0.0}, "eps is the smallest scale and must be > 0, got 0.0"),
        ({"eps": math.nan}, "eps"),
        ({"fixed": (0.0, 0)}, "a fixed scale must be finite and > 0, got 0.0"),
        ({"fixed": (1.0, 256)}, "fixed zero_point 256 is outside 0..255"),
        ({"dtype": torch.float16}, "float16 has no integer range"),
        (
            {"dtype": torch.float16, "quant_min": 0, "quant_max": 0, "fixed": (1.0, 0)},
            "fixed parameters need a per-tensor integer spec",
        ),
    ],
)
def test_a_spec_that_cannot_be_honoured_is_refused(arguments: dict[str, object], text: str) -> None:
    given_ = {
        "dtype": torch.uint8,
        "qscheme": torch.per_tensor_affine,
        "quant_min": 0,
        "quant_max": 255,
    }
    with pytest.raises(SpecError) as error:
        QuantSpec(**{**given_, **arguments})  # type: ignore[arg-type]
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (U8, "uint8 affine 0..255"),
        (spec(is_dynamic=True), "uint8 affine 0..255 dynamic"),
        (spec(fixed=(1 / 256, 0)), "uint8 affine 0..255 fixed(scale=0.00390625, zero_point=0)"),
        (
            spec(torch.int8, torch.per_channel_symmetric, -127, 127, ch_axis=0),
            "int8 per-channel(0) sym -127..127",
        ),
        (
            spec(torch.uint8, torch.per_channel_affine_float_qparams, 0, 15, ch_axis=0),
            "uint8 per-channel(0) float-qparams 0..15",
        ),
        (spec(torch.float16, is_dynamic=True), "float16 dynamic"),
    ],
)
def test_short_says_everything_in_one_line(made: QuantSpec, text: str) -> None:
    assert made.short() == text


def test_specs_are_values() -> None:
    assert spec() == spec()
    assert hash(spec()) == hash(spec())
    assert spec() != spec(high=127)


@pytest.mark.parametrize("made", [U8, S8, spec(torch.float16), spec(fixed=(0.5, 3))], ids=str)
def test_specs_can_be_copied_and_pickled(made: QuantSpec) -> None:
    assert pickle.loads(pickle.dumps(made)) == made
    assert copy.deepcopy(made) == made
    assert b"per_tensor" in pickle.dumps(made)


def test_quantized_dtypes_are_stored_in_plain_ones() -> None:
    assert storage_dtype(torch.quint8) == torch.uint8
    assert storage_dtype(torch.qint8) == torch.int8
    assert storage_dtype(torch.qint32) == torch.int32
    assert storage_dtype(torch.quint4x2) == torch.uint8
    assert storage_dtype(torch.int16) == torch.int16
    assert storage_dtype(torch.float16) == torch.float16


def test_default_ranges() -> None:
    assert default_range(torch.quint8) == (0, 255)
    assert default_range(torch.int8) == (-128, 127)
    assert default_range(torch.quint4x2) == (0, 15)
    assert default_range(torch.int16) == (-(2**15), 2**15 - 1)
    assert default_range(torch.qint32) == (-(2**31), 2**31 - 1)
    assert default_range(torch.bfloat16) == (0, 0)
    with pytest.raises(SpecError):
        default_range(torch.bool)


@pytest.mark.parametrize(
    ("scale", "zero_point", "text"),
    [
        (torch.tensor(0.0), torch.tensor(0, dtype=torch.int32), "scale must be finite and > 0"),
        (torch.tensor(math.inf), torch.tensor(0, dtype=torch.int32), "got inf"),
        (torch.tensor(1.0), torch.tensor(256, dtype=torch.int32), "zero_point 256 is outside"),
        (torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), "must both be 0-d"),
        (torch.tensor(1.0), torch.tensor(0), "must be float32 and int32"),
    ],
)
def test_qparams_that_no_kernel_takes_are_refused(
    scale: Tensor, zero_point: Tensor, text: str
) -> None:
    with pytest.raises(SpecError) as error:
        QParams(scale, zero_point, U8).validate()
    assert text in str(error.value)


# ------------------------------------------------------------------------------- parameters

finite = st.floats(-1e6, 1e6, width=32)


@given(finite, finite)
def test_affine_parameters_are_valid_and_cover_the_range(a: float, b: float) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    qparams = choose_qparams(low, high, U8)
    qparams.validate()
    scale = Fraction(float(qparams.scale))
    below, above = min(Fraction(float(low)), 0), max(Fraction(float(high)), 0)
    # One float32 subtraction and one division: two roundings of 2**-24 each.
    assert abs(scale - max((above - below) / 255, Fraction(DEFAULT_EPS))) <= scale / 2**22
    # Both ends are within a step of what the integers reach; the zero point is rounded once.
    zero_point = int(qparams.zero_point)
    slack = scale * Fraction(51, 100)
    assert (0 - zero_point) * scale - slack <= below
    assert above <= (255 - zero_point) * scale + slack


@given(finite, finite)
def test_zero_is_represented_exactly(a: float, b: float) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    for s in (U8, S8, spec(torch.uint8, torch.per_tensor_symmetric), spec(high=15)):
        qparams = choose_qparams(low, high, s)
        assert fake_quantize(torch.zeros(1), qparams).tolist() == [0.0]


@given(finite, finite)
def test_symmetric_parameters(a: float, b: float) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    largest = max(abs(float(low)), abs(float(high)))
    qparams = choose_qparams(low, high, S8)
    assert int(qparams.zero_point) == 0
    expected = max(torch.tensor(largest) / 127, torch.tensor(DEFAULT_EPS))
    assert torch.equal(qparams.scale, expected)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "zero_point"),
    [
        (torch.int8, -128, 127, 0),
        (torch.int8, -64, 63, 0),
        (torch.uint8, 0, 255, 128),
        (torch.uint8, 0, 127, 63),
        (torch.uint8, 0, 15, 7),
    ],
)
def test_zero_point_of_symmetric_schemes(
    dtype: torch.dtype, low: int, high: int, zero_point: int
) -> None:
    s = spec(dtype, torch.per_tensor_symmetric, low, high)
    qparams = choose_qparams(torch.tensor(-3.0), torch.tensor(1.0), s)
    assert int(qparams.zero_point) == zero_point
    assert float(qparams.scale) == float(torch.tensor(3.0) / ((high - low) / 2))


def test_fixed_parameters_win_over_the_range() -> None:
    qparams = choose_qparams(torch.tensor(-9.0), torch.tensor(9.0), spec(fixed=(1 / 128, 128)))
    assert float(qparams.scale) == 1 / 128
    assert int(qparams.zero_point) == 128


def test_float_zero_points() -> None:
    s = spec(torch.uint8, torch.per_channel_affine_float_qparams, ch_axis=0)
    qparams = choose_qparams(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]), s)
    assert qparams.scale.tolist() == [float(torch.tensor(1.0) / 255), 1.0]  # 1 where all is equal
    assert qparams.zero_point.tolist() == (-torch.tensor([1.0, 2.0]) / qparams.scale).tolist()
    qparams.validate()


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (1.0, 0.0, "min must not exceed max"),
        (math.nan, 0.0, "must be finite"),
        (0.0, math.inf, "must be finite"),
    ],
)
def test_ranges_that_are_none_are_refused(low: float, high: float, text: str) -> None:
    with pytest.raises(SpecError) as error:
        choose_qparams(torch.tensor(low), torch.tensor(high), U8)
    assert text in str(error.value)


def test_shapes_have_to_fit_the_scheme() -> None:
    with pytest.raises(SpecError):
        choose_qparams(torch.zeros(3), torch.ones(3), U8)
    with pytest.raises(SpecError):
        choose_qparams(torch.zeros(()), torch.ones(()), spec(torch.float16))
    per_channel = spec(torch.int8, torch.per_channel_symmetric, ch_axis=1)
    qparams = choose_qparams(torch.zeros(3), torch.ones(3), per_channel)
    with pytest.raises(SpecError) as error:
        quantize(torch.zeros(3, 4), qparams)
    assert "3 channel(s) do not fit axis 1 of shape [3, 4]" in str(error.value)


# ------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("scale", [0.1, 0.0235, 1.0, 3e-5])
@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_quantize_is_the_definition_to_the_last_tie(scale: float, zero_point: int) -> None:
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), U8)
    x = near_ties(float(qparams.scale), 500)
    assert quantize(x, qparams).tolist() == quantize_by_definition(x, qparams)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), finite, finite
)
def test_quantize_is_the_definition_on_anything(values: list[float], a: float, b: float) -> None:
    qparams = choose_qparams(torch.tensor(min(a, b)), torch.tensor(max(a, b)), U8)
    x = torch.tensor(values)
    assert quantize(x, qparams).tolist() == quantize_by_definition(x, qparams)


def test_quantize_returns_the_storage_dtype_and_keeps_the_shape() -> None:
    x = torch.randn(2, 3, 4)
    for s in (U8, S8, spec(torch.int16), spec(torch.int32), spec(torch.float16)):
        if s.is_float:
            q = quantize(x, QParams(torch.ones(()), torch.zeros((), dtype=torch.int32), s))
        else:
            q = quantize(x, choose_qparams(x.min(), x.max(), s))
        assert q.dtype == s.dtype
        assert q.shape == x.shape


def test_int32_reaches_both_ends() -> None:
    s = spec(torch.int32)
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), s)
    q = quantize(torch.tensor([1e30, -1e30, 5.0]), qparams)
    assert q.tolist() == [2**31 - 1, -(2**31), 5]
    assert dequantize(q, qparams).tolist() == [2.0**31, -(2.0**31), 5.0]


def test_per_channel_is_per_tensor_channel_by_channel() -> None:
    x = torch.randn(4, 3, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None]
    for axis in (1, -2):
        s = spec(torch.int8, torch.per_channel_symmetric, -127, 127, ch_axis=axis)
        rows = x.movedim(1, 0).reshape(3, -1)
        qparams = choose_qparams(rows.amin(1), rows.amax(1), s)
        q = quantize(x, qparams)
        for channel in range(3):
            one = QParams(qparams.scale[channel], qparams.zero_point[channel], S8)
            assert torch.equal(q[:, channel], quantize(x[:, channel], one))  # zero point 0
            back = dequantize(q[:, channel], one)
            assert torch.equal(dequantize(q, qparams)[:, channel], back)


@given(finite, finite, st.integers(0, 2**32 - 1))
def test_values_inside_the_range_move_by_half_a_step_at_most(a: float, b: float, seed: int) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    qparams = choose_qparams(torch.tensor(low), torch.tensor(high), U8)
    share = torch.rand(50, generator=torch.Generator().manual_seed(seed))
    x = low + share * (high - low)
    moved = (fake_quantize(x, qparams).double() - x.double()).abs().max()
    # Half a step of rounding, half of a clipped end (the zero point is rounded too), and the
    # float32 roundings of the reciprocal, of the product and of x: 2**-22 of up to 256 steps.
    assert float(moved) <= float(qparams.scale) * (1.0 + 2**-12)


def test_integers_survive_the_way_back() -> None:
    for s in (U8, S8, spec(torch.int8), spec(torch.int16)):
        qparams = choose_qparams(torch.tensor(-1.3), torch.tensor(2.9), s)
        q = torch.arange(s.quant_min, s.quant_max + 1).to(s.dtype)
        assert torch.equal(quantize(dequantize(q, qparams), qparams), q)


def test_half_precision_input_is_quantized_in_float32() -> None:
    x = torch.randn(100)
    qparams = choose_qparams(x.min(), x.max(), U8)
    half = x.to(torch.bfloat16)
    assert torch.equal(quantize(half, qparams), quantize(half.float(), qparams))


# ------------------------------------------------------------------------------------- peer


@pytest.mark.peer
@pytest.mark.parametrize("count", [1, 7, 33, 1000])
def test_integers_are_those_of_torch_per_tensor(count: int) -> None:
    for dtype, plain in ((torch.quint8, torch.uint8), (torch.qint8, torch.int8)):
        for scale in (0.1, 0.0235, 1.7):
            for zero_point in (0, 5, 100):
                s = spec(plain)
                zero = torch.tensor(zero_point, dtype=torch.int32)
                qparams = QParams(torch.tensor(scale), zero, s)
                x = near_ties(scale, count)
                theirs = torch.quantize_per_tensor(x, float(qparams.scale), zero_point, dtype)
                q = quantize(x, qparams)
                assert torch.equal(q, theirs.int_repr())
                assert torch.equal(dequantize(q, qparams), theirs.dequantize())


@pytest.mark.peer
@pytest.mark.parametrize("axis", [0, 1])
def test_integers_are_those_of_torch_per_channel(axis: int) -> None:
    scale = torch.tensor([0.1, 0.0235, 1.7])
    zero_point = torch.tensor([0, 5, 100], dtype=torch.int32)
    x = torch.stack([near_ties(float(s), 333) for s in scale])
    x = x if axis == 0 else x.t().contiguous()
    for dtype, plain in ((torch.quint8, torch.uint8), (torch.qint8, torch.int8)):
        s = spec(plain, torch.per_channel_affine, ch_axis=axis)
        theirs = torch.quantize_per_channel(x, scale, zero_point, axis, dtype)
        q = quantize(x, QParams(scale, zero_point, s))
        assert torch.equal(q, theirs.int_repr())
        assert torch.equal(dequantize(q, QParams(scale, zero_point, s)), theirs.dequantize())


@pytest.mark.peer
def test_integers_are_those_of_torch_for_int32() -> None:
    qparams = QParams(torch.tensor(0.1), torch.tensor(7, dtype=torch.int32), spec(torch.int32))
    x = near_ties(0.1, 500)
    theirs = torch.quantize_per_tensor(x, float(qparams.scale), 7, torch.qint32)
    assert torch.equal(quantize(x, qparams), theirs.int_repr())
