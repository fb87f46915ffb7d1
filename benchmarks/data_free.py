"""What quantizing without data costs: ``python -m benchmarks.data_free``.

Writes the table in ``docs/quantize.md``.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path

import torch
from tabulate import tabulate

from fxquant.errors import CalibrationWarning
from fxquant.models_zoo.evaluation import compare
from fxquant.models_zoo.registry import ZooEntry, load, names
from fxquant.quantize import quantize

HEADERS = ("network", "FP32", "int8, calibrated", "int8, no data", "agreement, no data")
PAGE = Path("docs/quantize.md")
_TABLE = re.compile(r"(<!-- data-free table: begin -->\n).*?(<!-- data-free table: end -->)", re.S)


def measure(entry: ZooEntry) -> tuple[str, ...]:
    """One row of the table; the inputs' mean and deviation are those of the calibration set."""
    inputs = torch.cat(entry.calibration)
    calibrated = compare(entry, quantize(entry.model, entry.calibration, progress=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # what is measured here
        model = quantize(
            entry.model,
            None,
            example_inputs=entry.example_inputs,
            input_mean=float(inputs.mean()),
            input_deviation=float(inputs.std()),
        )
    free = compare(entry, model)
    return (
        entry.name,
        f"{free.fp32:.2f}",
        f"{calibrated.int8:.2f}",
        f"{free.int8:.2f}",
        f"{free.agreement:.2f} %",
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(names()), help="zoo names")
    options = parser.parse_args()
    rows = []
    for name in options.networks:
        rows.append(measure(load(name)))
        sys.stderr.write("  ".join(rows[-1]) + "\n")
    table = tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True)
    PAGE.write_text(_TABLE.sub(rf"\g<1>\n{table}\n\n\g<2>", PAGE.read_text()))
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
