"""Where the data folder is, how its files decode, and how images become a network's input.

The folder holds real weights and labelled images (``cifar10``, ``imagenet_sample``, one folder a
network). It is found through the environment variable ``FXQUANT_DATA``, else beside the checkout.
Images are handled as uint8 ``(N, 3, H, W)``, RGB, and turned into float inputs a batch at a time.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor

from fxquant.errors import DataNotFoundError
from fxquant.models_zoo._optional import require

DATA_VARIABLE = "FXQUANT_DATA"
"""The environment variable that names the data folder."""

Preprocess = Callable[[Tensor], Tensor]
"""Turns uint8 images ``(N, C, H, W)`` into the float inputs of one network."""

_T_co = TypeVar("_T_co", covariant=True)

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_SHIFT = 4  # pixels
_SHIFTS = ((_SHIFT, _SHIFT), (-_SHIFT, -_SHIFT), (_SHIFT, -_SHIFT))  # (right, down)
AGREEMENT_VARIANTS = 2 + len(_SHIFTS)
"""How many inputs :func:`agreement_variant` makes of one image."""


# --- where the files are -------------------------------------------------------------------


def find_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The data folder: the argument, else ``FXQUANT_DATA``, else ``shared/data`` nearby.

    Nearby means inside or beside the repository, or inside or beside the current directory.

    Raises:
        DataNotFoundError: the folder that was named, or any folder at all, is not there.
    """
    named = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    if named is not None:
        folder = Path(named)
        if folder.is_dir():
            return folder
        origin = "data_dir" if data_dir is not None else f"the environment variable {DATA_VARIABLE}"
        raise DataNotFoundError(
            f"{origin} names {str(named)!r}, which is not a folder; point it at the folder that "
            "holds cifar10/, imagenet_sample/ and one folder per network"
        )
    candidates = _default_data_dirs()
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise DataNotFoundError(
        f"the data folder was not found (looked at {looked}); set the environment variable "
        f"{DATA_VARIABLE} to the folder that holds cifar10/, imagenet_sample/ and one folder per "
        "network, or pass data_dir=. The model 'digits' needs none of it"
    )


def _default_data_dirs() -> tuple[Path, ...]:
    roots = (Path(__file__).resolve().parents[1], Path.cwd())
    places = [place for root in roots for place in (root.parent / "shared", root / "shared")]
    return tuple(dict.fromkeys(place / "data" for place in places))


def data_file(data_dir: Path, *parts: str) -> Path:
    """The path of a file in the data folder.

    Raises:
        DataNotFoundError: it is not there.
    """
    path = data_dir.joinpath(*parts)
    if not path.is_file():
        raise DataNotFoundError(
            f"{path} is missing; {data_dir} is the data folder in use, check that it is complete "
            f"or point {DATA_VARIABLE} at another one"
        )
    return path


def load_state(data_dir: Path, *parts: str) -> dict[str, Tensor]:
    """The tensors of a weight file of the data folder; floating ones are cast to FP32.

    Raises:
        DataNotFoundError: the file is not there.
    """
    stored: dict[str, Tensor] = torch.load(data_file(data_dir, *parts), weights_only=True)
    return {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}


def load_npz(path: Path) -> Any:
    """The arrays of an ``.npz`` file, without unpickling anything."""
    numpy = require("numpy", distribution="numpy", purpose="reading the zoo's arrays")
    return numpy.load(path, allow_pickle=False)


# --- decoding ------------------------------------------------------------------------------


def decode_cifar(delta: Any) -> Tensor:
    """Undo the delta coding of the CIFAR-10 files, exactly.

    In arithmetic modulo 256: ``q = cumsum(cumsum(delta, rows), columns)``, then
    ``G = q0, R = q1 + G, B = q2 + G``.

    Args:
        delta: numpy uint8 array ``(N, 3, 32, 32)``.

    Returns:
        uint8 ``(N, 3, 32, 32)``, RGB.
    """
    q = delta.cumsum(axis=2, dtype="uint8").cumsum(axis=3, dtype="uint8")
    planes = torch.from_numpy(q)
    green = planes[:, 0]
    return torch.stack([planes[:, 1] + green, green, planes[:, 2] + green], dim=1)


