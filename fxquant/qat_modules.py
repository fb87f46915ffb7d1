"""Modules that train with rounded weights: what quantization-aware training computes.

::

    y = conv(x; Q(W))                                   QatConv2d and its like
    y = BN(conv(x; Q(W * f)) / f + b)                   QatConvBn2d, QatLinearBn1d and their like

``Q`` is the weight's fake quantizer (``weight_fake_quant``), and ``f = g / sqrt(v + eps)`` is what
folding the batch-norm will multiply the weight by: what is rounded is the weight that will be kept.
``f`` is computed from the *running* variance, and dividing by it again leaves the batch-norm
to normalise with the statistics of the batch, as without quantization. Source: Krishnamoorthi 2018
(arXiv:1806.08342), section 3.2.2; Jacob et al. 2018 (arXiv:1712.05877), section 3.2.

Each is a subclass of the float module that it stands for, with its parameters, attributes and hooks
(:func:`training_form`), and gives it back with :meth:`QatModule.to_float`.
"""

# ruff: noqa: A002  # parameters have the names they have in torch.nn
# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import copy
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.observers.factory import WithArgs
from fxquant.specs import QParams, QuantSpec

Made = TypeVar("Made", bound=nn.Module)


class QatModule(nn.Module):
    """Base of the modules of this file.

    Attributes:
        weight_fake_quant: rounds the weight; ``None`` where it trains as it is.
    """

    float_type: ClassVar[type[nn.Module]]

    if TYPE_CHECKING:  # TorchScript would read annotations, and any comment about types
        weight_fake_quant: Any
        weight: Any
        groups: Any
        _conv_forward: Any
        _transposed: Any

    def _rounded_weight(self) -> Tensor:
        weight: Tensor = self.weight
        if self.weight_fake_quant is not None:
            weight = self.weight_fake_quant(weight)
        return weight

    @torch.jit.unused
    def final_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of :meth:`to_float`, the weight not rounded."""
        return self.weight, getattr(self, "bias", None)

    @torch.jit.unused
    def to_float(self) -> nn.Module:
        """The float module of the same function, its weight not rounded; shares nothing new."""
        weight, bias = self.final_parameters()
        made = recast(self, self.float_type)
        made._modules.clear()
        made._parameters["weight"] = _like_parameter(weight, self.weight)
        if "bias" in made._parameters:
            made._parameters["bias"] = None if bias is None else _like_parameter(bias, self.weight)
        return made


def recast(module: nn.Module, to: type[Made]) -> Made:
    """``module`` as another class, with registries of its own and the same tensors in them."""
    made = to.__new__(to)
    for name, value in vars(module).items():
        made.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    return made


def _like_parameter(value: Tensor, like: Any) -> nn.Parameter:
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach(), requires_grad=bool(like.requires_grad))


# -- with a batch-norm inside ---------------------------------------------------------------------


class QatBatchNormed(QatModule):
    """Base of the modules with a batch-norm (``bn``) behind.

    Attributes:
        bn: the batch-norm.
        freeze_bn: it keeps its running statistics, and normalises with them, while all else trains.
    """

    if TYPE_CHECKING:
        bn: Any
        bias: Any
        freeze_bn: bool

    def train(self, mode: bool = True) -> "QatBatchNormed":
        """Set training mode; a frozen batch-norm stays in evaluation."""
        super().train(mode)
        if self.freeze_bn:
            self.bn.eval()
        return self

    def freeze_bn_stats(self) -> None:
        """Normalise with the running statistics and leave them as they are; for late epochs."""
        self.freeze_bn = True
        self.bn.eval()

    def update_bn_stats(self) -> None:
        """Undo :meth:`freeze_bn_stats`."""
        self.freeze_bn = False
        self.bn.train(self.training)

    def _deviation(self) -> Tensor:
        variance = self.bn.running_var
        assert variance is not None
        return torch.sqrt(variance + self.bn.eps)

    def _factor(self) -> Tensor:
        """What folding multiplies each output channel by, shape ``[C]``; 0 where gamma is."""
        deviation = self._deviation()
        gamma: Tensor = torch.ones_like(deviation) if self.bn.weight is None else self.bn.weight
        return gamma / deviation

    def _divisor(self) -> Tensor:
        """:meth:`_factor` without its zeros: a channel of gamma 0 is rounded as with gamma 1."""
        factor = self._factor()
        return torch.where(factor == 0, torch.ones_like(factor) / self._deviation(), factor)

    def _normalized(self, scaled: Tensor, divisor: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (scaled.dim() - 2)
        plain = scaled / divisor.reshape(shape)
        if self.bias is not None:
            plain = plain + self.bias.reshape(shape)
        normalized: Tensor = self.bn(plain)
        return normalized

    def _spread(self, factor: Tensor) -> Tensor:
        """``factor`` shaped to multiply the weight along its output channels."""
        return factor.reshape([-1] + [1] * (self.weight.dim() - 1))

    @torch.jit.unused
    def final_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The folded ones: ``W * f`` and ``(b - m) * f + beta``."""
        with torch.no_grad():
            factor = torch.rsqrt(self.bn.running_var + self.bn.eps)
            if self.bn.weight is not None:
                factor = self.bn.weight * factor
            shift = -self.bn.running_mean if self.bias is None else self.bias - self.bn.running_mean
            bias = shift * factor
            if self.bn.bias is not None:
                bias = bias + self.bn.bias
            return self.weight * self._spread(factor), bias


