"""SqueezeNet 1.1: plain convolutions and concatenations, no batch-norm.

Source: Iandola et al., "SqueezeNet" (2016), figure 2, in the v1.1 layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fire(nn.Module):
    """``s = relu(squeeze(x)); cat(relu(expand1x1(s)), relu(expand3x3(s)))``."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.squeeze_act = nn.ReLU()
        self.expand1x1_act = nn.ReLU()
        self.expand3x3_act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, 2 * expand, H, W)``."""
        x = self.squeeze_act(self.squeeze1x1(x))
        narrow = self.expand1x1_act(self.expand1x1(x))
        wide = self.expand3x3_act(self.expand3x3(x))
        return torch.cat([narrow, wide], dim=1)


class SqueezeNet11(nn.Module):
    """Stem, eight fire modules with three max-pools between them, a 1x1 classifier.

    Args:
        num_classes: output channels of the last convolution.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.fire2 = Fire(64, 16, 64)
        self.fire3 = Fire(128, 16, 64)
        self.pool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.fire4 = Fire(128, 32, 128)
        self.fire5 = Fire(256, 32, 128)
        self.pool5 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.fire6 = Fire(256, 48, 192)
        self.fire7 = Fire(384, 48, 192)
        self.fire8 = Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)
        self.conv10 = nn.Conv2d(512, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)``, channels BGR, to logits ``(N, num_classes)``."""
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool3(self.fire3(self.fire2(x)))
        x = self.pool5(self.fire5(self.fire4(x)))
        x = self.fire9(self.fire8(self.fire7(self.fire6(x))))
        x = F.relu(self.conv10(x))
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
