"""Observers: torch.ao's surface and numbers, and what fxquant does about bad input."""

from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant.observers as observers
from fxquant.collectors import HistogramCollector
from fxquant.errors import (
    CalibrationWarning,
    ConfigError,
    ConfigWarning,
    NonFiniteStatisticError,
    SpecError,
)
from fxquant.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    ObserverBase,
    PartialFactory,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
    TorchHistogramObserver,
    UniformQuantizationObserverBase,
    default_dynamic_quant_observer,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_float_qparams_observer_4bit,
    default_observer,
    default_per_channel_weight_observer,
    default_weight_observer,
)
from fxquant.range_rules import MinMaxRule, MSERule, PercentileRule, TorchHistogramRule
from fxquant.specs import QuantSpec

COLLECTING: list[type[UniformQuantizationObserverBase]] = [
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    HistogramObserver,
    TorchHistogramObserver,
]
collecting = pytest.mark.parametrize("kind", COLLECTING, ids=lambda c: c.__name__)
SILENT: list[Callable[[], ObserverBase]] = [
    PlaceholderObserver,
    NoopObserver,
    ReuseInputObserver,
    lambda: FixedQParamsObserver(scale=0.1, zero_point=3),
]


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator) * 3**k + 0.2 for k in range(count)]


def is_per_channel(kind: type[ObserverBase]) -> bool:
    return "PerChannel" in kind.__name__


# ----------------------------------------------------------------------------------- forward


@collecting
def test_forward_gives_the_very_tensor_back(kind: type[UniformQuantizationObserverBase]) -> None:
    observer = kind()
    x = torch.randn(4, 3, requires_grad=True)
    assert observer(x) is x
    assert observer.was_observed
    assert not observer.min_val.requires_grad


@collecting
def test_disabled_observers_do_not_look(kind: type[UniformQuantizationObserverBase]) -> None:
    observer = kind()
    observer.disable_observer()
    observer(torch.full((4, 3), math.nan))
    assert not observer.was_observed
    observer.enable_observer()
    observer(torch.randn(4, 3))
    assert observer.was_observed


@collecting
def test_non_finite_values_name_the_observer(kind: type[UniformQuantizationObserverBase]) -> None:
    observer = kind()
    observer.owner = "activation_post_process_3 (output of 'layer1.0.conv1')"
    with pytest.raises(NonFiniteStatisticError) as error:
        observer(torch.full((4, 3), math.nan))
    assert "activation_post_process_3 (output of 'layer1.0.conv1') got 12 NaN" in str(error.value)


@collecting
def test_fake_and_meta_tensors_pass_unseen(kind: type[UniformQuantizationObserverBase]) -> None:
    observer = kind()
    observer(torch.randn(4, 3, device="meta"))
    with FakeTensorMode() as mode:
        observer(mode.from_tensor(torch.randn(4, 3)))
    assert not observer.was_observed


@collecting
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_observed_in_float32(
    kind: type[UniformQuantizationObserverBase], dtype: torch.dtype
) -> None:
    observer = kind()
    out = observer(torch.randn(4, 3).to(dtype))
    scale, zero_point = observer.calculate_qparams()
    assert (out.dtype, scale.dtype, zero_point.dtype) == (dtype, torch.float32, torch.int32)


def test_an_autocast_model_can_be_observed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), HistogramObserver())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 3))
    assert out.dtype == torch.bfloat16
    assert model[1].was_observed


# -------------------------------------------------------------------------------- parameters


@collecting
def test_unobserved_gives_defaults_and_a_warning(
    kind: type[UniformQuantizationObserverBase],
) -> None:
    observer = kind()
    observer.owner = "activation_post_process_0"
    text = (
        "activation_post_process_0: must run observer before calling calculate_qparams. "
        "Returning default values."
    )
    with pytest.warns(CalibrationWarning) as caught:
        scale, zero_point = observer.calculate_qparams()
    assert str(caught[0].message).startswith(text)
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])
    with pytest.warns(CalibrationWarning):
        qparams = observer.qparams()
    assert (float(qparams.scale), int(qparams.zero_point)) == (1.0, 0)


