"""No file of the library reaches for torch.ao, under any of its names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("fxquant", "passes", "patterns", "models_zoo")
FORBIDDEN = (
    "torch.ao",
    "torch.quantization",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
)
IMPORT_CALLS = {"import_module", "__import__", "find_spec"}


def library_files() -> list[Path]:
    """Every Python file once: the symlinks in fxquant/ lead to folders that are listed anyway."""
    return sorted(
        path
        for folder in LIBRARY
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def is_forbidden(name: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in FORBIDDEN)


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of a chain of attributes that starts at a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: ``from torch import nn as n`` gives ``n: torch.nn``."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def uses_of_torch_ao(source: str) -> list[tuple[int, str]]:
    """Line and name of each import of, each attribute below and each dynamic import of torch.ao."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        candidates: list[str] = []
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            candidates = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and (chain := dotted(node)):
            head, _, rest = chain.partition(".")
            candidates = [f"{names.get(head, head)}.{rest}"]
        elif (
            isinstance(node, ast.Call) and (dotted(node.func) or "").split(".")[-1] in IMPORT_CALLS
        ):
            constants = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            candidates = [value for value in constants if isinstance(value, str)]
        found.update((node.lineno, name) for name in candidates if is_forbidden(name))
    return sorted(found)


def test_the_library_has_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in library_files()} >= {"fxquant", "passes"}


@pytest.mark.parametrize("path", library_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_use(path: Path) -> None:
    assert uses_of_torch_ao(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.ao",
        "import torch.ao.quantization as tq",
        "from torch import ao",
        "from torch.ao.quantization import MinMaxObserver",
        "def f():\n    from torch.ao.nn import quantized",
        "import torch.quantization",
        "from torch.nn import quantized as nnq",
        "from torch.nn.intrinsic import ConvReLU2d",
        "import torch\nx = torch.ao.quantization.MinMaxObserver",
        "import torch as t\nx = t.quantization",
        "import torch.nn as nn\nx = nn.quantized.Linear",
        "from torch import nn\nx = isinstance(y, nn.qat.Linear)",
        "import importlib\nimportlib.import_module('torch.ao.quantization')",
        "__import__('torch.ao')",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert uses_of_torch_ao(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn.functional",
        "import torch\nx = torch.ops.quantized.linear",
        "import torch\nx = torch.backends.quantized.engine",
        "x = type(y).__module__.startswith('torch.ao.')",
        "from fxquant import quantization\nx = quantization.QConfig",
    ],
)
def test_the_scan_leaves_alone(source: str) -> None:
    assert uses_of_torch_ao(source) == []
