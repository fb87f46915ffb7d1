"""inline-references: reference modules as the steps that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import compat
from fxquant.pass_manager import PassResult
from fxquant.passes.inline_references import InlineReferences, inlined
from fxquant.qconfig import default_per_channel_qconfig
from fxquant.reference_modules import ReferenceModule
from tests.passes.helpers import graph_text, run_alone

WHOLE_RANGE = compat.QConfig(compat.MinMaxObserver, compat.default_weight_observer)
MAKERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), torch.randn(2, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, 2, 1, groups=2), torch.randn(2, 2, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), torch.randn(2, 2, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 2, 3), torch.randn(2, 2, 7)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 3, 2), torch.randn(2, 2, 4, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), torch.randn(2, 2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 3), torch.randn(2, 5)),
    "embedding": (lambda: nn.Embedding(6, 4), torch.tensor([[1, 5], [0, 2]])),
    "bag": (lambda: nn.EmbeddingBag(6, 4, mode="sum"), torch.tensor([[1, 5], [0, 2]])),
}


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x))


def reference(part: nn.Module, x: Tensor, qconfig: Any) -> Any:
    mapping = compat.QConfigMapping().set_module_name("part", qconfig)
    prepared = compat.prepare_fx(Model(part).eval(), mapping, (x,))
    prepared(x)
    return compat.convert_to_reference_fx(prepared)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind(kind: str) -> None:
    make, x = MAKERS[kind]
    torch.manual_seed(3)
    qconfig = WHOLE_RANGE
    if "conv" in kind and "transpose" not in kind:
        qconfig = default_per_channel_qconfig
    if kind in ("embedding", "bag"):
        qconfig = compat.float_qparams_weight_only_qconfig_4bit
    gm = reference(make(), x, qconfig)
    assert any(isinstance(module, ReferenceModule) for module in gm.modules())
    expected = gm(x)
    plain = inlined(gm)
    assert plain is not gm
    assert inlined(plain) is plain
    assert torch.equal(plain(x), expected)
    assert run_alone(InlineReferences(), gm).changes
    assert torch.equal(gm(x), expected)
    assert run_alone(InlineReferences(), gm) == PassResult(changes=0)


@pytest.mark.parametrize(
    ("name", "qconfig"),
    [
        ("static", default_per_channel_qconfig),
        ("float16", compat.float16_dynamic_qconfig),
    ],
)
def test_the_graph(name: str, qconfig: Any, golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(3)
    gm = reference(nn.Linear(5, 3), MAKERS["linear"][1], qconfig)
    golden(f"inline-references-{name}", graph_text(inlined(gm)))
