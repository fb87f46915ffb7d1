"""The choice of a precision for every unit of a network, as numbers: costs of units and of edges.

A *unit* is a layer, or an op that only moves values. Each of its *choices* costs latency, damage
and bytes, reads its inputs in one representation (float, int8, half) and writes its output in one.
An *edge* is a tensor: where a reader wants another representation than the writer gives, the tensor
is converted, once for each representation however many readers want it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fxquant.errors import ConfigError

FLOAT: Final = "float"
"""The representation of the model's inputs and outputs."""

OUTSIDE: Final = -1
"""Number of the unit that writes the model's inputs and reads its outputs."""

Assignment = tuple[int, ...]
"""For every unit, the number of its choice."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a choice, or a whole plan, costs.

    Attributes:
        latency: seconds.
        damage: noise at the model's output relative to the signal; that of layers adds up.
        size: bytes.
    """

    latency: float = 0.0
    damage: float = 0.0
    size: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.latency + other.latency, self.damage + other.damage, self.size + other.size
        )

    def dominates(self, other: Costs) -> bool:
        """Whether it is nowhere worse and somewhere better."""
        mine, theirs = self.vector, other.vector
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    @property
    def vector(self) -> tuple[float, float, float]:
        """The three figures."""
        return self.latency, self.damage, self.size


@dataclass(frozen=True, slots=True)
class Prices:
    """What one unit of each cost is worth, to make one number of them; not negative."""

    latency: float = 1.0
    damage: float = 0.0
    size: float = 0.0

    def of(self, costs: Costs) -> float:
        """The price of ``costs``."""
        return self.latency * costs.latency + self.damage * costs.damage + self.size * costs.size


@dataclass(frozen=True, slots=True)
class Choice:
    """A precision that a unit may have.

    Attributes:
        name: of the precision.
        costs: of the unit in it, conversions not included.
        reads: representation of the inputs.
        writes: representation of the output.
    """

    name: str
    costs: Costs
    reads: str = FLOAT
    writes: str = FLOAT


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor.

    Attributes:
        producer: number of the unit that writes it, or :data:`OUTSIDE`.
        consumers: numbers of the units that read it; :data:`OUTSIDE` where the model returns it.
        conversions: (representation written, representation read) -> seconds of the conversion;
            what is not there costs nothing.
        name: of the tensor.
    """

    producer: int
    consumers: tuple[int, ...]
    conversions: Mapping[tuple[str, str], float] = field(default_factory=dict)
    name: str = ""

    def latency(self, writes: str, reads: set[str]) -> float:
        """Seconds of the conversions to everything that is read."""
        return sum(self.conversions.get((writes, r), 0.0) for r in reads if r != writes)


@dataclass(frozen=True, slots=True)
class Problem:
    """Units, their choices, and the tensors between them.

    Attributes:
        names: of the units, in an order in which writers come before readers where possible.
        choices: of each unit, at least one.
        edges: the tensors.

    Raises:
        ConfigError: a unit has no choice, or an edge names a unit that is not there.
    """

    names: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.choices):
            raise ConfigError("a problem needs the choices of every unit")
        for name, choices in zip(self.names, self.choices, strict=True):
            if not choices:
                raise ConfigError(f"unit {name!r} has no precision to choose from")
        known = range(OUTSIDE, len(self.names))
        for edge in self.edges:
            if any(unit not in known for unit in (edge.producer, *edge.consumers)):
                raise ConfigError(f"edge {edge.name!r} names a unit that is not there")

    def costs(self, assignment: Assignment) -> Costs:
        """Of the units and of the conversions between them."""
        total = Costs()
        for choices, number in zip(self.choices, assignment, strict=True):
            total = total + choices[number].costs
        conversions = sum(self._conversion(edge, assignment) for edge in self.edges)
        return total + Costs(latency=conversions)

    def latency_at(self, unit: int, assignment: Assignment) -> float:
        """Seconds of one unit and of the conversions of the tensors that it writes and reads."""
        own = self.choices[unit][assignment[unit]].costs.latency
        return own + sum(self._conversion(edge, assignment) for edge in self._edges_at(unit))

    def _edges_at(self, unit: int) -> tuple[Edge, ...]:
        return tuple(e for e in self.edges if unit == e.producer or unit in e.consumers)

    def _conversion(self, edge: Edge, assignment: Assignment) -> float:
        writes = self.representation(edge.producer, assignment, written=True)
        reads = {self.representation(c, assignment, written=False) for c in edge.consumers}
        return edge.latency(writes, reads)

    def representation(self, unit: int, assignment: Assignment, *, written: bool) -> str:
        """What a unit writes or reads under ``assignment``."""
        if unit == OUTSIDE:
            return FLOAT
        choice = self.choices[unit][assignment[unit]]
        return choice.writes if written else choice.reads

    @property
    def combinations(self) -> int:
        """How many assignments there are."""
        return math.prod(len(choices) for choices in self.choices)

    def assignments(self) -> Iterator[Assignment]:
        """All of them."""
        return itertools.product(*(range(len(choices)) for choices in self.choices))

    def named(self, assignment: Assignment) -> dict[str, str]:
        """Unit -> name of its choice."""
        pairs = zip(self.names, self.choices, assignment, strict=True)
        return {name: choices[number].name for name, choices, number in pairs}

    def uniform(self, preferred: Sequence[str]) -> Assignment:
        """Every unit in the first of ``preferred`` that it can have, else in its first choice."""
        found = []
        for choices in self.choices:
            names = [choice.name for choice in choices]
            wanted = next((name for name in preferred if name in names), names[0])
            found.append(names.index(wanted))
        return tuple(found)
