"""Files that are made once."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make`` unless it is there; two processes never make it at once.

    Args:
        path: the file.
        make: writes the file it is given, which is put in place when it is complete. Its suffix is
            that of ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{path.name}")
            make(unfinished)
            unfinished.rename(path)
    return path
