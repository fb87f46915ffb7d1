"""float16 and bfloat16 for ops that are not quantized: what asks for it, and what can run so."""

from __future__ import annotations

from typing import Final

import torch

from fxquant.qconfig import QConfig, spec_of

HALF_DTYPES: Final = (torch.bfloat16, torch.float16)

NORMALIZATIONS: Final = frozenset({"batch_norm", "layer_norm", "group_norm"})
"""Their kernels take float32 parameters beside half inputs, so statistics lose nothing."""

_PRODUCTS: Final = (
    *(f"{name}{d}d" for name in ("conv", "conv_transpose") for d in (1, 2, 3)),
    *("linear", "bilinear", "matmul", "bmm"),
)
_ELEMENTWISE: Final = (
    *("add", "sub", "mul", "div", "cat", "stack", "relu", "relu6", "hardtanh", "clamp"),
    *("clamp_min", "clamp_max", "leaky_relu", "elu", "hardswish", "hardsigmoid", "silu", "mish"),
    *("gelu", "sigmoid", "tanh", "softmax", "prelu"),
)
_POOLING: Final = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "mean"),
)
_MOVING: Final = (
    *("pad", "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("chunk", "split", "tensor_split", "select", "narrow", "slice", "contiguous", "detach"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)

HALF_KINDS: Final = frozenset({*_PRODUCTS, *_ELEMENTWISE, *_POOLING, *_MOVING, *NORMALIZATIONS})
"""The kinds that PyTorch's CPU kernels compute in both dtypes; ``avg_pool3d`` has no such kernel.

The result is rounded once, but for float16 transposed convolutions, which add up their taps in half
precision, and ``bilinear`` and ``adaptive_avg_pool3d``, which round twice (checked by the tests).
"""


def half_dtype(qconfig: QConfig | None) -> torch.dtype | None:
    """float16 or bfloat16 where a qconfig asks an op to run in it, else ``None``.

    It does when its activation is a static float spec, and its weight is of the same dtype or left
    open (``None``, a no-op observer).
    """
    if qconfig is None:
        return None
    activation, weight = spec_of(qconfig.activation), spec_of(qconfig.weight)
    spec = None if activation is None else activation.spec
    if spec is None or spec.is_dynamic or spec.dtype not in HALF_DTYPES:
        return None
    wanted = None if weight is None else weight.spec
    return spec.dtype if wanted is None or wanted.dtype is spec.dtype else None
