"""QConfigs: values, what their factories want, and torch.ao's objects read by duck typing."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant.qconfig as module
from fxquant.errors import ConfigError, SpecError
from fxquant.fake_quantize import FakeQuantize
from fxquant.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    default_weight_observer,
)
from fxquant.qconfig import (
    BACKENDS,
    ObserverFactory,
    QConfig,
    as_qconfig,
    default_dynamic_qconfig,
    default_embedding_qat_qconfig,
    default_per_channel_qconfig,
    default_qconfig,
    default_reuse_input_qconfig,
    float16_dynamic_qconfig,
    float16_static_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    get_default_qat_qconfig,
    get_default_qconfig,
    spec_of,
)
from fxquant.range_rules import MSERule, TorchHistogramRule
from fxquant.specs import DEFAULT_EPS, QuantSpec

DEFAULTS = {name: value for name, value in vars(module).items() if isinstance(value, QConfig)}
defaults = pytest.mark.parametrize("qconfig", DEFAULTS.values(), ids=DEFAULTS)


def described(factory: Callable[..., Any] | None) -> tuple[object, ...] | None:
    found = spec_of(factory)
    if found is None:
        return None
    text = found.spec.short() if found.spec else None
    name = found.name.replace("TorchHistogramObserver", "HistogramObserver")  # torch.ao's, of ours
    return text, found.reuse_input, found.collects, found.is_fake_quantize, name


# ------------------------------------------------------------------------------------ values


@defaults
def test_qconfigs_are_values(qconfig: QConfig) -> None:
    for other in (QConfig(*qconfig), copy.deepcopy(qconfig), pickle.loads(pickle.dumps(qconfig))):
        assert other == qconfig
        assert other == qconfig
        assert hash(other) == hash(qconfig)
    activation, weight = qconfig
    assert (activation, weight) == (qconfig.activation, qconfig.weight)
    assert repr(qconfig).startswith("QConfig(activation=")


def test_equality_looks_through_every_kind_of_partial() -> None:
    a = QConfig(MinMaxObserver.with_args(dtype=torch.int8), None)
    b = QConfig(functools.partial(MinMaxObserver, dtype=torch.int8), None)
    assert a == b
    assert hash(a) == hash(b)
    assert a == QConfig(MinMaxObserver.with_args().with_args(dtype=torch.int8), None)
    assert QConfig(MinMaxObserver, None) == QConfig(MinMaxObserver.with_args(), None)
    assert a != QConfig(MinMaxObserver.with_args(dtype=torch.uint8), None)
    assert a != QConfig(None, None)
    assert a != "a qconfig"
    tensors = [MinMaxObserver.with_args(eps=torch.tensor([0.5])) for _ in range(2)]
    assert QConfig(tensors[0], None) == QConfig(tensors[1], None)


def test_different_defaults_differ() -> None:
    distinct = {repr(qconfig): qconfig for qconfig in DEFAULTS.values()}
    values = list(distinct.values())
    assert all(a != b for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("argument", ["activation", "weight"])
def test_instances_are_refused(argument: str) -> None:
    arguments = {"activation": MinMaxObserver, "weight": MinMaxObserver, argument: MinMaxObserver()}
    with pytest.raises(ConfigError) as error:
        QConfig(**arguments)
    assert isinstance(error.value, ValueError)
    assert "QConfig received observer instance" in str(error.value)
    assert "please pass observer class instead. Use MyObserver.with_args(x=1)" in str(error.value)
    assert f"({argument}=MinMaxObserver(...))" in str(error.value)


def test_things_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(ConfigError, match="observer class or factory as weight, got 'int8'"):
        QConfig(activation=None, weight="int8")  # type: ignore[arg-type]


def test_repr_is_readable() -> None:
    assert repr(default_dynamic_qconfig) == (
        "QConfig(activation=PlaceholderObserver(dtype=torch.uint8, quant_min=0, quant_max=255, "
        "is_dynamic=True), weight=MinMaxObserver(dtype=torch.int8, "
        "qscheme=torch.per_tensor_symmetric))"
    )


# -------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (None, None),
        (HistogramObserver, ("uint8 affine 0..255", False, True, False, "HistogramObserver")),
        (
            default_per_channel_qconfig.weight,
            ("int8 per-channel(0) sym -128..127", False, True, False, "PerChannelMinMaxObserver"),
        ),
        (
            FixedQParamsObserver.with_args(scale=1 / 256, zero_point=0),
            (
                "uint8 affine 0..255 fixed(scale=0.00390625, zero_point=0)",
                False,
                True,
                False,
                "FixedQParamsObserver",
            ),
        ),
        (
            default_dynamic_qconfig.activation,
            ("uint8 affine 0..255 dynamic", False, False, False, "PlaceholderObserver"),
        ),
        (
            float16_dynamic_qconfig.activation,
            ("float16 dynamic", False, False, False, "PlaceholderObserver"),
        ),
        (float16_static_qconfig.weight, ("float16", False, False, False, "PlaceholderObserver")),
        (PlaceholderObserver, (None, False, False, False, "PlaceholderObserver")),
        (NoopObserver, (None, False, False, False, "NoopObserver")),
        (RecordingObserver, (None, False, True, False, "RecordingObserver")),
        (nn.Identity, (None, False, False, False, "Identity")),
        (
            default_reuse_input_qconfig.activation,
            (None, True, False, False, "ReuseInputObserver"),
        ),
        (
            float_qparams_weight_only_qconfig_4bit.weight,
            (
                "uint8 per-channel(0) float-qparams 0..15",
                False,
                True,
                False,
                "PerChannelMinMaxObserver",
            ),
        ),
        (
            default_embedding_qat_qconfig.weight,
            ("uint8 per-channel(0) float-qparams 0..255", False, True, True, "FakeQuantize"),
        ),
        (
            FakeQuantize.with_args(quant_min=0, quant_max=255, reduce_range=True),
            ("uint8 affine 0..127", False, True, True, "FakeQuantize"),
        ),
    ],
    ids=str,
)
def test_what_a_factory_wants(factory: Any, expected: tuple[object, ...] | None) -> None:
    assert described(factory) == expected


def test_a_factory_makes_new_observers() -> None:
    found = spec_of(default_weight_observer)
    assert isinstance(found, ObserverFactory)
    assert found() is not found()
    assert isinstance(found(), MinMaxObserver)
    assert found.spec == found().spec


class Foreign(nn.Module):
    """An observer that fxquant has never heard of."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_any_observer_is_read_by_its_attributes() -> None:
    found = spec_of(
        lambda: Foreign(
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            quant_min=torch.tensor(-127),
            quant_max=127,
            ch_axis=1,
            eps=torch.tensor([0.5]),
            is_dynamic=False,
        )
    )
    assert found is not None
    assert found.spec == QuantSpec(
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-127,
        quant_max=127,
        ch_axis=1,
        eps=0.5,
    )
    plain = spec_of(lambda: Foreign(dtype=torch.qint8, quant_min=None))
    assert plain is not None
    assert plain.spec is not None
    assert plain.spec.short() == "int8 affine -128..127"
    float32 = spec_of(lambda: Foreign(dtype=torch.float32))
    assert float32 is not None
    assert float32.spec is None


