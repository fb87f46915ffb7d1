"""torch.ao's FX quantization, one engine at a time, with that engine's default mapping."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from benchmarks.speed.peers import Job, Load, UnavailableError
from benchmarks.speed.peers._torch import ready

_BATCH = 8


def prepare(job: Job, *, engine: str) -> Load:
    """Quantize for ``engine``, and leave it the current one, which some kernels look at."""
    if engine not in torch.backends.quantized.supported_engines:
        raise UnavailableError(f"this torch has no engine {engine}")
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the peer
        model = _quantized(job, engine)
    settings = "dynamic, weights per channel" if job.workload.dynamic else "default mapping"
    return lambda: ready(job, model, f"engine {engine}; {settings}")


def _quantized(job: Job, engine: str) -> nn.Module:
    from torch.ao.quantization import (
        QConfigMapping,
        get_default_qconfig_mapping,
        per_channel_dynamic_qconfig,
    )
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    workload = job.workload
    if workload.dynamic:
        mapping = QConfigMapping().set_object_type(nn.Linear, per_channel_dynamic_qconfig)
    else:
        mapping = get_default_qconfig_mapping(engine)
    prepared = prepare_fx(workload.model, mapping, (workload.example,))
    if not workload.dynamic:
        for batch in workload.calibration.split(_BATCH):
            prepared(batch)
    converted: nn.Module = convert_fx(prepared)
    return converted
