"""The activation functions that can be the epilogue of another op, by the names patterns use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CLAMPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "relu": ("relu",),
        "relu6": ("relu6",),
        "hardtanh": ("hardtanh",),
        "clamp": ("clamp", "clamp_min", "clamp_max"),
    }
)
"""Name -> kinds whose result is the input cut off at constants: saturation can give it for free."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict(CLAMPS)
    | {name: (name,) for name in ("leaky_relu", "hardswish", "silu", "gelu", "sigmoid", "tanh")}
)
"""Name -> kinds of all element-wise functions that follow a convolution or a linear."""
