"""Shapes and dtypes of every value, from one run with the example inputs.

The run is in fake mode (no arithmetic) and falls back to a real run where a model's control flow
needs real values.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from fxquant.errors import CaptureWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, ValueRecord, map_value, update_record
from fxquant.op_view import attribute, submodule
from fxquant.shape_rules import given_by_matmul, given_by_rule

_PACKAGE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a record of what every node gives, by the node's name.

    Args:
        gm: the graph.
        inputs: input name -> value.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Mapping[str, Any]) -> None:
        super().__init__(gm)
        self.inputs = inputs
        self.records: dict[str, ValueRecord] = {}

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.inputs[str(target)]

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            if not hasattr(error, "_fxquant_node"):
                error._fxquant_node = n  # type: ignore[attr-defined]  # carried to the message
            raise
        self.records[n.name] = map_value(
            value, lambda t: TensorRecord(shape=tuple(int(s) for s in t.shape), dtype=t.dtype)
        )
        return value


class _FakeRecorder(_Recorder):
    """Runs a graph in fake mode, on copies of what it reads: buffers, and modules that have to run.

    What is written in place is written even in fake mode, for tensors of one number are real there.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Mapping[str, Any]) -> None:
        super().__init__(gm, inputs)
        self._memo: dict[int, Any] = {id(tensor): tensor for tensor in gm.parameters()}
        self._copies: dict[str, Any] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = given_by_rule(submodule(self.module, str(target)), args, kwargs)
        return self._copy_of(str(target))(*args, **kwargs) if made is None else made

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = given_by_matmul(args, kwargs) if target is torch.matmul else None
        return super().call_function(target, args, kwargs) if made is None else made

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._copy_of(str(target))

    def _copy_of(self, target: str) -> Any:
        if target not in self._copies:
            with unset_fake_temporarily():
                copied = copy.deepcopy(attribute(self.module, target), self._memo)
            if isinstance(copied, nn.Module):
                copied.eval()
            self._copies[target] = copied
        return self._copies[target]


def is_user_code(filename: str) -> bool:
    """Whether a frame of a stack belongs neither to torch nor to fxquant."""
    path = Path(filename)
    inside = _PACKAGE in path.parents and _PACKAGE / "models_zoo" not in path.parents
    return not inside and _TORCH not in path.parents and not filename.startswith("<eval_with_key>")


def as_arguments(
    example_inputs: object,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what a caller gave as example inputs.

    A tuple or list is positional, a mapping with string keys is keywords, anything else is the
    only positional argument.
    """
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(k, str) for k in example_inputs):
        return (), dict(example_inputs)
    return (example_inputs,), {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Example inputs, bound to the parameters of a ``forward``.

    Attributes:
        values: one for every input of the traced graph, in the order in which fx makes them.
        fixed: inputs that are always ``None``, or a flag left at its default: what a trace may
            take for constant.
    """

    values: tuple[Any, ...]
    fixed: Mapping[str, Any]


def bind_examples(forward: Callable[..., Any], example_inputs: object) -> Examples | None:
    """Bind ``example_inputs`` to ``forward``, a function of a module and its inputs.

    Returns:
        ``None`` where there are none, or where they do not bind.
    """
    if example_inputs is None:
        return None
    args, kwargs = as_arguments(example_inputs)
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return None
    given = set(bound.arguments)
    bound.apply_defaults()
    parameters = list(signature.parameters.values())[1:]
    fixed = {
        p.name: bound.arguments[p.name]
        for p in parameters
        if bound.arguments[p.name] is None
        or (p.name not in given and isinstance(p.default, (bool, str)))
    }
    last = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    order = sorted(parameters, key=lambda p: last.index(p.kind) + 1 if p.kind in last else 0)
    return Examples(values=tuple(bound.arguments[p.name] for p in order), fixed=fixed)


def record_shapes(gm: QuantGraphModule, example_inputs: object, diagnostics: Diagnostics) -> bool:
    """Run ``gm`` with the example inputs and record the shape and dtype of every value.

    Args:
        gm: a float graph; a copy of it runs, so that neither a buffer is written nor an attribute.
        example_inputs: what the caller gave, which is not written either; ``None`` skips the run.
        diagnostics: takes the warning when the inputs do not run.

    Returns:
        Whether every node has a record now.
    """
    if example_inputs is None:
        return False
    records = _run(gm, example_inputs, fake=True)
    if isinstance(records, Exception):
        records = _run(gm, example_inputs, fake=False)
    if not isinstance(records, Exception):
        for node in gm.graph.nodes:
            update_record(node, value=records[node.name], has_value=True)
        gm.update_state(shapes_known=True)
        return True
    for node in gm.graph.nodes:
        update_record(node, value=None, has_value=False)
    diagnostics.warn(_explain_failure(records, example_inputs), CaptureWarning)
    return False


def _run(
    gm: QuantGraphModule, example_inputs: object, *, fake: bool
) -> dict[str, ValueRecord] | Exception:
    """The records of a run in evaluation mode, or why there are none."""
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            given = as_arguments(example_inputs)
            if fake:
                mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, given)
                recorder: _Recorder = _FakeRecorder(gm, _place(gm, args, kwargs))
            else:
                stack.enter_context(torch.random.fork_rng(devices=()))
                args, kwargs = tree_map_only(torch.Tensor, torch.clone, given)
                scratch = copy.deepcopy(gm, {id(tensor): tensor for tensor in gm.parameters()})
                recorder = _Recorder(scratch.eval(), _place(gm, args, kwargs))
            recorder.run()
    except Exception as error:  # noqa: BLE001  # whatever a user's model raises is reported
        return error
    return recorder.records


def _place(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Input name -> value, as Python would bind the arguments to a function of these inputs."""
    nodes = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
    free = [name for name in nodes if not name.startswith("*")]
    rest = next((name for name in nodes if name.startswith("*") and name[1] != "*"), None)
    if rest is not None:
        free = list(nodes)[: list(nodes).index(rest)]
    named = next((name for name in nodes if name.startswith("**")), None)
    unknown = sorted(set(kwargs) - set(nodes))
    if (unknown and named is None) or (len(args) > len(free) and rest is None):
        raise TypeError(
            f"the model takes {list(nodes)}, the example inputs are {len(args)} positional"
            f" value(s) and the keywords {sorted(kwargs)}"
        )
    placed = dict(zip(free, args, strict=False))
    for name, node in nodes.items():
        if name == rest:
            placed[name] = args[len(free) :]
        elif name == named:
            placed[name] = {key: kwargs[key] for key in unknown}
        elif name in kwargs:
            placed[name] = kwargs[name]
        elif name not in placed and node.args:
            placed[name] = node.args[0]
        elif name not in placed:
            raise TypeError(f"the example inputs lack a value for {name!r}")
    return placed


def _explain_failure(error: Exception, example_inputs: object) -> str:
    node = getattr(error, "_fxquant_node", None)
    where = f" at node {node.name!r} ({node.op} {node.target}{_line_of(node)})" if node else ""
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    args, kwargs = as_arguments(example_inputs)
    given = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    return (
        f"the example inputs ({', '.join(given)}) do not run on the model{where}: {cause}."
        " Shapes stay unknown, so residual adds are not fused and MACs are not counted; pass"
        " example inputs that the model accepts"
    )


def _line_of(node: fx.Node) -> str:
    """`` in file:line``: where the user's code made ``node``."""
    frames = re.findall(r'File "(.+)", line (\d+)', node.stack_trace or "")
    of_user = [f" in {name}:{line}" for name, line in frames if is_user_code(name)]
    return of_user[-1] if of_user else ""


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
