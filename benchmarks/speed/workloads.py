"""The networks, each with calibration data, other data to judge by, and the FP32 answers.

A workload is made once and kept on disk; every worker reads the same file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.networks import entry_of
from benchmarks.speed.bert import LENGTH, TOKENS, Bert
from fxquant.errors import DataNotFoundError
from fxquant.models_zoo import metrics
from fxquant.models_zoo.data import ImageNetSource, find_data_dir, minus_one_to_one
from fxquant.models_zoo.registry import load
from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.models_zoo.torchvision_models import build

CALIBRATION, EVALUATION = 32, 32
"""Pictures to calibrate on, and others to judge by."""

_FORMAT = 2  # of the files; raised when what is in them changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One network and its data.

    Attributes:
        name: its key in :data:`NETWORKS`.
        weights: where the weights are from.
        dynamic: int8 weights and activations quantized at run time, without calibration.
        model: FP32, in eval mode.
        calibration: inputs ``(N, ...)``.
        evaluation: other inputs.
        logits: the FP32 answers to ``evaluation``, computed in eager mode.
    """

    name: str
    weights: str
    dynamic: bool
    model: nn.Module
    calibration: Tensor
    evaluation: Tensor
    logits: Tensor

    @property
    def example(self) -> Tensor:
        """The input that is timed, of batch 1."""
        return self.evaluation[:1].contiguous()

    def score(self, run: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Mean SQNR of the logits in dB, and top-1 agreement in percent, one input at a time.

        Raises:
            ValueError: an answer is not finite.
        """
        given = torch.cat([run(row[None].contiguous()).float() for row in self.evaluation])
        given = given.reshape(self.logits.shape)
        if not bool(given.isfinite().all()):
            raise ValueError("an answer is infinite or not a number")
        each = [metrics.sqnr_db(a, b) for a, b in zip(self.logits, given, strict=True)]
        wide = self.logits.shape[-1]
        agreement = metrics.agreement(self.logits.reshape(-1, wide), given.reshape(-1, wide))
        return sum(each) / len(each), agreement


# -- making them -----------------------------------------------------------------------------------


def _torchvision(name: str) -> Callable[[], Workload]:
    def make() -> Workload:
        entry = entry_of(name, calibration=CALIBRATION, evaluation=EVALUATION)
        return _answered(
            name=name,
            weights="seeded, batch-norms as if trained",
            model=entry.model,
            calibration=torch.cat(entry.calibration),
            evaluation=torch.cat([inputs for inputs, _ in entry.evaluation]),
        )

    return make


def _mobilenet_v2() -> Workload:
    """With trained weights where the data folder is, else seeded as the others."""
    if (folder := _data_folder()) is None:
        return _torchvision("mobilenet_v2")()
    images = ImageNetSource(folder)
    return _answered(
        name="mobilenet_v2",
        weights="trained (its batch-norms folded before)",
        model=_with_folded_weights(build("mobilenet_v2"), load("mobilenetv2_folded").model),
        calibration=minus_one_to_one(images.calibration_images(CALIBRATION)),
        evaluation=minus_one_to_one(images.read("test_a", EVALUATION)[0]),
    )


def _data_folder() -> Path | None:
    try:
        return find_data_dir()
    except DataNotFoundError:
        return None


def _with_folded_weights(model: nn.Module, folded: nn.Module) -> nn.Module:
    """Put weights whose batch-norms are folded into a network that has batch-norms, in place.

    These then only add the bias: ``weight 1, mean 0, variance 1 - eps``. The weights were trained
    with TensorFlow's padding, which is one-sided; torchvision pads both sides, which costs six
    points of top-1 on 50 photographs (84 to 78) and leaves activations like a trained network's.
    """
    sources = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for source, conv, norm in zip(sources, convs, norms, strict=True):
            assert source.bias is not None
            conv.weight.copy_(source.weight)
            norm.weight.fill_(1.0)
            norm.bias.copy_(source.bias)
            norm.get_buffer("running_mean").zero_()
            norm.get_buffer("running_var").fill_(1.0 - norm.eps)
        head, given = model.get_submodule("classifier.1"), folded.get_submodule("classifier")
        for name in ("weight", "bias"):
            head.get_parameter(name).copy_(given.get_parameter(name)[1:])  # without background
    return model


def _bert() -> Workload:
    torch.manual_seed(0)
    return _answered(
        name="bert_base",
        weights="seeded",
        dynamic=True,
        model=Bert().eval(),
        calibration=torch.randint(0, TOKENS, (CALIBRATION, LENGTH)),
        evaluation=torch.randint(0, TOKENS, (EVALUATION // 4, LENGTH)),  # each has 128 answers
    )


class _Tiny(nn.Module):
    """Enough to see that the machinery works: two convolutions with a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 10]``."""
        y = self.stem(x)
        made: Tensor = self.head(torch.relu(self.branch(y) + y).mean((2, 3)))
        return made


def _tiny() -> Workload:
    torch.manual_seed(0)
    calibration, evaluation = (torch.rand(8, 3, 32, 32) for _ in range(2))
    return _answered(
        name="tiny",
        weights="seeded",
        model=_Tiny().eval(),
        calibration=calibration,
        evaluation=evaluation,
    )


def _answered(*, model: nn.Module, evaluation: Tensor, **fields: Any) -> Workload:
    with torch.no_grad():
        logits = torch.cat([model(row[None]) for row in evaluation])
    return Workload(
        model=model, evaluation=evaluation, logits=logits, **{"dynamic": False, **fields}
    )


NETWORKS: Final[Mapping[str, Callable[[], Workload]]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "densenet121": _torchvision("densenet121"),
    "inception_v3": _torchvision("inception_v3"),
    "bert_base": _bert,
    "tiny": _tiny,
}
"""Name -> how it is made."""

MEASURED: Final = tuple(name for name in NETWORKS if name != "tiny")
"""What the command measures unless told otherwise."""


# -- on disk ---------------------------------------------------------------------------------------


def folder_of(cache: Path, name: str) -> Path:
    """Where all that is made from it is kept: elsewhere for other data, or another torch."""
    made_of = f"{_FORMAT} {torch.__version__} {CALIBRATION} {EVALUATION} {_data_folder()}"
    return cache / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


def ensure(cache: Path, name: str) -> tuple[Path, str]:
    """Make the workload unless it is there; returns its folder, and where its weights are from."""
    folder = folder_of(cache, name)
    path = folder / "workload.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = NETWORKS[name]()
        fields = {key: getattr(made, key) for key in Workload.__slots__}
        unfinished = path.with_suffix(".part")
        torch.save(fields, unfinished)
        (folder / "weights.txt").write_text(made.weights)
        unfinished.rename(path)
    return folder, (folder / "weights.txt").read_text()


def read(folder: Path) -> Workload:
    """The workload in ``folder``, which :func:`ensure` made."""
    import_torchvision()  # its classes are in the file
    fields = torch.load(folder / "workload.pt", weights_only=False)  # a file of our own
    return Workload(**fields)
