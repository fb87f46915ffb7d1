"""recognize-linear: ``x @ W + b -> linear(x, W^T, b)`` for constants ``W`` and ``b``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.op_view import Form, Op, attribute, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.rewriter import GraphRewriter


@dataclass(frozen=True)
class RecognizeLinear(Pass):
    """Write matrix products with a constant as the linears that they are.

    ::

        x @ W, mm(x, W)             ->  linear(x, W^T)
        addmm(b, x, W), x @ W + b   ->  linear(x, W^T, b)
        linear(x, W.t(), b)         ->  linear(x, W^T, b)
        einsum("...d,de->...e", x, W)

    A constant is no activation, so the product itself would run in FP32, and a weight that the
    graph transposes cannot be packed. ``W^T`` is a parameter of its own, one for each ``W``; in
    evaluation it shares the memory. Where ``W`` is transposed twice, as in ``h @ table.weight.t()``
    with a tied table, the weight is ``W`` itself.

    Refuses, where the graph trains, a ``W`` that others read: they would train apart.

    Attributes:
        trains: the graph is to train.
    """

    name: ClassVar[str] = "recognize-linear"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.QCONFIGS})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LINEARS_RECOGNIZED})

    trains: bool = False

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Rewrite in graph order."""
        rewriter = GraphRewriter(gm, self.name)
        made: dict[str, str] = {}
        refusals = []
        for node in list(gm.graph.nodes):
            if node._erased or record_of(node).qconfig is None:
                continue
            product = _product(gm, node)
            if product is None:
                continue
            reason = _others(product) if self.trains else ""
            if reason:
                before = record_of(node)
                add_reason(node, reason)
                rewriter.changes += record_of(node) != before
                refusals.append(Refusal(node=node.name, reason=reason))
                continue
            _rewrite(rewriter, product, made, trains=self.trains)
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product with a constant matrix.

    Attributes:
        node: gives it.
        source: what is multiplied.
        weight: reads the constant.
        steps: from there to what ``node`` reads, last first.
        transposed: the constant is ``[in, out]``.
        bias: reads the constant that is added, in ``node`` or behind it.
        addition: what adds the bias, if that is not ``node``.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    steps: tuple[fx.Node, ...]
    transposed: bool
    bias: fx.Node | None
    addition: fx.Node | None


def _product(gm: QuantGraphModule, node: fx.Node) -> _Product | None:
    found = _einsum(node) if node.target is torch.einsum else _factors(op_of(gm, node))
    if found is None:
        return None
    source, factor, bias, transposed = found
    weight, steps, turned = _constant(factor)
    if weight is None or not isinstance(source, fx.Node) or source.op == "get_attr":
        return None
    value = attribute(gm, str(weight.target))
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
        return None
    outputs = value.shape[1 if transposed != turned else 0]
    if bias is not None and not _is_bias(gm, bias, outputs):
        return None
    addition = None
    if bias is None:
        addition, bias = _added(gm, node, outputs)
    return _Product(
        node=node,
        source=source,
        weight=weight,
        steps=steps,
        transposed=transposed != turned,
        bias=bias,
        addition=addition,
    )


def _factors(op: Op | None) -> tuple[Any, Any, Any, bool] | None:
    """Source, factor, bias, and whether the factor is ``[in, out]``."""
    if op is None:
        return None
    given = op.arguments
    if op.name == "linear" and op.form is Form.FUNCTION and op.computes("weight"):
        return given["input"], given["weight"], given["bias"], False
    if op.name == "matmul":
        return given["input"], given["other"], None, True
    if op.name == "addmm" and (given["beta"], given["alpha"]) == (1, 1):
        return given["mat1"], given["mat2"], given["input"], True
    return None


def _einsum(node: fx.Node) -> tuple[Any, Any, None, bool] | None:
    """The same of ``"...d,de->...e"``, with any letters."""
    equation, *given = node.args
    operands = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    terms, _, result = str(equation).replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    if len(operands) != 2 or len(right) != 2 or not left or not right.isalpha():
        return None
    kept, inner = left[:-1], left[-1]
    outer = right.replace(inner, "", 1)
    letters = kept.replace("...", "") + right
    if len(outer) != 1 or result != kept + outer or len(set(letters)) != len(letters):
        return None
    return operands[0], operands[1], None, right[0] == inner


