"""Which names of torch.ao's FX API move, which stay, and what a move changes: data.

:data:`MOVED` is also the list of what :mod:`fxquant.compat` must export.
"""

from __future__ import annotations

from typing import Final

TARGET: Final = "fxquant.compat"
"""The module that names move to."""

MODULES: Final = frozenset(
    f"torch.{package}{module}"
    for package in ("ao.quantization", "quantization")
    for module in (
        "",
        ".quantize_fx",
        ".qconfig",
        ".qconfig_mapping",
        ".observer",
        ".fake_quantize",
        ".backend_config",
        ".backend_config.backend_config",
        ".backend_config.fbgemm",
        ".backend_config.native",
        ".backend_config.onednn",
        ".backend_config.qnnpack",
        ".fx",
        ".fx.custom_config",
        ".quant_type",
        ".stubs",
        ".utils",
    )
)
"""Modules whose names are looked at."""

EAGER_MODULES: Final = frozenset(
    f"torch.{package}.{module}"
    for package in ("ao.quantization", "quantization")
    for module in ("quantize", "fuse_modules")
)
"""Modules of eager mode; functions of the same names hide them in their package."""

_STEPS: Final = {
    "prepare_fx": "the model is left as it was: no shared modules, no qconfig attributes",
    "prepare_qat_fx": "the model is left as it was: no shared modules, no qconfig attributes",
    "convert_fx": (
        "the prepared model is left as it was and can be converted again; the result calls int8"
        " kernels directly, so tests for torch.ao.nn classes no longer apply"
    ),
    "convert_to_reference_fx": (
        "the prepared model is left as it was; the result holds fxquant's quantize and dequantize"
        " operators, with scales and integers as buffers"
    ),
    "fuse_fx": "the model is left as it was",
}
_CONFIGS: Final = (
    "BackendConfig",
    "BackendPatternConfig",
    "ConvertCustomConfig",
    "DTypeConfig",
    "DTypeWithConstraints",
    "FuseCustomConfig",
    "MatchAllNode",
    "ObservationType",
    "PrepareCustomConfig",
    "QConfig",
    "QConfigMapping",
    "QuantType",
    "get_default_qat_qconfig",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig",
    "get_default_qconfig_mapping",
    "get_fbgemm_backend_config",
    "get_native_backend_config",
    "get_onednn_backend_config",
    "get_qnnpack_backend_config",
)
_QCONFIGS: Final = (
    "default_activation_only_qconfig",
    "default_debug_qconfig",
    "default_dynamic_qat_qconfig",
    "default_dynamic_qconfig",
    "default_embedding_qat_qconfig",
    "default_embedding_qat_qconfig_4bit",
    "default_per_channel_qconfig",
    "default_per_channel_symmetric_qnnpack_qat_qconfig",
    "default_per_channel_symmetric_qnnpack_qconfig",
    "default_qat_qconfig",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_quint8_weight_qconfig",
    "default_reuse_input_qconfig",
    "default_symmetric_qnnpack_qat_qconfig",
    "default_symmetric_qnnpack_qconfig",
    "default_weight_only_qconfig",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "per_channel_dynamic_qconfig",
)
_OBSERVERS: Final = (
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "UniformQuantizationObserverBase",
    "default_affine_fixed_qparams_observer",
    "default_debug_observer",
    "default_dynamic_quant_observer",
    "default_fixed_qparams_range_0to1_observer",
    "default_fixed_qparams_range_neg1to1_observer",
    "default_float_qparams_observer",
    "default_float_qparams_observer_4bit",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_reuse_input_observer",
    "default_symmetric_fixed_qparams_observer",
    "default_weight_observer",
    "get_observer_state_dict",
    "load_observer_state_dict",
    "per_channel_weight_observer_range_neg_127_to_127",
    "weight_observer_range_neg_127_to_127",
)
_FAKE_QUANTIZERS: Final = (
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "default_affine_fixed_qparams_fake_quant",
    "default_dynamic_fake_quant",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_per_channel_weight_fake_quant",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_weight_fake_quant",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
)

_STUBS: Final = ("DeQuantStub", "QuantStub", "QuantWrapper")

MOVED: Final[dict[str, str]] = {
    **dict.fromkeys((*_CONFIGS, *_QCONFIGS, *_OBSERVERS, *_FAKE_QUANTIZERS, *_STUBS), ""),
    **_STEPS,
}
"""Name -> what the move changes; empty where nothing does."""

_EAGER: Final = (
    "eager-mode quantization, which fxquant does not have; use prepare_fx and convert_fx"
)
_OBJECTS: Final = "an object of torch.ao: fxquant.compat takes it as it is"
_INTERNAL: Final = "a helper of torch.ao's own code, with no counterpart"

STAYS: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            "add_quant_dequant",
            "convert",
            "fuse_modules",
            "fuse_modules_qat",
            "prepare",
            "prepare_qat",
            "propagate_qconfig_",
            "quantize",
            "quantize_dynamic",
            "quantize_qat",
            "swap_module",
        ),
        _EAGER,
    ),
    **dict.fromkeys(
        (
            "get_executorch_backend_config",
            "get_tensorrt_backend_config",
        ),
        _OBJECTS,
    ),
    "StandaloneModuleConfigEntry": "made by PrepareCustomConfig.set_standalone_module_name",
    **dict.fromkeys(
        (
            "convert_dynamic_jit",
            "convert_jit",
            "prepare_dynamic_jit",
            "prepare_jit",
            "quantize_dynamic_jit",
            "quantize_jit",
            "script_qconfig",
            "script_qconfig_dict",
        ),
        "quantization of TorchScript graphs; quantize the module first, then torch.jit.script it",
    ),
    **dict.fromkeys(
        ("get_default_qat_qconfig_dict", "get_default_qconfig_dict"),
        "a dict; get_default_qconfig_mapping gives the same rules as a QConfigMapping",
    ),
}
"""Name -> why it is not moved."""

UNKNOWN: Final = _INTERNAL

OLD_KEYWORDS: Final = {
    "prepare_custom_config_dict": "is called prepare_custom_config",
    "convert_custom_config_dict": "is called convert_custom_config",
    "fuse_custom_config_dict": "is called fuse_custom_config",
    "backend_config_dict": "is called backend_config",
    "qconfig_dict": "is called qconfig_mapping",
    "is_reference": "is gone: call convert_to_reference_fx instead",
    "equalization_qconfig_dict": "is an error: call fxquant.equalize before",
    "_equalization_config": "is an error unless empty: call fxquant.equalize before",
}
"""Keyword of a step -> what became of it."""

OTHER_PREFIXES: Final = {
    "torch.ao.nn": "its classes do not occur in converted models, which call operators directly",
    "torch.nn.quantized": "its classes do not occur in converted models",
    "torch.nn.intrinsic": "its classes do not occur in converted models",
    "torch.nn.qat": "its classes do not occur in prepared models",
    "torch.ao.quantization.quantize_pt2e": "quantization of torch.export programs, another API",
    "torch.ao.quantization.quantizer": "quantization of torch.export programs, another API",
    "torch.ao.ns": "compares torch.ao's modules; fxquant.parity compares what fxquant makes",
    "torchvision.models.quantization": (
        "pass quantize=False and give the model to prepare_fx: quantize=True loads eager-mode int8"
        " modules, and fuse_model() is not needed"
    ),
}
"""Module -> what to know where it is imported."""
