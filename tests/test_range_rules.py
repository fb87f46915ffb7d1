"""Range rules: measured against the data themselves, not against the formulas of the rules."""

from __future__ import annotations

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.collectors import HistogramCollector, MinMaxCollector, PerChannelMinMaxCollector
from fxquant.errors import ConfigError
from fxquant.range_rules import (
    EntropyRule,
    MinMaxRule,
    MSERule,
    OnnxEntropyRule,
    PercentileRule,
    RangeRule,
    TorchHistogramRule,
    expected_error,
    greedy_bins,
    symmetric_bins,
)
from fxquant.specs import QuantSpec, choose_qparams, fake_quantize

U8 = QuantSpec(dtype=torch.uint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=255)
U4 = QuantSpec(dtype=torch.uint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=15)
S8 = QuantSpec(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127)
SPECS = {"u8": U8, "u4": U4, "s8": S8}
SEARCHING: list[RangeRule] = [
    MSERule(),
    EntropyRule(),
    OnnxEntropyRule(),
    TorchHistogramRule(),
    PercentileRule(),
]
ALL: list[RangeRule] = [MinMaxRule(), *SEARCHING]
rules = pytest.mark.parametrize("rule", ALL, ids=lambda r: type(r).__name__)


def sample(name: str, count: int = 20000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "laplace": normal.sign() * -uniform.log(),
        "shifted": normal * 0.1 + 5,
        "negative": -normal.relu(),
        "silu": torch.nn.functional.silu(normal * 2),
        "uniform": uniform * 3 - 1,
        "outlier": torch.cat([normal, torch.tensor([50.0, -20.0])]),
        "relu6": (normal * 4).clamp(0, 6),
    }[name]


NAMES = ("normal", "relu", "laplace", "shifted", "negative", "silu", "uniform", "outlier", "relu6")


def collected(x: Tensor, bins: int = 2048, count_limit: int | None = 1 << 16) -> HistogramCollector:
    collector = HistogramCollector(bins, count_limit=count_limit)
    collector(x)
    return collector


def error_of(x: Tensor, ends: tuple[Tensor, Tensor], spec: QuantSpec) -> float:
    moved = fake_quantize(x, choose_qparams(*ends, spec)).double() - x.double()
    return float(moved.square().mean())


# -------------------------------------------------------------------------------- every rule


@rules
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_ranges_are_inside_what_was_seen(rule: RangeRule, name: str, spec: QuantSpec) -> None:
    x = sample(name)
    low, high = rule.choose(collected(x), spec)
    assert low.shape == high.shape == ()
    assert low.dtype == high.dtype == torch.float32
    largest = float(x.abs().max())
    outermost = (-largest, largest) if spec.is_symmetric else (float(x.min()), float(x.max()))
    assert outermost[0] <= float(low) <= float(high) <= outermost[1]
    choose_qparams(low, high, spec).validate()


@rules
@pytest.mark.parametrize("value", [0.0, 3.3, -2.0])
def test_constant_data_are_kept_exactly(rule: RangeRule, value: float) -> None:
    x = torch.full((50,), value)
    for spec in SPECS.values():
        ends = rule.choose(collected(x), spec)
        # The constant is an end of the range, off by the roundings of a scale and a product.
        assert error_of(x, ends, spec) <= (abs(value) * 2**-22) ** 2


