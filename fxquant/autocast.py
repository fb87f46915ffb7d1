"""Modes of the caller that are switched off where fxquant computes: autocast, inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_HALF = (torch.float16, torch.bfloat16)


def is_autocast() -> bool:
    """Whether float ops of this thread are cast to half precision, on the CPU or a GPU."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def no_autocast() -> Iterator[None]:
    """Inside it nothing is cast, whatever the caller's ``torch.autocast`` says."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def outside_modes(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """``function`` run inside :func:`no_autocast`, and outside ``torch.inference_mode``.

    Tensors made in inference mode could not be changed outside it, and count no versions.
    """

    @functools.wraps(function)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with ExitStack() as stack:
            stack.enter_context(no_autocast())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            return function(*args, **kwargs)

    return run


def widened(arguments: Any) -> Any:
    """``arguments`` with half-precision tensors, which autocast hands on, as float32."""
    return tree_map(_wide, arguments)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
