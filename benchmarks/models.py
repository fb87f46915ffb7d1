"""What becomes of models that people bring: how much of them runs in int8, and how well.

``python -m benchmarks.models [model ...]`` prints the table of docs/models.md. Weights are random
and inputs noise, so the table says what is quantized and that it computes the same, no more.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from fxquant.calibration import calibrate
from fxquant.explain import explain
from fxquant.models_zoo import metrics
from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.op_rows import OpRow, Runs
from fxquant.qconfig import default_dynamic_qconfig
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from fxquant.quantize_fx import convert_fx, prepare_fx

HEADERS = (
    *("model", "MACs in int8, %", "of linear and conv, %", "SQNR, dB"),
    "products in FP32",
)
_WEIGHTED: Final = (
    *("linear", "lstm"),
    *(f"{name}{d}d" for name in ("conv", "conv_transpose") for d in (1, 2, 3)),
)


class Tagger(nn.Module):
    """An LSTM tagger: tokens to labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 64)
        self.lstm = nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, L]`` to ``[N, L, 20]``."""
        made, _ = self.lstm(self.table(tokens))
        found: Tensor = self.head(made)
        return found


class Wave(nn.Module):
    """A stack of gated, dilated convolutions with skips, as WaveNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 32, 1), nn.Conv1d(32, 16, 1)
        self.gates = nn.ModuleList(nn.Conv1d(32, 64, 2, dilation=2**i) for i in range(6))
        self.outs = nn.ModuleList(nn.Conv1d(32, 32, 1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, L]`` to ``[N, 16, L]``."""
        y = self.first(x)
        skips = torch.zeros_like(y)
        for index, (gate, out) in enumerate(zip(self.gates, self.outs, strict=True)):
            signal, control = gate(F.pad(y, (2**index, 0))).chunk(2, 1)
            made = out(torch.tanh(signal) * torch.sigmoid(control))
            y, skips = y + made, skips + made
        found: Tensor = self.last(F.relu(skips))
        return found


class Volume(nn.Module):
    """A 3-d U-Net with one skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 32, 3, padding=1)
        self.norms = nn.ModuleList(nn.InstanceNorm3d(c) for c in (16, 32, 16))
        self.up, self.join = nn.ConvTranspose3d(32, 16, 2, 2), nn.Conv3d(32, 16, 3, padding=1)
        self.head = nn.Conv3d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, D, H, W]`` to ``[N, 3, D, H, W]``."""
        y = F.leaky_relu(self.norms[0](self.down(x)))
        z = F.leaky_relu(self.norms[1](self.deep(F.max_pool3d(y, 2))))
        made = F.leaky_relu(self.norms[2](self.join(torch.cat([y, self.up(z)], 1))))
        found: Tensor = self.head(made)
        return found


def generator() -> nn.Module:
    """The generator of a DCGAN."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(100, 256, 4, 1, 0, bias=False)]
    for inputs in (256, 128, 64):
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(inputs, inputs // 2, 4, 2, 1, bias=False)]
    return nn.Sequential(*layers, nn.Tanh())


def _vision(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models: Any = import_torchvision().models
        *spaces, name = path.split(".")
        for space in spaces:
            models = getattr(models, space)
        options = {"weights_backbone": None} if spaces else {}
        made: nn.Module = getattr(models, name)(weights=None, **options)
        for module in made.modules():
            if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                nn.init.normal_(module.weight, std=0.02)  # the head of a vision transformer
        return made

    return make


def _image() -> Tensor:
    return torch.randn(1, 3, 224, 224)


MODELS: Final[Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]]] = {
    "vit_b_16": (_vision("vit_b_16"), _image),
    "swin_t": (_vision("swin_t"), _image),
    "maxvit_t": (_vision("maxvit_t"), _image),
    "lraspp_mobilenet_v3_large": (_vision("segmentation.lraspp_mobilenet_v3_large"), _image),
    "deeplabv3_mobilenet_v3_large": (_vision("segmentation.deeplabv3_mobilenet_v3_large"), _image),
    "LSTM tagger": (Tagger, lambda: torch.randint(0, 500, (4, 30))),
    "WaveNet-like stack": (Wave, lambda: torch.randn(2, 1, 256)),
    "3-d U-Net": (Volume, lambda: torch.randn(1, 1, 16, 32, 32)),
    "DCGAN generator": (generator, lambda: torch.randn(4, 100, 1, 1)),
}


def row(name: str) -> tuple[object, ...]:
    """One line of the table."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    model.train()
    with torch.no_grad():
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            model(torch.cat([inputs(), inputs()]))  # statistics of batch-norms
        model.eval()
        example = inputs()
        prepared = prepare_fx(model, _mapping(), (example,))
        calibrate(prepared, [inputs() for _ in range(4)], progress=False)
        int8 = convert_fx(prepared)
        given, wanted = _first(int8(example)), _first(model(example))
    rows = explain(int8).rows
    floats = Counter(r.kind for r in rows if r.runs is Runs.FP32 and (r.macs is None or r.macs))
    products = ", ".join(f"{count} {kind}" for kind, count in sorted(floats.items()))
    weighted = [r for r in rows if r.kind in _WEIGHTED]
    return (name, _share(rows), _share(weighted), metrics.sqnr_db(wanted, given), products)


def _mapping() -> Any:
    """The default, with dynamic LSTMs."""
    return get_default_qconfig_mapping("x86").set_object_type(nn.LSTM, default_dynamic_qconfig)


def _share(rows: Any) -> float:
    """The part of the known multiply-accumulates that run in int8, in percent."""
    found: list[OpRow] = list(rows)
    known = sum(r.macs or 0 for r in found)
    return 100 * sum(r.macs or 0 for r in found if r.runs is Runs.INT8) / max(known, 1)


def _first(value: Any) -> Tensor:
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
    found = [row(name) for name in parser.parse_args().models]
    print(tabulate(found, HEADERS, tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
