"""The function behind each kind that carries weights: how reference graphs call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from fxquant.op_view import Op

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
    "linear": F.linear,
    "embedding": F.embedding,
    "embedding_bag": F.embedding_bag,
}
"""Kind -> function with the parameters of the kind's signature."""


def functional_call(op: Op, **given: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Function and positional arguments of ``op``, with ``given`` in place of its own.

    Args:
        op: an op of one of :data:`FUNCTIONS`.
        given: parameter name -> argument (``weight``, ``bias``).
    """
    arguments = {**op.arguments, **given}
    return FUNCTIONS[op.name], tuple(arguments[name] for name, _ in op.kind.signature)
