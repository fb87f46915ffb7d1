"""What the processor is, as far as it decides which kernels run."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Final

import torch

_X86: Final = frozenset(("x86_64", "amd64", "x64", "x86", "i386", "i486", "i586", "i686"))
_FLAGS: Final = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512-VNNI": "_is_vnni_supported",
    "AVX512-BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}
SETTINGS: Final = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "FBGEMM_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
)
"""Environment variables that change which code the kernels run."""


def architecture() -> str:
    """The machine's name in lower case, such as ``x86_64`` or ``aarch64``."""
    return platform.machine().lower()


def is_x86() -> bool:
    """Whether this is an x86 processor, for which oneDNN's and FBGEMM's int8 kernels are."""
    return architecture() in _X86


def instruction_sets() -> tuple[str, ...]:
    """Those that torch finds on this processor, out of what int8 kernels use."""
    asked: dict[str, Any] = {flag: getattr(torch.cpu, name, None) for flag, name in _FLAGS.items()}
    return tuple(flag for flag, ask in asked.items() if ask is not None and ask())


def settings() -> dict[str, str]:
    """The environment variables of :data:`SETTINGS` that are set."""
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def made_on() -> dict[str, Any]:
    """The machine and versions that decide which kernels run, for a file to record."""
    return {
        "torch": torch.__version__,
        "machine": architecture(),
        "isa": list(instruction_sets()),
        "settings": settings(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "engines": list(torch.backends.quantized.supported_engines),
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
