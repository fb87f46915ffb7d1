"""fuse-listed: functions of the user's backend config make one module of a pattern's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backend_config import BackendConfig, BackendPatternConfig
from fxquant.backend_patterns import MatchAllNode
from fxquant.errors import ConfigError, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import PassContext, PassResult, run_pass
from fxquant.passes.fuse_listed import FuseListed
from fxquant.targets.compat import compat_target
from tests.passes.helpers import captured, context, graph_text, lively

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A sum of a branch and the input, and a convolution whose value is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.last(self.relu(torch.add(self.bn(self.conv(x)), x))))
        z = self.last(y)
        return F.relu(z) + z


class Summed(nn.Module):
    """What the functions below make: a convolution of the first, the second added, a relu."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return F.relu(sum(others, self.base(x)))


def fuse_sum(is_qat: bool, relu: nn.Module, add_pattern: Any) -> nn.Module:
    function, (norm, base), other = add_pattern
    assert function is torch.add
    assert other is MatchAllNode
    with torch.no_grad():  # the copies are the function's own
        norm.running_mean.zero_()
    return Summed(nn.Sequential(base, norm))


def fuse_chain(is_qat: bool, base: nn.Module, relu: nn.Module) -> nn.Module:
    assert isinstance(relu, nn.ReLU)
    return Summed(base)


def residual() -> BackendPatternConfig:
    config = BackendPatternConfig().set_fuser_method(fuse_sum)
    config._set_pattern_complex_format(
        (nn.ReLU, (torch.add, (nn.BatchNorm2d, nn.Conv2d), MatchAllNode))
    )
    config._set_root_node_getter(lambda nodes: nodes[1][1][1])
    return config._set_extra_inputs_getter(lambda nodes: [nodes[1][2]])


def chain() -> BackendPatternConfig:
    return BackendPatternConfig((nn.Conv2d, F.relu)).set_fuser_method(fuse_chain)


def fuse(gm: QuantGraphModule, *configs: BackendPatternConfig) -> PassResult:
    target = compat_target(BackendConfig("mine").set_backend_pattern_configs(list(configs)))
    return run_pass(FuseListed(), gm, PassContext(target=target, diagnostics=Diagnostics()))


def test_golden(golden: Callable[[str, str], None]) -> None:
    model = lively(Residual())
    mean = model.bn.running_mean
    assert mean is not None
    before = mean.clone()
    gm = captured(model, IMAGES)
    result = fuse(gm, chain(), residual())
    golden("fuse-listed", graph_text(gm))
    assert result.changes
    assert torch.equal(mean, before)
    assert type(gm.conv) is Summed
    assert not hasattr(gm, "bn")
    assert type(gm.last) is nn.Conv2d  # called again, by what is not fused
    made = next(n for n in gm.graph.nodes if n.target == "conv")
    assert record_of(made).origins == ("conv", "bn", "add", "relu")
    assert "fused by fuse_sum()" in record_of(made).reasons
    with torch.no_grad():
        model.bn.running_mean = torch.zeros(3)
        torch.testing.assert_close(gm(IMAGES), model(IMAGES))
    assert fuse(gm, chain(), residual()) == PassResult(changes=0)


def test_a_value_that_others_read_is_not_fused() -> None:
    gm = captured(lively(Residual()), IMAGES)
    fuse(gm, chain())
    assert sum(type(gm.get_submodule(str(n.target))) is Summed for n in calls(gm)) == 1


def calls(gm: QuantGraphModule) -> list[Any]:
    return [node for node in gm.graph.nodes if node.op == "call_module"]


def test_without_functions_of_the_users_nothing_is_done() -> None:
    gm = captured(lively(Residual()), IMAGES)
    assert run_pass(FuseListed(), gm, context()) == PassResult(changes=0)
    assert fuse(gm, BackendPatternConfig((nn.Conv2d, nn.ReLU))) == PassResult(changes=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (chain().set_fuser_method(lambda *_: 3), r"returned 3 for 'relu_1'"),
        (chain()._set_root_node_getter(lambda nodes: nodes[0]), "no module of the match"),
        (chain()._set_extra_inputs_getter(lambda nodes: [1]), "returned 1 for 'relu_1'"),
    ],
)
def test_what_returns_something_else_is_told(config: BackendPatternConfig, message: str) -> None:
    gm = captured(lively(Residual()), IMAGES)
    with pytest.raises(ConfigError, match=message):
        fuse(gm, config)
