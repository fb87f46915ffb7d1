"""The compiled part: built once for this machine, loaded with ctypes, and asked through structures.

``src/plan.cpp`` has the other side of every structure here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
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
_SECONDS: Final = 300
"""A compiler that takes longer is stopped."""
_ANOTHER_FOLDER: Final = f"Name another folder in the environment variable {CACHE_VARIABLE}"

_failures: dict[str, str] = {}
"""A compiler or a file -> why there are no kernels of it: it is not tried again in this process."""


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
        ("identity", c_int64),
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
        NativeUnavailableError: another processor, no C++ compiler or one that fails, or a cache
            folder that nothing can be kept in or loaded from.
    """
    if not cpu_suits():
        raise NativeUnavailableError(
            "the native kernels need a processor with AVX512 and VNNI, which this one lacks"
        )
    target = _target()
    if str(target) in _failures:
        raise NativeUnavailableError(_failures[str(target)])
    if target.exists():
        with suppress(OSError, AttributeError):  # somebody else's file, or half a one
            return _opened(target)
        _remove(target)
    _build(target)
    try:
        return _opened(target)
    except (OSError, AttributeError) as error:
        _failures[str(target)] = (
            f"the native kernels were built, but cannot be loaded from {target.parent}: {error}."
            f" {_ANOTHER_FOLDER}"
        )
        raise NativeUnavailableError(_failures[str(target)]) from error


def _opened(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its functions declared.

    Raises:
        OSError: the file is no library, or may not be loaded.
        AttributeError: it is another library than this one.
    """
    library = ctypes.CDLL(str(path))
    try:
        _declare(library)
    except AttributeError:
        # While it is open, another file under this name would not be looked at.
        ctypes.CDLL(None).dlclose(c_void_p(library._handle))
        raise
    return library


def _declare(library: ctypes.CDLL) -> None:
    library.fxq_store_create.restype = c_void_p
    library.fxq_store_destroy.argtypes = [c_void_p]
    library.fxq_store_destroy.restype = None
    library.fxq_store_bytes.argtypes = [c_void_p]
    library.fxq_store_bytes.restype = c_int64
    library.fxq_plan_create.argtypes = [c_void_p]
    library.fxq_plan_create.restype = c_void_p
    library.fxq_plan_destroy.argtypes = [c_void_p]
    library.fxq_plan_destroy.restype = None
    for kind, structure in ARGUMENTS.items():
        function = getattr(library, f"fxq_add_{kind}")
        function.argtypes, function.restype = [c_void_p, POINTER(structure)], None
    library.fxq_plan_run.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int32]
    library.fxq_plan_run.restype = c_int32
    for name, structure in (
        ("convolution", ConvolutionArguments),
        ("move", MoveArguments),
        ("attention", AttentionArguments),
    ):
        size = getattr(library, f"fxq_{name}_arguments_size")
        size.restype = c_int64
        if size() != ctypes.sizeof(structure):
            raise AttributeError(f"{name} arguments differ between Python and C++")


@functools.cache
def exponential() -> int | None:
    """Address of torch's own vector exponential, so that sigmoids agree bit by bit; or ``None``."""
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function: Any = torch_library.Sleef_expf16_u10
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, c_void_p).value


def _target() -> Path:
    """Where the library is kept: its name tells what it was built from."""
    contents = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sorted(_SOURCES.iterdir()):
        contents.update(source.name.encode() + source.read_bytes())
    return default_folder() / f"native-{contents.hexdigest()[:16]}.so"


def _build(target: Path) -> None:
    compiler = _compiler()
    if compiler in _failures:
        raise NativeUnavailableError(_failures[compiler])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.statvfs(target.parent).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise OSError("nothing may be run from there (mounted with noexec)")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _compile(compiler, made)
            made.replace(target)  # whole or not at all, whoever else builds it now
    except OSError as error:
        raise NativeUnavailableError(
            f"cannot keep the native kernels in {target.parent}: {error}. {_ANOTHER_FOLDER}"
        ) from error


def _remove(target: Path) -> None:
    try:
        target.unlink(missing_ok=True)
    except OSError as error:
        raise NativeUnavailableError(
            f"{target} is no library of native kernels, and cannot be removed: {error}."
            f" {_ANOTHER_FOLDER}"
        ) from error


def _compiler() -> str:
    """The compiler's command, quoted as for a shell: ``CXX`` may hold arguments, too."""
    chosen = os.environ.get("CXX", "").strip()
    for name in (chosen,) if chosen else _COMPILERS:
        found = shutil.which(name)  # as a whole first: a path may hold spaces
        if found:
            return shlex.quote(found)
    try:
        words = shlex.split(chosen)
    except ValueError:  # an open quote
        words = []
    found = shutil.which(words[0]) if words else None
    if found:
        return shlex.join([found, *words[1:]])
    raise NativeUnavailableError(
        f"no C++ compiler ({chosen or ', '.join(_COMPILERS)}) to build the native kernels with;"
        " install one (Debian: apt install g++), or name one in the environment variable CXX"
    )


def _compile(compiler: str, target: Path) -> None:
    sources = sorted(_SOURCES.glob("*.cpp"))
    command = [*shlex.split(compiler), *_FLAGS, *map(str, sources), "-o", str(target)]
    problem = ""
    try:
        # GCC keeps all accumulators of the large kernels in registers only with this.
        for extra in (["-fira-region=one"], []):
            problem = _complaint([*command, *extra])
            if not problem and target.exists():
                return
    except OSError as error:
        problem = f"it cannot be run: {error}"
    except subprocess.TimeoutExpired:
        problem = f"it was stopped after {_SECONDS} s"
    problem = problem or "it ended without an error, and without a file"
    _failures[compiler] = f"{compiler} could not build the native kernels: {problem}"
    raise NativeUnavailableError(_failures[compiler])


def _complaint(command: list[str]) -> str:
    """Run a compiler; what it says if it fails, or an empty string.

    Raises:
        OSError: it cannot be run.
        TimeoutExpired: it took too long, and was stopped.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            _, complaints = process.communicate(timeout=_SECONDS)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the compiler has started, too
            raise
    if process.returncode == 0:
        return ""
    return complaints.strip()[-2000:] or f"it ended with code {process.returncode}"
