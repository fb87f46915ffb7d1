"""Copies of a model: nothing of the caller's is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.errors import CaptureError
from fxquant.reparametrized import settle
from fxquant.tracer import first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """How a model is copied; see :func:`own_copy` for the fields."""

    share: bool
    keep: bool

    def of(self, model: nn.Module) -> nn.Module:
        """The copy."""
        copied = own_copy(model, share=self.share, keep=self.keep)
        if self.share:
            settle(copied)
        return copied


def own_copy(model: nn.Module, *, share: bool = False, keep: bool = False) -> nn.Module:
    """A copy with tensors of its own; a cached tensor with history becomes one without.

    Args:
        model: what is copied.
        share: let parameters (not buffers) be new objects that share the memory of the model's:
            for those who replace parameters, and write into none.
        keep: let the parameters be the model's own.

    Raises:
        CaptureError: an attribute cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_in(model):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()  # deepcopy refuses tensors with history
        elif keep and isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor
        elif share and type(tensor) is nn.Parameter:
            # .data and not .detach(): the version counter is the model's own
            memo[id(tensor)] = nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
    try:
        with warnings.catch_warnings():
            # What torch.export makes holds specs of its inputs, whose copies warn of themselves.
            warnings.filterwarnings("ignore", ".*LeafSpec.. is deprecated", FutureWarning)
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({first_line(error)}); fxquant"
            " works on a copy so that the caller's model stays as it is. Remove or define"
            " __deepcopy__ for the attribute that refuses"
        ) from error


def take_apart(copied: nn.Module, model: nn.Module) -> None:
    """Give ``copied`` memory of its own for the parameters that it shares with ``model``."""
    theirs = {t.untyped_storage()._cdata for t in _tensors_in(model) if _is_plain(t)}
    for tensor in _tensors_in(copied):
        if _is_plain(tensor) and tensor.untyped_storage()._cdata in theirs:
            tensor.data = tensor.detach().clone()  # a parameter of ours: only its memory was shared


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout is torch.strided


def _tensors_in(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor of a model: registered, in an attribute, or in a container in one."""
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, nn.Module):
            pending.extend(vars(value).values())
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (tuple, list, set, frozenset)):
            pending.extend(value)
