"""A sweep that shares prefixes against the plain loop: ``python -m benchmarks.sensitivity``.

Both lower one layer after the other, from one calibration and one prepared network, and compare the
outputs with those of the float network. The plain loop (:func:`plain`) lowers a layer and runs the
whole network; only that is timed. The sweep is what ``analyze_sensitivity`` runs; its pass over the
float network counts too. The two take turns, layer by layer, so that whatever disturbs the machine
disturbs both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.models_zoo.registry import load
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.metrics import METRICS, Metrics, MetricSums
from fxquant.sensitivity.network import FP32, INT8, Assignment, CalibratedNetwork
from fxquant.sensitivity.simulator import Simulator
from fxquant.sensitivity.sweep import Sweep, SweepOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCost:
    """What the two took.

    Attributes:
        plain: seconds of the plain loop.
        sweep: seconds of the sweep.
        difference: the largest difference of a metric, relative to it where it is above one.
        layers: how many were lowered.
        peak_bytes: the most memory that kept activations took.
    """

    plain: float
    sweep: float
    difference: float
    layers: int
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Time of the sweep over that of the plain loop."""
        return self.sweep / self.plain


def plain(network: CalibratedNetwork, layer: Layer, expected: Sequence[Any]) -> Metrics:
    """Lower one layer, run the whole network, compare."""
    lowered = network.reference(Assignment({layer.name: INT8}, FP32))
    sums = MetricSums()
    with torch.no_grad():
        for batch, exact in zip(network.batches, expected, strict=True):
            sums.add(exact, lowered(*batch.args, **batch.kwargs))
    return sums.result()


def compare(
    network: CalibratedNetwork, *, memory_budget: int, layer_metrics: bool, limit: int | None = None
) -> SweepCost:
    """Both, layer by layer.

    Args:
        network: calibrated.
        memory_budget: of the sweep, see ``analyze_sensitivity``.
        layer_metrics: let the sweep measure at each layer's output too, which the plain loop does
            not.
        limit: only so many layers, spread over the network.
    """
    layers = network.layers
    if limit is not None and limit < len(layers):
        layers = tuple(layers[i * len(layers) // limit] for i in range(limit))
    floats = network.reference(Assignment(rest=FP32))
    with torch.no_grad():
        expected = [floats(*batch.args, **batch.kwargs) for batch in network.batches]
    times = {"plain": 0.0, "sweep": 0.0}
    worst = 0.0
    with Simulator(network, memory_budget=memory_budget) as simulator:
        options = SweepOptions(attribution="", layer_metrics=layer_metrics, user={})
        start = time.perf_counter()
        sweep = Sweep(network, simulator, layers, options, [])
        times["sweep"] += time.perf_counter() - start
        for layer in layers:
            start = time.perf_counter()
            theirs = plain(network, layer, expected)
            middle = time.perf_counter()
            ours = sweep.measure(layer).measurements[INT8].output
            times["plain"] += middle - start
            times["sweep"] += time.perf_counter() - middle
            worst = max(worst, _difference(theirs, ours))
        peak = simulator.counts.peak_bytes
    return SweepCost(**times, difference=worst, layers=len(layers), peak_bytes=peak)


def _difference(left: Metrics, right: Metrics) -> float:
    pairs = [(getattr(left, name), getattr(right, name)) for name in METRICS]
    known = [(a, b) for a, b in pairs if a is not None and b is not None and a != b]
    return max((abs(a - b) / max(abs(a), 1.0) for a, b in known), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="torchvision/resnet50")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=None, help="of the pictures, in pixels")
    parser.add_argument("--layers", type=int, default=None, help="only so many, spread out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-budget", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--layer-metrics", action="store_true", help="let the sweep do more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    entry = load(options.network, side=options.side)
    images = torch.cat(list(entry.calibration))[: options.images]
    network = CalibratedNetwork(entry.model, images.split(options.batch))
    cost = compare(
        network,
        memory_budget=options.memory_budget,
        layer_metrics=options.layer_metrics,
        limit=options.layers,
    )
    print(
        f"{options.network}, {cost.layers} layers, {len(images)} images: plain loop"
        f" {cost.plain:.1f} s, sweep {cost.sweep:.1f} s, ratio {cost.ratio:.2f}; metrics differ by"
        f" {cost.difference:.1g} at most; kept activations {cost.peak_bytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
