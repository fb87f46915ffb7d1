"""A quantized model of the zoo against its FP32 model: accuracy, agreement, noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.models_zoo import metrics
from fxquant.models_zoo.registry import Model, ZooEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What quantizing cost.

    Attributes:
        fp32: top-1 of the FP32 model on the evaluation images, percent.
        int8: top-1 of the quantized model, percent.
        agreement: inputs on which both name the same class, percent.
        sqnr_db: 10 log10 of the power of the FP32 logits over that of the difference, on the
            evaluation images.
        images: number of evaluation images (of their pixels, for segmentation).
        agreement_inputs: number of inputs behind ``agreement``.
    """

    fp32: float
    int8: float
    agreement: float
    sqnr_db: float
    images: int
    agreement_inputs: int

    @property
    def drop(self) -> float:
        """Points of top-1 lost."""
        return self.fp32 - self.int8


def compare(entry: ZooEntry, model: Model) -> Accuracy:
    """Measure ``model`` against ``entry.model`` on the evaluation data of ``entry``.

    Every input goes through both models once; the evaluation images come first among the
    agreement inputs, so accuracy and noise are read off the same logits.
    """
    labels = torch.cat([labels.flatten() for _, labels in entry.evaluation])
    inputs = entry.agreement_inputs()
    float_logits = entry.fp32_logits
    int8_logits = entry.logits(model, inputs)
    count = len(labels)
    return Accuracy(
        fp32=metrics.top1(float_logits[:count], labels),
        int8=metrics.top1(int8_logits[:count], labels),
        agreement=metrics.agreement(float_logits, int8_logits),
        sqnr_db=metrics.sqnr_db(float_logits[:count], int8_logits[:count]),
        images=count,
        agreement_inputs=len(float_logits),
    )


def logit_sqnr(entry: ZooEntry, model: Model) -> float:
    """Only the noise of :func:`compare`: one pass over the evaluation images."""
    logits = entry.logits(model, (inputs for inputs, _ in entry.evaluation))
    return metrics.sqnr_db(entry.fp32_logits[: len(logits)], logits)