def freeze_bn_stats(module: nn.Module) -> None:
    """For ``model.apply(freeze_bn_stats)``: batch-norms trained fused keep their statistics."""
    if isinstance(module, QatBatchNormed):
        module.freeze_bn_stats()


def update_bn_stats(module: nn.Module) -> None:
    """For ``model.apply(update_bn_stats)``: undo :func:`freeze_bn_stats`."""
    if isinstance(module, QatBatchNormed):
        module.update_bn_stats()


# -- convolutions ---------------------------------------------------------------------------------


class _Conv(QatModule):
    def forward(self, input: Tensor) -> Tensor:
        """The convolution with its rounded weight."""
        output: Tensor = self._conv_forward(input, self._rounded_weight(), self.bias)
        return output


class QatConv1d(_Conv, nn.Conv1d):
    """``nn.Conv1d`` with a rounded weight."""

    float_type = nn.Conv1d


class QatConv2d(_Conv, nn.Conv2d):
    """``nn.Conv2d`` with a rounded weight."""

    float_type = nn.Conv2d


class QatConv3d(_Conv, nn.Conv3d):
    """``nn.Conv3d`` with a rounded weight."""

    float_type = nn.Conv3d


class _ConvBn(QatBatchNormed):
    def forward(self, input: Tensor) -> Tensor:
        """Convolution and batch-norm, the folded weight rounded."""
        if self.weight_fake_quant is None:
            output: Tensor = self.bn(self._conv_forward(input, self.weight, self.bias))
        else:
            divisor = self._divisor()
            weight = self.weight_fake_quant(self.weight * self._spread(divisor))
            output = self._normalized(self._conv_forward(input, weight, None), divisor)
        return output


class QatConvBn1d(_ConvBn, nn.Conv1d):
    """``nn.Conv1d`` and ``nn.BatchNorm1d`` with a rounded weight."""

    float_type = nn.Conv1d


class QatConvBn2d(_ConvBn, nn.Conv2d):
    """``nn.Conv2d`` and ``nn.BatchNorm2d`` with a rounded weight."""

    float_type = nn.Conv2d


class QatConvBn3d(_ConvBn, nn.Conv3d):
    """``nn.Conv3d`` and ``nn.BatchNorm3d`` with a rounded weight."""

    float_type = nn.Conv3d


# -- transposed convolutions ----------------------------------------------------------------------


