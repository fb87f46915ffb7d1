"""Backend configs: setters, dict forms, patterns in forward order, and torch.ao's objects."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    ObservationType,
    as_backend_config,
    as_backend_pattern_config,
    as_observation_type,
)
from fxquant.backend_patterns import (
    MatchAllNode,
    PatternCall,
    forward_of,
    forward_of_reversed,
    op_name,
    reversed_of,
)
from fxquant.dict_policy import TORCH_AO
from fxquant.dtype_config import DTypeConfig, DTypeWithConstraints, as_dtype_config
from fxquant.errors import (
    ConfigError,
    ConfigWarning,
    Diagnostics,
    LegacyFormWarning,
    UnknownKeyError,
)

OWN_SCALE = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
SHARED = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT


class Fused(nn.Module):
    pass


def fuser(is_qat: bool, conv: Any, relu: Any) -> Any:
    return conv


def getter(match: Any) -> Any:
    return match


STATIC = DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float32)
BOUNDED = DTypeWithConstraints(
    dtype=torch.qint8,
    quant_min_lower_bound=-127,
    quant_max_upper_bound=127,
    scale_min_lower_bound=2**-12,
    scale_max_upper_bound=1.0,
    scale_exact_match=0.5,
    zero_point_exact_match=0,
)


def _full(cls: Any, dtype_config: Any, share: Any) -> Any:
    """Every setter once, by the names of its parameters."""
    return (
        cls()
        .set_pattern(pattern=(nn.Conv2d, nn.ReLU))
        .set_observation_type(observation_type=share)
        .add_dtype_config(dtype_config=dtype_config)
        .set_root_module(root_module=nn.Conv2d)
        .set_qat_module(qat_module=nn.Conv3d)
        .set_reference_quantized_module(reference_quantized_module=nn.Conv1d)
        .set_fused_module(fused_module=Fused)
        .set_fuser_method(fuser_method=fuser)
        ._set_root_node_getter(root_node_getter=getter)
        ._set_extra_inputs_getter(extra_inputs_getter=getter)
        ._set_num_tensor_args_to_observation_type(num_tensor_args_to_observation_type={1: share})
        ._set_input_type_to_index(input_type_to_index={"weight": 1})
    )


def _own() -> BackendPatternConfig:
    made: BackendPatternConfig = _full(BackendPatternConfig, STATIC, SHARED)
    return made


# -- dtype configs --------------------------------------------------------------------------------


def test_dtypes_come_with_and_without_constraints() -> None:
    config = DTypeConfig(BOUNDED, torch.quint8, None, torch.float32, False)
    assert (config.input_dtype, config.output_dtype) == (torch.qint8, torch.quint8)
    assert config.weight_dtype is None
    assert config.input_dtype_with_constraints == BOUNDED
    assert config.output_dtype_with_constraints == DTypeWithConstraints(torch.quint8)
    assert config.weight_dtype_with_constraints == DTypeWithConstraints()
    assert (config.bias_dtype, config.is_dynamic) == (torch.float32, False)


def test_the_dict_of_a_dtype_config_reads_back() -> None:
    config = DTypeConfig(BOUNDED, torch.quint8, bias_dtype=torch.float32, is_dynamic=True)
    assert config.to_dict() == {
        "input_dtype": BOUNDED,
        "output_dtype": DTypeWithConstraints(torch.quint8),
        "bias_dtype": torch.float32,
        "is_dynamic": True,
    }
    assert DTypeConfig.from_dict(config.to_dict()) == config
    assert DTypeConfig().to_dict() == {}
    assert hash(config) == hash(DTypeConfig.from_dict(config.to_dict()))


def test_the_representation_leaves_out_what_is_unset() -> None:
    assert repr(STATIC) == (
        "DTypeConfig(input_dtype=torch.quint8, output_dtype=torch.quint8,"
        " weight_dtype=torch.qint8, bias_dtype=torch.float32)"
    )
    shown = repr(DTypeConfig(DTypeWithConstraints(torch.quint8, 0, 127)))
    assert shown == (
        "DTypeConfig(input_dtype=DTypeWithConstraints(dtype=torch.quint8,"
        " quant_min_lower_bound=0, quant_max_upper_bound=127))"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DTypeConfig(3), "Expected input_dtype to be a torch.dtype or DTypeWithCons"),  # type: ignore[arg-type]
        (lambda: DTypeConfig(None, "quint8"), "Expected output_dtype"),  # type: ignore[arg-type]
        (lambda: DTypeConfig(bias_dtype=1), "Expected bias_dtype"),  # type: ignore[arg-type]
        (lambda: DTypeWithConstraints("quint8"), "needs a torch.dtype"),  # type: ignore[arg-type]
        (lambda: DTypeWithConstraints(torch.quint8, 5, 4), "is above quant_max_upper_bound=4"),
        (lambda: DTypeWithConstraints(None, None, None, 2, 1), "is above scale_max_upper_bound"),
        (lambda: DTypeConfig.from_dict([1]), "needs a dict"),  # type: ignore[arg-type]
    ],
)
def test_wrong_dtypes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# -- patterns -------------------------------------------------------------------------------------

PATTERNS: list[tuple[Any, Any, str]] = [
    (nn.Conv2d, nn.Conv2d, "Conv2d"),
    ("sigmoid", "sigmoid", ".sigmoid()"),
    ((nn.Conv2d, F.relu), (F.relu, nn.Conv2d), "Conv2d -> F.relu"),
    (
        (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        (nn.ReLU, (nn.BatchNorm2d, nn.Conv2d)),
        "Conv2d -> BatchNorm2d -> ReLU",
    ),
]


@pytest.mark.parametrize(("forward", "backward", "shown"), PATTERNS)
def test_both_orders_give_one_tree(forward: Any, backward: Any, shown: str) -> None:
    assert forward_of(forward) == forward_of_reversed(backward)
    assert reversed_of(forward) == backward
    assert str(forward_of(forward)) == shown
    types = forward if isinstance(forward, tuple) else (forward,)
    assert forward_of(forward).types == types


def test_operands_of_a_reversed_pattern_keep_their_places() -> None:
    pattern = (nn.ReLU, (torch.add, MatchAllNode, (nn.BatchNorm2d, nn.Conv2d)))
    made = forward_of_reversed(pattern)
    assert made.types == (nn.Conv2d, nn.BatchNorm2d, torch.add, nn.ReLU)
    assert str(made) == "Conv2d -> BatchNorm2d -> torch.add(*, .) -> ReLU"
    assert made.operands[0] is not None
    assert made.operands[0].operands[0] is None
    other = forward_of_reversed((operator.add, nn.Conv2d, MatchAllNode))
    assert str(other) == "Conv2d -> operator.add(., *)"


def test_two_branches_are_a_tree_and_no_chain() -> None:
    made = forward_of_reversed((torch.add, nn.Conv2d, (nn.ReLU, nn.Linear)))
    assert (made.chain, made.types) == (None, None)
    assert PatternCall(nn.ReLU, (made,)).types is None
    assert str(made) == "torch.add(Conv2d, Linear -> ReLU)"


def test_ops_are_named_as_people_write_them() -> None:
    found = [op_name(op) for op in (F.max_pool2d, torch.cat, operator.mul, F.relu, "view", nn.ReLU)]
    assert found == ["F.max_pool2d", "torch.cat", "operator.mul", "F.relu", ".view()", "ReLU"]


@pytest.mark.parametrize(
    "pattern",
    [(nn.Linear,), (nn.Linear, nn.ReLU, nn.ReLU, nn.ReLU), 3, nn.ReLU(), (nn.ReLU, 3), ()],
)
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected a tuple with 2 or 3|a pattern is a module"):
        BackendPatternConfig(pattern)


def test_an_empty_reversed_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty tuple"):
        BackendPatternConfig()._set_pattern_complex_format(())


# -- pattern configs ------------------------------------------------------------------------------


def test_the_dict_of_a_pattern_config_has_the_known_keys() -> None:
    assert _own().to_dict() == {
        "pattern": (nn.Conv2d, nn.ReLU),
        "observation_type": SHARED,
        "dtype_configs": [STATIC.to_dict()],
        "root_module": nn.Conv2d,
        "qat_module": nn.Conv3d,
        "reference_quantized_module_for_root": nn.Conv1d,
        "fused_module": Fused,
        "fuser_method": fuser,
        "root_node_getter": getter,
        "extra_inputs_getter": getter,
        "num_tensor_args_to_observation_type": {1: SHARED},
        "input_type_to_index": {"weight": 1},
    }
    assert BackendPatternConfig.from_dict(_own().to_dict()) == _own()


def test_the_documented_key_of_the_reference_module_is_read_too() -> None:
    read = BackendPatternConfig.from_dict(
        {"pattern": nn.Linear, "reference_quantized_module": Fused}
    )
    assert read.reference_quantized_module is Fused


def test_a_reversed_pattern_stays_as_it_is_and_reads_forward() -> None:
    pattern = (nn.ReLU, (torch.add, nn.Conv2d, MatchAllNode))
    config = BackendPatternConfig()._set_pattern_complex_format(pattern)
    assert config.pattern is None
    assert config.key == pattern
    assert config.forward.types == (nn.Conv2d, torch.add, nn.ReLU)
    assert config.to_dict()["pattern_complex_format"] == pattern
    assert BackendPatternConfig.from_dict(config.to_dict()) == config


def test_a_pattern_is_set_one_way_only() -> None:
    message = "Only one of 'pattern' or 'pattern_complex_format' can be set"
    with pytest.raises(ConfigError, match=message):
        BackendPatternConfig(nn.Linear)._set_pattern_complex_format((nn.ReLU, nn.Linear))
    with pytest.raises(ConfigError, match=message):
        BackendPatternConfig()._set_pattern_complex_format(nn.ReLU).set_pattern(nn.Linear)
    with pytest.raises(ConfigError, match="Either 'pattern' or 'pattern_complex_format' must be"):
        BackendConfig().set_backend_pattern_config(BackendPatternConfig())


def test_dtype_configs_are_replaced_or_added() -> None:
    given = [STATIC, DTypeConfig(torch.float16)]
    config = BackendPatternConfig(nn.Linear).add_dtype_config(DTypeConfig())
    config.set_dtype_configs(dtype_configs=given)
    assert config.dtype_configs == given
    config.add_dtype_config(STATIC)
    assert len(given) == 2  # the caller's list is not ours


CHANGES: dict[str, Callable[[BackendPatternConfig], object]] = {
    "observation": lambda c: c.set_observation_type(OWN_SCALE),
    "dtypes": lambda c: c.add_dtype_config(STATIC),
    "root": lambda c: c.set_root_module(nn.Linear),
    "qat": lambda c: c.set_qat_module(nn.Linear),
    "reference": lambda c: c.set_reference_quantized_module(nn.Linear),
    "fused": lambda c: c.set_fused_module(nn.Linear),
    "fuser": lambda c: c.set_fuser_method(getter),
    "root getter": lambda c: c._set_root_node_getter(fuser),
    "inputs getter": lambda c: c._set_extra_inputs_getter(fuser),
    "counts": lambda c: c._set_num_tensor_args_to_observation_type({}),
    "indexes": lambda c: c._set_input_type_to_index({}),
    "pattern": lambda c: c.set_pattern(nn.Linear),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equality_sees_every_attribute(change: str) -> None:
    config = _own()
    assert config == _own()
    CHANGES[change](config)
    assert config != _own()


def test_representations_are_readable() -> None:
    assert repr(BackendPatternConfig()) == (
        "BackendPatternConfig(no pattern, OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)"
    )
    config = BackendConfig("mine").set_backend_pattern_config(_own())
    assert repr(config) == (
        "BackendConfig('mine'\n  BackendPatternConfig(Conv2d -> ReLU,"
        f" OUTPUT_SHARE_OBSERVER_WITH_INPUT, {STATIC!r}, root_module=Conv2d, qat_module=Conv3d,"
        " reference_quantized_module=Conv1d, fused_module=Fused))"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: c.set_observation_type("shared"), "needs one of OUTPUT_USE_DIFFERENT"),
        (lambda c: c.add_dtype_config(torch.quint8), "Expected a list of DTypeConfigs"),
        (lambda c: c.set_dtype_configs([3]), "Expected a list of DTypeConfigs in set_dtype_conf"),
        (lambda c: c.set_root_module(nn.Linear(1, 1)), "root_module needs a class"),
        (lambda c: c.set_fuser_method("fuse"), "fuser_method needs a function"),
    ],
)
def test_wrong_values_are_named(make: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(BackendPatternConfig(nn.Linear))


# -- backend configs ------------------------------------------------------------------------------


def test_a_later_config_replaces_one_for_the_same_pattern() -> None:
    config = BackendConfig("a").set_name("b")
    config.set_backend_pattern_configs([BackendPatternConfig(nn.Linear), _own()])
    later = BackendPatternConfig(nn.Linear).add_dtype_config(STATIC)
    config.set_backend_pattern_config(later)
    assert config.configs == [later, _own()]
    assert config.configs is not config.configs
    assert config._pattern_complex_format_to_config == {
        nn.Linear: later,
        (nn.ReLU, nn.Conv2d): _own(),
    }
    assert config == BackendConfig.from_dict(config.to_dict())
    assert config != BackendConfig("c").set_backend_pattern_configs(config.configs)


def test_the_dict_of_a_backend_config() -> None:
    assert BackendConfig("n").to_dict() == {"name": "n", "configs": []}
    assert BackendConfig.from_dict({}) == BackendConfig()
    objects = {"name": "n", "configs": [_own(), {"pattern": nn.Linear}]}
    assert len(BackendConfig.from_dict(objects).configs) == 2
    with pytest.raises(ConfigError, match="to be a dictionary, got 3"):
        BackendConfig.from_dict({"configs": [3]})
    with pytest.raises(ConfigError, match="needs a list"):
        BackendConfig.from_dict({"configs": 3})


@pytest.mark.parametrize(
    "given",
    [
        {"name": "n", "config": []},
        {"configs": [{"pattern": nn.Linear, "fuser_metod": 1}]},
        {"configs": [{"pattern": nn.Linear, "dtype_configs": [{"input": torch.quint8}]}]},
    ],
)
def test_unknown_keys_at_every_depth(given: dict[str, Any]) -> None:
    with pytest.raises(UnknownKeyError, match="did you mean"):
        BackendConfig.from_dict(given)
    with pytest.raises(UnknownKeyError):
        as_backend_config(given)
    diagnostics = Diagnostics(silent=True)
    as_backend_config(given, TORCH_AO, diagnostics)
    kinds = [category for category, _ in diagnostics.messages]
    assert kinds == [LegacyFormWarning, ConfigWarning]


def test_reading_what_is_none() -> None:
    assert as_backend_config(None) is None
    config = BackendConfig("x")
    assert as_backend_config(config) is config
    for value in (3, "native", [1], BackendConfig):
        with pytest.raises(ConfigError, match="needs a BackendConfig or a dict"):
            as_backend_config(value)
    with pytest.raises(ConfigError, match="expected a BackendPatternConfig"):
        config.set_backend_pattern_config(nn.Linear)


# -- torch.ao's objects ---------------------------------------------------------------------------

BACKENDS = ("native", "fbgemm", "onednn", "qnnpack", "executorch", "tensorrt")


def _theirs(name: str) -> Any:
    import torch.ao.quantization.quantize_fx  # noqa: F401  # without it the next module fails
    from torch.ao.quantization import backend_config

    return getattr(backend_config, f"get_{name}_backend_config")()


def _plain(value: Any) -> Any:
    """What two libraries' values have in common: enums by name, data classes by their fields."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "quant_min_lower_bound"):
        names = DTypeWithConstraints.__dataclass_fields__
        return {name: getattr(value, name) for name in names}
    return getattr(value, "name", value) if type(value).__name__ == "ObservationType" else value


