"""How an int8 model scales: with torch's threads, with the batch, and with Python threads.

``python -m benchmarks.threads`` (five minutes, on a machine that does nothing else) prints
Markdown: latency by threads and batch, of the int8 model, of its native plan (``optimize``) and of
FP32 in the same process, and how much more work two Python threads do than one when each has one
thread of torch.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxquant import LoweringWarning, calibrate, convert_fx, optimize, prepare_fx
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.torchvision_models import build
from fxquant.timing import interleaved_latency, threads

NETWORKS = ("resnet18", "mobilenet_v2")
BATCHES = (1, 8, 32)
SECONDS = 4.0


def int8_of(model: nn.Module, x: Tensor) -> QuantGraphModule:
    """Calibrated on ``x``, for its batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoweringWarning)
        return convert_fx(calibrate(prepare_fx(model, None, (x,)), [x]))


def latencies(name: str, counts: Sequence[int]) -> list[list[object]]:
    """Rows of milliseconds: each batch at each number of torch's threads, all forms in turn."""
    model = build(name)
    rows: list[list[object]] = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, 224, 224)
        cells: list[object] = [name, batch]
        one: dict[str, float] = {}
        for count in counts:
            with threads(count):
                int8 = int8_of(model, x)  # packed anew: its kernels are prepared for the threads
                calls: dict[str, Callable[[], object]] = {
                    "fp32": partial(model, x),
                    "int8": partial(int8, x),
                    "optimized": partial(optimize(int8, (x,)), x),
                }
                times = interleaved_latency(calls, repeats=max(3, 24 // batch), warmup=2)
            for form, found in times.items():
                gain = f" ({one.setdefault(form, found.minimum) / found.minimum:.2f})"
                cells.append(f"{found.minimum * 1e3:.2f}{gain if count > 1 else ''}")
        rows.append(cells)
    return rows


def calls_per_second(model: nn.Module, x: Tensor, workers: int, seconds: float) -> float:
    """Calls of one model by so many Python threads at once, with one thread of torch each."""
    counts = [0] * workers
    begin, end = threading.Barrier(workers), [0.0]

    def work(index: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            model(x)
            begin.wait()
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                model(x)
                counts[index] += 1
        end[0] = time.perf_counter()

    found = [threading.Thread(target=work, args=(index,)) for index in range(workers)]
    for thread in found:
        thread.start()
    for thread in found:
        thread.join()
    return sum(counts) / seconds


def scaling(name: str, runs: int, seconds: float) -> list[object]:
    """How much more work two Python threads do than one: median, and the range of the runs."""
    x = torch.randn(1, 3, 224, 224)
    model = build(name)
    row: list[object] = [name]
    int8 = int8_of(model, x)
    for made in (model, int8, optimize(int8, (x,))):
        ratios = [
            calls_per_second(made, x, 2, seconds) / calls_per_second(made, x, 1, seconds)
            for _ in range(runs)
        ]
        row.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short run: to see that it works")
    quick = parser.parse_args().quick
    counts = (1, 2)
    rows = [row for name in NETWORKS[: 1 if quick else None] for row in latencies(name, counts)]
    headers = ["network", "batch", "FP32, 1 thread, ms", "int8", "optimized"]
    headers += ["FP32, 2 threads (gain)", "int8", "optimized"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    print()
    with threads(1):
        found = [
            scaling(name, 1 if quick else 5, 0.5 if quick else SECONDS)
            for name in NETWORKS[: 1 if quick else None]
        ]
    headers = ["two Python threads against one", "FP32", "int8", "optimized"]
    print(tabulate(found, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
