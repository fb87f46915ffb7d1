"""The compiled part: built once for this machine, loaded with ctypes, and asked through structures.

``src/plan.cpp`` has the other side of every structure here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Final

import torch

from fxquant.errors import NativeUnavailableError
from fxquant.machine_file import CACHE_VARIABLE, default_folder

_SOURCES: Final = Path(__file__).parent / "src"
_FLAGS: Final = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
    "-mfma",
    "-mbmi2",
]
_COMPILERS: Final = ("g++", "clang++", "c++")


class TensorArgument(Structure):
    """``fxq::Tensor``: where a value lies, ``[n, h, w, c]``."""

    _fields_ = (
        ("slot", c_int64),
        ("offset", c_int64),
        ("n", c_int64),
        ("h", c_int64),
        ("w", c_int64),
        ("c", c_int64),
        ("pixel", c_int64),
        ("row", c_int64),
    )


class ConvolutionArguments(Structure):
    """A convolution or a linear."""

    _fields_ = (
        ("in_", TensorArgument),
        ("out", TensorArgument),
        ("other", TensorArgument),
        ("parameters", TensorArgument),
        ("weight", c_void_p),
        ("weight_scale", c_void_p),
        ("bias", c_void_p),
        *(
            (name, c_int32)
            for name in [
                "has_other",
                "groups",
                "kernel_h",
                "kernel_w",
                "stride_h",
                "stride_w",
                "padding_h",
                "padding_w",
                "dilation_h",
                "dilation_w",
                "fbgemm",
                "to_float",
                "activation",
                "in_zero_point",
                "depthwise",
                "dynamic",
            ]
        ),
        *(
            (name, c_float)
            for name in [
                "in_scale",
                "inverse",
                "zero_point",
                "low",
                "high",
                "alpha",
                "beta",
                "other_scale",
                "other_zero_point",
                "out_scale",
            ]
        ),
    )


class MoveArguments(Structure):
    """Any other step; each reads the fields that it has a use for."""

    _fields_ = (
        ("a", TensorArgument),
        ("b", TensorArgument),
        ("out", TensorArgument),
        *((name, c_int64) for name in ["stride_n", "stride_c", "stride_h", "stride_w", "element"]),
        ("table", c_void_p),
        ("term", c_void_p),
        ("exp16", c_void_p),
        *(
            (name, c_int32)
            for name in [
                "a_zero_point",
                "b_zero_point",
                "function",
                "count_padding",
                "divisor",
                "from_bytes",
                "kernel_h",
                "kernel_w",
                "window_stride_h",
                "window_stride_w",
                "padding_h",
                "padding_w",
                "dilation_h",
                "dilation_w",
            ]
        ),
        *(
            (name, c_float)
            for name in [
                "a_scale",
                "b_scale",
                "inverse",
                "zero_point",
                "low",
                "multiplier",
                "epsilon",
            ]
        ),
    )


class AttentionArguments(Structure):
    """Attention of heads that lie side by side."""

    _fields_ = (
        *((name, TensorArgument) for name in ["query", "key", "value", "mask", "out"]),
        *(
            (name, c_int64)
            for name in ["images", "heads", "mask_image", "mask_head", "mask_query", "mask_key"]
        ),
        ("mask_kind", c_int32),
        ("scale", c_float),
    )


MOVES: Final = (
    "quantize",
    "choose",
    "dequantize",
    "add",
    "multiply",
    "channel_affine",
    "copy",
    "lookup",
    "float_map",
    "max_pool",
    "average_pool",
    "global_mean",
    "layer_norm",
)
"""Kinds of steps that take :class:`MoveArguments`."""

ARGUMENTS: Final[dict[str, type[Structure]]] = {
    "convolution": ConvolutionArguments,
    "attention": AttentionArguments,
    **dict.fromkeys(MOVES, MoveArguments),
}
"""Kind of a step -> what describes it to C++."""


def cpu_suits() -> bool:
    """Whether this processor has what the kernels are written for: AVX512 with VNNI."""
    return bool(torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported())


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library, built on the first call on a machine.

    Raises:
        NativeUnavailableError: another processor, or no C++ compiler.
    """
    if not cpu_suits():
        raise NativeUnavailableError(
            "the native kernels need a processor with AVX512 and VNNI, which this one lacks"
        )
    library = ctypes.CDLL(str(_built()))
    library.fxq_plan_create.restype = c_void_p
    library.fxq_plan_destroy.argtypes = [c_void_p]
    library.fxq_plan_destroy.restype = None
    for kind, structure in ARGUMENTS.items():
        function = getattr(library, f"fxq_add_{kind}")
        function.argtypes, function.restype = [c_void_p, POINTER(structure)], None
    library.fxq_plan_run.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int32]
    library.fxq_plan_run.restype = None
    for name, structure in (
        ("convolution", ConvolutionArguments),
        ("move", MoveArguments),
        ("attention", AttentionArguments),
    ):
        size = getattr(library, f"fxq_{name}_arguments_size")
        size.restype = c_int64
        if size() != ctypes.sizeof(structure):
            raise NativeUnavailableError(f"{name} arguments differ between Python and C++")
    return library


@functools.cache
def exponential() -> int | None:
    """Address of torch's own vector exponential, so that sigmoids agree bit by bit; or ``None``."""
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function: Any = torch_library.Sleef_expf16_u10
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, c_void_p).value


def _built() -> Path:
    sources = sorted(_SOURCES.glob("*.cpp"))
    contents = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sorted(_SOURCES.iterdir()):
        contents.update(source.name.encode() + source.read_bytes())
    target = default_folder() / f"native-{contents.hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = _compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _compile(compiler, sources, made)
            made.replace(target)  # whole or not at all, whoever else builds it now
    except OSError as error:
        raise NativeUnavailableError(
            f"cannot keep the native kernels in {target.parent}: {error}. Name another folder in"
            f" the environment variable {CACHE_VARIABLE}"
        ) from error
    return target


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise NativeUnavailableError(
        f"no C++ compiler ({chosen or ', '.join(_COMPILERS)}) to build the native kernels with;"
        " install one (Debian: apt install g++), or name one in the environment variable CXX"
    )


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    command = [compiler, *_FLAGS, *map(str, sources), "-o", str(target)]
    problem = ""
    # GCC keeps all accumulators of the large kernels in registers only with this.
    for extra in (["-fira-region=one"], []):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        problem = done.stderr.strip()
    raise NativeUnavailableError(
        f"{compiler} could not build the native kernels:\n{problem[-2000:]}"
    )
