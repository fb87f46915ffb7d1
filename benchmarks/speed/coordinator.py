"""Starts a process per peer, waits until all are warm, and lets them take turns.

Only one process computes at a time: the others wait for a line from their pipe. Turns are short and
every round begins with another peer, so whatever disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import os
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.speed.peers import Peer
from benchmarks.speed.protocol import Built, Channel, Failed, Slice
from benchmarks.speed.results import Row

_ROOT = Path(__file__).resolve().parents[2]
_PAUSE: Final = 0.02  # seconds between turns, in which threads that spin for work go to sleep
_SLOWEST_TURN: Final = 120.0
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        runs: each gives one figure per peer.
        rounds: of a run; in each, every peer has one turn.
        seconds: of a turn.
        patience: seconds that a set-up may take.
    """

    runs: int = 5
    rounds: int = 4
    seconds: float = 0.2
    patience: float = 1800.0


@dataclass(slots=True, kw_only=True)
class Member:
    """A worker, seen from here."""

    peer: Peer
    process: subprocess.Popen[bytes]
    channel: Channel
    log: Path
    built: Built | None = None
    failure: str = ""

    def hear(self, timeout: float) -> Built | Slice | None:
        """What it says next; ``None``, with the reason kept, when it can say no more."""
        try:
            message = self.channel.receive(timeout)
        except TimeoutError as error:
            self.process.kill()
            self.failure = str(error)
            return None
        if isinstance(message, (Built, Slice)):
            return message
        if isinstance(message, Failed):
            self.failure = message.reason
        else:
            self.failure = f"its process ended with {self.process.wait()}: {_last_line(self.log)}"
        return None


def measure(
    peers: Sequence[Peer], folder: Path, threads: int, plan: Plan, *, logs: Path, say: Say
) -> dict[str, Row]:
    """All peers on the workload in ``folder``; one that fails gets a row with the reason.

    Args:
        peers: who takes part.
        folder: of the workload.
        threads: of a call; as many cores are used, the last ones that this process may use.
        plan: how much.
        logs: folder for what the workers print.
        say: takes lines on what is going on.
    """
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise ValueError(f"{threads} threads were asked for, and there are {len(cores)} cores")
    members: list[Member] = []
    try:
        _set_up(members, peers, folder, cores, threads, plan, logs, say)
        turns = _take_turns([m for m in members if m.built is not None], plan, say)
    finally:
        for member in members:
            _dismiss(member)
    return {member.peer.name: _row(member, turns) for member in members}


# -- set-up ----------------------------------------------------------------------------------------


def _set_up(
    members: list[Member],
    peers: Sequence[Peer],
    folder: Path,
    cores: Sequence[int],
    threads: int,
    plan: Plan,
    logs: Path,
    say: Say,
) -> None:
    """Start everybody, as many at once as there are cores for, and wait until all are warm."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(peers)
    with selectors.DefaultSelector() as busy:
        while waiting or busy.get_map():
            while waiting and len(busy.get_map()) < max(1, len(cores) // threads):
                member = _start(waiting.pop(0), folder, cores[-threads:], threads, logs)
                members.append(member)
                deadline = time.monotonic() + plan.patience
                busy.register(member.channel.reader, selectors.EVENT_READ, (member, deadline))
            for member, deadline in _finished(busy):
                busy.unregister(member.channel.reader)
                found = member.hear(max(0.0, deadline - time.monotonic()))
                member.built = found if isinstance(found, Built) else None
                say(_on_set_up(member))


def _finished(busy: selectors.BaseSelector) -> Iterator[tuple[Member, float]]:
    """Those that have something to say, or have taken too long."""
    while True:
        speaking = [key.data for key, _ in busy.select(1.0)]
        late = [key.data for key in busy.get_map().values() if key.data[1] < time.monotonic()]
        if found := speaking + [data for data in late if data not in speaking]:
            yield from found
            return


def _start(peer: Peer, folder: Path, cpus: Sequence[int], threads: int, logs: Path) -> Member:
    here, there = os.pipe(), os.pipe()
    log = logs / f"{folder.name}-{threads}-{peer.name}.log"
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        **peer.environment,
    }
    arguments = [peer.name, str(folder), str(threads), ",".join(map(str, cpus))]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.speed.worker"),
                *(*arguments, str(there[0]), str(here[1])),
            ],
            pass_fds=(there[0], here[1]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    os.close(there[0])
    os.close(here[1])
    return Member(peer=peer, process=process, channel=Channel(here[0], there[1]), log=log)


def _on_set_up(member: Member) -> str:
    if member.built is None:
        return f"  {member.peer.label}: {member.failure}"
    return f"  {member.peer.label}: set up in {member.built.seconds:.0f} s"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "it printed nothing")


def _dismiss(member: Member) -> None:
    member.channel.close()
    try:
        member.process.wait(10)
    except subprocess.TimeoutExpired:
        member.process.kill()
        member.process.wait()


# -- measuring -------------------------------------------------------------------------------------


def _take_turns(members: list[Member], plan: Plan, say: Say) -> dict[str, list[list[Slice]]]:
    """Peer -> for each run, its turns. Who fails is left out from then on."""
    turns: dict[str, list[list[Slice]]] = {member.peer.name: [] for member in members}
    for run in range(plan.runs):
        for found in turns.values():
            found.append([])
        for round_ in range(plan.rounds):
            first = (run * plan.rounds + round_) % max(1, len(members))
            for member in members[first:] + members[:first]:
                if not member.failure and (slice_ := _turn(member, plan.seconds)) is not None:
                    turns[member.peer.name][-1].append(slice_)
        say(f"  run {run + 1} of {plan.runs}")
    return turns


def _turn(member: Member, seconds: float) -> Slice | None:
    time.sleep(_PAUSE)
    with suppress(BrokenPipeError):  # it has died; what it left is heard below
        member.channel.send(seconds)
    found = member.hear(seconds + _SLOWEST_TURN)
    return found if isinstance(found, Slice) else None


def _row(member: Member, turns: dict[str, list[list[Slice]]]) -> Row:
    if member.failure:
        return Row(failure=member.failure)
    runs = turns[member.peer.name]
    return Row(
        built=member.built,
        medians=tuple(statistics.median(s.median for s in run) for run in runs),
        minima=tuple(min(s.minimum for s in run) for run in runs),
        waited=statistics.median(s.waited for run in runs for s in run),
    )
