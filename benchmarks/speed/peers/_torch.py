"""What peers that run in torch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.speed.peers import Job, Ready


def ready(job: Job, model: Callable[[Tensor], Any], settings: str) -> Ready:
    """A callable of one tensor, timed on the example as it is."""
    example = job.workload.example
    return Ready(call=lambda: model(example), logits=model, settings=settings)
