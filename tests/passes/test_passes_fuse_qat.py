"""fuse-qat: which batch-norms train inside the op before them, and which stay and say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import PassResult
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.fuse_qat import TRANSPOSED, FuseQat
from fxquant.qat_modules import QatBatchNormed
from tests.passes.helpers import captured, graph_text, lively, node_named, reasons, run_alone

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Module and function forms, a reused norm, a value read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.bn_of_function = nn.BatchNorm2d(4)
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.bn_apart = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.bn_up = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)
        self.bn_fc = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.bn_of_function(F.conv2d(x, self.kernel))
        y = self.read_twice(x)
        x = self.bn_up(self.up(self.bn_apart(y) + y))
        return self.bn_fc(self.fc(x.mean((2, 3))))


def fused(model: nn.Module, *inputs: Any) -> tuple[QuantGraphModule, PassResult]:
    gm = captured(model, *inputs)
    run_alone(Functionalize(), gm)
    result = run_alone(FuseQat(), gm)
    assert run_alone(FuseQat(), gm).changes == 0
    return gm, result


@pytest.mark.parametrize("training", [True, False])
def test_it_computes_and_updates_what_the_model_does(training: bool) -> None:
    model = lively(Mixed()).train(training)
    gm, result = fused(model, IMAGES)
    assert gm.training is training
    torch.testing.assert_close(gm(IMAGES), model(IMAGES), rtol=0, atol=0)
    norms = [m for m in gm.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    theirs = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    means = {tuple(m.running_mean.tolist()) for m in norms}  # type: ignore[union-attr]
    assert means == {tuple(m.running_mean.tolist()) for m in theirs}  # type: ignore[union-attr]
    assert [r.node for r in result.refusals] == ["read_twice"]
    assert "also used by 'add'" in reasons(gm, "bn_apart")


def test_names_and_parameters_are_those_of_the_first_op() -> None:
    model = Mixed()
    gm, _ = fused(model, IMAGES)
    assert [n for n, m in gm.named_modules() if isinstance(m, QatBatchNormed)] == [
        "conv",
        "conv2d",
        "up",
        "fc",
    ]
    assert not hasattr(gm, "bn")
    assert record_of(node_named(gm, "conv")).origins == ("conv", "bn")
    assert record_of(node_named(gm, "conv2d")).origins == ("conv2d", "bn_of_function")
    names = set(dict(gm.named_parameters()))
    assert {"conv.weight", "conv.bn.weight", "conv2d.weight", "conv2d.bn.bias"} <= names
    assert "kernel" not in names
    assert len(names) == len(dict(model.named_parameters()))


def test_golden(golden: Callable[[str, str], None]) -> None:
    gm, _ = fused(Mixed().train(), IMAGES)
    golden("fuse-qat", graph_text(gm))


class Same(nn.Conv2d):
    """A convolution that is traced into, as EfficientNet's are."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_a_function_keeps_the_path_of_its_module() -> None:
    model = nn.Sequential(Same(3, 4, 2, bias=False), nn.BatchNorm2d(4))
    gm, _ = fused(model.train(), IMAGES)
    assert list(dict(gm.named_parameters())) == ["0.weight", "0.bn.weight", "0.bn.bias"]
    torch.testing.assert_close(gm(IMAGES), model(IMAGES), rtol=0, atol=0)


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


class HalfTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class CalledTwice(HalfTraining):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(x * 2))


def half_training() -> nn.Module:
    model = HalfTraining().train()
    model.bn.eval()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (FunctionalNorm, "fixed to training=True"),
        (half_training, "set one mode for both"),
        (Statistics, "has no running_mean"),
        (CalledTwice, "is called by 'conv' and also by 'conv_1'"),
    ],
)
def test_refusals(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    gm, result = fused(model, IMAGES)
    assert result.refusals
    assert all(reason in r.reason for r in result.refusals if "conv_1" not in r.node)
    assert not any(isinstance(m, QatBatchNormed) for m in gm.modules())
    torch.testing.assert_close(gm(IMAGES), model(IMAGES), rtol=0, atol=0)


def test_a_refused_kind_is_an_error() -> None:
    gm = captured(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)).train(), IMAGES)
    with pytest.raises(
        ConfigError, match=r"Fusing ConvTranspose\+BatchNorm not yet supported in QAT\."
    ):
        run_alone(FuseQat(refused=TRANSPOSED), gm)
