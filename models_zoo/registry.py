"""One way to load every model of the zoo, with its data and its metric.

``load(name)`` gives a :class:`ZooEntry`; ``names()`` lists what can be loaded. ``digits`` needs no
data folder. Beyond the list, ``load("torchvision/<model>")`` takes any model of an installed
torchvision for classification or segmentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxquant.errors import ConfigError, DataNotFoundError, did_you_mean
from fxquant.models_zoo import data, digits, metrics
from fxquant.models_zoo.data import (
    AGREEMENT_VARIANTS,
    CifarSource,
    ImageNetSource,
    ImageSource,
    LazyBatches,
    Preprocess,
    agreement_variant,
    batch_slices,
    find_data_dir,
    load_state,
)
from fxquant.models_zoo.efficientnet_lite0 import EfficientNetLite0
from fxquant.models_zoo.mobilenet_v2_folded import MobileNetV2Folded, dequantized_state
from fxquant.models_zoo.resnet_cifar import resnet20_cifar10, resnet56_cifar10
from fxquant.models_zoo.squeezenet import SqueezeNet11
from fxquant.models_zoo.torchvision_models import (
    SyntheticSource,
    build,
    is_segmentation,
    logit_rows,
    output_of,
    realistic_biased_layers,
    realistic_bn_statistics,
    realistic_layer_scales,
    realistic_residual_gains,
    resized,
    side_of,
)

Model: TypeAlias = Callable[[Tensor], Any]
"""What a metric can measure: a module, a graph module, or any function of one batch."""

TORCHVISION_PREFIX = "torchvision/"
"""Names that start with this are looked up in torchvision."""

DataDir: TypeAlias = str | os.PathLike[str] | None
"""What ``data_dir=`` takes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ZooEntry:
    """A model with the data to calibrate and judge it.

    Attributes:
        name: what :func:`load` was given.
        description: one line on the model and what it is good for.
        model: FP32, in eval mode.
        example_inputs: one input of batch 1, as the positional arguments of the model.
        reference_metric: the FP32 figure that :meth:`metric` should give, where one is known.
        images: where the images come from; not needed by callers.
        preprocess: turns uint8 images into the model's inputs.
        first_class: columns of the output before the first real class (1 for a background class).
        output: key of the output that counts, for a model that returns a dict; else empty.
        augmented: whether :meth:`agreement_inputs` holds five views of every evaluation image.
        batch_size: rows of a batch.
    """

    name: str
    description: str
    model: nn.Module = field(repr=False)
    example_inputs: tuple[Tensor, ...] = field(repr=False)
    reference_metric: float | None
    images: ImageSource = field(repr=False)
    preprocess: Preprocess = field(repr=False)
    first_class: int = 0
    output: str = ""
    augmented: bool = False
    batch_size: int = 50

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Input batches to calibrate on; none of their images is evaluated."""
        return list(self._inputs(self.images.calibration_images()))

    @cached_property
    def evaluation(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Batches ``(inputs, labels)``; images are decoded once, inputs made as they are read."""
        images, labels = self._evaluation_images
        slices = batch_slices(len(images), self.batch_size)
        return LazyBatches(
            len(slices), lambda i: (self.preprocess(images[slices[i]]), labels[slices[i]])
        )

    def agreement_inputs(self) -> Sequence[Tensor]:
        """Input batches on which two models are compared, made as they are read.

        Five views of each evaluation image where :attr:`augmented`, else the evaluation images.
        """
        images, _ = self._evaluation_images
        variants = AGREEMENT_VARIANTS if self.augmented else 1
        slices = batch_slices(len(images), self.batch_size)

        def make(i: int) -> Tensor:
            variant, part = divmod(i, len(slices))
            return self.preprocess(agreement_variant(images[slices[part]], variant))

        return LazyBatches(variants * len(slices), make)

    def metric(self, model: Model) -> float:
        """Top-1 of ``model`` on the evaluation images (their pixels), in percent."""
        _, labels = self._evaluation_images
        logits = self.logits(model, (inputs for inputs, _ in self.evaluation))
        return metrics.top1(logits, labels.flatten())

    def agreement(self, model: Model) -> float:
        """Percent of :meth:`agreement_inputs` on which ``model`` and the FP32 model agree."""
        return metrics.agreement(self.fp32_logits, self.logits(model, self.agreement_inputs()))

    def logits(self, model: Model, inputs: Iterable[Tensor]) -> Tensor:
        """The outputs of ``model`` for batches of inputs, real classes only: ``(N, classes)``.

        A segmentation model has a row for every pixel.
        """
        with torch.no_grad():
            rows = [logit_rows(model(batch), self.output) for batch in inputs]
        return torch.cat(rows)[:, self.first_class :]

    @cached_property
    def _evaluation_images(self) -> tuple[Tensor, Tensor]:
        return self.images.evaluation_images()

    @cached_property
    def fp32_logits(self) -> Tensor:
        """The FP32 model's outputs for :meth:`agreement_inputs`, real classes only."""
        return self.logits(self.model, self.agreement_inputs())

    def _inputs(self, images: Tensor) -> Sequence[Tensor]:
        slices = batch_slices(len(images), self.batch_size)
        return LazyBatches(len(slices), lambda i: self.preprocess(images[slices[i]]))


