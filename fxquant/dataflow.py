"""Questions about the values that flow along a graph."""

from __future__ import annotations

import builtins

from torch import fx

from fxquant.metadata import TensorRecord, record_of
from fxquant.op_view import kind_of

_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "device", "dtype", "is_cuda", "layout"})
_SHAPE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement"})


def reads_only_shape(node: fx.Node) -> bool:
    """Whether ``node`` reads the shape of its first argument and none of its values."""
    if node.op == "call_function" and node.target is builtins.getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


def value_users(node: fx.Node) -> list[fx.Node]:
    """The users of ``node`` that read its values, not only its shape."""
    return [user for user in node.users if not reads_only_shape(user)]


def is_float_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` gives one floating-point tensor.

    With value records this is known. Without them, inputs count as float tensors, known ops as
    giving what they read, and everything else as something else.
    """
    record = record_of(node)
    if record.has_value:
        return isinstance(record.value, TensorRecord) and record.value.dtype.is_floating_point
    if node.op == "placeholder":
        return True
    kind = kind_of(gm, node)
    if kind is None or kind.name == "slice":
        return False
    return any(is_float_tensor(gm, argument) for argument in node.all_input_nodes[:1])


def has_float_input(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a floating-point activation enters ``node``."""
    return any(
        argument.op != "get_attr" and is_float_tensor(gm, argument)
        for argument in node.all_input_nodes
    )
