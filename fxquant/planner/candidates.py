"""The precisions that a layer may be given, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch

from fxquant.errors import ConfigError, did_you_mean
from fxquant.observers import HistogramObserver, MinMaxObserver, PartialFactory
from fxquant.planner.problem import FLOAT
from fxquant.qconfig import (
    QConfig,
    as_qconfig,
    bfloat16_static_qconfig,
    float16_dynamic_qconfig,
    float16_static_qconfig,
    get_default_dynamic_qconfig,
    get_default_qconfig,
    spec_of,
)
from fxquant.range_rules import EntropyRule, MSERule, PercentileRule, RangeRule
from fxquant.sensitivity.network import FP32, INT8, Precision

INTEGERS: Final = "int8"
"""The representation that int8 layers hand to each other."""

DEFAULT: Final = (FP32, INT8)


def _with_rule(rule: RangeRule) -> Callable[[QConfig], QConfig]:
    def changed(qconfig: QConfig) -> QConfig:
        return _with_activation(qconfig, HistogramObserver.with_args(rule=rule))

    return changed


def _with_minmax(qconfig: QConfig) -> QConfig:
    return _with_activation(qconfig, MinMaxObserver.with_args())


def _with_activation(qconfig: QConfig, observer: PartialFactory) -> QConfig:
    """``qconfig`` with another observer of the same integers."""
    found = spec_of(qconfig.activation)
    if found is None or found.spec is None or found.spec.is_dynamic or found.spec.is_float:
        return qconfig
    spec = found.spec
    arguments = {
        "dtype": spec.dtype,
        "qscheme": spec.qscheme,
        "quant_min": spec.quant_min,
        "quant_max": spec.quant_max,
    }
    return QConfig(activation=observer.with_args(**arguments), weight=qconfig.weight)


def _with_channels(qconfig: QConfig) -> QConfig:
    return QConfig(activation=qconfig.activation, weight=get_default_qconfig("x86").weight)


CANDIDATES: Final[Mapping[str, Precision]] = {
    "bf16": bfloat16_static_qconfig,
    "fp16": float16_static_qconfig,
    "int8-dynamic": get_default_dynamic_qconfig(),
    "weight-only": float16_dynamic_qconfig,
    "int8-per-channel": _with_channels,
    "int8-minmax": _with_minmax,
    "int8-percentile": _with_rule(PercentileRule(0.9999)),
    "int8-mse": _with_rule(MSERule()),
    "int8-entropy": _with_rule(EntropyRule()),
}
"""Beside ``fp32`` and ``int8`` (what the mapping says): half precision; int8 weights with
activations quantized at run time; float16 weights and FP32 sums; int8 with weights of one scale a
channel; and int8 with another rule for the range of what the layer reads."""

_HALF: Final = (torch.bfloat16, torch.float16)


def precisions_of(
    candidates: Iterable[str] | Mapping[str, Precision],
) -> dict[str, Precision]:
    """The candidates by name, ``fp32`` first; ``int8`` stands for the mapping.

    Args:
        candidates: names of :data:`CANDIDATES`, ``"fp32"`` and ``"int8"``, or a dict from names of
            the user's to qconfigs; a known name may have the value ``None`` there.

    Raises:
        ConfigError: a name is not known, or comes twice, or there are fewer than two.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise ConfigError(
            f"candidates is a list of names or a dict from names to qconfigs, got {candidates!r}"
        )
    given = dict(candidates) if isinstance(candidates, Mapping) else None
    names = list(candidates)
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"candidates needs two different names or more, got {names}")
    found: dict[str, Precision] = {}
    for name in sorted(names, key=lambda n: n != FP32):
        value = given[name] if given is not None else None
        if value is not None and name in (FP32, INT8, *CANDIDATES):
            raise ConfigError(f"candidate {name!r} has its meaning already; call yours otherwise")
        if value is not None:
            found[name] = value if callable(value) else as_qconfig(value, f"candidate {name!r}")
        elif name in (FP32, INT8):
            found[name] = None
        elif name in CANDIDATES:
            found[name] = CANDIDATES[name]
        else:
            known = (FP32, INT8, *CANDIDATES)
            raise ConfigError(
                f"there is no candidate {name!r}{did_you_mean(str(name), known)}; known are"
                f" {', '.join(known)}; for your own pass a dict {{name: qconfig}}"
            )
    return found


def representation_of(qconfig: QConfig | None) -> str:
    """How layers of a qconfig hand tensors to each other: float, int8, bfloat16 or float16."""
    found = None if qconfig is None else spec_of(qconfig.activation)
    if found is None or found.spec is None or found.spec.is_dynamic:
        return FLOAT
    if found.spec.dtype in _HALF:
        return str(found.spec.dtype).removeprefix("torch.")
    return FLOAT if found.spec.is_float else INTEGERS
