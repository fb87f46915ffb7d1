"""Modules of graphs that ``fxquant.compat.fuse_fx`` gives: a layer and what is fused behind it."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and fused models have to be scriptable.
from torch import Tensor, nn


class FusedLayers(nn.Sequential):
    """A layer (``self[0]``) and the activations behind it, in order."""


class FusedSum(nn.Module):
    """``after(layer(x) + other)``.

    Attributes:
        layer: the layer whose result is added to.
        after: activations behind the sum, in order.
    """

    def __init__(self, layer: nn.Module, after: nn.Sequential) -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Layer, sum and activations of tensors of any shape that ``layer`` takes."""
        result: Tensor = self.after(self.layer(x) + other)
        return result