@collecting
def test_qparams_and_calculate_qparams_agree(kind: type[UniformQuantizationObserverBase]) -> None:
    observer = kind()
    for x in batches():
        observer(x)
    scale, zero_point = observer.calculate_qparams()
    qparams = observer.qparams()
    qparams.validate()
    assert scale.shape == zero_point.shape == ((4,) if is_per_channel(kind) else (1,))
    assert torch.equal(scale, qparams.scale.reshape(-1))
    assert torch.equal(zero_point, qparams.zero_point.reshape(-1))
    assert qparams.spec == observer.spec


@pytest.mark.parametrize(
    ("dtype", "given_", "expected"),
    [
        (torch.uint8, None, (0, 127)),
        (torch.quint8, None, (0, 127)),
        (torch.int8, None, (-64, 63)),
        (torch.uint8, (0, 255), (0, 127)),
        (torch.int8, (-127, 127), (-64, 63)),
    ],
)
def test_reduce_range_halves_the_range(
    dtype: torch.dtype, given_: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    low, high = given_ or (None, None)
    observer = MinMaxObserver(dtype=dtype, reduce_range=True, quant_min=low, quant_max=high)
    assert (observer.quant_min, observer.quant_max) == expected
    assert (observer.spec.quant_min, observer.spec.quant_max) == expected


@collecting
def test_the_surface_of_torch_ao(kind: type[UniformQuantizationObserverBase]) -> None:
    per_channel = is_per_channel(kind)
    symmetric = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    observer = kind(
        dtype=torch.qint8,
        qscheme=symmetric,
        quant_min=-127,
        quant_max=127,
        eps=2**-12,
        is_dynamic=True,
    )
    assert observer.dtype == torch.qint8
    assert observer.qscheme == symmetric
    assert (observer.quant_min, observer.quant_max, observer.eps) == (-127, 127, 2**-12)
    assert observer.is_dynamic
    assert observer.ch_axis == (0 if per_channel else -1)
    assert observer.spec == QuantSpec(
        dtype=torch.int8,
        qscheme=symmetric,
        quant_min=-127,
        quant_max=127,
        ch_axis=0 if per_channel else None,
        is_dynamic=True,
        eps=2**-12,
    )
    for x in batches():
        observer(x)
    assert observer.min_val.shape == ((4,) if per_channel else ())
    observer.reset_min_max_vals()
    assert not observer.was_observed


@collecting
def test_schemes_of_the_other_kind_are_refused(
    kind: type[UniformQuantizationObserverBase],
) -> None:
    wrong = torch.per_tensor_affine if is_per_channel(kind) else torch.per_channel_affine
    with pytest.raises(SpecError, match=f"{kind.__name__} supports torch.per_"):
        kind(qscheme=wrong)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"quant_min": 0}, "quant_min and quant_max go together"),
        ({"quant_min": 5, "quant_max": 7}, "must include 0"),
        ({"dtype": torch.float64}, "is no quantization dtype"),
        ({"eps": 0.0}, "eps"),
        ({"factory_kwargs": {"where": "cpu"}}, "factory_kwargs may hold"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(
    arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        MinMaxObserver(**arguments)


def test_devices_by_factory_kwargs() -> None:
    observer = MinMaxObserver(factory_kwargs={"device": "meta", "dtype": torch.float32})
    assert observer.min_val.is_meta


def test_four_bits() -> None:
    observer = default_float_qparams_observer_4bit()
    assert observer.spec.short() == "uint8 per-channel(0) float-qparams 0..15"
    quint = PerChannelMinMaxObserver(
        dtype=torch.quint4x2, qscheme=torch.per_channel_affine_float_qparams
    )
    assert quint.spec == observer.spec


def test_one_calibration_serves_every_rule() -> None:
    observer = HistogramObserver()
    assert observer.rule == MSERule()
    for _ in range(3):
        observer(torch.randn(5000))
    scales = {}
    for rule in (MinMaxRule(), MSERule(), TorchHistogramRule(), PercentileRule(0.99)):
        observer.rule = rule
        scales[rule] = float(observer.calculate_qparams()[0])
    assert len(set(scales.values())) == 4
    assert scales[MinMaxRule()] == max(scales.values())


# ------------------------------------------------------------------------------------ others


def test_fixed_parameters() -> None:
    observer = default_fixed_qparams_range_neg1to1_observer()
    x = torch.randn(3)
    assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1 / 128], [128])
    assert observer.spec.fixed == (1 / 128, 128)
    observer.qparams().validate()
    other = default_fixed_qparams_range_0to1_observer()
    other.load_state_dict(observer.state_dict())
    assert other.spec == observer.spec
    with pytest.raises(SpecError, match="fixed zero_point 300 is outside"):
        FixedQParamsObserver(scale=1.0, zero_point=300)


