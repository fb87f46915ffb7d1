"""Integers of 2 to 16 bits: the operators, whole models of the reference target, and x86."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxquant import audit, calibrate, convert_fx, convert_to_reference_fx, explain, load, save
from fxquant.errors import ConfigWarning
from fxquant.graph_module import Stage
from fxquant.metadata import record_of
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.qconfig import QConfig
from fxquant.quantize_fx import prepare_fx
from fxquant.specs import default_range

Lower = Callable[..., Any]

INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16)
ULP = 2.0**-24


# -- the operators, against exact fractions -------------------------------------------------------


def _exact(x: float, scale: float, zero_point: int, low: int, high: int, *, narrow: bool) -> int:
    """The definition in exact arithmetic; 8 bits round the sum to float32, as torch's kernels."""
    inverse = float(torch.tensor(scale).reciprocal())
    value = Fraction(x) * Fraction(inverse) + zero_point
    if narrow:
        value = Fraction(float(torch.tensor(float(value), dtype=torch.float64).to(torch.float32)))
    return min(max(round(value), low), high)  # Fraction rounds half to even


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(INTEGERS),
    bits=st.integers(2, 16),
    scale=st.floats(2**-20, 16, width=32),
    position=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_quantize_and_dequantize_follow_the_definition(
    dtype: torch.dtype, bits: int, scale: float, position: float, seed: int
) -> None:
    low, high = _range(dtype, min(bits, torch.iinfo(dtype).bits))
    zero_point = low + round(position * (high - low))
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(low - 3, high + 4, (40,), generator=generator) - zero_point
    ties = (steps + 0.5) * scale
    x = torch.cat([ties, torch.nextafter(ties, ties + 1), steps * scale * 1.3])
    scales, zero_points = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    integers = QUANTIZE(x, scales, zero_points, low, high, dtype)
    narrow = dtype.itemsize == 1
    wanted = [_exact(float(v), scale, zero_point, low, high, narrow=narrow) for v in x]
    assert integers.dtype is dtype
    assert integers.tolist() == wanted
    back = DEQUANTIZE(integers, scales, zero_points)
    assert back.dtype is torch.float32
    single = torch.tensor(scale)
    assert back.tolist() == [float((q - zero_point) * single) for q in wanted]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16])
def test_sixteen_bits_per_channel_round_once(dtype: torch.dtype) -> None:
    low, high = default_range(dtype)
    scale = torch.tensor([0.1, 0.007, 3.0])
    zero = torch.tensor([low, high, 0], dtype=torch.int32)
    steps = torch.linspace(low + 0.5, high + 0.5, 501).floor() + 0.5
    x = torch.stack([(steps - z) * s for s, z in zip(scale, zero, strict=True)])
    integers = QUANTIZE(x, scale, zero, low, high, dtype, 0)
    for row, s, z, q in zip(x, scale, zero, integers, strict=True):
        wanted = [_exact(float(v), float(s), int(z), low, high, narrow=False) for v in row]
        assert q.tolist() == wanted


# -- whole models ---------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution with relu, residual sum, pooling, concatenation and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.b(y) + y)
        y = F.max_pool2d(torch.cat([y, z], 1), 2)
        return self.head(self.c(y).flatten(1))


def _range(dtype: torch.dtype, bits: int) -> tuple[int, int]:
    """The integers of so many bits, signed or not as the dtype."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed else (0, 2**bits - 1)


def _qconfig(
    dtype: torch.dtype,
    bits: int,
    weight_dtype: torch.dtype,
    weight_bits: int,
    *,
    symmetric: bool = False,
    per_channel: bool = True,
    observer: Any = MinMaxObserver,
) -> QConfig:
    low, high = _range(dtype, bits)
    kind = "symmetric" if symmetric else "affine"
    weight = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    least, most = _range(weight_dtype, weight_bits)
    scheme = f"per_{'channel' if per_channel else 'tensor'}_{kind}"
    return QConfig(
        activation=observer.with_args(
            dtype=dtype, qscheme=getattr(torch, f"per_tensor_{kind}"), quant_min=low, quant_max=high
        ),
        weight=weight.with_args(
            dtype=weight_dtype,
            qscheme=getattr(torch, scheme),
            quant_min=least,
            quant_max=most,
        ),
    )


def _prepare(model: nn.Module, mapping: Any, x: Tensor, **options: Any) -> Any:
    prepared = prepare_fx(model.eval(), mapping, (x,), **options)
    return calibrate(prepared, [(x,)], progress=False)


class _Values(fx.Interpreter):
    """Every value of a graph by node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _integers(values: _Values, node: fx.Node) -> tuple[Tensor, Tensor]:
    """``q - zero_point`` as int64, and the scale, shaped to broadcast, of a dequantize node."""
    source, scale_node, zero_node, *axis = node.args
    q, scale, zero = (values.seen[n] for n in (source, scale_node, zero_node))
    if axis and axis[0] is not None:
        shape = [1] * q.dim()
        shape[axis[0]] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return q.to(torch.int64) - zero.to(torch.int64), scale.to(torch.float64)


