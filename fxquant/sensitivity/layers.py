"""What is quantized together: a layer, a block of layers, all layers of one pattern.

A *layer* is an op that a qconfig can quantize (a convolution, a linear, an add, ...) with all that
runs in its kernel: folded batch-norms, activation functions, a residual sum. Ops that only move
values (pooling, reshape, cat, ...) belong to no layer: they are integers where integers come by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.ledger import macs_of
from fxquant.metadata import record_of
from fxquant.op_catalog import COMPUTE_KINDS
from fxquant.op_view import Op, op_of, type_name

GRANULARITIES = ("layer", "block", "pattern")
"""What :func:`group_layers` can group layers to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is lowered, or left in floating point, as one.

    Attributes:
        name: path of its module, or of the module that holds its weight; for a function without
            one the name of its node in the float graph.
        kind: what it computes: ``conv2d``, ``depthwise conv2d``, ``add``, ...
        pattern: the kinds of the ops in its kernel: ``conv2d-relu6``.
        block: path of the module that it is part of, or its own name where there is none.
        nodes: names of its ops in the folded float graph, in order.
        heads: those of them that have a kernel; the others run inside it.
        last: the op whose value leaves the layer.
        position: its place among the layers, from 0.
        parameters: number of elements of its weights and biases.
        macs: multiply-accumulates with the example inputs; ``None`` where shapes are not known.
        weights: path of each weight in the folded float graph.
        members: names of the layers in it, where it is a group of them.
    """

    name: str
    kind: str
    pattern: str
    block: str
    nodes: tuple[str, ...]
    heads: tuple[str, ...]
    last: str
    position: int
    parameters: int
    macs: int | None
    weights: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def has_weight(self) -> bool:
        """Whether it multiplies with a weight, so that most of its work is there."""
        return bool(self.weights)


def find_layers(
    graphs: Sequence[QuantGraphModule], classes: Mapping[str, type[nn.Module]]
) -> tuple[Layer, ...]:
    """The layers of a network, in graph order.

    Args:
        graphs: the annotated graph for each way in which the network may be quantized; what one of
            them quantizes is a layer.
        classes: path -> class, of the user's modules.
    """
    first = graphs[0]
    order = {node.name: i for i, node in enumerate(first.graph.nodes)}
    groups: dict[str, list[fx.Node]] = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if _heads_layer(graph, node) and node.name not in groups:
                groups[node.name] = _members(graph, node)
    by_name: dict[str, list[list[fx.Node]]] = {}
    for head in sorted(groups, key=order.__getitem__):
        by_name.setdefault(_name(first, groups[head][0]), []).append(groups[head])
    return tuple(
        _layer(first, name, calls, position, classes)
        for position, (name, calls) in enumerate(by_name.items())
    )


def _name(gm: QuantGraphModule, head: fx.Node) -> str:
    """Path of the module that is called, or that holds the weight; else the node's name."""
    if head.op == "call_module":
        return str(head.target)
    weights = _weights(op_of(gm, head))
    holder = weights[0].rpartition(".")[0] if weights else ""
    return holder or head.name


def _heads_layer(gm: QuantGraphModule, node: fx.Node) -> bool:
    record = record_of(node)
    if record.fusion is not None and record.fusion.first != node.name:
        return False
    if record.runs_in is not None:
        op = op_of(gm, node)
        return op is not None and op.name in COMPUTE_KINDS
    return record.annotation is not None and not record.annotation.shares


def _members(gm: QuantGraphModule, head: fx.Node) -> list[fx.Node]:
    fusion = record_of(head).fusion
    if fusion is None:
        return [head]
    found = [n for n in gm.graph.nodes if getattr(record_of(n).fusion, "group", None) is not None]
    return [n for n in found if getattr(record_of(n).fusion, "group", None) == fusion.group]


