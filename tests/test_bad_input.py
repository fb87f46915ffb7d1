"""What users get wrong: each case with the severity of the design, naming value, place and cure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.calibration import calibrate
from fxquant.errors import (
    CalibrationWarning,
    CaptureError,
    CaptureWarning,
    ConfigError,
    ConfigWarning,
    FxQuantError,
    FxQuantWarning,
    MissingExampleInputsError,
    NonFiniteStatisticError,
    NotAGraphModuleError,
    NotPreparedError,
    StrictModeError,
    TrainingModeError,
    UnknownKeyError,
    UnmatchedRuleError,
)
from fxquant.observers import MinMaxObserver, PerChannelMinMaxObserver
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def prepared(**options: Any) -> Any:
    return prepare_fx(Net().eval(), {"": A}, (IMAGES,), **options)


def calibrated() -> Any:
    gm = prepared()
    gm(IMAGES)
    return gm


def message(error: type[BaseException], call: Callable[[], object]) -> str:
    """What ``call`` says when it raises exactly ``error``, which is of fxquant's tree."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, FxQuantError)
    return str(caught.value)


def warning(category: type[Warning], call: Callable[[], object]) -> str:
    """What ``call`` warns of, once."""
    with pytest.warns(FxQuantWarning) as seen:
        call()
    assert [w.category for w in seen] == [category]
    assert seen[0].filename == __file__  # the line of the caller, not one inside fxquant
    return str(seen[0].message)


# -- qconfig mappings -----------------------------------------------------------------------------


def prepare_with(mapping: Any, **options: Any) -> Callable[[], object]:
    return lambda: prepare_fx(Net().eval(), mapping, (IMAGES,), **options)


def test_a_rule_that_names_a_missing_layer() -> None:
    text = message(UnmatchedRuleError, prepare_with({"": A, "head": None}))
    assert text == (
        "module_name rule 'head' matches no module of the model. Correct the rule or remove it;"
        " nothing was quantized"
    )


def test_a_typo_in_a_rule() -> None:
    text = message(UnmatchedRuleError, prepare_with({"": A, "layer2.O": None}))
    assert text.startswith(
        "module_name rule 'layer2.O' matches no module of the model; did you mean"
    )
    assert "'layer2.0'" in text


def test_a_typo_in_a_key_of_a_dict() -> None:
    text = message(UnknownKeyError, prepare_with({"": A, "object_types": [(nn.Linear, None)]}))
    assert "unknown key 'object_types'" in text
    assert "did you mean 'object_type'" in text


def test_a_key_that_is_none() -> None:
    text = message(ConfigError, prepare_with({3: A}))
    assert "key 3 is no module path, type or function" in text


@pytest.mark.parametrize("value", ["int8", MinMaxObserver, torch.int8, 8])
def test_a_value_that_is_no_qconfig(value: Any) -> None:
    text = message(ConfigError, prepare_with({"fc": value}))
    assert "module_name 'fc' needs a QConfig or None, got" in text


@pytest.mark.parametrize("mapping", ["x86", 3, [A]])
def test_a_mapping_that_is_none(mapping: Any) -> None:
    text = message(ConfigError, prepare_with(mapping))
    assert "qconfig_mapping needs a QConfigMapping, a dict or a QConfig, got" in text
    assert repr(mapping) in text


def test_a_regex_that_is_none() -> None:
    text = message(ConfigError, prepare_with({"module_name_regex": [("layer(", A)]}))
    assert "module_name_regex 'layer(' is no regular expression" in text


def test_a_dtype_that_the_target_lacks() -> None:
    signed = QConfig(MinMaxObserver.with_args(dtype=torch.int8), WEIGHT)
    text = warning(ConfigWarning, prepare_with({"": A, "fc": signed}))
    assert text == (
        "'fc' (linear) stays in FP32: activation int8 affine -128..127 is not served (possible:"
        " uint8) by target 'x86'; its qconfig comes from module_name 'fc'. Choose a spec that the"
        " target has, or set None there"
    )


def test_a_dtype_that_does_not_exist() -> None:
    text = message(ConfigError, lambda: QConfig("uint8", WEIGHT))
    assert text == "QConfig needs an observer class or factory as activation, got 'uint8'"