def _check_products(values: _Values) -> int:
    """Every convolution and linear against sums of int64 products; how many were checked.

    ``v = (sum (q_x - z_x)(q_w - z_w)) * s_x * s_w + b``; the reference graph computes it in float32
    of dequantized values, so it is off by at most ``n + 3`` roundings of the magnitudes summed.
    """
    checked = 0
    for node, result in values.seen.items():
        if node.target not in (F.conv2d, F.linear):
            continue
        x, s_x = _integers(values, node.args[0])
        w, s_w = _integers(values, node.args[1])
        if w.dim() == 4:
            padding = node.args[4]
            rows = F.unfold(x.double(), w.shape[2:], padding=padding).to(torch.int64)
            product = torch.einsum("ok,nkl->nol", w.flatten(1), rows)
            sizes = torch.einsum("ok,nkl->nol", w.flatten(1).abs(), rows.abs())
            product, sizes = product.reshape(result.shape), sizes.reshape(result.shape)
            bias = values.seen[node.args[2]].double().reshape(1, -1, 1, 1)
        else:
            product, sizes = x @ w.T, x.abs() @ w.abs().T
            bias = values.seen[node.args[2]].double()
        factor = s_x * (s_w.reshape(1, -1, *[1] * (result.dim() - 2)) if s_w.dim() else s_w)
        exact = product.double() * factor + bias
        bound = (w[0].numel() + 3) * ULP * (sizes.double() * factor + bias.abs())
        assert bool(((result.double() - exact).abs() <= bound).all()), node.name
        checked += 1
    return checked


