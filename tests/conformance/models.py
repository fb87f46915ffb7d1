"""Small models to compare on, written where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Calls(nn.Module):
    """A model of one function of its parts and its input, in evaluation mode.

    Args:
        function: ``(self, x) -> result``.
        parts: its modules, parameters and plain attributes; tensors become buffers.
    """

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function
        lively(self).eval()

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


class CallsTwo(Calls):
    """The same of two inputs."""

    def forward(self, x: Any, y: Any) -> Any:
        return self.function(self, x, y)


class CallsWithOptions(Calls):
    """The same of an input, one that may be left out, and one by keyword only."""

    def forward(self, x: Any, y: Any = None, *, z: Any = None) -> Any:
        return self.function(self, x, y, z)


def lively(model: nn.Module) -> nn.Module:
    """Statistics and factors of batch-norms that change something."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 2.0, generator=generator)
                module.bias.normal_(generator=generator)
    return model


def conv(inputs: int = 3, outputs: int = 3, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution of images with random weights."""
    return nn.Conv2d(inputs, outputs, kernel, **options)


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    """A linear with random weights."""
    return nn.Linear(inputs, outputs)


def images(*shape: int) -> Tensor:
    """Random images, ``[2, 3, 8, 8]`` by default."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape or (2, 3, 8, 8), generator=generator)
