"""expose-parameters: scales and packed weights of functions as attributes, named as in torch.ao."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.metadata import record_of, update_record
from fxquant.packing import UNPACKED
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter, has_own


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
        packs = {pack.name: pack for pack in gm.state.packs if _is_open(pack)}
        named: dict[str, PackRecord] = {}
        numbers: dict[str, int] = {}
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
            sources = [str(s.target) for s in node.all_input_nodes if s.op == "get_attr"]
            for name in dict.fromkeys(sources):
                if name in packs and name not in named:
                    new = _name_for(gm, node, numbers)
                    named[name] = replace(packs[name], name=new, saved=True)
        if named:
            rewriter.rename_packed(named)
        return PassResult(changes=rewriter.finish())


def _is_function(node: fx.Node) -> bool:
    """Whether ``node`` quantizes, or carries out a function with parameters of its own."""
    record = record_of(node)
    if node.target is torch.quantize_per_tensor:
        return True
    moves = record.annotation is None or record.annotation.shares
    return bool(record.kernel) and not moves and not record.module


def _is_open(pack: PackRecord) -> bool:
    """Whether a packed weight has not been named yet, and can be unpacked."""
    return not pack.saved and pack.packer in UNPACKED


def _name_for(gm: QuantGraphModule, node: fx.Node, numbers: dict[str, int]) -> str:
    """The next free name for a packed weight of ``node``.

    Args:
        gm: the module.
        node: that reads the weight.
        numbers: the next number for each beginning of a name.
    """
    prefix = f"{record_of(node).scope.replace('.', '_')}_packed_weight_"
    number = numbers.get(prefix, 0)
    while has_own(gm, f"{prefix}{number}"):
        number += 1
    numbers[prefix] = number + 1
    return f"{prefix}{number}"
