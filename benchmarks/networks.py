"""Networks of torchvision in int8, beside torch.ao: ``python -m benchmarks.networks``.

Keeps what it measures in ``docs/networks.json`` and writes ``docs/networks.md`` from it. A network
that is in the file already is not measured again, so an interrupted run goes on where it stopped.
Latencies and memory are measured by runs of their own (``--latency`` on a quiet machine,
``--memory``), which fill in what the file lacks.

Weights are random from a fixed seed, with batch-norm statistics as if trained, so that nothing is
downloaded: the table shows what runs int8, how much noise that makes and how large the file is, not
how accurate a trained network is (:mod:`benchmarks.accuracy` does).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.memory import MemoryCost, memory_cost
from benchmarks.peers import TORCH_AO_ENGINES, torch_ao
from fxquant import artifact
from fxquant.audit import AuditReport, audit
from fxquant.calibration import calibrate
from fxquant.errors import DataNotFoundError
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.data import find_data_dir
from fxquant.models_zoo.metrics import sqnr_db
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
    "squeezenet1_0",
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
CALIBRATION_IMAGES, EVALUATION_IMAGES, BATCH = 64, 32, 8
RECORDS, PAGE = Path("docs/networks.json"), Path("docs/networks.md")
_NAME = re.compile(r"'[\w.]+'")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRecord:
    """Milliseconds of one picture, medians.

    Attributes:
        threads: of torch.
        machine: instruction set that torch uses.
        float_contiguous: the float model on a contiguous picture.
        float_channels_last: the float model and its picture in channels_last.
        int8: the int8 model.
    """

    threads: int
    machine: str
    float_contiguous: float
    float_channels_last: float
    int8: float

    @property
    def ratio(self) -> float:
        """int8 over the faster of the two float forms."""
        return self.int8 / min(self.float_contiguous, self.float_channels_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRecord:
    """What is known about one network.

    Attributes:
        pictures: ``photographs`` or ``seeded pictures``.
        machine: version of torch and instruction set that it uses.
        coverage: share of the multiply-accumulates that runs int8, 0 to 1.
        floats: ops in FP32 as ``(op, reason, count)``.
        sqnr: of the logits, mean over pictures, in dB.
        peers: engine of torch.ao -> its SQNR, in dB; without the engines that fail.
        together: SQNR of the logits of all pictures together, in dB: of ours, under ``fxquant``,
            and of each engine.
        failures: engine of torch.ao -> why it fails.
        artifact: bytes of the saved int8 model.
        state: bytes of the FP32 state dict.
        latency: where measured.
        memory: where measured.
    """

    pictures: str
    machine: str
    coverage: float
    floats: tuple[tuple[str, str, int], ...]
    sqnr: float
    peers: dict[str, float]
    together: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)
    artifact: int
    state: int
    latency: LatencyRecord | None = None
    memory: MemoryCost | None = None

    @property
    def best_peer(self) -> str | None:
        """The engine of torch.ao with the least noise; ``None`` where none works."""
        return max(self.peers, key=lambda engine: self.peers[engine], default=None)

    @property
    def share(self) -> float:
        """Bytes of the int8 file over bytes of the FP32 state dict."""
        return self.artifact / self.state


# -- the records ----------------------------------------------------------------------------------


def read_records(path: Path = RECORDS) -> dict[str, NetworkRecord]:
    """Network -> what is known, in the order of :data:`NETWORKS`; empty where there is no file."""
    if not path.exists():
        return {}
    plain: dict[str, dict[str, Any]] = json.loads(path.read_text())
    known = {name: _record(fields) for name, fields in plain.items()}
    ordered = [name for name in NETWORKS if name in known]
    return {name: known[name] for name in [*ordered, *(n for n in known if n not in ordered)]}


def _record(fields: dict[str, Any]) -> NetworkRecord:
    fields["floats"] = tuple(tuple(item) for item in fields["floats"])
    if fields.get("latency") is not None:
        fields["latency"] = LatencyRecord(**fields["latency"])
    if fields.get("memory") is not None:
        fields["memory"] = MemoryCost(**fields["memory"])
    return NetworkRecord(**fields)


def write_record(name: str, record: NetworkRecord, path: Path = RECORDS) -> None:
    """Put one network into the file, and leave the others as they are by now."""
    records = {**read_records(path), name: record}
    plain = {known: asdict(found) for known, found in records.items()}
    path.write_text(json.dumps(plain, indent=1) + "\n")


# -- measuring ------------------------------------------------------------------------------------


def entry_of(name: str, *, calibration: int, evaluation: int) -> ZooEntry:
    """The network with a few pictures: photographs where the data folder is, else seeded ones."""
    try:
        find_data_dir()
        photos = True
    except DataNotFoundError:
        photos = False
    entry = load(f"{TORCHVISION_PREFIX}{name}", photos=photos)
    assert isinstance(entry.images, SyntheticSource)
    images = replace(entry.images, calibration_count=calibration, evaluation_count=evaluation)
    return replace(entry, images=images, batch_size=BATCH)


def measure(name: str, *, peers: bool = True) -> NetworkRecord:
    """All but latency and memory.

    Args:
        name: as torchvision lists it.
        peers: measure torch.ao's engines too.
    """
    entry = entry_of(name, calibration=CALIBRATION_IMAGES, evaluation=EVALUATION_IMAGES)
    assert isinstance(entry.images, SyntheticSource)
    model = _quantized(entry)
    report = audit(model, entry.example_inputs)
    scores, failures = {"fxquant": sqnrs(entry, model)}, {}
    if peers:
        failures = _add_peers(entry, scores)
    return NetworkRecord(
        pictures="seeded pictures" if entry.images.photos is None else "photographs",
        machine=_machine(),
        coverage=report.mac_coverage,
        floats=_floats(report),
        sqnr=scores["fxquant"][0],
        peers={name: found[0] for name, found in scores.items() if name != "fxquant"},
        together={name: found[1] for name, found in scores.items()},
        failures=failures,
        artifact=_saved_size(model, entry),
        state=sum(v.numel() * v.element_size() for v in entry.model.state_dict().values()),
    )


def measure_latency(name: str, number: int) -> LatencyRecord:
    """Latency of one picture with ``number`` threads; the models take turns."""
    entry = entry_of(name, calibration=BATCH, evaluation=1)
    int8 = _quantized(entry)
    (x,) = entry.example_inputs
    striding = load(entry.name).model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    strided = x.to(memory_format=torch.channels_last)
    with threads(number):
        found = interleaved_latency(
            {
                "float_contiguous": lambda: entry.model(x),
                "float_channels_last": lambda: striding(strided),
                "int8": lambda: int8(x),
            },
            repeats=30,
        )
    medians = {form: round(1e3 * latency.median, 3) for form, latency in found.items()}
    return LatencyRecord(threads=number, machine=_machine(), **medians)


def _quantized(entry: ZooEntry) -> QuantGraphModule:
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    return convert_fx(calibrate(prepared, entry.calibration, progress=False))


def _machine() -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def sqnrs(entry: ZooEntry, model: nn.Module) -> tuple[float, float]:
    """SQNR in dB, mean over pictures, and of all pictures together."""
    logits = entry.logits(model, (inputs for inputs, _ in entry.evaluation))
    reference = entry.fp32_logits[: len(logits)]
    pictures = sum(len(inputs) for inputs, _ in entry.evaluation)
    each = map(sqnr_db, reference.chunk(pictures), logits.chunk(pictures))
    return round(sum(each) / pictures, 3), round(sqnr_db(reference, logits), 3)


def _add_peers(entry: ZooEntry, scores: dict[str, tuple[float, float]]) -> dict[str, str]:
    """Put the SQNRs of torch.ao's engines into ``scores``; gives why others fail."""
    failures = {}
    for engine in TORCH_AO_ENGINES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peer: cat of tensors with unlike scales
            try:
                scores[engine] = sqnrs(entry, torch_ao(entry, engine))
            except Exception as error:  # noqa: BLE001  # whatever the peer cannot do
                failures[engine] = str(error).strip().splitlines()[0]
    return failures


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


