"""From observers to scales and zero points: ours and torch.ao's, alone and united."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.collectors import (
    Collector,
    HistogramCollector,
    MinMaxCollector,
    PerChannelHistogramCollector,
    PerChannelMinMaxCollector,
)
from fxquant.errors import NonFiniteStatisticError
from fxquant.observers import FixedQParamsObserver
from fxquant.qconfig import QConfig, read_observer
from fxquant.range_rules import MinMaxRule
from fxquant.slices import all_finite
from fxquant.specs import QParams, QuantSpec, choose_qparams


def was_observed(observer: nn.Module) -> bool:
    """Whether an observer, ours or torch.ao's, has seen data (or needs none)."""
    known = getattr(observer, "was_observed", None)
    if isinstance(known, bool):
        return known
    inner = getattr(observer, "activation_post_process", observer)
    low = getattr(inner, "min_val", None)
    if not isinstance(low, Tensor):
        return True
    return low.numel() > 0 and bool(torch.isfinite(low).all())


def is_ready(observer: nn.Module) -> bool:
    """Whether an observer has seen data, or needs none: a cast, or parameters at run time."""
    spec = spec_of_observer(observer)
    return was_observed(observer) or spec.is_dynamic or spec.is_float


def qparams_of(observer: nn.Module, spec: QuantSpec) -> QParams:
    """Scale and zero point of an observer, ours or torch.ao's; 1 and 0 if it saw nothing."""
    if not was_observed(observer):
        return QParams(torch.ones(()), torch.zeros((), dtype=torch.int32), spec)
    made = getattr(observer, "qparams", None)
    if callable(made):
        found = made()
        assert isinstance(found, QParams)
        return found
    scale, zero_point = observer.calculate_qparams()  # type: ignore[operator]  # every observer has it
    shape = (-1,) if spec.is_per_channel else ()
    whole = torch.float32 if spec.has_float_zero_point else torch.int32
    return QParams(
        scale.detach().to(torch.float32).reshape(shape),
        zero_point.detach().to(whole).reshape(shape),
        spec,
    )


def in_half_precision(qparams: QParams) -> QParams:
    """Parameters of a 4-bit table whose scale and offset are float16, as its kernel keeps them.

    The kernel computes ``scale * q + offset`` with ``offset = -zero_point * scale``; both are
    rounded here, so that the integers are chosen for the values that the kernel will give.
    """
    smallest = torch.finfo(torch.float16).tiny
    scale = qparams.scale.to(torch.float16).to(torch.float32).clamp(min=smallest)
    offset = (-qparams.zero_point * qparams.scale).to(torch.float16).to(torch.float32)
    return QParams(scale, -offset / scale, qparams.spec)


def spec_of_observer(observer: nn.Module) -> QuantSpec:
    """What an observer wants, read by duck typing."""
    spec = read_observer(observer, type(observer)).spec
    assert spec is not None
    return spec


def unite(observers: list[nn.Module]) -> QParams:
    """Parameters for tensors that share them: of the union of the observers' statistics.

    Observers of other libraries have no statistics to unite; then the ranges are united.
    """
    seen = [observer for observer in observers if was_observed(observer)] or observers
    spec = spec_of_observer(seen[0])
    merge = getattr(seen[0], "merge_from", None)
    if len(seen) == 1:
        return qparams_of(seen[0], spec)
    if callable(merge) and len({type(observer) for observer in seen}) == 1:
        union = copy.deepcopy(seen[0])
        union.merge_from(seen[1:])  # type: ignore[operator]  # checked above
        return qparams_of(union, spec)
    lows, highs = [], []
    for observer in seen:
        q = qparams_of(observer, spec_of_observer(observer))
        lows.append((q.spec.quant_min - q.zero_point).to(torch.float32) * q.scale)
        highs.append((q.spec.quant_max - q.zero_point).to(torch.float32) * q.scale)
    return choose_qparams(torch.stack(lows).amin(0), torch.stack(highs).amax(0), spec)


def merged(observers: list[nn.Module]) -> nn.Module:
    """A new observer that saw what calibrated observers of one class saw together.

    Of observers that have no statistics to merge, one with the parameters of :func:`unite`.
    """
    union = copy.deepcopy(observers[0])
    if len(observers) == 1:
        return union
    merge = getattr(union, "merge_from", None)
    if callable(merge) and len({type(observer) for observer in observers}) == 1:
        merge(observers[1:])
        return union
    return united_observer(observers)


def united_observer(observers: list[nn.Module]) -> nn.Module:
    """One observer for tensors that are quantized by one module: of the union of what they saw."""
    distinct = list({id(observer): observer for observer in observers}.values())
    if len(distinct) == 1 or not any(map(was_observed, distinct)):
        return distinct[0]
    qparams = unite(distinct)
    spec = qparams.spec
    return FixedQParamsObserver(
        scale=float(qparams.scale),
        zero_point=int(qparams.zero_point),
        dtype=spec.dtype,
        qscheme=spec.qscheme,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
    )


def weight_qparams(weight: Tensor, spec: QuantSpec, qconfig: QConfig, name: str) -> QParams:
    """Parameters of a weight, from the qconfig's weight observer run on its final values.

    Args:
        weight: after folding.
        spec: what the op table made of the observer's wish.
        qconfig: whose ``weight`` makes the observer.
        name: the node, for messages.

    Raises:
        NonFiniteStatisticError: the weight holds NaN or Inf.
    """
    observer: Any = qconfig.weight().to(weight.device)
    try:
        if not _refuses_infinite(observer) and not all_finite(weight):
            raise NonFiniteStatisticError("found when looked for")
        return _qparams_of_weight(observer, weight, spec)
    except NonFiniteStatisticError as error:
        raise NonFiniteStatisticError(
            f"the weight of {name!r} holds NaN or Inf; it cannot be quantized. Check the"
            " checkpoint, and the running variance of a batch-norm folded into it"
        ) from error


def _refuses_infinite(observer: nn.Module) -> bool:
    """Whether an observer looks for NaN and Inf itself in all that it sees."""
    ours = type(observer).__module__.startswith("fxquant.")
    return ours and isinstance(getattr(observer, "collector", None), Collector)


def _qparams_of_weight(observer: Any, weight: Tensor, spec: QuantSpec) -> QParams:
    if spec_of_observer(observer) == spec:
        observer(weight)
        return qparams_of(observer, spec)
    # The op table wants another axis, or one scale for all: the same rule on other statistics.
    inner = getattr(observer, "activation_post_process", observer)
    rule = getattr(inner, "rule", MinMaxRule())
    collector: Collector
    if isinstance(rule, MinMaxRule):
        by_channel = spec.ch_axis is not None
        collector = (
            PerChannelMinMaxCollector(spec.ch_axis or 0) if by_channel else MinMaxCollector()
        )
    elif spec.ch_axis is None:
        collector = HistogramCollector(count_limit=None)
    else:
        collector = PerChannelHistogramCollector(ch_axis=spec.ch_axis)
    collector.to(weight.device)
    collector(weight)
    low, high = rule.choose(collector, spec)
    return choose_qparams(low, high, spec)
