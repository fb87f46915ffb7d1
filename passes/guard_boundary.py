"""guard-boundary: inputs that kernels cannot take get a clear error, outputs the float layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.dataflow import is_container
from fxquant.graph_module import QuantGraphModule
from fxquant.kernels import checked_input, in_format_of
from fxquant.metadata import TensorRecord, record_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

_BATCHED = ("conv", "max_pool", "avg_pool", "batch_norm", "interpolate")


@dataclass(frozen=True)
class GuardBoundary(Pass):
    """Check the inputs that are quantized, and hand out images as the float model would.

    int8 kernels take float32 of one rank and write channels_last. The float model may take other
    ranks and dtypes, and gives contiguous images for contiguous ones; callers rely on that.
    """

    name: ClassVar[str] = "guard-boundary"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BOUNDARY_GUARDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Insert a check behind each quantized input and a format in front of the output."""
        rewriter = GraphRewriter(gm, self.name)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        images = [n for n in placeholders if _rank(n) in (4, 5)]
        # Convolution and pooling kernels want the batch axis; the others any two dimensions.
        images_only = any(entry.kind.startswith(_BATCHED) for entry in gm.state.ledger)
        for node in placeholders:
            quantized = any(user.target is torch.quantize_per_tensor for user in node.users)
            rank = _rank(node)
            if not quantized or rank is None:
                continue
            least = rank if images_only else min(rank, 2)
            made = rewriter.call(
                checked_input, (node, str(node.target), least), before=node.next, like=node
            )
            rewriter.replace_uses(node, made)
        output = next(iter(reversed(gm.graph.nodes)))
        lowered = _lowered(gm.graph)
        for reader in _readers_outside(output):
            for node in list(reader.all_input_nodes):
                if _rank(node) not in (4, 5) or node.target is in_format_of:
                    continue
                if node not in lowered:
                    continue
                like = next((i for i in images if _rank(i) == _rank(node)), None)
                made = rewriter.call(in_format_of, (node, like), before=reader, like=node)
                rewriter.replace_argument(reader, node, made)
        return PassResult(changes=rewriter.finish())


def _lowered(graph: fx.Graph) -> set[fx.Node]:
    """What passes made, and what reads it: floats in the layout of a kernel's result."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if record_of(node).made_by or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _readers_outside(output: fx.Node) -> list[fx.Node]:
    """The output, and the dataclasses and named tuples in it."""
    found = [output]
    for reader in found:
        found += [node for node in reader.all_input_nodes if is_container(node)]
    return found


def _rank(node: fx.Node) -> int | None:
    value = record_of(node).value
    if isinstance(value, TensorRecord) and value.dtype.is_floating_point:
        return len(value.shape)
    return None
