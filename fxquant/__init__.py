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
from fxquant.comparison.compare import compare
from fxquant.comparison.report import CompareReport, CompareRow, Fault
from fxquant.diff import DiffReport, Gate, diff
from fxquant.equalize import equalize
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
    NativeUnavailableError,
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
from fxquant.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_table import KernelTable
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
from fxquant.optimize import OptimizedModel, optimize
from fxquant.parity import ParityReport, parity
from fxquant.planner.budget import Budget
from fxquant.planner.plan import Plan
from fxquant.planner.planner import plan_mixed_precision
from fxquant.qat_modules import (
    freeze_bn_stats,
    update_bn_stats,
)
from fxquant.qconfig import (
    QConfig,
    bfloat16_static_qconfig,
    default_dynamic_qat_qconfig,
    default_dynamic_qconfig,
    default_embedding_qat_qconfig,
    default_embedding_qat_qconfig_4bit,
    default_per_channel_qat_qconfig,
    default_per_channel_qconfig,
    default_qat_qconfig,
    default_qat_qconfig_v2,
    default_qconfig,
    default_reuse_input_qconfig,
    float16_dynamic_qconfig,
    float16_static_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    get_default_dynamic_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
    per_channel_dynamic_qconfig,
)
from fxquant.qconfig_mapping import (
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from fxquant.quantize import quantize, quantize_dynamic
from fxquant.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    fuse_fx,
    prepare_fx,
    prepare_qat_fx,
)
from fxquant.range_rules import (
    EntropyRule,
    MinMaxRule,
    MSERule,
    OnnxEntropyRule,
    PercentileRule,
    TorchHistogramRule,
)
from fxquant.run_record import OpRecord, RunRecord, record_run
from fxquant.sensitivity import SensitivityReport, analyze_sensitivity
from fxquant.specs import QParams, QuantSpec
from fxquant.target_info import TargetInfo, target_info

__all__ = [
    "ArtifactError",
    "AuditReport",
    "Budget",
    "CalibrationError",
    "CalibrationWarning",
    "CaptureError",
    "CaptureWarning",
    "CompareReport",
    "CompareRow",
    "ConfigError",
    "ConfigWarning",
    "CoverageError",
    "DataNotFoundError",
    "DiffReport",
    "EntropyRule",
    "Explanation",
    "FakeQuantize",
    "FakeQuantizeBase",
    "Fault",
    "FixedQParamsFakeQuantize",
    "FixedQParamsObserver",
    "FusedMovingAvgObsFakeQuantize",
    "FxQuantError",
    "FxQuantWarning",
    "Gate",
    "GraphError",
    "HistogramObserver",
    "KernelTable",
    "LoweringError",
    "LoweringWarning",
    "MSERule",
    "MinMaxObserver",
    "MinMaxRule",
    "MissingDependencyError",
    "MissingExampleInputsError",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NativeUnavailableError",
    "NonFiniteStatisticError",
    "NoopObserver",
    "NotAGraphModuleError",
    "NotPreparedError",
    "ObserverBase",
    "OnnxEntropyRule",
    "OpRecord",
    "OpRow",
    "OptimizedModel",
    "ParityReport",
    "PassContractError",
    "PerChannelHistogramObserver",
    "PerChannelMinMaxObserver",
    "PercentileRule",
    "PlaceholderObserver",
    "Plan",
    "QConfig",
    "QConfigMapping",
    "QParams",
    "QuantGraphModule",
    "QuantSpec",
    "RecordingObserver",
    "ReuseInputObserver",
    "RunRecord",
    "Runs",
    "SensitivityReport",
    "ShapeGuardError",
    "SpecError",
    "StrictModeError",
    "TargetInfo",
    "TorchHistogramRule",
    "TrainingModeError",
    "UnknownKeyError",
    "UnmatchedRuleError",
    "__version__",
    "analyze_sensitivity",
    "assert_int8",
    "audit",
    "bfloat16_static_qconfig",
    "calibrate",
    "compare",
    "convert_fx",
    "convert_to_reference_fx",
    "default_dynamic_qat_qconfig",
    "default_dynamic_qconfig",
    "default_embedding_qat_qconfig",
    "default_embedding_qat_qconfig_4bit",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_qat_qconfig",
    "default_per_channel_qconfig",
    "default_per_channel_weight_observer",
    "default_qat_qconfig",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_reuse_input_qconfig",
    "default_weight_observer",
    "diff",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "equalize",
    "explain",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "freeze_bn_stats",
    "fuse_fx",
    "get_default_dynamic_qconfig",
    "get_default_qat_qconfig",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig",
    "get_default_qconfig_mapping",
    "load",
    "optimize",
    "parity",
    "per_channel_dynamic_qconfig",
    "plan_mixed_precision",
    "prepare_fx",
    "prepare_qat_fx",
    "quantize",
    "quantize_dynamic",
    "record_run",
    "save",
    "target_info",
    "update_bn_stats",
]
