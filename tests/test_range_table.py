"""Every observer with every rule, scheme and width: a range as defined, or a clear refusal.

No combination may be accepted and then do something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxquant import calibrate, convert_fx, prepare_fx
from fxquant.errors import ConfigError, SpecError
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
    TorchHistogramObserver,
)
from fxquant.qconfig import QConfig
from fxquant.range_rules import (
    EntropyRule,
    MinMaxRule,
    MSERule,
    OnnxEntropyRule,
    PercentileRule,
    RangeRule,
    TorchHistogramRule,
)
from fxquant.specs import choose_qparams, fake_quantize

RULES: list[RangeRule] = [
    MinMaxRule(),
    PercentileRule(0.99),
    MSERule(),
    EntropyRule(),
    TorchHistogramRule(),
    OnnxEntropyRule(),
]
SCHEMES = [
    torch.per_tensor_affine,
    torch.per_tensor_symmetric,
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
]
PER_TENSOR = (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    HistogramObserver,
)
PER_CHANNEL = (
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
)
WITH_RULES = (HistogramObserver, PerChannelHistogramObserver)
WIDTHS = {
    "uint8": (torch.uint8, 0, 255),
    "int8": (torch.int8, -127, 127),
    "4 bits": (torch.int8, -8, 7),
    "int16": (torch.int16, -(2**15), 2**15 - 1),
}
COMBINATIONS = [
    (observer, rule, scheme)
    for observer in (*PER_TENSOR, *PER_CHANNEL)
    for rule in (RULES if observer in WITH_RULES else [None])
    for scheme in SCHEMES
]


def _batches() -> list[Tensor]:
    """Three channels of different shape and size along axis 1."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(2, 150, 3, 5, generator=generator)
    scales = torch.tensor([1.0, 0.01, 30.0]).reshape(3, 1)
    return [b * scales + torch.tensor([0.0, 0.05, -20.0]).reshape(3, 1) for b in batches]


def _name(value: object) -> str:
    return type(value).__name__ if isinstance(value, tuple(map(type, RULES))) else str(value)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(("observer", "rule", "scheme"), COMBINATIONS, ids=_name)
def test_every_combination(
    observer: type[Any],
    rule: RangeRule | None,
    scheme: torch.qscheme,
    width: tuple[torch.dtype, int, int],
) -> None:
    dtype, low, high = width
    by_channel = observer in PER_CHANNEL
    options: dict[str, Any] = {"ch_axis": 1} if by_channel else {}
    options |= {} if rule is None else {"rule": rule}

    def make() -> Any:
        return observer(dtype=dtype, qscheme=scheme, quant_min=low, quant_max=high, **options)

    if by_channel != ("per_channel" in str(scheme)):
        with pytest.raises(SpecError, match=rf"{observer.__name__} supports .*, not {scheme}"):
            make()
        return
    made = make()
    for batch in _batches():
        made(batch)
    undefined = not isinstance(rule, MinMaxRule | PercentileRule | None)
    if scheme == torch.per_channel_affine_float_qparams and undefined:
        with pytest.raises(ConfigError, match=rf"{type(rule).__name__} measures integers with"):
            made.qparams()
        return
    found = made.qparams()
    found.validate()
    ends = _expected(made, rule)
    wanted = choose_qparams(*ends, made.spec)
    assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(found.zero_point, wanted.zero_point)
    assert torch.equal(made.calculate_qparams()[0], wanted.scale.reshape(-1))


def _expected(observer: Any, rule: RangeRule | None) -> tuple[Tensor, Tensor]:
    """The range by its definition: of the data, or of a histogram of each channel alone."""
    batches = _batches()
    if not observer.spec.is_per_channel:
        return _range_of(observer, rule, [b.flatten() for b in batches])
    parts = [[b[:, channel].flatten() for b in batches] for channel in range(3)]
    ranges = [_range_of(observer, rule, part) for part in parts]
    return torch.stack([r[0] for r in ranges]), torch.stack([r[1] for r in ranges])


def _range_of(
    observer: Any, rule: RangeRule | None, batches: list[Tensor]
) -> tuple[Tensor, Tensor]:
    lows, highs = [b.amin() for b in batches], [b.amax() for b in batches]
    if "MovingAverage" in type(observer).__name__:
        low, high = lows[0], highs[0]
        for least, most in zip(lows[1:], highs[1:], strict=True):
            low, high = low + 0.01 * (least - low), high + 0.01 * (most - high)
        return low, high
    if rule is None or isinstance(rule, MinMaxRule):
        return torch.stack(lows).amin(), torch.stack(highs).amax()
    spec = observer.spec
    scheme = torch.per_tensor_symmetric if spec.is_symmetric else torch.per_tensor_affine
    alone = HistogramObserver(
        observer.bins,
        spec.dtype,
        scheme,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        rule=rule,
        count_limit=None,
    )
    for batch in batches:
        alone(batch)
    return rule.choose(alone.collector, alone.spec)


