"""One process, one peer: it sets up, says how right it is, and runs when it is its turn.

Started by :mod:`.coordinator` as ``python -m benchmarks.speed.worker PEER FOLDER THREADS CPUS
READER WRITER``; the last two are the ends of pipes.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.speed.peers import BY_NAME, Job, Ready, UnavailableError
from benchmarks.speed.protocol import Built, Channel, Failed, Slice
from benchmarks.speed.workloads import read

_WARM_SECONDS, _WARM_CALLS = 0.5, 5
_UNTIMED = 2  # calls at the beginning of a turn


def main() -> None:
    """Serve until the coordinator hangs up."""
    peer, folder, threads, cpus, reader, writer = sys.argv[1:]
    channel = Channel(int(reader), int(writer))
    with torch.no_grad():
        try:
            ready, built = set_up(
                peer, Path(folder), int(threads), [int(cpu) for cpu in cpus.split(",")]
            )
        except Exception as error:  # noqa: BLE001  # whatever a peer cannot do is its result
            traceback.print_exc()
            channel.send(Failed(reason=reason_of(error)))
            return
        channel.send(built)
        gc.collect()
        gc.freeze()
        gc.disable()
        while isinstance(seconds := channel.receive(), float):
            with torch.inference_mode():
                channel.send(turn(ready.call, seconds))
            gc.collect(0)


def set_up(name: str, folder: Path, threads: int, cpus: Iterable[int]) -> tuple[Ready, Built]:
    """Build the peer, pin the process, warm up, and compare with FP32.

    Raises:
        Exception: whatever the peer raises.
    """
    start = time.perf_counter()
    peer = BY_NAME[name]
    torch.set_num_threads(threads)
    job = Job(workload=read(folder), folder=folder, threads=threads)
    family = importlib.import_module(f"benchmarks.speed.peers.{peer.family}")
    load = family.prepare(job, **peer.options)
    pin(cpus)
    ready = load()
    with torch.inference_mode():
        turn(ready.call, _WARM_SECONDS, least=_WARM_CALLS)
        sqnr, agreement = job.workload.score(ready.logits)
    pin(cpus)  # threads of the runtime, should it have chosen cores itself
    built = Built(
        settings=ready.settings,
        sqnr=None if sqnr == math.inf else sqnr,
        agreement=agreement,
        seconds=time.perf_counter() - start,
    )
    return ready, built


def pin(cpus: Iterable[int]) -> None:
    """Keep every thread of this process, and those it will start, on ``cpus``."""
    wanted = set(cpus)
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), wanted)


def turn(call: Callable[[], object], seconds: float, *, least: int = 1) -> Slice:
    """Call for about ``seconds``, after calls that bring caches and threads back.

    These are two, or one where that takes longer than the turn.

    Args:
        call: what is timed.
        seconds: of the turn, untimed calls not counted.
        least: calls to time at least.
    """
    now = time.perf_counter()
    end = now + seconds
    for number in range(_UNTIMED):
        if number == 0 or now < end:
            call()
            now = time.perf_counter()
    times: list[float] = []
    waited, now = _waited(), time.perf_counter()
    start, end = now, now + seconds
    while now < end or len(times) < least:
        call()
        before, now = now, time.perf_counter()
        times.append(1e3 * (now - before))
    return Slice(
        median=statistics.median(times),
        minimum=min(times),
        calls=len(times),
        waited=(_waited() - waited) / (now - start),
    )


def _waited() -> float:
    """Seconds that the threads of this process have spent waiting for a core."""
    seconds = 0.0
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            seconds += int((thread / "schedstat").read_text().split()[1]) / 1e9
    return seconds


def reason_of(error: Exception) -> str:
    """One line for the table."""
    if isinstance(error, UnavailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'fxquant[bench]'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


if __name__ == "__main__":
    main()