def _floats(report: AuditReport) -> tuple[tuple[str, str, int], ...]:
    counts = Counter(
        (row.op, _NAME.sub("...", row.reason)) for row in report.fp32 if not row.carried_by
    )
    return tuple((op, reason, count) for (op, reason), count in counts.most_common())


# -- the page -------------------------------------------------------------------------------------

HEADERS = (
    "network",
    "int8 by MACs",
    "ops in FP32",
    "SQNR, dB",
    "torch.ao best, dB",
    "FP32, MB",
    "int8 file, MB",
    "int8 / FP32",
    "latency, int8 / float",
    "prepare, peak",
    "convert, peak",
)


def cells(name: str, record: NetworkRecord) -> tuple[str, ...]:
    """One row of the table."""
    counts: Counter[str] = Counter()
    for op, _, count in record.floats:
        counts[op] += count
    best, latency, memory = record.best_peer, record.latency, record.memory
    return (
        name,
        f"{100 * record.coverage:.2f} %",
        ", ".join(f"{count} {op}" for op, count in counts.most_common()),
        f"{record.sqnr:.2f}",
        "" if best is None else f"{record.peers[best]:.2f} ({best})",
        f"{record.state / 1e6:.1f}",
        f"{record.artifact / 1e6:.1f}",
        f"{100 * record.share:.1f} %",
        "" if latency is None else f"{latency.ratio:.2f}",
        "" if memory is None else f"{memory.prepare:.2f}",
        "" if memory is None else f"{memory.convert:.2f}",
    )


