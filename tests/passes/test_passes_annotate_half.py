"""annotate-half: products run in half precision where asked, and what follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import fingerprint
from fxquant.passes.annotate_half import AnnotateHalf
from fxquant.qconfig import (
    bfloat16_static_qconfig,
    float16_static_qconfig,
    get_default_qconfig,
)
from tests.passes.helpers import captured, graph_text, lively, run_alone, run_before

BF16, FP16 = bfloat16_static_qconfig, float16_static_qconfig


class Net(nn.Module):
    """A gate, a convolution with relu, a cumulative sum, a reshape and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x * 2))
        y = y.flatten(2).mean(2)
        return self.head(y.cumsum(1)) + 1


def annotated(mapping: Any) -> QuantGraphModule:
    model = lively(Net())
    gm = captured(model, torch.randn(1, 3, 4, 4))
    run_before(AnnotateHalf, gm, model, mapping)
    before = fingerprint(gm)
    result = run_alone(AnnotateHalf(), gm)
    assert (result.changes > 0) == (fingerprint(gm) != before)
    after = fingerprint(gm)
    assert run_alone(AnnotateHalf(), gm).changes == 0
    assert fingerprint(gm) == after
    return gm


def halves(gm: QuantGraphModule) -> dict[str, torch.dtype]:
    found = {node.name: record_of(node).runs_in for node in gm.graph.nodes}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


@pytest.mark.parametrize(("qconfig", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16)])
def test_products_and_what_follows_them(qconfig: Any, dtype: torch.dtype) -> None:
    """``x * 2`` comes before the first product; ``cumsum`` is no kind that runs so."""
    gm = annotated({"": qconfig})
    names = ("conv", "relu", "flatten", "mean", "head", "add")
    assert halves(gm) == dict.fromkeys(names, dtype)


def test_each_op_by_its_own_qconfig_and_patterns_by_their_first() -> None:
    gm = annotated({"": get_default_qconfig(), "conv": BF16, "head": FP16})
    assert halves(gm) == {
        "conv": torch.bfloat16,
        "relu": torch.bfloat16,
        "head": torch.float16,
    }


def test_nothing_is_marked_where_nothing_asks() -> None:
    assert halves(annotated({"": get_default_qconfig()})) == {}
    assert halves(annotated({"": None})) == {}


def test_the_graph_as_text(golden: Callable[[str, str], None]) -> None:
    golden("annotate-half", graph_text(annotated({"": BF16})))
