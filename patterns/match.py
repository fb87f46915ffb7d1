"""What matching gives: a match with its bindings as attributes, or a refusal with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxquant.errors import ConfigError
from fxquant.op_view import Op
from fxquant.patterns.facts import GraphFacts
from fxquant.patterns.pattern import Pattern

_LISTED = 5


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a guard refuses; the sentence is formatted only when it is read.

    Attributes:
        template: a full sentence in ``str.format`` form, without the full stop.
        culprits: names of the nodes to look at.
        values: what fills the template; a tuple of names is printed as a list of them.
    """

    template: str
    culprits: tuple[str, ...] = ()
    values: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if not self.template.strip():
            raise ConfigError("a guard that refuses must say why: its reason is empty")

    @property
    def text(self) -> str:
        """The sentence."""
        return self.template.format(**{key: _spoken(value) for key, value in self.values})

    def __str__(self) -> str:
        return self.text


def because(template: str, *culprits: str, **values: object) -> Reason:
    """``because("{node!r} is used by {users}", "add", node="conv", users=("add", "mul"))``."""
    return Reason(template, culprits, tuple(values.items()))


def _spoken(value: object) -> object:
    """Names become ``'a', 'b' and 'c'``, at most five of them; all else stays."""
    if (
        not isinstance(value, tuple)
        or not value
        or not all(isinstance(item, str) for item in value)
    ):
        return value
    names = [repr(item) for item in value[:_LISTED]]
    if len(value) > _LISTED:
        names.append(f"{len(value) - _LISTED} more")
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A place in a graph where a pattern fits.

    The steps are attributes under the names the pattern binds them to: ``m.conv`` is an
    :class:`~fxquant.op_view.Op`, ``m.other`` the node of a binary op's other operand.

    Attributes:
        pattern: the pattern that fits.
        gm: the module that owns the graph.
        ops: the ops in forward order.
        operands: the other operands of binary steps, by name.
        facts: analyses of the graph as it was when it was matched.
    """

    pattern: Pattern
    gm: fx.GraphModule = field(repr=False)
    ops: tuple[Op, ...] = field(repr=False)
    operands: Mapping[str, Any] = field(repr=False)
    facts: GraphFacts = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for one, op in zip(self.pattern.steps, self.ops, strict=True):
                if one.bind == name:
                    return op
            if name in self.operands:
                return self.operands[name]
            raise AttributeError(
                f"pattern {self.pattern.name!r} binds "
                f"{', '.join((*self.pattern.binds, *self.operands))}, not {name!r}"
            )
        raise AttributeError(name)

    def op(self, bind: str) -> Op:
        """``m.op("conv")``: the same as ``m.conv``, typed."""
        found = getattr(self, bind)
        assert isinstance(found, Op)
        return found

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes of the ops in forward order; other operands are not among them."""
        return tuple(op.node for op in self.ops)

    @property
    def first(self) -> fx.Node:
        """The anchor: the node of the first step."""
        return self.ops[0].node

    @property
    def last(self) -> fx.Node:
        """The node whose value leaves the match."""
        return self.ops[-1].node

    def __str__(self) -> str:
        return f"{self.pattern.name}({', '.join(node.name for node in self.nodes)})"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a pattern did not match at a node.

    Attributes:
        pattern: the pattern.
        why: the reason, unformatted; :attr:`reason` is the sentence.
        anchor: name of the node where the pattern would begin.
        depth: the number of steps that fit.
        guard: name of the guard that refused, ``claimed`` where another match has the nodes,
            or an empty string where the structure does not fit.
        bound: names of the nodes that fit, in forward order.
    """

    pattern: Pattern
    why: Reason
    anchor: str
    depth: int
    guard: str = ""
    bound: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """The sentence that says why."""
        return self.why.text

    @property
    def culprits(self) -> tuple[str, ...]:
        """Names of the nodes to look at."""
        return self.why.culprits

    def __str__(self) -> str:
        by = f" [{self.guard}]" if self.guard else ""
        return f"{self.pattern.name} at {self.anchor!r}{by}: {self.reason}"
