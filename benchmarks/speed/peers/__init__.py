"""Who is measured: one module per family, loaded in the worker that needs it and nowhere else.

A module has one function, ``prepare(job, **options)``. It quantizes or exports, which may use every
core and may be kept in ``job.folder``, and returns what loads the result: that runs pinned to the
cores of the measurement, so that thread pools are made there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor

from benchmarks.speed.workloads import Workload


class UnavailableError(Exception):
    """This peer cannot take part here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a peer gets.

    Attributes:
        workload: the network and its data.
        folder: where files made from this network are kept from run to run.
        threads: that one call may use.
    """

    workload: Workload
    folder: Path
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a peer gives back.

    Attributes:
        call: one inference of ``workload.example``; this is what is timed.
        logits: the answer to any input like it, as a float tensor, by the same code.
        settings: what was chosen, for the report.
    """

    call: Callable[[], object]
    logits: Callable[[Tensor], Tensor]
    settings: str


Load: TypeAlias = Callable[[], Ready]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One row of the tables.

    Attributes:
        name: on the command line.
        label: in tables.
        family: module of this package, and colour in the chart.
        options: of its ``prepare``.
        environment: variables of its process.
    """

    name: str
    label: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def _torch_ao(engine: str) -> Peer:
    return Peer(
        name=f"torch-ao-{engine}",
        label=f"torch.ao FX, {engine}",
        family="torch_ao",
        options={"engine": engine},
    )


PEERS: Final = (
    Peer(name="fxquant", label="fxquant", family="ours"),
    Peer(
        name="fxquant-optimized",
        label="fxquant, optimized",
        family="ours",
        options={"optimized": True},
    ),
    Peer(name="eager", label="FP32 eager", family="eager"),
    Peer(
        name="eager-channels-last",
        label="FP32 eager, channels_last",
        family="eager",
        options={"channels_last": True},
    ),
    Peer(name="compile", label="FP32 torch.compile", family="compiled"),
    *map(_torch_ao, ("x86", "fbgemm", "onednn", "qnnpack")),
    Peer(name="pt2e-inductor", label="torchao PT2E + Inductor", family="pt2e"),
    Peer(
        name="onnxruntime-fp32",
        label="ONNX Runtime FP32",
        family="onnx_runtime",
        options={"int8": False},
    ),
    Peer(
        name="onnxruntime-int8",
        label="ONNX Runtime int8",
        family="onnx_runtime",
        options={"int8": True},
    ),
    *(
        Peer(
            name=f"openvino-{form}",
            label=f"OpenVINO {form.upper()}" if form != "int8" else "OpenVINO int8 (NNCF)",
            family="open_vino",
            options={"form": form},
        )
        for form in ("fp32", "bf16", "int8")
    ),
)
"""Everybody, in the order of the tables."""

BY_NAME: Final = {peer.name: peer for peer in PEERS}
