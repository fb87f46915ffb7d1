"""A constant factor per channel behind a convolution or a linear, maybe behind a permutation.

``c * (x W^T + b) = x (c W)^T + c b``, one factor per output channel, or one for all. LayerScale of
Touvron et al. 2021 (ConvNeXt has it behind a permutation); the residual scale of Inception-ResNet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxquant.metadata import shape_of
from fxquant.op_view import Op, attribute
from fxquant.patterns.guards import (
    constant_weight,
    no_hooks,
    no_mutation_between,
    same_dtype,
    single_user,
    sole_owner_of_parameter,
)
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.pattern import Pattern, chain, guard, step

_KINDS = ("linear", *(f"conv{d}d" for d in (1, 2, 3)), *(f"conv_transpose{d}d" for d in (1, 2, 3)))
_SMALLEST = 127 * 2.0**-22
"""Of a channel's largest weight: below, its int8 scale would be cut off at float32's epsilon."""


def factor_of(match: Match) -> Tensor | None:
    """The factor of a match as float64, 0-d or one for every output channel, or ``None``.

    ``None`` where it is no constant, or multiplies along something else than the channels.
    """
    factor = match.factor
    if isinstance(factor, (int, float)) and not isinstance(factor, bool):
        return torch.tensor(float(factor), dtype=torch.float64)
    if not isinstance(factor, fx.Node) or factor.op != "get_attr":
        return None
    value = attribute(match.gm, str(factor.target))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    wide = value.detach().to(torch.float64)
    shape = shape_of(match.last)
    if shape is None or shape != shape_of(match.ops[-2].node) or value.dim() > len(shape):
        return None
    if value.numel() == 1:
        return wide.reshape(())
    axis = _channel_axis(match, len(shape)) - (len(shape) - value.dim())
    return wide.flatten() if axis >= 0 and value.shape[axis] == value.numel() else None


def _channel_axis(match: Match, rank: int) -> int:
    """The dimension of the product that counts the output channels."""
    base = match.op("base")
    axis = rank - 1 if base.name == "linear" else rank - 1 - int(base.name[-2])
    for op in match.ops[1:-1]:
        axis = _order(op, rank).index(axis)
    return axis


def _order(op: Op, rank: int) -> list[int]:
    """Dimension of the result -> dimension of the input."""
    if op.name == "permute":
        return [int(d) % rank for d in op.arguments["dims"]]
    order = list(range(rank))
    one, other = (int(op.arguments[name]) % rank for name in ("dim0", "dim1"))
    order[one], order[other] = order[other], order[one]
    return order


@guard
def factor_per_channel(match: Match) -> Reason | None:
    """The factor is a constant: a number, or a tensor that varies along the channels alone."""
    if factor_of(match) is not None:
        return None
    name = match.factor.name if isinstance(match.factor, fx.Node) else repr(match.factor)
    return because(
        "{scale!r} multiplies {node!r} by {factor!r}, which is no constant factor of its channels"
        " (as far as example inputs tell)",
        match.last.name,
        scale=match.last.name,
        node=match.first.name,
        factor=name,
    )


@guard
def keeps_its_scale(match: Match) -> Reason | None:
    """No channel of the weight becomes so small that it could no longer be quantized."""
    weight, factor = match.op("base").constant("weight"), factor_of(match)
    if weight is None or factor is None:
        return because(
            "the weight of {node!r} is no tensor of the model",
            match.first.name,
            node=match.first.name,
        )
    largest = float(factor.abs().max()) * float(weight.detach().abs().max())
    smallest = float(factor.abs().min()) * float(weight.detach().abs().max())
    if math.isfinite(largest) and smallest >= _SMALLEST:
        return None
    return because(
        "times {factor}, the weight of {node!r} would be too small for an int8 scale",
        match.first.name,
        node=match.first.name,
        factor=f"{float(factor.abs().min()):.3g}",
    )


_GUARDS = (
    single_user,
    sole_owner_of_parameter("base"),
    constant_weight,
    factor_per_channel,
    keeps_its_scale,
    same_dtype,
    no_hooks,
    no_mutation_between,
)
_SOURCE = "Touvron et al. 2021 (CaiT), equation 4; Szegedy et al. 2017, section 3.3"

CHANNEL_SCALE = (
    Pattern(
        "scaled-permuted",
        chain(
            step("base", *_KINDS),
            step("move", "permute", "transpose"),
            step("scale", "mul", other="factor"),
        ),
        guards=_GUARDS,
        source=_SOURCE,
    ),
    Pattern(
        "scaled",
        chain(step("base", *_KINDS), step("scale", "mul", other="factor")),
        guards=_GUARDS,
        source=_SOURCE,
    ),
)
"""Foldable into the weight and the bias of ``base``."""
