"""Changing the constants of an op, whatever form it is written in."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fxquant.op_view import Form, Op
from fxquant.rewriter import GraphRewriter


def store_parameter(
    rewriter: GraphRewriter, op: Op, name: str, value: Tensor, like: Tensor
) -> None:
    """Make ``value`` the constant ``name`` of ``op``, also where the op had none (``bias=None``).

    Args:
        rewriter: of the graph that holds the op.
        op: a module or function op with constants.
        name: ``weight`` or ``bias``.
        value: the new tensor.
        like: the parameter whose ``requires_grad`` it takes.
    """
    requires_grad = isinstance(like, nn.Parameter) and like.requires_grad
    parameter = nn.Parameter(value, requires_grad=requires_grad)
    path = op.constant_path(name)
    if path is not None:
        rewriter.set_tensor(path, parameter)
        return
    if op.form is Form.MODULE:
        rewriter.set_tensor(f"{op.node.target}.{name}", parameter)
        return
    weight_path = op.constant_path("weight")
    assert weight_path is not None
    holder = weight_path.rpartition(".")[0]
    path = rewriter.fresh_path(f"{holder}.{name}" if holder else name)
    rewriter.set_tensor(path, parameter)
    attribute = rewriter.get_attr(path, before=op.node, like=op.node)
    _set_argument(op, name, attribute)


def _set_argument(op: Op, name: str, value: fx.Node) -> None:
    names = [parameter for parameter, _ in op.kind.signature]
    position = names.index(name)
    node = op.node
    if position < len(node.args):
        args = list(node.args)
        args[position] = value
        node.args = tuple(args)
    else:
        node.kwargs = {**node.kwargs, name: value}
