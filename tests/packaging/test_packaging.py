"""The wheel holds fxquant/** alone, all of it, and works away from the checkout."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "fxquant": "fxquant",
    "models_zoo": "fxquant/models_zoo",
    "passes": "fxquant/passes",
    "patterns": "fxquant/patterns",
}
"""Folders of the checkout and where the wheel has them."""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def expected_in_wheel(pattern: str) -> set[str]:
    """The files of the checkout that match, by the names that the wheel has for them."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob(pattern)
        if not any(parent.is_symlink() for parent in path.parents)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, so no earlier build in the checkout can leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder,
            source / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_symlinks_mirror_the_package_dir() -> None:
    links = {
        path.name: str(path.readlink())
        for path in (ROOT / "fxquant").iterdir()
        if path.is_symlink()
    }
    assert links == {name: f"../{name}" for name in FOLDERS if name != "fxquant"}


def test_only_the_package(members: set[str]) -> None:
    tops = {name.split("/")[0] for name in members}
    assert {top for top in tops if not re.fullmatch(r"fxquant-[^/]*\.dist-info", top)} == {
        "fxquant"
    }


def test_every_module_is_there(members: set[str]) -> None:
    assert {name for name in members if name.endswith(".py")} == expected_in_wheel("*.py")


def test_data_files_are_there(members: set[str]) -> None:
    weights = {name for name in members if name.endswith(".safetensors")}
    assert weights == expected_in_wheel("*.safetensors")
    assert any("digits" in name for name in weights), "the demo's weights are missing"
    assert "fxquant/py.typed" in members


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    namespace: dict[str, str] = {}
    exec((ROOT / "fxquant" / "_version.py").read_text(), namespace)
    assert f"\nVersion: {namespace['__version__']}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "fxquant = fxquant.cli:main" in entry_points


def test_check_wheel_contents(wheel: Path) -> None:
    tool = Path(sys.executable).parent / "check-wheel-contents"
    run(tool, "--toplevel", "fxquant", "--package", ROOT / "fxquant", wheel, cwd=wheel.parent)


def test_isolated_import(wheel: Path, tmp_path: Path) -> None:
    """``-I`` keeps the checkout off the path, so only what was packaged can be imported."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    packages = sorted(
        path.parent.relative_to(tmp_path).as_posix().replace("/", ".")
        for path in tmp_path.rglob("__init__.py")
    )
    assert {"fxquant", "fxquant.models_zoo", "fxquant.passes", "fxquant.patterns"} <= set(packages)
    program = (
        "import importlib, json, sys; sys.path.insert(0, sys.argv[1]); "
        "print(json.dumps([importlib.import_module(n).__file__ for n in sys.argv[2:]]))"
    )
    output = run(sys.executable, "-I", "-c", program, tmp_path, *packages, cwd=tmp_path)
    files = [Path(file) for file in json.loads(output.splitlines()[-1])]
    assert all(file.is_relative_to(tmp_path) for file in files), files
