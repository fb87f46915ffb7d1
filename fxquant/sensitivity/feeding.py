"""Batches as the user has them, bound to the inputs of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxquant.calibration import Forward, placing
from fxquant.errors import CalibrationError
from fxquant.graph_module import QuantGraphModule
from fxquant.inputs import bind_inputs
from fxquant.quantize import first_inputs

BoundBatch = inspect.BoundArguments
"""The inputs of a graph, by the names of its placeholders."""


def bind_batches(
    gm: QuantGraphModule, batches: Iterable[Any], forward: Forward | None
) -> list[BoundBatch]:
    """The inputs that each batch feeds to ``gm``, by the rule of :mod:`fxquant.calibration`.

    Args:
        gm: whose inputs they are.
        batches: as the user has them.
        forward: calls what it is given, once, with the inputs of a batch; ``None`` for the rule.

    Raises:
        CalibrationError: a batch does not fit.
    """
    place = placing(gm)
    bound = []
    for number, batch in enumerate(batches, 1):
        args, kwargs = place(batch) if forward is None else _taken(forward, batch, number)
        try:
            bound.append(bind_inputs(gm, args, kwargs))
        except TypeError as error:
            raise CalibrationError(f"batch {number} does not fit the model: {error}") from error
    return bound


def _taken(forward: Forward, batch: object, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which ``forward`` calls the model."""
    try:
        forward(_Taker(), batch)
    except _Taken as taken:
        args, kwargs = taken.args
        return args, kwargs
    except Exception as error:
        raise CalibrationError(f"batch {number} does not fit the model: {error}") from error
    raise CalibrationError(
        f"batch {number}: forward(model, batch) did not call the model that it was given"
    )


def inputs_of_first(model: nn.Module, batches: list[Any], forward: Forward | None) -> Any:
    """Example inputs for ``model``: what the first batch feeds to it."""
    if forward is None:
        return first_inputs(model, batches)[1]
    args, kwargs = _taken(forward, batches[0], 1)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def count_inputs(batch: BoundBatch) -> int:
    """How many inputs a batch holds: the length of its first tensor."""
    for value in batch.arguments.values():
        if isinstance(value, torch.Tensor):
            return int(value.shape[0]) if value.dim() else 1
    return 1


def placeholder_value(batch: BoundBatch, node: fx.Node) -> Any:
    """The value of an input node."""
    return batch.arguments[str(node.target).lstrip("*")]


class _Taken(BaseException):
    """Carries the arguments of a call; no user code catches it by accident."""


class _Taker(nn.Module):
    """Stands in for the model and takes what it would be fed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand out the arguments."""
        raise _Taken(args, kwargs)
