"""fxquant with its defaults: the converted model, and what ``fxquant.optimize`` makes of it."""

from __future__ import annotations

import warnings

import fxquant
from benchmarks.speed.peers import Job, Load, Ready
from benchmarks.speed.peers._torch import ready
from fxquant.errors import FxQuantWarning
from fxquant.graph_module import QuantGraphModule

_BATCH = 8


def prepare(job: Job, *, optimized: bool = False) -> Load:
    """Quantize, statically or dynamically as the workload says."""
    model = _quantized(job)
    settings = "defaults; dynamic" if job.workload.dynamic else "defaults; static"

    def load() -> Ready:
        if not optimized:
            return ready(job, model, settings)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            faster = fxquant.optimize(model, (job.workload.example,))
        notes = [str(w.message) for w in said if issubclass(w.category, FxQuantWarning)]
        return ready(job, faster, "; ".join([settings, "optimize()", *notes]))

    return load


def _quantized(job: Job) -> QuantGraphModule:
    workload = job.workload
    examples = (workload.example,)
    if workload.dynamic:
        return fxquant.quantize_dynamic(workload.model, example_inputs=examples)
    prepared = fxquant.prepare_fx(workload.model, None, examples)
    fxquant.calibrate(prepared, list(workload.calibration.split(_BATCH)), progress=False)
    return fxquant.convert_fx(prepared)
