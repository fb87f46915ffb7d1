"""Mixed-precision plans on real networks: ``python -m benchmarks.planner``.

``latency``: what plans are predicted to take against what they take, on four networks, five runs.
``fragile``: EfficientNet-Lite0 with one scale a weight: planned on one half of the ImageNet sample,
judged on the other.

Both want a machine that does nothing else; torch runs one thread. On a busy one, ``--cpu-time``
counts the seconds of the thread and not those on the wall (``fragile`` plans by the wall all the
same).
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from tabulate import tabulate
from torch import Tensor

from fxquant import get_default_qconfig, plan_mixed_precision, quantize
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo import metrics
from fxquant.models_zoo.data import AGREEMENT_VARIANTS
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.observers import default_weight_observer
from fxquant.planner.build import lowered
from fxquant.planner.cache import LatencyCache
from fxquant.planner.clock import Clock, call_times
from fxquant.planner.damage import measured_damages
from fxquant.planner.judge import int8_share
from fxquant.planner.pricing import price
from fxquant.planner.search import best_at, greedy, sweep
from fxquant.qconfig import QConfig
from fxquant.sensitivity.feeding import bind_batches
from fxquant.sensitivity.network import CalibratedNetwork

NETWORKS = ("resnet56_cifar10", "efficientnet_lite0", "mobilenetv2_folded", "squeezenet1_1")
PER_TENSOR = QConfig(
    activation=get_default_qconfig("x86").activation, weight=default_weight_observer
)
CANDIDATES = ("fp32", "int8", "int8-weights-mse", "int8-weights-percentile")
"""All of one scale a weight; the last two choose it otherwise than by the largest weight."""
SLACK = 1.5
"""Points of agreement that the plan may lose, on the half that it is made with, beside what weights
with one scale a channel lose there."""
ROWS = 5
"""Rows of a batch. A tensor of more than 32 MB is mapped anew in every call, which takes longer
than what is computed with it."""


# -- latency --------------------------------------------------------------------------------------


def errors_of(
    entry: ZooEntry, images: int, repeats: int, clock: Clock
) -> dict[str, tuple[float, float]]:
    """Plan -> predicted and measured milliseconds of one picture, in one run."""
    data = small([entry.calibration[0][:images]])
    network = CalibratedNetwork(entry.model, data)
    bound = bind_batches(network.graph, [data[0][:1]], None)[0]
    cache = LatencyCache(None)
    options = {"cache": cache, "repeats": repeats, "clock": clock}
    priced = price(network, ["fp32", "int8"], bound, measured_damages, **options)
    problem = priced.problem
    hull = sweep(problem, lambda p: best_at(problem, p), costly="latency", other="damage")
    by_hand = [priced.settled(a) for a in greedy(problem, "latency")]
    plans = {
        "fp32": problem.uniform(["fp32"]),
        "int8": problem.uniform(["int8"]),
        "min-cut, fast": hull[len(hull) // 4],
        "min-cut, middle": hull[len(hull) // 2],
        "greedy, 5 set back": by_hand[min(5, len(by_hand) - 1)],
        "greedy, half": by_hand[len(by_hand) // 2],
    }
    models = {name: lowered(network, priced.assignment(a)) for name, a in plans.items()}
    measured = medians(models, bound, repeats, clock)
    return {name: (1e3 * priced.costs(a).latency, measured[name]) for name, a in plans.items()}


def medians(
    models: Mapping[str, QuantGraphModule],
    bound: inspect.BoundArguments,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Model -> median milliseconds, the models taking turns."""
    calls = {name: (lambda m=m: m(*bound.args, **bound.kwargs)) for name, m in models.items()}
    times = call_times(calls, repeats=repeats, clock=clock)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def latency(options: argparse.Namespace) -> None:
    clock = _clock(options)
    rows, summary = [], []
    for name in options.networks:
        entry = load(name)
        runs = [
            errors_of(entry, options.images, options.repeats, clock) for _ in range(options.runs)
        ]
        middles = []
        for plan in runs[0]:
            off = [100 * (run[plan][0] / run[plan][1] - 1) for run in runs]
            took = [run[plan][1] for run in runs]
            rows.append((name, plan, f"{statistics.median(took):.3f}", _interval(off)))
        for run in runs:
            absolute = [abs(100 * (p / m - 1)) for p, m in run.values()]
            middles.append(statistics.median(absolute))
        summary.append((name, _interval(middles)))
        sys.stderr.write(f"{name}: {_interval(middles)}\n")
    print(tabulate(rows, ("network", "plan", "measured, ms", "predicted is off by"), "github"))
    print()
    print(tabulate(summary, ("network", "median error of its plans"), "github"))


