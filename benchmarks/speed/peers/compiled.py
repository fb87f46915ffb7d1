"""FP32 through ``torch.compile``, with frozen weights and a C++ wrapper."""

from __future__ import annotations

import torch

from benchmarks.speed.peers import Job, Load, Ready
from benchmarks.speed.peers._torch import ready

SETTINGS = "freezing, cpp_wrapper"


def prepare(job: Job) -> Load:
    """Nothing to do before: code is generated for the number of threads."""
    return lambda: load(job, job.workload.model)


def load(job: Job, model: torch.nn.Module) -> Ready:
    """Compile ``model`` for the shape of the example.

    Frozen weights let Inductor choose their layout; the C++ wrapper does without Python between
    kernels. Both are what its documentation gives for inference on CPUs.
    """
    import torch._inductor.config as inductor

    inductor.freezing = True
    inductor.cpp_wrapper = True
    compiled = torch.compile(model, dynamic=False)
    return ready(job, compiled, SETTINGS)