@pytest.mark.parametrize("make", [*SILENT[:3], RecordingObserver])
def test_observers_without_statistics_have_no_parameters(make: Callable[[], ObserverBase]) -> None:
    observer = make()
    x = torch.randn(3)
    assert observer(x) is x
    assert observer.spec is None
    with pytest.raises(ConfigError, match="calculate_qparams should not be called for"):
        observer.calculate_qparams()


def test_placeholders_say_what_is_wanted() -> None:
    dynamic = default_dynamic_quant_observer()
    assert dynamic.spec.short() == "uint8 affine 0..255 dynamic"
    half = PlaceholderObserver(dtype=torch.float16)
    assert half.spec is not None
    assert half.spec.short() == "float16"
    with pytest.warns(ConfigWarning, match="old spelling of is_dynamic=True"):
        old = PlaceholderObserver(dtype=torch.uint8, compute_dtype=torch.uint8)
    assert old.is_dynamic


def test_recording_keeps_copies() -> None:
    observer = RecordingObserver()
    x = torch.randn(3)
    observer(x)
    kept = x.clone()
    x.zero_()
    assert torch.equal(observer.get_tensor_value()[0], kept)
    observer.disable_observer()
    observer(x)
    assert len(observer.tensor_val) == 1


# ------------------------------------------------------------------------------------- union


@pytest.mark.parametrize("kind", [MinMaxObserver, PerChannelMinMaxObserver, HistogramObserver])
def test_merged_observers_have_seen_everything(
    kind: type[UniformQuantizationObserverBase],
) -> None:
    data = batches()
    whole, parts = kind(), [kind() for _ in range(4)]
    for x, part in zip(data, parts, strict=True):
        whole(x)
        part(x)
    parts[0].merge_from(parts[1:])
    assert torch.equal(parts[0].calculate_qparams()[0], whole.calculate_qparams()[0])


def test_observers_of_different_kinds_cannot_be_merged() -> None:
    a, b = MinMaxObserver(), HistogramObserver()
    a(torch.randn(3))
    b(torch.randn(3))
    with pytest.raises(ConfigError, match="cannot unite statistics"):
        a.merge_from([b])
    with pytest.raises(ConfigError, match="MinMaxObserver and PlaceholderObserver"):
        a.merge_from([PlaceholderObserver()])


# ------------------------------------------------------------------------------- persistence


