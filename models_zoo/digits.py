"""The embedded demo: a small depthwise-separable net on scikit-learn's handwritten digits.

The digits are 8x8; they are upsampled to 32x32, so that the convolutions do real work and the
net's time goes into 3x3 and 1x1 convolutions of 32 to 128 channels, as in deployed networks. The
weights are in the package; the images come with scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import DataNotFoundError
from fxquant.models_zoo._optional import require

WEIGHTS = Path(__file__).parent / "weights" / "digits.safetensors"
"""The trained weights, written by ``python -m fxquant.models_zoo.train_digits``."""

REFERENCE_TOP1 = 99.33
"""FP32 top-1 of the trained weights on the held-out split, in percent."""

_SIDE = 32
_TEST_EVERY = 3  # every third image is held out
_CALIBRATION_COUNT = 200


class ConvBn(nn.Module):
    """A convolution without bias and its batch-norm, size kept at stride 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H', W')``."""
        out: Tensor = self.bn(self.conv(x))
        return out


class SeparableBlock(nn.Module):
    """``relu6(pointwise(relu6(depthwise(x))) + x)``, without ``+ x`` where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvBn(in_channels, in_channels, 3, stride=stride, groups=in_channels)
        self.depthwise_act = nn.ReLU6()
        self.pointwise = ConvBn(in_channels, out_channels, 1)
        self.act = nn.ReLU6()
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        out = self.pointwise(self.depthwise_act(self.depthwise(x)))
        if self.adds:
            out = out + x
        activated: Tensor = self.act(out)
        return activated


class DigitsNet(nn.Module):
    """Stem, a strided 3x3 convolution, four separable blocks (two residual), a classifier.

    72 thousand values, 14 million multiply-adds an image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(1, 32, 3)
        self.stem_act = nn.ReLU6()
        self.down = ConvBn(32, 64, 3, stride=2)
        self.down_act = nn.ReLU6()
        self.blocks = nn.Sequential(
            SeparableBlock(64, 64),
            SeparableBlock(64, 128),
            SeparableBlock(128, 128),
            SeparableBlock(128, 128, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 1, 32, 32)`` to logits ``(N, 10)``."""
        x = self.stem_act(self.stem(x))
        x = self.down_act(self.down(x))
        x = torch.flatten(self.pool(self.blocks(x)), 1)
        logits: Tensor = self.classifier(x)
        return logits


def digits_net_trained() -> DigitsNet:
    """The net with its trained weights, in eval mode.

    Raises:
        DataNotFoundError: the weight file is not in the package.
        MissingDependencyError: safetensors is not installed.
    """
    if not WEIGHTS.is_file():
        raise DataNotFoundError(
            f"{WEIGHTS} is missing from the package; reinstall fxquant, or make the file with: "
            "python -m fxquant.models_zoo.train_digits"
        )
    safetensors = require(
        "safetensors.torch", distribution="safetensors", purpose="the model 'digits'"
    )
    net = DigitsNet()
    net.load_state_dict(safetensors.load_file(WEIGHTS))
    return net.eval()


def example_input() -> Tensor:
    """A seeded input ``(1, 1, 32, 32)`` in the range of the images; needs no scikit-learn."""
    return torch.rand(1, 1, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def upsampled(images: Tensor) -> Tensor:
    """uint8 ``(N, 1, 8, 8)`` with values 0..16 to float ``(N, 1, 32, 32)`` in -1..1, bilinear."""
    enlarged = F.interpolate(
        images.float(), size=(_SIDE, _SIDE), mode="bilinear", align_corners=False
    )
    return enlarged / 8 - 1


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 digits: every third is held out (599), the others are for training (1,198)."""

    def calibration_images(self, limit: int | None = None) -> Tensor:
        """The first 200 training images."""
        images, _ = self.training_images()
        return images[:_CALIBRATION_COUNT][:limit]

    def evaluation_images(self) -> tuple[Tensor, Tensor]:
        """The held-out images and their labels."""
        images, labels = _all_digits()
        return images[::_TEST_EVERY], labels[::_TEST_EVERY]

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Everything but the held-out images."""
        images, labels = _all_digits()
        kept = torch.arange(len(labels)) % _TEST_EVERY != 0
        return images[kept], labels[kept]


def _all_digits() -> tuple[Tensor, Tensor]:
    datasets = require("sklearn.datasets", distribution="scikit-learn", purpose="the digits images")
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(bunch.target).to(torch.int64)
