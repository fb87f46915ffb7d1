"""What may save a fragile layer from floating point: other weight scales, other range rules.

A cure changes the qconfig that a layer has. One that changes an activation's range is set on the
layers that feed the fragile one as well, whose observers make the range of what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from fxquant.observers import (
    HistogramObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)
from fxquant.qconfig import QConfig, spec_of
from fxquant.range_rules import MinMaxRule, MSERule, PercentileRule, RangeRule
from fxquant.specs import QuantSpec


def _integer_weights(qconfig: QConfig) -> QuantSpec | None:
    """How a weight becomes integers with whole zero points; ``None`` where it does not."""
    factory = spec_of(qconfig.weight)
    spec = None if factory is None else factory.spec
    return None if spec is None or spec.is_float or spec.has_float_zero_point else spec


def _integers(spec: QuantSpec) -> dict[str, Any]:
    """The arguments of an observer that wants the same integers."""
    return {
        "dtype": spec.dtype,
        "qscheme": spec.qscheme,
        "quant_min": spec.quant_min,
        "quant_max": spec.quant_max,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PerChannelWeights:
    """One scale for every output channel.

    Attributes:
        name: of the precision.
        words: how the report says it.
        rule: how each channel's range is chosen; ``None`` keeps everything.
    """

    name: str = "per-channel"
    words: str = "per-channel weights"
    rule: RangeRule | None = None
    changes_activations: bool = False

    def __call__(self, qconfig: QConfig) -> QConfig:
        """``qconfig`` with such weights; itself where it has them, or no integer weights."""
        spec = _integer_weights(qconfig)
        if spec is None or (spec.is_per_channel and self.rule is None):
            return qconfig
        options = _integers(spec) | {
            "qscheme": torch.per_channel_symmetric,
            "ch_axis": spec.ch_axis or 0,
        }
        if self.rule is None:
            weight = PerChannelMinMaxObserver.with_args(**options)
        else:
            weight = PerChannelHistogramObserver.with_args(**options, rule=self.rule)
        return QConfig(activation=qconfig.activation, weight=weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRange:
    """Another rule for the range of weights, with as many scales as they have.

    Attributes:
        rule: how a range is chosen from the histogram.
    """

    rule: RangeRule

    def __call__(self, qconfig: QConfig) -> QConfig:
        """``qconfig`` with that rule; itself where it has no integer weights."""
        spec = _integer_weights(qconfig)
        if spec is None:
            return qconfig
        options = _integers(spec) | {"rule": self.rule}
        if spec.is_per_channel:
            weight = PerChannelHistogramObserver.with_args(**options, ch_axis=spec.ch_axis or 0)
        else:
            weight = HistogramObserver.with_args(**options)
        return QConfig(activation=qconfig.activation, weight=weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRange:
    """Another rule for the range of activations.

    Attributes:
        name: of the precision.
        words: how the report says it.
        rule: how ranges are chosen from the histogram.
    """

    name: str
    words: str
    rule: RangeRule
    changes_activations: bool = True

    def __call__(self, qconfig: QConfig) -> QConfig:
        """``qconfig`` with that rule; itself where its activations have no calibrated range."""
        factory = spec_of(qconfig.activation)
        spec = None if factory is None else factory.spec
        if spec is None or spec.is_float or spec.is_dynamic or spec.fixed or spec.is_per_channel:
            return qconfig
        activation = HistogramObserver.with_args(**_integers(spec), rule=self.rule)
        return QConfig(activation=activation, weight=qconfig.weight)


Cure = PerChannelWeights | ActivationRange

CURES: Final[tuple[Cure, ...]] = (
    PerChannelWeights(),
    PerChannelWeights(
        name="per-channel-mse", words="per-channel weights, MSE ranges", rule=MSERule()
    ),
    ActivationRange(name="min-max", words="min-max activation ranges", rule=MinMaxRule()),
    ActivationRange(name="mse", words="MSE activation ranges", rule=MSERule()),
    ActivationRange(
        name="percentile", words="99.99 % activation ranges", rule=PercentileRule(0.9999)
    ),
    ActivationRange(
        name="percentile-99.9", words="99.9 % activation ranges", rule=PercentileRule(0.999)
    ),
)
"""What is tried on fragile layers, cheapest at run time first (all cost nothing)."""

CURE_BY_NAME: Final = {cure.name: cure for cure in CURES}
