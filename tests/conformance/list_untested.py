"""Statements that no test claims: ``python tests/conformance/list_untested.py``.

With ``--semantics FILE`` the table is also compared with the text that it numbers: as many
sections, as many points in each.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def statements() -> dict[str, Any]:
    """The table: id -> statement."""
    spec = spec_from_file_location("conformance_statements", HERE / "statements.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {statement.id: statement for statement in module.STATEMENTS}


def claimed(texts: Iterable[str]) -> set[str]:
    """The ids in ``@pytest.mark.statement(...)`` of test functions."""
    found = set()
    for source in texts:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.statement":
                found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {str(one) for one in found}


def sources() -> list[str]:
    """The text of every test file."""
    return [path.read_text(encoding="utf-8") for path in sorted(HERE.parent.rglob("test_*.py"))]


def points(text: str) -> dict[str, int]:
    """Section number -> how many points it has, in a text with ``## 1. ...`` and ``- ...``."""
    counts: dict[str, int] = {}
    section = ""
    for line in text.splitlines():
        heading = re.match(r"## (\d+)\. ", line)
        if heading:
            section = heading[1]
            counts[section] = 0
        elif section and line.startswith("- "):
            counts[section] += 1
    return counts


def numbered(ids: Iterable[str]) -> dict[str, int]:
    """Section number -> the highest point that an id names."""
    counts: dict[str, int] = {}
    for one in ids:
        section, point = re.findall(r"\d+", one)
        counts[section] = max(counts.get(section, 0), int(point))
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is untested; 1 where there is anything, or the table is not that of the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--semantics", type=Path, help="the text that the table numbers")
    options = parser.parse_args(arguments)
    table = statements()
    covered = claimed(sources())
    untested = [one for one in table.values() if one.id not in covered]
    for one in untested:
        sys.stdout.write(f"{one.id} [{one.tag}] {one.text}\n")
    sys.stdout.write(f"{len(untested)} of {len(table)} statements without a test\n")
    wrong = False
    if options.semantics is not None:
        wanted, found = points(options.semantics.read_text(encoding="utf-8")), numbered(table)
        wrong = wanted != found
        if wrong:
            sys.stdout.write(f"the text has {wanted} points, the table {found}\n")
    return 1 if untested or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
