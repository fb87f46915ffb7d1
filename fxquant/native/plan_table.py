"""The plans of a model, by what calls they are for: few enough to keep, and none made in vain."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from fxquant.native.calls import Key
from fxquant.native.program import Program

KEPT: Final = 16
"""So many plans are kept; the one used longest ago goes first."""

_CALLS_BEFORE_A_PLAN: Final = 8
"""In a full table, a plan is made when there were so many calls for it, this one among them, since
another plan was used last: making one takes about as long."""

_REMEMBERED: Final = 64
"""Calls of so many kinds are counted in a full table."""


@dataclass(slots=True)
class _Entry:
    plan: Program | str
    used: int


class PlanTable:
    """Kinds of calls -> their plans, or why there is none; for several threads at once."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._refused: OrderedDict[Key, deque[int]] = OrderedDict()
        self._clock = itertools.count()
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Key) -> Program | str | None:
        """The plan for such calls, or why there is none; ``None`` where none was tried."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = next(self._clock)
        return entry.plan

    def has_room_for(self, key: Key) -> bool:
        """Whether a plan is to be made for this call: there is room, or it comes more often."""
        with self._changing:
            if len(self._entries) < KEPT:
                return True
            calls = self._refused.pop(key, None) or deque(maxlen=_CALLS_BEFORE_A_PLAN - 1)
            used = min(entry.used for entry in self._entries.values())
            if len(calls) == calls.maxlen and calls[0] > used:
                return True
            calls.append(next(self._clock))
            self._refused[key] = calls
            if len(self._refused) > _REMEMBERED:
                self._refused.popitem(last=False)
            return False

    def __setitem__(self, key: Key, plan: Program | str) -> None:
        with self._changing:
            if key not in self._entries and len(self._entries) >= KEPT:
                del self._entries[min(self._entries, key=lambda k: self._entries[k].used)]
            self._entries[key] = _Entry(plan, next(self._clock))

    def items(self) -> list[tuple[Key, Program | str]]:
        """What is in the table now."""
        with self._changing:
            return [(key, entry.plan) for key, entry in self._entries.items()]
