"""What cross-layer equalization is worth: real networks, one scale for a whole weight.

``python -m benchmarks.equalization [network ...]`` prints the table of docs/equalize.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from tabulate import tabulate
from torch import nn

from fxquant.calibration import calibrate
from fxquant.equalize import equalize
from fxquant.errors import FxQuantWarning
from fxquant.models_zoo import metrics
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.observers import default_weight_observer
from fxquant.qconfig import QConfig, get_default_qconfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.quantize_fx import convert_fx, prepare_fx

NETWORKS = ("mobilenetv2_folded", "efficientnet_lite0", "resnet20_cifar10")
HEADERS = ("network", "weights", "model", "top-1, %", "agreement with FP32, %", "logit SQNR, dB")


def variants(entry: ZooEntry) -> Iterator[tuple[str, nn.Module]]:
    """The model as it is, equalized, and equalized with its relu6 opened."""
    yield "as it is", entry.model
    for relu6 in ("keep", "relu"):
        yield f"relu6={relu6!r}", equalize(entry.model, entry.example_inputs, relu6=relu6)


def labelled(entry: ZooEntry, model: nn.Module) -> torch.Tensor:
    """The logits of the labelled images."""
    return entry.logits(model, [inputs for inputs, _ in entry.evaluation])


def measured(
    entry: ZooEntry, wanted: torch.Tensor, given: torch.Tensor
) -> tuple[float, float, float]:
    """Top-1 on the labelled images, agreement with FP32 there, and SQNR of the logits."""
    labels = torch.cat([labels.flatten() for _, labels in entry.evaluation])
    return (
        metrics.top1(given, labels),
        metrics.agreement(wanted, given),
        metrics.sqnr_db(wanted, given),
    )


def rows(name: str) -> Iterator[tuple[object, ...]]:
    """Accuracy of every variant with both kinds of weights, and of the float variants."""
    entry = load(name)
    wanted = labelled(entry, entry.model)
    default = get_default_qconfig("x86")
    per_tensor = QConfig(activation=default.activation, weight=default_weight_observer)
    for label, model in variants(entry):
        yield name, "FP32", label, *measured(entry, wanted, labelled(entry, model))
        for weights, qconfig in (("per tensor", per_tensor), ("per channel", default)):
            mapping = QConfigMapping().set_global(qconfig)
            prepared = prepare_fx(model, mapping, entry.example_inputs)
            calibrate(prepared, entry.calibration, progress=False)
            given = labelled(entry, convert_fx(prepared))
            yield name, weights, label, *measured(entry, wanted, given)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    warnings.simplefilter("ignore", FxQuantWarning)
    found = [row for name in parser.parse_args().networks for row in rows(name)]
    print(tabulate(found, HEADERS, tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
