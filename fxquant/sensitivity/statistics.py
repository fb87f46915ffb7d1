"""What one run over the calibration data knows of every value, whichever observer asks.

Observers that differ in their rule only share one collector; a histogram also serves those who want
extremes. What nobody has watched yet is watched when it is asked for, in another run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant.channel_mean import ChannelMean
from fxquant.collectors import Collector, HistogramCollector, MinMaxCollector
from fxquant.graph_module import QuantGraphModule
from fxquant.inputs import BoundInterpreter
from fxquant.metadata import record_of
from fxquant.observed import qparams_of
from fxquant.passes.insert_channel_means import CHANNEL_MEAN_PREFIX
from fxquant.passes.insert_observers import OBSERVER_PREFIX, device_of, on_device
from fxquant.passes.to_reference import is_observer, reads_weight
from fxquant.qconfig import QConfig, spec_of
from fxquant.range_rules import RangeRule
from fxquant.sensitivity.feeding import BoundBatch
from fxquant.specs import QParams, QuantSpec

Watched = tuple[str, QConfig]
"""Name of a float value, and a qconfig of which the activation's observer alone matters."""
Averaged = tuple[str, int]
"""Name of a float value, and its channel axis."""


def watched(value: str, qconfig: QConfig) -> Watched:
    """The key of a value for the activation observer of ``qconfig``."""
    return value, QConfig(activation=qconfig.activation, weight=None)


class Statistics:
    """Observers and channel means of the values of one float graph.

    Args:
        graph: the graph, which computes in floating point.
        batches: its inputs.
    """

    def __init__(self, graph: QuantGraphModule, batches: Sequence[BoundBatch]) -> None:
        self.graph = graph
        self.batches = batches
        self._observers: dict[Watched, nn.Module] = {}
        self._means: dict[Averaged, ChannelMean] = {}
        self._device = device_of(graph)

    def observer(self, value: str, qconfig: QConfig) -> nn.Module:
        """What the activation observer of ``qconfig`` knows of the float value called ``value``."""
        key = watched(value, qconfig)
        self.collect([key], [])
        return self._observers[key]

    def qparams(self, value: str, qconfig: QConfig) -> QParams | None:
        """Scale and zero point of a value; ``None`` where it is rounded to no integers."""
        factory = spec_of(qconfig.activation)
        spec = None if factory is None else factory.spec
        if spec is None or spec.is_float or spec.is_dynamic:
            return None
        return qparams_of(self.observer(value, qconfig), spec)

    def fill(self, gm: QuantGraphModule) -> None:
        """Give the observers and channel means that were inserted into ``gm`` what is known."""
        observed: dict[str, Watched] = {}
        averaged: dict[str, Averaged] = {}
        for node in gm.graph.nodes:
            path = str(node.target)
            if is_observer(node) and not reads_weight(gm, node):
                qconfig = record_of(node).qconfig
                assert qconfig is not None
                observed[path] = watched(_value_behind(node).name, qconfig)
            elif node.op == "call_module" and path.startswith(CHANNEL_MEAN_PREFIX):
                watcher = gm.get_submodule(path)
                assert isinstance(watcher, ChannelMean)
                averaged[path] = (_value_behind(node).name, watcher.axis)
        self.collect(list(observed.values()), list(averaged.values()))
        for path, key in observed.items():
            setattr(gm, path, self._observers[key])
        for path, mean in averaged.items():
            setattr(gm, path, self._means[mean])

    def collect(self, values: Sequence[Watched], means: Sequence[Averaged]) -> None:
        """Know these values; those that nobody has watched are watched in one run over the data."""
        wanted = [key for key in dict.fromkeys(values) if not self._derive(key)]
        made: dict[Watched, nn.Module] = {}
        for key in wanted:
            observer: Any = on_device(key[1].activation(), self._device)
            if any(_same_statistics(observer, o) for (v, _), o in made.items() if v == key[0]):
                continue  # derived below
            observer.owner = f"output of {key[0]!r}"
            made[key] = observer
        new_means = {m: ChannelMean(m[1]) for m in dict.fromkeys(means) if m not in self._means}
        watchers: dict[str, list[Callable[[Any], object]]] = {}
        for (value, _), module in [*made.items(), *new_means.items()]:
            watchers.setdefault(value, []).append(module)
        if watchers:
            with torch.no_grad():
                for batch in self.batches:
                    _Watching(self.graph, batch, watchers).run()
        self._observers.update({key: _remembering(observer) for key, observer in made.items()})
        self._means.update(new_means)
        for key in wanted:
            self._derive(key)

    def _derive(self, key: Watched) -> bool:
        """Whether the observer of ``key`` is known, or another one of the value has its numbers."""
        if key in self._observers:
            return True
        observer = on_device(key[1].activation(), self._device)
        for (name, _), known in self._observers.items():
            if name == key[0] and _same_statistics(observer, known):
                _take_statistics(observer, known)
                self._observers[key] = _remembering(observer)
                return True
        return False


