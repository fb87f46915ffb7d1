"""How far what a lowered network computes is from what the float network computes.

========  ==========================================================================  ===========
metric    of expected ``y`` and found ``z``, all values of all batches                worse is
========  ==========================================================================  ===========
sqnr      ``10 log10(sum(y^2) / sum((y - z)^2))``, in dB                              smaller
mse       ``mean((y - z)^2)``                                                         larger
cosine    ``sum(y z) / sqrt(sum(y^2) sum(z^2))``                                      smaller
kl        mean over rows of ``KL(softmax(y) || softmax(z))``, in nats                 larger
top1      share of rows whose largest value is at the same place                      smaller
========  ==========================================================================  ===========

Rows are the class axis: the last of a tensor, or the second of one with four dimensions or more
(segmentation). A tensor without rows of two or more values has no ``kl`` and no ``top1``. Of an
output that holds several float tensors, the first three metrics are of all of them together, and
``kl`` and ``top1`` of the first. Sums are in float64; of tensors with more than 2**20 values, each
2**14 values are summed in float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.comparison.measures import sqnr_of
from fxquant.errors import CalibrationError, ConfigError, did_you_mean
from fxquant.sensitivity.activations import tensors_in

UserMetric = Callable[[nn.Module, Any], float]
"""``f(model, data) -> float``, larger is better: accuracy on the task, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The metrics of the module's table; ``None`` where one is not defined.

    Attributes:
        sqnr: in dB; infinite where nothing differs.
        mse: mean squared difference.
        cosine: 1 where directions agree.
        kl: in nats.
        top1: share of rows, 0 to 1.
    """

    sqnr: float
    mse: float
    cosine: float
    kl: float | None = None
    top1: float | None = None

    def to_plain(self) -> dict[str, float | None]:
        """As a dict of numbers; infinities stay."""
        return asdict(self)

    def damage(self, metric: str) -> float:
        """One number that is larger the worse it is: a metric, or its negative, or ``1 -`` it.

        Raises:
            ConfigError: there is no such metric, or it is not defined here.
        """
        if metric not in METRICS:
            raise ConfigError(f"there is no metric {metric!r}{did_you_mean(metric, METRICS)}")
        value = getattr(self, metric)
        if value is None:
            raise ConfigError(
                f"metric {metric!r} is not defined here: the output has no rows of classes; rank by"
                " sqnr, mse or cosine"
            )
        if metric == "sqnr":
            return -float(value)
        return 1.0 - float(value) if metric in ("cosine", "top1") else float(value)

    @property
    def noise(self) -> float:
        """Noise relative to the signal: ``10 ** (-sqnr / 10)``."""
        return 0.0 if self.sqnr == math.inf else 10.0 ** (-self.sqnr / 10.0)


_EXACT: Final = 1 << 20
_CHUNK: Final = 1 << 14  # of float32, summed by one dot product: the float64 of it costs ten times

METRICS: Final = tuple(field.name for field in fields(Metrics))
"""The names of the metrics that are always measured."""


class MetricSums:
    """Adds up batches; :meth:`result` gives the metrics.

    Args:
        classes: rows are of classes, so that ``kl`` and ``top1`` mean something.
    """

    def __init__(self, *, classes: bool = True) -> None:
        self.classes = classes
        self.signal = self.found = self.product = self.noise = 0.0
        self.values = self.rows = self.agreeing = 0
        self.divergence = 0.0

    def add(self, expected: Any, found: Any) -> None:
        """Count what the float network gave for a batch, and what the lowered one gave.

        Raises:
            CalibrationError: they are not of one form.
        """
        mine = [t for t in tensors_in(expected) if t.is_floating_point()]
        theirs = [t for t in tensors_in(found) if t.is_floating_point()]
        if [t.shape for t in mine] != [t.shape for t in theirs] or not mine:
            raise CalibrationError(
                f"the outputs cannot be compared: float tensors of shapes {_shapes(mine)} and"
                f" {_shapes(theirs)}"
            )
        for y, z in zip(mine, theirs, strict=True):
            self._add_tensor(y, z)
        if self.classes:
            self._add_rows(mine[0], theirs[0])

    def _add_tensor(self, expected: Tensor, found: Tensor) -> None:
        y, z = expected.detach().flatten(), found.detach().flatten()
        if y.numel() <= _EXACT:
            y, z = y.to(torch.float64), z.to(torch.float64)
        sums = torch.zeros(4, dtype=torch.float64)
        for a, b in zip(y.split(_CHUNK), z.split(_CHUNK), strict=True):
            difference = a - b
            parts = (a.dot(a), b.dot(b), a.dot(b), difference.dot(difference))
            sums += torch.stack(parts).to(torch.float64).cpu()
        signal, other, product, noise = sums.tolist()
        self.signal += signal
        self.found += other
        self.product += product
        self.noise += noise
        self.values += y.numel()

    def _add_rows(self, expected: Tensor, found: Tensor) -> None:
        y, z = rows_of(expected), rows_of(found)
        if y is None or z is None:
            return
        log_p, log_q = torch.log_softmax(y, 1), torch.log_softmax(z, 1)
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum())
        self.agreeing += int((y.argmax(1) == z.argmax(1)).sum())
        self.rows += len(y)

    def result(self) -> Metrics:
        """The metrics of everything added.

        Raises:
            CalibrationError: nothing was.
        """
        if not self.values:
            raise CalibrationError("no output value was compared")
        return Metrics(
            sqnr=sqnr_of_sums(self.signal, self.noise),
            mse=self.noise / self.values if math.isfinite(self.noise) else math.inf,
            cosine=self._cosine(),
            kl=self.divergence / self.rows if self.rows else None,
            top1=self.agreeing / self.rows if self.rows else None,
        )

    def _cosine(self) -> float:
        if not math.isfinite(self.noise):
            return -1.0
        if self.noise == 0.0:
            return 1.0
        size = math.sqrt(self.signal * self.found)
        return self.product / size if size else 0.0


def sqnr_of_sums(signal: float, noise: float) -> float:
    """SQNR in dB of two sums of squares."""
    if noise == 0.0:
        return math.inf
    return sqnr_of(noise / signal) if signal else -math.inf


def rows_of(value: Tensor) -> Tensor | None:
    """Rows of classes, float64 ``[N, classes]``; ``None`` where there are none."""
    axis = 1 if value.dim() >= 4 else -1
    if value.dim() < 2 or value.shape[axis] < 2:
        return None
    moved = value.detach().to(torch.float64).movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors) or "none"
