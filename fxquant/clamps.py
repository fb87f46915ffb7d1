"""Clamps: their bounds, and when a quantized range already expresses them."""

from __future__ import annotations

from torch import Tensor

from fxquant.op_view import Op

CLAMP_KINDS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"})


def bounds_of(op: Op) -> tuple[float | None, float | None]:
    """``(low, high)`` of a clamp-like op; ``None`` is unbounded.

    Args:
        op: one of :data:`CLAMP_KINDS` with constant bounds.
    """
    arguments = op.arguments
    if op.name == "relu":
        return 0.0, None
    if op.name == "relu6":
        return 0.0, 6.0
    if op.name == "hardtanh":
        return float(arguments["min_val"]), float(arguments["max_val"])
    low, high = arguments.get("min"), arguments.get("max")
    return (None if low is None else float(low)), (None if high is None else float(high))


def low_is_free(low: float | None, scale: Tensor, zero_point: Tensor, quant_min: int) -> bool:
    """Whether rounding to the range cuts off everything below ``low`` anyway.

    ``round(low / scale) + zero_point <= quant_min``
    """
    return low is None or _unclamped(low, scale, zero_point) <= quant_min


def high_is_free(high: float | None, scale: Tensor, zero_point: Tensor, quant_max: int) -> bool:
    """Whether rounding to the range cuts off everything above ``high`` anyway.

    ``round(high / scale) + zero_point >= quant_max``
    """
    return high is None or _unclamped(high, scale, zero_point) >= quant_max


def _unclamped(value: float, scale: Tensor, zero_point: Tensor) -> float:
    return round(value / float(scale)) + int(zero_point)