@pytest.mark.parametrize("rule", RULES[1:], ids=_name)
def test_a_histogram_of_the_tensor_makes_no_ranges_of_channels(rule: RangeRule) -> None:
    whole, channels = HistogramObserver(rule=rule), PerChannelHistogramObserver(rule=rule)
    for observer, other in ((whole, channels), (channels, whole)):
        observer(torch.randn(3, 100))
        with pytest.raises(ConfigError, match=rf"cannot make .* use {type(other).__name__}"):
            rule.choose(observer.collector, other.spec)


@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_a_rule_can_be_replaced_after_calibration(rule: RangeRule) -> None:
    observer = PerChannelHistogramObserver()
    fresh = PerChannelHistogramObserver(rule=rule)
    x = torch.randn(3, 1000)
    for made in (observer, fresh):
        made(x)
    observer.rule = rule
    assert torch.equal(observer.qparams().scale, fresh.qparams().scale)


# -- percentile against numpy ---------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.6, 0.9, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("make", [torch.randn, torch.rand, lambda n: torch.randn(n).exp()])
def test_percentile_is_numpys_to_a_bin(p: float, make: Callable[[int], Tensor]) -> None:
    """``inverted_cdf`` is the definition ``min {v : F(v) >= p}``; a bin is where it falls."""
    torch.manual_seed(0)
    x = make(20_000)
    observer = HistogramObserver(rule=PercentileRule(p), count_limit=None)
    observer(x)
    low, high = observer.rule.choose(observer.collector, observer.spec)
    width = observer.collector.to_histogram().width
    wanted = np.quantile(x.double().numpy(), [1 - p, p], method="inverted_cdf")
    assert abs(float(high) - wanted[1]) <= width
    if float(x.min()) < 0:
        assert abs(float(low) - wanted[0]) <= width
    else:
        assert float(low) == float(x.min())  # one-sided data keep their closed end


# -- what a rule is for ---------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_of_weights_per_channel_beats_min_max_in_every_channel(
    bits: int, symmetric: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 300) * torch.logspace(-3, 1, 16).reshape(-1, 1)
    kind = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    options = {"qscheme": kind, "quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    errors = []
    searching = PerChannelHistogramObserver(**options)
    for observer in (searching, PerChannelMinMaxObserver(dtype=torch.int8, **options)):
        observer(weight)
        moved = fake_quantize(weight, observer.qparams())
        errors.append((moved - weight).double().square().mean(1))
    ours, theirs = errors
    # Values are taken as uniform in a bin of width w: an error e is off by at most 2 w |e|, so the
    # mean by 2 w sqrt(mean), and a spike in a bin brings w**2; of both ranges.
    histograms = searching.collector.to_histograms()
    width = torch.tensor([h.width for h in histograms], dtype=torch.float64)
    assert bool((ours <= theirs + 2 * (2 * width * theirs.sqrt() + width**2)).all())
    if bits <= 4:
        assert float((theirs / ours).mean()) > 1.15


@pytest.mark.parametrize("observer", [PerChannelHistogramObserver, HistogramObserver])
def test_the_rule_holds_where_the_op_table_wants_another_axis(observer: type[Any]) -> None:
    """A transposed convolution has one scale: the rule is applied to the whole tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(16, 16, 3, stride=2), nn.ReLU()).eval()
    weights = model[0].weight.data.normal_()
    scheme = "channel" if observer is PerChannelHistogramObserver else "tensor"
    weight = observer.with_args(
        dtype=torch.int8,
        qscheme=getattr(torch, f"per_{scheme}_symmetric"),
        quant_min=-8,
        quant_max=7,
    )
    x = torch.randn(2, 16, 5, 5)
    scales = []
    for factory in (weight, weight.with_args(rule=MinMaxRule())):
        qconfig = QConfig(MinMaxObserver.with_args(dtype=torch.uint8), factory)
        prepared = calibrate(prepare_fx(model, {"": qconfig}, (x,)), [x], progress=False)
        int8 = convert_fx(prepared)
        scales.append(float(int8.get_buffer("_0_weight_scale")))
    whole = HistogramObserver(
        dtype=torch.int8,
        qscheme=torch.per_tensor_symmetric,
        quant_min=-8,
        quant_max=7,
        count_limit=None,
    )
    whole(weights)
    assert scales[0] == float(whole.qparams().scale)
    assert scales[1] == pytest.approx(float(weights.abs().amax()) / 7.5)
    assert scales[0] < 0.8 * scales[1]


def test_the_table_is_complete() -> None:
    """A rule or observer that is added has to be tried here."""
    import fxquant.observers
    import fxquant.range_rules

    rules = {
        value
        for name, value in vars(fxquant.range_rules).items()
        if name.endswith("Rule") and isinstance(value, type) and name != "RangeRule"
    }
    assert {type(rule) for rule in RULES} == {r for r in rules if not r.__name__.startswith("_")}
    base = fxquant.observers.UniformQuantizationObserverBase
    observers = {
        value
        for value in vars(fxquant.observers).values()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    observers.discard(TorchHistogramObserver)  # it has one rule, tested against torch.ao's
    assert observers == {*PER_TENSOR, *PER_CHANNEL}
    assert len(COMBINATIONS) == len(set(itertools.chain(COMBINATIONS)))
