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


def prepare(job: Job, *, form: str) -> Load:
    """Convert, and for int8 quantize, to OpenVINO's own format; ``form``: fp32, bf16 or int8."""
    import openvino

    if form == "bf16" and "BF16" not in openvino.Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
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
    import openvino

    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
    }
    # For int8, what is left in floating point runs in the precision that OpenVINO chooses.
    if form != "int8":
        settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[form]
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    example = job.workload.example.numpy()
    request.set_input_tensor(openvino.Tensor(example, shared_memory=True))

    def logits(x: Tensor) -> Tensor:
        answer = np.array(next(iter(compiled(x.numpy()).values())))
        return torch.from_numpy(answer)

    floats = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    static = "; static, NNCF model_type TRANSFORMER" if job.workload.dynamic else ""
    return Ready(
        call=request.infer,
        logits=logits,
        settings=f"latency hint, {job.threads} thread(s), 1 stream, floats in {floats}"
        + (static if form == "int8" else ""),
    )
