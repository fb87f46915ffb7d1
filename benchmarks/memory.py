"""How much memory ``prepare_fx`` and ``convert_fx`` take: ``python -m benchmarks.memory NETWORK``.

Measured by the kernel, as peaks of the resident set over its size before the call, in a process of
its own. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fxquant.calibration import calibrate
from fxquant.models_zoo.registry import load
from fxquant.quantize_fx import convert_fx, prepare_fx

_ROOT = Path(__file__).resolve().parents[1]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCost:
    """Extra memory in multiples of the bytes of the FP32 parameters and buffers.

    Attributes:
        parameters: those bytes.
        prepare: peak during ``prepare_fx``.
        prepared: what remains of it: the prepared model.
        convert: peak during ``convert_fx``, the prepared model still there.
        converted: what remains of it: the int8 model.
        first_call: what the first call of the int8 model on one picture leaves.
    """

    parameters: int
    prepare: float
    prepared: float
    convert: float
    converted: float
    first_call: float


def memory_cost(name: str) -> MemoryCost:
    """What a zoo network costs, measured in a fresh process."""
    # Large tensors are then mapped one by one, and what is freed leaves the resident set at once.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return MemoryCost(**json.loads(done.stdout.splitlines()[-1]))


def measure(model: nn.Module, x: torch.Tensor) -> MemoryCost:
    """Measure in this process, best one that has done little else.

    Args:
        model: in eval mode.
        x: its input.
    """
    _quantize_something()  # what is imported and set up once is not the model's
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    prepared, prepare, kept = _measured(lambda: prepare_fx(model, None, (x,)))
    calibrate(prepared, [x], progress=False)
    int8, convert, left = _measured(lambda: convert_fx(prepared))
    with torch.no_grad():
        _, _, called = _measured(lambda: (int8(x), None)[1])
    shares = (round(value / size, 3) for value in (prepare, kept, convert, left, called))
    return MemoryCost(
        parameters=size,
        **dict(
            zip(("prepare", "prepared", "convert", "converted", "first_call"), shares, strict=True)
        ),
    )


def _quantize_something() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(),
        torch.rand(1, 3, 8, 8),
    )
    convert_fx(calibrate(prepare_fx(model, None, (x,)), [x], progress=False))(x)


def _measured(call: Callable[[], _T]) -> tuple[_T, int, int]:
    """Result, bytes at the peak, and bytes left, both beyond those before."""
    _settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _bytes("VmRSS")
    result = call()
    peak = _bytes("VmHWM")
    _settle()
    return result, peak - before, _bytes("VmRSS") - before


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def main() -> None:
    """Print the cost of one network as JSON."""
    entry = load(sys.argv[1])
    print(json.dumps(asdict(measure(entry.model, entry.example_inputs[0]))))


if __name__ == "__main__":
    main()
