"""cast-half: constants once, casts where a region begins and ends, none between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.operators import TO_DTYPE
from fxquant.pass_manager import PassResult, fingerprint, run_pass
from fxquant.passes.cast_half import CastHalf
from fxquant.pipelines import reference_pipeline
from fxquant.qconfig import bfloat16_static_qconfig, get_default_qconfig
from fxquant.quantize_fx import prepare_fx
from tests.passes.helpers import context, graph_text, lively

BF16 = bfloat16_static_qconfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))) + x
        return self.head(self.norm(y.mean((2, 3))))


def cast(mapping: Any, x: Tensor) -> tuple[QuantGraphModule, PassResult]:
    gm = prepare_fx(lively(Net()), mapping, (x,))
    gm(x)
    shared = context()
    for one in reference_pipeline().passes:
        result = run_pass(one, gm, shared)
        if isinstance(one, CastHalf):
            break
    after = fingerprint(gm)
    assert run_pass(CastHalf(), gm, shared).changes == 0
    assert fingerprint(gm) == after
    return gm, result


def casts(gm: QuantGraphModule) -> int:
    return sum(node.target is TO_DTYPE for node in gm.graph.nodes)


def test_one_region_has_one_cast_for_each_value_that_enters_and_leaves() -> None:
    x = torch.randn(2, 3, 4, 4)
    gm, result = cast({"": BF16}, x)
    assert casts(gm) == 2  # x enters twice, in one cast
    assert result.changes > 0
    assert gm(x).dtype is torch.float32


def test_parameters_of_normalizations_stay_float() -> None:
    gm, _ = cast({"": BF16}, torch.randn(2, 3, 4, 4))
    dtypes = {name: value.dtype for name, value in gm.state_dict().items()}
    assert dtypes["norm.weight"] is dtypes["norm.bias"] is torch.float32
    assert dtypes["head_weight_bf16"] is dtypes["head_bias_bf16"] is torch.bfloat16


def test_nothing_marked_nothing_changed() -> None:
    gm, result = cast({"": get_default_qconfig()}, torch.randn(2, 3, 4, 4))
    assert result.changes == casts(gm) == 0


def test_without_example_inputs_too() -> None:
    model, x = lively(Net()), torch.randn(2, 3, 4, 4)
    gm = prepare_fx(model, {"": BF16}, None)
    reference_pipeline().run(gm, context())
    assert casts(gm) == 2
    with torch.no_grad():
        given, wanted = gm(x), model(x)
    assert float((given - wanted).abs().max()) <= 2**-5 * float(wanted.abs().max())


def test_the_graph_as_text(golden: Callable[[str, str], None]) -> None:
    mapping = {"": get_default_qconfig(), "b": BF16}
    golden("cast-half", graph_text(cast(mapping, torch.ones(2, 3, 4, 4))[0]))
