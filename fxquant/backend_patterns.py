"""Patterns of a backend config, in forward order whatever form they were written in.

torch.ao writes a pattern as one op, as a tuple in forward order (``(Conv2d, ReLU)``), or as a
nested tuple in reverse, an op before its operands:
``(ReLU, (add, MatchAllNode, (BatchNorm2d, Conv2d)))``.
:func:`forward_of` and :func:`forward_of_reversed` make one tree of each, in which operands come
first when it is read: ``Conv2d -> BatchNorm2d -> add(*, .) -> ReLU``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.errors import ConfigError

#: A module class, a function, a method's name, or tuples of them.
PatternForm = Any


class MatchAllNode:
    """Stands in a reversed nested pattern for an operand that may be anything."""


@dataclass(frozen=True, slots=True)
class PatternCall:
    """An op of a pattern with its operands.

    Attributes:
        op: a module class, a function or a method's name.
        operands: what it reads, in its own order; ``None`` may be anything. Empty where the
            pattern says nothing about them.
    """

    op: PatternForm
    operands: tuple[PatternCall | None, ...] = ()

    @property
    def chain(self) -> tuple[PatternCall, ...] | None:
        """The ops from first to last, or ``None`` where two branches join."""
        inner = [operand for operand in self.operands if operand is not None]
        if len(inner) > 1:
            return None
        if not inner:
            return (self,)
        before = inner[0].chain
        return None if before is None else (*before, self)

    @property
    def types(self) -> tuple[PatternForm, ...] | None:
        """The ops of :attr:`chain` without their operands."""
        chain = self.chain
        return None if chain is None else tuple(call.op for call in chain)

    def __str__(self) -> str:
        chain = self.chain
        if chain is not None:
            return " -> ".join(call._shown() for call in chain)
        inside = ", ".join("*" if o is None else str(o) for o in self.operands)
        return f"{op_name(self.op)}({inside})"

    def _shown(self) -> str:
        if len(self.operands) < 2:
            return op_name(self.op)
        places = ("*" if operand is None else "." for operand in self.operands)
        return f"{op_name(self.op)}({', '.join(places)})"


_NAMESPACES: Final = (nn, F, torch)


def op_name(op: PatternForm) -> str:
    """How people write an op: ``Conv2d``, ``F.relu``, ``torch.add``, ``.sigmoid()``."""
    if isinstance(op, str):
        return f".{op}()"
    name = getattr(op, "__name__", None)
    if isinstance(op, type):
        return str(name)
    for module, prefix in ((F, "F"), (torch, "torch")):
        for candidate in (name, *_dispatched(module, op)):
            if candidate is not None and getattr(module, str(candidate), None) is op:
                return f"{prefix}.{candidate}"
    home = str(getattr(op, "__module__", "") or "").lstrip("_")
    return f"{home}.{name}" if home and name else str(name or op)


def _dispatched(module: Any, op: PatternForm) -> list[str]:
    """Names of functions that torch makes by a wrapper: ``F.max_pool2d`` calls itself ``fn``."""
    if getattr(op, "__name__", None) != "fn":
        return []
    return [name for name in dir(module) if "pool" in name and getattr(module, name) is op]


def forward_of(pattern: PatternForm) -> PatternCall:
    """The tree of a pattern in forward order: one op, or a tuple of two or three.

    Raises:
        ConfigError: a tuple of another length, or something that is no op.
    """
    if not isinstance(pattern, tuple):
        return PatternCall(_checked(pattern))
    if len(pattern) not in (2, 3):
        raise ConfigError(f"Expected a tuple with 2 or 3 elements, got: {pattern}")
    made = forward_of(pattern[0])
    for op in pattern[1:]:
        made = PatternCall(_checked(op), (made,))
    return made


def forward_of_reversed(pattern: PatternForm) -> PatternCall:
    """The tree of a pattern written in reverse: an op, or ``(op, operand, ...)`` in depth.

    Raises:
        ConfigError: an empty tuple, or something that is no op.
    """
    if not isinstance(pattern, tuple):
        return PatternCall(_checked(pattern))
    if not pattern:
        raise ConfigError("a pattern needs an op, got an empty tuple")
    operands = tuple(None if _is_wildcard(o) else forward_of_reversed(o) for o in pattern[1:])
    return PatternCall(_checked(pattern[0]), operands)


def reversed_of(pattern: PatternForm) -> PatternForm:
    """The nested tuple in reverse of a pattern in forward order: ``(a, b, c) -> (c, (b, a))``."""
    return _reversed_tree(forward_of(pattern))


def _reversed_tree(call: PatternCall) -> PatternForm:
    if not call.operands:
        return call.op
    return (call.op, *(MatchAllNode if o is None else _reversed_tree(o) for o in call.operands))


def _is_wildcard(value: object) -> bool:
    """Whether it is ``MatchAllNode``, fxquant's or torch.ao's."""
    return isinstance(value, type) and value.__name__ == "MatchAllNode"


def _checked(op: PatternForm) -> str | type | Callable[..., Any]:
    if isinstance(op, str | type) or (callable(op) and not isinstance(op, nn.Module)):
        return op
    raise ConfigError(
        f"a pattern is a module class, a function, a method's name, or a tuple of these, got {op!r}"
    )
