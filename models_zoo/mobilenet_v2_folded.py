"""MobileNetV2 1.0 with its batch-norms already folded into biased convolutions.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fxquant.models_zoo.same_padding import Conv2dSame

# (expansion, output channels, repeats, stride of the first block)
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand 1x1 and ReLU6, depthwise 3x3 and ReLU6, linear 1x1, and the input where it fits."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand = nn.Conv2d(in_channels, hidden, 1)
            self.expand_act = nn.ReLU6()
        self.depthwise = Conv2dSame(hidden, hidden, 3, stride=stride, groups=hidden)
        self.depthwise_act = nn.ReLU6()
        self.project = nn.Conv2d(hidden, out_channels, 1)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        out: Tensor = x
        if self.expands:
            out = self.expand_act(self.expand(out))
        out = self.depthwise_act(self.depthwise(out))
        out = self.project(out)
        return out + x if self.adds else out


class MobileNetV2Folded(nn.Module):
    """Stem, 17 inverted residuals, a 1x1 head, global mean, classifier (3.5 M parameters).

    Args:
        num_classes: rows of the classifier; 1001 with TensorFlow's background class at index 0.
    """

    def __init__(self, num_classes: int = 1001) -> None:
        super().__init__()
        self.stem = Conv2dSame(3, 32, 3, stride=2)
        self.stem_act = nn.ReLU6()
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, out_channels, repeats, first_stride in _STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(channels, 1280, 1)
        self.head_act = nn.ReLU6()
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``, background first."""
        x = self.stem_act(self.stem(x))
        x = self.blocks(x)
        x = self.head_act(self.head(x))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def dequantized_state(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float state dict of a file that holds int8 weights with a scale per output channel.

    ``L.weight = L.weight_int8 * L.scale`` along axis 0, ``L.bias`` as it is.

    Args:
        stored: keys ``L.weight_int8`` (int8, O x I x H x W or O x I), ``L.scale`` (O), ``L.bias``.
    """
    state: dict[str, Tensor] = {}
    for key, value in stored.items():
        layer, _, field = key.rpartition(".")
        if field == "bias":
            state[key] = value.float()
        elif field == "weight_int8":
            scale = stored[f"{layer}.scale"].reshape(-1, *([1] * (value.dim() - 1)))
            state[f"{layer}.weight"] = value.float() * scale
    return state
