"""exchange-quantized: torch's quantized tensors to and from what takes and gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.errors import LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.exchange_quantized import ExchangeQuantized
from fxquant.passes.mark_boundary import MarkBoundary
from tests.passes.helpers import graph_text, node_named
from tests.passes.nested_models import IMAGES, float_graph, run_alone, run_until

QUANTIZED = torch.quantize_per_tensor(IMAGES, 0.03, 110, torch.quint8)


class Reads(nn.Module):
    """An input with two readers, one of which computes in float; two results and a dict."""

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.form(y, F.gelu(x), y)


FORMS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "tuple": (lambda a, b, c: (a, b, c), (0,)),
    "list": (lambda a, b, c: [a, b], (0, 1)),
    "dict": (lambda a, b, c: {"a": a, "b": b}, (0,)),
    "nested": (lambda a, b, c: (b, (a, b)), (1,)),
}


def exchanged(form: Callable[..., Any], outputs: tuple[int, ...]) -> QuantGraphModule:
    torch.manual_seed(0)
    gm = float_graph(Reads(form), IMAGES)
    boundary = MarkBoundary((0,), outputs)
    shared = run_until(ExchangeQuantized, gm, boundary=boundary)
    assert run_alone(ExchangeQuantized(), gm, shared).changes
    before = fingerprint(gm)
    assert run_alone(ExchangeQuantized(), gm, shared) == PassResult(changes=0)
    assert fingerprint(gm) == before
    return gm


@pytest.mark.parametrize("case", FORMS)
def test_the_boundary(case: str, golden: Callable[[str, str], None]) -> None:
    form, outputs = FORMS[case]
    gm = exchanged(form, outputs)
    golden(f"exchange-quantized-{case}", graph_text(gm))
    with torch.no_grad():
        results = gm(QUANTIZED)
        floats = Reads(form).eval()
        floats.load_state_dict({"conv.weight": _weight(gm), "conv.bias": gm.conv_bias})
        exact = floats(QUANTIZED.dequantize())
    left, right = (pytree.tree_leaves(r) for r in (results, exact))
    half_a_step = 0.5001 * float(gm.conv_scale_0)
    for position, (got, wanted) in enumerate(zip(left, right, strict=True)):
        difference = (got.dequantize() - wanted).abs()
        assert float(difference[_in_range(wanted, gm)].max()) <= half_a_step, position
    kinds = [tensor.is_quantized for tensor in left]
    assert (
        kinds
        == {
            "tuple": [True, False, False],
            "list": [True, False],
            "dict": [True, False],
            "nested": [False, True, False],
        }[case]
    )


def _in_range(wanted: Tensor, gm: QuantGraphModule) -> Tensor:
    """Where a value lies in the range that was observed on other inputs."""
    scale, zero_point = float(gm.conv_scale_0), int(gm.conv_zero_point_0)
    return (-zero_point * scale <= wanted) & (wanted <= (255 - zero_point) * scale)


def _weight(gm: QuantGraphModule) -> Tensor:
    return gm.conv_weight.to(torch.float32) * gm.conv_weight_scale


def test_a_part_that_gets_floats_instead_is_told() -> None:
    gm = float_graph(Reads(lambda a, b, c: F.gelu(b)), IMAGES)
    shared = run_until(ExchangeQuantized, gm)
    update_record(node_named(gm, "gelu_1"), takes_quantized=(0,))
    with pytest.warns(LoweringWarning, match="'gelu_1' takes a quantized tensor, but 'gelu' is in"):
        run_alone(ExchangeQuantized(), gm, shared)


def test_without_marks_nothing_is_exchanged() -> None:
    gm = float_graph(Reads(lambda a, b, c: a), IMAGES)
    shared = run_until(ExchangeQuantized, gm)
    assert run_alone(ExchangeQuantized(), gm, shared) == PassResult(changes=0)
    assert not any(record_of(n).gives_quantized for n in gm.graph.nodes)
