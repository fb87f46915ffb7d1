"""The op table of a target as Markdown: ``python -m fxquant.targets.document``.

It writes what ``docs/targets.md`` holds to the standard output.
"""

from __future__ import annotations

import sys

from tabulate import tabulate

from fxquant.targets.registry import TARGETS
from fxquant.targets.table import Role, Row, Target

_ROLES = {
    Role.COMPUTE: "int8, own output scale",
    Role.SHARES: "int8, scale of its input",
    Role.FLOAT: "FP32 by design",
}


def markdown() -> str:
    """The page on targets."""
    tables = "\n\n".join(
        f"## Target `{target.name}`\n\n{_table(target)}"
        for target in TARGETS.values()
        if target.executes
    )
    return (
        "# Which op runs where\n\n"
        "Made by `python -m fxquant.targets.document`. An op that is not listed runs in FP32"
        " between a dequantize and a quantize; `explain` says so. Epilogues are activation"
        " functions that run as part of the op: for nothing (*saturation*: the output range"
        " expresses the clamp),"
        " inside the kernel (*kernel*), or on the kernel's float result (*float*). Target"
        " `reference` has the same ops, takes integers of any width, and runs float ops between"
        " quantize and dequantize.\n\n"
        f"{tables}\n"
    )


def _table(target: Target) -> str:
    rows = [
        (f"`{row.kind}`", _runs_as(row), _kernel(row), _epilogues(row))
        for row in target.rows.values()
    ]
    headers = ("op", "runs as", "kernel, or why not", "epilogues")
    return tabulate(rows, headers=headers, tablefmt="github")


def _runs_as(row: Row) -> str:
    if row.static:
        return _ROLES[row.role]
    return "int8 weight" if row.weight_only else "int8 weight, activations at run time"


def _kernel(row: Row) -> str:
    if row.role is Role.FLOAT:
        return row.reason
    if not row.static:
        return f"`{row.dynamic or row.weight_only}`"
    result = ", or a float32 result" if row.float_output else ""
    dynamic = f"; dynamic: `{row.dynamic}`" if row.dynamic else ""
    return f"`{row.kernel}`{result}{dynamic}"


def _epilogues(row: Row) -> str:
    groups: dict[str, list[str]] = {}
    for kind, how in row.epilogues.items():
        groups.setdefault(how.value, []).append(kind)
    return "; ".join(f"{how}: {', '.join(kinds)}" for how, kinds in groups.items())


if __name__ == "__main__":
    sys.stdout.write(markdown())
