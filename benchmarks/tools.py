"""What the tools themselves take, beside torch.ao: ``python -m benchmarks.tools``.

Prepare, convert and the first call of the int8 model (which packs the weights; torch.ao packs them
in convert), on ResNet-50 and on BERT-base's shape; a batch of 32 through the calibrating ResNet-50
against the float model; and prepare and convert of up to 10,000 nodes. fxquant and torch.ao take
turns in one process, on one thread, and each ratio is formed within a run.

Writes the table between the markers of ``docs/tools.md``, and ``docs/tools.json``. Takes about four
minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.speed.bert import LENGTH, Bert
from benchmarks.speed.report import put_between_markers
from benchmarks.speed.results import Interval, interval
from fxquant import QConfigMapping, convert_fx, default_dynamic_qconfig, prepare_fx
from fxquant.errors import FxQuantWarning
from fxquant.models_zoo.torchvision_models import build

PAGE, RECORDS = Path("docs/tools.md"), Path("docs/tools.json")
BEGIN = "<!-- written by python -m benchmarks.tools -->"
BATCH = 32
SIZES = (1_000, 2_000, 10_000)
Steps = dict[str, float]
Ratios = dict[str, Interval]


def networks() -> dict[str, tuple[nn.Module, Tensor, bool]]:
    """Name -> float model, example input, whether it is quantized dynamically."""
    torch.manual_seed(0)
    image, tokens = torch.rand(1, 3, 224, 224), torch.zeros(1, LENGTH, dtype=torch.int64)
    bert = Bert().eval()
    return {
        "ResNet-50, static": (build("resnet50"), image, False),
        "BERT-base, static": (bert, tokens, False),
        "BERT-base, dynamic": (bert, tokens, True),
    }


def ours(model: nn.Module, x: Tensor, *, dynamic: bool) -> tuple[nn.Module, Callable[..., Any]]:
    """The prepared model, and what converts it."""
    mapping = QConfigMapping().set_global(default_dynamic_qconfig) if dynamic else None
    return prepare_fx(model, mapping, (x,)), convert_fx


def torch_ao(model: nn.Module, x: Tensor, *, dynamic: bool) -> tuple[nn.Module, Callable[..., Any]]:
    """The same by torch.ao, with its default mapping for x86."""
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    mapping = ao.get_default_qconfig_mapping("x86")
    if dynamic:
        mapping = ao.QConfigMapping().set_global(ao.default_dynamic_qconfig)
    return quantize_fx.prepare_fx(model, mapping, (x,)), quantize_fx.convert_fx


PEERS = {"fxquant": ours, "torch.ao": torch_ao}


class Watch:
    """Takes times, on the wall or of the processor."""

    def __init__(self) -> None:
        self.now: Callable[[], float] = time.perf_counter


WATCH = Watch()


def seconds(action: Callable[[], Any]) -> tuple[Any, float]:
    """What ``action`` gives, and how long it took."""
    start = WATCH.now()
    result = action()
    return result, WATCH.now() - start


def steps_of(prepare: Callable[..., Any], model: nn.Module, x: Tensor, *, dynamic: bool) -> Steps:
    """Seconds of each step, once."""
    gc.collect()
    with torch.no_grad():
        (prepared, convert), first = seconds(lambda: prepare(model, x, dynamic=dynamic))
        prepared(x)
        int8, second = seconds(lambda: convert(prepared))
        _, third = seconds(lambda: int8(x))
    found = {"prepare": first, "convert": second, "first call": third}
    found["prepare + convert"] = first + second
    return found | {"all three": first + second + third}


def ratios(runs: Sequence[dict[str, Steps]]) -> Ratios:
    """Step -> fxquant over torch.ao, formed within each run."""
    steps = runs[0]["fxquant"]
    return {s: interval([run["fxquant"][s] / run["torch.ao"][s] for run in runs]) for s in steps}


def in_turns(number: int, measure: Callable[[str], Steps]) -> list[dict[str, Steps]]:
    """So many runs, each peer once in each; every run begins with the other one."""
    runs = []
    for turn in range(number):
        order = list(PEERS)[:: 1 if turn % 2 else -1]
        runs.append({peer: measure(peer) for peer in order})
    return runs


def tools(number: int) -> dict[str, Any]:
    """Network -> ratios, and seconds of both."""
    table = {}
    for name, (model, x, dynamic) in networks().items():

        def measure(peer: str) -> Steps:
            return steps_of(PEERS[peer], model, x, dynamic=dynamic)  # noqa: B023  # used at once

        in_turns(1, measure)  # imports, and what is checked once a process
        runs = in_turns(number, measure)
        best = {p: {s: min(r[p][s] for r in runs) for s in runs[0][p]} for p in PEERS}
        table[name] = {"ratios": ratios(runs), "seconds": best}
        sys.stderr.write(f"{name}: {_shown(ratios(runs)['prepare + convert'])}\n")
    return table


def calibration(number: int) -> dict[str, Interval]:
    """Prepared ResNet-50 over the float model, a batch of 32, observers watching."""
    model, x, _ = networks()["ResNet-50, static"]
    batch = torch.rand(BATCH, 3, 224, 224)
    models = {name: make(model, x, dynamic=False)[0] for name, make in PEERS.items()}
    models = {"float": model} | models
    runs = []
    with torch.no_grad():
        for called in models.values():
            called(batch[:2])
        for turn in range(number):
            names = list(models)[turn % 3 :] + list(models)[: turn % 3]
            runs.append({name: seconds(lambda n=name: models[n](batch))[1] for name in names})
    found = {p: interval([run[p] / run["float"] for run in runs]) for p in PEERS}
    sys.stderr.write(f"calibration: {_shown(found['fxquant'])}\n")
    return found


class Block(nn.Module):
    """Ten operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """The input's shape, four channels."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        y = torch.relu(y + x)
        return torch.cat([y[:, :2], y[:, 2:]], 1)


def growth() -> dict[int, Steps]:
    """Nodes -> seconds of prepare and convert, once."""
    x, found = torch.rand(1, 4, 4, 4), {}
    for nodes in SIZES:
        model = nn.Sequential(*(Block() for _ in range(nodes // 10))).eval()
        found[nodes] = steps_of(ours, model, x, dynamic=False)
    return found


def _shown(value: Interval) -> str:
    return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"


def text(found: dict[str, Any]) -> str:
    """The tables."""
    steps = ("prepare", "convert", "prepare + convert", "first call", "all three")
    rows = []
    for name, entry in found["tools"].items():
        both = [entry["seconds"][peer]["prepare + convert"] for peer in PEERS]
        cells = [_shown(entry["ratios"][step]) for step in steps]
        rows.append((name, *cells, *(f"{value:.2f}" for value in both)))
    headers = ("network", *steps, "fxquant, s", "torch.ao, s")
    parts = [
        f"torch {found['torch']}, {found['machine']}, one thread, {found['clock']},"
        f" {found['runs']} runs.",
        tabulate(rows, headers, "github", disable_numparse=True),
        "A batch of 32 through the prepared ResNet-50, over the float model:",
        tabulate(
            [(peer, _shown(value)) for peer, value in found["calibration"].items()],
            ("", "ratio"),
            "github",
            disable_numparse=True,
        ),
        "Graphs of convolutions, batch-norms, adds and concatenations, seconds of one run:",
        tabulate(
            [
                (f"{nodes:,}", f"{s['prepare']:.1f}", f"{s['convert']:.1f}")
                for nodes, s in found["growth"].items()
            ],
            ("nodes", "prepare", "convert"),
            "github",
            disable_numparse=True,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return asdict(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        WATCH.now = time.process_time
    torch.set_num_threads(1)
    for category in (FxQuantWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)
    found = {
        "torch": torch.__version__,
        "machine": torch.backends.cpu.get_cpu_capability() + ", " + platform.machine(),
        "runs": options.runs,
        "clock": "CPU time" if options.cpu_time else "wall time",
        "tools": tools(options.runs),
        "calibration": calibration(options.runs),
        "growth": growth(),
    }
    RECORDS.write_text(json.dumps(_plain(found), indent=1) + "\n")
    put_between_markers(PAGE, text(found), BEGIN)
    print(text(found))


if __name__ == "__main__":
    main()
