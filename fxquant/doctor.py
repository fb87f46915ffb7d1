"""What this machine and this build of torch can do in int8, and what follows from it."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any, Final

import torch
from tabulate import tabulate

from fxquant._version import __version__
from fxquant.engines import available
from fxquant.errors import DataNotFoundError, LoweringError
from fxquant.kernel_probe import exact_engine, is_exact

FORMS: Final = ("conv", "depthwise", "linear")
ENGINES: Final = ("onednn", "fbgemm")
_EXTRAS: Final = {
    "zoo": ("torchvision", "sklearn", "PIL"),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "plot": ("matplotlib",),
}


def diagnose() -> str:
    """Everything that decides which int8 kernels run here, as text."""
    facts = [
        ["fxquant", __version__],
        ["python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        ["torch", torch.__version__],
        ["CPU", _cpu()],
        ["threads", _threads()],
        ["engines", _engines()],
        ["extras", _extras()],
        ["data folder", _data_folder()],
    ]
    parts = [
        tabulate(facts, tablefmt="plain", disable_numparse=True),
        "Which engine computes exactly here (asked of the kernels, with the largest integers):",
        tabulate(
            [_probe(form) for form in FORMS],
            headers=["form", *ENGINES, "fxquant takes"],
            tablefmt="simple",
            disable_numparse=True,
        ),
        what_follows(),
    ]
    return "\n\n".join(parts)


def what_follows() -> str:
    """Advice from the probe of the kernels."""
    chosen = {form: _chosen(form) for form in FORMS}
    absent = [form for form, engine in chosen.items() if engine is None]
    inexact = [f for f, engine in chosen.items() if engine is not None and not is_exact(f, engine)]
    lines = []
    if absent:
        lines.append(
            f"No engine runs {', '.join(absent)} in int8 in this build of torch: pass"
            " target='reference' to prepare_fx, which computes the same integers in floating point."
        )
    if inexact:
        lines.append(
            f"{', '.join(inexact)} saturate in every engine here (a CPU without VNNI adds pairs of"
            " products in 16 bits): large values come out wrong. Halve the activation range with"
            " prepare_fx(model, get_default_qconfig_mapping('x86-compat'), ...), and compare the"
            " accuracy."
        )
    if not lines:
        lines.append(
            "All of it is computed exactly: activations keep the full range 0..255, and halving it"
            " (torch.ao's default) would only cost accuracy."
        )
    return "\n".join(lines)


def _probe(form: str) -> list[str]:
    return [form, *(_verdict(form, engine) for engine in ENGINES), _chosen(form) or "none"]


def _verdict(form: str, engine: str) -> str:
    if not available(engine):
        return "not in this build"
    return "exact" if is_exact(form, engine) else "saturates"


def _chosen(form: str) -> str | None:
    try:
        return exact_engine(form)
    except LoweringError:
        return None


def _cpu() -> str:
    asked: Any = getattr(torch.cpu, "_is_vnni_supported", None)
    vnni = "VNNI unknown" if asked is None else ("with VNNI" if asked() else "without VNNI")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    limited = f", ONEDNN_MAX_CPU_ISA={limit}" if limit else ""
    return f"{torch.backends.cpu.get_cpu_capability()} as torch uses it, {vnni}{limited}"


def _threads() -> str:
    wish = os.environ.get("OMP_NUM_THREADS")
    said = f", OMP_NUM_THREADS={wish}" if wish else ""
    return f"{torch.get_num_threads()} of torch, {os.cpu_count()} CPUs{said}"


def _engines() -> str:
    return ", ".join(sorted(torch.backends.quantized.supported_engines))


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