def test_an_observer_instead_of_a_class() -> None:
    text = message(ConfigError, lambda: QConfig(MinMaxObserver(), WEIGHT))
    assert "please pass observer class instead" in text


def test_a_type_that_matches_nothing() -> None:
    mapping = QConfigMapping().set_global(A).set_object_type(nn.Conv3d, A)
    assert "object_type rule 'Conv3d' matches no op of the model" in warning(
        ConfigWarning, prepare_with(mapping)
    )


def test_a_target_that_does_not_exist() -> None:
    text = message(ConfigError, lambda: prepared(target="x68"))
    assert "target 'x68' is not supported; known are" in text
    assert "did you mean 'x86'" in text


def test_a_backend_that_does_not_exist() -> None:
    with pytest.raises(AssertionError, match="not supported"):
        get_default_qconfig_mapping("no such")


# -- example inputs -------------------------------------------------------------------------------


def test_no_example_inputs() -> None:
    text = message(MissingExampleInputsError, lambda: prepare_fx(Net().eval(), {"": A}))
    assert issubclass(MissingExampleInputsError, TypeError)
    assert "prepare_fx() misses the argument example_inputs" in text
    assert "(torch.randn(1, 3, 224, 224),)" in text
    assert "Pass None to go without shapes" in text


def test_example_inputs_that_fail() -> None:
    text = warning(
        CaptureWarning, lambda: prepare_fx(Net().eval(), {"": A}, (torch.randn(1, 5, 8, 8),))
    )
    assert "float32[1, 5, 8, 8]" in text
    assert "at node 'layer1_0' (call_module layer1.0" in text
    assert "expected input[1, 5, 8, 8] to have 3 channels" in text
    assert "pass example inputs that the model accepts" in text


def test_example_inputs_that_fail_do_not_stop_the_quantization() -> None:
    with pytest.warns(CaptureWarning):
        gm = prepare_fx(Net().eval(), {"": A}, (torch.randn(1, 5, 8, 8),))
    gm(IMAGES)
    assert convert_fx(gm)(IMAGES).shape == (2, 2)


# -- models ---------------------------------------------------------------------------------------


def test_training_mode() -> None:
    for step in (lambda m: prepare_fx(m, {"": A}, (IMAGES,)), fuse_fx):
        text = message(TrainingModeError, lambda step=step: step(Net().train()))
        assert text.startswith("Fusion only for eval! 'layer1_1' is in training mode")
        assert "model.eval()" in text
    assert issubclass(TrainingModeError, AssertionError)


def test_training_mode_of_one_batch_norm() -> None:
    model = Net().eval()
    model.layer1[1].train()
    assert "'layer1_1'" in message(TrainingModeError, lambda: fuse_fx(model))


@pytest.mark.parametrize("model", ["resnet18", None, torch.relu, Net])
def test_what_is_no_module(model: Any) -> None:
    for step in (lambda m: prepare_fx(m, {"": A}, (IMAGES,)), fuse_fx):
        text = message(CaptureError, lambda step=step: step(model))
        assert f"needs a torch.nn.Module, got {type(model).__name__}" in text


def test_preparing_twice() -> None:
    gm = calibrated()
    for given, stage in ((gm, "prepared"), (convert_fx(gm), "lowered")):
        text = message(ConfigError, lambda given=given: prepare_fx(given, {"": A}, (IMAGES,)))
        assert f"prepare_fx got a model that is {stage} already; pass the float model" in text
        text = message(ConfigError, lambda given=given: fuse_fx(given))
        assert f"fuse_fx got a model that is {stage} already" in text


@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_converting_what_is_no_graph_module(convert: Callable[[Any], Any]) -> None:
    text = message(NotAGraphModuleError, lambda: convert(Net()))
    assert issubclass(NotAGraphModuleError, ValueError)
    assert text.startswith(
        f"input model must be a GraphModule, Got type:{Net} Please make sure to"
        " follow the tutorials."
    )
    assert f"{convert.__name__} takes what prepare_fx returned" in text


@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_converting_what_is_not_prepared(convert: Callable[[Any], Any]) -> None:
    gm = calibrated()
    assert issubclass(NotPreparedError, AssertionError)
    for given, why in (
        (fx.symbolic_trace(Net()), "was not made by fxquant"),
        (fuse_fx(Net().eval()), "is fused"),
        (convert_fx(gm), "is lowered"),
        (convert_to_reference_fx(gm), "is reference"),
    ):
        text = message(NotPreparedError, lambda given=given: convert(given))
        assert text.startswith(
            f"incoming model must be produced by prepare_fx; this GraphModule {why}."
        )
        assert "Call prepare_fx(model, qconfig_mapping, example_inputs), calibrate, then" in text


