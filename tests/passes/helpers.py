"""Graphs as text, passes run alone or behind others, and models with lively batch-norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.capture import capture
from fxquant.errors import Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.ledger import build_ledger
from fxquant.metadata import Annotation, TensorRecord, record_of
from fxquant.op_view import type_name
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, run_pass
from fxquant.passes.insert_observers import OBSERVER_PREFIX
from fxquant.passes.propagate_qconfigs import PropagateQConfigs
from fxquant.pipelines import prepare_pipeline
from fxquant.qconfig_mapping import get_default_qconfig_mapping, normalize
from fxquant.shapes import record_shapes
from fxquant.targets.registry import target_named

Module = TypeVar("Module", bound=nn.Module)


def lively(model: Module, seed: int = 0) -> Module:
    """``model`` in evaluation mode, its batch-norms with statistics that a wrong fold shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                size = module.running_mean.shape
                module.running_mean.copy_(torch.randn(size, generator=generator))
                assert module.running_var is not None
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return model.eval()


class Around(nn.Module):
    """``function`` with an op before it and one behind it, which stay whatever becomes of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x * 2) + 1


def context(*, strict: bool = False) -> PassContext:
    """What a pass runs with, on the target ``x86``."""
    return PassContext(target=target_named("x86"), diagnostics=Diagnostics(strict=strict))


def captured(model: nn.Module, *inputs: Any) -> QuantGraphModule:
    """The float graph that pipelines begin with; shapes are known where inputs are given."""
    gm = capture(model, Diagnostics(), inputs or None)
    record_shapes(gm, inputs or None, Diagnostics())
    gm.update_state(target="x86", ledger=build_ledger(gm))
    return gm


def propagate(model: nn.Module, mapping: object = None) -> PropagateQConfigs:
    """The pass that begins a prepare pipeline, for ``model``."""
    chosen = get_default_qconfig_mapping("x86") if mapping is None else normalize(mapping)
    return PropagateQConfigs(chosen, tuple(name for name, _ in model.named_modules()))


def run_before(
    wanted: type[Pass], gm: QuantGraphModule, model: nn.Module, mapping: object = None
) -> PassContext:
    """Run, checked, what the prepare pipeline runs before ``wanted``."""
    shared = context()
    chosen = propagate(model, mapping)
    for one in prepare_pipeline(chosen.mapping, chosen.known_paths).passes:
        if isinstance(one, wanted):
            break
        run_pass(one, gm, shared)
    return shared


def run_alone(one: Pass, gm: QuantGraphModule) -> PassResult:
    """Run one pass, checked by the manager."""
    assert one.requires <= set(Fact)
    return run_pass(one, gm, context())


def graph_text(gm: QuantGraphModule) -> str:
    """The graph, a node a line: name, call, shape, and what the passes recorded."""
    return "\n".join(_line(gm, node) for node in gm.graph.nodes)


def _line(gm: QuantGraphModule, node: fx.Node) -> str:
    called = {
        "placeholder": lambda: "input",
        "output": lambda: "return",
        "get_attr": lambda: f"read {node.target}",
    }.get(node.op, lambda: _called(gm, node))()
    arguments = [_argument(a) for a in node.args] if node.op != "placeholder" else []
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    record = record_of(node)
    notes = []
    if isinstance(record.value, TensorRecord):
        dtype = str(record.value.dtype).removeprefix("torch.")
        notes.append(f"{dtype}{list(record.value.shape)}")
    if record.fusion is not None:
        notes.append(f"{record.fusion.pattern} #{record.fusion.group} {record.fusion.role}")
    if record.annotation is not None:
        notes.append(_annotation(record.annotation))
    if record.runs_in is not None:
        notes.append(f"runs in {str(record.runs_in).removeprefix('torch.')}")
    if record.share_group is not None:
        notes.append(f"group {record.share_group}")
    lines = [f"{node.name} = {called}({', '.join(arguments)})  # {'; '.join(notes)}".rstrip(" #")]
    lines += [f"    because {reason}" for reason in record.reasons]
    return "\n".join(lines)


def _called(gm: QuantGraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        flag = " inplace" if getattr(module, "inplace", False) else ""
        return f"{type(module).__name__}{flag} {node.target}"
    return f".{node.target}" if node.op == "call_method" else type_name(gm, node)


def _argument(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_argument, value))}]"
    return value.name if isinstance(value, fx.Node) else repr(value)


def _annotation(annotation: Annotation) -> str:
    inputs = [spec.short() if spec is not None else "float" for spec in annotation.inputs]
    output = annotation.output.short() if annotation.output is not None else "float"
    weight = f", weight {annotation.weight.short()}" if annotation.weight is not None else ""
    shares = ", shares" if annotation.shares else ""
    return f"in [{', '.join(inputs)}]{weight}, out {output}{shares}"


def observers(gm: fx.GraphModule) -> dict[str, str]:
    """Observer -> the value that it watches, in graph order."""
    return {
        str(node.target): node.all_input_nodes[0].name
        for node in gm.graph.nodes
        if node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)
    }


def node_named(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node of that name."""
    return next(node for node in gm.graph.nodes if node.name == name)


def reasons(gm: fx.GraphModule, name: str) -> str:
    """The reasons of one node, one a line."""
    return "\n".join(record_of(node_named(gm, name)).reasons)
