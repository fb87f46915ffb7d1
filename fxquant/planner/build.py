"""From a calibrated network and an assignment to the int8 model that runs it."""

from __future__ import annotations

from fxquant.errors import Diagnostics
from fxquant.graph_codec import encode_graph
from fxquant.graph_module import QuantGraphModule
from fxquant.own_copy import take_apart
from fxquant.pass_manager import PassContext
from fxquant.pipelines import lowering_pipeline
from fxquant.sensitivity.network import Assignment, CalibratedNetwork


def lowered(network: CalibratedNetwork, assignment: Assignment) -> QuantGraphModule:
    """The model that :func:`fxquant.convert_fx` would give for an assignment.

    Args:
        network: calibrated.
        assignment: layer -> precision.

    Returns:
        A module of its own: loading or moving it does not touch the network.
    """
    gm = network.reference(assignment)
    gm.update_state(reference=tuple(encode_graph(gm.graph)))
    context = PassContext(target=network.target, diagnostics=Diagnostics(silent=True))
    lowering_pipeline().run(gm, context)
    take_apart(gm, network.graph)
    return gm
