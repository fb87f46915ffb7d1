"""A saved model comes back with the same integers, and a file cannot run code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxquant import artifact
from fxquant.artifact import FORMAT, inspect_header, load, save
from fxquant.errors import ArtifactError
from fxquant.graph_module import QuantGraphModule
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx


class Net(nn.Module):
    """Residual add, pooling, cat, a float op with parameters and a size read from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = torch.relu(self.second(y) + y)
        y = torch.cat([y, torch.max_pool2d(y, 3, 1, 1)], 1)
        return self.head(self.norm(self.pool(y).view(x.shape[0], -1)))


@pytest.fixture(scope="module")
def prepared() -> QuantGraphModule:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    model = prepare_fx(Net().eval(), None, (x,))
    with torch.no_grad():
        model(x)
    return model


@pytest.mark.parametrize("make", [convert_fx, convert_to_reference_fx])
def test_outputs_and_integers_are_the_same(
    make: Callable[[nn.Module], QuantGraphModule], prepared: QuantGraphModule, tmp_path: Path
) -> None:
    model, x = make(prepared), torch.randn(2, 3, 15, 9)
    save(model, tmp_path / "model.fxq")
    again = load(tmp_path / "model.fxq")
    assert torch.equal(again(x), model(x))
    assert again.state.stage is model.state.stage
    assert again.state.ledger == model.state.ledger
    for name, tensor in model.named_buffers():
        assert torch.equal(again.get_buffer(name), tensor), name


def test_a_prepared_model_keeps_its_statistics(prepared: QuantGraphModule, tmp_path: Path) -> None:
    save(prepared, tmp_path / "prepared.fxq")
    again = load(tmp_path / "prepared.fxq")
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(convert_fx(again)(x), convert_fx(prepared)(x))
    with torch.no_grad():
        again(10 * x)  # it can be calibrated further
    assert not torch.equal(convert_fx(again)(x), convert_fx(prepared)(x))


def test_a_fresh_process_needs_no_class_of_the_model(
    prepared: QuantGraphModule, tmp_path: Path
) -> None:
    model, x = convert_fx(prepared), torch.randn(2, 3, 12, 12)
    save(model, tmp_path / "model.fxq")
    torch.save({"x": x, "y": model(x)}, tmp_path / "io.pt")
    script = (
        "import torch, sys\n"
        "from fxquant.artifact import load\n"
        "io = torch.load('io.pt')\n"
        "assert torch.equal(load('model.fxq')(io['x']), io['y'])\n"
        "assert not any('test_artifact' in name for name in sys.modules)\n"
    )
    root = Path(artifact.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)


def test_the_header_names_machine_and_version(prepared: QuantGraphModule, tmp_path: Path) -> None:
    save(prepared, tmp_path / "prepared.fxq")
    header = inspect_header(tmp_path / "prepared.fxq")
    assert header["stage"] == "prepared"
    assert header["format"] == 1  # what has no islands is read by all versions
    assert header["made_on"]["torch"] == torch.__version__


def test_no_source_line_of_the_machine_is_written(
    prepared: QuantGraphModule, tmp_path: Path
) -> None:
    save(convert_fx(prepared), tmp_path / "model.fxq")
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.fxq").read_bytes()


def test_an_interrupted_save_leaves_the_old_file(
    prepared: QuantGraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.fxq"
    save(prepared, path)
    old = path.read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(convert_fx(prepared), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.fxq"]


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["fxquant"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    change(header)
    save_file(tensors, str(path), metadata={"fxquant": json.dumps(header)})


def _calls(target: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        node = next(n for n in header["nodes"] if n["op"] == "call_function")
        node["target"] = target

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update(format=FORMAT + 1), "Upgrade fxquant"),
        (lambda h: h.pop("nodes"), "corrupt"),
        (lambda h: h["state"].update({"unheard": 1}), "unheard"),
        (_calls("fn:os.system"), "no operator"),
        (_calls("fn:eval"), "no operator"),
        (_calls("fn:torch.load"), "no operator"),
        (_calls("fn:fxquant.artifact.save"), "no operator"),
    ],
)
def test_corrupt_newer_and_hostile_files(
    change: Callable[[dict[str, Any]], None],
    words: str,
    prepared: QuantGraphModule,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.fxq"
    save(convert_fx(prepared), path)
    _edit(path, change)
    with pytest.raises(ArtifactError, match=words):
        load(path)


def test_half_a_file_and_another_file(prepared: QuantGraphModule, tmp_path: Path) -> None:
    path = tmp_path / "model.fxq"
    save(prepared, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match="corrupt"):
        load(path)
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ArtifactError, match="did not write"):
        load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "absent.fxq")


def test_what_cannot_be_written_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]  # type: ignore[no-any-return]  # LSTM is untyped

    prepared = prepare_fx(Recurrent().eval(), None, (torch.randn(3, 1, 4),))
    with pytest.raises(ArtifactError, match="'lstm' \\(LSTM\\)"):
        save(prepared, "never-written.fxq")
    with pytest.raises(ArtifactError, match="made"):
        save(nn.Linear(1, 1), "never-written.fxq")  # type: ignore[arg-type]  # what is tested
