"""Questions about the values that flow along a graph."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, fx

from fxquant.metadata import TensorRecord, record_of
from fxquant.op_catalog import OpKind
from fxquant.op_view import attribute, kind_of

_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "device", "dtype", "is_cuda", "layout"})
_SHAPE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement"})


def reads_only_shape(node: fx.Node) -> bool:
    """Whether ``node`` reads the shape of its first argument and none of its values."""
    if node.op == "call_function" and node.target is builtins.getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


def is_container(node: fx.Node) -> bool:
    """Whether ``node`` only puts values together: a call of a dataclass or a named tuple."""
    kind = node.target
    if node.op != "call_function" or not isinstance(kind, type):
        return False
    return is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def fields_of(value: Any) -> dict[str, Any]:
    """What a dataclass is made of again: field -> value, but what is at its default."""
    given = {f.name: (getattr(value, f.name), f.default) for f in fields(value) if f.init}
    return {name: item for name, (item, default) in given.items() if item is not default}


def value_users(node: fx.Node) -> list[fx.Node]:
    """The users of ``node`` that read its values, not only its shape."""
    return [user for user in node.users if not reads_only_shape(user)]


def is_number(node: fx.Node) -> bool:
    """Whether ``node`` gives a number, a size or a tuple of them, and no tensor.

    With value records this is known; without them, sizes and what is computed from them are.
    """
    record = record_of(node)
    if record.has_value:
        values = record.value if isinstance(record.value, tuple) else (record.value,)
        return not any(isinstance(value, TensorRecord) for value in values)
    if reads_only_shape(node):
        return True
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and all(map(is_number, sources))


def is_float_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` gives one floating-point tensor.

    With value records this is known. Without them, an op with a weight takes and gives float
    tensors, another known op gives what it reads, inputs count as float tensors, and everything
    else as something else.
    """
    return _float_tensor(gm, node) is not False


def is_surely_float_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    """As :func:`is_float_tensor`, but an input that only may be a float tensor is none."""
    return _float_tensor(gm, node) is True


def is_presumably_float(gm: fx.GraphModule, node: fx.Node) -> bool:
    """As :func:`is_float_tensor`, but what is not known to be something else is a float tensor.

    Without value records, something else are sizes and what is computed from them, comparisons,
    lists of pieces, and what is read as a mask, an index or a size.
    """
    if record_of(node).has_value or node.op == "get_attr":
        return is_float_tensor(gm, node)
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return not (is_number(node) or target.strip("_") in _NO_FLOAT_TENSORS or _is_mask_or_size(node))


_NO_FLOAT_TENSORS = frozenset(
    {"gt", "ge", "lt", "le", "eq", "ne", "and", "or", "xor", "not", "invert", "isnan", "argmax"}
    | {"logical_and", "logical_or", "logical_xor", "logical_not", "argmin", "len", "tolist"}
    | {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "topk", "sort"}
)
_READS_TENSOR_FIRST = frozenset(
    {"view", "reshape", "permute", "repeat", "repeat_interleave", "expand", "transpose", "flatten"}
    | {"squeeze", "unsqueeze", "narrow", "select", "masked_fill", "masked_fill_", "masked_select"}
)
_ARITHMETIC = frozenset({"add", "sub", "mul", "floordiv", "truediv", "mod", "neg"})
_KEEPS_MEANING = frozenset({"unsqueeze", "squeeze", "view", "reshape", "expand", "to"})


def _is_mask_or_size(node: fx.Node) -> bool:
    """Whether some reader takes ``node``, perhaps in another shape, for a mask, index or size."""
    for user in node.users:
        target = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if target in _ARITHMETIC and _is_mask_or_size(user):
            return True
        if target not in _READS_TENSOR_FIRST:
            continue
        if not user.args or user.args[0] is not node:
            return True
        if target in _KEEPS_MEANING and _is_mask_or_size(user):
            return True
    return False


def _float_tensor(gm: fx.GraphModule, node: fx.Node) -> bool | None:
    """``None`` where ``node`` gives what an input is of which nothing is known."""
    current = node
    while True:
        record = record_of(current)
        if record.has_value:
            return isinstance(record.value, TensorRecord) and record.value.dtype.is_floating_point
        if current.op == "get_attr":
            value = attribute(gm, str(current.target))
            return isinstance(value, Tensor) and value.is_floating_point()
        kind = kind_of(gm, current)
        if kind is not None and not kind.gives_floats:
            return False
        if kind is not None and kind.constants:
            return True
        if any(_must_be_float(gm, current, user) for user in current.users):
            return True
        if current.op == "placeholder":
            return False if str(current.target).startswith("*") else None
        sources = [source for source in current.all_input_nodes if source.op != "get_attr"]
        if kind is None or kind.name == "slice" or not sources:
            return False
        current = sources[0]


def _must_be_float(gm: fx.GraphModule, value: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` reads ``value`` where only a float tensor can stand."""
    kind = kind_of(gm, user)
    if kind is None or not kind.activations or not (kind.constants or kind.definition):
        return False
    return _first_activation(kind, user) is value


def _first_activation(kind: OpKind, node: fx.Node) -> object:
    return node.args[0] if node.args else node.kwargs.get(kind.activations[0])


def has_float_input(
    gm: fx.GraphModule,
    node: fx.Node,
    is_float: Callable[[fx.GraphModule, fx.Node], bool] = is_float_tensor,
) -> bool:
    """Whether a floating-point activation enters ``node``, by the given notion of one."""
    return any(
        argument.op != "get_attr" and (is_float(gm, argument) or _is_packed(argument))
        for argument in node.all_input_nodes
    )


def _is_packed(node: fx.Node) -> bool:
    """Whether ``node`` gives a packed sequence of floats: data, batch sizes, and two orders."""
    value = record_of(node).value
    if not isinstance(value, tuple) or len(value) != 4:
        return False
    data, sizes = value[:2]
    return (
        isinstance(data, TensorRecord)
        and data.dtype.is_floating_point
        and isinstance(sizes, TensorRecord)
        and not sizes.dtype.is_floating_point
    )


def looks_up(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` reads rows of a float table by integers, as an embedding does."""
    kind = kind_of(gm, node)
    return kind is not None and not kind.activations
