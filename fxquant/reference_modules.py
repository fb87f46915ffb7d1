"""Modules of reference graphs: the float weight, and the parameters that it is rounded by.

::

    y = conv(x; dequantize(quantize(W)))                Reference of nn.Conv2d and its like

The weight stays in floating point, in the state dict too; its integers are those that kernels read.
"""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and reference models have to be scriptable.
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fxquant.qat_modules import (
    QatConv1d,
    QatConv2d,
    QatConv3d,
    QatConvTranspose1d,
    QatConvTranspose2d,
    QatConvTranspose3d,
    QatEmbedding,
    QatEmbeddingBag,
    QatLinear,
    QatModule,
    recast,
)
from fxquant.specs import QParams, QuantSpec

_PUBLIC: Final = ("weight_qscheme", "weight_dtype")
_LIKE_TORCH: Final = {torch.int8: torch.qint8, torch.uint8: torch.quint8}
_PLAIN_SCHEMES: Final = {
    torch.per_tensor_symmetric: torch.per_tensor_affine,
    torch.per_channel_symmetric: torch.per_channel_affine,
}


class ReferenceModule(QatModule):
    """Base of the modules of this file.

    Attributes:
        weight_scale: float32, 0-d or ``[C]``; of a float16 weight 1.
        weight_zero_point: of the same shape.
        weight_axis: of the channels, int32, 0-d.
        weight_qscheme: that of a quantized tensor of torch; ``None`` for float16.
        weight_dtype: that of a quantized tensor of torch (``qint8``).
        weight_quant_min: smallest integer.
        weight_quant_max: largest integer.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations
        weight_qscheme: Any
        weight_dtype: Any

    weight_quant_min: int
    weight_quant_max: int
    storage: torch.dtype
    is_half: bool
    axis: int | None

    def stored_weight(self) -> Tensor:
        """The integers, or float16 values, that kernels read."""
        weight: Tensor = self.weight
        if self.is_half:
            limit = 65504.0  # the largest float16
            return weight.clamp(-limit, limit).to(torch.float16)
        scale, zero_point = self.weight_scale, self.weight_zero_point
        low, high = self.weight_quant_min, self.weight_quant_max
        integers: Tensor = torch.ops.fxquant.quantize(
            weight, scale, zero_point, low, high, self.storage, self.axis
        )
        return integers

    def _rounded_weight(self) -> Tensor:
        stored = self.stored_weight()
        if self.is_half:
            return stored.to(torch.float32)
        scale, zero_point = self.weight_scale, self.weight_zero_point
        rounded: Tensor = torch.ops.fxquant.dequantize(stored, scale, zero_point, self.axis)
        return rounded

    def _get_name(self) -> str:
        return f"Quantized{self.float_type.__name__}(Reference)"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _PUBLIC:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in _PUBLIC:
            if prefix + name in state_dict:
                setattr(self, name, state_dict.pop(prefix + name))
        for name in ("weight_scale", "weight_zero_point", "weight_axis"):
            value = state_dict.get(prefix + name)
            if value is not None and self._buffers[name] is None:
                self._buffers[name] = value.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ReferenceConv1d(ReferenceModule, QatConv1d):
    """``nn.Conv1d`` with a quantized weight."""


class ReferenceConv2d(ReferenceModule, QatConv2d):
    """``nn.Conv2d`` with a quantized weight."""


class ReferenceConv3d(ReferenceModule, QatConv3d):
    """``nn.Conv3d`` with a quantized weight."""


class ReferenceConvTranspose1d(ReferenceModule, QatConvTranspose1d):
    """``nn.ConvTranspose1d`` with a quantized weight."""


class ReferenceConvTranspose2d(ReferenceModule, QatConvTranspose2d):
    """``nn.ConvTranspose2d`` with a quantized weight."""


class ReferenceConvTranspose3d(ReferenceModule, QatConvTranspose3d):
    """``nn.ConvTranspose3d`` with a quantized weight."""


class ReferenceLinear(ReferenceModule, QatLinear):
    """``nn.Linear`` with a quantized weight."""


class ReferenceEmbedding(ReferenceModule, QatEmbedding):
    """``nn.Embedding`` with a quantized table."""


class ReferenceEmbeddingBag(ReferenceModule, QatEmbeddingBag):
    """``nn.EmbeddingBag`` with a quantized table."""


class ReferenceRelu(nn.Sequential):
    """A reference module (``self[0]``) and the relu behind it, that were fused."""


_CLASSES: tuple[type[ReferenceModule], ...] = (
    ReferenceConv1d,
    ReferenceConv2d,
    ReferenceConv3d,
    ReferenceConvTranspose1d,
    ReferenceConvTranspose2d,
    ReferenceConvTranspose3d,
    ReferenceLinear,
    ReferenceEmbedding,
    ReferenceEmbeddingBag,
)
REFERENCE_BY_FLOAT: dict[type[nn.Module], type[ReferenceModule]] = {
    kind.float_type: kind for kind in _CLASSES
}
"""Float module -> the module of this file that stands for it in reference graphs."""


def reference_form(module: nn.Module, spec: QuantSpec, qparams: QParams | None) -> ReferenceModule:
    """The module of this file that computes ``module`` with a quantized weight.

    Args:
        module: of a class in :data:`REFERENCE_BY_FLOAT`; its parameters are not copied.
        spec: of the weight.
        qparams: of the weight; ``None`` where it is in float16.
    """
    made = recast(module, REFERENCE_BY_FLOAT[type(module)])
    made.weight_fake_quant = None
    made.is_half = qparams is None
    scale = torch.tensor(1.0) if qparams is None else qparams.scale.clone()
    zero_point = torch.tensor(0, dtype=torch.int32)
    zero_point = zero_point if qparams is None else qparams.zero_point.clone()
    made.register_buffer("weight_scale", scale)
    made.register_buffer("weight_zero_point", zero_point)
    axis = spec.ch_axis if spec.is_per_channel else None
    made.axis = axis
    made.register_buffer("weight_axis", torch.tensor(axis or 0, dtype=torch.int32))
    made.storage = spec.dtype
    made.weight_qscheme = None
    made.weight_dtype = spec.dtype
    made.weight_quant_min, made.weight_quant_max = spec.quant_min, spec.quant_max
    if qparams is not None:
        made.weight_qscheme = _PLAIN_SCHEMES.get(spec.qscheme, spec.qscheme)
        four_bits = spec.has_float_zero_point and spec.levels == 16
        made.weight_dtype = torch.quint4x2 if four_bits else _LIKE_TORCH[spec.dtype]
    return made
