"""What a plan really is: accuracy on data, latency, size, and the share that runs int8."""

from __future__ import annotations

import functools
import inspect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from fxquant.errors import ConfigError, did_you_mean
from fxquant.graph_module import QuantGraphModule
from fxquant.op_rows import Runs, rows_of
from fxquant.planner.clock import call_times
from fxquant.run_record import size_of
from fxquant.sensitivity.feeding import BoundBatch
from fxquant.sensitivity.metrics import Metrics, MetricSums, UserMetric

METRICS: Final = ("agreement", "error")
"""``agreement``: percent of rows with the FP32 model's class; ``error``: ``100 -`` the relative
RMS error of the outputs in percent."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one model.

    Attributes:
        accuracy: by the metric; larger is better.
        drop: how much lower than the FP32 model's.
        noise: relative to the signal, at the outputs.
        size: bytes of the tensors.
        int8_share: of the multiply-accumulates, in int8.
        latency: median seconds of a call; ``None`` where it was not timed.
        fastest: of the timed calls.
    """

    accuracy: float
    drop: float
    noise: float
    size: int
    int8_share: float
    latency: float | None = None
    fastest: float | None = None


class Judge:
    """Measures models of one network.

    Args:
        batches: bound inputs that accuracy is judged on.
        metric: one of :data:`METRICS`, or ``f(model, data) -> float``, larger is better.
        data: what ``metric`` is given.
        floats: the FP32 graph.
    """

    def __init__(
        self,
        batches: Sequence[BoundBatch],
        metric: str | UserMetric,
        data: Any,
        floats: nn.Module,
    ) -> None:
        if isinstance(metric, str) and metric not in METRICS:
            raise ConfigError(
                f"there is no metric {metric!r}{did_you_mean(metric, METRICS)}; known are"
                f" {', '.join(METRICS)}, or pass a function f(model, data) -> float"
            )
        self.batches = batches
        self.metric = metric
        self.data = data
        self.expected = [_call(floats, batch) for batch in batches]
        self.calls = 0
        self.best = self._accuracy(floats, None)

    def figures(self, gm: QuantGraphModule) -> Figures:
        """Everything but the latency."""
        sums = MetricSums()
        for wish, batch in zip(self.expected, self.batches, strict=True):
            sums.add(wish, _call(gm, batch))
        result = sums.result()
        accuracy = self._accuracy(gm, result)
        self.calls += 1
        return Figures(
            accuracy=accuracy,
            drop=self.best - accuracy,
            noise=result.noise,
            size=size_of(gm),
            int8_share=int8_share(gm),
        )

    def _accuracy(self, model: nn.Module, result: Metrics | None) -> float:
        if callable(self.metric):
            with torch.no_grad():
                value = float(self.metric(model, self.data))
            if math.isnan(value):
                raise ConfigError("the metric function gave NaN")
            return value
        if result is None:
            return 100.0  # the FP32 model agrees with itself
        if self.metric == "error":
            return 100.0 * (1.0 - math.sqrt(result.noise))
        if result.top1 is None:
            raise ConfigError(
                "metric 'agreement' needs outputs with rows of classes; pass metric='error', or a"
                " function f(model, data) -> float"
            )
        return 100.0 * result.top1


def latencies(
    models: Mapping[str, QuantGraphModule], bound: inspect.BoundArguments, *, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median and fastest seconds of a call of each model, the models taking turns."""
    calls = {
        name: functools.partial(gm, *bound.args, **bound.kwargs) for name, gm in models.items()
    }
    times = call_times(calls, repeats=repeats)
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def int8_share(gm: QuantGraphModule) -> float:
    """Share of the multiply-accumulates in int8, by what the graph says; 0 where none is known."""
    rows = rows_of(gm)
    whole = sum(row.macs or 0 for row in rows)
    part = sum(row.macs or 0 for row in rows if row.runs is Runs.INT8)
    return part / whole if whole else 0.0


def _call(model: nn.Module, batch: BoundBatch) -> Any:
    with torch.no_grad():
        return model(*batch.args, **batch.kwargs)
