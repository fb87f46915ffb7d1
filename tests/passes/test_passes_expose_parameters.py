"""expose-parameters: what callers of torch.ao's API find by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.compat import QConfigMapping, convert_fx, prepare_fx
from fxquant.graph_module import QuantGraphModule
from fxquant.pass_manager import PassResult
from fxquant.passes.expose_parameters import ExposeParameters
from fxquant.qconfig import default_per_channel_qconfig
from tests.passes.helpers import graph_text, run_alone

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(4, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        z: Tensor = self.last(F.relu(y + y))
        return z


def lowered() -> QuantGraphModule:
    mapping = QConfigMapping().set_global(default_per_channel_qconfig)
    prepared = prepare_fx(Model().eval(), mapping, (X,))
    prepared(X)
    return convert_fx(prepared)


def test_functions_read_what_modules_hold(
    golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ExposeParameters, "run", lambda *_: PassResult(changes=0))
        gm = lowered()
    expected = gm(X)
    assert set(gm.state_dict()) >= {"linear_weight", "inner.bias", "inner_scale_0"}
    assert run_alone(ExposeParameters(), gm).changes
    golden("expose-parameters", graph_text(gm))
    assert torch.equal(gm(X), expected)
    assert run_alone(ExposeParameters(), gm) == PassResult(changes=0)


def test_state_dicts_hold_the_packed_weight_for_its_tensors() -> None:
    gm = lowered()
    state = gm.state_dict()
    assert isinstance(state["inner_packed_weight_0"], torch.ScriptObject)
    assert not {"linear_weight", "inner.bias", "inner_scale_0", "inner_zero_point_0"} & set(state)
    assert {"inner_scale_1", "inner_zero_point_1"} <= set(state)
    other = lowered()
    other.inner_packed_weight_0  # noqa: B018  # packed before the load
    other.inner.bias.data.zero_()
    other.linear_weight.zero_()
    other.rebuild_packed()
    assert not torch.equal(other(X), gm(X))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other(X), gm(X))
    assert torch.equal(other.linear_weight, gm.linear_weight)


def test_a_scale_that_is_read_may_change() -> None:
    gm = lowered()
    before = gm(X)
    gm.inner_scale_1.mul_(2)
    assert not torch.equal(gm(X), before)
