"""recognize-channel-shuffle: ``view - transpose - contiguous - view  ->  channel_shuffle``.

Source: Zhang et al. 2018 (ShuffleNet), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, shape_of, update_record
from fxquant.op_view import Op, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class RecognizeChannelShuffle(Pass):
    """Replace a channel shuffle that is spelt out by the function of that name.

    ``[N, C, H, W] -> [N, g, C / g, H, W] -> [N, C / g, g, H, W] -> [N, C, H, W]``. On int8 values
    in channels_last, which is what convolutions give, the function takes 10 us and keeps the
    format; the four ops take 49 and leave another one to the next convolution (116 x 28 x 28).

    Only where the example shapes are known, and where every size is a number or read off the
    input, so that the rewrite holds at other resolutions.
    """

    name: ClassVar[str] = "recognize-channel-shuffle"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.SHUFFLES_RECOGNIZED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Rewrite every match, found from its last op."""
        rewriter = GraphRewriter(gm, self.name)
        for node in list(gm.graph.nodes):
            found = None if node._erased else _match(gm, node)
            if found is None:
                continue
            source, groups, inner = found
            sizes = [a for n in (node, *inner) for a in n.all_input_nodes if a is not source]
            origins = [o for n in (*reversed(inner), node) for o in record_of(n).origins]
            rewriter.retarget(node, F.channel_shuffle, (source, groups))
            update_record(node, origins=tuple(origins))
            rewriter.erase_dead([n for n in (*inner, *sizes) if not n._erased])
        return PassResult(changes=rewriter.finish())


def _match(gm: QuantGraphModule, node: fx.Node) -> tuple[fx.Node, int, tuple[fx.Node, ...]] | None:
    """Input and groups of the shuffle that ends at ``node``, and the ops inside it, last first."""
    last = _reshape(gm, node)
    if last is None:
        return None
    inner: list[fx.Node] = [last.activations[0]]
    op = op_of(gm, inner[-1])
    if op is not None and op.name == "contiguous":
        inner.append(op.activations[0])
        op = op_of(gm, inner[-1])
    if op is None or not _swaps_groups(op):
        return None
    inner.append(op.activations[0])
    first = _reshape(gm, inner[-1])
    if first is None or any(len(n.users) != 1 for n in inner):
        return None
    source = first.activations[0]
    groups = _groups(first, last, source)
    return None if groups is None else (source, groups, tuple(inner))


def _reshape(gm: QuantGraphModule, node: fx.Node) -> Op | None:
    op = op_of(gm, node)
    if op is None or op.name not in ("view", "reshape"):
        return None
    return op if isinstance(op.arguments["shape"], (tuple, list)) else None


def _swaps_groups(op: Op) -> bool:
    """Whether ``op`` exchanges dimensions 1 and 2 of five."""
    if op.name == "transpose":
        pair = {op.arguments["dim0"], op.arguments["dim1"]}
        return pair in ({1, 2}, {-4, -3}, {1, -3}, {2, -4})
    return op.name == "permute" and list(op.arguments["dims"]) == [0, 2, 1, 3, 4]


def _groups(first: Op, last: Op, source: fx.Node) -> int | None:
    """The number of groups, or ``None`` where the shapes are not those of a channel shuffle."""
    before, split = shape_of(source), shape_of(first.node)
    if before is None or split is None or len(before) != 4 or len(split) != 5:
        return None
    batch, channels, height, width = before
    groups = split[1]
    whole = (batch, groups, channels // groups, height, width) if groups else ()
    if split != whole or shape_of(last.node) != before:
        return None
    sizes, again = first.arguments["shape"], last.arguments["shape"]
    if len(sizes) != 5 or len(again) != 4:
        return None
    if not any(type(size) is int and size > 0 for size in sizes[1:3]):
        return None  # neither the groups nor their size is a number
    outer = (sizes[0], *sizes[3:], *again)
    dimensions = (0, 2, 3, 0, 1, 2, 3)
    fits = all(_is_size(a, source, d) for a, d in zip(outer, dimensions, strict=True))
    return groups if fits else None


def _is_size(argument: Any, source: fx.Node, dimension: int) -> bool:
    """Whether ``argument`` is dimension ``dimension`` of ``source``, now and at other sizes."""
    if not isinstance(argument, fx.Node):
        return True  # the shapes agree with the example; the number binds other inputs too
    if argument.op == "call_method" and argument.target == "size":
        return len(argument.args) == 2 and argument.args == (source, dimension)
    if argument.op != "call_function" or len(argument.args) != 2:
        return False
    sizes, index = argument.args
    return type(index) is int and index == dimension and _is_shape(sizes, source)


def _is_shape(sizes: object, source: fx.Node) -> bool:
    if not isinstance(sizes, fx.Node):
        return False
    if sizes.op == "call_method" and sizes.target == "size":
        return sizes.args == (source,)
    return sizes.target is getattr and sizes.args == (source, "shape")
