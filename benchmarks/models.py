"""What becomes of models that people bring: how much of them runs in int8, and how well.

``python -m benchmarks.models [model ...]`` prints the table of docs/models.md. Weights are random
and inputs noise, so the table says what is quantized and that it computes the same, no more.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.brought import MODELS, Brought
from fxquant.calibration import calibrate
from fxquant.explain import explain
from fxquant.models_zoo import metrics
from fxquant.op_rows import OpRow, Runs
from fxquant.qconfig import default_dynamic_qconfig
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.shapes import as_arguments

HEADERS: Final = (
    *("model", "MACs in int8, %", "of linear and conv, %", "SQNR, dB"),
    "products in FP32",
)
REASONS: Final = ("op in FP32", "in models", "why, most often")
WEIGHTED: Final = (
    *("linear", "addmm", "lstm"),  # transformers spells linears addmm in places
    *(f"{name}{d}d" for name in ("conv", "conv_transpose") for d in (1, 2, 3)),
)


def measured(name: str, brought: Brought) -> tuple[tuple[object, ...], list[OpRow]]:
    """One line of the table, and the ops in FP32."""
    torch.manual_seed(0)
    model = brought.make().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        normalize(model, [brought.inputs() for _ in range(2)])
        example = brought.inputs()
        prepared = prepare_fx(model, _mapping(), example, concrete_args=brought.fixed)
        calibrate(prepared, [brought.inputs() for _ in range(4)], progress=False)
        int8 = convert_fx(prepared)
        probe = brought.probe or call
        given, wanted = first(probe(int8, example)), first(probe(model, example))
    rows = explain(int8).rows
    floats = [r for r in rows if r.runs is Runs.FP32]
    weighted = [r for r in rows if r.kind in WEIGHTED]
    products = Counter(r.kind for r in floats if r.macs is None or r.macs)
    line = (
        name.rpartition(".")[2],
        *(share(rows), share(weighted), metrics.sqnr_db(wanted, given)),
        ", ".join(f"{count} {kind}" for kind, count in sorted(products.items())),
    )
    return line, floats


def normalize(model: nn.Module, batches: Iterable[Any]) -> None:
    """Give batch-norms the statistics of ``batches``; random weights vanish without.

    Args:
        model: in evaluation mode.
        batches: as ``prepare_fx`` takes example inputs.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = None  # type: ignore[assignment]  # the mean of all
    inputs = [as_arguments(batch)[0][0] for batch in batches]
    lists = isinstance(inputs[0], list)
    model([image for images in inputs for image in images] if lists else torch.cat(inputs))
    model.eval()


def call(model: nn.Module, batch: Any) -> Any:
    """What ``model`` gives."""
    args, kwargs = as_arguments(batch)
    return model(*args, **kwargs)


def _mapping() -> Any:
    """The default, with dynamic LSTMs."""
    return get_default_qconfig_mapping("x86").set_object_type(nn.LSTM, default_dynamic_qconfig)


def share(rows: Iterable[OpRow]) -> float:
    """The part of the known multiply-accumulates that run in int8, in percent."""
    found = list(rows)
    known = sum(r.macs or 0 for r in found)
    return 100 * sum(r.macs or 0 for r in found if r.runs is Runs.INT8) / max(known, 1)


def reasons(floats: Mapping[str, list[OpRow]]) -> list[tuple[str, int, str]]:
    """Kind, number of models and commonest reason of the ops in FP32 of all models."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    models: dict[str, set[str]] = defaultdict(set)
    for model, rows in floats.items():
        for op in rows:
            if op.fate or not op.reason:
                continue  # its work is done by another row
            found[op.kind][_general(op.reason)] += 1
            models[op.kind].add(model)
    kinds = sorted(found, key=lambda kind: (-len(models[kind]), kind))
    return [(kind, len(models[kind]), found[kind].most_common(1)[0][0]) for kind in kinds]


def _general(reason: str) -> str:
    """The first sentence of a reason, without names of one model."""
    if reason.startswith("opaque island"):
        return "an opaque island: what it only calls is quantized"
    text = re.split(r"\.\s|; runs in FP32 on|\s\(by ", reason)[0]
    return re.sub(r"operand \S+ is", "an operand is", re.sub(r"'[^']*'", "it", text))


def first(value: Any) -> Tensor:
    """The first tensor in a result."""
    return next(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    warnings.simplefilter("ignore")
    lines, floats = [], {}
    for name in parser.parse_args().models:
        print(name, file=sys.stderr)
        line, floats[name] = measured(name, MODELS[name])
        lines.append(line)
    print(tabulate(lines, HEADERS, tablefmt="github", floatfmt=".1f"), end="\n\n")
    print(tabulate(reasons(floats), REASONS, tablefmt="github"))


if __name__ == "__main__":
    main()