@pytest.mark.parametrize(
    ("factory", "error", "text"),
    [
        (lambda: 3, ConfigError, "makes a int, not an observer module"),
        (nn.ReLU, ConfigError, "ReLU is no observer: it has no dtype"),
        (lambda: Foreign(dtype=torch.bool), SpecError, "dtype torch.bool is no quantization"),
        (
            lambda: Foreign(dtype=torch.qint8, quant_min=-300, quant_max=300),
            SpecError,
            "range -300..300 does not fit int8",
        ),
    ],
)
def test_factories_of_other_things_are_refused(
    factory: Callable[[], Any], error: type[ConfigError], text: str
) -> None:
    with pytest.raises(error, match=text.replace("..", r"\.\.")):
        spec_of(factory)


# ----------------------------------------------------------------------------------- defaults


def test_x86_has_the_full_range_and_the_least_error() -> None:
    qconfig = get_default_qconfig()
    observer = qconfig.activation()
    assert isinstance(observer, HistogramObserver)
    assert observer.rule == MSERule()
    assert observer.spec.short() == "uint8 affine 0..255"
    assert isinstance(qconfig.weight(), PerChannelMinMaxObserver)
    assert qconfig.weight().spec.short() == "int8 per-channel(0) sym -127..127"
    assert qconfig.weight().spec.eps == DEFAULT_EPS  # small weights keep their resolution


