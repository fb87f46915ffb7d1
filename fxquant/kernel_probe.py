"""Which engine computes exactly on this CPU: asked of the kernels, not of a list of CPUs.

Without VNNI the int8 kernels add pairs of products in 16 bits and saturate; ``fbgemm``'s depthwise
kernel saturates even with VNNI. The probe multiplies the largest integers and compares with the
exact sum.
"""

from __future__ import annotations

import functools

import torch

from fxquant.engines import available, consume_deprecation_warning, engine
from fxquant.errors import LoweringError
from fxquant.specs import QuantSpec

_PREFERRED: dict[str, tuple[str, ...]] = {
    "conv": ("onednn", "fbgemm"),
    "grouped": ("onednn", "fbgemm"),
    "depthwise": ("onednn", "fbgemm"),
    "linear": ("fbgemm", "onednn"),
}
"""Fastest first, measured on AVX512-VNNI (conv2d 64x64x3x3 at 56x56: 248 us against 419; linear
1280x1000: 22 us against 31)."""


@functools.cache
def exact_engine(form: str) -> str:
    """The fastest engine that computes ``form`` exactly here; the first available one if none does.

    Args:
        form: ``conv``, ``grouped``, ``depthwise`` or ``linear``.

    Raises:
        LoweringError: this build of torch has neither engine.
    """
    candidates = engines_for(form)
    return next((name for name in candidates if is_exact(form, name)), candidates[0])


def engines_for(form: str) -> tuple[str, ...]:
    """The engines of this build of torch that run ``form`` on x86, fastest first.

    Args:
        form: ``conv``, ``grouped``, ``depthwise`` or ``linear``.

    Raises:
        LoweringError: there is none.
    """
    candidates = tuple(name for name in _PREFERRED[form] if available(name))
    if not candidates:
        raise LoweringError(
            f"this build of torch has none of the engines {_PREFERRED[form]} that run {form} in"
            f" int8 (it has {torch.backends.quantized.supported_engines}); use target='reference'"
        )
    return candidates


@functools.cache
def is_exact(form: str, engine_name: str) -> bool:
    """Whether ``engine_name`` computes ``form`` without saturating on the largest integers.

    Args:
        form: ``conv``, ``grouped``, ``depthwise`` or ``linear``.
        engine_name: an engine of this build of torch.
    """
    consume_deprecation_warning()
    channels = 64
    depth = {"depthwise": 1, "grouped": 4}.get(form, channels)
    taps = 1 if form == "linear" else 9
    # Larger than the kernel, and padded: fbgemm has a fast path for such depthwise convolutions.
    source = torch.full((1, channels) if form == "linear" else (1, channels, 5, 5), 255.0)
    shape = (channels, depth) if form == "linear" else (channels, depth, 3, 3)
    weight = torch._make_per_tensor_quantized_tensor(
        torch.full(shape, 127, dtype=torch.int8), 1.0, 0
    )
    x = torch.quantize_per_tensor(source, 1.0, 0, torch.quint8)
    scale = 255 * 127 * depth * taps / 200.0  # the exact sum is the integer 200
    with engine(engine_name):
        if form == "linear":
            packed = torch.ops.quantized.linear_prepack(weight, None)
            result = torch.ops.quantized.linear(x, packed, scale, 0)
        else:
            packed = torch.ops.quantized.conv2d_prepack(
                weight, None, [1, 1], [1, 1], [1, 1], channels // depth
            )
            result = torch.ops.quantized.conv2d.new(x, packed, scale, 0)[:, :, 1:-1, 1:-1]
    return bool((result.int_repr() == 200).all())


def dynamic_quant_max(spec: QuantSpec, engine_name: str = "") -> int:
    """The largest integer for activations that the linear kernels quantize at run time.

    Where they saturate on this CPU (no VNNI), half of the range, which with weights within
    ``-127..127`` cannot overflow; else that of ``spec``.

    Args:
        spec: of the activations.
        engine_name: whose kernels; empty for those that are run unless others are faster.
    """
    if is_exact("linear", engine_name or exact_engine("linear")):
        return spec.quant_max
    return min(spec.quant_max, 127)
