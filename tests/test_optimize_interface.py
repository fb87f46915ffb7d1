"""How ``optimize`` meets its callers: what calls it takes, what it refuses, and in which words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxquant import LoweringWarning, NativeUnavailableError, optimize, quantize
from fxquant.native import library
from tests.native_machine import needs_native

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxquant.LoweringWarning", "error:the native plan:fxquant.LoweringWarning"
)

# -- threads ----------------------------------------------------------------------------------


@needs_native
def test_worker_threads(tmp_path: Path) -> None:
    """No more than processors; who takes no part sleeps on; callers at once, and forks."""
    sources = Path(library.__file__).parent / "src"
    flags = [f for f in library._FLAGS if f not in ("-shared", "-fPIC")]
    made = tmp_path / "threads"
    command = [
        *library._compiler().split(), *flags, f"-I{sources}", str(sources / "threads.cpp"),
        str(Path(__file__).parent / "native_threads.cpp"), "-o", str(made),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([made], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


_ON_ONE_PROCESSOR = """
import os, torch
from pathlib import Path
from torch import nn
from fxquant import optimize, quantize
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
x = torch.randn(2, 3, 16, 16)
int8 = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), [(x,)])
fast = optimize(int8, (x,))
torch.set_num_threads(4)
int8(x)
before = len(list(Path("/proc/self/task").iterdir()))
assert torch.equal(fast(x), int8(x)) and len(fast.plans()) == 1
assert len(list(Path("/proc/self/task").iterdir())) == before
"""


@needs_native
def test_a_process_on_one_processor_starts_no_workers() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _ON_ONE_PROCESSOR], check=True, env=environment)


# -- building the kernels ---------------------------------------------------------------------


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A copy of the library of this machine."""
    library.load()
    return shutil.copy(library._target(), tmp_path / "kernels.so")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for kernels, and no memory of earlier attempts."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("FXQUANT_CACHE", str(folder))
    monkeypatch.setattr(library, "cpu_suits", lambda: True)
    monkeypatch.setattr(library, "_failures", {})
    library.load.cache_clear()
    yield folder
    library.load.cache_clear()


class _Compiler:
    """A compiler that counts how often it is called, and makes a copy of some file."""

    def __init__(self, folder: Path, made: Path, rest: str = "") -> None:
        self.calls = folder / "calls"
        self.path = _script(
            folder / "compiler",
            f'echo "$1" >> {self.calls}\n'
            f'while [ "$1" != "-o" ]; do shift; done\ncp {made} "$2"\n{rest}',
        )

    def first_words(self) -> list[str]:
        return self.calls.read_text().split() if self.calls.exists() else []


_FIRST_FLAG = library._FLAGS[0]


@needs_native
@pytest.mark.parametrize("contents", ["nothing", "text", "another library"])
def test_a_foreign_file_among_the_kernels_is_built_anew(
    contents: str, kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, target = _Compiler(tmp_path, kernels), library._target()
    monkeypatch.setenv("CXX", str(compiler.path))
    if contents == "another library":
        source = tmp_path / "other.c"
        source.write_text("int fxq_plan_create() { return 0; }\n")
        real = library._COMPILERS[0]
        subprocess.run([real, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    else:
        target.write_text("" if contents == "nothing" else "not a library\n" * 100)
    assert library.load().fxq_plan_run
    library.load.cache_clear()
    library.load()
    assert compiler.first_words() == [_FIRST_FLAG]


@needs_native
def test_kernels_that_cannot_be_loaded_when_built_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nothing").touch()
    compiler = _Compiler(tmp_path, tmp_path / "nothing")
    monkeypatch.setenv("CXX", str(compiler.path))
    library._target().touch()
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match=r"cannot be loaded.*FXQUANT_CACHE"):
            library.load()
    assert compiler.first_words() == [_FIRST_FLAG]  # not built again and again
    x = torch.randn(1, 3, 9, 9)
    int8 = quantize(nn.Conv2d(3, 8, 3).eval(), [(x,)])
    with pytest.warns(LoweringWarning, match="FXQUANT_CACHE"):
        optimized = optimize(int8, (x,))
    assert torch.equal(optimized(x), int8(x))


def test_a_folder_that_nothing_may_be_run_from(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nothing").touch()
    compiler = _Compiler(tmp_path, tmp_path / "nothing")
    monkeypatch.setenv("CXX", str(compiler.path))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(NativeUnavailableError, match=r"noexec.*FXQUANT_CACHE"):
        library.load()
    assert compiler.first_words() == []


@needs_native
@pytest.mark.parametrize("words", ["{} -m64", "env {} -m64", "'{}' '-m64'"])
def test_compilers_with_arguments(
    words: str, kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = _Compiler(tmp_path, kernels)
    monkeypatch.setenv("CXX", words.format(compiler.path))
    library.load()
    assert compiler.first_words() == ["-m64"]


@needs_native
def test_a_compiler_in_a_folder_with_a_space(
    kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my tools").mkdir()
    compiler = _Compiler(tmp_path, kernels)
    moved = compiler.path.rename(tmp_path / "my tools" / "compiler")
    monkeypatch.setenv("CXX", str(moved))
    library.load()
    assert compiler.first_words() == [_FIRST_FLAG]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo out of order >&2\nexit 1", "out of order"),
        ("exit 3", "code 3"),
        ("exit 0", "without a file"),
        ("printf '\\377\\376' >&2\nexit 1", "could not build"),
        ("sleep 100 & wait", r"stopped after 0\.2 s"),
    ],
)
def test_a_compiler_that_fails_is_tried_once(
    text: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    broken = _script(tmp_path / "broken", f"echo x >> {calls}\n{text}")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(library, "_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match=message) as caught:
            library.load()
        assert str(broken) in str(caught.value)
        assert "FXQUANT_CACHE" not in str(caught.value)
    # With and without the one flag that not all compilers know.
    assert calls.read_text() == ("x\n" if "sleep" in text else "x\nx\n")


def test_a_compiler_that_cannot_be_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = _script(tmp_path / "broken", "")
    broken.write_text("#!/no/such/interpreter\n")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeUnavailableError, match="cannot be run") as caught:
        library.load()
    assert "FXQUANT_CACHE" not in str(caught.value)


@pytest.mark.parametrize("words", ["no-such-compiler -m64", "'open"])
def test_names_of_no_compiler(words: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", words)
    with pytest.raises(NativeUnavailableError, match=f"{words}.*CXX"):
        library.load()
