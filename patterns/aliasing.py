"""Which values of a graph may share memory, and which nodes write it in place."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Collection

from torch import fx, nn

from fxquant.op_view import is_inplace, kind_of

_VIEWS = frozenset(
    {
        "channel_shuffle",
        "chunk",
        "contiguous",
        "detach",
        "dropout",
        "expand",
        "flatten",
        "identity",
        "narrow",
        "permute",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "select",
        "slice",
        "split",
        "squeeze",
        "stochastic_depth",
        "tensor_split",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
    }
)
"""Kinds whose result may be their input's memory."""

_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_WRITING_OPERATORS = frozenset(
    {operator.setitem, operator.iand, operator.ior, operator.ixor, operator.ipow}
    | {operator.imod, operator.ifloordiv, operator.ilshift, operator.irshift, operator.imatmul}
)


def written_value(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose value ``node`` writes in place, or ``None``."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if not (is_inplace(gm, node) or _looks_inplace(node)):
        return None
    target = node.args[0] if node.args else node.kwargs.get("input")
    return target if isinstance(target, fx.Node) else None


def _looks_inplace(node: fx.Node) -> bool:
    """In-place forms of functions that the op catalogue does not know."""
    if node.op != "call_function":
        return False
    name = str(getattr(node.target, "__name__", "")).split(".")[0]
    return (
        node.target in _WRITING_OPERATORS
        or node.kwargs.get("inplace") is True
        or (name.endswith("_") and not name.endswith("__") and not _is_operator(node.target))
    )


def _is_operator(target: object) -> bool:
    """``operator.and_`` and ``or_`` end with an underscore since ``and`` and ``or`` are taken."""
    return getattr(target, "__module__", "") == "_operator"


class Aliasing:
    """Classes of values that may share memory: in-place results, views, and unknown functions.

    An op that the catalogue does not know may return a view of any of its inputs, unless it is a
    module of ``torch.nn``.

    Args:
        gm: the module that owns the graph.
        position: node -> index in graph order.
    """

    def __init__(self, gm: fx.GraphModule, position: dict[fx.Node, int]) -> None:
        self._position = position
        self._parent: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, fx.Node] = {}
        for node in position:
            written = written_value(gm, node)
            if written is not None:
                self._written[node] = written
            for source in _sources(gm, node) if written is None else (written,):
                self._unite(node, source)
        self._writers: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
        for node, written in self._written.items():
            self._writers.setdefault(self._root(written), []).append((position[node], node))
        self._external: dict[fx.Node, fx.Node] = {}
        self._last_reads: dict[fx.Node, tuple[list[int], list[tuple[int, fx.Node]]]] = {}
        for node in position:
            self._index(node)

    def written_by(self, node: fx.Node) -> fx.Node | None:
        """The value that ``node`` writes in place, or ``None``."""
        return self._written.get(node)

    def writer_between(
        self, value: fx.Node, after: fx.Node, before: fx.Node, ignoring: Collection[fx.Node]
    ) -> fx.Node | None:
        """A node strictly between two others that writes memory of ``value``, or ``None``."""
        writers = self._writers.get(self._root(value), [])
        start = bisect_right(writers, self._position[after], key=lambda writer: writer[0])
        for position, writer in writers[start : start + len(ignoring) + 1]:
            if position >= self._position[before]:
                return None
            if writer not in ignoring:
                return writer
        return None

    def reader_after(self, value: fx.Node, writer: fx.Node) -> fx.Node | None:
        """A later reader of memory of ``value`` through a name from before ``writer``."""
        entry = self._last_reads.get(self._root(value))
        if entry is None:
            return None
        members, reads = entry
        index = bisect_right(members, self._position[writer] - 1) - 1
        if index < 0:
            return None
        position, reader = reads[index]
        return reader if position > self._position[writer] else None

    def external(self, value: fx.Node) -> fx.Node | None:
        """The model input or attribute whose memory ``value`` may be, or ``None``."""
        return self._external.get(self._root(value))

    def _index(self, node: fx.Node) -> None:
        """Record ``node`` with its class: where it comes from, and the last read so far."""
        root = self._root(node)
        if node.op in ("placeholder", "get_attr"):
            self._external.setdefault(root, node)
        if root not in self._writers:
            return
        last = max(
            ((self._position[user], user) for user in node.users),
            key=lambda read: read[0],
            default=(-1, node),
        )
        members, reads = self._last_reads.setdefault(root, ([], []))
        members.append(self._position[node])
        reads.append(max(reads[-1], last, key=lambda read: read[0]) if reads else last)

    def _root(self, node: fx.Node) -> fx.Node:
        path = []
        while node in self._parent:
            path.append(node)
            node = self._parent[node]
        for visited in path:
            self._parent[visited] = node
        return node

    def _unite(self, one: fx.Node, other: fx.Node) -> None:
        first, second = self._root(one), self._root(other)
        if first is not second:
            self._parent[first] = second


def _sources(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs whose memory the result of ``node`` may be."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    kind = kind_of(gm, node)
    if kind is not None:
        return tuple(node.all_input_nodes[:1]) if kind.name in _VIEWS else ()
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        known = type(module).__module__.startswith("torch.nn.")
        if known and not isinstance(module, _VIEW_MODULES):
            return ()
    return tuple(node.all_input_nodes)
