"""OpenVINO: FP32, BF16 where the CPU has it, and int8 by NNCF's post-training quantization."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.peers import Job, Load, Ready, UnavailableError
from benchmarks.speed.peers._files import kept
from fxquant.timing import interleaved_latency

_TRIALS = 30  # calls of each precision, of which the fastest counts


def prepare(job: Job, *, form: str) -> Load:
    """Convert, and for int8 quantize, to OpenVINO's own format; ``form``: fp32, bf16 or int8."""
    import openvino

    if form == "bf16" and "bf16" not in _floats():
        raise UnavailableError("this CPU has no BF16 instructions")
    folder = job.folder / f"openvino-{openvino.__version__.split('-')[0]}"
    made = kept(folder / "fp32", lambda path: _convert(job, path))
    if form == "int8":
        source = made
        made = kept(folder / f"int8-nncf-{_nncf()}", lambda path: _quantize(job, source, path))
    return lambda: _load(job, made / "model.xml", form)


def _nncf() -> str:
    import nncf

    return str(nncf.__version__)


def _convert(job: Job, folder: Path) -> None:
    import openvino

    example = job.workload.example
    model = openvino.convert_model(
        job.workload.model, example_input=example, input=[list(example.shape)]
    )
    _save(model, folder)


def _quantize(job: Job, source: Path, folder: Path) -> None:
    import nncf
    import openvino

    rows = job.workload.calibration
    transformer = job.workload.dynamic
    model = nncf.quantize(
        openvino.Core().read_model(source / "model.xml"),
        nncf.Dataset([row[None].numpy() for row in rows]),
        subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    _save(model, folder)


def _save(model: Any, folder: Path) -> None:
    import openvino

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def _load(job: Job, path: Path, form: str) -> Ready:
    """Compile; what int8 leaves in floating point runs in whichever precision is faster here."""
    import openvino

    example = openvino.Tensor(job.workload.example.numpy(), shared_memory=True)
    requests = {
        floats: _request(job, path, floats, example)
        for floats in {"fp32": ("f32",), "bf16": ("bf16",), "int8": _floats()}[form]
    }
    floats = next(iter(requests))
    if len(requests) > 1:
        calls = {name: request.infer for name, request in requests.items()}
        taken = interleaved_latency(calls, _TRIALS)
        floats = min(taken, key=lambda name: taken[name].minimum)
    request = requests[floats]

    def logits(x: Tensor) -> Tensor:
        answer = request.infer([x.numpy()])
        made = torch.from_numpy(np.array(next(iter(answer.values()))))
        request.set_input_tensor(example)
        return made

    static = "; static, NNCF model_type TRANSFORMER" if job.workload.dynamic else ""
    return Ready(
        call=request.infer,
        logits=logits,
        settings=f"latency hint, {job.threads} thread(s), 1 stream, floats in {floats}"
        + (static if form == "int8" else ""),
    )


def _request(job: Job, path: Path, floats: str, example: Any) -> Any:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": floats,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    request.set_input_tensor(example)
    return request


def _floats() -> tuple[str, ...]:
    """Precisions that the CPU has instructions for."""
    import openvino

    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", "bf16") if "BF16" in has else ("f32",)
