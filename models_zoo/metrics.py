"""The figures that accuracy work is judged by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.errors import CalibrationError


def top1(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows whose largest logit is the label's.

    Args:
        logits: ``(N, classes)``.
        labels: ``(N,)``, integer.

    Raises:
        CalibrationError: there is nothing to compare, or the lengths differ.
    """
    if labels.shape != logits.shape[:1]:
        raise CalibrationError(
            f"top1 got logits of shape {tuple(logits.shape)} and labels of shape "
            f"{tuple(labels.shape)}; pass one label per row"
        )
    return _percent(logits.argmax(dim=1) == labels)


def agreement(a: Tensor, b: Tensor) -> float:
    """Percent of rows on which two models choose the same class.

    Args:
        a: logits ``(N, classes)`` of one model.
        b: logits ``(N, classes)`` of the other, on the same inputs.

    Raises:
        CalibrationError: there is nothing to compare, or the shapes differ.
    """
    if a.shape != b.shape:
        raise CalibrationError(
            f"agreement got logits of shapes {tuple(a.shape)} and {tuple(b.shape)}; "
            "run both models on the same inputs"
        )
    return _percent(a.argmax(dim=1) == b.argmax(dim=1))


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise: ``10 * log10(sum(ref^2) / sum((ref - other)^2))`` in dB.

    Infinite where the two are equal (both all zero included); minus infinite where the reference
    is all zero and the other is not; NaN where either holds a NaN.

    Raises:
        CalibrationError: there is nothing to compare, or the shapes differ.
    """
    if reference.shape != other.shape or reference.numel() == 0:
        raise CalibrationError(
            f"sqnr_db got shapes {tuple(reference.shape)} and {tuple(other.shape)}; "
            "pass two tensors of the same shape with at least one element"
        )
    exact = reference.detach().double()
    noise = torch.sum((exact - other.detach().double()) ** 2).item()
    signal = torch.sum(exact**2).item()
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise) if math.isfinite(noise) else math.nan


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        a: ``(N,)``.
        b: ``(N,)``.

    Raises:
        CalibrationError: the shapes differ, or one of them is constant.
    """
    if a.shape != b.shape or a.dim() != 1:
        raise CalibrationError(
            f"spearman got shapes {tuple(a.shape)} and {tuple(b.shape)}; pass two vectors"
        )
    x, y = (_ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    norm = float((x * x).sum() * (y * y).sum())
    if norm == 0.0:
        raise CalibrationError("spearman is not defined for values that are all the same")
    return float((x * y).sum()) / math.sqrt(norm)


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    ranks: Tensor = (ends - (counts - 1) / 2).to(torch.float64)[group]
    return ranks


def equal_error_rate(scores: Tensor, same: Tensor) -> float:
    """Percent of wrong decisions at the threshold that accepts as many as it rejects wrongly.

    Args:
        scores: ``(N,)``, larger for pairs that are alike.
        same: ``(N,)`` bool, whether they are.

    Raises:
        CalibrationError: there is no pair of one kind.
    """
    alike, other = scores[same].sort().values, scores[~same].sort().values
    if not len(alike) or not len(other):
        raise CalibrationError("equal_error_rate needs pairs that are alike and pairs that are not")
    thresholds = scores.unique()
    rejected = torch.searchsorted(alike, thresholds) / len(alike)
    accepted = 1 - torch.searchsorted(other, thresholds) / len(other)
    best = int((rejected - accepted).abs().argmin())
    return 50.0 * float(rejected[best] + accepted[best])


def _percent(hits: Tensor) -> float:
    if hits.numel() == 0:
        raise CalibrationError("there are no rows to compare; pass at least one")
    return 100.0 * hits.double().mean().item()
