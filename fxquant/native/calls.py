"""Calls of a model: what a plan is made for, and whether two results are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten

from fxquant.native.comparison import same_tensors

Key = tuple[Any, ...]
"""What a plan is made for: layouts and types of tensors, values of everything else, nesting."""

_TENSORS: Final = (Tensor, nn.Parameter)
_VALUES: Final = (type(None), bool, int, float, str)
_COMPARED: Final = (
    *_VALUES, complex, bytes, slice, range, Enum, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip


class NoPlanError(Exception):
    """A call can have no plan; the message says why."""


class NotComparableError(Exception):
    """A result holds an object that nobody can look into; the message names its type."""


def key_of(inputs: tuple[Any, ...]) -> Key:
    """What a plan for these inputs is made for.

    Args:
        inputs: one for each placeholder; tensors and plain values may lie in tuples, lists, dicts
            and whatever else is registered as a pytree.

    Raises:
        NoPlanError: one is no strided tensor of the CPU, and no plain value.
    """
    key: list[tuple[Any, ...]] = []
    for x in inputs:
        kind = type(x)
        if kind in _TENSORS:
            _check(x)
            key.append((x.shape, x.stride(), x.dtype))
        elif kind in _VALUES:
            key.append((kind, repr(x)))  # -0.0 is not 0.0 here, and NaN is NaN
        else:
            leaves, spec = tree_flatten(x)
            if len(leaves) == 1 and leaves[0] is x:
                raise NoPlanError(f"an input is, or holds, a {kind.__qualname__}")
            key.append((spec, key_of(tuple(leaves))))
    return tuple(key)


def _check(x: Tensor) -> None:
    """Raise NoPlanError for a tensor whose numbers are not what lies in its memory."""
    if not x.is_cpu:
        raise NoPlanError(f"an input is on {x.device}")
    if x.layout is not torch.strided or x.is_nested:
        raise NoPlanError("an input is sparse, nested, or in a layout of its own")
    if x.is_quantized:
        raise NoPlanError("an input is quantized")
    if x.is_neg() or x.is_conj() or x._is_zerotensor():
        raise NoPlanError("an input is a negative or conjugate view, or zeros without memory")


def described(key: Key) -> str:
    """The inputs of a call in short: shapes of tensors, values of numbers."""
    return ", ".join(map(_described, key))


def _described(part: Any) -> str:
    if isinstance(part[0], torch.Size):
        return str(list(part[0]))
    if isinstance(part[0], type):
        return str(part[1])
    return f"({described(part[1])})"


def same_results(expected: Any, found: Any) -> bool:
    """Whether two results of a model agree in every number, also those inside of objects.

    Objects may be tuples, lists, mappings, dataclasses, and what is registered as a pytree.

    Raises:
        NotComparableError: there is an object of another kind.
    """
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and same_tensors(expected, found)
    if isinstance(expected, Mapping):
        return (
            isinstance(found, Mapping)
            and list(expected) == list(found)
            and _all_same(expected.values(), found.values())
        )
    if isinstance(expected, (tuple, list)) and isinstance(found, (tuple, list)):
        return isinstance(expected, tuple) == isinstance(found, tuple) and _all_same(
            expected, found
        )
    if type(expected) is not type(found):
        return False
    if is_dataclass(expected):
        names = [field.name for field in fields(expected)]
        return _all_same(
            (getattr(expected, n, None) for n in names), (getattr(found, n, None) for n in names)
        )
    if isinstance(expected, _COMPARED):
        return bool(expected == found) or (expected != expected and found != found)
    return _same_nodes(expected, found)


def _all_same(expected: Any, found: Any) -> bool:
    left, right = list(expected), list(found)
    return len(left) == len(right) and all(map(same_results, left, right))


def _same_nodes(expected: Any, found: Any) -> bool:
    """The same for two objects of one type that may be registered as a pytree."""
    node = SUPPORTED_NODES.get(type(expected))
    if node is None:
        raise NotComparableError(type(expected).__qualname__)
    (left, left_context), (right, right_context) = map(node.flatten_fn, (expected, found))
    return bool(left_context == right_context) and _all_same(left, right)
