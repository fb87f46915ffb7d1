"""Why a layer is fragile, in one sentence."""

from __future__ import annotations

import math

from fxquant.sensitivity.cures import CURE_BY_NAME
from fxquant.sensitivity.network import FP32
from fxquant.sensitivity.policy import UNCURED, Decision
from fxquant.sensitivity.results import LayerResult

_SPREAD = 8.0
_OUTLIERS = 4.0


def reason_of(result: LayerResult, decision: Decision, precision: str) -> str:
    """What the measurement says about a layer: the cause of its damage, and what was tried.

    Args:
        result: of the layer.
        decision: what was decided about it.
        precision: that was analysed.
    """
    parts = []
    found = result.measurements.get(precision)
    if found is not None and found.layer is not None and found.layer.sqnr == math.inf:
        parts.append(f"{precision} rounds nothing here")
    if decision.fragile:
        parts.append(cause_of(result))
    if decision.cure:
        parts.append(_cured(result, decision.cure, precision))
    elif decision.fragile and decision.precision == FP32:
        tried = [name for name in result.cures if name != UNCURED]
        if tried and not result.place:
            best = max(tried, key=lambda name: result.cures[name].output.sqnr)
            after = result.cures[best].output.sqnr
            words = CURE_BY_NAME[best].words
            parts.append(
                f"no cure of {len(tried)} tried helps, the best is {words}: {after:.1f} dB"
            )
    if decision.why and decision.why not in ("fragile", "fragile, and cured"):
        parts.append(decision.why)
    return "; ".join(part for part in parts if part)


def cause_of(result: LayerResult) -> str:
    """Which part of a layer makes the error, and what is peculiar about it."""
    noises = {part: m.noise for part, m in result.parts.items() if part in ("weight", "input")}
    ranges = result.ranges
    by_weight = (
        f"channel ranges of the weight spread 1:{ranges.channel_spread:.0f} under one scale"
        if has_unlike_channels(result)
        else ""
    )
    by_input = (
        f"the input has outliers: its largest value is {ranges.outliers:.1f} times the 99.9 %"
        " quantile"
        if ranges.outliers is not None and ranges.outliers >= _OUTLIERS
        else ""
    )
    if not noises:
        return by_weight or by_input
    worst = max(noises, key=noises.__getitem__)
    share = noises[worst] / (sum(noises.values()) or 1.0)
    text = f"{100 * share:.0f} % of its noise comes from rounding the {worst}"
    detail = by_weight if worst == "weight" else by_input
    starved = ranges.starved_channels or 0
    if worst == "weight" and starved:
        detail += f"; {starved} of {ranges.channels} channels use less than 8 of 127 steps"
    return f"{text}: {detail.removeprefix('; ')}" if detail else text


def has_unlike_channels(result: LayerResult) -> bool:
    """Whether one scale serves weight channels so unlike that the smallest loses three bits."""
    spread = result.ranges.channel_spread
    return result.ranges.per_tensor and spread is not None and spread >= _SPREAD


def _cured(result: LayerResult, cure: str, precision: str) -> str:
    before = result.cures.get(UNCURED, result.measurements.get(precision))
    after = result.cures[cure]
    if before is None:
        return ""
    return f"{CURE_BY_NAME[cure].words}: {before.output.sqnr:.1f} -> {after.output.sqnr:.1f} dB"
