"""ONNX Runtime: FP32, and int8 as QDQ with per-channel weights (dynamic for transformers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.peers import Job, Load, Ready
from benchmarks.speed.peers._files import kept

_INPUT = "input"


def prepare(job: Job, *, int8: bool) -> Load:
    """Export with torch's exporter, then quantize with ONNX Runtime's own tools."""
    import onnxruntime

    exported = kept(job.folder / "onnx" / "fp32.onnx", lambda path: export(job, path))
    if not int8:
        return lambda: _load(job, exported, "FP32")
    folder = job.folder / f"onnxruntime-{onnxruntime.__version__}"
    if job.workload.dynamic:
        path = kept(folder / "dynamic.onnx", lambda path: _dynamic(exported, path))
        return lambda: _load(job, path, "dynamic, weights per channel")
    path = kept(folder / "static.onnx", lambda path: _static(job, exported, path))
    return lambda: _load(job, path, "QDQ, u8 activations (min-max), s8 weights per channel")


def export(job: Job, path: Path) -> None:
    """The FP32 model with one input, of batch 1."""
    torch.onnx.export(
        job.workload.model,
        (job.workload.example,),
        path,
        input_names=[_INPUT],
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _static(job: Job, exported: Path, path: Path) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # its package has no types
        def __init__(self) -> None:
            self.rows = iter(job.workload.calibration.numpy())

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {_INPUT: row[None]}

    ready = path.with_suffix(".preprocessed.onnx")
    quant_pre_process(exported, ready)
    quantize_static(
        ready,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()


def _dynamic(exported: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = path.with_suffix(".preprocessed.onnx")
    quant_pre_process(exported, ready)
    quantize_dynamic(ready, path, per_channel=True, weight_type=QuantType.QInt8)
    ready.unlink()


def _load(job: Job, path: Path, form: str) -> Ready:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    example = {_INPUT: job.workload.example.numpy()}

    def logits(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {_INPUT: x.numpy()})[0]))

    return Ready(
        call=lambda: session.run(None, example),
        logits=logits,
        settings=f"{form}; all optimizations, intra_op {job.threads}, inter_op 1",
    )
