"""What each choice costs: the output's noise in simulated int8, the latency of the real kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Final

from torch import nn

from fxquant.errors import FxQuantWarning, LoweringError
from fxquant.quantize_fx import convert_fx
from fxquant.sensitivity.network import FP32, Assignment, CalibratedNetwork
from fxquant.sensitivity.policy import Policy
from fxquant.sensitivity.report import Choice, SensitivityReport
from fxquant.sensitivity.sweep import Sweep
from fxquant.timing import interleaved_latency

_ROUNDS: Final = 10


def costs_of_choices(
    report: SensitivityReport, model: nn.Module, sweep: Sweep
) -> tuple[Choice, ...]:
    """The float network, everything in int8, the first and last layer in FP32, and the verdicts.

    Choices that come to the same are listed once, under the first of their names.

    Args:
        report: whose verdicts they are.
        model: the user's float model.
        sweep: measures.
    """
    network = sweep.network
    everything = Policy(keep_int8=tuple(result.name for result in report.results))
    ends = tuple(result.name for result in report.results if result.place)
    first_last = Policy(
        keep_int8=tuple(r.name for r in report.results if not r.place), keep_fp32=ends
    )
    policies: dict[str, Policy] = {
        "everything in int8": everything,
        "first and last in FP32": first_last,
        "the verdicts": report.policy,
    }
    assignments: dict[str, Assignment] = {}
    for name, policy in policies.items():
        assignment = report.configuration.assignment(report.decisions(policy))
        if all(assignment.key != known.key for known in assignments.values()):
            assignments[name] = assignment
        elif name == "the verdicts":
            same = next(n for n, known in assignments.items() if known.key == assignment.key)
            assignments[f"{same} (the verdicts)"] = assignments.pop(same)
    times = _latencies(network, model, assignments)
    floats = Choice(name="FP32", milliseconds=times.get("FP32"))
    return (
        floats,
        *(
            Choice(
                name=name,
                measurement=sweep.of_assignment(assignment),
                milliseconds=times.get(name),
                fp32_layers=tuple(n for n, p in assignment.layers.items() if p == FP32),
                int8_macs=_share(network, assignment),
            )
            for name, assignment in assignments.items()
        ),
    )


def _latencies(
    network: CalibratedNetwork, model: nn.Module, assignments: dict[str, Assignment]
) -> dict[str, float]:
    """Choice -> median milliseconds of the first batch; nothing where no kernel can run."""
    if not network.target.executes:
        return {}
    batch = network.batches[0]
    args, kwargs = batch.args, batch.kwargs
    calls: dict[str, Any] = {"FP32": lambda: model(*args, **kwargs)}
    for name, assignment in assignments.items():
        try:
            with warnings.catch_warnings():  # of ops that stay in FP32, as they are meant to
                warnings.simplefilter("ignore", FxQuantWarning)
                made = convert_fx(network.prepared(assignment))
        except LoweringError:
            continue
        calls[name] = lambda made=made: made(*args, **kwargs)
    found = interleaved_latency(calls, _ROUNDS, warmup=2)
    return {name: 1e3 * latency.median for name, latency in found.items()}


def _share(network: CalibratedNetwork, assignment: Assignment) -> float | None:
    kept = {name for name, precision in assignment.layers.items() if precision == FP32}
    return lowered_share(network, [la.name for la in network.layers if la.name not in kept])


def lowered_share(network: CalibratedNetwork, lowered: Iterable[str]) -> float | None:
    """Share of the multiply-accumulates in the named layers; ``None`` where shapes are unknown."""
    macs = {layer.name: layer.macs for layer in network.layers}
    if any(value is None for value in macs.values()):
        return None
    total = sum(value or 0 for value in macs.values())
    return sum(macs[name] or 0 for name in set(lowered)) / total if total else None
