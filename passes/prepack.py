"""prepack: ``conv(x, pack(weight)) -> conv(x, packed)`` with a constant made at the first call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.metadata import NodeRecord, set_record
from fxquant.packing import PACKERS
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class Prepack(Pass):
    """Replace every packing call by a packed constant of the module.

    The plain tensors stay as buffers: they are what is saved, and packed constants are made from
    them when they are first read, also after a load or an unpickling. Whoever converts only to save
    packs nothing.
    """

    name: ClassVar[str] = "prepack"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PACKED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Pack, and read the constants where the packing calls were."""
        rewriter = GraphRewriter(gm, self.name)
        names = {packer.function: name for name, packer in PACKERS.items()}
        records: list[PackRecord] = []
        taken: set[str] = set()
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in names:
                continue
            packer = names[node.target]
            count = PACKERS[packer].tensors
            record = PackRecord(
                name=rewriter.fresh_name(node.name, taken),
                packer=packer,
                tensors=tuple(
                    str(a.target) if isinstance(a, fx.Node) else "" for a in node.args[:count]
                ),
                options=tuple(node.args[count:]),
            )
            records.append(record)
            taken.add(record.name)
            with gm.graph.inserting_before(node):
                constant = gm.graph.create_node("get_attr", record.name)
            set_record(constant, NodeRecord(made_by=self.name, has_value=True))
            rewriter.replace_uses(node, constant)
            rewriter.erase_dead([node])
        if records:
            gm.update_state(packs=(*gm.state.packs, *records))
        return PassResult(changes=rewriter.finish())
