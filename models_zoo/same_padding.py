"""Convolutions with TensorFlow's SAME padding, computed from the shape at run time.

Per spatial axis of size ``n``, kernel ``k``, stride ``s`` and dilation ``d``::

    total = max((ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
    before = total // 2,    after = total - before

so the output has ``ceil(n / s)`` positions. For stride 2 the padding is asymmetric, which the
``padding`` argument of a convolution cannot express, hence the explicit ``F.pad``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding_total(size: int, kernel: int, stride: int, dilation: int = 1) -> int:
    """The padding, both sides together, that keeps ``ceil(size / stride)`` output positions.

    The built-in ``max`` is called on an expression of ``size``, without a branch, so that a
    tracer which records ``max`` keeps it symbolic: the graph then stays right at other sizes.
    """
    return max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)


class Conv2dSame(nn.Conv2d):
    """A ``Conv2d`` whose padding follows the input's size; square kernel, stride and dilation.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: step of the kernel on both axes.
        groups: as of ``Conv2d``; equal to ``in_channels`` for a depthwise convolution.
        bias: whether a bias is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        kernel, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        high = same_padding_total(x.shape[-2], kernel, stride, dilation)
        wide = same_padding_total(x.shape[-1], kernel, stride, dilation)
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, self.bias, stride, 0, dilation, self.groups)
