"""The fxquant command, the demo, and the public face of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant import cli, demo, target_info
from fxquant.cli import main
from fxquant.engines import available
from fxquant.errors import DataNotFoundError, MissingDependencyError
from fxquant.models_zoo.data import DATA_VARIABLE
from fxquant.target_info import FORMS

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# -- demo -----------------------------------------------------------------------------------------


def test_demo() -> None:
    result = run("-m", "fxquant.cli", "demo", "--no-cifar", COLUMNS="100")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    text = result.stdout
    for wanted in (
        r"top-1 of 599 images +9\d\.\d\d % +9\d\.\d\d % ",
        r"size of the state +\d+ KiB +\d+ KiB +3\.\d\d times smaller",
        r"latency, median +\d+\.\d+ ms +\d+\.\d+ ms +(\d+\.\d\d times (faster|SLOWER)|the same)",
        r"same class on \d+\.\d\d % of 599 inputs",
        r"int8 coverage: 100\.00 % of multiply-accumulates",
        r"confirmed by the profiler; latency of batch 1 with 1 thread\(s\)",
        r"\nstem_bn +BatchNorm2d +int8 +folded into 'stem_conv'",
        r"\npool +AdaptiveAvgPool2d +fp32 +an average has",
        r"What to type next",
    ):
        assert re.search(wanted, text), wanted
    assert "resnet20" not in text
    table = text[text.index("name  ") : text.index("Left out")]
    assert max(map(len, table.splitlines())) <= 100


def test_demo_quietly_and_without_the_data(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "nowhere"))
    monkeypatch.setattr(demo, "_ROUNDS", 3)
    assert main(["demo", "--quiet"]) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    assert "with 1 thread(s), 3 calls" in text
    assert f"resnet20_cifar10 is left out: the environment variable {DATA_VARIABLE}" in text
    assert "--no-cifar leaves this part out" in text
    assert "What to type next" not in text
    assert "folded into" not in text


def test_options_of_the_demo(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[object, ...]] = []

    def show(entry: object, thread_count: int, *, quiet: bool, table: bool) -> None:
        shown.append((entry, thread_count, torch.get_num_threads(), quiet, table))

    monkeypatch.setattr(demo, "load", lambda name: name)
    monkeypatch.setattr(demo, "_show", show)
    before = torch.get_num_threads()
    assert main(["demo", "--threads", "2"]) == 0
    assert torch.get_num_threads() == before
    assert shown == [("digits", 2, 2, False, True), ("resnet20_cifar10", 2, 2, False, False)]
    assert "What to type next" in capfd.readouterr().out
    shown.clear()
    assert main(["demo", "--no-cifar", "--quiet"]) == 0
    assert shown == [("digits", 1, 1, True, False)]


def test_slower_is_said_loudly() -> None:
    assert demo._compared(0.001, 0.002) == ["1.000 ms", "2.000 ms", "2.00 times SLOWER"]
    assert demo._compared(0.002, 0.002001) == ["2.000 ms", "2.001 ms", "the same"]
    assert demo._compared(0.003, 0.002) == ["3.000 ms", "2.000 ms", "1.50 times faster"]


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert re.search(r"\nengines +.*onednn", text)
    assert re.search(r"\nVNNI +(yes|no)", text)
    assert re.search(r"\nextras +zoo", f"\n{text}")
    for form in FORMS:
        assert re.search(rf"\n{form} +(exact|saturates) +(exact|saturates) +(onednn|fbgemm)", text)
    assert text.rstrip().endswith(str(target_info("x86")).rstrip())


@pytest.mark.skipif(not available("onednn"), reason="needs oneDNN")
def test_doctor_sees_a_cpu_without_vnni() -> None:
    result = run("-m", "fxquant.cli", "doctor", ONEDNN_MAX_CPU_ISA="AVX2")
    assert result.returncode == 0, result.stderr
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in result.stdout
    assert re.search(r"\nconv +saturates", result.stdout)


# -- the command ----------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fxquant {fxquant.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["dmeo"], ["demo", "--threads", "0"], ["demo", "--threads", "x"], ["--demo"]]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fxquant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataNotFoundError("here\n  and there"), 2, "fxquant: here and there\n"),
        (MissingDependencyError("pip install it"), 2, "fxquant: pip install it\n"),
        (KeyboardInterrupt(), 130, "fxquant: interrupted\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(cli._COMMANDS, "doctor", fail)
    assert main(["doctor"]) == status
    assert capsys.readouterr() == ("", line)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli._COMMANDS, "doctor", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_a_reader_that_stops_early() -> None:
    script = f"{sys.executable} -m fxquant.cli doctor | true"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


# -- the package ----------------------------------------------------------------------------------


def test_the_import_is_light() -> None:
    heavy = ("torchvision", "sklearn", "scipy", "matplotlib", "PIL", "onnx", "fxquant.models_zoo")
    script = f"import sys, fxquant; print([m for m in {heavy!r} if m in sys.modules])"
    result = run("-W", "error", "-c", script)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_all_is_sorted_and_there() -> None:
    assert fxquant.__all__ == sorted(fxquant.__all__)
    assert len(set(fxquant.__all__)) == len(fxquant.__all__)
    for name in fxquant.__all__:
        assert hasattr(fxquant, name), name


def test_functions_win_over_modules_of_their_name() -> None:
    assert callable(fxquant.explain)
    assert callable(fxquant.audit)
