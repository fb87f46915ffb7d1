"""How an element-wise function is fastest between two int8 ops.

``python -m benchmarks.elementwise [function ...]`` prints the table of docs/kernels.md:
microseconds of the fastest of many interleaved calls, on one thread, by number of elements::

    float      quantize(f(dequantize(q)))     f and both conversions
    kernel     PyTorch's own int8 kernel, where there is one
    table      index_select among the 256 results

The last column is what target ``x86`` does. It was chosen once, by the figures in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from fxquant.kernels import as_bytes, lookup
from fxquant.targets.table import Role
from fxquant.targets.x86 import X86
from fxquant.timing import interleaved_latency, threads

SIZES: Final = (3_136, 50_176, 200_704)
SCALE, ZERO_POINT = 0.04, 128
HEADERS = ("function", "elements", "float", "kernel", "table", "fastest", "target `x86`")

_KERNELS = torch.ops.quantized
FUNCTIONS: Final[Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]]]
FUNCTIONS = {
    "elu": (F.elu, lambda q: _KERNELS.elu(q, SCALE, ZERO_POINT, 1.0, 1, 1)),
    "celu": (F.celu, lambda q: _KERNELS.celu(q, SCALE, ZERO_POINT, 1.0)),
    "selu": (F.selu, None),
    "mish": (F.mish, None),
    "softplus": (F.softplus, None),
    "logsigmoid": (F.logsigmoid, None),
    "tanh": (torch.tanh, torch.tanh),
    "sigmoid": (torch.sigmoid, torch.sigmoid),
    "silu": (F.silu, None),
    "gelu": (F.gelu, F.gelu),
    "hardsigmoid": (F.hardsigmoid, F.hardsigmoid),
    "hardswish": (F.hardswish, lambda q: _KERNELS.hardswish(q, SCALE, ZERO_POINT)),
    "leaky_relu": (
        lambda x: F.leaky_relu(x, 0.1),
        lambda q: _KERNELS.leaky_relu(q, 0.1, False, SCALE, ZERO_POINT),
    ),
}
"""Kind -> the float function, and PyTorch's int8 kernel."""


def candidates(name: str, elements: int) -> dict[str, Callable[[], object]]:
    """The ways to compute a function on ``elements`` values."""
    function, kernel = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 7, elements // 448, generator=generator)
    q = _quantized(x)
    integers, table = as_bytes(q), torch.arange(256, dtype=torch.uint8)
    found: dict[str, Callable[[], object]] = {
        "float": lambda: _quantized(function(torch.dequantize(q))),
        "table": lambda: lookup(integers, table),
    }
    if kernel is not None:
        found["kernel"] = lambda: kernel(q)
    return found


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, SCALE, ZERO_POINT, torch.quint8)


def row(name: str, elements: int, repeats: int) -> tuple[Any, ...]:
    """One line of the table, in microseconds."""
    found = candidates(name, elements)
    times = {way: 1e6 * took.minimum for way, took in interleaved_latency(found, repeats).items()}
    fastest = min(times, key=times.__getitem__)
    shown = (f"{times[way]:.0f}" if way in times else "" for way in ("float", "kernel", "table"))
    return (f"`{name}`", elements, *shown, fastest, chosen(name))


def chosen(name: str) -> str:
    """What target ``x86`` does with a function between two int8 ops."""
    found = X86.rows[name]
    if found.role is Role.FLOAT:
        return "float"
    return "table" if found.looked_up else "kernel"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("functions", nargs="*", default=list(FUNCTIONS))
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantized")
    with threads(1):
        rows = [
            row(name, elements, arguments.repeats)
            for name in arguments.functions
            for elements in SIZES
        ]
    print(tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