def names() -> tuple[str, ...]:
    """The names that :func:`load` knows by itself, the embedded model first."""
    return tuple(_BUILDERS)


def load(
    name: str,
    *,
    data_dir: DataDir = None,
    weights: str | None = None,
    side: int | None = None,
    photos: bool = False,
) -> ZooEntry:
    """Load a model of the zoo with its data.

    Args:
        name: one of :func:`names`, or ``"torchvision/<model>"``.
        data_dir: the data folder; where it is None, see :func:`~.data.find_data_dir`.
        weights: for torchvision only: None for seeded random weights with realistic batch-norm
            statistics, or the name of trained weights such as ``"DEFAULT"`` or
            ``"IMAGENET1K_V1"``, which torchvision downloads or takes from its cache. Such a
            classifier is judged on the labelled photographs of the data folder; where there is no
            data folder, on seeded pictures and its own FP32 classes, and its description says so.
        side: for torchvision with seeded weights only: height and width of the pictures in pixels;
            None is 224, or what the model was made for.
        photos: for torchvision with seeded weights only: the pictures, and those behind the
            batch-norm statistics, are the ImageNet sample of the data folder instead of seeded
            ones.

    Raises:
        ConfigError: there is no such model, or ``weights``, ``side`` or ``photos`` is given for one
            that has weights and images of its own.
        DataNotFoundError: the model's weights or images are not in the data folder.
        MissingDependencyError: an optional dependency of the model is not installed.
    """
    if name.startswith(TORCHVISION_PREFIX):
        return _torchvision(name, data_dir, weights, side, photos)
    if name not in _BUILDERS:
        raise ConfigError(
            f"there is no zoo model {name!r}{did_you_mean(name, _BUILDERS)}; known are "
            f"{', '.join(_BUILDERS)} and {TORCHVISION_PREFIX}<model>"
        )
    if weights is not None:
        raise ConfigError(
            f"weights={weights!r} was given for {name!r}, which has weights of its own; "
            f"weights= is for {TORCHVISION_PREFIX}<model> only"
        )
    if side is not None or photos:
        raise ConfigError(
            f"side={side} and photos={photos} were given for {name!r}, which has images of its own"
            f" size; they are for {TORCHVISION_PREFIX}<model> only"
        )
    return _BUILDERS[name](data_dir)


def _digits(_: DataDir) -> ZooEntry:
    return ZooEntry(
        name="digits",
        description="depthwise-separable conv-bn-relu6 net on handwritten digits; embedded",
        model=digits.digits_net_trained(),
        example_inputs=(digits.example_input(),),
        reference_metric=digits.REFERENCE_TOP1,
        images=digits.DigitsSource(),
        preprocess=digits.upsampled,
    )


def _resnet20(data_dir: DataDir) -> ZooEntry:
    return _cifar_resnet("resnet20_cifar10", resnet20_cifar10(), 91.48, data_dir)


def _resnet56(data_dir: DataDir) -> ZooEntry:
    return _cifar_resnet("resnet56_cifar10", resnet56_cifar10(), 92.96, data_dir)


def _cifar_resnet(name: str, model: nn.Module, top1: float, data_dir: DataDir) -> ZooEntry:
    folder = find_data_dir(data_dir)
    model.load_state_dict(load_state(folder, name, "state_dict.pt"))
    return _with_example(
        name=name,
        description="CIFAR-10; conv-bn-relu, residual adds, option-A shortcuts (slice and pad)",
        model=model,
        reference_metric=top1,  # the mean of the published test_a and test_b, equal in size
        images=CifarSource(folder),
        preprocess=data.normalized,
    )


def _efficientnet_lite0(data_dir: DataDir) -> ZooEntry:
    folder = find_data_dir(data_dir)
    model = EfficientNetLite0()
    model.load_state_dict(load_state(folder, "efficientnet_lite0", "state_dict_fp16.pt"))
    return _with_example(
        name="efficientnet_lite0",
        description="ImageNet; depthwise, ReLU6, asymmetric padding, BN not folded; fragile",
        model=model,
        reference_metric=88.33,
        images=ImageNetSource(folder),
        preprocess=data.centred_127,
        augmented=True,
    )


