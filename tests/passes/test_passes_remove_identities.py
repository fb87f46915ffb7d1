"""remove-identities: what gives its input unchanged goes, and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.remove_identities import RemoveIdentities
from tests.passes.helpers import Around, captured, graph_text, run_alone

Function = Callable[..., Any]


def torchvision_is_there() -> bool:
    return importlib.util.find_spec("torchvision") is not None


IDENTITIES: dict[str, Function] = {
    "Identity": nn.Identity(),
    "Dropout": nn.Dropout(),
    "Dropout in place": nn.Dropout(inplace=True),
    "Dropout1d": nn.Dropout1d(),
    "Dropout2d": nn.Dropout2d(),
    "Dropout3d": nn.Dropout3d(),
    "F.dropout": lambda x: F.dropout(x, training=False),
    "F.dropout with nothing to drop": lambda x: F.dropout(x, 0.0),
    "detach": lambda x: x.detach(),
    "torch.detach": torch.detach,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_removed(name: str) -> None:
    model = Around(IDENTITIES[name]).eval()
    dimensions = {"Dropout1d": 3, "Dropout2d": 4, "Dropout3d": 5}.get(name, 2)
    x = torch.randn(2, 3, 4, 4, 4)[(..., *[0] * (5 - dimensions))]
    gm = captured(model, x)
    run_alone(Functionalize(), gm)
    result = run_alone(RemoveIdentities(), gm)
    assert result.changes > 0
    assert [n.name for n in gm.graph.nodes if n.op != "placeholder"] == ["mul", "add", "output"]
    assert len(gm.state.fates) == 1
    assert gm.state.fates[0][1].startswith("removed: ")
    assert torch.equal(gm(x), model(x))
    before = fingerprint(gm)
    assert run_alone(RemoveIdentities(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before


def test_the_fate_is_that_of_the_op_of_the_float_graph() -> None:
    gm = captured(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval(), torch.randn(1, 2))
    run_alone(RemoveIdentities(), gm)
    dropped = next(entry for entry in gm.state.ledger if entry.kind == "dropout")
    assert [name for name, _ in gm.state.fates] == [dropped.name]


DIFFERENT: dict[str, Function] = {
    "F.dropout as it is by default": F.dropout,
    "a function": lambda x: F.alpha_dropout(x, 0.5, True),
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_left_alone(name: str) -> None:
    gm = captured(Around(DIFFERENT[name]).eval(), torch.randn(2, 3))
    assert run_alone(RemoveIdentities(), gm) == PassResult(changes=0)


def test_dropout_in_training_mode_stays() -> None:
    model = Around(nn.Dropout(0.5)).train()
    gm = captured(model, torch.randn(2, 3))
    assert run_alone(RemoveIdentities(), gm) == PassResult(changes=0)
    assert (gm(torch.ones(100, 100)) == 1).any()  # dropped


def test_a_module_with_a_hook_stays() -> None:
    model = Around(nn.Identity()).eval()
    model.function.register_forward_hook(lambda module, inputs, output: output * 3)
    x = torch.randn(2, 3)
    gm = captured(model, x)
    assert run_alone(RemoveIdentities(), gm) == PassResult(changes=0)
    assert torch.equal(gm(x), model(x))


@pytest.mark.skipif(not torchvision_is_there(), reason="needs torchvision")
@pytest.mark.parametrize("training", [False, True])
def test_stochastic_depth_of_torchvision(training: bool) -> None:
    import_torchvision()
    ops = importlib.import_module("torchvision.ops")
    model = Around(ops.StochasticDepth(0.5, "row")).train(training)
    gm = captured(model, torch.randn(2, 3))
    kept = [entry.kind for entry in gm.state.ledger]
    assert "stochastic_depth" in kept
    result = run_alone(RemoveIdentities(), gm)
    assert result.changes == (0 if training else 2)
    x = torch.ones(100, 3)
    assert (gm(x) == 3).all() != training


class OfTuple(nn.Module):
    """An Identity lets everything through, not only a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pair = self.identity((x, x * 2))
        return pair[1]


def test_an_identity_of_a_tuple_stays() -> None:
    x = torch.randn(2, 3)
    gm = captured(OfTuple().eval(), x)
    run_alone(RemoveIdentities(), gm)
    assert torch.equal(gm(x), x * 2)


def test_one_module_called_twice_is_removed_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.dropout(x) + 1)

    gm = captured(Twice().eval(), torch.randn(2))
    run_alone(RemoveIdentities(), gm)
    assert len(gm.state.fates) == 2
    assert not hasattr(gm, "dropout")


def test_golden(golden: Callable[[str, str], None]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Identity(), nn.ReLU()).eval()
    gm = captured(model, torch.randn(2, 3))
    before = graph_text(gm)
    run_alone(RemoveIdentities(), gm)
    golden("remove-identities", f"{before}\n\n-- remove-identities -->\n\n{graph_text(gm)}")
