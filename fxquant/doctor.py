"""What this machine and this build of torch can do in int8, and what follows from it."""

from __future__ import annotations

import importlib.util
from typing import Final

from tabulate import tabulate

from fxquant.errors import DataNotFoundError
from fxquant.target_info import target_info

_EXTRAS: Final = {
    "zoo": ("torchvision", "sklearn", "PIL"),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "plot": ("matplotlib",),
}


def diagnose() -> str:
    """Everything that decides which int8 kernels run here, as text."""
    facts = [["extras", _extras()], ["data folder", _data_folder()]]
    return "\n\n".join(
        [tabulate(facts, tablefmt="plain", disable_numparse=True), str(target_info("x86"))]
    )


def _extras() -> str:
    found = []
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        state = f"lacks {' and '.join(missing)}: pip install 'fxquant[{extra}]'"
        found.append(f"{extra} {state if missing else 'installed'}")
    return "\n".join(found)


def _data_folder() -> str:
    from fxquant.models_zoo.data import DATA_VARIABLE, find_data_dir

    try:
        return str(find_data_dir())
    except DataNotFoundError:
        return f"not found; only the zoo's larger models need it (set {DATA_VARIABLE})"