_WIDTHS = [
    (torch.int16, 16, torch.int16, 16),
    (torch.uint16, 16, torch.int8, 8),
    (torch.int8, 8, torch.int16, 12),
    (torch.uint8, 4, torch.int8, 4),
    (torch.int8, 4, torch.uint8, 4),
    (torch.uint8, 2, torch.int8, 2),
    *((torch.uint8, bits, torch.int8, bits) for bits in (3, 5, 6, 7)),
    (torch.int32, 24, torch.int32, 20),
]


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("widths", _WIDTHS, ids=str)
def test_the_reference_target_takes_any_width(
    widths: tuple[torch.dtype, int, torch.dtype, int], symmetric: bool, per_channel: bool
) -> None:
    dtype, bits = widths[:2]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qconfig = _qconfig(*widths, symmetric=symmetric, per_channel=per_channel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = _prepare(Net(), {"": qconfig}, x, target="reference")
        converted = convert_fx(prepared)
    assert converted.state.stage is Stage.REFERENCE
    values = _Values(converted)
    outlying = 3 * x
    output = values.run(outlying)
    assert torch.equal(output, convert_to_reference_fx(prepared)(outlying))
    quantized = [n for n in converted.graph.nodes if n.target is QUANTIZE]
    assert len(quantized) >= 5
    low, high = _range(dtype, bits)
    for node in quantized:
        assert node.args[3:6] == (low, high, dtype)
        assert values.seen[node].dtype is dtype
    ends = [_ends(values.seen[node]) for node in quantized]
    assert all(low <= least and most <= high for least, most in ends)
    assert any(most == high for _, most in ends)  # it did saturate
    assert _check_products(values) == 4
    _check_weights(converted, values, widths, per_channel=per_channel)


def _ends(integers: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(integers.to(torch.int64))
    return int(low), int(high)


def _check_weights(
    gm: Any,
    values: _Values,
    widths: tuple[torch.dtype, int, torch.dtype, int],
    *,
    per_channel: bool,
) -> None:
    """The integers of every weight fill their range, and the scales are per channel or not."""
    _, _, dtype, bits = widths
    low, high = _range(dtype, bits)
    products = [n for n in gm.graph.nodes if n.target in (F.conv2d, F.linear)]
    for node in products:
        integers, scale = (values.seen[a] for a in node.args[1].args[:2])
        assert integers.dtype is dtype
        least, most = _ends(integers)
        assert low <= least < most <= high
        assert most - least >= (high - low) // 2
        assert scale.dim() == int(per_channel)


@pytest.mark.parametrize(
    "observer", [HistogramObserver, MovingAverageMinMaxObserver], ids=["histogram", "moving"]
)
@pytest.mark.parametrize("widths", [_WIDTHS[0], _WIDTHS[3]], ids=str)
def test_more_bits_are_more_exact(widths: Any, observer: Any) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 8, 8), Net().eval()
    error = []
    for bits in (widths[1] // 2, widths[1]):
        qconfig = _qconfig(widths[0], bits, widths[2], bits, observer=observer)
        int8 = convert_fx(_prepare(model, {"": qconfig}, x, target="reference"))
        error.append(float((int8(x) - model(x)).square().mean().detach()))
    assert error[1] < error[0] / 10


# -- several widths in one model ------------------------------------------------------------------

EIGHT = _qconfig(torch.uint8, 8, torch.int8, 8, symmetric=False)
SIXTEEN = _qconfig(torch.int16, 16, torch.int16, 16, symmetric=True)
FOUR = _qconfig(torch.uint8, 4, torch.int8, 4)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("widths", list(itertools.product([EIGHT, SIXTEEN, FOUR], repeat=2)))
def test_every_op_reads_the_integers_that_it_asks_for(widths: tuple[QConfig, QConfig]) -> None:
    first, second = widths
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    mapping = {"": first, "b": second}
    prepared = _prepare(Chain(), mapping, x, target="reference", strict=True)
    gm = convert_fx(prepared)
    specs = {"a": first, "b": second, "c": first}
    for name, qconfig in specs.items():
        node = next(n for n in gm.graph.nodes if n.name == name)
        wanted, given = qconfig.activation().spec, node.args[0].args[0].args[3:6]
        assert given[2] is wanted.dtype
        assert wanted.quant_min <= given[0] < given[1] <= wanted.quant_max
    values = _Values(gm)
    values.run(x)
    assert _check_products(values) == 3


def test_wider_integers_of_one_dtype_are_read_as_they_are() -> None:
    """8 bits hold every integer of 4: nothing is quantized twice."""
    x = torch.randn(2, 3, 8, 8)
    chain = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))
    gm = convert_fx(_prepare(chain, {"": EIGHT, "0": FOUR}, x, target="reference"))
    assert sum(n.target is QUANTIZE for n in gm.graph.nodes) == 3


def test_what_keeps_its_inputs_parameters_refuses_two_kinds_of_them() -> None:
    class Cat(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 2))

    x = torch.randn(2, 3, 8, 8)
    prepared = _prepare(Cat(), {"": EIGHT, "b": SIXTEEN}, x, target="reference")
    reason = explain(prepared).row("cat").reason
    assert "quantized differently (uint8 affine 0..255, int16 sym -32768..32767)" in reason
    gm = convert_fx(prepared)
    values = _Values(gm)
    values.run(x)
    assert _check_products(values) == 3


# -- keeping and explaining -----------------------------------------------------------------------