def _constant(factor: object) -> tuple[fx.Node | None, tuple[fx.Node, ...], bool]:
    """The read constant behind transpositions, those, and whether they are odd in number."""
    steps: list[fx.Node] = []
    while isinstance(factor, fx.Node) and _transposes(factor):
        steps.append(factor)
        factor = factor.args[0]
    found = isinstance(factor, fx.Node) and factor.op == "get_attr"
    return factor if found else None, tuple(steps), bool(len(steps) % 2)  # type: ignore[return-value]  # found


def _transposes(node: fx.Node) -> bool:
    """Whether ``node`` transposes, if it reads a matrix."""
    if node.target in ("t", torch.t) or node.kwargs:
        return node.target in ("t", torch.t)
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    rest = node.args[1:]
    order = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if node.target in ("permute", torch.permute):
        return [int(d) % 2 for d in order if isinstance(d, int)] == [1, 0]
    swaps = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
    return node.target in swaps and {d % 2 for d in order if isinstance(d, int)} == {0, 1}


def _is_bias(gm: QuantGraphModule, bias: object, outputs: int) -> bool:
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return False
    value = attribute(gm, str(bias.target))
    return isinstance(value, Tensor) and tuple(value.shape) == (outputs,)


def _added(
    gm: QuantGraphModule, node: fx.Node, outputs: int
) -> tuple[fx.Node | None, fx.Node | None]:
    """What adds a constant to the product, and nobody else reads; and that constant."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    op = None if user is None else op_of(gm, user)
    if user is None or op is None or op.name != "add" or record_of(user).qconfig is None:
        return None, None
    operands = (op.arguments["input"], op.arguments["other"])
    bias = operands[0] if operands[1] is node else operands[1]
    if op.arguments.get("alpha", 1) != 1 or not _is_bias(gm, bias, outputs):
        return None, None
    return user, bias


def _others(product: _Product) -> str:
    """Why a weight that trains cannot become another parameter; empty where it can."""
    if not product.transposed:
        return ""
    path = product.weight.target
    readers = [n for n in product.node.graph.nodes if n.op == "get_attr" and n.target == path]
    users = {user for reader in readers for user in reader.users}
    if users <= {product.node, *product.steps}:
        return ""
    return f"its weight {path!r} is read elsewhere too; transposed for int8, it would train apart"


def _rewrite(
    rewriter: GraphRewriter, product: _Product, made: dict[str, str], *, trains: bool
) -> None:
    node, weight = product.node, product.weight
    if product.transposed:
        path = str(weight.target)
        if path not in made:
            made[path] = rewriter.fresh_path(f"{path}_transposed")
            value = attribute(rewriter.gm, path)
            rewriter.set_tensor(made[path], _transposed(value, apart=trains))
        weight = rewriter.get_attr(made[path], before=node, like=node)
    bias = product.bias
    if product.addition is not None and bias is not None:
        bias = rewriter.get_attr(str(bias.target), before=node, like=node)
    read = [n for n in node.all_input_nodes if n is not product.source]
    rewriter.retarget(node, F.linear, (product.source, weight, bias))
    if product.addition is not None:
        constants = [n for n in product.addition.all_input_nodes if n is not node]
        rewriter.absorb(node, product.addition)
        rewriter.erase_dead(constants)
    rewriter.erase_dead([n for n in read if n not in (weight, bias)])
    gone = [step for step in reversed(product.steps) if step._erased]
    carried = (o for step in gone for o in record_of(step).origins)
    update_record(node, origins=(*record_of(node).origins, *carried))


def _transposed(value: Tensor, *, apart: bool) -> Tensor:
    turned = value.detach().t()
    turned = turned.clone(memory_format=torch.contiguous_format) if apart else turned
    if not isinstance(value, nn.Parameter):
        return turned
    return nn.Parameter(turned, requires_grad=value.requires_grad)
