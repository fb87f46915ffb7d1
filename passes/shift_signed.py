"""shift-signed: activations in int8 become uint8, 128 higher, which is what kernels take.

::

    q = round(x / s) + z,  lo <= q <= hi   ->   q + 128 = round(x / s) + (z + 128)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import fx

from fxquant.attribute_paths import set_attribute
from fxquant.dataflow import reads_only_shape
from fxquant.graph_module import QuantGraphModule, derive
from fxquant.kernels import to_quantized
from fxquant.metadata import TensorRecord, add_reason, record_of, update_record
from fxquant.op_view import attribute
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

_SHIFT: Final = 128


@dataclass(frozen=True)
class ShiftSigned(Pass):
    """Let signed activations run on kernels of unsigned ones; the floats are the same, exactly.

    Weights stay signed. Refused for graphs that exchange quantized tensors with others: their
    integers are what the others say.
    """

    name: ClassVar[str] = "shift-signed"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Shift every quantize step and its zero point."""
        return PassResult(changes=_shift(gm))


def shifted(gm: QuantGraphModule) -> QuantGraphModule:
    """``gm``, or a copy of it without signed activations."""
    if not _signed_steps(gm):
        return gm
    copied = derive(gm)
    _shift(copied)
    return copied


def _shift(gm: QuantGraphModule) -> int:
    rewriter = GraphRewriter(gm, ShiftSigned.name)
    steps = _signed_steps(gm)
    for buffer in {str(step.args[2].target): None for step in steps}:
        set_attribute(gm, buffer, attribute(gm, buffer) + _SHIFT)
    for step in steps:
        source, scale, zero_point, low, high, _ = step.args
        args = (source, scale, zero_point, low + _SHIFT, high + _SHIFT, torch.uint8)
        rewriter.replace_arguments(step, args)
        value = record_of(step).value
        if isinstance(value, TensorRecord):
            update_record(step, value=replace(value, dtype=torch.uint8))
        add_reason(step, f"its integers are {_SHIFT} higher than those of its observer, in int8")
    return rewriter.finish()


def _signed_steps(gm: QuantGraphModule) -> list[Any]:
    """The quantize steps of activations in int8, where all can be shifted."""
    nodes = list(gm.graph.nodes)
    steps = [node for node in nodes if node.target is QUANTIZE and node.args[5] is torch.int8]
    steps = [step for step in steps if step.args[0].op != "get_attr"]
    exchanged = any(map(_is_exchanged, nodes)) or not all(map(_is_read_as_floats, steps))
    return [] if exchanged else steps


def _is_exchanged(node: fx.Node) -> bool:
    record = record_of(node)
    return record.gives_quantized or bool(record.takes_quantized) or node.target is to_quantized


def _is_read_as_floats(step: fx.Node) -> bool:
    return all(user.target is DEQUANTIZE or reads_only_shape(user) for user in step.users)
