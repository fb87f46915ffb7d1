"""insert-channel-means: watch the mean input of every op whose weight is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.channel_mean import ChannelMean
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

CHANNEL_MEAN_PREFIX = "channel_mean_"
CHANNEL_AXES = {"conv1d": -2, "conv2d": -3, "conv3d": -4, "linear": -1}
"""Kinds whose bias is corrected -> channel axis of their input."""


@dataclass(frozen=True)
class InsertChannelMeans(Pass):
    """Insert root modules ``channel_mean_N`` in front of convolutions and linears.

    They are read, and taken out again, by the correct-bias pass.
    """

    name: ClassVar[str] = "insert-channel-means"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MEANS_WATCHED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Insert in front of each op with a weight spec, in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        number = 0
        for node in list(gm.graph.nodes):
            annotation, op = record_of(node).annotation, op_of(gm, node)
            if annotation is None or annotation.weight is None or op is None:
                continue
            if op.name not in CHANNEL_AXES or op.constant_path("weight") is None:
                continue
            source = op.activations[0]
            if source.name.startswith(CHANNEL_MEAN_PREFIX):
                continue
            path = f"{CHANNEL_MEAN_PREFIX}{number}"
            number += 1
            weight = op.constant("weight")
            assert weight is not None
            gm.add_module(path, ChannelMean(CHANNEL_AXES[op.name]).to(weight.device))
            watched = rewriter.module_call(path, (source,), before=node, like=source)
            rewriter.replace_argument(node, source, watched)
        return PassResult(changes=rewriter.finish())
