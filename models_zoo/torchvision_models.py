"""Classification models of torchvision, trained or with seeded random weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigError, did_you_mean
from fxquant.models_zoo.data import Preprocess, batch_slices
from fxquant.models_zoo.torchvision_import import import_torchvision

_WEIGHT_SEED = 0
_SIDE = 224


def build(name: str, weights: str | None = None) -> nn.Module:
    """A classification model of torchvision, in eval mode.

    Args:
        name: as torchvision lists it, such as ``"resnet18"``.
        weights: None for random weights from a fixed seed, else the name of trained weights such
            as ``"DEFAULT"``, which torchvision downloads or takes from its cache.

    Raises:
        ConfigError: torchvision has no such classification model, or no such weights for it.
        MissingDependencyError: torchvision is not installed.
    """
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"torchvision has no classification model {name!r}{did_you_mean(name, known)}"
        )
    choices = ("DEFAULT", *models.get_model_weights(name).__members__)
    if weights is not None and weights not in choices:
        raise ConfigError(
            f"{name!r} has no weights {weights!r} in torchvision; it has {', '.join(choices)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        model: nn.Module = models.get_model(name, weights=weights)
    return model.eval()


def realistic_bn_statistics(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch-norm to those of ``inputs``, in place.

    A fresh model holds mean 0 and variance 1, which its activations do not have; folding such a
    batch-norm proves little, and the ranges downstream are not those of a trained net. Only the
    batch-norms run in training mode; dropout stays as it is. The statistics are plain averages
    over the batches, whatever the momentum, and all modes are put back.

    Args:
        model: a model that takes one tensor.
        inputs: batches of at least two rows.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        with torch.no_grad():
            for batch in inputs:
                model(batch)
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum


def seeded_images(count: int, *, seed: int, side: int = _SIDE) -> Tensor:
    """Smooth random pictures, the same for the same seed.

    Noise of several grid sizes, each upsampled and added, so that, as in photographs, coarse
    structure is stronger than fine.

    Returns:
        uint8 ``(count, 3, side, side)``.
    """
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(count, 3, side, side)
    for grid in (2, 4, 8, 16, 32):
        noise = torch.randn(count, 3, grid, grid, generator=generator) * (2.0 / grid) ** 0.5
        picture += F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    return (128 + 64 * picture).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class SyntheticSource:
    """Seeded pictures, labelled with the classes that the FP32 model gives them.

    Top-1 on them is the agreement with the FP32 model, and 100 % for that model itself.
    """

    model: nn.Module
    preprocess: Preprocess
    calibration_count: int = 50
    evaluation_count: int = 100

    def calibration_images(self, limit: int | None = None) -> Tensor:
        """Pictures from a seed of their own."""
        return seeded_images(self.calibration_count, seed=0)[:limit]

    def evaluation_images(self) -> tuple[Tensor, Tensor]:
        """Pictures from another seed, and the FP32 model's classes."""
        images = seeded_images(self.evaluation_count, seed=1)
        with torch.no_grad():
            labels = [
                self.model(self.preprocess(images[part])).argmax(dim=1)
                for part in batch_slices(len(images), 50)
            ]
        return images, torch.cat(labels)
