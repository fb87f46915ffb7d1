"""Single layers, int8 against FP32, on every kernel: where the rules of ``slow_regions`` come from.

``python -m benchmarks.layers`` (a minute, on a machine that does nothing else) prints Markdown;
with ``ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2`` before it, what a machine without
VNNI would say. Times are those of ``convert_fx(..., tune=True)``: layers take turns, weights are
cold.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

import torch
from tabulate import tabulate

from fxquant import KernelTable
from fxquant.kernel_tasks import FLOATS, Task
from fxquant.machine import instruction_sets
from fxquant.pairing import POINTWISE, Geometry
from fxquant.timing import threads


def conv(
    channels: int,
    outputs: int,
    kernel: int,
    size: int,
    dimensions: int = 2,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Task:
    """A convolution of one image; padded to keep its size unless told otherwise."""
    around = dilation * (kernel // 2) if padding is None else padding
    options: dict[str, Any] = {"output_padding": (0,) * dimensions} if transposed else {}
    geometry = Geometry(
        inputs=channels // groups,
        outputs=outputs,
        kernel=(kernel,) * dimensions,
        size=(size,) * dimensions,
        stride=(stride,) * dimensions,
        padding=(around,) * dimensions,
        dilation=(dilation,) * dimensions,
        groups=groups,
        transposed=transposed,
        **options,
    )
    return Task(rows=1, geometry=geometry)


def linear(rows: int, inputs: int, outputs: int) -> Task:
    """A linear."""
    return Task(rows=rows, geometry=Geometry(inputs=inputs, outputs=outputs))


LAYERS: Final = {
    "dense": [conv(64, 64, 3, 56), conv(256, 256, 3, 14), conv(256, 1024, 1, 14)],
    "grouped": [conv(64, 64, 3, 56, groups=2), conv(256, 256, 3, 14, groups=32)],
    "dilated": [conv(256, 256, 3, 28, dilation=2), conv(512, 512, 3, 28, dilation=4)],
    "depthwise": [
        conv(32, 32, 3, 112, groups=32),
        conv(144, 144, 3, 56, groups=144),
        conv(576, 576, 3, 14, groups=576),
        conv(120, 120, 5, 28, groups=120),
        conv(96, 96, 7, 56, groups=96),
        conv(576, 576, 3, 14, dilation=2, groups=576),
    ],
    "first": [conv(3, 64, 7, 224, stride=2, padding=3), conv(3, 32, 3, 224, stride=2)],
    "one channel": [conv(1, 8, 3, 64), conv(1, 16, 9, 4096, 1)],
    "1-d": [conv(64, 64, 3, 256, 1), conv(64, 64, 3, 1024, 1, groups=64)],
    "3-d": [conv(64, 64, 3, 14, 3), conv(32, 32, 3, 16, 3, groups=32)],
    "linear": [linear(1, 2048, 1000), linear(128, 768, 3072)],
    "transposed": [
        conv(64, 64, 3, 28, stride=2, padding=1, transposed=True),
        conv(128, 64, 4, 28, stride=2, padding=1, transposed=True),
        conv(21, 21, 4, 28, stride=2, padding=1, groups=21, transposed=True),
        conv(16, 16, 3, 8, 3, stride=2, padding=1, transposed=True),
    ],
    "tiny": [conv(8, 8, 3, 8), conv(24, 24, 1, 14), conv(480, 120, 1, 1), linear(1, 16, 16)],
}


def kernels_of(task: Task) -> tuple[str, ...]:
    """Every kernel that runs a task, exact or not."""
    if task.geometry.transposed:
        return ("fbgemm",)
    own = (POINTWISE,) if len(task.geometry.kernel) in (0, 2) else ()
    return ("onednn", "fbgemm", *own)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="how often each is timed (30)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    arguments = parser.parse_args()
    with threads(arguments.threads):
        table = KernelTable(None, rounds=arguments.rounds)
        every = [(form, task) for form, tasks in LAYERS.items() for task in tasks]
        table.measure([(task, kernels_of(task)) for _, task in every])
        rows = [_row(table, form, task) for form, task in every]
    names = ("onednn", "fbgemm", POINTWISE)
    headers = ["form", "layer", "M MACs", *(f"{name}, us" for name in names), "FP32, us", "ratio"]
    print(f"torch {torch.__version__}, {', '.join(instruction_sets())}\n")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


def _row(table: KernelTable, form: str, task: Task) -> list[str]:
    times = table.task(task, kernels_of(task))
    fp32 = min(times[name] for name in FLOATS)
    int8 = min(times[name] for name in kernels_of(task))
    shown = [
        f"{times[name] * 1e6:.0f}" if name in times else ""
        for name in ("onednn", "fbgemm", POINTWISE)
    ]
    ratio = f"{int8 / fp32:.2f}"
    return [form, task.key, f"{task.macs / 1e6:.2f}", *shown, f"{fp32 * 1e6:.0f}", ratio]


if __name__ == "__main__":
    main()
