"""Finding, decoding, preprocessing and augmenting data."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.errors import DataNotFoundError, MissingDependencyError
from fxquant.models_zoo import data
from fxquant.models_zoo.data import CifarSource, ImageNetSource, LazyBatches


def test_a_folder_named_by_the_environment_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataNotFoundError, match=r"FXQUANT_DATA names .*nowhere"):
        data.find_data_dir()


def test_the_argument_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_DATA", str(tmp_path / "nowhere"))
    assert data.find_data_dir(tmp_path) == tmp_path
    with pytest.raises(DataNotFoundError, match="data_dir names"):
        data.find_data_dir(tmp_path / "absent")


def test_without_any_folder_the_error_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FXQUANT_DATA", raising=False)
    monkeypatch.setattr(data, "_default_data_dirs", lambda: (tmp_path / "shared" / "data",))
    with pytest.raises(DataNotFoundError, match="set the environment variable FXQUANT_DATA"):
        data.find_data_dir()


def test_the_current_directory_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert tmp_path / "shared" / "data" in data._default_data_dirs()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"test_a\.npz is missing"):
        CifarSource(tmp_path).evaluation_images()


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxquant\[zoo\]'"):
        data.decode_jpegs(np.zeros(0, np.uint8), np.zeros(1, np.int64))


def test_cifar_decoding_undoes_the_coding_exactly() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    red, green, blue = (images[:, c] for c in range(3))
    planes = np.stack([green, red - green, blue - green], axis=1)
    delta = np.diff(planes, axis=3, prepend=np.uint8(0))
    delta = np.diff(delta, axis=2, prepend=np.uint8(0))
    assert torch.equal(data.decode_cifar(delta), torch.from_numpy(images))


def test_jpeg_decoding_keeps_order_and_channels() -> None:
    image = pytest.importorskip("PIL.Image")
    colours = [(200, 30, 60), (10, 220, 90), (40, 50, 240)]
    files = []
    for colour in colours:
        buffer = io.BytesIO()
        image.new("RGB", (8, 6), colour).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(f) for f in files])
    decoded = data.decode_jpegs(np.frombuffer(b"".join(files), np.uint8), offsets)
    assert decoded.shape == (3, 3, 6, 8)
    expected = torch.tensor(colours)[:, :, None, None]
    assert (decoded.int() - expected).abs().max() <= 3  # the colour transform rounds
    assert (
        data.decode_jpegs(np.frombuffer(b"".join(files), np.uint8), offsets, limit=1).shape[0] == 1
    )


def test_preprocessing_of_a_known_pixel() -> None:
    pixel = torch.tensor([255, 0, 127], dtype=torch.uint8).reshape(1, 3, 1, 1)
    cases = [
        (data.normalized, [(1 - 0.485) / 0.229, -0.456 / 0.224, (127 / 255 - 0.406) / 0.225]),
        (data.centred_127, [1.0, -127 / 128, 0.0]),
        (data.minus_one_to_one, [1.0, -1.0, 127 / 127.5 - 1]),
        (data.bgr_minus_mean, [127 - 104.0, -117.0, 255 - 123.0]),
    ]
    for preprocess, expected in cases:
        torch.testing.assert_close(preprocess(pixel).flatten(), torch.tensor(expected))


def test_augmentation_gives_original_mirror_and_three_edge_replicated_shifts() -> None:
    images = torch.arange(2 * 10 * 12).reshape(2, 1, 10, 12)
    views = data.augment(images)
    assert views.shape == (10, 1, 10, 12)
    original, mirrored, right_down, left_up, right_up = views.split(2)
    assert torch.equal(original, images)
    assert torch.equal(mirrored, images.flip(3))
    assert torch.equal(right_down[..., 4:, 4:], images[..., :-4, :-4])
    assert torch.equal(right_down[..., :4, :4], images[..., :1, :1].expand(2, 1, 4, 4))
    assert torch.equal(left_up[..., :-4, :-4], images[..., 4:, 4:])
    assert torch.equal(left_up[..., -4:, -4:], images[..., -1:, -1:].expand(2, 1, 4, 4))
    assert torch.equal(right_up[..., :-4, 4:], images[..., 4:, :-4])
    assert torch.equal(data.augment(images), views)


def test_lazy_batches_behave_like_a_list_and_make_items_on_demand() -> None:
    made: list[int] = []

    def make(i: int) -> int:
        made.append(i)
        return 10 * i

    batches = LazyBatches(4, make)
    assert made == []
    assert list(batches) == [0, 10, 20, 30]
    assert batches[-1] == 30
    assert list(batches[1:3]) == [10, 20]
    with pytest.raises(IndexError):
        batches[4]


def test_cifar_files(data_dir: Path) -> None:
    source = CifarSource(data_dir)
    images, labels = source.evaluation_images()
    assert (images.shape, images.dtype) == ((5000, 3, 32, 32), torch.uint8)
    assert labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    calibration = source.calibration_images()
    assert calibration.shape == (1000, 3, 32, 32)
    assert torch.equal(source.calibration_images(limit=3), calibration[:3])
    assert not {i.numpy().tobytes() for i in images} & {i.numpy().tobytes() for i in calibration}


def test_imagenet_files(data_dir: Path) -> None:
    source = ImageNetSource(data_dir)
    images, labels = source.evaluation_images()
    assert (images.shape, images.dtype) == ((300, 3, 224, 224), torch.uint8)
    assert labels.unique().numel() == 300  # one image a class
    assert labels.min() >= 0
    assert labels.max() < 1000
    calibration, calibration_labels = source.read("calib")
    assert calibration.shape == (100, 3, 224, 224)
    assert not set(labels.tolist()) & set(calibration_labels.tolist())