@collecting
def test_state_dict_round_trip_is_strict(kind: type[UniformQuantizationObserverBase]) -> None:
    observer = kind()
    for x in batches():
        observer(x)
    file = io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    fresh = kind()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for mine, theirs in zip(observer.calculate_qparams(), fresh.calculate_qparams(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [*COLLECTING, *SILENT])
def test_observers_can_be_copied_pickled_and_moved(make: Callable[[], ObserverBase]) -> None:
    observer = make()
    observer.owner = "me"
    observer(torch.randn(4, 3))
    for other in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert other.owner == "me"
        assert other.spec == observer.spec
        assert other.state_dict().keys() == observer.state_dict().keys()
    assert all(b.is_meta for b in observer.to("meta").buffers())


@pytest.mark.parametrize("make", [*COLLECTING, *SILENT])
def test_observed_models_can_be_scripted(make: Callable[[], ObserverBase]) -> None:
    x = torch.randn(4, 3)
    plain, scripted = make(), torch.jit.script(nn.Sequential(make()))
    assert torch.equal(scripted(x), plain(x))
    theirs = dict(scripted.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(theirs[f"0.{name}"], buffer)


# --------------------------------------------------------------------------------- factories


def test_factories_are_values() -> None:
    a = MinMaxObserver.with_args(dtype=torch.int8, quant_min=-8, quant_max=7)
    b = MinMaxObserver.with_args(quant_max=7, quant_min=-8).with_args(dtype=torch.int8)
    assert a == b
    assert hash(a) == hash(b)
    assert a != b.with_args(quant_min=-7)
    assert a != HistogramObserver.with_args(dtype=torch.int8, quant_min=-8, quant_max=7)
    assert repr(a) == "MinMaxObserver(dtype=torch.int8, quant_min=-8, quant_max=7)"
    assert pickle.loads(pickle.dumps(a)) == a == copy.deepcopy(a)
    nested = HistogramObserver.with_args(rule=MSERule(), factory_kwargs={"device": "cpu"})
    assert nested == HistogramObserver.with_args(rule=MSERule(), factory_kwargs={"device": "cpu"})
    assert isinstance(hash(nested), int)


def test_pickles_made_before_observers_were_a_package_are_read() -> None:
    factory = MinMaxObserver.with_args(dtype=torch.int8)
    text = pickle.dumps(factory, protocol=0)
    for new, old in (
        (b"fxquant.observers.factory\nunpickle_factory", b"fxquant.observers\n_unpickle_factory"),
        (b"fxquant.observers.min_max\n", b"fxquant.observers\n"),
    ):
        assert new in text
        text = text.replace(new, old)
    assert pickle.loads(text) == factory


def test_factories_make_new_observers_every_time() -> None:
    factory = MinMaxObserver.with_args(dtype=torch.int8)
    first, second = factory(), factory(quant_min=-8, quant_max=7)
    assert first is not second
    assert (first.quant_min, second.quant_min) == (-128, -8)


def test_callable_arguments_are_computed_at_every_call() -> None:
    calls = []

    def device() -> dict[str, str]:
        calls.append(1)
        return {"device": "meta"}

    factory = MinMaxObserver.with_callable_args(factory_kwargs=device).with_args(dtype=torch.int8)
    assert factory().min_val.is_meta
    assert factory().dtype == torch.int8
    assert not factory(factory_kwargs=None).min_val.is_meta
    assert len(calls) == 2
    assert factory == PartialFactory(
        MinMaxObserver, {"dtype": torch.int8}, {"factory_kwargs": device}
    )
    again = MinMaxObserver.with_args(dtype=torch.int8).with_callable_args(factory_kwargs=device)
    assert factory == again


def test_defaults_have_the_full_range() -> None:
    assert default_observer().spec.short() == "uint8 affine 0..255"
    assert default_weight_observer().spec.short() == "int8 sym -128..127"
    weight = default_per_channel_weight_observer()
    assert weight.spec.short() == "int8 per-channel(0) sym -128..127"


def test_repr_says_the_spec_and_the_statistics() -> None:
    observer = MinMaxObserver()
    observer(torch.tensor([-1.0, 2.0]))
    assert "uint8 affine 0..255" in repr(observer)
    assert "min_val=-1, max_val=2" in repr(observer)


def test_histogram_observer_passes_its_bins_on() -> None:
    observer = HistogramObserver(bins=64)
    assert isinstance(observer.collector, HistogramCollector)
    assert observer.collector.bins == observer.bins == 64


# -------------------------------------------------------------------------------------- peer


SYMMETRIC: dict[str, Any] = {"qscheme": "symmetric"}
FLOAT: dict[str, Any] = {"qscheme": "affine_float_qparams"}
PEER_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.qint8},
    {"reduce_range": True},
    {"dtype": torch.qint8, "reduce_range": True},
    {**SYMMETRIC},
    {"dtype": torch.qint8, **SYMMETRIC},
    {"quant_min": 0, "quant_max": 127},
    {"quant_min": 0, "quant_max": 127, **SYMMETRIC},
    {"dtype": torch.qint8, "quant_min": -8, "quant_max": 7, **SYMMETRIC},
    {"dtype": torch.qint8, "eps": 0.5, **SYMMETRIC},
    {"dtype": torch.qint32},
    {**FLOAT},
    {"dtype": torch.quint4x2, **FLOAT},
]
PEER_CASES = [
    (kind.__name__, arguments)
    for kind in COLLECTING[:4]
    for arguments in PEER_ARGUMENTS
    if is_per_channel(kind) or arguments.get("qscheme") != FLOAT["qscheme"]
]


