"""What a pattern is: a chain of steps in forward order, with guards and a source.

::

    Pattern(
        "conv2d-bn",
        chain(step("conv", "conv2d"), step("bn", "batch_norm")),
        guards=(single_user, evaluation_mode),
        source="Jacob et al. 2018, section 3.2",
    )
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxquant.errors import ConfigError, did_you_mean
from fxquant.op_catalog import KIND_BY_NAME

if TYPE_CHECKING:
    from fxquant.patterns.match import Match, Reason

_NAME = re.compile(r"[a-z0-9_]+(-[a-z0-9_]+)*")
RESERVED_BINDS = frozenset(
    {"pattern", "gm", "ops", "operands", "facts", "nodes", "first", "last", "op", "operand"}
)
"""Names that a match has for itself, so that no step can be bound to them."""


@dataclass(frozen=True, slots=True)
class Guard:
    """A named condition on a match whose structure already fits.

    Attributes:
        name: printed in refusals.
        check: gives ``None`` to let the match pass, or the reason to refuse it.
    """

    name: str
    check: Callable[[Match], Reason | None]

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a guard needs a name, got an empty string")
        if not callable(self.check):
            raise ConfigError(f"guard {self.name!r} needs a function, got {self.check!r}")

    def __call__(self, match: Match) -> Reason | None:
        """The reason to refuse ``match``, or ``None``."""
        return self.check(match)


def guard(check: Callable[[Match], Reason | None]) -> Guard:
    """Make a :class:`Guard` of a function, under the function's name."""
    return Guard(check.__name__, check)


@dataclass(frozen=True, slots=True)
class Step:
    """One op of a chain.

    Attributes:
        bind: the attribute of the match under which the op is found (``m.conv``).
        kinds: names of the kinds of :mod:`fxquant.op_catalog` that the op may be.
        other: for a binary op, the attribute of the match that holds its other operand, the one
            that does not come from the step before; the chain may enter at either position.
    """

    bind: str
    kinds: frozenset[str]
    other: str | None = None

    def __post_init__(self) -> None:
        for bind in (self.bind,) if self.other is None else (self.bind, self.other):
            if not bind.isidentifier() or bind.startswith("_") or bind in RESERVED_BINDS:
                raise ConfigError(
                    f"{bind!r} cannot be a binding: take a public Python identifier other than "
                    f"{', '.join(sorted(RESERVED_BINDS))}"
                )
        kinds: object = self.kinds
        if not isinstance(kinds, frozenset) or not kinds:
            raise ConfigError(f"step {self.bind!r} needs a frozenset of kinds, got {kinds!r}")
        for kind in sorted(self.kinds):
            if kind not in KIND_BY_NAME:
                hint = did_you_mean(kind, KIND_BY_NAME)
                raise ConfigError(f"step {self.bind!r} names the unknown kind {kind!r}{hint}")
            if self.other is not None and len(KIND_BY_NAME[kind].activations) != 2:
                raise ConfigError(
                    f"step {self.bind!r} binds another operand {self.other!r}, "
                    f"but {kind!r} is no binary op"
                )


@dataclass(frozen=True, slots=True)
class Pattern:
    """A chain of ops that may be rewritten as one, if the guards agree.

    Attributes:
        name: kebab-case and unique in a library (``conv2d-relu6``).
        steps: the ops in forward order; each takes the value of the one before as an activation.
        guards: conditions, checked in order; the first that refuses gives the reason.
        source: the paper and section, or the page, that the pattern comes from.
    """

    name: str
    steps: tuple[Step, ...]
    guards: tuple[Guard, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is no pattern name: write it like 'conv2d-relu6'")
        _check_items(self.name, "steps", self.steps, Step, "make one with step(...)")
        if not self.steps:
            raise ConfigError(f"pattern {self.name!r} has no steps")
        _check_items(self.name, "guards", self.guards, Guard, "make one of a function with @guard")
        if self.steps[0].other is not None:
            raise ConfigError(
                f"the first step of pattern {self.name!r} binds another operand "
                f"{self.steps[0].other!r}, but no operand of it comes from a step before"
            )
        binds = [b for one in self.steps for b in (one.bind, one.other) if b is not None]
        twice = sorted({bind for bind in binds if binds.count(bind) > 1})
        if twice:
            raise ConfigError(f"pattern {self.name!r} binds {', '.join(map(repr, twice))} twice")

    @property
    def binds(self) -> tuple[str, ...]:
        """The names of the steps, in forward order."""
        return tuple(one.bind for one in self.steps)


def _check_items(name: str, field: str, items: object, kind: type, advice: str) -> None:
    if not isinstance(items, tuple):
        raise ConfigError(f"the {field} of pattern {name!r} are a tuple, not {items!r}")
    for item in items:
        if not isinstance(item, kind):
            raise ConfigError(f"the {field} of pattern {name!r} hold {item!r}; {advice}")


def step(bind: str, *kinds: str, other: str | None = None) -> Step:
    """``step("add", "add", other="residual")``: a step that is one of ``kinds``."""
    return Step(bind, frozenset(kinds), other)


def chain(*steps: Step) -> tuple[Step, ...]:
    """The steps of a pattern, in forward order."""
    return steps
