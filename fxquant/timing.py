"""Honest latencies: candidates take turns, so that whatever disturbs the machine disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fxquant.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one call.

    Attributes:
        median: the middle of all calls: what to expect.
        minimum: the fastest call: what the code costs where nothing interferes.
    """

    median: float
    minimum: float


def interleaved_latency(
    callables: Mapping[str, Callable[[], object]],
    repeats: int = 50,
    *,
    warmup: int = 5,
    after_round: Callable[[], object] | None = None,
) -> dict[str, Latency]:
    """Time calls that take turns: one round calls each once, and every round begins with another.

    No gradients are recorded, and garbage is collected between rounds only.

    Args:
        callables: name -> what is called, without arguments.
        repeats: rounds that are timed.
        warmup: rounds before them that are not.
        after_round: called after every round, such as a progress bar's ``update``.

    Returns:
        name -> latency, in the order of ``callables``.

    Raises:
        ConfigError: there is nothing to call, or a number of rounds makes no sense.
    """
    if not callables or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"interleaved_latency needs something to call, repeats >= 1 and warmup >= 0, got"
            f" {len(callables)} callables, repeats={repeats} and warmup={warmup}"
        )
    names = list(callables)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad(), collector_paused():
        for number in range(warmup + repeats):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                call = callables[name]
                start = time.perf_counter()
                call()
                took = time.perf_counter() - start
                if number >= warmup:
                    times[name].append(took)
            gc.collect(0)
            if after_round is not None:
                after_round()
    return {name: Latency(statistics.median(t), min(t)) for name, t in times.items()}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use ``number`` threads inside an operator; restored on the way out.

    Raises:
        ConfigError: fewer than one.
    """
    if number < 1:
        raise ConfigError(f"the number of threads must be >= 1, got {number}")
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python from collecting garbage in the middle of what is timed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
