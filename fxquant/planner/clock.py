"""Where the time of a call goes, node by node, measured inside the network.

A kernel that is timed alone, in a loop, finds its weight and its input in the cache, which it does
not in a network. So whole graphs run, taking turns, and each call of a node is timed where it
stands. Each turn begins with a call that is not timed: in use, a model follows itself and not
another. Freeing what is read for the last time counts for the reader, as in generated code.
"""

from __future__ import annotations

import gc
import inspect
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from fxquant.autocast import no_autocast
from fxquant.graph_module import QuantGraphModule

Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """Seconds of one call of a graph.

    Attributes:
        nodes: name of a node -> median of its calls.
        whole: fastest of whole calls, as users make them: a long call is interrupted more often
            than a short one, so that its median is no sum of medians.
    """

    nodes: Mapping[str, float]
    whole: float

    @property
    def overhead(self) -> float:
        """What a whole call takes at least beside its nodes."""
        return max(0.0, self.whole - sum(self.nodes.values()))


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    call: Callable[..., Any]
    args: Any
    kwargs: Any
    last_uses: tuple[str, ...]


class _TimedGraph:
    """A graph as a list of calls, each timed."""

    def __init__(self, gm: QuantGraphModule, bound: inspect.BoundArguments) -> None:
        gm.pack()
        self.gm = gm
        self.bound = bound
        self.inputs: dict[str, Any] = {}
        self.steps: list[_Step] = []
        last: dict[str, str] = {}
        for node in gm.graph.nodes:
            for source in node.all_input_nodes:
                last[source.name] = node.name
        for node in gm.graph.nodes:
            self._add(node, last)

    def _add(self, node: fx.Node, last: Mapping[str, str]) -> None:
        if node.op == "placeholder":
            self.inputs[node.name] = self.bound.arguments[str(node.target).lstrip("*")]
        elif node.op == "get_attr":  # generated code looks it up in every call
            find = operator.attrgetter(str(node.target))
            self.steps.append(_Step(node.name, find, (self.gm,), {}, ()))
        elif node.op != "output":
            uses = tuple(s.name for s in node.all_input_nodes if last[s.name] == node.name)
            call = _callable(self.gm, node)
            self.steps.append(_Step(node.name, call, node.args, node.kwargs, uses))

    def run(self, record: Mapping[str, list[float]] | None, clock: Clock) -> None:
        """Run every step; note its seconds where asked."""
        values: dict[str, Any] = dict(self.inputs)
        for step in self.steps:
            args = fx.map_arg(step.args, lambda n: values[n.name])
            kwargs = fx.map_arg(step.kwargs, lambda n: values[n.name])
            for name in step.last_uses:
                del values[name]
            start = clock()
            value = step.call(*args, **kwargs)
            del args, kwargs
            took = clock() - start
            values[step.name] = value
            del value
            if record is not None:
                record[step.name].append(took)


def _callable(gm: QuantGraphModule, node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))
    if node.op == "call_method":
        name = str(node.target)
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def node_times(
    graphs: Mapping[str, QuantGraphModule],
    bound: inspect.BoundArguments,
    *,
    repeats: int = 15,
    warmup: int = 3,
    after_round: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, NodeTimes]:
    """Time every node of several graphs, the graphs taking turns.

    Args:
        graphs: name -> graph; all take the same inputs.
        bound: the inputs.
        repeats: rounds that are timed.
        warmup: rounds before them that are not.
        after_round: called after every round.
        clock: gives seconds, see :func:`call_times`.

    Returns:
        name -> times.
    """
    timed = {name: _TimedGraph(gm, bound) for name, gm in graphs.items()}
    records: dict[str, dict[str, list[float]]] = {
        name: {step.name: [] for step in graph.steps} for name, graph in timed.items()
    }
    wholes: dict[str, list[float]] = {name: [] for name in graphs}
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad(), no_autocast():
            for number in range(warmup + repeats):
                for name in _turned(list(graphs), number):
                    counts = number >= warmup
                    graphs[name](*bound.args, **bound.kwargs)
                    start = clock()
                    graphs[name](*bound.args, **bound.kwargs)
                    if counts:
                        wholes[name].append(clock() - start)
                    timed[name].run(records[name] if counts else None, clock)
                if after_round is not None:
                    after_round()
    finally:
        if enabled:
            gc.enable()
    return {
        name: NodeTimes(
            {node: statistics.median(found) for node, found in records[name].items()},
            min(wholes[name]),
        )
        for name in graphs
    }


def call_times(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of calls that take turns; each turn begins with a call that is not timed.

    Args:
        callables: name -> what is called.
        repeats: rounds that are timed.
        warmup: rounds before them that are not.
        clock: gives seconds; ``time.thread_time`` leaves out what other processes take, for one
            thread and calls of milliseconds.

    Returns:
        name -> one time for each round.
    """
    times: dict[str, list[float]] = {name: [] for name in callables}
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            for number in range(warmup + repeats):
                for name in _turned(list(callables), number):
                    callables[name]()
                    start = clock()
                    callables[name]()
                    if number >= warmup:
                        times[name].append(clock() - start)
                gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return times


def _turned(names: Sequence[str], number: int) -> list[str]:
    first = number % len(names)
    return [*names[first:], *names[:first]]
