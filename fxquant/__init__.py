"""Int8 quantization of PyTorch models on CPUs by rewriting ``torch.fx`` graphs.

::

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), example_inputs=(x,))
    calibrate(prepared, data)
    int8 = convert_fx(prepared)
    print(explain(int8), audit(int8))

Everything public is listed in ``__all__``; the modules say more.
"""

from __future__ import annotations

from fxquant._version import __version__
from fxquant.artifact import load, save
from fxquant.audit import AuditReport, assert_int8, audit
from fxquant.calibration import calibrate
from fxquant.errors import (
    ArtifactError,
    CalibrationError,
    CalibrationWarning,
    CaptureError,
    CaptureWarning,
    ConfigError,
    ConfigWarning,
    CoverageError,
    DataNotFoundError,
    FxQuantError,
    FxQuantWarning,
    GraphError,
    LoweringError,
    LoweringWarning,
    MissingDependencyError,
    MissingExampleInputsError,
    NonFiniteStatisticError,
    NotAGraphModuleError,
    NotPreparedError,
    PassContractError,
    ShapeGuardError,
    SpecError,
    StrictModeError,
    TrainingModeError,
    UnknownKeyError,
    UnmatchedRuleError,
)
from fxquant.explain import Explanation, explain
from fxquant.graph_module import QuantGraphModule
from fxquant.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    ObserverBase,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
    default_histogram_observer,
    default_observer,
    default_per_channel_weight_observer,
    default_weight_observer,
)
from fxquant.op_rows import OpRow, Runs
from fxquant.parity import ParityReport, parity
from fxquant.qconfig import (
    QConfig,
    bfloat16_static_qconfig,
    default_dynamic_qconfig,
    default_per_channel_qconfig,
    default_qconfig,
    default_reuse_input_qconfig,
    float16_dynamic_qconfig,
    float16_static_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    get_default_dynamic_qconfig,
    get_default_qconfig,
    per_channel_dynamic_qconfig,
)
from fxquant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from fxquant.quantize import quantize, quantize_dynamic
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx
from fxquant.range_rules import (
    EntropyRule,
    MinMaxRule,
    MSERule,
    OnnxEntropyRule,
    PercentileRule,
    TorchHistogramRule,
)
from fxquant.specs import QParams, QuantSpec

__all__ = [
    "ArtifactError",
    "AuditReport",
    "CalibrationError",
    "CalibrationWarning",
    "CaptureError",
    "CaptureWarning",
    "ConfigError",
    "ConfigWarning",
    "CoverageError",
    "DataNotFoundError",
    "EntropyRule",
    "Explanation",
    "FixedQParamsObserver",
    "FxQuantError",
    "FxQuantWarning",
    "GraphError",
    "HistogramObserver",
    "LoweringError",
    "LoweringWarning",
    "MSERule",
    "MinMaxObserver",
    "MinMaxRule",
    "MissingDependencyError",
    "MissingExampleInputsError",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NonFiniteStatisticError",
    "NoopObserver",
    "NotAGraphModuleError",
    "NotPreparedError",
    "ObserverBase",
    "OnnxEntropyRule",
    "OpRow",
    "ParityReport",
    "PassContractError",
    "PerChannelHistogramObserver",
    "PerChannelMinMaxObserver",
    "PercentileRule",
    "PlaceholderObserver",
    "QConfig",
    "QConfigMapping",
    "QParams",
    "QuantGraphModule",
    "QuantSpec",
    "RecordingObserver",
    "ReuseInputObserver",
    "Runs",
    "ShapeGuardError",
    "SpecError",
    "StrictModeError",
    "TorchHistogramRule",
    "TrainingModeError",
    "UnknownKeyError",
    "UnmatchedRuleError",
    "__version__",
    "assert_int8",
    "audit",
    "bfloat16_static_qconfig",
    "calibrate",
    "convert_fx",
    "convert_to_reference_fx",
    "default_dynamic_qconfig",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_qconfig",
    "default_per_channel_weight_observer",
    "default_qconfig",
    "default_reuse_input_qconfig",
    "default_weight_observer",
    "explain",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "fuse_fx",
    "get_default_dynamic_qconfig",
    "get_default_qconfig",
    "get_default_qconfig_mapping",
    "load",
    "parity",
    "per_channel_dynamic_qconfig",
    "prepare_fx",
    "quantize",
    "quantize_dynamic",
    "save",
]
