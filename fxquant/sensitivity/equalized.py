"""Equalization as a cure of the whole network, tried where one scale serves unlike channels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from fxquant.clamps import bounds_of
from fxquant.equalize import equalize
from fxquant.errors import CalibrationWarning, Diagnostics, FxQuantError
from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import op_of
from fxquant.sensitivity.feeding import BoundBatch
from fxquant.sensitivity.metrics import MetricSums
from fxquant.sensitivity.network import Assignment, CalibratedNetwork
from fxquant.sensitivity.reasons import has_unlike_channels
from fxquant.sensitivity.report import Choice, SensitivityReport
from fxquant.sensitivity.results import Measurement
from fxquant.sensitivity.sweep import Sweep

_BOUNDED: Final = ("relu6", "hardtanh", "clamp", "clamp_max")


def equalized_choices(
    report: SensitivityReport, model: nn.Module, sweep: Sweep
) -> tuple[Choice, ...]:
    """Everything in int8 after :func:`fxquant.equalize`, against the float network as it is.

    Only where a fragile layer has one scale for a weight whose channels are unlike. Where values
    are clamped from above, also with these clamps opened, which changes the float network.

    Args:
        report: says what is fragile.
        model: the user's float model.
        sweep: has the data, and what the float network makes of them.
    """
    decisions = report.decisions()
    if not any(decisions[r.name].fragile and has_unlike_channels(r) for r in report.results):
        return ()
    graph = sweep.network.graph
    ways = {"everything in int8, equalized": "keep"}
    if any(_is_bounded(graph, node) for node in graph.graph.nodes):
        ways["everything in int8, equalized, relu6='relu'"] = "relu"
    found = []
    for name, relu6 in ways.items():
        try:
            lowered = _lowered(sweep.network, model, relu6)
        except FxQuantError as error:
            Diagnostics().warn(f"equalization was not tried: {error}", CalibrationWarning)
            break
        found.append(Choice(name=name, measurement=_measured(lowered, sweep), int8_macs=1.0))
    return tuple(found)


def _is_bounded(gm: QuantGraphModule, node: torch.fx.Node) -> bool:
    op = op_of(gm, node)
    return op is not None and op.name in _BOUNDED and bounds_of(op)[1] is not None


def _lowered(network: CalibratedNetwork, model: nn.Module, relu6: str) -> QuantGraphModule:
    """The equalized network, everything lowered, from the same data and mapping."""
    batch = network.batches[0]
    equal = equalize(model, None if batch.kwargs else batch.args, relu6=relu6)
    twin = CalibratedNetwork(
        equal,
        network.batches,
        network.mapping_of_int8,
        forward=_call,
        target=network.target.name,
        bias_correction=network.bias_correction,
        calibration_data=network.watched_batches,
    )
    return twin.reference(Assignment())


def _call(model: nn.Module, batch: BoundBatch) -> Any:
    return model(*batch.args, **batch.kwargs)


@torch.no_grad()
def _measured(lowered: QuantGraphModule, sweep: Sweep) -> Measurement:
    sums = MetricSums()
    for expected, batch in zip(sweep.expected, sweep.network.batches, strict=True):
        sums.add(expected, _call(lowered, batch))
    user = {name: float(f(lowered, sweep.data)) for name, f in sweep.options.user.items()}
    return Measurement(output=sums.result(), user=user)
