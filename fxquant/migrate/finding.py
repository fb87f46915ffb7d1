"""What the migration says about one place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a finding is about."""

    MOVES = "moves"
    """A name that is rewritten to ``fxquant.compat``."""
    STAYS = "stays"
    """A name of torch.ao that is not rewritten, with the reason."""
    CHECK = "check"
    """Something that behaves otherwise, or has to be changed by hand."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One place in a file.

    Attributes:
        line: counted from 1.
        column: counted from 1.
        text: what is there, and what follows.
        kind: what it is about.
    """

    line: int
    column: int
    text: str
    kind: Kind

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("a finding says something")

    def shown(self, path: str) -> str:
        """``path:line:column: kind: text``, which editors make a link of."""
        return f"{path}:{self.line}:{self.column}: {self.kind.value}: {self.text}"
