"""Which kernel is the fastest on this machine, for each op and shape: measured, and remembered.

A kernel that is called again and again finds its weight and its input in the cache, which it does
not in a network. So all ops of a network take turns, and a kernel is timed in the place that its op
has among them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from fxquant.autocast import no_autocast
from fxquant.errors import ConfigError
from fxquant.kernel_tasks import FLOATS, Call, Task, calls_of, conversion_calls
from fxquant.machine_file import MachineFile, default_folder
from fxquant.timing import collector_paused

Clock = Callable[[], float]

_MARGIN: Final = 0.95
"""A kernel that is not at least 5 % faster than the usual one is not worth a difference."""
_ENTRIES: Final = 5000
_AT_ONCE: Final = 64 * 2**20
"""Elements of weights and activations that are held at a time."""
_WARMUP: Final = 2


@dataclass(slots=True)
class _Work:
    """Calls that are timed under one name."""

    name: str
    elements: int
    calls: Callable[[], Mapping[str, Call]]
    times: dict[str, float] = field(default_factory=dict)


class KernelTable:
    """Measured times of kernels, by op and shape.

    ``convert_fx(prepared, tune=True)`` uses one with the defaults. Make one yourself to keep the
    times elsewhere or nowhere, to measure longer, or to read them.

    Args:
        folder: of the file, one for each processor, version of torch and number of threads.
            ``"default"`` is ``$FXQUANT_CACHE`` or ``fxquant`` in the user's cache folder; ``None``
            keeps the times in this object only.
        rounds: how often every kernel is timed; the fastest counts.
        measure: time what is not known; otherwise such ops keep their usual kernel.
        clock: gives seconds.

    Raises:
        ConfigError: ``rounds`` is less than 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = "default",
        *,
        rounds: int = 15,
        measure: bool = True,
        clock: Clock = time.perf_counter,
    ) -> None:
        if rounds < 1:
            raise ConfigError(f"KernelTable needs rounds >= 1, got {rounds}")
        self.rounds = rounds
        self.measures = measure
        self.clock = clock
        self._folder = folder
        self._files: dict[int, MachineFile] = {}

    @property
    def path(self) -> Path | None:
        """The file for the number of threads that torch has now."""
        return self._file.path

    @property
    def times(self) -> dict[str, dict[str, float]]:
        """Op and shape -> kernel -> seconds, for the number of threads that torch has now."""
        return {name: dict(found) for name, found in self._file.entries.items() if _is_times(found)}

    @property
    def _file(self) -> MachineFile:
        threads = torch.get_num_threads()
        if threads not in self._files:
            folder = default_folder() if self._folder == "default" else self._folder
            self._files[threads] = MachineFile(
                None if folder is None else Path(folder), "kernels", largest=_ENTRIES
            )
        return self._files[threads]

    # -- reading ------------------------------------------------------------------------------

    def known(self, name: str, wanted: Iterable[str]) -> dict[str, float] | None:
        """Seconds of the ``wanted`` kernels, or ``None`` where one of them was never timed."""
        found = self._file.get(name)
        if not _is_times(found) or any(kernel not in found for kernel in wanted):
            return None
        return {kernel: float(found[kernel]) for kernel in wanted}

    def task(self, task: Task, kernels: Sequence[str]) -> dict[str, float]:
        """Seconds of an op on each of ``kernels`` and in floating point; timed where unknown.

        Returns:
            Nothing where a kernel is not known and this table does not measure.
        """
        self.measure([(task, kernels)])
        return self.known(task.key, (*kernels, *FLOATS)) or {}

    def conversions(self, shapes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Any]:
        """Seconds of ``quantize`` and ``dequantize`` for tensors of each shape, likewise."""
        names = {shape: f"convert {'x'.join(map(str, shape))}" for shape in shapes}
        missing = [s for s, n in names.items() if self.known(n, ("quantize", "dequantize")) is None]
        works = [
            _Work(names[shape], _elements(shape), partial(conversion_calls, shape))
            for shape in missing
        ]
        self._measure(works)
        found = {s: self.known(n, ("quantize", "dequantize")) for s, n in names.items()}
        return {shape: times for shape, times in found.items() if times is not None}

    # -- measuring ----------------------------------------------------------------------------

    def measure(self, work: Iterable[tuple[Task, Sequence[str]]]) -> int:
        """Time what is not known yet, all ops taking turns, and write the file.

        Args:
            work: ops, and the kernels that could run each; each op is timed in floating point too.

        Returns:
            How many ops were timed.
        """
        wanted: dict[str, tuple[Task, tuple[str, ...]]] = {}
        for task, kernels in work:
            every = (*kernels, *FLOATS)
            if self.known(task.key, every) is None:
                wanted.setdefault(task.key, (task, every))
        works = [
            _Work(key, _size_of(task), partial(calls_of, task, every))
            for key, (task, every) in wanted.items()
        ]
        return self._measure(works)

    def _measure(self, works: Sequence[_Work]) -> int:
        if not works or not self.measures:
            return 0
        with torch.inference_mode(False), torch.no_grad(), no_autocast():
            for part in _parts(works):
                self._take_turns(part)
        self._file.put({work.name: work.times for work in works})
        return len(works)

    def _take_turns(self, works: Sequence[_Work]) -> None:
        """One call of every op in a round, the next of its kernels in each."""
        calls = [(work, list(work.calls().items())) for work in works]
        slots = max(len(kernels) for _, kernels in calls)
        clock = self.clock
        with collector_paused():
            for turn in range(_WARMUP + self.rounds):
                for slot in range(slots):
                    for work, kernels in calls:
                        if slot >= len(kernels):
                            continue
                        name, call = kernels[(slot + turn) % len(kernels)]
                        start = clock()
                        call()
                        took = clock() - start
                        if turn >= _WARMUP:
                            work.times[name] = min(work.times.get(name, took), took)


def _is_times(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(t, (int, float)) for t in found.values())


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _size_of(task: Task) -> int:
    g = task.geometry
    weight = g.outputs * g.inputs * _elements(g.kernel)
    return 4 * weight + 2 * _elements(task.input_shape) + _elements(task.output_shape)


def _parts(works: Sequence[_Work]) -> list[list[_Work]]:
    """Works in order, in parts that fit into memory together."""
    parts: list[list[_Work]] = [[]]
    held = 0
    for work in works:
        if parts[-1] and held + work.elements > _AT_ONCE:
            parts.append([])
            held = 0
        parts[-1].append(work)
        held += work.elements
    return parts


def fastest(times: Mapping[str, float], usual: str, exact: Iterable[str]) -> str:
    """The kernel to run: ``usual``, unless one of ``exact`` takes 5 % less.

    Args:
        times: kernel -> seconds.
        usual: what is run where nothing was measured.
        exact: the kernels that give the right integers here.
    """
    timed = [kernel for kernel in exact if kernel in times]
    if usual not in times or not timed:
        return usual
    best = min(timed, key=times.__getitem__)
    return best if times[best] <= _MARGIN * times[usual] else usual


def table_of(tune: bool | KernelTable) -> KernelTable | None:
    """What a public ``tune`` stands for.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(tune, KernelTable):
        return tune
    if not isinstance(tune, bool):
        raise ConfigError(
            f"tune takes True, False or a fxquant.KernelTable, got {type(tune).__name__}"
        )
    return KernelTable() if tune else None
