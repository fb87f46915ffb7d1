"""take-pieces: ``chunk(x, n, dim)[i] -> piece i of x``, one op with one result."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant import kernels
from fxquant.dataflow import is_float_tensor
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.op_catalog import REQUIRED
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitting:
    """An op that gives a tuple of pieces.

    Attributes:
        piece: the function that gives one of them; takes the index last.
        parameters: further parameters after the tensor -> default.
        aliases: other keywords for them.
    """

    piece: Callable[..., Any]
    parameters: Mapping[str, Any]
    aliases: Mapping[str, str]


_CHUNK = _Splitting(piece=kernels.chunk, parameters={"chunks": REQUIRED, "dim": 0}, aliases={})
_SPLIT = _Splitting(
    piece=kernels.split,
    parameters={"sizes": REQUIRED, "dim": 0},
    aliases={"split_size_or_sections": "sizes", "split_size": "sizes"},
)
_TENSOR_SPLIT = _Splitting(
    piece=kernels.tensor_split,
    parameters={"sections": REQUIRED, "dim": 0},
    aliases=dict.fromkeys(("indices_or_sections", "sections", "indices"), "sections"),
)
_UNBIND = _Splitting(piece=torch.select, parameters={"dim": 0}, aliases={})

_BY_FUNCTION: Mapping[Any, _Splitting] = {
    torch.chunk: _CHUNK,
    torch.split: _SPLIT,
    torch.tensor_split: _TENSOR_SPLIT,
    torch.unbind: _UNBIND,
}
_BY_METHOD: Mapping[str, _Splitting] = {
    "chunk": _CHUNK,
    "split": _SPLIT,
    "tensor_split": _TENSOR_SPLIT,
    "unbind": _UNBIND,
}


@dataclass(frozen=True)
class TakePieces(Pass):
    """Give every piece of a split tensor an op of its own.

    Specs and kernels are about ops with one result; a piece is a view, so that taking each alone
    costs nothing. Refused where something reads the tuple as a whole, or by an index that is not a
    number. The qconfig of the splitting op governs its pieces.
    """

    name: ClassVar[str] = "take-pieces"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PIECES_TAKEN})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Rewrite every splitting of a float tensor; a refusal names the reader."""
        rewriter = GraphRewriter(gm, self.name)
        refusals = []
        for node in list(gm.graph.nodes):
            found = _splitting(node)
            if found is None or not is_float_tensor(gm, node.all_input_nodes[0]):
                continue
            splitting, arguments = found
            stranger = next((user for user in node.users if not _takes_one(user, node)), None)
            if stranger is not None:
                reason = f"{stranger.name!r} reads all pieces of {node.name!r} as one tuple"
                refusals.append(Refusal(node=node.name, reason=reason, culprits=(stranger.name,)))
                before = record_of(node)
                add_reason(node, reason)
                rewriter.changes += record_of(node) != before
                continue
            _take(rewriter, node, splitting, arguments)
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _splitting(node: fx.Node) -> tuple[_Splitting, tuple[Any, ...]] | None:
    """What ``node`` splits how: the tensor and the further arguments in order."""
    table: Mapping[Any, _Splitting] = _BY_FUNCTION if node.op == "call_function" else _BY_METHOD
    splitting = table.get(node.target) if node.op in ("call_function", "call_method") else None
    if splitting is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    bound = dict(splitting.parameters)
    if len(node.args) > 1 + len(bound):
        return None
    bound.update(zip(bound, node.args[1:], strict=False))
    for keyword, value in node.kwargs.items():
        name = splitting.aliases.get(keyword, keyword)
        if name not in bound:
            return None
        bound[name] = value
    if REQUIRED in bound.values():
        return None
    return splitting, (node.args[0], *bound.values())


def _takes_one(user: fx.Node, pieces: fx.Node) -> bool:
    return (
        user.op == "call_function"
        and user.target is operator.getitem
        and user.args[0] is pieces
        and isinstance(user.args[1], int)
    )


def _take(
    rewriter: GraphRewriter, node: fx.Node, splitting: _Splitting, arguments: tuple[Any, ...]
) -> None:
    """Turn the readers of ``node`` into pieces; the first of them carries ``node`` in reports."""
    record = record_of(node)
    origins = record.origins
    for item in list(node.users):
        if not item.users:
            rewriter.erase(item)  # nobody wants this piece
            continue
        rewriter.retarget(item, splitting.piece, (*arguments, item.args[1]))
        update_record(
            item,
            qconfig=record.qconfig,
            rule=record.rule,
            origins=(*origins, *record_of(item).origins),
        )
        origins = ()
    if not node.users and not origins:
        rewriter.erase(node)
