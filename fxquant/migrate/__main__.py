"""``python -m fxquant.migrate PATH ... [--write]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fxquant.errors import MissingDependencyError

_SKIPPED = {".git", ".venv", "venv", "__pycache__", "node_modules", "site-packages"}


def main(arguments: Sequence[str] | None = None) -> int:
    """List, and with ``--write`` rewrite, the uses of torch.ao's FX API.

    Args:
        arguments: of the command line; by default this process's.

    Returns:
        0, or 1 where a file could not be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fxquant.migrate",
        description="Move code from torch.ao's FX quantization API to fxquant.compat.",
    )
    parser.add_argument("paths", nargs="+", type=Path, help="Python files, or folders of them")
    parser.add_argument("--write", action="store_true", help="rewrite the files")
    options = parser.parse_args(arguments)
    try:
        from libcst import ParserSyntaxError

        from fxquant.migrate.rewrite import migrate_source
    except ImportError as error:
        raise MissingDependencyError(
            "fxquant.migrate needs libcst: pip install 'fxquant[migrate]'"
        ) from error
    failed = changed = found = 0
    for path in _files(options.paths):
        try:
            result = migrate_source(path.read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError, ParserSyntaxError) as error:
            failed += 1
            sys.stdout.write(f"{path}: cannot be read: {str(error).splitlines()[0]}\n")
            continue
        for finding in result.findings:
            sys.stdout.write(f"{finding.shown(str(path))}\n")
        found += len(result.findings)
        changed += result.changed
        if result.changed and options.write:
            path.write_bytes(result.after.encode("utf-8"))
    verb = "rewritten" if options.write else "to rewrite (pass --write)"
    sys.stdout.write(f"{found} finding(s); {changed} file(s) {verb}\n")
    return 1 if failed else 0


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """The Python files under ``paths``, each once, in order."""
    seen: set[Path] = set()
    for path in paths:
        inside = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in inside:
            hidden = path.is_dir() and _SKIPPED & set(file.relative_to(path).parts)
            if file not in seen and not hidden:
                seen.add(file)
                yield file


if __name__ == "__main__":
    sys.exit(main())
