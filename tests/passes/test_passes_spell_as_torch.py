"""spell-as-torch: the calls that people count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.compat import (
    QConfig,
    QConfigMapping,
    convert_fx,
    convert_to_reference_fx,
    default_per_channel_qconfig,
    float16_dynamic_qconfig,
    prepare_fx,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.operators import TO_DTYPE
from fxquant.pass_manager import PassResult
from fxquant.passes.inline_references import inlined
from fxquant.passes.spell_as_torch import SpellAsTorch
from tests.passes.helpers import graph_text, run_alone

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    """Casts by itself, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.last = nn.Parameter(torch.randn(4, 5)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.linear(x, self.weight))
        return y.to(torch.float16).to(torch.float32)


def prepared(qconfig: QConfig) -> QuantGraphModule:
    made = prepare_fx(Model().eval(), QConfigMapping().set_global(qconfig), (X,))
    made(X)
    return made


def targets(gm: fx.GraphModule, op: str) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == op]


@pytest.fixture
def unspelt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., QuantGraphModule]:
    def convert(
        call: Callable[[QuantGraphModule], QuantGraphModule], qconfig: QConfig
    ) -> QuantGraphModule:
        with monkeypatch.context() as patch:
            patch.setattr(SpellAsTorch, "run", lambda *_: PassResult(changes=0))
            return call(prepared(qconfig))

    return convert


def test_casts_of_a_reference_graph(
    golden: Callable[[str, str], None], unspelt: Callable[..., QuantGraphModule]
) -> None:
    gm = unspelt(convert_to_reference_fx, float16_dynamic_qconfig)
    expected = gm(X)
    assert run_alone(SpellAsTorch(), gm).changes
    golden("spell-as-torch", graph_text(gm))
    assert torch.equal(gm(X), expected)
    assert run_alone(SpellAsTorch(), gm) == PassResult(changes=0)


@pytest.mark.filterwarnings("ignore:2 activation:fxquant.errors.ConfigWarning")
def test_integers_of_a_lowered_graph(unspelt: Callable[..., QuantGraphModule]) -> None:
    gm = unspelt(convert_fx, default_per_channel_qconfig)
    expected = gm(X)
    assert targets(gm, "call_method") == ["to", "to"]
    assert run_alone(SpellAsTorch(), gm).changes == 1
    assert targets(gm, "call_method") == ["dequantize", "to", "to"]
    assert torch.equal(gm(X), expected)
    assert torch.equal(torch.jit.script(gm)(X), expected)


def test_what_compares_graphs_reads_casts_again() -> None:
    gm = convert_to_reference_fx(prepared(float16_dynamic_qconfig))
    assert sorted(targets(gm, "call_method")) == ["dequantize"] * 3 + ["to"] * 3
    plain = inlined(gm)
    assert targets(plain, "call_method") == ["to", "to"]  # the model's own
    assert not any(node.target is torch.quantize_per_tensor_dynamic for node in plain.graph.nodes)
    assert sum(node.target is TO_DTYPE for node in plain.graph.nodes) == 7
    assert torch.equal(plain(X), gm(X))