def _reasons(records: Iterable[NetworkRecord]) -> str:
    """Why ops stay in FP32: a list, with names of particular values left out."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in records:
        for op, reason, count in record.floats:
            counts[op, reason] += count
    return "\n".join(f"- {count} `{op}`: {reason}." for (op, reason), count in counts.most_common())


def _join(values: Iterable[object]) -> str:
    return "; ".join(str(value) for value in dict.fromkeys(values))


def page(records: dict[str, NetworkRecord]) -> str:
    """The page as Markdown."""
    rows = [cells(name, record) for name, record in records.items()]
    kept = [i for i in range(len(HEADERS)) if any(row[i] for row in rows)]
    table = tabulate(
        [[row[i] for i in kept] for row in rows],
        headers=[HEADERS[i] for i in kept],
        tablefmt="github",
        disable_numparse=True,
    )
    latencies = [record.latency for record in records.values() if record.latency is not None]
    timed = _join(f"{found.threads} thread(s), {found.machine}" for found in latencies)
    failing = Counter(engine for record in records.values() for engine in record.failures)
    return (
        "# Networks in int8\n\n"
        "Networks of torchvision with seeded random weights and batch-norm statistics as if trained"
        f", shown {_join(record.pictures for record in records.values())}: calibrated on"
        f" {CALIBRATION_IMAGES} pictures and judged on {EVALUATION_IMAGES} others: SQNR of the"
        " logits against the float model, mean over pictures. A random network amplifies noise more"
        " than a trained one, so SQNRs compare quantizers, not networks. (It also gives some"
        " photographs ten times the logits of all others; where they exceed all that was calibrated"
        " on, the SQNR of all pictures together is that of one picture, and tells which quantizer"
        " leaves headroom by accident. The JSON has it.) torch.ao has the default mapping of each"
        " engine; the best is shown. (The auxiliary heads of GoogLeNet and Inception are in the"
        " FP32 state dict only.) Peaks are the memory that `prepare_fx` and `convert_fx` take"
        " at most beyond what was there before, what they return included, in multiples of the"
        " FP32 parameters; of small networks, the 5 to 10 MB of the graph itself decide.\n\n"
        "Regenerate with `python -m benchmarks.networks` (`--again` for what was measured before,"
        " `--latency` for the latency of one picture against the faster of contiguous and"
        " channels_last, `--memory` for the peaks). The figures are in"
        " [networks.json](networks.json).\n\n"
        f"Measured with {_join(record.machine for record in records.values())}"
        + (f"; latency with {timed}" if timed else "")
        + f".\n\n{table}\n\n"
        + (f"torch.ao fails on {_failing(failing)}.\n\n" if failing else "")
        + f"## What stays in FP32, and why\n\n{_reasons(records.values())}\n"
    )


def _failing(failing: Counter[str]) -> str:
    return ", ".join(f"{n} of them with {engine}" for engine, n in failing.most_common())


# -- the command ----------------------------------------------------------------------------------


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, so that one network's memory is gone before the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Measure what the records lack, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="torchvision names")
    parser.add_argument("--again", action="store_true", help="measure what is known, too")
    parser.add_argument("--latency", action="store_true", help="measure latencies instead")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--threads", type=int, default=1, help="for the latency")
    options = parser.parse_args()
    for name in options.networks:
        record = read_records().get(name)
        if options.latency or options.memory:
            if record is None:
                parser.error(f"{name} is not in {RECORDS} yet; run without --latency and --memory")
            if options.latency and (options.again or record.latency is None):
                record = replace(record, latency=apart(measure_latency, name, options.threads))
            if options.memory and (options.again or record.memory is None):
                record = replace(record, memory=memory_cost(f"{TORCHVISION_PREFIX}{name}"))
        elif options.again or record is None:
            found = apart(measure, name)
            record = (
                found
                if record is None
                else replace(found, latency=record.latency, memory=record.memory)
            )
        write_record(name, record)
        PAGE.write_text(page(read_records()))  # now, so that an interrupted run leaves a page
        sys.stderr.write("  ".join(cells(name, record)) + "\n")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
