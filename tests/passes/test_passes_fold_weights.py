"""fold-weights: weights of functions, observed in compat graphs, become constants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.compat import (
    QConfigMapping,
    convert_fx,
    convert_to_reference_fx,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    prepare_fx,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.operators import QUANTIZE
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.fold_weights import FoldWeights
from fxquant.qconfig import QConfig, default_per_channel_qconfig
from tests.passes.helpers import graph_text, run_alone

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
DTYPES = {
    "dynamic": (default_dynamic_qconfig, torch.int8),
    "per-channel": (default_per_channel_qconfig, torch.int8),
    "float16": (float16_dynamic_qconfig, torch.float16),
}


class OneWeightTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(5, 5, generator=generator))
        self.offset = nn.Parameter(torch.randn(5, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.weight, self.offset)), self.weight)


def everywhere(qconfig: QConfig) -> QConfigMapping:
    return QConfigMapping().set_global(qconfig)


def reference(qconfig: QConfig) -> QuantGraphModule:
    prepared = prepare_fx(OneWeightTwice().eval(), everywhere(qconfig), (X,))
    prepared(X)
    return convert_to_reference_fx(prepared)


@pytest.mark.parametrize("case", DTYPES)
def test_the_weight_is_stored_as_the_kernel_reads_it(
    case: str, golden: Callable[[str, str], None]
) -> None:
    qconfig, dtype = DTYPES[case]
    gm = reference(qconfig)
    expected = gm(X)
    assert gm.weight.dtype is torch.float32
    assert run_alone(FoldWeights(), gm).changes
    golden(f"fold-weights-{case}", graph_text(gm))
    assert not hasattr(gm, "weight")
    assert {b.dtype for b in gm.buffers() if b.dim() == 2} == {dtype}
    assert torch.equal(gm(X), expected)
    before = fingerprint(gm)
    assert run_alone(FoldWeights(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before


def test_float16_weights_saturate_as_in_the_kernel() -> None:
    model = OneWeightTwice().eval()
    with torch.no_grad():
        model.weight[0, 0] = 1e6
    prepared = prepare_fx(model, everywhere(float16_dynamic_qconfig), (X,))
    lowered = convert_fx(prepared)
    gm = convert_to_reference_fx(prepared)
    run_alone(FoldWeights(), gm)
    stored = next(b for b in gm.buffers() if b.dim() == 2)
    assert float(stored[0, 0]) == torch.finfo(torch.float16).max
    assert bool(torch.isfinite(lowered(X)).all())


def test_what_is_no_weight_stays_in_the_graph() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    prepared = prepare_fx(Sum().eval(), everywhere(default_per_channel_qconfig), (X,))
    prepared(X)
    gm = convert_to_reference_fx(prepared)
    steps = [n for n in gm.graph.nodes if n.target is QUANTIZE]
    assert run_alone(FoldWeights(), gm) == PassResult(changes=0)
    assert [n for n in gm.graph.nodes if n.target is QUANTIZE] == steps
