"""torchao's PT2E quantization with the X86 Inductor quantizer, run by Inductor."""

from __future__ import annotations

import warnings

import torch

from benchmarks.speed.peers import Job, Load
from benchmarks.speed.peers.compiled import load


def prepare(job: Job) -> Load:
    """Export, quantize with the default configuration of the quantizer, and compile."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    workload = job.workload
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_dynamic=workload.dynamic))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer
        # Strict, as else a module that is called twice (the ReLUs of ResNets) is one partition to
        # the quantizer, which then refuses the network.
        exported = torch.export.export(workload.model, (workload.example,), strict=True).module()
        prepared = prepare_pt2e(exported, quantizer)
        for row in workload.calibration[: 1 if workload.dynamic else None]:
            prepared(row[None])
        converted = convert_pt2e(prepared)
    return lambda: load(job, converted)
