"""freeze-weights: float modules with the integers that training arrived at."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.fake_quantize import FakeQuantize, default_weight_fake_quant, disable_observer
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.own_copy import own_copy
from fxquant.passes.freeze_weights import FreezeWeights, trained_parameters
from fxquant.qat_modules import TrainedQParams, holds_training_modules
from fxquant.qconfig import default_qat_qconfig
from fxquant.quantize_fx import convert_to_reference_fx, prepare_fx, prepare_qat_fx
from tests.passes.helpers import graph_text, node_named, run_alone

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.reused = nn.Conv2d(4, 4, 1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.left_out = nn.Conv2d(4, 2, 1)
        self.bn_left_out = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.reused(self.reused(x))
        x = F.conv2d(x, self.kernel)
        return self.bn_left_out(self.left_out(x))


def trained(steps: int = 3) -> QuantGraphModule:
    torch.manual_seed(0)
    mapping = {"": default_qat_qconfig, "left_out": None, "bn_left_out": None}
    prepared = prepare_qat_fx(Model().train(), mapping, (IMAGES,))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(IMAGES).square().mean().backward()
        optimizer.step()
    return prepared.eval()


def frozen(prepared: QuantGraphModule) -> QuantGraphModule:
    gm = own_copy(prepared)
    assert isinstance(gm, QuantGraphModule)
    run_alone(FreezeWeights(), gm)
    assert run_alone(FreezeWeights(), gm).changes == 0
    return gm


def test_nothing_that_trains_is_left() -> None:
    gm = frozen(trained())
    assert not holds_training_modules(gm)
    assert not any("weight_fake_quant" in name for name, _ in gm.named_modules())
    assert {type(gm.get_submodule(n)) for n in ("conv", "reused", "left_out")} == {nn.Conv2d}
    assert not hasattr(gm, "bn_left_out")


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("freeze-weights", graph_text(frozen(trained())))


def test_the_scale_is_that_of_training_not_of_the_final_weight() -> None:
    prepared = trained()
    prepared.apply(disable_observer)
    scale = prepared.conv.weight_fake_quant.scale
    with torch.no_grad():
        prepared.conv.weight.mul_(0.25)  # min-max of the final weight would give a quarter
    reference = convert_to_reference_fx(prepared)
    torch.testing.assert_close(reference.conv_weight_scale.reshape(1), scale, rtol=0, atol=0)
    integers = reference.conv_weight.to(torch.float32)
    folded, _ = prepared.conv.final_parameters()
    torch.testing.assert_close(integers, (folded / scale).round(), rtol=0, atol=0)


def test_an_observing_fake_quantizer_sees_the_final_weight_once() -> None:
    prepared = trained()
    before = float(prepared.reused.weight_fake_quant.activation_post_process.max_val)
    with torch.no_grad():
        prepared.reused.weight.fill_(10.0)
    reference = convert_to_reference_fx(prepared)
    expected = (before + 0.01 * (10.0 - before)) / 127.5
    torch.testing.assert_close(float(reference.reused_weight_scale), expected, rtol=1e-6, atol=0)
    assert float(prepared.reused.weight_fake_quant.activation_post_process.max_val) == before


def test_calls_of_one_module_share_its_parameters() -> None:
    gm = frozen(trained())
    first, second = (record_of(node_named(gm, n)).qconfig for n in ("reused", "reused_1"))
    assert first is not None
    assert second is not None
    assert first.weight is second.weight
    assert first.weight.target is TrainedQParams


def test_what_never_ran_is_observed_now() -> None:
    fake = default_weight_fake_quant()
    fake.disable_observer()
    weight = torch.tensor([[-1.0, 0.5]])
    found = trained_parameters(fake, weight, fake.spec)().qparams()
    torch.testing.assert_close(float(found.scale), 1 / 127.5, rtol=1e-6, atol=0)


def test_a_model_that_was_not_trained_stays_as_it_is() -> None:
    gm = prepare_fx(Model().eval(), None, (IMAGES,))
    gm(IMAGES)
    assert run_alone(FreezeWeights(), gm).changes == 0


def test_a_frozen_model_computes_what_evaluation_computed() -> None:
    prepared = trained()
    prepared.apply(disable_observer)
    gm = frozen(prepared)
    for module in gm.modules():
        if isinstance(module, FakeQuantize):
            module.disable_fake_quant()
    for module in prepared.modules():
        if isinstance(module, FakeQuantize):
            module.disable_fake_quant()
    torch.testing.assert_close(gm(IMAGES), prepared(IMAGES), rtol=1e-5, atol=1e-5)
