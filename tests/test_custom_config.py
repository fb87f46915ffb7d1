"""Custom configs: setters, dict forms, equality, and torch.ao's objects read as our own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.backend_config import BackendConfig
from fxquant.custom_config import (
    ConvertCustomConfig,
    FuseCustomConfig,
    PrepareCustomConfig,
    QuantType,
    as_convert_custom_config,
    as_fuse_custom_config,
    as_prepare_custom_config,
    as_quant_type,
)
from fxquant.dict_policy import OWN, TORCH_AO
from fxquant.errors import (
    ConfigError,
    ConfigWarning,
    Diagnostics,
    LegacyFormWarning,
    StrictModeError,
    UnknownKeyError,
)
from fxquant.qconfig import default_qconfig
from fxquant.qconfig_mapping import QConfigMapping


class Float:  # classes need not be modules
    pass


class Observed:
    pass


class Quantized:
    pass


X = torch.arange(6.0).reshape(2, 3)
X1 = X + 1


def _prepare(cls: Any, mapping: Any, backend: Any) -> Any:
    """Every setter once; what a keyword argument is called is checked too."""
    child = cls().set_input_quantized_indexes([0]).set_output_quantized_indexes([0])
    return (
        cls()
        .set_standalone_module_name(
            module_name="head",
            qconfig_mapping=mapping,
            example_inputs=(X,),
            prepare_custom_config=child,
            backend_config=backend,
        )
        .set_standalone_module_class(
            module_class=Float,
            qconfig_mapping=None,
            example_inputs=(X, X1),
            prepare_custom_config=None,
            backend_config=None,
        )
        .set_float_to_observed_mapping(float_class=Float, observed_class=Observed)
        .set_non_traceable_module_names(module_names=["a.b", "c"])
        .set_non_traceable_module_classes(module_classes=[Float, nn.Linear])
        .set_input_quantized_indexes(indexes=[0, 2])
        .set_output_quantized_indexes(indexes=[1])
        .set_preserved_attributes(attributes=["classes"])
    )


def _own_prepare() -> PrepareCustomConfig:
    mapping = QConfigMapping().set_global(default_qconfig)
    made: PrepareCustomConfig = _prepare(PrepareCustomConfig, mapping, BackendConfig("own"))
    return made


def _own_convert() -> ConvertCustomConfig:
    return (
        ConvertCustomConfig()
        .set_observed_to_quantized_mapping(observed_class=Observed, quantized_class=Quantized)
        .set_observed_to_quantized_mapping(Float, Quantized, quant_type=QuantType.DYNAMIC)
        .set_observed_to_quantized_mapping(Quantized, Quantized, QuantType.WEIGHT_ONLY)
        .set_preserved_attributes(attributes=["classes"])
    )


def _own_fuse() -> FuseCustomConfig:
    return FuseCustomConfig().set_preserved_attributes(attributes=["classes", "scale"])


MAKERS: dict[str, Callable[[], Any]] = {
    "prepare": _own_prepare,
    "convert": _own_convert,
    "fuse": _own_fuse,
}
READERS: dict[str, Callable[..., Any]] = {
    "prepare": as_prepare_custom_config,
    "convert": as_convert_custom_config,
    "fuse": as_fuse_custom_config,
}


# -- attributes and dicts -------------------------------------------------------------------------


def test_setters_fill_the_attributes() -> None:
    config = _own_prepare()
    head = config.standalone_module_names["head"]
    assert head.qconfig_mapping == QConfigMapping().set_global(default_qconfig)
    assert head.example_inputs[0] is X
    assert head.prepare_custom_config is not None
    assert head.prepare_custom_config.input_quantized_indexes == [0]
    assert head.backend_config == BackendConfig("own")
    by_class = config.standalone_module_classes[Float]
    assert by_class.qconfig_mapping is None
    assert by_class.prepare_custom_config is None
    assert by_class.backend_config is None
    assert config.float_to_observed_mapping == {QuantType.STATIC: {Float: Observed}}
    assert config.non_traceable_module_names == ["a.b", "c"]
    assert config.non_traceable_module_classes == [Float, nn.Linear]
    assert config.input_quantized_indexes == [0, 2]
    assert config.output_quantized_indexes == [1]
    assert config.preserved_attributes == ["classes"]


def test_every_kind_of_quantization_has_its_own_classes() -> None:
    assert _own_convert().observed_to_quantized_mapping == {
        QuantType.STATIC: {Observed: Quantized},
        QuantType.DYNAMIC: {Float: Quantized},
        QuantType.WEIGHT_ONLY: {Quantized: Quantized},
    }
    prepare = PrepareCustomConfig()
    for kind in (QuantType.STATIC, QuantType.DYNAMIC, QuantType.WEIGHT_ONLY):
        prepare.set_float_to_observed_mapping(Float, Observed, kind)
    assert set(prepare.float_to_observed_mapping) == {1, 0, 3}


@pytest.mark.parametrize("name", MAKERS)
def test_the_dict_form_reads_back(name: str) -> None:
    config = MAKERS[name]()
    given = config.to_dict()
    assert type(config).from_dict(given) == config
    assert READERS[name](given) == config
    assert READERS[name](config) is config


@pytest.mark.parametrize("name", MAKERS)
def test_empty_configs_have_empty_dicts(name: str) -> None:
    empty = type(MAKERS[name]())()
    assert empty.to_dict() == {}
    assert READERS[name](None) == empty
    assert READERS[name]({}) == empty
    assert repr(empty) == f"{type(empty).__name__}()"


def test_the_dict_form_has_the_known_keys() -> None:
    given = _own_prepare().to_dict()
    assert given.pop("standalone_module_name")[0][0] == "head"
    assert given.pop("standalone_module_class")[0][0] is Float
    assert given == {
        "float_to_observed_custom_module_class": {"static": {Float: Observed}},
        "non_traceable_module_name": ["a.b", "c"],
        "non_traceable_module_class": [Float, nn.Linear],
        "input_quantized_idxs": [0, 2],
        "output_quantized_idxs": [1],
        "preserved_attributes": ["classes"],
    }
    assert _own_convert().to_dict()["observed_to_quantized_custom_module_class"] == {
        "static": {Observed: Quantized},
        "dynamic": {Float: Quantized},
        "weight_only": {Quantized: Quantized},
    }


def test_nested_dicts_are_read() -> None:
    row = ("m", {"": default_qconfig}, (X,), {"output_quantized_idxs": [0]}, {"name": "mine"})
    entry = PrepareCustomConfig.from_dict({"standalone_module_name": [row]})
    found = entry.standalone_module_names["m"]
    assert found.qconfig_mapping == QConfigMapping().set_global(default_qconfig)
    assert found.prepare_custom_config == PrepareCustomConfig().set_output_quantized_indexes([0])
    assert found.backend_config == BackendConfig("mine")


CHANGES: dict[str, Callable[[PrepareCustomConfig], object]] = {
    "example input": lambda c: c.set_standalone_module_name("head", None, (X + 1,), None, None),
    "standalone class": lambda c: c.set_standalone_module_class(Observed, None, (), None, None),
    "observed class": lambda c: c.set_float_to_observed_mapping(Float, Quantized),
    "quant type": lambda c: c.set_float_to_observed_mapping(Float, Observed, QuantType.DYNAMIC),
    "names": lambda c: c.set_non_traceable_module_names(["c"]),
    "classes": lambda c: c.set_non_traceable_module_classes([Float]),
    "inputs": lambda c: c.set_input_quantized_indexes([0]),
    "outputs": lambda c: c.set_output_quantized_indexes([0]),
    "attributes": lambda c: c.set_preserved_attributes([]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equality_sees_every_attribute(change: str) -> None:
    config = _own_prepare()
    assert config == _own_prepare()
    CHANGES[change](config)
    assert config != _own_prepare()


def test_the_representation_shows_what_is_set() -> None:
    assert repr(_own_convert()) == (
        "ConvertCustomConfig(observed_to_quantized_mapping={STATIC: {Observed: Quantized},"
        " DYNAMIC: {Float: Quantized}, WEIGHT_ONLY: {Quantized: Quantized}},"
        " preserved_attributes=['classes'])"
    )
    shown = repr(_own_prepare())
    assert "non_traceable_module_classes=[Float, Linear]" in shown
    assert "'head': <its own qconfigs, PrepareCustomConfig(input_quantized_indexes=[0]" in shown
    assert "Float: <parent's qconfigs, None>" in shown


# -- what is refused, and what is said ------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"standalone_module_name": [("m",)]}, r"needs a list of \(key, qconfig_mapping"),
    ({"standalone_module_name": ("m", None)}, r"holds 'm'"),
    ({"standalone_module_name": "m"}, r"got 'm'"),
    (
        {"standalone_module_name": [("m", 1, (), None, None)]},
        r"Expected QConfigMapping in prepare_custom_config_dict\[\"standalone_module_name\"\], got",
    ),
    ({"standalone_module_class": [(Float, None, (), 1, None)]}, "Expected PrepareCustomConfig"),
    ({"standalone_module_class": [(Float, None, (), None, 1)]}, "Expected BackendConfig"),
    ({"standalone_module_class": [("Float", None, (), None, None)]}, "where type is wanted"),
    ({"float_to_observed_custom_module_class": {"statik": {}}}, "'statik'.*did you mean 'static'"),
    ({"float_to_observed_custom_module_class": {"static": [1]}}, r"but holds \[1\]"),
    ({"float_to_observed_custom_module_class": {"static": {Float: 1}}}, "from class to class"),
    ({"float_to_observed_custom_module_class": {"STATIC": {}}}, "Unknown QuantType name 'STATIC'"),
    ({"non_traceable_module_name": "decoder"}, "needs a list of str, got 'decoder'"),
    ({"non_traceable_module_class": ["Decoder"]}, "'Decoder', where type is wanted"),
    ({"input_quantized_idxs": 0}, "needs a list of int, got 0"),
    ({"output_quantized_idxs": [True]}, "holds True, where int is wanted"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(m) for _, m in REFUSED])
def test_wrong_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareCustomConfig.from_dict(given)


def test_an_unknown_key_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UnknownKeyError, match="did you mean 'preserved_attributes'"):
        as_prepare_custom_config({"preserve_attributes": ["a"]})
    with pytest.raises(UnknownKeyError, match="convert_custom_config_dict: unknown key 'x'"):
        ConvertCustomConfig.from_dict({"x": 1})
    with pytest.raises(UnknownKeyError, match="fuse_custom_config_dict"):
        as_fuse_custom_config({1: 2})


def test_under_the_policy_of_torch_ao_it_is_a_warning() -> None:
    diagnostics = Diagnostics(silent=True)
    given = {"preserve_attributes": ["a"], "input_quantized_idxs": [1]}
    config = as_prepare_custom_config(given, TORCH_AO, diagnostics)
    assert config == PrepareCustomConfig().set_input_quantized_indexes([1])
    assert [category for category, _ in diagnostics.messages] == [LegacyFormWarning, ConfigWarning]
    assert diagnostics.messages[0][1].startswith(
        "Passing a prepare_custom_config_dict to prepare is deprecated"
    )
    with pytest.raises(StrictModeError, match="is deprecated"):
        as_prepare_custom_config(given, TORCH_AO, Diagnostics(strict=True))


def test_the_policy_reaches_what_is_nested() -> None:
    row = ("m", None, (X,), {"nonsense": 1}, {"nonsense": 2})
    diagnostics = Diagnostics(silent=True)
    as_prepare_custom_config({"standalone_module_name": [row]}, TORCH_AO, diagnostics)
    unknown = [m for category, m in diagnostics.messages if category is ConfigWarning]
    assert len(unknown) == 2
    with pytest.raises(UnknownKeyError, match="'nonsense'"):
        as_prepare_custom_config({"standalone_module_name": [row]})


def test_a_class_may_have_a_policy_of_its_own() -> None:
    class Compatible(PrepareCustomConfig):
        dict_policy = TORCH_AO

    with pytest.warns(ConfigWarning, match="'nonsense'"):
        config = Compatible.from_dict({"nonsense": 1})
    assert type(config) is Compatible
    assert config == PrepareCustomConfig()


def test_own_dicts_draw_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, make in MAKERS.items():
            READERS[name](make().to_dict(), OWN)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", [3, "x", [1], PrepareCustomConfig, object()])
def test_something_else_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="or a dict, got"):
        READERS[name](value)


# -- torch.ao's objects ---------------------------------------------------------------------------


@pytest.mark.peer
def test_the_setters_do_what_those_of_torch_ao_do() -> None:
    from torch.ao.quantization import QConfigMapping as TheirMapping
    from torch.ao.quantization.backend_config import BackendConfig as TheirBackend
    from torch.ao.quantization.fx import custom_config as theirs

    mapping = TheirMapping().set_global(None)
    made = _prepare(theirs.PrepareCustomConfig, mapping, TheirBackend("own"))
    read = as_prepare_custom_config(made)
    own = _prepare(PrepareCustomConfig, QConfigMapping(), BackendConfig("own"))
    assert read == own
    assert set(vars(own)) == set(vars(made))
    expected, found = made.to_dict(), own.to_dict()
    key = "standalone_module_name"
    assert [row[:4] for row in found[key]] == [row[:4] for row in expected[key]]
    assert [row[4].name for row in found.pop(key)] == [row[4].name for row in expected.pop(key)]
    assert found == expected
    head = read.standalone_module_names["head"]
    assert head.qconfig_mapping is not None
    assert head.qconfig_mapping.from_torch_ao


@pytest.mark.peer
@pytest.mark.parametrize("name", ["QAT", "STATIC", "DYNAMIC", "WEIGHT_ONLY"])
def test_quant_types_are_understood_both_ways(name: str) -> None:
    from torch.ao.quantization.fx import custom_config as theirs

    own, foreign = QuantType[name], theirs.QuantType[name]
    assert as_quant_type(foreign) is own
    assert own == foreign
    assert {own: 1}[foreign] == 1
    assert as_quant_type(name.lower()) is own
    given_theirs = theirs.ConvertCustomConfig().set_observed_to_quantized_mapping(
        Observed, Quantized, own
    )
    given_ours = ConvertCustomConfig().set_observed_to_quantized_mapping(
        Observed, Quantized, foreign
    )
    assert as_convert_custom_config(given_theirs) == given_ours
    mapped = theirs.ConvertCustomConfig().set_observed_to_quantized_mapping(
        Observed, Quantized, foreign
    )
    assert mapped.to_dict() == given_ours.to_dict()


@pytest.mark.peer
def test_configs_of_torch_ao_to_convert_and_fuse_are_read() -> None:
    from torch.ao.quantization.fx import custom_config as theirs

    convert = (
        theirs.ConvertCustomConfig()
        .set_observed_to_quantized_mapping(Observed, Quantized)
        .set_preserved_attributes(["classes"])
    )
    assert as_convert_custom_config(convert).to_dict() == convert.to_dict()
    fuse = theirs.FuseCustomConfig().set_preserved_attributes(["classes", "scale"])
    assert as_fuse_custom_config(fuse) == _own_fuse()
    assert set(vars(_own_fuse())) == set(vars(fuse))


@pytest.mark.peer
def test_every_method_of_torch_ao_is_there_with_its_parameters() -> None:
    import inspect

    from torch.ao.quantization.fx import custom_config as theirs

    for cls in (PrepareCustomConfig, ConvertCustomConfig, FuseCustomConfig):
        their_class = getattr(theirs, cls.__name__)
        for name, method in inspect.getmembers(their_class, callable):
            if name.startswith("__"):
                continue
            wanted = list(inspect.signature(method).parameters)
            found = list(inspect.signature(getattr(cls, name)).parameters)
            assert found[: len(wanted)] == wanted, name
