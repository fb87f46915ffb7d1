"""Models of torchvision for classification and segmentation, trained or with seeded weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.errors import CaptureError, ConfigError, Diagnostics, did_you_mean
from fxquant.models_zoo.data import ImageNetSource, Preprocess, batch_slices
from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.op_view import kind_of

_WEIGHT_SEED = 0
_SIDE = 224
_SEGMENTATION_SIDE = 128  # their backbones are dilated: every pixel costs as 16 elsewhere
_STATISTICS_COUNT = 32
_RESIDUAL_GAIN = 0.25
_SIDES: Mapping[str, int] = {"inception_v3": 299}
# Said, since leaving it out makes torchvision warn that it will be said some day.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    name: {"init_weights": True} for name in ("googlenet", "inception_v3")
}
_SEGMENTATION_OUTPUT = "out"


def build(name: str, weights: str | None = None) -> nn.Module:
    """A model of torchvision for classification or segmentation, in eval mode.

    Args:
        name: as torchvision lists it, such as ``"resnet18"``.
        weights: None for random weights from a fixed seed, else the name of trained weights such
            as ``"DEFAULT"``, which torchvision downloads or takes from its cache.

    Raises:
        ConfigError: torchvision has no such model, or no such weights for it.
        MissingDependencyError: torchvision is not installed.
    """
    models = import_torchvision().models
    segmentation = _segmentation_models(models)
    known = [*models.list_models(module=models), *segmentation]
    if name not in known:
        raise ConfigError(
            "torchvision has no classification or segmentation model"
            f" {name!r}{did_you_mean(name, known)}"
        )
    choices = ("DEFAULT", *models.get_model_weights(name).__members__)
    if weights is not None and weights not in choices:
        raise ConfigError(
            f"{name!r} has no weights {weights!r} in torchvision; it has {', '.join(choices)}"
        )
    options = dict(_OPTIONS.get(name, {})) if weights is None else {}
    if name in segmentation and weights is None:
        options["weights_backbone"] = None  # else torchvision downloads trained ones
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        model: nn.Module = models.get_model(name, weights=weights, **options)
    return model.eval()


def is_segmentation(name: str) -> bool:
    """Whether torchvision has ``name`` for segmentation: such models return a dict."""
    return name in _segmentation_models(import_torchvision().models)


def side_of(name: str) -> int:
    """Height and width of the pictures that ``name`` is shown, in pixels."""
    return _SIDES.get(name, _SEGMENTATION_SIDE if is_segmentation(name) else _SIDE)


def output_of(name: str) -> str:
    """The key of the output that counts, or nothing for a model that returns a tensor."""
    return _SEGMENTATION_OUTPUT if is_segmentation(name) else ""


def _segmentation_models(models: ModuleType) -> list[str]:
    found: list[str] = models.list_models(module=models.segmentation)
    return found


def logit_rows(output: Any, key: str = "") -> Tensor:
    """What a model returned, as one row of logits for every thing that it classifies.

    Args:
        output: logits ``(N, classes)`` or ``(N, classes, H, W)``, or a dict of such.
        key: of the dict; empty where there is none.

    Returns:
        ``(N, classes)``, or ``(N * H * W, classes)``: a row for every pixel.
    """
    logits: Tensor = output[key] if key else output
    return logits if logits.dim() == 2 else logits.movedim(1, -1).reshape(-1, logits.shape[1])


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


@contextmanager
def realistic_biased_layers(model: nn.Module) -> Iterator[None]:
    """Rescale every convolution and linear that has a bias, in place, at its first call inside.

    ``Wx + b -> (Wx + b - m) / s`` with ``m`` the mean of each output channel and ``s`` the standard
    deviation of the layer's outputs without those means: what a batch-norm does where one follows.
    A fresh network without batch-norms shrinks its signal from layer to layer until biases drown
    it, and one with them ends in logits that are nearly the same for every picture: then noise is
    measured against a constant.

    Source: Krähenbühl et al. 2016, "Data-dependent Initializations of Convolutional Neural
    Networks", section 3.1.
    """
    done: set[int] = set()

    def rescale(layer: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        weight, bias = layer.weight, layer.bias
        if id(layer) in done or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            return None
        done.add(id(layer))
        channels = output.movedim(1 if output.dim() == 4 and weight.dim() == 4 else -1, 0)
        mean = channels.flatten(1).mean(1)
        spread = (channels.flatten(1) - mean[:, None]).std().clamp_min(1e-6)
        with torch.no_grad():
            weight.div_(spread)
            bias.sub_(mean).div_(spread)
        shape = (-1, 1, 1) if weight.dim() == 4 else (-1,)
        return (output - mean.reshape(shape)) / spread

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(rescale) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def realistic_residual_gains(model: nn.Module) -> None:
    """Scale the last batch-norm of every residual branch beside a shortcut by 1/4, in place.

    Training leaves such branches small against what they are added to. A fresh network has both
    alike, and then amplifies any difference from block to block: a hundred times from picture to
    picture, and rounding noise with it.

    Source: Zhang et al. 2019, "Fixup Initialization: Residual Learning Without Normalization",
    section 2, on why.
    """
    silent = Diagnostics(silent=True)
    try:
        graph = capture(model, silent, share=True)
    except CaptureError:
        return  # it cannot be quantized either, which prepare_fx will say
    for node in graph.graph.nodes:
        if (kind := kind_of(graph, node)) is None or kind.name != "add":
            continue
        kinds = {source: kind_of(graph, source) for source in node.all_input_nodes}
        norms = [n for n, k in kinds.items() if k is not None and k.name == "batch_norm"]
        if len(norms) == 1 and norms[0].op == "call_module":  # two: there is no shortcut
            weight = model.get_submodule(str(norms[0].target)).weight
            if isinstance(weight, Tensor):
                with torch.no_grad():
                    weight.mul_(_RESIDUAL_GAIN)


def realistic_layer_scales(model: nn.Module) -> None:
    """Set the layer scales of ConvNeXt and its like to seeded values between 0.1 and 1, in place.

    A fresh model has 1e-6, which switches its blocks off: whatever they compute would be right.
    """
    generator = torch.Generator().manual_seed(_WEIGHT_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "layer_scale":
                parameter.uniform_(0.1, 1.0, generator=generator)


def seeded_images(count: int, *, seed: int, side: int = _SIDE) -> Tensor:
    """Smooth random pictures, the same for the same seed.

    Noise of several grid sizes, each upsampled and added, so that, as in photographs, coarse
    structure is stronger than fine. Every picture then gets the same mean and contrast, as a camera
    exposes: a few pictures far brighter than all that a network was calibrated on would decide
    every figure.

    Returns:
        uint8 ``(count, 3, side, side)``.
    """
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(count, 3, side, side)
    for grid in (2, 4, 8, 16, 32):
        noise = torch.randn(count, 3, grid, grid, generator=generator) * (2.0 / grid) ** 0.5
        picture += F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    spread, mean = torch.std_mean(picture, dim=(1, 2, 3), keepdim=True)
    return (128 + 56 * (picture - mean) / spread).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """Pictures, labelled with the classes that the FP32 model gives them.

    Top-1 on them is the agreement with the FP32 model, and 100 % for that model itself.

    Attributes:
        model: the FP32 model.
        preprocess: makes its inputs.
        side: height and width of the pictures.
        output: key of the output that counts; empty where the model returns a tensor.
        calibration_count: pictures to calibrate on.
        evaluation_count: other pictures to judge by.
        photos: data folder whose ImageNet sample the pictures are, resized; ``None`` is for seeded
            ones.
    """

    model: nn.Module
    preprocess: Preprocess
    side: int = _SIDE
    output: str = ""
    calibration_count: int = 50
    evaluation_count: int = 100
    photos: Path | None = None

    def calibration_images(self, limit: int | None = None) -> Tensor:
        """Seeded pictures, or the first photographs of ``calib``."""
        if self.photos is None:
            return seeded_images(self.calibration_count, seed=0, side=self.side)[:limit]
        count = self.calibration_count if limit is None else min(limit, self.calibration_count)
        return photographs(self.photos, "calib", count, self.side)

    def evaluation_images(self) -> tuple[Tensor, Tensor]:
        """Other pictures, and the FP32 model's classes, of pixels for segmentation."""
        if self.photos is None:
            images = seeded_images(self.evaluation_count, seed=1, side=self.side)
        else:
            images = photographs(self.photos, "test_a", self.evaluation_count, self.side)
        with torch.no_grad():
            labels = [
                self._classes(self.model(self.preprocess(images[part])))
                for part in batch_slices(len(images), 50)
            ]
        return images, torch.cat(labels)

    def statistics_images(self) -> Tensor:
        """Pictures whose statistics the batch-norms of a seeded network hold.

        Photographs are those of the calibration, as a trained network has seen their like.
        """
        if self.photos is None:
            return seeded_images(_STATISTICS_COUNT, seed=2, side=self.side)
        return photographs(self.photos, "calib", _STATISTICS_COUNT, self.side)

    def _classes(self, output: Any) -> Tensor:
        logits: Tensor = output[self.output] if self.output else output
        return logits.argmax(dim=1)


def photographs(data_dir: Path, part: str, count: int, side: int) -> Tensor:
    """The first pictures of the ImageNet sample, resized.

    Args:
        data_dir: the data folder.
        part: ``calib`` or ``test_a``.
        count: how many.
        side: height and width wanted.

    Returns:
        uint8 ``(count, 3, side, side)``.

    Raises:
        DataNotFoundError: the sample is not there.
    """
    return resized(ImageNetSource(data_dir).read(part, count)[0], side)


def resized(images: Tensor, side: int) -> Tensor:
    """Square uint8 pictures ``(N, C, H, H)`` as ``(N, C, side, side)``."""
    if images.shape[-1] == side:
        return images
    made = F.interpolate(
        images.float(), size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return made.round().clamp(0, 255).to(torch.uint8)
