"""FP32 in eager mode: contiguous, or model and picture in channels_last."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.speed.peers import Job, Load, Ready, UnavailableError
from benchmarks.speed.peers._torch import ready


def prepare(job: Job, *, channels_last: bool = False) -> Load:
    """The model as it is, in inference mode."""
    model, example = job.workload.model, job.workload.example
    if not channels_last:
        return lambda: ready(job, model, "inference mode")
    if example.dim() != 4:
        raise UnavailableError("channels_last is a layout of pictures")
    striding = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def logits(x: Tensor) -> Tensor:
        made: Tensor = striding(x.to(memory_format=torch.channels_last))
        return made

    strided = example.to(memory_format=torch.channels_last)
    return lambda: Ready(
        call=lambda: striding(strided),
        logits=logits,
        settings="inference mode; weights and picture in channels_last beforehand",
    )
