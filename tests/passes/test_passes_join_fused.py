"""join-fused: one module for what is fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.compat import fuse_fx, get_onednn_backend_config, prepare_fx
from fxquant.fused_modules import FusedLayers, FusedSum
from fxquant.pass_manager import PassResult
from fxquant.passes.join_fused import JoinFused
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from tests.passes.helpers import graph_text, lively, run_alone

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    """A batch-norm and a relu behind a layer, one relu behind two, and one behind a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.second, self.alone = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.third, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.drop(self.relu(self.second(x)))
        return F.relu(self.third(x)) + self.relu(self.alone(x))


class Sums(nn.Module):
    """Layers of which one gets something added, and activations that only onednn fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.linear, self.leaky = nn.Linear(6, 4), nn.LeakyReLU()
        self.last, self.tanh = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x + self.conv(x))
        z: Tensor = self.tanh(self.last(self.leaky(self.linear(y))))
        return z


def modules(gm: nn.Module) -> dict[str, str]:
    kinds = (FusedLayers, FusedSum)
    return {n: type(m).__name__ for n, m in gm.named_modules() if isinstance(m, kinds)}


def test_layers_and_relus(golden: Callable[[str, str], None]) -> None:
    model = lively(Model())
    gm = fuse_fx(model)
    golden("join-fused", graph_text(gm))
    assert dict.fromkeys(("first", "second", "third", "alone"), "FusedLayers") == modules(gm)
    assert not hasattr(gm, "norm")
    assert not hasattr(gm, "relu")
    torch.testing.assert_close(gm(X), model(X))
    assert torch.equal(torch.jit.script(gm)(X), gm(X))
    assert torch.equal(copy.deepcopy(gm)(X), gm(X))
    assert run_alone(JoinFused(), gm) == PassResult(changes=0)


def test_what_a_backend_config_fuses() -> None:
    model = lively(Sums())
    gm = fuse_fx(model, backend_config=get_onednn_backend_config())
    assert modules(gm) == {"conv": "FusedSum", "linear": "FusedLayers", "last": "FusedLayers"}
    assert not any(hasattr(gm, name) for name in ("relu", "leaky", "tanh"))
    assert torch.equal(gm(X), model(X))
    plain = fuse_fx(model)
    assert modules(plain) == {}
    assert torch.equal(plain(X), model(X))


def test_a_layer_that_is_called_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(F.relu(self.conv(x)))
            return y

    model = Twice().eval()
    gm = fuse_fx(model)
    assert modules(gm) == {}
    assert torch.equal(gm(X), model(X))


@pytest.mark.parametrize("model", [Model(), Sums()], ids=["layers", "sums"])
def test_fused_models_can_be_prepared(model: Any) -> None:
    model = lively(model)
    mapping = get_default_qconfig_mapping("x86")
    again, once = (prepare_fx(m, mapping, (X,)) for m in (fuse_fx(model), model))
    torch.testing.assert_close(again(X), once(X))
    observers = [
        sum("activation_post_process" in str(n.target) for n in gm.graph.nodes)
        for gm in (again, once)
    ]
    assert observers[0] == observers[1]
