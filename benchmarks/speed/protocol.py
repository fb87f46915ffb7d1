"""What coordinator and worker say to each other: one JSON object a line, over a pair of pipes.

The worker begins with a :class:`Built` or a :class:`Failed`. Then the coordinator sends how many
seconds to run for, and the worker answers with a :class:`Slice`; an end of file is the end.
Standard output and error stay free for whatever libraries print.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The peer is set up, warm, and has been judged.

    Attributes:
        settings: what was chosen.
        sqnr: mean over the evaluation inputs, of the logits against FP32 eager, in dB; ``None``
            where they are equal.
        agreement: inputs on which the first class is that of FP32 eager, in percent.
        seconds: that the set-up took.
    """

    settings: str
    sqnr: float | None
    agreement: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The peer cannot take part."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One turn: milliseconds of a call.

    Attributes:
        median: the middle of the calls.
        minimum: the fastest.
        calls: how many there were.
        waited: part of the time in which its threads wanted a core that something else had; above 1
            where several waited at once.
    """

    median: float
    minimum: float
    calls: int
    waited: float


Message: TypeAlias = Built | Failed | Slice
_KINDS: Final = {kind.__name__: kind for kind in (Built, Failed, Slice)}


class Channel:
    """One end of the conversation.

    Args:
        reader: file descriptor to read from.
        writer: file descriptor to write to.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer
        self._pending = b""

    def send(self, message: Message | float) -> None:
        """Send a message, or the seconds of a turn."""
        body: Any = message
        if not isinstance(message, (int, float)):
            body = {"kind": type(message).__name__, **asdict(message)}
        os.write(self.writer, json.dumps(body).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> Message | float | None:
        """The next message; ``None`` when the other end has gone.

        Raises:
            TimeoutError: nothing came in ``timeout`` seconds.
        """
        while b"\n" not in self._pending:
            if not select.select([self.reader], [], [], timeout)[0]:
                raise TimeoutError(f"nothing was heard for {timeout:g} s")
            if not (more := os.read(self.reader, 65536)):
                return None
            self._pending += more
        line, self._pending = self._pending.split(b"\n", 1)
        body = json.loads(line)
        return _message(body) if isinstance(body, Mapping) else float(body)

    def close(self) -> None:
        """Hang up."""
        os.close(self.writer)
        os.close(self.reader)


def _message(body: Mapping[str, Any]) -> Message:
    fields = dict(body)
    made: Message = _KINDS[fields.pop("kind")](**fields)
    return made
