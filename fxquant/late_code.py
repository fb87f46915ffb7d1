"""Code of changed graphs, written once: fx writes and compiles it anew after every change."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from fxquant.timing import collector_paused


class HasCode(Protocol):
    """A module with code of its graph that may be out of date."""

    def write_code(self) -> None:
        """Write it if it is."""


class _Waiting(threading.local):
    def __init__(self) -> None:
        self.depth = 0
        self.modules: list[weakref.ref[HasCode]] = []


_WAITING = _Waiting()


@contextmanager
def code_written_once() -> Iterator[None]:
    """In the block graphs of this thread get no code; at its end each changed one gets it.

    A module that is called before has its code written for the call. Of nested blocks the outermost
    writes. After an error nothing is written until it is needed.

    Python's garbage collector pauses meanwhile: of the many objects that a large graph is made of
    none is garbage, and looking through all of them again and again takes twice as long as the
    work (10,000 nodes).
    """
    _WAITING.depth += 1
    try:
        with collector_paused():
            yield
    except BaseException:
        if _WAITING.depth == 1:
            _WAITING.modules.clear()
        raise
    finally:
        _WAITING.depth -= 1
    if not _WAITING.depth:
        waiting, _WAITING.modules = _WAITING.modules, []
        for module in (reference() for reference in waiting):
            if module is not None:
                module.write_code()


def may_wait(module: HasCode) -> bool:
    """Whether the code of ``module`` will be written later."""
    if _WAITING.depth:
        _WAITING.modules.append(weakref.ref(module))
    return bool(_WAITING.depth)
