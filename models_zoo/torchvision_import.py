"""torchvision, imported even where its compiled part does not fit the installed torch.

A CUDA wheel of torchvision beside a CPU torch cannot load its extension, so the operators
``torchvision::nms`` and ``torchvision::qnms`` are never defined, and the import dies when it
registers their fake implementations. The classification models need neither operator: defining
their schemas, without a kernel, is enough.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from fxquant.models_zoo._optional import require

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# Schemas live as long as the Library object that defined them.
_keep_alive: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, defining the operator schemas it misses, and only those.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    try:
        return require("torchvision", distribution="torchvision", purpose="this zoo model")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _define_missing_schemas()
    _forget_partial_import()
    return importlib.import_module("torchvision")


def _define_missing_schemas() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + _SCHEMA)
    _keep_alive.append(library)


def _forget_partial_import() -> None:
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
