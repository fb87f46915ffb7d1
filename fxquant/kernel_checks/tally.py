"""How the results of a kernel are compared with the definition, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_TIE: Final = 1e-4
"""How near to a boundary float32 arithmetic may decide: 255 * 2 ** -24 for each of few roundings,
and the approximations of oneDNN's functions (2 ** -19 of their argument)."""
_FLOAT32: Final = 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCheck:
    """One kernel against the definition.

    Attributes:
        kernel: as ``explain`` and ``audit`` name it.
        elements: how many results were compared.
        wrong: how many are not the expected integer, nor its neighbour at a tie.
        ties: how many ties were broken another way than half to even.
        worst: the largest difference, in steps of the output.
        absent: this build of torch does not have the kernel.
    """

    kernel: str
    elements: int
    wrong: int
    ties: int
    worst: float
    absent: bool = False

    @property
    def exact(self) -> bool:
        """Whether every result is right."""
        return not self.absent and self.wrong == 0

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.absent:
            return "not in this build"
        if self.wrong == 0:
            return "exact" if not self.ties else "exact but for ties"
        if self.worst > 1:
            return f"saturates or is wrong, by up to {self.worst:.0f} steps"
        return "rounds wrongly"


@dataclass
class Tally:
    """Counts of compared results, as :class:`KernelCheck` has them."""

    elements: int = 0
    wrong: int = 0
    ties: int = 0
    worst: float = 0.0

    def integers(self, given: Tensor, exact: Tensor) -> None:
        """Compare uint8 results with float64 values before rounding."""
        expected = exact.round().clamp(0, 255)
        difference = (given.to(torch.float64) - expected).abs()
        tie = ((exact - exact.floor()) - 0.5).abs() <= _TIE
        self._count(difference, tie & (difference <= 1))

    def floats(self, given: Tensor, exact: Tensor) -> None:
        """Compare float32 results with float64 values, in units of the largest one's rounding."""
        unit = _FLOAT32 * float(exact.abs().max().clamp(min=1e-30))
        difference = (given.to(torch.float64) - exact).abs() / unit
        self._count(torch.where(difference <= 1, 0.0, difference), difference < 0)

    def _count(self, difference: Tensor, tie: Tensor) -> None:
        bad = difference > 0
        self.elements += difference.numel()
        self.ties += int((bad & tie).sum())
        self.wrong += int((bad & ~tie).sum())
        self.worst = max(self.worst, float(difference.max()))


class AbsentError(Exception):
    """This build of torch has no such kernel."""


Check = Callable[[Tally], None]
