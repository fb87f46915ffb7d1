"""Networks of torchvision in int8, beside torch.ao: ``python -m benchmarks.networks``.

Writes ``docs/networks.md``. Weights are random from a fixed seed, with batch-norm statistics as if
trained, and pictures are seeded, so that nothing is downloaded: the table shows what runs int8, how
much noise that makes and how large the file is, not how accurate a trained network is
(:mod:`benchmarks.accuracy` does).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.peers import TORCH_AO_ENGINES, torch_ao
from fxquant import artifact
from fxquant.audit import AuditReport, audit
from fxquant.calibration import calibrate
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.evaluation import logit_sqnr
from fxquant.models_zoo.registry import TORCHVISION_PREFIX, ZooEntry, load
from fxquant.models_zoo.torchvision_models import SyntheticSource, logit_rows
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.timing import interleaved_latency, threads

NETWORKS = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "inception_v3",
    "regnet_y_400mf",
    "vgg16_bn",
    "alexnet",
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "fcn_resnet50",
)
CALIBRATION_IMAGES, EVALUATION_IMAGES, BATCH = 48, 16, 8
_NAME = re.compile(r"'[\w.]+'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is written about one network.

    Attributes:
        name: as torchvision lists it.
        report: what runs int8.
        sqnr: of the logits, in dB.
        peers: engine of torch.ao -> its SQNR, in dB; without the engines that fail.
        artifact: bytes of the saved int8 model.
        state: bytes of the FP32 state dict.
        latency: int8 over float, or ``None``.
    """

    name: str
    report: AuditReport
    sqnr: float
    peers: dict[str, float]
    artifact: int
    state: int
    latency: float | None

    def cells(self) -> tuple[str, ...]:
        """One row of the table."""
        best = max(self.peers, key=lambda engine: self.peers[engine], default=None)
        return (
            self.name,
            f"{100 * self.report.mac_coverage:.2f} %",
            _floats(self.report),
            f"{self.sqnr:.2f}",
            "" if best is None else f"{self.peers[best]:.2f} ({best})",
            f"{self.state / 1e6:.1f}",
            f"{self.artifact / 1e6:.1f}",
            "" if self.latency is None else f"{self.latency:.2f}",
        )


HEADERS = (
    "network",
    "int8 by MACs",
    "ops in FP32",
    "SQNR, dB",
    "torch.ao best, dB",
    "FP32, MB",
    "int8 file, MB",
    "int8 / float latency",
)


def entry_of(name: str) -> ZooEntry:
    """The network with a few seeded pictures."""
    entry = load(f"{TORCHVISION_PREFIX}{name}")
    assert isinstance(entry.images, SyntheticSource)
    images = replace(
        entry.images, calibration_count=CALIBRATION_IMAGES, evaluation_count=EVALUATION_IMAGES
    )
    return replace(entry, images=images, batch_size=BATCH)


def measure(name: str, *, peers: bool = True, latency_threads: int | None = None) -> Measured:
    """One network.

    Args:
        name: as torchvision lists it.
        peers: measure torch.ao's engines too.
        latency_threads: measure the latency of one picture with so many threads.
    """
    entry = entry_of(name)
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    calibrate(prepared, entry.calibration, progress=False)
    model = convert_fx(prepared)
    return Measured(
        name=name,
        report=audit(model, entry.example_inputs),
        sqnr=logit_sqnr(entry, model),
        peers=_peers(entry) if peers else {},
        artifact=_saved_size(model, entry),
        state=sum(v.numel() * v.element_size() for v in entry.model.state_dict().values()),
        latency=None if latency_threads is None else _latency(entry, model, latency_threads),
    )


def _peers(entry: ZooEntry) -> dict[str, float]:
    scores = {}
    for engine in TORCH_AO_ENGINES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peer: cat of tensors with unlike scales
            try:
                scores[engine] = logit_sqnr(entry, torch_ao(entry, engine))
            except Exception as error:  # noqa: BLE001  # whatever the peer cannot do
                print(f"torch.ao {engine} fails on {entry.name}: {error}", file=sys.stderr)
    return scores


def _saved_size(model: QuantGraphModule, entry: ZooEntry) -> int:
    """Bytes of the file; what is loaded from it must compute the same."""
    inputs, _ = entry.evaluation[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.fxq"
        artifact.save(model, path)
        before, after = (logit_rows(m(inputs), entry.output) for m in (model, artifact.load(path)))
        if not torch.equal(before, after):
            raise RuntimeError(f"{entry.name}: what was loaded computes something else")
        return path.stat().st_size


def _latency(entry: ZooEntry, model: nn.Module, number: int) -> float:
    with threads(number):
        found = interleaved_latency(
            {
                "float": lambda: entry.model(*entry.example_inputs),
                "int8": lambda: model(*entry.example_inputs),
            },
            repeats=20,
        )
    return found["int8"].median / found["float"].median


def _floats(report: AuditReport) -> str:
    counts = Counter(row.op for row in report.fp32 if not row.carried_by)
    return ", ".join(f"{count} {op}" for op, count in counts.most_common())


def reasons(reports: list[AuditReport]) -> str:
    """Why ops stay in FP32: a list, with names of particular values left out."""
    counts: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for row in report.fp32:
            if not row.carried_by:
                counts[row.op, _NAME.sub("...", row.reason)] += 1
    return "\n".join(f"- {count} `{op}`: {reason}." for (op, reason), count in counts.most_common())


def page(measured: list[Measured]) -> str:
    """The page as Markdown."""
    rows = [m.cells() for m in measured]
    kept = [i for i in range(len(HEADERS)) if any(row[i] for row in rows)]
    table = tabulate(
        [[row[i] for i in kept] for row in rows],
        headers=[HEADERS[i] for i in kept],
        tablefmt="github",
        disable_numparse=True,
    )
    return (
        "# Networks in int8\n\n"
        "Networks of torchvision with seeded random weights and batch-norm statistics as if"
        f" trained, calibrated on {CALIBRATION_IMAGES} seeded pictures and judged on"
        f" {EVALUATION_IMAGES}"
        " others: SQNR of the logits against the float model. A random network amplifies noise more"
        " than a trained one, so SQNRs compare quantizers, not networks. torch.ao has the default"
        " mapping of each engine, the best is shown. Regenerate with\n"
        "`python -m benchmarks.networks` (`--latency` adds the latency of one picture).\n\n"
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}.\n\n{table}\n\n"
        f"## What stays in FP32, and why\n\n{reasons([m.report for m in measured])}\n"
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="torchvision names")
    parser.add_argument("--no-peers", action="store_true", help="leave torch.ao out")
    parser.add_argument("--latency", action="store_true", help="measure latencies too")
    parser.add_argument("--threads", type=int, default=1, help="for the latency")
    parser.add_argument("--output", type=Path, default=Path("docs/networks.md"))
    options = parser.parse_args()
    measured = []
    for name in options.networks:
        found = measure(
            name,
            peers=not options.no_peers,
            latency_threads=options.threads if options.latency else None,
        )
        measured.append(found)
        print(*found.cells(), sep="  ", file=sys.stderr, flush=True)
        options.output.write_text(page(measured))  # now, so that an interrupted run leaves a page
    print(options.output.read_text())


if __name__ == "__main__":
    main()
