"""absorb-clamps: ``Q(clamp(x)) -> Q(x)`` where the range of ``Q`` cuts off the same values.

``round(low / s) + z <= quant_min`` and ``round(high / s) + z >= quant_max``, on final parameters.
Source: Jacob et al. 2018, section 2.4 (the clamp of the output range is the activation function).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.clamps import CLAMP_KINDS, bounds_of, high_is_free, low_is_free
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import AbsorbedClamp
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.op_view import attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.rewriter import GraphRewriter
from fxquant.targets.guards import constant_bounds


@dataclass(frozen=True)
class AbsorbClamps(Pass):
    """Erase clamps whose only reader is a quantize that saturates where they do.

    Where only the upper bound is free and the lower is 0, the clamp becomes a relu, which kernels
    compute for nothing. Inside a sharing group the range may be wider than the clamp; then it
    stays, as an integer clamp.
    """

    name: ClassVar[str] = "absorb-clamps"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.ABSORBED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Absorb what can be; each clamp that stays says which bound keeps it."""
        rewriter = GraphRewriter(gm, self.name)
        refusals = []
        for node in list(gm.graph.nodes):
            op = op_of(gm, node)
            if op is None or op.name not in CLAMP_KINDS or len(node.users) != 1:
                continue
            if constant_bounds(op) is not None or record_of(node).qconfig is None:
                continue  # computed bounds; or the user wants it as it is
            quantize = next(iter(node.users))
            if quantize.target is not QUANTIZE:
                continue
            low, high = bounds_of(op)
            scale, zero_point = (_value(gm, a) for a in quantize.args[1:3])
            quant_min, quant_max = quantize.args[3:5]
            low_free = low_is_free(low, scale, zero_point, int(quant_min))
            high_free = high_is_free(high, scale, zero_point, int(quant_max))
            if low_free and high_free:
                source = op.activations[0]
                _remember(gm, node.name, low, high, quantize)
                add_reason(node, f"{op.name} is free: the output range expresses it")
                rewriter.absorb(source, node)
                _carry_upstream(source)
            elif high_free and low == 0.0 and op.name != "relu":
                _remember(gm, node.name, None, high, quantize)
                rewriter.retarget(node, torch.relu, (op.activations[0],))
                add_reason(node, f"the upper bound {high} of {op.name} is free: a relu is left")
            else:
                bound = f"lower bound {low}" if not low_free else f"upper bound {high}"
                refusals.append(
                    Refusal(
                        node=node.name,
                        reason=f"the range with scale {scale.item():.6g} and zero point"
                        f" {zero_point.item()} does not express the {bound}",
                    )
                )
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _remember(
    gm: QuantGraphModule, name: str, low: float | None, high: float | None, quantize: fx.Node
) -> None:
    """Note what the range must go on expressing, for when other numbers are loaded."""
    scale, zero_point, quant_min, quant_max = quantize.args[1:5]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    assert isinstance(quant_min, int) and isinstance(quant_max, int)
    clamp = AbsorbedClamp(
        name=name,
        low=low,
        high=high,
        scale=str(scale.target),
        zero_point=str(zero_point.target),
        quant_min=quant_min,
        quant_max=quant_max,
    )
    gm.update_state(absorbed=(*gm.state.absorbed, clamp))


def _carry_upstream(source: fx.Node) -> None:
    """Let the op behind a quantize and dequantize carry what was absorbed into the dequantize.

    Neither of the two survives lowering, and the op of the float graph must stay accounted for.
    """
    if source.target is not DEQUANTIZE:
        return
    moved = record_of(source)
    carrier = source
    while carrier.target is DEQUANTIZE:
        carrier = carrier.all_input_nodes[0].all_input_nodes[0]
    record = record_of(carrier)
    update_record(
        carrier,
        origins=tuple(dict.fromkeys((*record.origins, *moved.origins))),
        reasons=tuple(dict.fromkeys((*record.reasons, *moved.reasons))),
    )
    update_record(source, origins=(), reasons=())


def _value(gm: QuantGraphModule, argument: object) -> torch.Tensor:
    assert isinstance(argument, fx.Node)
    value = attribute(gm, str(argument.target))
    assert isinstance(value, torch.Tensor)
    return value
