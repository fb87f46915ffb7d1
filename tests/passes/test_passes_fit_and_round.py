"""fit-weights and round-biases: what they change in a graph, and that a second run changes nothing.

Their arithmetic, on emulated CPUs, is tested in tests/lowering.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.errors import Diagnostics, LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pairing import Pairing
from fxquant.pass_manager import PassContext, PassResult, run_pass
from fxquant.passes.fit_weights import FitWeights
from fxquant.passes.round_biases import RoundBiases
from fxquant.quantize_fx import convert_to_reference_fx, prepare_fx
from fxquant.targets import registry, saturation
from fxquant.targets.registry import target_named
from fxquant.targets.x86 import X86


class Shared(nn.Module):
    """Two calls of one layer, whose inputs have scales of their own, and a layer in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(16, 16)
        self.other = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.other(self.twice(torch.relu(self.twice(x)))))


def _reference() -> QuantGraphModule:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    prepared = prepare_fx(Shared().eval(), None, (x,), bias_correction=False)
    prepared(x)
    return convert_to_reference_fx(prepared)


def _run(item: Any, gm: QuantGraphModule, target: str) -> tuple[PassResult, Diagnostics]:
    diagnostics = Diagnostics()
    context = PassContext(target=target_named(target), diagnostics=diagnostics)
    return run_pass(item, gm, context), diagnostics


def _text(gm: fx.GraphModule) -> str:
    return "\n".join(f"{n.op} {n.name} {n.target} {n.args}" for n in gm.graph.nodes)


@pytest.fixture
def _pairing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels of this CPU added products in pairs."""

    monkeypatch.setattr(saturation, "pairing_here", lambda geometry, kernel: Pairing.CHANNELS)


def test_fit_weights_leaves_a_graph_that_fits(recwarn: pytest.WarningsRecorder) -> None:
    gm = _reference()
    before, tensors = _text(gm), {n: t.clone() for n, t in gm.named_buffers()}
    result, _ = _run(FitWeights(), gm, "x86")
    assert result.changes == 0
    assert _text(gm) == before
    assert all(torch.equal(t, tensors[n]) for n, t in gm.named_buffers())
    assert not [w for w in recwarn if issubclass(w.category, LoweringWarning)]


@pytest.mark.usefixtures("_pairing")
def test_fit_weights_changes_scales_and_integers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:  # on a CPU that takes the usual weights
        elsewhere.setitem(registry.TARGETS, "x86", replace(X86, select_kernel=None))
        gm = _reference()
    before, tensors = _text(gm), {n: t.clone() for n, t in gm.named_buffers()}
    with pytest.warns(LoweringWarning, match=r"other kernels \(an x86_64\)") as caught:
        result, _ = _run(FitWeights("an x86_64"), gm, "x86")
    assert len(caught) == 1
    assert result.changes > 0
    assert _text(gm) == before
    changed = {n for n, t in gm.named_buffers() if not torch.equal(t, tensors[n])}
    weights = [n for n in tensors if "weight" in n and "zero_point" not in n]
    assert changed
    assert changed <= set(weights)
    reasons = [r for n in gm.graph.nodes for r in record_of(n).reasons if "is reduced" in r]
    assert len(reasons) == len({n.rsplit("_weight", 1)[0] for n in changed})
    again, _ = _run(FitWeights(), gm, "x86")
    assert again.changes == 0


def test_round_biases_is_for_integer_biases_only() -> None:
    gm = _reference()
    before = _text(gm)
    assert _run(RoundBiases(), gm, "x86")[0].changes == 0
    assert _text(gm) == before


def test_round_biases_to_the_steps_of_each_call() -> None:
    gm = _reference()
    result, _ = _run(RoundBiases(), gm, "qnnpack")
    assert result.changes > 0
    steps = set()
    for node in gm.graph.nodes:
        if node.target is not nn.functional.linear:
            continue
        x, weight, bias = node.args
        buffers = dict(gm.named_buffers())
        if "dequantize" not in x.name:
            continue
        step = buffers[x.args[1].target].double() * buffers[weight.args[1].target].double()
        ratio = buffers[bias.target].double() / step
        assert bool(((ratio - ratio.round()).abs() <= 2**-23 * ratio.abs()).all())  # float32 steps
        steps.add(float(step.max()))
    assert len(steps) == 3
    assert _run(RoundBiases(), gm, "qnnpack")[0].changes == 0
