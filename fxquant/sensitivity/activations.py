"""A bounded store of activations, kept so that prefixes of a network are computed once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

Key = tuple[int, int]
"""Number of the batch, and number of the value (see :mod:`fxquant.sensitivity.simulator`)."""


@dataclass(slots=True)
class StoreCounts:
    """What a store has done.

    Attributes:
        hits: values that were there when they were wanted.
        stored: values that were kept in memory.
        spilled: values that were written to disk.
        refused: values for which there was no room; they are computed again when wanted.
        peak_bytes: the most memory that values took at one time.
    """

    hits: int = 0
    stored: int = 0
    spilled: int = 0
    refused: int = 0
    peak_bytes: int = 0


@dataclass(slots=True)
class _Entry:
    value: Any
    size: int
    used: int
    file: Path | None = None


@dataclass
class ActivationStore:
    """Keeps values up to a budget; what does not fit goes to disk or is forgotten.

    Work comes in rounds, each of which visits every batch once, in order, and wants what the round
    before left. So room is made by dropping, oldest first, what this round has passed by, and never
    what a batch still to come will want.

    Args:
        budget_bytes: the most memory that values may take.
        directory: where values that do not fit are written; ``None`` forgets them instead.
    """

    budget_bytes: int
    directory: Path | None = None
    counts: StoreCounts = field(default_factory=StoreCounts)
    round: int = 0
    _entries: dict[Key, _Entry] = field(default_factory=dict)
    _bytes: int = 0
    _files: int = 0
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def start_round(self) -> None:
        """Begin another pass over the batches."""
        self.round += 1

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> Any:
        """The value at ``key``, which is there."""
        entry = self._entries[key]
        entry.used = self.round
        self.counts.hits += 1
        if entry.file is None:
            return entry.value
        return torch.load(entry.file, weights_only=True)

    def put(self, key: Key, value: Any) -> None:
        """Keep ``value``, if there is room or a disk."""
        if key in self._entries:
            self._entries[key].used = self.round
            return
        size = size_of(value)
        if not self._make_room(size, key[0]):
            if self.directory is None or not _can_be_written(value):
                self.counts.refused += 1
                return
            self._entries[key] = _Entry(None, 0, self.round, self._write(value))
            self.counts.spilled += 1
            return
        self._entries[key] = _Entry(value, size, self.round)
        self._bytes += size
        self.counts.stored += 1
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._bytes)

    def close(self) -> None:
        """Forget everything and delete what was written."""
        self._entries.clear()
        self._bytes = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _make_room(self, size: int, batch: int) -> bool:
        if size > self.budget_bytes:
            return False
        self._drop_files(batch)
        while self._bytes + size > self.budget_bytes:
            passed = [k for k, e in self._entries.items() if e.size and self._is_past(k, e, batch)]
            if not passed:
                return False
            self._drop(min(passed, key=lambda k: (self._entries[k].used, k)))
        return True

    def _drop_files(self, batch: int) -> None:
        """Delete files that this round has passed by."""
        for key, entry in list(self._entries.items()):
            if entry.file is not None and self._is_past(key, entry, batch):
                self._drop(key)

    def _is_past(self, key: Key, entry: _Entry, batch: int) -> bool:
        waits = entry.used == self.round - 1 and key[0] > batch
        return entry.used < self.round and not waits

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self._bytes -= entry.size
        if entry.file is not None:
            entry.file.unlink(missing_ok=True)

    def _write(self, value: Any) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxquant-", dir=self.directory)
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.pt"
        torch.save(value, path)
        return path


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of a graph, depth first."""
    found: list[Tensor] = []

    def visit(item: Any) -> Any:
        if isinstance(item, Tensor):
            found.append(item)
        return item

    fx.node.map_aggregate(value, visit)
    yield from found


def size_of(value: Any) -> int:
    """Bytes that a value keeps alive; views of one memory count once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(value)
    }
    return sum(storages.values())


def _can_be_written(value: Any) -> bool:
    """Whether a value is made of what ``torch.load(weights_only=True)`` reads back."""
    if isinstance(value, (tuple, list)):
        return all(map(_can_be_written, value))
    return value is None or isinstance(value, (Tensor, int, float, bool, str))