@pytest.mark.parametrize("widths", _WIDTHS[:4], ids=str)
def test_save_and_load_keep_every_width(widths: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    prepared = _prepare(Net(), {"": _qconfig(*widths)}, x, target="reference")
    for model in (prepared, convert_fx(prepared)):
        save(model, tmp_path / "model.fxq")
        again = load(tmp_path / "model.fxq")
        assert torch.equal(again(2 * x), model(2 * x))
        assert str(explain(again)) == str(explain(model))
    assert {v.dtype for v in again.state_dict().values()} >= {widths[2]}


def test_explain_and_audit_name_the_width() -> None:
    x = torch.randn(2, 3, 8, 8)
    prepared = _prepare(Net(), {"": SIXTEEN}, x, target="reference")
    assert explain(prepared).row("a").runs.value == "planned"
    converted = convert_fx(prepared)
    row = explain(converted).row("a")
    assert row.runs.value == "emulated"
    assert row.output == "int16 sym -32768..32767"
    assert row.weight == "int16 per-channel(0) sym -32768..32767"
    report = audit(converted)
    assert report.confirmed
    assert report.mac_coverage == 0.0
    assert all(row.reason for row in report.fp32)


# -- x86 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qconfig", "wish"),
    [
        (SIXTEEN, r"activation int16 sym -32768\.\.32767 is not served \(possible: uint8\)"),
        (
            _qconfig(torch.uint16, 16, torch.int8, 8),
            r"activation uint16 affine 0\.\.65535 is not served \(possible: uint8\)",
        ),
        (
            _qconfig(torch.int8, 4, torch.int8, 4),
            r"activation int8 affine -8\.\.7 is not served \(possible: uint8\)",
        ),
        (
            QConfig(EIGHT.activation, SIXTEEN.weight),
            r"weight int16 per-channel\(0\) sym -32768\.\.32767 is not served \(possible: int8\)",
        ),
        (
            _qconfig(torch.uint8, 8, torch.int8, 4),
            r"weight int8 per-channel\(0\) affine -8\.\.7 is not served: the kernels ignore",
        ),
    ],
    ids=["int16", "uint16", "int8", "int16 weight", "affine weight"],
)
def test_x86_refuses_what_no_kernel_has_and_says_what_it_has(qconfig: QConfig, wish: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.warns(ConfigWarning, match=rf"'_0' \(conv2d\) stays in FP32: {wish}"):
        prepared = _prepare(model, {"": qconfig}, x)
    int8 = convert_fx(prepared)
    assert torch.equal(int8(x), model(x))
    assert "config cannot be honoured" in explain(int8).row("_0").reason


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_narrow_weights_run_on_the_int8_kernels_exactly(lower: Lower, bits: int) -> None:
    high = 2 ** (bits - 1) - 1
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.int8, qscheme=torch.per_channel_symmetric, quant_min=-high, quant_max=high
    )
    x = torch.randn(2, 3, 8, 8)
    case = lower(Net(), x, mapping={"": QConfig(EIGHT.activation, weight)})
    case.check(2 * x)
    assert any("conv2d" in kernel for kernel in case.kernels)
    for name, value in case.int8.named_buffers():
        if name.endswith("_weight"):
            assert int(value.abs().max()) == high


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_narrow_activations_are_cut_behind_the_kernels_of_x86(
    lower: Lower, bits: int, symmetric: bool
) -> None:
    narrow = _qconfig(torch.uint8, bits, torch.int8, 8, symmetric=symmetric)
    x = torch.randn(2, 3, 8, 8)
    case = lower(Net(), x, mapping={"": QConfig(narrow.activation, SIXTEEN_AS_EIGHT)})
    case.check(5 * x)  # most values saturate
    assert "aten::clamp on bytes" in case.kernels
    seen = _Values(case.int8)
    seen.run(5 * x)
    cut = [v for n, v in seen.seen.items() if record_of(n).kernel == "aten::clamp on bytes"]
    assert cut
    assert all(int(v.max()) <= 2**bits - 1 for v in cut)
    assert any(int(v.max()) == 2**bits - 1 for v in cut)


SIXTEEN_AS_EIGHT = PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
)


def test_seven_bits_by_halving_are_not_cut_on_x86_but_are_in_the_reference_target() -> None:
    """``0..127`` is what torch.ao calls reduce_range: its kernels go on to 255, and so do ours."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qconfig = QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=127), SIXTEEN_AS_EIGHT)
    largest = {}
    for target in ("x86", "reference"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigWarning)
            gm = convert_to_reference_fx(_prepare(Net(), {"": qconfig}, x, target=target))
        values = _Values(gm)
        values.run(3 * x)
        found = [int(v.max()) for n, v in values.seen.items() if n.target is QUANTIZE]
        largest[target] = max(found)
    assert largest == {"x86": 255, "reference": 127}


def test_mixed_widths_on_x86_agree_with_the_reference(lower: Lower) -> None:
    four = QConfig(FOUR.activation, SIXTEEN_AS_EIGHT)
    eight = QConfig(EIGHT.activation, SIXTEEN_AS_EIGHT)
    x = torch.randn(2, 3, 8, 8)
    for mapping in ({"": eight, "b": four}, {"": four, "b": eight}, {"": four, "head": eight}):
        lower(Net(), x, mapping=mapping).check(4 * x)


def test_a_bound_of_two_levels_is_still_a_range() -> None:
    qconfig = _qconfig(torch.uint8, 1, torch.int8, 8)
    x = torch.randn(2, 3, 8, 8)
    gm = convert_fx(_prepare(Net(), {"": qconfig}, x, target="reference"))
    values = _Values(gm)
    values.run(x)
    for node in gm.graph.nodes:
        if node.target is QUANTIZE:
            assert set(values.seen[node].unique().tolist()) <= {0, 1}
    assert math.isfinite(float(gm(x).sum()))