# -- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_calibration_that_never_ran(convert: Callable[[Any], Any]) -> None:
    gm = prepared()
    text = warning(CalibrationWarning, lambda: convert(gm))
    assert "must run observer before calling calculate_qparams. Returning default values." in text
    assert "'x'" in text
    assert "Run calibrate(prepared, data) before convert_fx" in text
    with pytest.warns(CalibrationWarning):
        assert convert(gm)(IMAGES).shape == (2, 2)  # it converts all the same


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("run", [lambda gm, x: gm(x), lambda gm, x: calibrate(gm, [x])])
def test_calibration_data_that_are_not_finite(
    run: Callable[[Any, Tensor], Any], value: float
) -> None:
    x = IMAGES.clone()
    x[0, 0, 0, 0] = value
    gm = prepared()
    text = message(NonFiniteStatisticError, lambda: run(gm, x))
    assert "activation_post_process_0 (output of 'x')" in text
    assert ("NaN" if value != value else "Inf") in text


def test_a_weight_that_is_not_finite() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    text = message(NonFiniteStatisticError, lambda: prepare_fx(model, {"": A}, (IMAGES,)))
    assert "the weight 'fc.weight' of 'fc' holds NaN or Inf" in text
    assert "Check the checkpoint" in text


def test_a_shape_that_calibration_did_not_see() -> None:
    converted = convert_fx(calibrated())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((1, 3, 8, 8), (5, 3, 12, 7), (2, 3, 31, 32)):
            assert converted(torch.randn(shape)).shape == (shape[0], 2)


# -- strict ---------------------------------------------------------------------------------------


def unmatched_type(*, strict: bool) -> object:
    mapping = QConfigMapping().set_global(A).set_object_type(nn.Conv3d, A)
    return prepare_fx(Net().eval(), mapping, (IMAGES,), strict=strict)


def unserved(*, strict: bool) -> object:
    signed = QConfig(MinMaxObserver.with_args(dtype=torch.int8), WEIGHT)
    return prepare_fx(Net().eval(), {"": signed}, (IMAGES,), strict=strict)


def failing_examples(*, strict: bool) -> object:
    return prepare_fx(Net().eval(), {"": A}, (torch.ones(1),), strict=strict)


def uncalibrated(*, strict: bool) -> object:
    return convert_fx(prepared(), strict=strict)


def uncalibrated_reference(*, strict: bool) -> object:
    return convert_to_reference_fx(prepared(), strict=strict)


class Island(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def island(*, strict: bool) -> object:
    return prepare_fx(nn.Sequential(Island()).eval(), {"": A}, (IMAGES,), strict=strict)


def fused_island(*, strict: bool) -> object:
    return fuse_fx(nn.Sequential(Island()).eval(), strict=strict)


def float64(*, strict: bool) -> object:
    model = nn.Sequential(nn.Linear(2, 2)).double().eval()
    return prepare_fx(model, {"": A}, (torch.ones(1, 2).double(),), strict=strict)


WARNINGS = [
    unmatched_type,
    unserved,
    failing_examples,
    uncalibrated,
    uncalibrated_reference,
    island,
    fused_island,
    float64,
]


@pytest.mark.parametrize("case", WARNINGS, ids=lambda f: f.__name__)
def test_strict_turns_every_warning_into_an_error(case: Callable[..., object]) -> None:
    with pytest.warns(FxQuantWarning) as seen:
        case(strict=False)
    messages = [str(w.message) for w in seen]
    assert len(set(messages)) == len(messages)  # each once
    with pytest.raises(StrictModeError) as caught:
        case(strict=True)
    assert str(caught.value) == f"{messages[0]} (raised because strict=True)"


def test_strict_is_silent_where_nothing_is_wrong() -> None:
    gm = prepare_fx(Net().eval(), None, (IMAGES,), strict=True)
    gm(IMAGES)
    convert_fx(gm, strict=True)


def test_one_switch_silences_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FxQuantWarning)
        for case in WARNINGS:
            case(strict=False)