class _RememberedRange:
    """A range rule that chooses once: the statistics of its observer do not change any more.

    A copy, which may be given other statistics to unite with its own, chooses again.
    """

    def __init__(self, rule: RangeRule) -> None:
        self.rule = rule
        self._chosen: tuple[torch.Tensor, torch.Tensor] | None = None

    def choose(self, collector: Collector, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """The range to quantize to."""
        if self._chosen is None:
            self._chosen = self.rule.choose(collector, spec)
        return self._chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> RangeRule:
        return self.rule


def _remembering(observer: nn.Module) -> nn.Module:
    held: Any = observer
    if isinstance(getattr(held, "rule", None), RangeRule):
        held.rule = _RememberedRange(held.rule)
    return observer


class _Watching(BoundInterpreter):
    """Runs the float graph and shows values to those who watch them."""

    def __init__(
        self,
        gm: fx.GraphModule,
        bound: BoundBatch,
        watchers: Mapping[str, Sequence[Callable[[Any], object]]],
    ) -> None:
        super().__init__(gm, bound)
        self.watchers = watchers

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` and show its value."""
        value = super().run_node(n)
        for watcher in self.watchers.get(n.name, ()) if isinstance(value, torch.Tensor) else ():
            watcher(value)
        return value


def _value_behind(node: fx.Node) -> fx.Node:
    """What an observer or channel mean looks at, other watchers in between or not."""
    source = node.all_input_nodes[0]
    while source.op == "call_module" and str(source.target).startswith(
        (OBSERVER_PREFIX, CHANNEL_MEAN_PREFIX)
    ):
        source = source.all_input_nodes[0]
    return source


def _same_statistics(wanted: nn.Module, known: nn.Module) -> bool:
    """Whether ``wanted`` can be filled with what ``known`` has collected."""
    mine, theirs = getattr(wanted, "collector", None), getattr(known, "collector", None)
    if not isinstance(mine, Collector) or not isinstance(theirs, Collector):
        return False  # of another library: only its own class knows
    if type(mine) is MinMaxCollector and type(theirs) is HistogramCollector:
        return True  # a histogram knows its extremes exactly
    return type(mine) is type(theirs) and _options(mine) == _options(theirs)


def _options(collector: Collector) -> dict[str, Any]:
    plain = (int, float, str, bool, type(None))
    found = {name: v for name, v in vars(collector).items() if isinstance(v, plain)}
    return {name: v for name, v in found.items() if name not in ("owner", "training")}


def _take_statistics(observer: Any, known: Any) -> None:
    mine, theirs = observer.collector, known.collector
    if type(mine) is type(theirs):
        observer.collector = theirs
    else:
        mine.load_state_dict({name: theirs.get_buffer(name) for name in mine.state_dict()})
