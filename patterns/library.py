"""The built-in patterns, in the order of preference among matches of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fxquant.errors import ConfigError, did_you_mean
from fxquant.patterns.batch_norm import BATCH_NORM_ACTIVATION, BATCH_NORM_ACTIVATION_QAT
from fxquant.patterns.channel_scale import CHANNEL_SCALE
from fxquant.patterns.concatenation import CONCATENATION_ACTIVATION
from fxquant.patterns.convolution import CONVOLUTION_ACTIVATION, CONVOLUTION_ADD
from fxquant.patterns.convolution_batch_norm import (
    CONVOLUTION_BATCH_NORM,
    CONVOLUTION_BATCH_NORM_QAT,
)
from fxquant.patterns.elementwise import ELEMENTWISE_ACTIVATION
from fxquant.patterns.guards import not_scalar_operand, same_shape, unit_alpha
from fxquant.patterns.linear import LINEAR_ACTIVATION
from fxquant.patterns.matrix_product import MATRIX_PRODUCT_ACTIVATION
from fxquant.patterns.pattern import Pattern

FOLD_PATTERNS: tuple[Pattern, ...] = CONVOLUTION_BATCH_NORM
"""Chains whose parameters become those of one op, before anything is quantized."""

SCALE_PATTERNS: tuple[Pattern, ...] = CHANNEL_SCALE
"""Chains whose last op is a constant factor that the parameters of the first can take."""

QAT_PATTERNS: tuple[Pattern, ...] = CONVOLUTION_BATCH_NORM_QAT
"""The chains of :data:`FOLD_PATTERNS` while they train."""

FUSION_PATTERNS: tuple[Pattern, ...] = (
    *CONVOLUTION_ADD,
    *CONVOLUTION_ACTIVATION,
    *LINEAR_ACTIVATION,
    *BATCH_NORM_ACTIVATION,
    *ELEMENTWISE_ACTIVATION,
    *CONCATENATION_ACTIVATION,
    *MATRIX_PRODUCT_ACTIVATION,
)
"""Chains that one kernel may compute, so that the values between are not observed."""

QAT_FUSION_PATTERNS: tuple[Pattern, ...] = (
    *(pattern for pattern in FUSION_PATTERNS if pattern not in BATCH_NORM_ACTIVATION),
    *BATCH_NORM_ACTIVATION_QAT,
)
"""The chains of :data:`FUSION_PATTERNS` while they train."""


def with_any_operand(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """``patterns``, in which the other operand of an add or mul may be a number, or scaled."""
    dropped = (not_scalar_operand, unit_alpha)
    return tuple(
        replace(pattern, guards=tuple(g for g in pattern.guards if g not in dropped))
        if pattern in ELEMENTWISE_ACTIVATION
        else pattern
        for pattern in patterns
    )


def of_any_shape(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """``patterns``, of which no two operands need the same shape: for what computes in float."""
    return tuple(
        replace(pattern, guards=tuple(g for g in pattern.guards if g is not same_shape))
        for pattern in patterns
    )


_BY_NAME = {
    pattern.name: pattern for pattern in (*FOLD_PATTERNS, *SCALE_PATTERNS, *FUSION_PATTERNS)
}


def pattern_named(name: str) -> Pattern:
    """The built-in fold or fusion pattern of this name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        hint = did_you_mean(name, _BY_NAME)
        raise ConfigError(f"there is no pattern {name!r}{hint}") from None