def _mobilenetv2_folded(data_dir: DataDir) -> ZooEntry:
    folder = find_data_dir(data_dir)
    model = MobileNetV2Folded()
    stored = load_state(folder, "mobilenetv2_1.0_folded", "int8_weights.pt")
    model.load_state_dict(dequantized_state(stored))
    return _with_example(
        name="mobilenetv2_folded",
        description="ImageNet; BN folded; per-tensor int8 weights collapse; lossless per channel",
        model=model,
        reference_metric=87.0,
        images=ImageNetSource(folder),
        preprocess=data.minus_one_to_one,
        first_class=1,
        augmented=True,
    )


def _squeezenet1_1(data_dir: DataDir) -> ZooEntry:
    folder = find_data_dir(data_dir)
    model = SqueezeNet11()
    model.load_state_dict(load_state(folder, "squeezenet1_1", "state_dict_fp16.pt"))
    return _with_example(
        name="squeezenet1_1",
        description="ImageNet; plain convolutions, concatenations, no batch-norm",
        model=model,
        reference_metric=63.0,
        images=ImageNetSource(folder),
        preprocess=data.bgr_minus_mean,
        augmented=True,
    )


def _torchvision(
    name: str, data_dir: DataDir, weights: str | None, side: int | None, photos: bool
) -> ZooEntry:
    short = name.removeprefix(TORCHVISION_PREFIX)
    model = build(short, weights)
    segmentation = is_segmentation(short)
    trained = weights is not None and not segmentation  # the images have no labelled pixels
    images: ImageSource
    if trained and (side is not None or photos):
        raise ConfigError(
            f"side={side} and photos={photos} were given, but {name!r} with weights reads labelled"
            " photographs"
        )
    folder = _labelled_photographs(data_dir) if trained else None
    if folder is not None:
        images = ImageNetSource(folder)
    else:
        images = SyntheticSource(
            model=model,
            preprocess=data.normalized,
            side=side_of(short) if side is None else side,
            output=output_of(short),
            photos=find_data_dir(data_dir) if photos else None,
        )
        if weights is None:
            _make_realistic(model, [data.normalized(images.statistics_images())])
    origin = "seeded random weights" if weights is None else f"weights {weights!r}"
    pictures = "photographs" if folder is not None or photos else "seeded pictures"
    return _with_example(
        name=name,
        description=f"torchvision, {origin}, {pictures}"
        + ("; labels are its own FP32 classes" if folder is None else ""),
        model=model,
        reference_metric=100.0 if folder is None else None,
        images=images,
        preprocess=data.normalized if folder is None else _resized_to(side_of(short)),
        output=output_of(short),
        batch_size=10 if segmentation else 50,
    )


def _resized_to(side: int) -> Preprocess:
    """Inception takes 299 pixels, the photographs have 224."""
    return lambda images: data.normalized(resized(images, side))


def _labelled_photographs(data_dir: DataDir) -> Path | None:
    """The data folder; ``None`` where there is none and none was asked for."""
    try:
        return find_data_dir(data_dir)
    except DataNotFoundError:
        if data_dir is not None or os.environ.get(data.DATA_VARIABLE):
            raise
        return None


def _make_realistic(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give a fresh model, in place, the scales and statistics that training would leave."""
    realistic_layer_scales(model)
    realistic_residual_gains(model)
    with realistic_biased_layers(model):
        realistic_bn_statistics(model, inputs)


def _with_example(
    *,
    name: str,
    description: str,
    model: nn.Module,
    reference_metric: float | None,
    images: ImageSource,
    preprocess: Preprocess,
    first_class: int = 0,
    output: str = "",
    augmented: bool = False,
    batch_size: int = 50,
) -> ZooEntry:
    """An entry in eval mode whose example input is the first calibration image."""
    return ZooEntry(
        name=name,
        description=description,
        model=model.eval(),
        example_inputs=(preprocess(images.calibration_images(limit=1)),),
        reference_metric=reference_metric,
        images=images,
        preprocess=preprocess,
        first_class=first_class,
        output=output,
        augmented=augmented,
        batch_size=batch_size,
    )


_BUILDERS: dict[str, Callable[[DataDir], ZooEntry]] = {
    "digits": _digits,
    "resnet20_cifar10": _resnet20,
    "resnet56_cifar10": _resnet56,
    "efficientnet_lite0": _efficientnet_lite0,
    "mobilenetv2_folded": _mobilenetv2_folded,
    "squeezenet1_1": _squeezenet1_1,
}
