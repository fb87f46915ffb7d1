"""Shapes and dtypes of every value, from one run with the example inputs.

The run is in fake mode (no arithmetic, no buffer written) and falls back to a real run on the
captured copy where a model's control flow needs real values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.errors import CaptureWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, map_value, update_record


class _Recorder(fx.Interpreter):
    """Runs a graph and records what every node gives."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            if not hasattr(error, "_fxquant_node"):
                error._fxquant_node = n  # type: ignore[attr-defined]  # carried to the message
            raise
        update_record(
            n,
            value=map_value(
                value, lambda t: TensorRecord(shape=tuple(int(s) for s in t.shape), dtype=t.dtype)
            ),
            has_value=True,
        )
        return value


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


def record_shapes(
    gm: QuantGraphModule, example_inputs: object, diagnostics: Diagnostics
) -> bool:
    """Run ``gm`` with the example inputs and record the shape and dtype of every value.

    Args:
        gm: a float graph; its buffers are not written.
        example_inputs: what the caller gave; ``None`` skips the run.
        diagnostics: takes the warning when the inputs do not run.

    Returns:
        Whether every node has a record now.
    """
    if example_inputs is None:
        return False
    args, kwargs = as_arguments(example_inputs)
    training = {module: module.training for module in gm.modules()}
    try:
        gm.eval()
        error = _run_fake(gm, args, kwargs)
        if error is not None:
            error = _run_real(gm, args, kwargs)
    finally:
        for module, flag in training.items():
            module.training = flag
    if error is None:
        gm.update_state(shapes_known=True)
        return True
    for node in gm.graph.nodes:
        update_record(node, value=None, has_value=False)
    diagnostics.warn(_explain_failure(error, example_inputs), CaptureWarning)
    return False


def _place(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments in placeholder order, as an interpreter wants them."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names = [str(n.target) for n in placeholders]
    unknown = sorted(set(kwargs) - set(names))
    if unknown or len(args) > len(placeholders):
        raise TypeError(
            f"the model takes {names}, the example inputs are {len(args)} positional value(s)"
            f" and the keywords {sorted(kwargs)}"
        )
    placed = list(args)
    for node, name in zip(placeholders[len(args) :], names[len(args) :], strict=True):
        if name in kwargs:
            placed.append(kwargs[name])
        elif node.args:
            placed.append(node.args[0])
        else:
            raise TypeError(f"the example inputs lack a value for {name!r}")
    return tuple(placed)


def _run_fake(
    gm: QuantGraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception | None:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fake = torch.utils._pytree.tree_map_only(
                torch.Tensor, mode.from_tensor, _place(gm, args, kwargs)
            )
            _Recorder(gm).run(*fake)
    except Exception as error:  # noqa: BLE001  # whatever a user's model raises is reported below
        return error
    return None


def _run_real(
    gm: QuantGraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception | None:
    try:
        with torch.no_grad():
            _Recorder(gm).run(*_place(gm, args, kwargs))
    except Exception as error:  # noqa: BLE001  # whatever a user's model raises is reported below
        return error
    return None


def _explain_failure(error: Exception, example_inputs: object) -> str:
    node = getattr(error, "_fxquant_node", None)
    where = f" at node {node.name!r} ({node.op} {node.target})" if node is not None else ""
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    args, kwargs = as_arguments(example_inputs)
    given = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    return (
        f"the example inputs ({', '.join(given)}) do not run on the model{where}: {cause}."
        " Shapes stay unknown, so residual adds are not fused and MACs are not counted; pass"
        " example inputs that the model accepts"
    )


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
