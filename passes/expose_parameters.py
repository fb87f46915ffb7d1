"""expose-parameters: scales and packed weights of functions as attributes, named as in torch.ao."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph_module import PackRecord, QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.packing import UNPACKED
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class ExposeParameters(Pass):
    """Read scales and zero points at every call; name weights ``<path>_packed_weight_<k>``.

    ``f(x, packed, 0.1, 3) -> f(x, self._packed_weight_0, self._scale_1, self._zero_point_1)`` for
    functions with a scale of their own, and for quantize. What was a call of a module keeps its
    numbers. Such packed weights are what a state dict holds.
    """

    name: ClassVar[str] = "expose-parameters"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PACKED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Expose in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        for node in list(gm.graph.nodes):
            if not _is_function(node):
                continue
            args = list(node.args)
            for position, name in record_of(node).bound:
                if not isinstance(args[position], fx.Node):
                    args[position] = rewriter.get_attr(name, before=node, like=node)
                    update_record(args[position], is_number=True)
            if tuple(args) != node.args:
                rewriter.replace_arguments(node, tuple(args))
            for record in _packed(gm, node):
                _rename(rewriter, record, node)
        return PassResult(changes=rewriter.finish())


def _is_function(node: fx.Node) -> bool:
    """Whether ``node`` quantizes, or carries out a function with parameters of its own."""
    record = record_of(node)
    if node.target is torch.quantize_per_tensor:
        return True
    moves = record.annotation is None or record.annotation.shares
    return bool(record.kernel) and not moves and not record.module


def _packed(gm: QuantGraphModule, node: fx.Node) -> list[PackRecord]:
    """The packed weights of ``node`` that have not been named yet, and can be unpacked."""
    names = {str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}
    packs = (pack for pack in gm.state.packs if pack.name in names)
    return [pack for pack in packs if not pack.saved and pack.packer in UNPACKED]


def _rename(rewriter: GraphRewriter, record: PackRecord, node: fx.Node) -> None:
    gm, number = rewriter.gm, 0
    prefix = f"{record_of(node).scope.replace('.', '_')}_packed_weight_"
    while hasattr(gm, f"{prefix}{number}"):
        number += 1
    named = replace(record, name=f"{prefix}{number}", saved=True)
    rewriter.rename_packed(record, named)
