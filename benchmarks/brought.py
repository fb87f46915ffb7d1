"""The models of docs/models.md: what people bring, with random weights, and inputs for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.models_zoo.torchvision_import import import_torchvision


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """A model of the table.

    Attributes:
        make: the model.
        inputs: one batch, as ``prepare_fx`` takes it.
        fixed: ``concrete_args`` of ``prepare_fx``.
        probe: what is compared, of the model and of the int8 model; the first tensor that they
            return where it is absent.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    fixed: Mapping[str, Any] | None = None
    probe: Callable[[nn.Module, Any], Any] | None = None


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


# -- torchvision ----------------------------------------------------------------------------------


def vision(path: str) -> nn.Module:
    """A model of torchvision, such as ``detection.ssdlite320_mobilenet_v3_large``."""
    torchvision = import_torchvision()
    spaces, _, name = path.rpartition(".")
    space = getattr(torchvision.models, spaces) if spaces else torchvision.models
    if spaces == "detection":
        define_nms()
    options = {"weights_backbone": None} if spaces else {}
    made: nn.Module = getattr(space, name)(weights=None, **options)
    for module in made.modules():
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)  # the head of a vision transformer
    return made


def define_nms() -> None:
    """Define ``torchvision::nms`` in Python where torchvision's compiled part is missing."""
    from torchvision import extension
    from torchvision.ops import boxes

    if extension._has_ops() or _libraries:
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", _suppressed, "CPU")
    _libraries.append(library)
    boxes._assert_has_ops = lambda: None


_libraries: list[torch.library.Library] = []


def _suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that overlap no better one by more than ``threshold``."""
    from torchvision.ops.boxes import box_iou

    apart = box_iou(boxes, boxes) <= threshold
    alive = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        if alive[index]:
            kept.append(index)
            alive &= apart[index]
    return torch.tensor(kept, dtype=torch.long)


def features(model: nn.Module, images: Any) -> Any:
    """What the backbone of a detector gives, before boxes are chosen and sorted."""
    model = getattr(model, "model", model)  # an int8 model that calls the detector
    return model.backbone(model.transform(*images)[0].tensors)


def _image() -> Any:
    return (torch.randn(1, 3, 224, 224),)


def _images() -> Any:
    return ([torch.rand(3, 320, 320)],)


# -- transformers ---------------------------------------------------------------------------------


def transformer(name: str, **sizes: Any) -> nn.Module:
    """A model of transformers by the name of its class, of the default size but for ``sizes``."""
    import_torchvision()  # which transformers imports in turn
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if name == "WhisperEncoder":
        return transformer("WhisperModel", **sizes).get_encoder()
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    made: nn.Module = kind(kind.config_class(**sizes))
    return made


WHISPER_TINY: Final = {
    **{f"{part}_layers": 4 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 6 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 1536 for part in ("encoder", "decoder")},
    "d_model": 384,
}


def tokens(count: int = 128, words: int = 30_000) -> dict[str, Tensor]:
    """Two texts of random words."""
    return {"input_ids": torch.randint(0, words, (2, count))}


# -- the list -------------------------------------------------------------------------------------

MODELS: Final[Mapping[str, Brought]] = {
    **{
        name: Brought(make=lambda name=name: vision(name), inputs=_image)
        for name in (
            *("vit_b_16", "swin_t", "maxvit_t"),
            "segmentation.lraspp_mobilenet_v3_large",
            "segmentation.deeplabv3_mobilenet_v3_large",
        )
    },
    **{
        name: Brought(make=lambda name=name: vision(name), inputs=_images, probe=features)
        for name in (
            "detection.fasterrcnn_mobilenet_v3_large_320_fpn",
            "detection.ssdlite320_mobilenet_v3_large",
        )
    },
    "BERT": Brought(make=lambda: transformer("BertModel"), inputs=tokens),
    "DistilBERT": Brought(make=lambda: transformer("DistilBertModel"), inputs=tokens),
    "GPT-2": Brought(
        make=lambda: transformer("GPT2LMHeadModel"), inputs=tokens, fixed={"use_cache": False}
    ),
    "GPT-2 with its cache": Brought(make=lambda: transformer("GPT2LMHeadModel"), inputs=tokens),
    "ViT": Brought(
        make=lambda: transformer("ViTForImageClassification"),
        inputs=lambda: {"pixel_values": torch.randn(1, 3, 224, 224)},
    ),
    "Whisper-tiny encoder": Brought(
        make=lambda: transformer("WhisperEncoder", **WHISPER_TINY),
        inputs=lambda: {"input_features": torch.randn(1, 80, 3000)},
    ),
    "LSTM tagger": Brought(make=Tagger, inputs=lambda: (torch.randint(0, 500, (4, 30)),)),
    "WaveNet-like stack": Brought(make=Wave, inputs=lambda: (torch.randn(2, 1, 256),)),
    "3-d U-Net": Brought(make=Volume, inputs=lambda: (torch.randn(1, 1, 16, 32, 32),)),
    "DCGAN generator": Brought(make=generator, inputs=lambda: (torch.randn(4, 100, 1, 1),)),
}
