"""Measurements of this machine in one small JSON file, which several processes may write.

What was measured holds for the processor, the version of torch, the number of its threads and the
settings that choose its kernels: all of them are in the name of the file, and in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from fxquant.errors import ConfigWarning, Diagnostics
from fxquant.machine import made_on, processor

CACHE_VARIABLE: Final = "FXQUANT_CACHE"
"""The environment variable that names the folder of such files."""

_FORMAT: Final = 2
_LOCKS: Final[Any] = import_module("fcntl") if find_spec("fcntl") else None
"""Not on Windows: the last of two processes that write at once wins there."""


def default_folder() -> Path:
    """``$FXQUANT_CACHE``, else ``fxquant`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fxquant"


def identity() -> dict[str, Any]:
    """What measurements hold for: processor, versions, settings, and threads of torch."""
    return {**made_on(), "threads": torch.get_num_threads(), "model": processor()}


def digest(text: str) -> str:
    """A short name for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class MachineFile:
    """Entries by name, kept in ``KIND-DIGEST.json``, of the machine and threads as they are now.

    A file that is damaged, or of another machine or format, is ignored with a
    :class:`~fxquant.errors.ConfigWarning` and written anew. One that cannot be written is warned
    of, and what was measured is kept for this object only.

    Args:
        folder: where the file is; ``None`` keeps nothing.
        kind: of what is measured.
        largest: how many entries are kept; the oldest go first.
    """

    def __init__(self, folder: Path | None, kind: str, *, largest: int) -> None:
        self.kind = kind
        self.largest = largest
        self.machine = identity()
        name = digest(json.dumps(self.machine, sort_keys=True, default=str))
        self.path = None if folder is None else folder / f"{kind}-{name}.json"
        self.entries: dict[str, Any] = self._read(tell=True)

    def get(self, name: str) -> Any:
        """An entry, or ``None``."""
        return self.entries.get(name)

    def put(self, entries: Mapping[str, Any]) -> None:
        """Add entries, and write them and what other processes wrote meanwhile."""
        self._add(self.entries, entries)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.parent):
                written = self._read(tell=False)
                self._add(written, entries)
                self._replace(written)
        except OSError as error:
            self._warn(
                f"cannot be written ({error}), so what was measured is measured again next time."
                f" Set {CACHE_VARIABLE} to a folder that can be written"
            )

    def _add(self, kept: dict[str, Any], entries: Mapping[str, Any]) -> None:
        for name, entry in entries.items():
            kept.pop(name, None)
            kept[name] = entry
        for name in list(kept)[: max(0, len(kept) - self.largest)]:
            del kept[name]

    def _read(self, *, tell: bool) -> dict[str, Any]:
        """What the file holds; nothing where it is absent or cannot be used."""
        if self.path is None:
            return {}
        try:
            plain = json.loads(self.path.read_text(encoding="utf-8"))
            if (plain["format"], plain["kind"]) != (_FORMAT, self.kind):
                problem = f"holds {plain['kind']} in format {plain['format']}"
            elif plain["machine"] != json.loads(json.dumps(self.machine, default=str)):
                problem = "was measured on another machine, or with other versions or threads"
            else:
                return dict(plain["entries"])
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"is damaged ({type(error).__name__}: {error})"
        if tell:
            self._warn(f"{problem}; it is ignored, and written anew after the next measurement")
        return {}

    def _replace(self, entries: Mapping[str, Any]) -> None:
        """Write a whole file and give it the name, so that nobody ever reads half of one."""
        assert self.path is not None
        plain = {
            "format": _FORMAT,
            "kind": self.kind,
            "machine": self.machine,
            "entries": dict(entries),
        }
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.kind}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(plain, file, default=str)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _warn(self, problem: str) -> None:
        Diagnostics().warn(f"the file of measurements {self.path} {problem}", ConfigWarning)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in ``folder``, where the system can."""
    if _LOCKS is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _LOCKS.flock(handle, _LOCKS.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which gives the lock back
