"""round-joined: what is joined of several rounded values is rounded with the range of all of them.

::

    cat([fq_0(a), fq_1(b)])        fq_2(cat([fq_0(a), fq_1(b)]))

Int8 has one scale for all three; while ``a`` and ``b`` train with scales of their own, ``fq_2``
shows the readers of the result the coarsest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import NodeRecord, record_of
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.insert_observers import OBSERVER_PREFIX, device_of, on_device
from fxquant.passes.to_reference import is_observer
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class RoundJoined(Pass):
    """Put a fake quantizer behind every op that joins values of one sharing group.

    Not where all of them have one observer, nor where qconfigs only observe.
    """

    name: ClassVar[str] = "round-joined"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED, Fact.SHARED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Insert behind each join, in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        nodes: list[fx.Node] = list(gm.graph.nodes)
        by_name = {node.name: node for node in nodes}
        number = sum(is_observer(node) for node in nodes)
        device = device_of(gm)
        observers = Counter(record_of(n).share_group for n in nodes if is_observer(n))
        observed = {group for group, count in observers.items() if count > 1}
        for node in nodes:
            record, op = record_of(node), op_of(gm, node)
            if op is None or len(op.activations) < 2 or not _joins(record):
                continue
            last = node if record.fusion is None else by_name[record.fusion.last]
            group = record_of(last).share_group
            if group not in observed or any(is_observer(user) for user in last.users):
                continue
            assert record.qconfig is not None
            made: Any = record.qconfig.activation()
            if not hasattr(made, "fake_quant_enabled"):
                continue
            path = f"{OBSERVER_PREFIX}{number}"
            number += 1
            made.owner = f"{path} (output of {last.name!r})"
            gm.add_module(path, on_device(made, device))
            readers = list(last.users)
            behind = rewriter.module_call(
                path, (last,), after=last, like=last, share_group=group, qconfig=record.qconfig
            )
            for reader in readers:
                rewriter.replace_argument(reader, last, behind)
        return PassResult(changes=rewriter.finish())


def _joins(record: NodeRecord) -> bool:
    """Whether an op shares parameters, and begins its pattern."""
    annotation = record.annotation
    return annotation is not None and annotation.shares and record.qconfig is not None
