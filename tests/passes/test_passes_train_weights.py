"""train-weights: what gets a weight fake quantizer, of what spec, and where it is put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import ConfigWarning
from fxquant.fake_quantize import (
    FakeQuantize,
    default_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import op_of
from fxquant.pass_manager import run_pass
from fxquant.passes.train_weights import TrainWeights
from fxquant.pipelines import qat_prepare_pipeline
from fxquant.qat_modules import QatConv2d, QatLinear
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qat_qconfig,
    default_embedding_qat_qconfig,
    default_per_channel_qconfig,
    default_qat_qconfig,
)
from fxquant.targets.training import while_training
from tests.passes.helpers import captured, context, graph_text, node_named, propagate, reasons

PER_CHANNEL = QConfig(default_fake_quant, default_per_channel_weight_fake_quant)
IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


class Weighted(nn.Module):
    """A module called twice, a function, one weight read twice, an op that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.left_out = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.conv(x)))
        x = F.conv2d(F.conv2d(x, self.kernel), self.kernel)
        return self.left_out(self.up(x))


def prepared(model: nn.Module, *inputs: Any, mapping: Any) -> QuantGraphModule:
    model.train()
    gm = captured(model, *inputs)
    shared = context()
    shared = type(shared)(target=while_training(shared.target), diagnostics=shared.diagnostics)
    chosen = propagate(model, mapping)
    for one in qat_prepare_pipeline(chosen.mapping, chosen.known_paths).passes:
        run_pass(one, gm, shared)
    assert run_pass(TrainWeights(), gm, shared).changes == 0
    return gm


def weight_specs(gm: fx.GraphModule) -> dict[str, str]:
    return {
        name: module.spec.short()
        for name, module in gm.named_modules()
        if "weight_fake_quant" in name and isinstance(module, FakeQuantize)
    }


def test_every_weight_that_will_be_integers_has_one() -> None:
    gm = prepared(Weighted(), IMAGES, mapping={"": PER_CHANNEL, "left_out": None})
    assert weight_specs(gm) == {
        "conv.weight_fake_quant": "int8 per-channel(0) sym -128..127",
        "up.weight_fake_quant": "int8 sym -128..127",  # the op table has no axis for it
        "weight_fake_quant_0": "int8 per-channel(0) sym -128..127",
    }
    assert type(gm.left_out) is nn.Conv2d
    assert "weight per tensor instead of per channel" in reasons(gm, "up")
    calls = [n for n in gm.graph.nodes if n.target == "weight_fake_quant_0"]
    assert [[user.name for user in call.users] for call in calls] == [["conv2d", "conv2d_1"]]


def test_golden(golden: Callable[[str, str], None]) -> None:
    gm = prepared(Weighted(), IMAGES, mapping={"": default_qat_qconfig, "left_out": None})
    golden("train-weights", graph_text(gm))


def test_weights_are_rounded_in_the_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    gm = prepared(model, torch.randn(3, 8), mapping={"": default_qat_qconfig})
    gm.activation_post_process_0.disable_fake_quant()
    x = torch.eye(8)
    weight = (gm(x) - model[0].bias).T
    scale = model[0].weight.detach().abs().max() / 127.5
    steps = weight / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert float((weight - model[0].weight).detach().abs().max()) > float(scale) / 4


def test_dynamic_and_table_qconfigs() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.table(x))

    mapping = {
        nn.Embedding: default_embedding_qat_qconfig,
        nn.Linear: default_dynamic_qat_qconfig,
    }
    gm = prepared(Text(), torch.tensor([[1, 2]]), mapping=mapping)
    assert weight_specs(gm) == {
        "table.weight_fake_quant": "uint8 per-channel(0) float-qparams 0..255",
        "linear.weight_fake_quant": "int8 sym -128..127",
    }
    assert isinstance(gm.linear, QatLinear)


def test_an_observer_rounds_nothing_and_is_told() -> None:
    with pytest.warns(
        ConfigWarning, match="'_0' and 1 more trains as it is: PerChannelMinMaxObserver"
    ):
        gm = prepared(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
            IMAGES,
            mapping={"": default_per_channel_qconfig},
        )
    assert weight_specs(gm) == {}
    assert not any(isinstance(m, QatConv2d) for m in gm.modules())


def test_modules_that_train_are_seen_as_what_they_train() -> None:
    gm = prepared(Weighted(), IMAGES, mapping={"": default_qat_qconfig})
    op = op_of(gm, node_named(gm, "conv"))
    assert op is not None
    assert op.name == "conv2d"
    assert op.constant_path("weight") == "conv.weight"


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    gm = prepared(model, torch.randn(2, 4), mapping={"": default_qat_qconfig})
    first, second = gm.get_submodule("0"), gm.get_submodule("1")
    assert first.weight is second.weight
    assert first.weight is not model[0].weight
    assert first.weight_fake_quant is not second.weight_fake_quant


def test_a_weight_fake_quantizer_of_the_table_keeps_the_range() -> None:
    four_bits = default_weight_fake_quant.with_args(quant_min=-7, quant_max=7)
    per_channel = default_per_channel_weight_fake_quant.with_args(quant_min=-7, quant_max=7)
    for weight in (four_bits, per_channel):
        gm = prepared(
            nn.Sequential(nn.ConvTranspose2d(4, 4, 1)),
            IMAGES,
            mapping={"": QConfig(default_fake_quant, weight)},
        )
        assert weight_specs(gm) == {"0.weight_fake_quant": "int8 sym -7..7"}
