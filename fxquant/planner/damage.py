"""How much each layer in each precision harms the output: measured, or estimated from a Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fxquant.sensitivity.estimates import HESSIAN, Estimator
from fxquant.sensitivity.metrics import MetricSums
from fxquant.sensitivity.network import FP32, Assignment, CalibratedNetwork
from fxquant.sensitivity.simulator import Simulator


def measured_damages(
    network: CalibratedNetwork,
    wanted: Mapping[str, Sequence[str]],
    *,
    tick: Callable[[], object] = lambda: None,
) -> dict[tuple[str, str], float]:
    """Relative noise at the model's output with one layer lowered, all others in FP32.

    Args:
        network: with the batches that it is measured on.
        wanted: layer -> precisions.
        tick: called after each measurement.

    Returns:
        (layer, precision) -> noise to signal.
    """
    found = {}
    with Simulator(network) as simulator:
        floats = simulator.program(Assignment(rest=FP32))
        simulator.anchor(floats)
        expected = simulator.outputs(floats)
        for layer, precisions in wanted.items():
            for precision in precisions:
                program = simulator.program(Assignment({layer: precision}, rest=FP32))
                sums = MetricSums()
                for wish, given in zip(expected, simulator.outputs(program), strict=True):
                    sums.add(wish, given)
                found[layer, precision] = sums.result().noise
                tick()
    return found


def hessian_damages(
    network: CalibratedNetwork,
    wanted: Mapping[str, Sequence[str]],
    *,
    tick: Callable[[], object] = lambda: None,
) -> dict[tuple[str, str], float]:
    """HAWQ-V2's estimate: ``trace(H) / n |Q(x) - x|^2`` of weight and input.

    Args:
        network: with the batches behind the traces.
        wanted: layer -> precisions.
        tick: called after each step.

    Returns:
        (layer, precision) -> estimate, in units of its own.
    """
    found = {}
    names = dict.fromkeys(precision for precisions in wanted.values() for precision in precisions)
    with Simulator(network) as simulator:
        for precision in names:
            estimator = Estimator(network, simulator, network.layers, precision, tick=tick)
            estimates = estimator.run(HESSIAN)
            for layer, precisions in wanted.items():
                if precision in precisions:
                    found[layer, precision] = estimates[layer]
    return found
