"""exchange-quantized: torch's quantized tensors to and from what takes and gives them.

::

    q = Q(x); f(DQ(q))     q = Q(x); f(to_quantized(q))      f takes a quantized tensor
    v = f(...); g(v)       v = f(...); g(v.dequantize())     f gives one
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.kernels import to_quantized
from fxquant.metadata import TensorRecord, record_of, update_record
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter, leaves_of


@dataclass(frozen=True)
class ExchangeQuantized(Pass):
    """Hand quantized tensors over at the marks of mark-boundary and nest-modules.

    Modules that are quantized on their own, and callers who say so, exchange torch's quantized
    tensors with the graph, which carry their scale and zero point; the graph itself computes on
    integers with parameters in buffers.
    """

    name: ClassVar[str] = "exchange-quantized"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.REFERENCE})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.EXCHANGED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """First what gives quantized tensors, then what takes them."""
        work = _Work(GraphRewriter(gm, self.name), context)
        nodes = list(gm.graph.nodes)
        for node in nodes:
            if record_of(node).gives_quantized:
                work.read_floats_of(node)
        for node in nodes:
            if record_of(node).takes_quantized:
                work.hand_over(node)
        return PassResult(changes=work.rewriter.finish())


@dataclass
class _Work:
    """One run of the pass.

    Attributes:
        rewriter: of the graph.
        context: takes the warnings.
        made: quantize node -> the quantized tensor of its integers.
    """

    rewriter: GraphRewriter
    context: PassContext
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def read_floats_of(self, value: fx.Node) -> None:
        """Let those that compute on floats read the dequantized ``value``."""
        record = record_of(value).value
        if isinstance(record, TensorRecord) and record.dtype is torch.quint8:
            return  # done before
        readers = [user for user in value.users if value in _computing_leaves(user)]
        if readers:
            floats = self.rewriter.call(torch.dequantize, (value,), after=value, like=value)
            for user in readers:
                taken = record_of(user).takes_quantized
                self.rewriter.replace_leaf(user, value, floats, keep=taken)
        if isinstance(record, TensorRecord):
            update_record(value, value=replace(record, dtype=torch.quint8))
            self.rewriter.changes += 1

    def hand_over(self, reader: fx.Node) -> None:
        """Let ``reader`` take quantized tensors where it says so."""
        for position, leaves in enumerate(leaves_of(reader)):
            if position not in record_of(reader).takes_quantized:
                continue
            for leaf in leaves:
                if leaf.target is DEQUANTIZE:
                    quantized = self._quantized(leaf)
                    others = set(range(len(leaves_of(reader)))) - {position}
                    self.rewriter.replace_leaf(reader, leaf, quantized, keep=others)
                    self.rewriter.erase_dead([leaf])
                elif reader.op != "output" and not record_of(leaf).gives_quantized:
                    self._warn(reader, leaf)

    def _quantized(self, dequantize: fx.Node) -> fx.Node:
        source, scale, zero_point = dequantize.args[:3]
        assert isinstance(source, fx.Node) and source.target is QUANTIZE
        if source not in self.made:
            self.made[source] = self.rewriter.call(
                to_quantized,
                (source, scale, zero_point),
                after=source,
                like=source,
                name=f"{source.name}_tensor",
                dtype=torch.quint8,
            )
        return self.made[source]

    def _warn(self, reader: fx.Node, leaf: fx.Node) -> None:
        self.context.diagnostics.warn(
            f"{reader.name!r} takes a quantized tensor, but {leaf.name!r} is in floating point: no"
            " qconfig governs it. Give the module a qconfig, or let it take floats",
            LoweringWarning,
        )


def _computing_leaves(user: fx.Node) -> list[fx.Node]:
    """The nodes that ``user`` reads where it does not take quantized tensors."""
    taken = record_of(user).takes_quantized
    return [leaf for i, leaves in enumerate(leaves_of(user)) if i not in taken for leaf in leaves]
