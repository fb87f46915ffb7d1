"""functionalize: ``relu_(y); use(y)  ->  z = relu(y); use(z)``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import is_inplace, kind_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal

_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: torch.relu,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
    torch.clamp_: torch.clamp,
    torch.clip_: torch.clip,
    torch.clamp_min_: torch.clamp_min,
    torch.clamp_max_: torch.clamp_max,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
}
_VIEWS = frozenset(
    {
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "slice",
        "detach",
        "contiguous",
        "identity",
    }
)


@dataclass(frozen=True)
class Functionalize(Pass):
    """Replace ops that write their input by their out-of-place forms.

    Later readers of the overwritten value read the new value instead, which is what they saw.
    Refuses where the overwritten tensor is, or has, a view: a reader of the other name would see
    the change too.
    """

    name: ClassVar[str] = "functionalize"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Rewrite in-place ops; every refusal names the view that forbids it."""
        position = {node: index for index, node in enumerate(gm.graph.nodes)}
        changes, refusals = 0, []
        for node in list(gm.graph.nodes):
            if node.op not in ("call_module", "call_function", "call_method"):
                continue
            if not is_inplace(gm, node) or not node.args or not isinstance(node.args[0], fx.Node):
                continue
            written = node.args[0]
            views = _view_relatives(gm, written, node, position)
            if views:
                refusals.append(
                    Refusal(
                        node=node.name,
                        reason=f"{node.name!r} writes {written.name!r} in place, which shares"
                        f" memory with {', '.join(map(repr, views))}",
                        culprits=tuple(views),
                    )
                )
                continue
            if not _make_functional(gm, node):
                refusals.append(
                    Refusal(
                        node=node.name,
                        reason=f"{node.name!r} ({node.target}) has no known out-of-place form",
                    )
                )
                continue
            changes += 1
            for user in list(written.users):
                if user is not node and position.get(user, -1) > position[node]:
                    user.replace_input_with(written, node)
        if changes:
            gm.recompile()
        return PassResult(changes=changes, refusals=tuple(refusals))


def _view_relatives(
    gm: QuantGraphModule, written: fx.Node, writer: fx.Node, position: dict[fx.Node, int]
) -> list[str]:
    relatives = []
    kind = kind_of(gm, written)
    if kind is not None and kind.name in _VIEWS and written.all_input_nodes:
        base = written.all_input_nodes[0]
        if any(position.get(user, -1) > position[writer] for user in base.users):
            relatives.append(base.name)
    for user in written.users:
        user_kind = kind_of(gm, user)
        if user is writer or user_kind is None or user_kind.name not in _VIEWS:
            continue
        if position[user] < position[writer] and any(
            position.get(reader, -1) > position[writer] for reader in user.users
        ):
            relatives.append(user.name)
    return relatives


def _make_functional(gm: QuantGraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        gm.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]  # nn.Module types attributes as tensors or modules
        return True
    if node.kwargs.get("inplace", False) is True:
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
        return True
    if node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return True
    return False
