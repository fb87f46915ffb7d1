"""ResNet-20 and ResNet-56 for CIFAR-10, with parameter-free shortcuts.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2, option A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OptionAShortcut(nn.Module):
    """Halves height and width by slicing and pads the channels with zeros on both sides."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.pad = out_channels // 4

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C + 2 * pad, ceil(H / 2), ceil(W / 2))``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same_shape else OptionAShortcut(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNetCifar(nn.Module):
    """A stem, three stages of 16, 32 and 64 channels, global average pooling, a classifier.

    Args:
        blocks_per_stage: 3 for ResNet-20, 9 for ResNet-56 (depth is ``6 * blocks + 2``).
        num_classes: rows of the classifier.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    rest = [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet20_cifar10() -> ResNetCifar:
    """ResNet-20 for CIFAR-10, randomly initialised (0.27 M parameters)."""
    return ResNetCifar(blocks_per_stage=3)


def resnet56_cifar10() -> ResNetCifar:
    """ResNet-56 for CIFAR-10, randomly initialised (0.85 M parameters)."""
    return ResNetCifar(blocks_per_stage=9)
