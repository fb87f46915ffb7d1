"""Tables for people: text fitted to a width, Markdown and HTML, all by ``tabulate``."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

_GAP = 2  # blanks between two columns of tabulate's "simple" format
_TITLE_PADDING = 2  # what tabulate adds to every title
_FALLBACK = (120, 24)  # where the output is no terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        width: cells may be wrapped down to this many characters.
        rank: 0 is never left out; of the others, the highest goes first when space is short.
    """

    title: str
    width: int
    rank: int = 0


def terminal_width() -> int:
    """Columns of the terminal (or of ``COLUMNS``); 120 where the output goes to a file or pipe."""
    return shutil.get_terminal_size(_FALLBACK).columns


def as_text(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None
) -> tuple[str, tuple[str, ...]]:
    """A plain table.

    Args:
        columns: in order.
        rows: one cell for each column.
        width: the longest line wanted. Cells are wrapped, then columns are left out, to keep to it;
            columns of rank 0 stay in any case. ``None`` wraps nothing. Empty columns are not
            shown.

    Returns:
        The table, and the titles of the columns that were left out.
    """
    empty = {i for i, c in enumerate(columns) if c.rank and not any(row[i] for row in rows)}
    kept = [i for i in range(len(columns)) if i not in empty]
    titles = [len(column.title) + _TITLE_PADDING for column in columns]
    natural = [max([titles[i], *(len(row[i]) for row in rows)]) for i in range(len(columns))]
    if width is None:
        return _simple(columns, rows, kept, natural), ()
    smallest = [
        min(whole, max(column.width, title))
        for whole, column, title in zip(natural, columns, titles, strict=True)
    ]
    while _total([smallest[i] for i in kept]) > width:
        optional = [i for i in kept if columns[i].rank > 0]
        if not optional:
            break
        kept.remove(max(optional, key=lambda i: columns[i].rank))
    widths = list(smallest)
    for _ in range(width - _total([smallest[i] for i in kept])):
        neediest = max(kept, key=lambda i: natural[i] - widths[i])
        if natural[neediest] == widths[neediest]:
            break
        widths[neediest] += 1
    left_out = tuple(c.title for i, c in enumerate(columns) if i not in {*kept, *empty})
    return _simple(columns, rows, kept, widths), left_out


def text_parts(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    all_in: str = ".to_markdown()",
) -> list[str]:
    """A plain table and, where columns were left out, a line that names them.

    Args:
        columns: in order.
        rows: one cell for each column.
        width: see :func:`as_text`.
        all_in: the method that shows every column.
    """
    table, left_out = as_text(columns, rows, width)
    if not left_out:
        return [table]
    line = f"Left out at this width (see {all_in}): {', '.join(left_out)}"
    return [table, textwrap.fill(line, width or len(line))]


def as_markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, with every column."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return _table(cells, [c.title for c in columns], "github")


def as_html(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table with every column; cells are escaped."""
    return _table([list(row) for row in rows], [c.title for c in columns], "html")


def _simple(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    kept: Sequence[int],
    widths: Sequence[int],
) -> str:
    cells = [[_wrapped(row[i], widths[i]) for i in kept] for row in rows]
    text = _table(cells, [columns[i].title for i in kept], "simple")
    return "\n".join(line.rstrip() for line in text.splitlines())


def _wrapped(cell: str, width: int) -> str:
    if len(cell) <= width:
        return cell
    return "\n".join(textwrap.wrap(cell, max(width, 1), break_on_hyphens=False))


def _table(rows: list[list[str]], headers: list[str], style: str) -> str:
    return str(tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)