@pytest.mark.peer
@pytest.mark.parametrize(("name", "arguments"), PEER_CASES, ids=str)
def test_numbers_are_those_of_torch_ao(name: str, arguments: dict[str, Any]) -> None:
    peer = importlib.import_module("torch.ao.quantization")
    arguments = dict(arguments)
    if "qscheme" in arguments:
        prefix = "per_channel_" if "PerChannel" in name else "per_tensor_"
        arguments["qscheme"] = getattr(torch, prefix + arguments["qscheme"])
    ours, theirs = getattr(observers, name)(**arguments), getattr(peer, name)(**arguments)
    assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        x = torch.randn(5, 7, generator=generator) * 10 ** (step - 2) + step * 0.3
        ours(x)
        theirs(x)
        scale, zero_point = ours.calculate_qparams()
        assert torch.equal(scale, theirs.calculate_qparams()[0])
        assert zero_point.tolist() == theirs.calculate_qparams()[1].tolist()
        assert torch.equal(ours.min_val, theirs.min_val)


@pytest.mark.peer
def test_every_observer_name_of_torch_ao_is_here() -> None:
    peer = importlib.import_module("torch.ao.quantization.observer")
    names = {
        name
        for name in peer.__all__
        if not name.startswith(("Affine", "TorchAO", "get_", "load_"))
        and (name.endswith("Observer") or name.startswith("default_"))
    }
    assert {name for name in names if not hasattr(observers, name)} == set()


# -------------------------------------------------------------------- torch.ao's histogram, exactly


@pytest.mark.peer
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("batches_seen", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["normal", "relu", "shifted", "spike", "whole"])
def test_torch_histogram_observer_is_torch_aos_to_the_last_bit(
    kind: str, batches_seen: int, *, reduce_range: bool
) -> None:
    """Histogram, extremes, scale and zero point, while the range grows in every batch."""
    peer = importlib.import_module("torch.ao.quantization")
    torch.manual_seed(batches_seen)
    theirs, ours = (
        peer.HistogramObserver(reduce_range=reduce_range),
        TorchHistogramObserver(reduce_range=reduce_range),
    )
    for number in range(batches_seen):
        x = torch.randn(3, 5, 40) * (1 + number * float(torch.rand(())))
        x = {
            "normal": x,
            "relu": x.relu(),
            "shifted": x + 3,
            "spike": torch.cat([x.flatten(), torch.full((2000,), 0.5)]),
            "whole": x.round(),
        }[kind]
        theirs(x)
        ours(x)
    assert torch.equal(ours.collector.histogram, theirs.histogram)
    assert float(ours.min_val) == float(theirs.min_val)
    assert float(ours.max_val) == float(theirs.max_val)
    scale, zero_point = theirs.calculate_qparams()
    assert torch.equal(ours.calculate_qparams()[0], scale)
    assert torch.equal(ours.calculate_qparams()[1], zero_point)


def test_a_stretched_span_keeps_every_count() -> None:
    observer = TorchHistogramObserver(bins=8)
    observer(torch.linspace(0, 1, 100))
    observer(torch.linspace(-3, 5, 60))
    assert float(observer.collector.histogram.sum()) == 160.0
    assert (float(observer.min_val), float(observer.max_val)) == (-3.0, 5.0)
