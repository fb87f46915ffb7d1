"""A graph as plain data, and back: what pickles of :class:`QuantGraphModule` hold.

fx itself serializes generated Python code and traces it again, which renames nodes and drops their
metadata. Here a node is a tuple; a function is its qualified name.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import map_aggregate

from fxquant.errors import GraphError
from fxquant.metadata import NodeRecord, record_of, set_record


@dataclass(frozen=True, slots=True)
class NodeReference:
    """Stands for a node, by name, in encoded arguments."""

    name: str


_ANNOTATIONS: dict[str, type] = {
    kind.__name__: kind for kind in (torch.Tensor, bool, int, float, str)
}


@dataclass(frozen=True, slots=True)
class EncodedNode:
    """One node as plain data; of type annotations, the plain ones."""

    name: str
    op: str
    target: str
    args: Any
    kwargs: Any
    record: NodeRecord
    stack_trace: str | None
    annotation: str = ""


def encode_graph(graph: fx.Graph) -> list[EncodedNode]:
    """All nodes of ``graph`` in order, without references to objects of fx."""
    return [
        EncodedNode(
            name=node.name,
            op=node.op,
            target=_encode_target(node),
            args=_replace_nodes(node.args),
            kwargs=_replace_nodes(node.kwargs),
            record=record_of(node),
            stack_trace=node.stack_trace,
            annotation=_encode_annotation(node.type),
        )
        for node in graph.nodes
    ]


def decode_graph(nodes: list[EncodedNode]) -> fx.Graph:
    """The graph that :func:`encode_graph` was given, with names and records."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def restore(value: Any) -> Any:
        return made[value.name] if isinstance(value, NodeReference) else value

    for item in nodes:
        target: Any = decode_target(item.target) if item.op == "call_function" else item.target
        node = graph.create_node(
            item.op,
            target,
            _map_plain(item.args, restore),
            _map_plain(item.kwargs, restore),
            name=item.name,
            type_expr=_decode_annotation(item.annotation),
        )
        node._rename(item.name)
        if item.stack_trace is not None:
            node.stack_trace = item.stack_trace
        set_record(node, item.record)
        made[item.name] = node
    return graph


def _encode_annotation(annotation: object) -> str:
    """A plain type by its name; an annotation that was left as text in quotes; else nothing."""
    if isinstance(annotation, str):
        return f"'{annotation}'" if annotation.isidentifier() else ""
    return next((name for name, kind in _ANNOTATIONS.items() if kind is annotation), "")


def _decode_annotation(text: str) -> Any:
    return text[1:-1] if text.startswith("'") else _ANNOTATIONS.get(text)


def _replace_nodes(arguments: Any) -> Any:
    return _map_plain(
        map_aggregate(arguments, lambda a: a),
        lambda a: NodeReference(a.name) if isinstance(a, fx.Node) else a,
    )


def _map_plain(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, slice):
        return slice(
            *(_map_plain(part, function) for part in (value.start, value.stop, value.step))
        )
    if isinstance(value, tuple):
        items = [_map_plain(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_map_plain(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _map_plain(item, function) for key, item in value.items()}
    return function(value)


def _encode_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return f"op:{target.namespace}.{target._opname}.{target._overloadname}"
    if isinstance(target, OpOverloadPacket):
        return f"op:{target._qualified_op_name.replace('::', '.')}"
    name = fx.node._get_qualified_name(target)
    if decode_target(f"fn:{name}") is not target:
        raise GraphError(
            f"node {node.name!r} calls {target!r}, which cannot be found again under the name"
            f" {name!r}; define it at the top level of a module to make the model picklable"
        )
    return f"fn:{name}"


def decode_target(text: str) -> Any:
    """The callable that an encoded target names.

    Raises:
        GraphError: when the name leads nowhere in this process.
    """
    kind, _, name = text.partition(":")
    if kind == "op":
        value: Any = torch.ops
        for atom in name.split("."):
            value = getattr(value, atom)
        return value
    if "." not in name and hasattr(builtins, name):
        return getattr(builtins, name)
    module_name, _, rest = name.rpartition(".")
    atoms = [rest]
    while module_name:
        try:
            value = importlib.import_module(module_name)
        except ImportError:
            module_name, _, atom = module_name.rpartition(".")
            atoms.insert(0, atom)
            continue
        for atom in atoms:
            value = getattr(value, atom)
        return value
    raise GraphError(f"cannot find the function {name!r} that the saved graph calls")
