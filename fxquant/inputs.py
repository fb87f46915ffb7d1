"""The inputs of a graph: bound as Python binds them, made up from records, fed node by node."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import CaptureError
from fxquant.metadata import DictRecord, TensorRecord, ValueRecord, record_of
from fxquant.shapes import as_arguments

_SEED = 0


class BoundInterpreter(fx.Interpreter):
    """An interpreter whose inputs are bound arguments, ``*args`` and ``**kwargs`` among them.

    Args:
        gm: the module.
        bound: its inputs.
    """

    def __init__(self, gm: fx.GraphModule, bound: inspect.BoundArguments) -> None:
        super().__init__(gm)
        self.bound = bound

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The bound value of an input."""
        return self.bound.arguments[str(target).lstrip("*")]


def bind_inputs(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """Bind the arguments of a call of ``gm``, defaults filled in.

    Raises:
        TypeError: they do not fit, in Python's words.
    """
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def bind_examples(gm: fx.GraphModule, example_inputs: object) -> inspect.BoundArguments:
    """Bind example inputs as ``prepare_fx`` takes them: a tuple, a dict, or the only input.

    Raises:
        TypeError: they do not fit.
    """
    args, kwargs = as_arguments(example_inputs)
    return bind_inputs(gm, args, kwargs)


def made_up_inputs(gm: fx.GraphModule) -> inspect.BoundArguments:
    """Inputs of the recorded shapes and dtypes: normal random floats, zeros for everything else.

    Raises:
        CaptureError: an input's shape is not known, or it is nothing that can be made up.
    """
    generator = torch.Generator().manual_seed(_SEED)
    values = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[str(node.target).lstrip("*")] = _made_up(node, generator)
    bound = inspect.signature(gm.forward).bind_partial()
    bound.arguments.update(values)
    return bound


def _made_up(node: fx.Node, generator: torch.Generator) -> Any:
    record = record_of(node)
    unknown = CaptureError(
        f"the input {str(node.target)!r} cannot be made up, as its shape is not recorded (the model"
        " was prepared without example inputs, or the input is no tensor): pass example_inputs"
    )
    if not record.has_value or str(node.target).startswith("**"):
        raise unknown
    if not isinstance(record.value, (TensorRecord, DictRecord, tuple)) and node.args:
        return node.args[0]  # its default
    if isinstance(record.value, str):
        raise unknown
    return _value(record.value, generator)


def _value(record: ValueRecord, generator: torch.Generator) -> Any:
    if isinstance(record, DictRecord):
        items = (_value(item, generator) for item in record.values)
        return dict(zip(record.keys, items, strict=True))
    if isinstance(record, tuple):
        return tuple(_value(item, generator) for item in record)
    if not isinstance(record, TensorRecord):
        return record
    return _tensor(record, generator)


def _tensor(record: TensorRecord, generator: torch.Generator) -> Tensor:
    if record.dtype.is_floating_point or record.dtype.is_complex:
        return torch.randn(record.shape, dtype=record.dtype, generator=generator)
    if record.dtype is torch.quint8:
        floats = torch.randn(record.shape, generator=generator)
        return torch.quantize_per_tensor(floats, 1 / 32, 128, record.dtype)
    return torch.zeros(record.shape, dtype=record.dtype)
