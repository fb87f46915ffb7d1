"""insert-observers: one observer per tensor and spec, read by everyone who wants that spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxquant.dataflow import is_float_tensor
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.metadata import add_reason, record_of
from fxquant.op_view import op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.qconfig import QConfig
from fxquant.rewriter import GraphRewriter
from fxquant.specs import QuantSpec
from fxquant.targets.table import Target

OBSERVER_PREFIX = "activation_post_process_"


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Insert observers as root modules ``activation_post_process_N``.

    The output of a quantized op is observed by its own qconfig and read by all; another value is
    observed for those of its readers that want integers, once per spec. Values that an op merely
    moves (pooling, reshape, cat, ...) have the range of their sources and need no observer. Readers
    whose integers are others (int16 behind int8, 4 bits behind 8) observe again what they read.
    """

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ANNOTATED, Fact.SHARED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Insert after each observed value, in graph order."""
        if gm.state.stage is Stage.PREPARED:
            return PassResult(changes=0)
        rewriter = GraphRewriter(gm, self.name)
        requests = _requests(gm, context.target)
        device = device_of(gm)
        number = 0
        for value in list(gm.graph.nodes):
            given = value  # what readers get: the value, or its quantized form
            for request in requests.get(value, []):
                path = f"{OBSERVER_PREFIX}{number}"
                number += 1
                observer = request.qconfig.activation()
                observer.owner = f"{path} (output of {value.name!r})"
                gm.add_module(path, on_device(observer, device))
                node = rewriter.module_call(
                    path,
                    (given if request.again else value,),
                    after=given if request.again else value,
                    like=value,
                    share_group=None if request.apart else _group(value),
                    qconfig=request.qconfig,
                )
                for reader in request.readers:
                    rewriter.replace_argument(reader, given if request.again else value, node)
                if request.own:
                    given = node
                elif request.again:
                    _tell_of_again(value, request)
        gm.update_state(stage=Stage.PREPARED)
        rewriter.changes += 1
        return PassResult(changes=rewriter.finish())


def _tell_of_again(value: fx.Node, request: _Request) -> None:
    """Say that an op reads other integers than its source gives."""
    produced = _output_spec(value)
    if produced is None or request.spec.is_dynamic:
        return
    for reader in request.readers:
        add_reason(
            reader,
            f"{value.name!r} is {produced.short()} for others, and is quantized again to"
            f" {request.spec.short()} for this",
        )


@dataclass(kw_only=True)
class _Request:
    """An observer to insert: what it looks for, by whose qconfig, and who reads it.

    Attributes:
        own: by the op that gives the value, for all readers.
        again: for readers that want other integers than the value has.
    """

    spec: QuantSpec
    qconfig: QConfig
    readers: list[fx.Node]
    own: bool = False
    again: bool = False

    @property
    def apart(self) -> bool:
        """Whether the observer shares no parameters with what the value is grouped with."""
        return self.again or self.spec.is_dynamic


def _requests(gm: QuantGraphModule, target: Target) -> dict[fx.Node, list[_Request]]:
    requests: dict[fx.Node, list[_Request]] = {}
    for node in gm.graph.nodes:
        record = record_of(node)
        annotation = record.annotation
        if annotation is None or record.qconfig is None:
            continue
        for source, spec in external_inputs(gm, node):
            if source.op == "get_attr":
                continue  # a constant operand stays in floating point
            produced = _output_spec(source)
            if produced is not None and _holds(target, spec, produced):
                continue  # its producer decides
            again = produced is not None
            found = requests.setdefault(source, [])
            request = next((r for r in found if r.spec == spec and r.again == again), None)
            if request is None:
                found.append(
                    _Request(spec=spec, qconfig=record.qconfig, readers=[node], again=again)
                )
            elif node not in request.readers:
                request.readers.append(node)
        ends = record.fusion is None or record.fusion.last == node.name
        if ends and annotation.output is not None and not annotation.shares:
            requests.setdefault(node, []).append(
                _Request(
                    spec=annotation.output,
                    qconfig=record.qconfig,
                    readers=list(node.users),
                    own=True,
                )
            )
    return requests


def _holds(target: Target, wanted: QuantSpec, produced: QuantSpec) -> bool:
    """Whether a reader of ``wanted`` can take the integers that are there."""
    if wanted.is_dynamic:
        return False
    low, high = target.saturation(wanted)
    least, most = target.saturation(produced)
    return wanted.dtype is produced.dtype and low <= least and most <= high


def external_inputs(
    gm: QuantGraphModule,
    node: fx.Node,
    is_float: Callable[[fx.GraphModule, fx.Node], bool] = is_float_tensor,
) -> list[tuple[fx.Node, QuantSpec]]:
    """The activations of an annotated op that come from outside its pattern, with their specs.

    Args:
        gm: the graph.
        node: the op.
        is_float: what counts as an activation.
    """
    record = record_of(node)
    annotation, op = record.annotation, op_of(gm, node)
    if annotation is None or op is None or op.kind.definition:
        return []  # recurrent modules quantize inside, at every step
    spec = next((s for s in annotation.inputs if s is not None), None)
    if spec is None:
        return []
    fusion = record.fusion
    inside = fusion is not None and fusion.first != node.name
    if inside and annotation.output is None:
        return []  # the kernel writes float, so this member runs in float
    found = []
    for source in op.activations:
        other = record_of(source).fusion
        if fusion is not None and other is not None and other.group == fusion.group:
            continue
        if is_float(gm, source):
            found.append((source, spec))
    return found


def _output_spec(value: fx.Node) -> QuantSpec | None:
    annotation = record_of(value).annotation
    return annotation.output if annotation is not None else None


def _group(value: fx.Node) -> int | None:
    return record_of(value).share_group


def device_of(gm: nn.Module) -> torch.device | None:
    """The device of all parameters of ``gm``; ``None`` where they are on several, or none."""
    devices = {parameter.device for parameter in gm.parameters()}
    return devices.pop() if len(devices) == 1 else None


def on_device(observer: nn.Module, device: torch.device | None) -> nn.Module:
    """``observer`` on a device; where it is without one."""
    tensors = (*observer.parameters(), *observer.buffers())
    if device is None or all(tensor.device == device for tensor in tensors):
        return observer
    return observer.to(device)
