"""Code that used torch.ao's FX API, moved: what is rewritten, what is told, what stays."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import MissingDependencyError
from fxquant.migrate.__main__ import main
from fxquant.migrate.finding import Kind
from fxquant.migrate.names import MODULES, MOVED, STAYS
from fxquant.migrate.rewrite import Migration, migrate_source

CASES: dict[str, tuple[str, str]] = {
    "names": (
        "from torch.ao.quantization.quantize_fx import prepare_fx, convert_fx\n",
        "from fxquant.compat import prepare_fx, convert_fx\n",
    ),
    "old package": (
        "from torch.quantization import get_default_qconfig as g\ng('fbgemm')\n",
        "from fxquant.compat import get_default_qconfig as g\ng('fbgemm')\n",
    ),
    "layout and comments": (
        "from torch.quantization import (  # why\n"
        "    get_default_qconfig,   # defaults\n"
        "    HistogramObserver,\n"
        ")\n\nx  =  HistogramObserver ( )\n",
        "from fxquant.compat import (  # why\n"
        "    get_default_qconfig,   # defaults\n"
        "    HistogramObserver,\n"
        ")\n\nx  =  HistogramObserver ( )\n",
    ),
    "some stay": (
        "from torch.ao.quantization import propagate_qconfig_, QConfigMapping, fuse_modules\n",
        "from torch.ao.quantization import propagate_qconfig_, fuse_modules\n"
        "from fxquant.compat import QConfigMapping\n",
    ),
    "the last stays": (
        "from torch.ao.quantization import (\n    QConfigMapping,\n    propagate_qconfig_,\n)\n",
        "from torch.ao.quantization import (\n    propagate_qconfig_,\n)\n"
        "from fxquant.compat import QConfigMapping\n",
    ),
    "module under a name": (
        "import torch.ao.quantization as tq\nm = tq.QConfigMapping()\nq = tq.default_qconfig\n",
        "from fxquant import compat as tq\nm = tq.QConfigMapping()\nq = tq.default_qconfig\n",
    ),
    "submodules of it": (
        "import torch.ao.quantization as tq\np = tq.quantize_fx.prepare_fx(m, q, x)\n",
        "from fxquant import compat as tq\np = tq.prepare_fx(m, q, x)\n",
    ),
    "methods of what it has": (
        "import torch.quantization as tq\no = tq.observer.MinMaxObserver.with_args(dtype=d)\n",
        "from fxquant import compat as tq\no = tq.MinMaxObserver.with_args(dtype=d)\n",
    ),
    "module with other uses": (
        "import torch.ao.quantization as tq\na = tq.default_qconfig\nb = tq.prepare(m)\n",
        "import torch.ao.quantization as tq\nfrom fxquant import compat as fxq\n"
        "a = fxq.default_qconfig\nb = tq.prepare(m)\n",
    ),
    "module as a value": (
        "import torch.ao.quantization as tq\na = tq.default_qconfig\nf(tq)\n",
        "import torch.ao.quantization as tq\nfrom fxquant import compat as fxq\n"
        "a = fxq.default_qconfig\nf(tq)\n",
    ),
    "submodule by name": (
        "from torch.ao.quantization import quantize_fx\nq = quantize_fx.convert_fx(p)\n",
        "from fxquant import compat as quantize_fx\nq = quantize_fx.convert_fx(p)\n",
    ),
    "submodule and name": (
        "from torch.ao.quantization import quantize_fx as q, QConfig\nq.fuse_fx(m)\n",
        "from fxquant.compat import QConfig\nfrom fxquant import compat as q\nq.fuse_fx(m)\n",
    ),
    "whole path": (
        '"""Doc."""\nimport torch\n\np = torch.ao.quantization.quantize_fx.prepare_fx(m, q, x)\n',
        '"""Doc."""\nimport torch\nfrom fxquant import compat as fxq\n\n'
        "p = fxq.prepare_fx(m, q, x)\n",
    ),
    "whole path in its own import": (
        "import torch.quantization.quantize_fx\np = torch.quantization.quantize_fx.fuse_fx(m)\n",
        "import torch\nfrom fxquant import compat as fxq\np = fxq.fuse_fx(m)\n",
    ),
    "own import, other uses": (
        "import os, torch.quantization\np = torch.quantization.QConfig\n"
        "s = torch.quantization.propagate_qconfig_()\n",
        "import os, torch.quantization\nfrom fxquant import compat as fxq\np = fxq.QConfig\n"
        "s = torch.quantization.propagate_qconfig_()\n",
    ),
    "own import, no uses": (
        "import torch.quantization\nx = torch.zeros(1)\n",
        "import torch.quantization\nx = torch.zeros(1)\n",
    ),
    "the short name is taken": (
        "import torch\nfxq = 1\np = torch.quantization.default_qconfig\n",
        "import torch\nfrom fxquant import compat as fxquant_compat\nfxq = 1\n"
        "p = fxquant_compat.default_qconfig\n",
    ),
    "star": (
        "from torch.ao.quantization.quantize_fx import *\n\n\ndef f(m):\n"
        "    return convert_fx(prepare_fx(m, {}, None))\n",
        "from fxquant.compat import convert_fx, prepare_fx\n\n\ndef f(m):\n"
        "    return convert_fx(prepare_fx(m, {}, None))\n",
    ),
    "star with others": (
        "from torch.ao.quantization import *\nq = default_qconfig\ns = propagate_qconfig_()\n",
        "from torch.ao.quantization import *\nfrom fxquant.compat import default_qconfig\n"
        "q = default_qconfig\ns = propagate_qconfig_()\n",
    ),
    "star, own names": (
        "from torch.ao.quantization import *\nQConfig = 3\nprint(QConfig)\n",
        "from torch.ao.quantization import *\nQConfig = 3\nprint(QConfig)\n",
    ),
    "in a function": (
        "def f(m):\n    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig\n"
        "    return PrepareCustomConfig()\n",
        "def f(m):\n    from fxquant.compat import PrepareCustomConfig\n"
        "    return PrepareCustomConfig()\n",
    ),
    "two in a function": (
        "def f(m):\n    from torch.ao.quantization import QConfig, propagate_qconfig_  # both\n"
        "    return QConfig, propagate_qconfig_\n",
        "def f(m):\n    from torch.ao.quantization import propagate_qconfig_  # both\n"
        "    from fxquant.compat import QConfig\n"
        "    return QConfig, propagate_qconfig_\n",
    ),
    "other things of the same name": (
        "from mine import prepare_fx, QConfig\nfrom .quantize_fx import convert_fx\n"
        "class torch2: ao = 1\nprepare_fx(QConfig)\n",
        "from mine import prepare_fx, QConfig\nfrom .quantize_fx import convert_fx\n"
        "class torch2: ao = 1\nprepare_fx(QConfig)\n",
    ),
    "nothing": (
        "import torch\n\n\nx = torch.nn.Linear(1,2)\n",
        "import torch\n\n\nx = torch.nn.Linear(1,2)\n",
    ),
    "tabs and endings": (
        "if x:\r\n\tfrom torch.ao.quantization import QConfig\r\n",
        "if x:\r\n\tfrom fxquant.compat import QConfig\r\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_rewritten(name: str) -> None:
    before, after = CASES[name]
    found = migrate_source(before)
    assert found.after == after
    assert found.changed is (before != after)
    compile(found.after, name, "exec")


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_changes_nothing(name: str) -> None:
    once = migrate_source(CASES[name][0]).after
    again = migrate_source(once)
    assert again.after == once
    assert [f for f in again.findings if f.kind is Kind.MOVES and "import *" not in f.text] == []


def test_many_names_are_spread_over_lines() -> None:
    names = ["HistogramObserver", "MinMaxObserver", "MovingAverageMinMaxObserver", "NoopObserver"]
    source = f"from torch.ao.quantization import {', '.join(names)}, propagate_qconfig_\n"
    listed = "".join(f"    {name},\n" for name in names)
    assert migrate_source(source).after == (
        "from torch.ao.quantization import propagate_qconfig_\n"
        f"from fxquant.compat import (\n{listed})\n"
    )


def _told(source: str, kind: Kind | None = None) -> list[str]:
    found: Migration = migrate_source(source)
    return [f"{f.line}:{f.column} {f.text}" for f in found.findings if kind in (None, f.kind)]


FX = "from torch.ao.quantization.quantize_fx import *\n"
TOLD: list[tuple[str, Kind, str]] = [
    (f"{FX}prepare_fx(m, q)\n", Kind.CHECK, r"2:1 prepare_fx\(\) without example_inputs: pass"),
    (f"{FX}prepare_fx(m, {{'': q}}, x)\n", Kind.CHECK, r"2:15 prepare_fx\(\) with a dict: draws"),
    (f"{FX}convert_fx(p, is_reference=True)\n", Kind.CHECK, "2:15 .*call convert_to_reference_fx"),
    (
        f"{FX}prepare_fx(m, q, x, _equalization_config=e)\n",
        Kind.CHECK,
        r"_equalization_config=\.\.\.\): is an error unless empty",
    ),
    (
        f"{FX}prepare_qat_fx(m, q, x, backend_config_dict=b)\n",
        Kind.CHECK,
        "backend_config_dict=.*is called backend_config",
    ),
    (f"{FX}convert_fx(p)\n", Kind.MOVES, "2:1 .*the prepared model is left as it was"),
    (
        "import torch\ntorch.ao.quantization.prepare(m)\n",
        Kind.STAYS,
        "2:1 torch.ao.quantization.prepare: eager-mode",
    ),
    ("from torch.ao.quantization import quantize\n", Kind.STAYS, "1:35 .*eager-mode"),
    (
        "from torch.ao.quantization.fuse_modules import fuse_modules\n",
        Kind.STAYS,
        "1:48 .*eager-mode",
    ),
    ("from torch.ao.quantization.utils import check_node\n", Kind.STAYS, "no counterpart"),
    ("import torch.ao.nn.quantized as nnq\n", Kind.CHECK, "1:8 torch.ao.nn.quantized: its class"),
    ("from torch.ao.quantization import quantize_pt2e\n", Kind.CHECK, "another API"),
    (
        "import torch\ntorch.backends.quantized.engine = 'qnnpack'\n",
        Kind.CHECK,
        "2:1 the engine is not needed",
    ),
    (
        "from torchvision.models.quantization import resnet18\nm = resnet18(quantize=True)\n",
        Kind.CHECK,
        r"2:14 quantize= of resnet18\(\): pass False",
    ),
    ("m.fuse_model(is_qat=None)\n", Kind.CHECK, r"1:1 fuse_model\(\) is of eager mode"),
    (
        "import torchvision.models.quantization as tvq\n",
        Kind.CHECK,
        "pass quantize=False and give the model to prepare_fx",
    ),
]


@pytest.mark.parametrize(("source", "kind", "text"), TOLD, ids=[t for *_, t in TOLD])
def test_what_is_told(source: str, kind: Kind, text: str) -> None:
    found = _told(source, kind)
    assert any(re.search(text, one) for one in found), found


@pytest.mark.parametrize(
    "source",
    [
        f"{FX}prepare_fx(m, q, x)\n",
        f"{FX}prepare_fx(m, q, example_inputs=x)\n",
        f"{FX}prepare_fx(*args)\n",
        f"{FX}prepare_fx(m, example_inputs=x, qconfig_mapping=q)\n",
        "def prepare_fx(m): ...\nprepare_fx(m)\n",
        "import torch\ntorch.backends.cudnn.benchmark = True\n",
        "from torchvision.models import resnet18\nresnet18(weights=None)\n",
    ],
)
def test_what_needs_no_word(source: str) -> None:
    assert _told(source, Kind.CHECK) == []


# -- the command ----------------------------------------------------------------------------------


def _tree(folder: Path) -> Path:
    (folder / "pkg").mkdir()
    (folder / ".venv").mkdir()
    for place in ("pkg/a.py", ".venv/b.py"):
        (folder / place).write_text("from torch.ao.quantization import QConfig\n")
    (folder / "pkg/plain.py").write_text("x = 1\n")
    (folder / "pkg/note.txt").write_text("from torch.ao.quantization import QConfig\n")
    return folder


def test_listing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tree(tmp_path)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    place = tmp_path / "pkg/a.py"
    assert shown == [
        f"{place}:1:35: moves: torch.ao.quantization.QConfig -> fxquant.compat.QConfig",
        "1 finding(s); 1 file(s) to rewrite (pass --write)",
    ]
    assert "torch.ao" in place.read_text()


def test_writing_rewrites_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tree(tmp_path)
    assert main([str(tmp_path), "--write"]) == 0
    assert (tmp_path / "pkg/a.py").read_text() == "from fxquant.compat import QConfig\n"
    assert "torch.ao" in (tmp_path / ".venv/b.py").read_text()
    assert "torch.ao" in (tmp_path / "pkg/note.txt").read_text()
    stamp = (tmp_path / "pkg/a.py").stat().st_mtime_ns
    assert main([str(tmp_path), "--write"]) == 0
    assert (tmp_path / "pkg/a.py").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.endswith("0 finding(s); 0 file(s) rewritten\n")


def test_a_file_that_is_no_python_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "good.py").write_text("from torch.ao.quantization import QConfig\n")
    assert main([str(tmp_path), "--write"]) == 1
    assert "bad.py: cannot be read: Syntax Error" in capsys.readouterr().out
    assert "fxquant.compat" in (tmp_path / "good.py").read_text()


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from torch.ao.quantization import QConfig\n")
    command = [sys.executable, "-m", "fxquant.migrate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "1 file(s) to rewrite" in done.stdout


# -- the names ------------------------------------------------------------------------------------


def test_no_name_both_moves_and_stays() -> None:
    assert set(MOVED) & set(STAYS) == set()
    assert all(STAYS.values())


def test_compat_has_every_name_that_moves() -> None:
    from fxquant import compat

    assert [name for name in MOVED if not hasattr(compat, name)] == []


def test_without_libcst_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libcst", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxquant\[migrate\]'"):
        main(["."])


@pytest.mark.peer
def test_every_name_of_torch_ao_is_accounted_for() -> None:
    import importlib

    import torch.ao.quantization.quantize_fx as quantize_fx

    def exported(module: str) -> set[str]:
        found: Any = importlib.import_module(f"torch.ao.quantization.{module}")
        return set(found.__all__)

    everything = {
        "prepare_fx",
        "prepare_qat_fx",
        "convert_fx",
        "convert_to_reference_fx",
        "fuse_fx",
    }
    assert all(hasattr(quantize_fx, name) for name in everything)
    for module in ("qconfig", "qconfig_mapping", "observer", "fake_quantize", "backend_config"):
        everything |= exported(module)
    everything |= exported("fx.custom_config") | exported("quant_type") | exported("stubs")
    everything |= {"MatchAllNode"}
    assert set(MOVED) <= everything
    # What is left is of other APIs: torchao's affine observers, and types of annotations.
    left = everything - set(MOVED) - set(STAYS)
    assert left == {
        *("AffineQuantizedObserverBase", "Granularity", "MappingType", "PerAxis", "PerBlock"),
        *("PerGroup", "PerRow", "PerTensor", "PerToken", "TorchAODType", "ZeroPointDomain"),
        *("get_block_size", "QConfigAny", "QConfigDynamic", "qconfig_equals"),
        *("get_native_backend_config_dict", "get_tensorrt_backend_config_dict"),
    }


@pytest.mark.peer
def test_modules_that_are_looked_at_exist() -> None:
    import importlib

    for module in sorted(MODULES):
        if module.startswith("torch.ao."):
            assert importlib.import_module(module)