@rules
def test_rules_do_not_change_the_collector(rule: RangeRule) -> None:
    collector = collected(sample("normal"))
    before = {name: tensor.clone() for name, tensor in collector.state_dict().items()}
    low, _ = rule.choose(collector, U8)
    low.add_(1.0)
    after = collector.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("rule", SEARCHING, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("make", [MinMaxCollector, PerChannelMinMaxCollector])
def test_rules_that_need_a_histogram_say_so(rule: RangeRule, make: type[MinMaxCollector]) -> None:
    collector = make()
    collector(torch.randn(3, 4))
    with pytest.raises(ConfigError) as error:
        rule.choose(collector, U8)
    assert f"{type(rule).__name__} needs a histogram, but {make.__name__}" in str(error.value)


def test_min_max_works_per_channel() -> None:
    collector = PerChannelMinMaxCollector(0)
    x = torch.randn(3, 10)
    collector(x)
    low, high = MinMaxRule().choose(collector, U8)
    assert torch.equal(low, x.amin(1))
    assert torch.equal(high, x.amax(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PercentileRule(0.5),
        lambda: PercentileRule(1.1),
        lambda: MSERule(points=2),
        lambda: MSERule(refinements=-1),
        lambda: EntropyRule(1),
        lambda: TorchHistogramRule(0.0),
    ],
)
def test_options_that_search_nothing_are_refused(make: type[RangeRule]) -> None:
    with pytest.raises(ConfigError, match="Rule"):
        make()


def test_rules_are_values() -> None:
    assert MSERule() == MSERule()
    assert PercentileRule(0.99) != PercentileRule(0.999)
    assert repr(PercentileRule(0.99)) == "PercentileRule(p=0.99)"
    assert all(isinstance(rule, RangeRule) for rule in ALL)


# --------------------------------------------------------------------------------------- MSE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_expected_error_is_the_error_on_the_data(name: str, spec: QuantSpec) -> None:
    x = sample(name)
    collector = collected(x, 8192)
    histogram = collector.to_histogram()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    for share_low, share_high in itertools.product((1.0, 0.6), repeat=2):
        ends = torch.tensor([low * share_low]), torch.tensor([high * share_high])
        if spec.is_symmetric:
            largest = torch.maximum(-ends[0], ends[1])
            ends = -largest, largest
        expected = float(expected_error(histogram, ends[0].double(), ends[1].double(), spec))
        measured = error_of(x, (ends[0][0], ends[1][0]), spec)
        # Values are taken as uniform in a bin of width w: each error is off by at most w times
        # its slope, 2 |error|, so the mean by 2 w sqrt(mean); spikes in a bin bring w**2 / 3.
        width = histogram.width
        assert abs(expected - measured) <= 2 * width * math.sqrt(measured) + width**2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mse_is_as_good_as_a_dense_search_on_the_data(name: str, spec: QuantSpec) -> None:
    x = sample(name, 4000)
    chosen = error_of(x, MSERule().choose(collected(x), spec), spec)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = torch.linspace(0.02, 1.0, 25).tolist()
    if spec.is_symmetric:
        largest = max(-low, high)
        candidates = [(-s * largest, s * largest) for s in shares]
    else:
        candidates = list(itertools.product({s * low for s in shares}, {s * high for s in shares}))
    best = min(error_of(x, (torch.tensor(a), torch.tensor(b)), spec) for a, b in candidates)
    assert chosen <= best * 1.02


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=60), st.sampled_from([U8, U4, S8])
)
@settings(max_examples=50)
def test_mse_is_never_worse_than_min_max_by_its_own_measure(
    values: list[float], spec: QuantSpec
) -> None:
    collector = collected(torch.tensor(values))
    histogram = collector.to_histogram()

    def measure(ends: tuple[Tensor, Tensor]) -> float:
        low, high = ends[0].double().clamp(max=0.0), ends[1].double().clamp(min=0.0)
        return float(expected_error(histogram, low.reshape(1), high.reshape(1), spec))

    chosen = measure(MSERule().choose(collector, spec))
    # The choice is rounded to float32: 2**-24 of the range, of which the error is a square.
    largest = max(map(abs, values))
    assert chosen <= measure(MinMaxRule().choose(collector, spec)) + (largest * 2**-20) ** 2


def test_mse_cuts_an_outlier_and_keeps_the_other_end() -> None:
    x = torch.cat([sample("silu"), torch.tensor([60.0])])  # the rest is in -0.28..9
    low, high = MSERule().choose(collected(x), U4)
    assert float(high) < 20.0
    assert -0.3 < float(low) < -0.1


def test_mse_of_one_sided_data_moves_one_end() -> None:
    for name, end in (("relu", 0), ("shifted", 0), ("negative", 1)):
        x = sample(name)
        ends = MSERule().choose(collected(x), U8)
        assert float(ends[end]) == float(x.min() if end == 0 else x.max())


# -------------------------------------------------------------------------------- percentile


@pytest.mark.parametrize("p", [0.75, 0.9, 0.99, 0.999])
def test_percentiles_are_exact_to_a_bin(p: float) -> None:
    x = sample("normal")
    collector = collected(x)
    low, high = PercentileRule(p).choose(collector, U8)
    width = collector.to_histogram().width
    ordered = x.sort().values.double()
    assert abs(float(high) - float(ordered[math.ceil(p * len(x)) - 1])) <= width
    assert abs(float(low) - float(ordered[math.floor((1 - p) * len(x))])) <= width


def test_percentile_of_one_sided_data_keeps_the_closed_end() -> None:
    low, high = PercentileRule(0.99).choose(collected(sample("shifted")), U8)
    assert float(low) == float(sample("shifted").min())
    assert float(high) < float(sample("shifted").max())


def test_percentile_one_is_min_max() -> None:
    collector = collected(sample("normal"))
    assert PercentileRule(1.0).choose(collector, U8) == MinMaxRule().choose(collector, U8)


# ----------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize("name", ["normal", "relu", "laplace"])
def test_entropy_cuts_an_outlier(name: str) -> None:
    x = torch.cat([sample(name), torch.tensor([100.0])])
    _, high = EntropyRule().choose(collected(x), U8)
    assert float(high) < 50.0


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    x = sample("uniform")
    low, high = EntropyRule().choose(collected(x), U8)
    assert float(low) == float(x.min())
    assert float(high) > 0.95 * float(x.max())


# --------------------------------------------------------------------------------- torch.ao


