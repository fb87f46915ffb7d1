"""The list of operations of a float graph: what every later report counts against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from fxquant.attention import window_attention
from fxquant.dataflow import has_float_input, is_container, is_float_tensor, looks_up
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import OpEntry
from fxquant.metadata import TensorRecord, record_of, shape_of, tensor_records
from fxquant.op_catalog import COMPUTE_KINDS
from fxquant.op_view import Op, kind_of, op_of, type_name

_PRODUCTS = frozenset(
    {
        "addbmm",
        "addmm",
        "addmv",
        "baddbmm",
        "chain_matmul",
        "dot",
        "einsum",
        "inner",
        "multi_dot",
        "multi_head_attention_forward",
        "mv",
        "scaled_dot_product_attention",
        "tensordot",
    }
)
"""Functions and methods that multiply matrices and that the op catalogue has no kind for."""


def build_ledger(gm: QuantGraphModule) -> tuple[OpEntry, ...]:
    """One entry per operation that a float tensor enters, and island, in graph order.

    Args:
        gm: a float graph, nothing folded yet, with value records where example inputs ran.
    """
    entries = []
    islands = dict(gm.state.islands)
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        float_input = has_float_input(gm, node)
        reads = float_input or looks_up(gm, node) or str(node.target) in islands
        if not reads or is_container(node) or not _gives_tensors(gm, node):
            continue
        kind = kind_of(gm, node)
        path = str(node.target) if node.op == "call_module" else record_of(node).scope
        entries.append(
            OpEntry(
                name=node.name,
                kind=kind.name if kind is not None else type_name(gm, node),
                type_name=type_name(gm, node),
                path=path,
                macs=macs_of(gm, node),
                parameters=_parameters(gm, node),
                float_input=float_input,
            )
        )
    return tuple(entries)


def macs_of(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Multiply-accumulates of one call with the example inputs.

    Convolution: output elements x input channels per group x kernel elements; transposed: input
    elements x output channels per group x kernel elements; linear and matrix products: output
    elements x inner size; einsum: the product of all sizes; attention: its two matrix products;
    recurrent modules: time steps x batch x weight elements; element-wise and moving ops and
    look-ups: 0.

    Returns:
        ``None`` where the shapes are unknown, or what the op multiplies.
    """
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
            return _recurrent_macs(module, node)
    if node.target in _COUNTED:
        return _COUNTED[node.target](node)
    op = op_of(gm, node)
    if op is None:
        return None if _may_multiply(gm, node) else 0
    if op.name not in COMPUTE_KINDS:
        return 0
    output, source = shape_of(node), shape_of(op.activations[0]) if op.activations else None
    if output is None or source is None:
        return None
    if op.name in ("matmul", "bmm"):
        return math.prod(output) * source[-1]
    if op.name in ("baddbmm", "addmm"):
        factor = shape_of(op.activations[1])
        return None if factor is None else math.prod(output) * factor[-1]
    if op.name == "scaled_dot_product_attention":
        keys = shape_of(op.activations[1])
        return None if keys is None else (math.prod(source) + math.prod(output)) * keys[-2]
    weight = _weight_shape(op)
    if weight is None:
        return None
    if op.name.startswith("conv_transpose"):
        return math.prod(source) * math.prod(weight[1:])
    return math.prod(output) * math.prod(weight[1:])


def _window_macs(node: fx.Node) -> int | None:
    """Two products of each pixel, padding included, with those of its window."""
    output, window = shape_of(node), node.args[3]
    if output is None or not isinstance(window, (tuple, list)):
        return None
    batch, height, width, features = output
    rows, columns = (int(n) for n in window)  # type: ignore[arg-type]  # numbers: of the module
    pixels = batch * (height + -height % rows) * (width + -width % columns)
    return 2 * pixels * rows * columns * features


def _einsum_macs(node: fx.Node) -> int | None:
    """The product of all index sizes of an einsum of two tensors, without an ellipsis."""
    equation, *given = node.args
    operands = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    terms = str(equation).replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2 or len(operands) != 2:
        return None
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        shape = shape_of(operand) if isinstance(operand, fx.Node) else None
        if shape is None or len(shape) != len(term) or "." in term:
            return None
        sizes |= zip(term, shape, strict=True)
    return math.prod(sizes.values())


_COUNTED: Final[dict[Any, Callable[[fx.Node], int | None]]] = {
    torch.einsum: _einsum_macs,
    window_attention: _window_macs,
}
"""Functions that the catalogue does not bind -> what counts their multiply-accumulates."""


def _may_multiply(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an op that the catalogue cannot count may hold multiply-accumulates.

    A module with a weight matrix (an island, attention), a matrix product under another name,
    branches and loops of an exported graph, or a function that is not torch's.
    """
    kind = kind_of(gm, node)
    if kind is not None:
        return kind.name in COMPUTE_KINDS
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return any(parameter.dim() > 1 for parameter in module.parameters())
    if isinstance(node.target, HigherOrderOperator) or type_name(gm, node) in _PRODUCTS:
        return True
    origin = str(getattr(node.target, "__module__", None) or "").partition(".")[0]
    return node.op == "call_function" and origin not in ("", "torch", "_operator", "builtins")


def _weight_shape(op: Op) -> tuple[int, ...] | None:
    weight = op.constant("weight")
    if weight is not None:
        return tuple(weight.shape)
    node = op.arguments.get("weight")
    return shape_of(node) if isinstance(node, fx.Node) else None


def _recurrent_macs(module: torch.nn.Module, node: fx.Node) -> int | None:
    source = node.args[0] if node.args else None
    value = record_of(source).value if isinstance(source, fx.Node) else None
    if isinstance(value, tuple) and value:  # a packed sequence
        value = value[0]
    if not isinstance(value, TensorRecord):
        return None
    shape = value.shape
    weights = sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
    return math.prod(shape[:-1]) * weights


def _gives_tensors(gm: fx.GraphModule, node: fx.Node) -> bool:
    record = record_of(node)
    if record.has_value:
        return any(True for _ in tensor_records(record.value))
    return node.op == "call_module" or is_float_tensor(gm, node)


def _parameters(gm: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in gm.get_submodule(str(node.target)).parameters())
    return sum(
        math.prod(shape_of(argument) or ())
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    )
