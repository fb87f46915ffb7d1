"""Accuracy of every zoo network in int8, beside torch.ao: ``python -m benchmarks.accuracy``.

Writes ``docs/accuracy.md``. One default configuration for all, calibrated on the calibration set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.peers import TORCH_AO_ENGINES, torch_ao
from fxquant.audit import audit
from fxquant.calibration import calibrate
from fxquant.models_zoo.evaluation import compare, logit_sqnr
from fxquant.models_zoo.registry import ZooEntry, load, names
from fxquant.quantize_fx import convert_fx, prepare_fx

HEADERS = (
    "network",
    "FP32 top-1",
    "int8 top-1",
    "agreement",
    "logit SQNR, dB",
    "torch.ao best, dB",
    "torch.ao engine",
    "int8 by MACs",
)


def measure(entry: ZooEntry, *, peers: bool) -> tuple[object, ...]:
    """One row of the table."""
    prepared = prepare_fx(entry.model, None, entry.example_inputs)
    calibrate(prepared, entry.calibration)
    model = convert_fx(prepared)
    result = compare(entry, model)
    best, engine = _best_peer(entry) if peers else (float("nan"), "not run")
    coverage = audit(model, entry.example_inputs).mac_coverage
    return (
        entry.name,
        f"{result.fp32:.2f}",
        f"{result.int8:.2f}",
        f"{result.agreement:.2f} % of {result.agreement_inputs}",
        f"{result.sqnr_db:.2f}",
        f"{best:.2f}",
        engine,
        f"{100 * coverage:.2f} %",
    )


def _best_peer(entry: ZooEntry) -> tuple[float, str]:
    """torch.ao's best SQNR and the engine that reaches it, or why there is none."""
    scores: dict[str, float] = {}
    for engine in TORCH_AO_ENGINES:
        try:
            scores[engine] = logit_sqnr(entry, torch_ao(entry, engine))
        except RuntimeError as error:  # it traces functional convolutions and cannot lower them
            sys.stderr.write(f"torch.ao {engine} on {entry.name}: {str(error).splitlines()[0]}\n")
    if not scores:
        return float("nan"), "fails to convert"
    best = max(scores, key=lambda engine: scores[engine])
    return scores[best], best


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(names()), help="zoo names")
    parser.add_argument("--no-peers", action="store_true", help="leave torch.ao out")
    parser.add_argument("--output", type=Path, default=Path("docs/accuracy.md"))
    options = parser.parse_args()
    rows = []
    for name in options.networks:
        rows.append(measure(load(name), peers=not options.no_peers))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    table = tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True)
    options.output.write_text(
        "# Accuracy in int8\n\n"
        "One default configuration for every network, calibrated on its calibration set; torch.ao"
        " with the default mapping of each engine, the best shown. Regenerate with\n"
        "`python -m benchmarks.accuracy` (needs the data folder, see README).\n\n"
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}.\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