@pytest.mark.parametrize(
    ("backend", "activation", "weight"),
    [
        ("x86", "uint8 affine 0..255", "int8 per-channel(0) sym -127..127"),
        ("x86-compat", "uint8 affine 0..127", "int8 per-channel(0) sym -128..127"),
        ("fbgemm", "uint8 affine 0..127", "int8 per-channel(0) sym -128..127"),
        ("onednn", "uint8 affine 0..255", "int8 per-channel(0) sym -128..127"),
        ("qnnpack", "uint8 affine 0..255", "int8 sym -128..127"),
    ],
)
def test_defaults_by_backend(backend: str, activation: str, weight: str) -> None:
    for qconfig in (get_default_qconfig(backend), get_default_qat_qconfig(backend)):
        assert qconfig.activation().spec.short() == activation
        assert qconfig.weight().spec.short() == weight
    assert set(BACKENDS) == {"x86", "x86-compat", "fbgemm", "onednn", "qnnpack"}
    if backend != "x86":
        assert get_default_qconfig(backend).activation().rule == TorchHistogramRule()


@pytest.mark.parametrize("get", [get_default_qconfig, get_default_qat_qconfig])
def test_unknown_backends_are_refused(get: Callable[[str], QConfig]) -> None:
    with pytest.raises(AssertionError) as error:
        get("x87")
    assert isinstance(error.value, ConfigError)
    assert "'x87' is not supported, use one of x86, x86-compat, fbgemm" in str(error.value)
    assert "did you mean 'x86'" in str(error.value)


def test_as_qconfig_says_where() -> None:
    assert as_qconfig(None, "here") is None
    assert as_qconfig(default_qconfig, "here") is default_qconfig
    with pytest.raises(ConfigError, match="here needs a QConfig or None, got 3"):
        as_qconfig(3, "here")
    with pytest.raises(ConfigError, match="an observer alone is not enough"):
        as_qconfig(MinMaxObserver, "here")


# --------------------------------------------------------------------------------------- peer


def peer_module() -> Any:
    return importlib.import_module("torch.ao.quantization.qconfig")


#: Where fxquant's default of the same name uses the full range and torch.ao's half of it.
FULL_RANGE = {
    "default_qconfig",
    "default_per_channel_qconfig",
    "default_qat_qconfig",
    "default_activation_only_qconfig",
}


@pytest.mark.peer
def test_defaults_of_torch_ao_are_understood_and_the_same() -> None:
    peer = peer_module()
    theirs = {n: v for n, v in vars(peer).items() if isinstance(v, peer.QConfig) and n[0] != "_"}
    assert len(theirs) > 20
    for name, qconfig in theirs.items():
        ours = getattr(module, name)
        assert described(ours.weight) == described(qconfig.weight), name
        activation = described(qconfig.activation)
        if name in FULL_RANGE:
            assert activation is not None
            text = str(activation[0]).replace("127", "255")
            activation = (text, *activation[1:])
        assert described(ours.activation) == activation, name


@pytest.mark.peer
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_backend_defaults_want_what_those_of_torch_ao_want(backend: str) -> None:
    peer = peer_module()
    ours = "x86-compat" if backend == "x86" else backend
    pairs = [
        (get_default_qconfig(ours), peer.get_default_qconfig(backend)),
        (get_default_qat_qconfig(ours), peer.get_default_qat_qconfig(backend)),
    ]
    for mine, theirs in pairs:
        assert described(mine.activation) == described(theirs.activation)
        assert described(mine.weight) == described(theirs.weight)


@pytest.mark.peer
def test_qconfigs_of_torch_ao_are_compared_by_value() -> None:
    peer = importlib.import_module("torch.ao.quantization")

    def make(low: int) -> Any:
        activation = peer.MinMaxObserver.with_args(quant_min=low, quant_max=127)
        return peer.QConfig(activation=activation, weight=peer.default_weight_observer)

    a, b = as_qconfig(make(0), ""), as_qconfig(make(0), "")
    assert a == b
    assert a is not None
    assert a == make(0)
    assert hash(a) == hash(b)
    assert a != as_qconfig(make(-128), "")


@pytest.mark.peer
def test_warnings_of_torch_ao_about_its_own_observers_are_consumed() -> None:
    peer = importlib.import_module("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = spec_of(peer.HistogramObserver.with_args(reduce_range=True))
        assert found is not None
        assert found.spec is not None
        assert found.spec.quant_max == 127
        found()


def test_reuse_input_by_name_alone() -> None:
    class ReuseInputObserver(Foreign):
        pass

    found = spec_of(lambda: ReuseInputObserver(dtype=torch.quint8))
    assert found is not None
    assert found.reuse_input