class _ConvTranspose(QatModule):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution with its rounded weight."""
        output: Tensor = self._transposed(input, self._rounded_weight(), self.bias, output_size)
        return output


class _ConvTransposeBn(QatBatchNormed):
    def _spread(self, factor: Tensor) -> Tensor:
        """The weight is ``[in, out / groups, ...]``."""
        weight, groups = self.weight, self.groups
        inputs: int = weight.shape[0]
        per_group = factor.reshape(groups, 1, -1).expand(groups, inputs // groups, -1)
        return per_group.reshape([inputs, -1] + [1] * (weight.dim() - 2))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution and batch-norm, the folded weight rounded."""
        if self.weight_fake_quant is None:
            output: Tensor = self.bn(self._transposed(input, self.weight, self.bias, output_size))
        else:
            divisor = self._divisor()
            weight = self.weight_fake_quant(self.weight * self._spread(divisor))
            output = self._normalized(self._transposed(input, weight, None, output_size), divisor)
        return output


class _Transposed1d(nn.ConvTranspose1d):
    if TYPE_CHECKING:
        stride: Any
        padding: Any
        kernel_size: Any
        dilation: Any

    def _transposed(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None,
    ) -> Tensor:
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 1, self.dilation
        )
        stride, groups, dilation = self.stride, self.groups, self.dilation
        return F.conv_transpose1d(
            input, weight, bias, stride, self.padding, padding, groups, dilation
        )


class _Transposed2d(nn.ConvTranspose2d):
    if TYPE_CHECKING:
        stride: Any
        padding: Any
        kernel_size: Any
        dilation: Any

    def _transposed(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None,
    ) -> Tensor:
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        stride, groups, dilation = self.stride, self.groups, self.dilation
        return F.conv_transpose2d(
            input, weight, bias, stride, self.padding, padding, groups, dilation
        )


class _Transposed3d(nn.ConvTranspose3d):
    if TYPE_CHECKING:
        stride: Any
        padding: Any
        kernel_size: Any
        dilation: Any

    def _transposed(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None,
    ) -> Tensor:
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation
        )
        stride, groups, dilation = self.stride, self.groups, self.dilation
        return F.conv_transpose3d(
            input, weight, bias, stride, self.padding, padding, groups, dilation
        )


class QatConvTranspose1d(_ConvTranspose, _Transposed1d):
    """``nn.ConvTranspose1d`` with a rounded weight."""

    float_type = nn.ConvTranspose1d


class QatConvTranspose2d(_ConvTranspose, _Transposed2d):
    """``nn.ConvTranspose2d`` with a rounded weight."""

    float_type = nn.ConvTranspose2d


class QatConvTranspose3d(_ConvTranspose, _Transposed3d):
    """``nn.ConvTranspose3d`` with a rounded weight."""

    float_type = nn.ConvTranspose3d


class QatConvTransposeBn1d(_ConvTransposeBn, _Transposed1d):
    """``nn.ConvTranspose1d`` and ``nn.BatchNorm1d`` with a rounded weight."""

    float_type = nn.ConvTranspose1d


class QatConvTransposeBn2d(_ConvTransposeBn, _Transposed2d):
    """``nn.ConvTranspose2d`` and ``nn.BatchNorm2d`` with a rounded weight."""

    float_type = nn.ConvTranspose2d


class QatConvTransposeBn3d(_ConvTransposeBn, _Transposed3d):
    """``nn.ConvTranspose3d`` and ``nn.BatchNorm3d`` with a rounded weight."""

    float_type = nn.ConvTranspose3d


# -- linears and tables ---------------------------------------------------------------------------


class QatLinear(QatModule, nn.Linear):
    """``nn.Linear`` with a rounded weight."""

    float_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """The linear with its rounded weight."""
        return F.linear(input, self._rounded_weight(), self.bias)