@pytest.mark.peer
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_of_torch_ao_are_read_without_loss(name: str) -> None:
    theirs = _theirs(name)
    read = as_backend_config(theirs)
    assert read is not None
    assert len(read.configs) == len(theirs.configs) > 80
    assert _plain(read.to_dict()) == _plain(theirs.to_dict())
    for config in read.configs:
        assert config.forward.chain is not None
    keys = list(read._pattern_complex_format_to_config)
    assert keys == list(theirs._pattern_complex_format_to_config)


@pytest.mark.peer
@pytest.mark.parametrize("name", BACKENDS)
def test_the_dicts_of_torch_ao_are_read_without_loss(name: str) -> None:
    theirs = _theirs(name)
    with pytest.warns(LegacyFormWarning, match="Passing a backend_config_dict to prepare is dep"):
        read = as_backend_config(theirs.to_dict(), TORCH_AO)
    assert read == as_backend_config(theirs)
    assert BackendConfig.from_dict(theirs.to_dict()) == read


@pytest.mark.peer
def test_the_setters_do_what_those_of_torch_ao_do() -> None:
    from torch.ao.quantization import backend_config as theirs

    dtype_config = theirs.DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float32)
    made = _full(theirs.BackendPatternConfig, dtype_config, theirs.ObservationType(1))
    assert as_backend_pattern_config(made) == _own()
    assert set(vars(_own())) == set(vars(made))
    assert _plain(made.to_dict()) == _plain(_own().to_dict())
    bounded = theirs.DTypeWithConstraints(
        **{name: getattr(BOUNDED, name) for name in DTypeWithConstraints.__dataclass_fields__}
    )
    config = theirs.DTypeConfig(bounded, is_dynamic=False)
    assert as_dtype_config(config, "") == DTypeConfig(BOUNDED, is_dynamic=False)
    assert DTypeConfig(bounded) == DTypeConfig(BOUNDED)


@pytest.mark.peer
def test_observation_types_are_understood() -> None:
    from torch.ao.quantization import backend_config as theirs

    for name in ObservationType.__members__:
        assert as_observation_type(getattr(theirs.ObservationType, name)).name == name
    assert [m.name for m in theirs.ObservationType] == [m.name for m in ObservationType]


@pytest.mark.peer
def test_every_method_of_torch_ao_is_there_with_its_parameters() -> None:
    import inspect

    from torch.ao.quantization import backend_config as theirs

    for cls in (BackendConfig, BackendPatternConfig, DTypeConfig, DTypeWithConstraints):
        their_class = getattr(theirs, cls.__name__)
        wanted = list(inspect.signature(their_class).parameters)
        assert list(inspect.signature(cls).parameters) == wanted
        for name, method in inspect.getmembers(their_class):
            if name.startswith("__"):
                continue
            assert hasattr(cls, name), name
            if callable(method):
                parameters = list(inspect.signature(method).parameters)
                found = list(inspect.signature(getattr(cls, name)).parameters)
                assert found[: len(parameters)] == parameters, name
