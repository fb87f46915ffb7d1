"""Tracing with recorded shapes, and folding by its definition, for the pattern tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.metadata import TensorRecord, map_value, update_record
from fxquant.op_view import Form, Op
from fxquant.patterns.match import Match


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        record = map_value(
            value, lambda tensor: TensorRecord(shape=tuple(tensor.shape), dtype=tensor.dtype)
        )
        update_record(n, value=record, has_value=True)
        return value


def _trace(model: nn.Module, *inputs: Any, training: bool = False) -> fx.GraphModule:
    gm = fx.symbolic_trace(model.train(training))
    if inputs:
        state = copy.deepcopy(gm.state_dict())
        with torch.no_grad():
            _Recorder(gm).run(*copy.deepcopy(inputs))
        gm.load_state_dict(state)
    return gm


@pytest.fixture(scope="session")
def trace() -> Callable[..., fx.GraphModule]:
    """``trace(model, *inputs)``: the graph, with shapes where inputs are given."""
    return _trace


def _fold(matches: Iterable[Match]) -> None:
    """``BN(Conv(x; W, b)) -> Conv(x; W * g / s, (b - m) * g / s + beta)``, in place."""
    for match in matches:
        op, bn = match.ops
        constants = [bn.constant(name) for name in ("running_mean", "running_var")]
        weight, (mean, var) = op.constant("weight"), constants
        assert weight is not None
        assert mean is not None
        assert var is not None
        scale = (var + bn.arguments["eps"]).rsqrt()
        gamma, beta, bias = bn.constant("weight"), bn.constant("bias"), op.constant("bias")
        scale = scale if gamma is None else scale * gamma
        shift = -mean if bias is None else bias - mean
        shift = shift * scale if beta is None else shift * scale + beta
        if op.name.startswith("conv_transpose"):
            groups = int(op.arguments["groups"])
            per_group = scale.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
            factor = per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
        else:
            factor = scale.reshape(-1, *[1] * (weight.dim() - 1))
        _set_constants(op, weight=(weight * factor).detach(), bias=shift.detach())
        bn.node.replace_all_uses_with(op.node)
        match.gm.graph.erase_node(bn.node)
    for match in matches:
        match.gm.recompile()


def _set_constants(op: Op, **tensors: torch.Tensor) -> None:
    """Give ``op``, and nobody else, these parameters."""
    for name, tensor in tensors.items():
        if op.form is Form.MODULE:
            setattr(op.owner.get_submodule(str(op.node.target)), name, nn.Parameter(tensor))
            continue
        path = f"_folded_{op.node.name}_{name}"
        op.owner.register_parameter(path, nn.Parameter(tensor))
        with op.owner.graph.inserting_before(op.node):
            node = op.owner.graph.get_attr(path)
        position = [parameter for parameter, _ in op.kind.signature].index(name)
        kwargs = {key: value for key, value in op.node.kwargs.items() if key != name}
        if position < len(op.node.args):
            op.node.update_arg(position, node)
        else:
            kwargs[name] = node
        op.node.kwargs = kwargs


@pytest.fixture(scope="session")
def fold() -> Callable[[Iterable[Match]], None]:
    """Folds matches of batch-norm patterns by the formula; what a pass would do."""
    return _fold
