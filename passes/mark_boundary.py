"""mark-boundary: which inputs come as torch's quantized tensors, and which results leave so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.errors import ConfigWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import leaves_of


@dataclass(frozen=True)
class MarkBoundary(Pass):
    """Mark inputs and results that are quantized tensors once the model is converted.

    Nothing quantizes such an input, and nothing dequantizes such a result. Until then the model
    computes with floats throughout.

    Attributes:
        inputs: positions of the inputs.
        outputs: positions in the returned tuple or list; 0 is the whole of anything else.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    name: ClassVar[str] = "mark-boundary"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BOUNDARY_MARKED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Mark the inputs and the return; positions that are not there are told."""
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        returned: fx.Node = next(node for node in gm.graph.nodes if node.op == "output")
        before = [record_of(node) for node in (*placeholders, returned)]
        for what, positions, count in (
            ("input", self.inputs, len(placeholders)),
            ("output", self.outputs, len(leaves_of(returned))),
        ):
            absent = sorted(p for p in set(positions) if not 0 <= p < count)
            if absent:
                context.diagnostics.warn(
                    f"{what}_quantized_idxs names {what} {absent[0]}, but the model has {count};"
                    " positions count from 0",
                    ConfigWarning,
                )
        for position in self.inputs:
            if 0 <= position < len(placeholders):
                update_record(placeholders[position], gives_quantized=True)
        update_record(returned, takes_quantized=tuple(sorted(set(self.outputs))))
        after = [record_of(node) for node in (*placeholders, returned)]
        return PassResult(changes=sum(a != b for a, b in zip(after, before, strict=True)))
