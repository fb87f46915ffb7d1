"""Collectors: exact statistics, whatever the order, the threads and the way they are united."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.collectors import (
    Collector,
    HistogramCollector,
    MinMaxCollector,
    MovingAverageMinMaxCollector,
    MovingAveragePerChannelMinMaxCollector,
    PerChannelMinMaxCollector,
    merge,
)
from fxquant.errors import CalibrationError, ConfigError, NonFiniteStatisticError

ALL: list[Callable[[], Collector]] = [
    MinMaxCollector,
    lambda: MovingAverageMinMaxCollector(0.1),
    lambda: PerChannelMinMaxCollector(1),
    lambda: MovingAveragePerChannelMinMaxCollector(0.1, 1),
    lambda: HistogramCollector(64),
]
EXACT = [ALL[0], ALL[2], ALL[4]]
kinds = pytest.mark.parametrize("make", ALL, ids=lambda m: type(m()).__name__)


def batches(count: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 6, generator=generator) * 3**k for k in range(count)]


def observed(collector: Collector, data: list[Tensor]) -> Collector:
    for x in data:
        collector(x)
    return collector


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine
    )


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------- definitions


def test_min_max_are_exact() -> None:
    data = batches()
    collector = observed(MinMaxCollector(), data)
    assert float(collector.min_val) == min(float(x.min()) for x in data)
    assert float(collector.max_val) == max(float(x.max()) for x in data)
    assert int(collector.num_batches) == 5


def test_moving_average_is_its_recurrence() -> None:
    data = batches()
    collector = observed(MovingAverageMinMaxCollector(0.25), data)
    low = data[0].min()
    for x in data[1:]:
        low = low + 0.25 * (x.min() - low)
    assert torch.equal(collector.min_val, low)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_is_per_tensor_channel_by_channel(axis: int) -> None:
    data = batches()
    collector = observed(PerChannelMinMaxCollector(axis), data)
    for channel in range(data[0].shape[axis]):
        alone = observed(MinMaxCollector(), [x.select(axis, channel) for x in data])
        assert torch.equal(collector.min_val[channel], alone.min_val)
        assert torch.equal(collector.max_val[channel], alone.max_val)


def test_moving_average_per_channel_is_its_recurrence() -> None:
    data = batches()
    collector = observed(MovingAveragePerChannelMinMaxCollector(0.25, 1), data)
    high = data[0].amax((0, 2))
    for x in data[1:]:
        high = high + 0.25 * (x.amax((0, 2)) - high)
    assert torch.equal(collector.max_val, high)


def test_histogram_counts_every_value_in_its_bin() -> None:
    data = batches()
    collector = HistogramCollector(64)
    observed(collector, data)
    histogram = collector.to_histogram()
    values = torch.cat([x.flatten() for x in data]).double()
    for number, count in enumerate(histogram.counts.tolist()):
        left = histogram.low + number * histogram.width
        inside = (values >= left) & (values < left + histogram.width)
        assert int(inside.sum()) == count
    assert histogram.counts.sum() == len(values)
    assert (histogram.min_val, histogram.max_val) == (float(values.min()), float(values.max()))


@given(
    st.lists(
        st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=8),
        min_size=1,
        max_size=6,
    ),
    st.integers(2, 70),
)
def test_histogram_invariants(data: list[list[float]], bins: int) -> None:
    collector = HistogramCollector(bins)
    observed(collector, [torch.tensor(x) for x in data])
    histogram = collector.to_histogram()
    values = [v for x in data for v in x]
    assert histogram.counts.sum() == len(values)
    assert len(histogram.counts) <= bins
    assert histogram.low <= min(values) < histogram.low + histogram.width
    last = histogram.low + (len(histogram.counts) - 1) * histogram.width
    assert last <= max(values) < last + histogram.width
    # The grid is no coarser than it must be: at half the width the range would not fit, unless
    # float32 itself, or the narrowest bin, is the limit.
    half = histogram.width / 2
    needed = math.floor(max(values) / half) - math.floor(min(values) / half) + 1
    largest = max(map(abs, values))
    assert needed > bins or largest / half >= 2**21 or histogram.width == 2.0**-100


def test_a_spike_at_one_value_is_counted_exactly() -> None:
    # More than 2**24 equal values: a float32 counter would have stopped there.
    x = torch.zeros(2**24 + 3)
    x[0], x[-1] = -1.0, 1.0
    collector = HistogramCollector(16, count_limit=None)
    collector(x)
    assert int(collector.histogram.max()) == 2**24 + 1


def test_long_rows_are_counted_in_lanes_and_short_ones_are_not() -> None:
    x = torch.randn(3 * HistogramCollector.CPU_CHUNK + 17).relu()
    whole, parts = (HistogramCollector(512, count_limit=None) for _ in range(2))
    whole(x)
    observed(parts, list(x.split(1000)))
    assert torch.equal(whole.histogram, parts.histogram)


def test_of_long_rows_every_kth_value_is_counted_k_times() -> None:
    x = torch.randn(6, 1000)
    collector = HistogramCollector(64, count_limit=1500)
    collector(x)
    # 4 would do but divides 6000; 7 is the next that shares no factor with it.
    sample, ends = HistogramCollector(64), HistogramCollector(64)
    extremes = torch.stack((x.min(), x.max()))
    sample(torch.cat((x.flatten()[::7], extremes)))
    ends(extremes)
    assert float(collector.min_val) == float(x.min())
    assert float(collector.max_val) == float(x.max())
    expected = (sample.histogram - ends.histogram) * 7 + ends.histogram
    assert torch.equal(collector.histogram, expected)


def test_order_does_not_matter_where_values_are_left_out() -> None:
    data = [torch.randn(5000) * 3**k for k in range(4)]
    a, b = (HistogramCollector(64, count_limit=100) for _ in range(2))
    assert same_state(observed(a, data), observed(b, data[::-1]))


def test_no_axis_is_preferred_where_values_are_left_out() -> None:
    # A channel for each value: with a stride that shares a factor, channels would be missing.
    for shape in ((8, 64, 12, 12), (8, 12, 12, 64)):
        axis = 1 if shape[1] == 64 else 3
        view = [1, 1, 1, 1]
        view[axis] = 64
        x = torch.arange(64.0).view(view).expand(shape).contiguous()
        collector = HistogramCollector(64, count_limit=5000)
        collector(x)
        counts = collector.to_histogram().counts
        assert len(counts) == 64
        assert float(counts.min()) > 0.9 * x.numel() / 64
        assert float(counts.max()) < 1.1 * x.numel() / 64


def test_outliers_that_are_left_out_still_count_once() -> None:
    x = torch.randn(100_000)
    x[1] = 1000.0
    collector = HistogramCollector(count_limit=1000)
    collector(x)
    assert collector.to_histogram().counts[-1] == 1
    assert collector.to_histogram().max_val == 1000.0


# ------------------------------------------------------------- order, threads, memory format


@pytest.mark.parametrize("make", EXACT, ids=lambda m: type(m()).__name__)
def test_order_does_not_matter(make: Callable[[], Collector]) -> None:
    data = batches()
    assert same_state(observed(make(), data), observed(make(), data[::-1]))


@kinds
def test_threads_do_not_matter(
    make: Callable[[], Collector], threads: Callable[[int], None]
) -> None:
    data = [torch.randn(64, 3, 2048, generator=torch.Generator().manual_seed(1)).relu()] * 2
    threads(1)
    one = observed(make(), data)
    threads(2)
    two = observed(make(), data)
    assert same_state(one, two)


@pytest.mark.parametrize("make", EXACT, ids=lambda m: type(m()).__name__)
def test_memory_format_does_not_matter(make: Callable[[], Collector]) -> None:
    x = torch.randn(2, 3, 8, 8)
    forms = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], -1)[..., 0],
    ]
    states = [observed(make(), [form]) for form in forms]
    assert all(same_state(states[0], other) for other in states[1:])


def test_volumes_in_channels_last_are_counted_whole() -> None:
    x = torch.randn(2, 3, 4, 4, 4)
    a, b = HistogramCollector(), HistogramCollector()
    a(x)
    b(x.contiguous(memory_format=torch.channels_last_3d))
    assert same_state(a, b)


# ------------------------------------------------------------------------------------ input


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_with_their_count(
    make: Callable[[], Collector], bad: float
) -> None:
    collector = observed(make(), batches(1))
    before = copy.deepcopy(collector)
    collector.owner = "activation_post_process_3 (output of 'layer1.0.conv1')"
    x = torch.zeros(4, 3, 6)
    x[1, 2, 3] = x[0, 0, 0] = bad
    with pytest.raises(NonFiniteStatisticError) as error:
        collector(x)
    kind = "2 NaN and 0 Inf" if math.isnan(bad) else "0 NaN and 2 Inf"
    assert str(error.value).startswith(
        "observer activation_post_process_3 (output of 'layer1.0.conv1') got "
        f"{kind} among 72 values of shape [4, 3, 6] in batch 2"
    )
    assert int(collector.num_nonfinite) == 2
    before.num_nonfinite += 2
    assert same_state(collector, before)  # nothing else was taken in


@kinds
def test_a_value_too_large_for_float32_is_refused(make: Callable[[], Collector]) -> None:
    with pytest.raises(NonFiniteStatisticError):
        make()(torch.full((4, 3, 6), 1e300, dtype=torch.float64))


@kinds
def test_empty_tensors_are_ignored(make: Callable[[], Collector]) -> None:
    collector = make()
    collector(torch.empty(0, 3))
    assert not collector.was_observed
    observed(collector, batches(1))
    before = copy.deepcopy(collector)
    collector(torch.empty(4, 0, 2))
    assert same_state(collector, before)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes_are_seen_as_float32(
    make: Callable[[], Collector], dtype: torch.dtype
) -> None:
    x = (torch.randn(4, 3, 6) * 10).to(dtype)
    assert same_state(observed(make(), [x]), observed(make(), [x.to(torch.float32)]))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.3, -1e-30, 1e30])
def test_constant_data(value: float) -> None:
    collector = HistogramCollector()
    collector(torch.full((10,), value))
    histogram = collector.to_histogram()
    assert histogram.counts.tolist() == [10.0]
    assert histogram.min_val == histogram.max_val == float(torch.tensor(value))


def test_tiny_negative_values_are_below_zero_whatever_the_width_of_bins() -> None:
    tiny = [-(2.0**-149), -1e-30]
    alone = HistogramCollector(2)
    alone(torch.tensor([-(2.0**60), *tiny]))  # two bins, the last one of which ends at zero
    assert alone.to_histogram().counts.sum() == 3
    late, early = HistogramCollector(), HistogramCollector()
    data = [torch.tensor(tiny), torch.tensor([2.0**100])]
    assert same_state(observed(late, data), observed(early, data[::-1]))


def test_zeros_say_nothing_about_the_width_of_bins() -> None:
    first, last = HistogramCollector(), HistogramCollector()
    data = [torch.zeros(3), torch.tensor([1e-12, 2e-12])]
    assert same_state(observed(first, data), observed(last, data[::-1]))
    assert len(first.to_histogram().counts) > 1000


def test_ranges_that_grow_by_many_orders_of_magnitude() -> None:
    collector = HistogramCollector()
    for power in range(-40, 38):
        collector(torch.tensor([-(10.0**power), 10.0**power]))
    assert int(collector.histogram.sum()) == 2 * 78


def test_gradients_and_inference_mode() -> None:
    for make in ALL:
        collector = make()
        with torch.inference_mode():
            collector(torch.randn(4, 3, 6))
        collector(torch.randn(4, 3, 6, requires_grad=True))
        assert int(collector.num_batches) == 2
        assert not collector.min_val.requires_grad


def test_channels_have_to_stay_the_same() -> None:
    collector = PerChannelMinMaxCollector(1)
    collector.owner = "weight of 'conv'"
    collector(torch.randn(2, 3))
    with pytest.raises(CalibrationError) as error:
        collector(torch.randn(2, 4))
    assert "weight of 'conv': a tensor of shape [2, 4] has 4 channels, not 3" in str(error.value)
    with pytest.raises(CalibrationError) as error:
        collector(torch.randn(3))
    assert "has no axis 1" in str(error.value)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_averaging_constants_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="averaging_constant must be in"):
        MovingAverageMinMaxCollector(value)


@pytest.mark.parametrize("bins", [1, 2**20 + 1])
def test_bin_counts_that_make_no_histogram_are_refused(bins: int) -> None:
    with pytest.raises(ConfigError, match="bins must be between"):
        HistogramCollector(bins)


def test_count_limits_that_count_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="count_limit must be at least 1"):
        HistogramCollector(count_limit=0)


def test_no_histogram_before_data() -> None:
    with pytest.raises(CalibrationError, match="has seen no data"):
        HistogramCollector().to_histogram()


# ------------------------------------------------------------------------------------ union


@pytest.mark.parametrize("make", EXACT, ids=lambda m: type(m()).__name__)
def test_united_statistics_are_those_of_one_stream(make: Callable[[], Collector]) -> None:
    data = batches()
    parts = [observed(make(), data[:1]), make(), observed(make(), data[1:4])]
    parts.append(observed(make(), data[4:]))
    copies = copy.deepcopy(parts)
    assert same_state(merge(parts), observed(make(), data))
    assert all(same_state(a, b) for a, b in zip(parts, copies, strict=True))  # left as they were


@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=2, max_size=30), st.data())
def test_histograms_unite_in_any_way(values: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(values) - 1))
    a, b, whole = (HistogramCollector(32) for _ in range(3))
    a(torch.tensor(values[:cut]))
    b(torch.tensor(values[cut:]))
    whole(torch.tensor(values[:cut]))
    whole(torch.tensor(values[cut:]))
    assert same_state(merge([a, b]), whole)
    assert same_state(merge([b, a]), whole)


def test_moving_averages_unite_to_their_extremes() -> None:
    # One average fed by two branches would give 2 or 99, by the order of the calls.
    a, b = MovingAverageMinMaxCollector(), MovingAverageMinMaxCollector()
    a(torch.tensor([0.0, 1.0]))
    b(torch.tensor([-3.0, 100.0]))
    united = merge([a, b])
    assert (float(united.min_val), float(united.max_val)) == (-3.0, 100.0)
    assert int(united.num_batches) == 2


def test_only_the_like_can_be_united() -> None:
    with pytest.raises(ConfigError, match="MinMaxCollector and HistogramCollector"):
        merge([MinMaxCollector(), HistogramCollector()])
    pair = [observed(HistogramCollector(bins), batches(1)) for bins in (64, 32)]
    with pytest.raises(ConfigError, match="64 and 32 bins"):
        merge(pair)
    pair = [observed(PerChannelMinMaxCollector(axis), batches(1)) for axis in (1, 2)]
    with pytest.raises(ConfigError, match="3 and 6 channels"):
        merge(pair)
    with pytest.raises(ConfigError, match="at least one"):
        merge([])


# ------------------------------------------------------------------------------ persistence


@kinds
def test_state_dict_round_trip_into_a_fresh_instance(make: Callable[[], Collector]) -> None:
    collector = observed(make(), batches())
    file = io.BytesIO()
    torch.save(collector.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert same_state(collector, fresh)
    more = batches(2, seed=9)
    assert same_state(observed(collector, more), observed(fresh, more))


@kinds
def test_an_unobserved_state_can_be_loaded_over_an_observed_one(
    make: Callable[[], Collector],
) -> None:
    collector = observed(make(), batches())
    collector.load_state_dict(make().state_dict())
    assert same_state(collector, make())


@kinds
def test_reset_forgets_everything(make: Callable[[], Collector]) -> None:
    collector = observed(make(), batches())
    collector.reset()
    assert same_state(collector, make())
    assert same_state(observed(collector, batches()), observed(make(), batches()))


@kinds
def test_copies_are_independent(make: Callable[[], Collector]) -> None:
    collector = observed(make(), batches())
    before = copy.deepcopy(collector)
    observed(copy.deepcopy(collector), [x * 100 for x in batches()])
    assert same_state(collector, before)


@kinds
def test_memory_does_not_grow_with_batches(make: Callable[[], Collector]) -> None:
    def size(collector: Collector) -> int:
        return sum(b.numel() * b.element_size() for b in collector.buffers())

    collector = observed(make(), batches(1))
    before = size(collector)
    assert size(observed(collector, batches(6))) == before


@kinds
def test_scripted_collectors_gather_the_same(make: Callable[[], Collector]) -> None:
    collector = observed(make(), batches())
    scripted = torch.jit.script(make())
    for x in batches():
        scripted(x)
    assert same_state(collector, scripted)
    with pytest.raises(Exception, match="NaN or Inf reached observer"):
        scripted(torch.full((4, 3, 6), math.nan))


def test_repr_tells_the_statistics() -> None:
    assert repr(MinMaxCollector()) == "MinMaxCollector(min_val=inf, max_val=-inf)"
    collector = PerChannelMinMaxCollector()
    assert repr(collector) == "PerChannelMinMaxCollector(min_val=[], max_val=[])"
    collector(torch.tensor([[1.0], [2.0]]))
    assert "min_val=[2 channels, 1 to 2]" in repr(collector)