class QatLinearBn1d(QatBatchNormed, nn.Linear):
    """``nn.Linear`` and ``nn.BatchNorm1d`` with a rounded weight."""

    float_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Linear and batch-norm, the folded weight rounded."""
        if self.weight_fake_quant is None:
            output: Tensor = self.bn(F.linear(input, self.weight, self.bias))
        else:
            divisor = self._divisor()
            weight = self.weight_fake_quant(self.weight * self._spread(divisor))
            output = self._normalized(F.linear(input, weight), divisor)
        return output


class QatEmbedding(QatModule, nn.Embedding):
    """``nn.Embedding`` with a rounded table."""

    float_type = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the rounded table."""
        return F.embedding(
            input,
            self._rounded_weight(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class QatEmbeddingBag(QatModule, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with a rounded table."""

    float_type = nn.EmbeddingBag

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Sums or means of rows of the rounded table."""
        return F.embedding_bag(
            input,
            self._rounded_weight(),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


_PLAIN: tuple[type[QatModule], ...] = (
    QatConv1d,
    QatConv2d,
    QatConv3d,
    QatConvTranspose1d,
    QatConvTranspose2d,
    QatConvTranspose3d,
    QatLinear,
    QatEmbedding,
    QatEmbeddingBag,
)
_BATCH_NORMED: tuple[type[QatBatchNormed], ...] = (
    QatConvBn1d,
    QatConvBn2d,
    QatConvBn3d,
    QatConvTransposeBn1d,
    QatConvTransposeBn2d,
    QatConvTransposeBn3d,
    QatLinearBn1d,
)
PLAIN_BY_FLOAT = {kind.float_type: kind for kind in _PLAIN}
BATCH_NORMED_BY_FLOAT = {kind.float_type: kind for kind in _BATCH_NORMED}
FLOAT_BY_QAT: dict[type[nn.Module], type[nn.Module]] = {
    kind: kind.float_type for kind in (*_PLAIN, *_BATCH_NORMED)
}
"""Every class of this file -> the float module that it trains."""


def training_form(module: nn.Module, bn: nn.Module | None = None) -> QatModule:
    """The module of this file that trains ``module``, with its very parameters.

    Args:
        module: of a class in the values of :data:`FLOAT_BY_QAT`.
        bn: the batch-norm behind it.

    Returns:
        One without a weight fake quantizer, which computes what ``module`` and ``bn`` compute.
    """
    if bn is None:
        plain = recast(module, PLAIN_BY_FLOAT[type(module)])
        plain.weight_fake_quant = None
        return plain
    fused = recast(module, BATCH_NORMED_BY_FLOAT[type(module)])
    fused.weight_fake_quant = None
    fused.bn = bn
    fused.freeze_bn = False
    return fused


def own_form(module: nn.Module) -> QatModule | None:
    """The module of this file for another library's with the same parts, which both then hold.

    Args:
        module: a subclass of the float module, with ``weight_fake_quant`` and, where a batch-norm
            trains inside, ``bn``; its parameters are read, not copied.

    Returns:
        ``None`` where it is a subclass of no module that can train here.
    """
    kinds = type(module).__mro__
    float_type = next((kind for kind in kinds if kind in PLAIN_BY_FLOAT), None)
    if float_type is None:
        return None
    plain = recast(module, float_type)
    plain._modules.clear()
    norm = module._modules.get("bn")
    made = training_form(plain, norm)
    made.weight_fake_quant = getattr(module, "weight_fake_quant", None)
    if isinstance(made, QatBatchNormed):
        made.freeze_bn = bool(getattr(module, "freeze_bn", False))
    return made


def holds_training_modules(model: nn.Module) -> bool:
    """Whether a module of this file is in ``model``."""
    return any(isinstance(module, QatModule) for module in model.modules())


class TrainedQParams(WithArgs):
    """An observer that has made up its mind: the scale and zero point that training arrived at.

    Args:
        spec: how the weight is to be quantized.
        scale: shape ``[]`` or ``[C]``.
        zero_point: likewise.
    """

    was_observed = True

    def __init__(self, spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = spec.dtype
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """``x``, unobserved."""
        return x

    def qparams(self) -> QParams:
        """The parameters given."""
        scale, zero_point = self.get_buffer("scale"), self.get_buffer("zero_point")
        return QParams(scale, zero_point, self.spec)