def test_greedy_bins_keep_a_flat_histogram_and_cut_an_empty_tail() -> None:
    # The first step is always taken, so a flat histogram loses one bin.
    assert greedy_bins(torch.ones(256), 256) == (0, 254)
    tail = torch.cat([torch.full((100,), 1000.0), torch.zeros(155), torch.ones(1)])
    assert greedy_bins(tail, 16) == (0, 98)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2000, 200_000])
def test_greedy_bins_are_those_of_torch_ao_on_its_histogram(name: str, count: int) -> None:
    from torch.ao.quantization import HistogramObserver

    theirs = HistogramObserver()
    theirs(sample(name, count))
    scale, zero_point = theirs.calculate_qparams()
    first, last = greedy_bins(theirs.histogram, 256)
    width = (theirs.max_val - theirs.min_val) / 2048
    low, high = theirs.min_val + width * first, theirs.min_val + width * (last + 1)
    qparams = choose_qparams(low, high, U8)
    assert float(qparams.scale) == float(scale)
    assert int(qparams.zero_point) == int(zero_point)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_torch_rule_on_our_bins_is_close_to_torch_ao(name: str) -> None:
    from torch.ao.quantization import HistogramObserver

    x = sample(name, 200_000)
    theirs = HistogramObserver()
    theirs(x)
    ours = choose_qparams(*TorchHistogramRule().choose(collected(x, count_limit=None), U8), U8)
    theirs_scale = float(theirs.calculate_qparams()[0])
    # The greedy search stops where its error first grows, which depends on the bins: the widths
    # differ by up to two, and the two searches may stop some steps apart.
    assert abs(float(ours.scale) / theirs_scale - 1) <= 0.1


# ----------------------------------------------------------------------------- ONNX Runtime


def _onnxruntime_entropy(levels: int, bins: int, *batches: Tensor) -> tuple[object, object]:
    """ONNX Runtime's collector after ``batches``, and the thresholds that it finds."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    collector = calibrate.HistogramCollector("entropy", False, bins, levels, None, None)
    with contextlib.redirect_stdout(io.StringIO()):
        for batch in batches:
            collector.collect({"x": batch.numpy()})
        found = collector.compute_collection_result()["x"]
    return collector.get_histogram_dict()["x"], found


@pytest.mark.peer
@pytest.mark.parametrize(("bins", "levels"), [(128, 128), (256, 128), (600, 128), (501, 33)])
@pytest.mark.parametrize("name", NAMES)
def test_symmetric_bins_are_those_of_onnx_runtime(name: str, bins: int, levels: int) -> None:
    x = sample(name)
    histogram, found = _onnxruntime_entropy(levels, bins, x[:9000], x[9000:])
    counts, edges, least, most = histogram[:4]  # type: ignore[index]
    begin, end = symmetric_bins(torch.from_numpy(counts), levels)
    assert max(edges[begin], least) == found[0]  # type: ignore[index]
    assert min(edges[end], most) == found[1]  # type: ignore[index]


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_the_onnx_rule_is_onnx_runtimes_on_the_same_histogram(name: str) -> None:
    """Its thresholds on our bins, mirrored around zero as its own are."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    x = sample(name)
    histogram = collected(x, 512, count_limit=None).to_histogram()
    low, high = OnnxEntropyRule().choose(collected(x, 512, count_limit=None), U8)
    left = histogram.low + histogram.width * np.arange(len(histogram.counts))
    width = histogram.width
    while max(-left.min(), left.max() + histogram.width) / width > 2048:
        width *= 2  # bins far from zero are merged
    half = round(max(-np.floor(left.min() / width), np.floor(left.max() / width) + 1))
    edges = (np.arange(2 * half + 1) - half) * width
    counts, _ = np.histogram(left, bins=edges, weights=histogram.counts.numpy().astype(np.int64))
    edges = edges.astype(np.float32)
    ends = np.float32(histogram.min_val), np.float32(histogram.max_val)
    theirs = calibrate.HistogramCollector("entropy", False, 512, 128, None, None)
    found = theirs.get_entropy_threshold((counts, edges, *ends), 128)
    assert (float(low), float(high)) == (float(found[0]), float(found[1]))


def test_the_onnx_rule_keeps_everything_where_it_has_one_candidate() -> None:
    """As ONNX Runtime's default of 128 bins for 128 levels."""
    x = sample("normal")
    for bins in (16, 100):
        collector = collected(x, bins)
        assert OnnxEntropyRule().choose(collector, U8) == MinMaxRule().choose(collector, U8)


def test_entropy_keeps_of_a_relu_what_onnx_runtime_cuts() -> None:
    """The figures of docs/configuration.md."""
    x = sample("relu", 50_000)
    collector = collected(x, count_limit=None)
    ratios = {}
    for rule in (EntropyRule(), OnnxEntropyRule(), MSERule()):
        error = error_of(x, rule.choose(collector, U8), U8)
        ratios[type(rule).__name__] = 10 * math.log10(float(x.double().square().mean()) / error)
    assert ratios["EntropyRule"] > 43
    assert ratios["OnnxEntropyRule"] < 35
    assert ratios["MSERule"] > 45