def _layer(
    gm: QuantGraphModule,
    name: str,
    calls: list[list[fx.Node]],
    position: int,
    classes: Mapping[str, type[nn.Module]],
) -> Layer:
    nodes = {node.name: node for node in gm.graph.nodes}
    heads = [nodes[call[0].name] for call in calls]
    op = op_of(gm, heads[0])
    macs = [macs_of(gm, head) for head in heads]
    weights = list(dict.fromkeys(w for head in heads for w in _weights(op_of(gm, head))))
    pattern = [type_name(gm, n) if (o := op_of(gm, n)) is None else o.name for n in calls[0]]
    return Layer(
        name=name,
        kind=kind_in_words(op) if op is not None else type_name(gm, heads[0]),
        pattern="-".join(pattern),
        block=_block(name, record_of(heads[0]).scope, classes),
        nodes=tuple(node.name for call in calls for node in call),
        heads=tuple(head.name for head in heads),
        last=calls[-1][-1].name,
        position=position,
        parameters=_parameters(gm, heads),
        macs=None if None in macs else sum(m for m in macs if m is not None),
        weights=tuple(weights),
    )


def kind_in_words(op: Op) -> str:
    """``depthwise conv2d``, ``pointwise conv2d``, ``conv2d``, ``linear``, ..."""
    weight = op.constant("weight") if "weight" in op.kind.constants else None
    if not op.name.startswith("conv") or weight is None or "transpose" in op.name:
        return op.name
    groups = int(op.arguments.get("groups", 1))
    if groups > 1 and weight.shape[1] == 1:
        return f"depthwise {op.name}"
    if groups == 1 and math.prod(weight.shape[2:]) == 1:
        return f"pointwise {op.name}"
    return op.name


def _weights(op: Op | None) -> list[str]:
    if op is None or "weight" not in op.kind.constants:
        return []
    path = op.constant_path("weight")
    return [] if path is None else [path]


def _parameters(gm: QuantGraphModule, heads: Iterable[fx.Node]) -> int:
    tensors = {}
    for head in heads:
        if head.op == "call_module":
            module = gm.get_submodule(str(head.target))
            tensors.update({id(p): p.numel() for p in module.parameters()})
            continue
        op = op_of(gm, head)
        for name in op.kind.constants if op is not None else ():
            value = op.constant(name) if op is not None else None
            if value is not None:
                tensors[id(value)] = value.numel()
    return sum(tensors.values())


def _block(name: str, scope: str, classes: Mapping[str, type[nn.Module]]) -> str:
    """The nearest module around a layer that someone wrote, no container; else the layer itself."""
    while scope:
        if not issubclass(classes.get(scope, nn.Module), (nn.Sequential, nn.ModuleList)):
            return scope
        scope = scope.rpartition(".")[0]
    return name


def group_layers(layers: Sequence[Layer], granularity: str) -> tuple[Layer, ...]:
    """The layers themselves, or groups of them, which are lowered together.

    Args:
        layers: in graph order.
        granularity: ``"layer"``; ``"block"``, the layers of one module that is no mere container
            (a residual block, an encoder layer); or ``"pattern"``, all layers of one kind and
            pattern (every depthwise ``conv2d-relu6``).
    """
    if granularity == "layer":
        return tuple(layers)
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        key = layer.block if granularity == "block" else f"{layer.kind}: {layer.pattern}"
        groups.setdefault(key, []).append(layer)
    return tuple(_united(name, found, i) for i, (name, found) in enumerate(groups.items()))


def _united(name: str, layers: list[Layer], position: int) -> Layer:
    macs = [layer.macs for layer in layers]
    kinds = dict.fromkeys(layer.kind for layer in layers)
    return replace(
        layers[0],
        name=name,
        kind=" + ".join(kinds) if len(kinds) < 4 else f"{len(layers)} layers",
        pattern=layers[0].pattern if len({layer.pattern for layer in layers}) == 1 else "",
        nodes=tuple(node for layer in layers for node in layer.nodes),
        heads=tuple(head for layer in layers for head in layer.heads),
        last=layers[-1].last,
        position=position,
        parameters=sum(layer.parameters for layer in layers),
        macs=None if None in macs else sum(m for m in macs if m is not None),
        weights=tuple(dict.fromkeys(w for layer in layers for w in layer.weights)),
        members=tuple(layer.name for layer in layers),
    )