def _clock(options: argparse.Namespace) -> Clock:
    return time.thread_time if options.cpu_time else time.perf_counter


def _interval(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


# -- fragile --------------------------------------------------------------------------------------


class Half:
    """Inputs, and what the FP32 model says of them."""

    def __init__(self, entry: ZooEntry, inputs: Sequence[Tensor]) -> None:
        self.entry = entry
        self.inputs = inputs
        self.expected = entry.logits(entry.model, inputs)

    def agreement(self, model: QuantGraphModule) -> float:
        """Percent of the inputs to which ``model`` gives the FP32 model's class."""
        return metrics.agreement(self.expected, self.entry.logits(model, self.inputs))


def halves(entry: ZooEntry) -> tuple[Half, Half]:
    """The agreement inputs of one half of the images, and of the other."""
    batches = list(entry.agreement_inputs())
    each = len(batches) // AGREEMENT_VARIANTS
    first = [b for i, b in enumerate(batches) if i % each < each // 2]
    other = [b for i, b in enumerate(batches) if i % each >= each // 2]
    return Half(entry, small(first)), Half(entry, small(other))


def small(batches: Iterable[Tensor]) -> list[Tensor]:
    """The same rows in batches of :data:`ROWS`."""
    return [part for batch in batches for part in batch.split(ROWS)]


def fragile(options: argparse.Namespace) -> None:
    entry = load("efficientnet_lite0")
    mine, theirs = halves(entry)
    one = (mine.inputs[0][:1],)
    per_channel = quantize(entry.model, small(entry.calibration), progress=False)
    known = mine.agreement(per_channel)
    drop = 100 - known + SLACK
    sys.stderr.write(f"per channel agrees on {known:.2f} %; budget {drop:.2f}\n")
    plan = plan_mixed_precision(
        entry.model,
        small([entry.calibration[0][: options.images]]),
        budget={"accuracy_drop": drop},
        candidates=CANDIDATES,
        strategy=options.strategy,
        judge_data=mine.inputs,
        qconfig_mapping={"": PER_TENSOR},
        example_inputs=one,
        repeats=options.repeats,
        cache=False,
    )
    print(plan.to_text(120))
    models = {
        "int8 per channel": per_channel,
        "all int8": plan.convert("int8"),
        "first and last in FP32": plan.convert("first-last"),
        "greedy": plan.convert("greedy"),
        "plan": plan.convert(),
    }
    bound = bind_batches(plan.network.graph, list(one), None)[0]
    runs = [medians(models, bound, options.repeats, _clock(options)) for _ in range(options.runs)]
    rows = []
    for name, model in models.items():
        took = [run[name] for run in runs]
        ratio = [100 * (run["plan"] / run[name] - 1) for run in runs]
        rows.append(
            (
                name,
                f"{theirs.agreement(model):.2f} %",
                f"{100 * int8_share(model):.1f} %",
                f"{statistics.median(took):.2f} ms ({min(took):.2f} to {max(took):.2f})",
                _interval(ratio),
            )
        )
    headers = ("model", "agreement, other half", "int8 MACs", "latency", "plan against it")
    print()
    print(tabulate(rows, headers, "github"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("latency", "fragile"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="zoo names")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each model")
    parser.add_argument("--images", type=int, default=32, help="behind the damage of layers")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine")
    parser.add_argument("--strategy", default="min-cut")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (latency if options.what == "latency" else fragile)(options)


if __name__ == "__main__":
    main()
