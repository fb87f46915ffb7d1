"""The precisions that a layer may be given, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch

from fxquant.errors import ConfigError, did_you_mean
from fxquant.planner.problem import FLOAT
from fxquant.qconfig import (
    QConfig,
    as_qconfig,
    bfloat16_static_qconfig,
    float16_dynamic_qconfig,
    float16_static_qconfig,
    get_default_dynamic_qconfig,
    spec_of,
)
from fxquant.range_rules import EntropyRule, MinMaxRule, MSERule, PercentileRule, RangeRule
from fxquant.sensitivity.cures import ActivationRange, PerChannelWeights, WeightRange
from fxquant.sensitivity.network import FP32, INT8, Precision

INTEGERS: Final = "int8"
"""The representation that int8 layers hand to each other."""

DEFAULT: Final = (FP32, INT8)


def _range(name: str, rule: RangeRule) -> ActivationRange:
    return ActivationRange(name=name, words=f"{name} activation ranges", rule=rule)


CANDIDATES: Final[Mapping[str, Precision]] = {
    "bf16": bfloat16_static_qconfig,
    "fp16": float16_static_qconfig,
    "int8-dynamic": get_default_dynamic_qconfig(),
    "weight-only": float16_dynamic_qconfig,
    "int8-per-channel": PerChannelWeights(),
    "int8-minmax": _range("min-max", MinMaxRule()),
    "int8-percentile": _range("percentile", PercentileRule(0.9999)),
    "int8-mse": _range("mse", MSERule()),
    "int8-entropy": _range("entropy", EntropyRule()),
    "int8-weights-mse": WeightRange(rule=MSERule()),
    "int8-weights-percentile": WeightRange(rule=PercentileRule(0.999)),
}
"""Beside ``fp32`` and ``int8`` (what the mapping says): half precision; int8 weights with
activations quantized at run time; float16 weights and FP32 sums; int8 with weights of one scale a
channel; and int8 with another rule for the range of what the layer reads, or of its weights."""

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