def decode_jpegs(jpeg: Any, offsets: Any, *, limit: int | None = None) -> Tensor:
    """Decode concatenated JPEG files of one size.

    Args:
        jpeg: numpy uint8, all files one after the other.
        offsets: numpy int64 ``(N + 1,)``; file i is ``jpeg[offsets[i]:offsets[i + 1]]``.
        limit: decode only so many, from the first.

    Returns:
        uint8 ``(N, 3, H, W)``, RGB.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    image = require("PIL.Image", distribution="Pillow", purpose="decoding the ImageNet sample")
    count = len(offsets) - 1 if limit is None else min(limit, len(offsets) - 1)
    decoded = []
    for i in range(count):
        with image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())) as picture:
            rgb = picture.convert("RGB")
            flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
            decoded.append(flat.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1))
    return torch.stack(decoded)


# --- image sources -------------------------------------------------------------------------


class ImageSource(Protocol):
    """Calibration and evaluation images of one data set; the two never overlap."""

    def calibration_images(self, limit: int | None = None) -> Tensor:
        """uint8 ``(N, C, H, W)``, at most ``limit`` of them."""

    def evaluation_images(self) -> tuple[Tensor, Tensor]:
        """uint8 ``(N, C, H, W)`` and int64 labels ``(N,)``."""


@dataclass(frozen=True)
class CifarSource:
    """CIFAR-10: 1,000 training images to calibrate on, 5,000 test images to evaluate on."""

    data_dir: Path

    def calibration_images(self, limit: int | None = None) -> Tensor:
        """The images of ``calib_a``."""
        return self.read("calib_a", limit)[0]

    def evaluation_images(self) -> tuple[Tensor, Tensor]:
        """The images of ``test_a`` followed by those of ``test_b``."""
        parts = [self.read("test_a"), self.read("test_b")]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def read(self, part: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of ``test_a``, ``test_b`` or ``calib_a``."""
        with load_npz(data_file(self.data_dir, "cifar10", f"{part}.npz")) as arrays:
            return decode_cifar(arrays["delta"][:limit]), _labels(arrays["labels"][:limit])


@dataclass(frozen=True)
class ImageNetSource:
    """The ImageNet sample: 100 images to calibrate on, 300 others to evaluate on."""

    data_dir: Path

    def calibration_images(self, limit: int | None = None) -> Tensor:
        """The images of ``calib``."""
        return self.read("calib", limit)[0]

    def evaluation_images(self) -> tuple[Tensor, Tensor]:
        """The images of ``test_a``."""
        return self.read("test_a")

    def read(self, part: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of ``calib`` or ``test_a``."""
        with load_npz(data_file(self.data_dir, "imagenet_sample", f"{part}.npz")) as arrays:
            images = decode_jpegs(arrays["jpeg"], arrays["offsets"], limit=limit)
            return images, _labels(arrays["labels"][:limit])


def _labels(array: Any) -> Tensor:
    return torch.from_numpy(array.astype("int64"))


# --- preprocessing -------------------------------------------------------------------------


def normalized(images: Tensor) -> Tensor:
    """``(x / 255 - mean) / std`` per channel, RGB: the CIFAR-10 ResNets and torchvision."""
    mean = torch.tensor(_IMAGENET_MEAN).reshape(1, 3, 1, 1)
    std = torch.tensor(_IMAGENET_STD).reshape(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def centred_127(images: Tensor) -> Tensor:
    """``(x - 127) / 128``: EfficientNet-Lite0."""
    return (images.float() - 127) / 128


def minus_one_to_one(images: Tensor) -> Tensor:
    """``x / 127.5 - 1``: MobileNetV2."""
    return images.float() / 127.5 - 1


def bgr_minus_mean(images: Tensor) -> Tensor:
    """Channels to BGR, minus (104, 117, 123), unscaled: SqueezeNet."""
    return images.flip(1).float() - torch.tensor([104.0, 117.0, 123.0]).reshape(1, 3, 1, 1)


# --- batches and augmentation --------------------------------------------------------------


def agreement_variant(images: Tensor, variant: int) -> Tensor:
    """One of five deterministic views of every image, for comparing two models on more inputs.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        variant: 0 the image itself, 1 mirrored left to right, 2 to 4 shifted by 4 pixels right
            and down, left and up, right and up, the uncovered border repeating the edge.
    """
    if variant == 0:
        return images
    if variant == 1:
        return images.flip(-1)
    right, down = _SHIFTS[variant - 2]
    rows = (torch.arange(images.shape[-2]) - down).clamp(0, images.shape[-2] - 1)
    columns = (torch.arange(images.shape[-1]) - right).clamp(0, images.shape[-1] - 1)
    return images[..., rows, :][..., columns]


def augment(images: Tensor) -> Tensor:
    """All five views: ``(N, C, H, W)`` to ``(5 N, C, H, W)``, view by view, the originals first."""
    return torch.cat([agreement_variant(images, v) for v in range(AGREEMENT_VARIANTS)])


class LazyBatches(Sequence[_T_co]):
    """A read-only sequence whose items are made when they are asked for, and not kept.

    Args:
        length: how many items there are.
        make: gives item ``i``, ``0 <= i < length``.
    """

    def __init__(self, length: int, make: Callable[[int], _T_co]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> _T_co: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_T_co]: ...

    def __getitem__(self, index: int | slice) -> _T_co | Sequence[_T_co]:
        picked = range(self._length)[index]
        if isinstance(picked, range):
            return LazyBatches(len(picked), lambda i: self._make(picked[i]))
        return self._make(picked)

    def __iter__(self) -> Iterator[_T_co]:
        return (self._make(i) for i in range(self._length))


def batch_slices(count: int, batch_size: int) -> list[slice]:
    """The slices that cut ``count`` rows into batches; the last one may be short."""
    return [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
