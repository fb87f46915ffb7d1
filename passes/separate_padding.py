"""separate-padding: ``Conv(x; padding_mode=m, padding=p) -> Conv(F.pad(x, p, m); padding=0)``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import fx, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, add_reason, record_of
from fxquant.op_view import Form, Op, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.rewriter import GraphRewriter

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class SeparatePadding(Pass):
    """Take ``reflect``, ``replicate`` and ``circular`` padding out of convolutions.

    int8 convolutions pad with zeros only. Padding that copies values is exact on integers, and is
    what the module itself does before it convolves. The convolution keeps its path, its weight and
    its name in reports. Refuses modules with forward hooks, which would see another input, and
    modules in an island, which calls them itself.
    """

    name: ClassVar[str] = "separate-padding"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QCONFIGS})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PADDING_SEPARATED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Pad before each call of such a module, and replace the module once."""
        rewriter = GraphRewriter(gm, self.name)
        plain: dict[str, nn.Module] = {}
        refusals = []
        for node in list(gm.graph.nodes):
            op = op_of(gm, node)
            if op is None or op.form is not Form.MODULE or op.name not in _CONVOLUTIONS:
                continue
            path = str(node.target)
            amounts = any(_amounts(gm.get_submodule(path)))
            if op.arguments["padding_mode"] == "zeros" or not amounts:
                continue
            reason = _refusal(gm, path)
            if reason is not None:
                refusals.append(Refusal(node=node.name, reason=reason))
                continue
            plain[path] = _without_padding(gm.get_submodule(path))
            _pad(rewriter, op)
        for path, module in plain.items():
            rewriter.set_module(path, module)
        return PassResult(changes=rewriter.finish(), refusals=tuple(refusals))


def _refusal(gm: QuantGraphModule, path: str) -> str | None:
    module = gm.get_submodule(path)
    if module._forward_hooks or module._forward_pre_hooks:
        return f"module {path!r} has forward hooks, which would see its input padded"
    island = next((name for name, _ in gm.state.islands if path.startswith(f"{name}.")), None)
    return None if island is None else f"the untraced module {island!r} calls {path!r} too"


def _without_padding(module: nn.Module) -> nn.Module:
    """The same module with the same parameters, but without padding."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._buffers = dict(module._buffers)
    made.padding = (0,) * len(_amounts(module)[::2])  # type: ignore[assignment]  # nn.Module types attributes as tensors or modules
    made.padding_mode = "zeros"  # type: ignore[assignment]  # as above
    made._reversed_padding_repeated_twice = [0] * len(_amounts(module))  # type: ignore[assignment]  # as above
    return made


def _amounts(module: nn.Module) -> list[int]:
    """Padding as ``F.pad`` takes it, last dimension first; also of ``padding="same"``."""
    amounts: list[int] = module._reversed_padding_repeated_twice  # type: ignore[assignment]  # as above
    return list(amounts)


def _pad(rewriter: GraphRewriter, op: Op) -> None:
    node, source = op.node, op.activations[0]
    record, mode = record_of(node), str(op.arguments["padding_mode"])
    amounts = _amounts(rewriter.gm.get_submodule(str(node.target)))
    padded = rewriter.call(
        F.pad,
        (source, amounts, mode),
        before=node,
        like=node,
        name=f"{node.name}_padded",
        value=_padded(source, amounts),
        has_value=record_of(source).has_value,
        qconfig=record.qconfig,
        rule=record.rule,
    )
    rewriter.replace_argument(node, source, padded)
    add_reason(node, f"{mode} padding runs before it, on its input")


def _padded(source: fx.Node, amounts: list[int]) -> object:
    """The value record of the padded input, where the shape of the input is known."""
    value = record_of(source).value
    if not isinstance(value, TensorRecord):
        return value
    shape = list(value.shape)
    for position in range(len(amounts) // 2):
        shape[-1 - position] += amounts[2 * position] + amounts[2 * position + 1]
    return replace(value, shape=tuple(shape))
