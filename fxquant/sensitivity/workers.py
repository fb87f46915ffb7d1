"""Sharing the layers of a sweep among processes, machines or cores, with ``torch.distributed``.

Work goes in rounds: in each, every process measures one layer; then all of them learn all results.
So every process ends with the whole report, and a process that is interrupted stops all of them
after the round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from fxquant.errors import ConfigError

_MEETINGS = itertools.count()
"""Processes come to each of them in the same order, as they run the same script."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those that share the work.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """What every process passed, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def check_same(self, fingerprint: str) -> None:
        """Refuse to share work on different things.

        Raises:
            ConfigError: a process has another model, other data or other options.
        """
        found = self.gather(fingerprint)
        if len(set(found)) > 1:
            raise ConfigError(
                "the processes analyse different things: their models, data or options differ."
                " Give all of them the same, and do not shard the data"
            )

    def share(
        self,
        items: Sequence[Item],
        work: Callable[[Item], Result],
        done: Callable[[Result], object],
    ) -> bool:
        """Do ``work`` for all items, this process its share; ``done`` gets every result in order.

        Returns:
            ``False`` where a process was interrupted by ``KeyboardInterrupt``; what was finished
            until then went to ``done``.
        """
        for start in range(0, len(items), self.size):
            mine = start + self.rank
            found: tuple[bool, Result | None] = (True, None)
            try:
                if mine < len(items):
                    found = (True, work(items[mine]))
            except KeyboardInterrupt:
                found = (False, None)
            gathered = self.gather(found)
            for _, result in gathered:
                if result is not None:
                    done(result)
            if not all(alive for alive, _ in gathered):
                return False
        return True


@contextmanager
def team(distributed: bool | None) -> Iterator[Team]:
    """The processes that share the work.

    Args:
        distributed: ``True`` joins what ``torchrun`` started, by gloo; ``False`` works alone;
            ``None`` shares where the caller has set up ``torch.distributed``.

    Raises:
        ConfigError: there is nothing to join.
    """
    ready = dist.is_available() and dist.is_initialized()
    if distributed is False or (distributed is None and not ready):
        yield Team()
        return
    if not dist.is_available():
        raise ConfigError("distributed=True, but this build of torch has no torch.distributed")
    joined = not ready
    if joined:
        if not dist.is_torchelastic_launched():
            raise ConfigError(
                "distributed=True joins processes that torchrun started: run torchrun"
                " --nproc-per-node=4 script.py, or set up torch.distributed before"
            )
        _join()
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
        if joined:
            dist.barrier()  # who leaves first would cut the others off
    finally:
        if joined:
            dist.destroy_process_group()


def _join() -> None:
    """Meet the other processes that torchrun started.

    What an earlier meeting wrote to torchrun's store is still there, the addresses of connections
    that were closed among it: every meeting has keys of its own.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"fxquant-{next(_MEETINGS)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
