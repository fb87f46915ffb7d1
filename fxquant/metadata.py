"""What fxquant remembers about a node: one frozen record under one key.

This module alone spells the key. A record never holds a ``Node``, a ``Module`` or a ``dict``:
``deepcopy`` of a ``GraphModule`` copies ``node.meta`` shallowly, and such a value would be shared
with, or point into, the old graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxquant.qconfig import QConfig
from fxquant.specs import QuantSpec

_KEY = "fxquant"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """Shape and dtype of a tensor, as seen with the example inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class DictRecord:
    """A dict, as seen with the example inputs."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


ValueRecord = TensorRecord | DictRecord | tuple[Any, ...] | int | float | bool | str | None
"""What the example inputs gave for a node: tensors as records, containers as tuples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionRecord:
    """Membership of a node in a matched pattern.

    Attributes:
        pattern: the pattern's name, such as ``conv2d-relu6``.
        group: the same number for all members of one match.
        role: the name that the pattern binds the node to (``conv``, ``relu``, ...).
        first: name of the first node of the match.
        last: name of the last node of the match: only its value leaves the pattern.
    """

    pattern: str
    group: int
    role: str
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """How an op is to be quantized, decided from its qconfig and the target's op table.

    Attributes:
        inputs: spec for each activation input, in the order of ``Op.activations``;
            ``None`` leaves that input in floating point.
        weight: spec of the weight, for ops that have one.
        output: spec of the output; ``None`` means that the op produces floating point.
        shares: the output (and all inputs) must have one scale and zero point.
    """

    inputs: tuple[QuantSpec | None, ...] = ()
    weight: QuantSpec | None = None
    output: QuantSpec | None = None
    shares: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """Everything that passes know about one node.

    Attributes:
        value: shape and dtype record, absent where example inputs did not run.
        has_value: tells an absent record from a recorded ``None``.
        scope: path of the module whose ``forward`` made the call.
        scope_types: classes of the modules from the root to that scope.
        call_index: this node's number among the calls of its type in its scope.
        qconfig: what governs the op; ``None`` is FP32.
        rule: the text of the rule that won.
        annotation: the specs, once decided.
        fusion: membership of a pattern.
        share_group: number of the group of tensors with one scale and zero point.
        reasons: why the op is in floating point, and other decisions, in order.
        origins: names of the float ops that this node carries out.
        kernel: the kernel of the target, once lowered.
        made_by: the pass that made the node.
        bound: argument position -> name of the buffer whose value is inlined, or read, there.
        takes_quantized: positions of arguments (of results, for the output) that are torch's
            quantized tensors once the graph is converted; see
            :func:`fxquant.rewriter.leaves_of`.
        gives_quantized: the value is such a tensor once the graph is converted.
        runs_in: float16 or bfloat16 where the op runs in it.
        stands_for: in a lowered graph: the node of the reference graph whose value this is.
        module: path of the module that was called here before its function was.
        is_number: the tensor is read as a number: a scale or a zero point.
    """

    value: ValueRecord = None
    has_value: bool = False
    scope: str = ""
    scope_types: tuple[type, ...] = ()
    call_index: int = 0
    qconfig: QConfig | None = None
    rule: str = ""
    annotation: Annotation | None = None
    fusion: FusionRecord | None = None
    share_group: int | None = None
    reasons: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    kernel: str = ""
    made_by: str = ""
    bound: tuple[tuple[int, str], ...] = ()
    stands_for: str = ""
    runs_in: torch.dtype | None = None
    takes_quantized: tuple[int, ...] = ()
    gives_quantized: bool = False
    module: str = ""
    is_number: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("reasons", str), ("origins", str)):
            for item in getattr(self, name):
                if not isinstance(item, kind):
                    raise TypeError(f"NodeRecord.{name} takes {kind.__name__}, not {item!r}")


EMPTY = NodeRecord()


def record_of(node: fx.Node) -> NodeRecord:
    """The record of ``node``; an empty one where nothing was recorded yet."""
    found = node.meta.get(_KEY, EMPTY)
    assert isinstance(found, NodeRecord)
    return found


def set_record(node: fx.Node, record: NodeRecord) -> None:
    """Replace the record of ``node``."""
    node.meta[_KEY] = record


def update_record(node: fx.Node, **changes: Any) -> NodeRecord:
    """Replace the given fields of the record of ``node`` and return the new record."""
    record = replace(record_of(node), **changes)
    node.meta[_KEY] = record
    return record


def fused_with(node: fx.Node) -> list[fx.Node]:
    """``node`` and the other members of its pattern, in graph order; they read each other."""
    fusion = record_of(node).fusion
    if fusion is None:
        return [node]
    found, pending = {node}, [node]
    while pending:
        one = pending.pop()
        for other in {*one.all_input_nodes, *one.users} - found:
            theirs = record_of(other).fusion
            if theirs is not None and theirs.group == fusion.group:
                found.add(other)
                pending.append(other)
    return sorted(found)


def add_reason(node: fx.Node, reason: str) -> None:
    """Append ``reason`` to the record of ``node``, once."""
    reasons = record_of(node).reasons
    if reason not in reasons:
        update_record(node, reasons=(*reasons, reason))


def tensor_records(value: ValueRecord) -> Iterator[TensorRecord]:
    """All tensor records inside ``value``, depth first."""
    if isinstance(value, TensorRecord):
        yield value
    elif isinstance(value, (tuple, DictRecord)):
        for item in value if isinstance(value, tuple) else value.values:
            yield from tensor_records(item)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor that ``node`` gives with the example inputs, or ``None``."""
    value = record_of(node).value
    return value.shape if isinstance(value, TensorRecord) else None


def map_value(value: object, make: Callable[[torch.Tensor], TensorRecord]) -> ValueRecord:
    """Turn what an interpreter saw into a :data:`ValueRecord`."""
    if isinstance(value, torch.Tensor):
        return make(value)
    if isinstance(value, (tuple, list)):
        return tuple(map_value(item, make) for item in value)
    if isinstance(value, dict):
        values = tuple(map_value(item, make) for item in value.values())
        return DictRecord(keys=tuple(value), values=values)
    if isinstance(value, (int, float, bool, str)) or value is None:
        return value
    return type(value).__name__
