"""What is told of every kernel that was compared."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One kernel against the definition.

    Attributes:
        name: the last op that the kernel carries out.
        kind: the kinds of all of them, such as ``conv2d+relu``.
        kernel: what ran.
        elements: how many were compared.
        off_by_one: how many integers differ by one.
        ties: how many of these are halfway, or within float32 rounding of it.
        more: how many differ by more than one.
        max_lsb: the largest difference. For a kernel that writes floats: in units of its rounding
            error bound.
        floating: the kernel writes floats; then ``more`` counts elements beyond the error bound.
    """

    name: str
    kind: str
    kernel: str
    elements: int
    off_by_one: int
    ties: int
    more: int
    max_lsb: float
    floating: bool = False

    @property
    def fraction(self) -> float:
        """The part of the elements that differ."""
        return (self.off_by_one + self.more) / max(self.elements, 1)

    @property
    def unexplained(self) -> int:
        """How many elements differ and are no ties."""
        return self.off_by_one - self.ties + self.more

    @property
    def ok(self) -> bool:
        """Whether every difference is a tie."""
        return self.unexplained == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All kernels of a model against their definitions; ``print`` shows a table.

    Attributes:
        rows: one per kernel, in the order in which they ran.
    """

    rows: tuple[ParityRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[ParityRow, ...]:
        """The rows that are not."""
        return tuple(row for row in self.rows if not row.ok)

    def __str__(self) -> str:
        table = [
            (
                row.name,
                row.kind,
                row.kernel,
                row.elements,
                row.off_by_one,
                row.ties,
                row.more,
                f"{row.max_lsb:.3g}" + (" of bound" if row.floating else ""),
                f"{100 * row.fraction:.3f} %",
                "ok" if row.ok else "WRONG",
            )
            for row in self.rows
        ]
        headers = (
            "op", "kind", "kernel", "elements", "off by 1", "of them ties", "more", "max LSB",
            "differ", "",
        )  # fmt: skip
        return tabulate(table, headers=headers, disable_numparse=True)
