"""Pytest plugin: torch.ao is there, but whoever touches it fails.

``python -m pytest -p tests.poison_torch_ao`` proves that the library keeps working once torch
drops ``torch.ao``. (``python -m``, because plugins named by ``-p`` are imported before the
``pythonpath`` setting is read.)

How: ``import torch`` itself loads most of ``torch.ao``, so its modules cannot be kept out. Every
module below the names in ``POISONED`` therefore becomes a ``_PoisonedModule``, whose public
attributes raise ``PoisonedError``; one that is loaded later is poisoned as it loads. The error is
neither an ``AttributeError`` nor an ``ImportError``, so ``hasattr`` and ``except ImportError``
cannot hide it.

What is spared, by who asks and not by what is asked for:

- ``torch`` and ``torchvision``. They use ``torch.ao`` in their own code, which goes when
  ``torch.ao`` goes and is no doing of the caller's: ``torch.jit.script`` asks whether a module is a
  ``QuantWrapper``, ``torch._inductor`` imports its decompositions, ``torch._export`` a pass,
  ``torchvision.models`` its quantizable variants. ``torch.ao`` itself is part of ``torch``.
- The import system, which looks at a module before the importing code gets it.
- Dunder names (``__file__``, ``__spec__``, ``__dict__``): ``inspect`` and ``warnings`` read them
  from every module in ``sys.modules``.

Not covered: subprocesses, ``torch.ops`` registrations, and classes already bound elsewhere.

Tests marked ``peer`` compare with ``torch.ao`` and are deselected. A file of peer tests that
imports ``torch.ao`` at its top is not collected, when its ``pytestmark`` names ``peer``.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch

POISONED = (
    "torch.ao",
    "torch.quantization",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
)
SPARED = ("torch", "torchvision")


class PoisonedError(Exception):
    """Code that has to live without ``torch.ao`` used it."""


class _PoisonedModule(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        if not (name.startswith("__") and name.endswith("__")):
            frame = sys._getframe(1)
            if not _is_import_system(frame):
                _refuse_unless_spared(f"{super().__getattribute__('__name__')}.{name}", frame)
        return super().__getattribute__(name)


class _PoisoningFinder(importlib.abc.MetaPathFinder):
    """Finds modules below ``POISONED``: strangers are refused, for torch they load poisoned."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _below(fullname, POISONED):
            return None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_import_system(frame):
            frame = frame.f_back
        _refuse_unless_spared(fullname, frame)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            _poison_on_load(spec.loader)
        return spec


def _poison_on_load(loader: Any) -> None:
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        module.__class__ = _PoisonedModule
        load(module)

    loader.exec_module = exec_module


def _below(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def _is_import_system(frame: FrameType) -> bool:
    return _below(str(frame.f_globals.get("__name__")), ("importlib", "_frozen_importlib"))


def _refuse_unless_spared(what: str, frame: FrameType | None) -> None:
    asker = None if frame is None else frame.f_globals.get("__name__")
    if _below(str(asker), SPARED):
        return
    line = "" if frame is None else f" ({frame.f_code.co_filename}:{frame.f_lineno})"
    raise PoisonedError(f"{what} is used by {asker}{line}, and torch.ao will be removed from torch")


def _poison() -> None:
    for name, module in list(sys.modules.items()):
        if _below(name, POISONED) and type(module) is ModuleType:
            module.__class__ = _PoisonedModule
    sys.meta_path.insert(0, _PoisoningFinder())


def _is_peer_file(path: Path) -> bool:
    """Whether the module's ``pytestmark`` names ``peer``, read without importing it."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and "pytestmark" in map(
            ast.unparse, statement.targets
        ):
            return "mark.peer" in ast.unparse(statement.value)
    return False


_poison()


def pytest_report_header() -> str:
    return f"torch {torch.__version__} with torch.ao poisoned; peer tests are left out"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and _is_peer_file(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    peers = [item for item in items if item.get_closest_marker("peer")]
    if peers:
        config.hook.pytest_deselected(items=peers)
        items[:] = [item for item in items if item not in peers]
