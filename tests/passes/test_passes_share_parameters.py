"""share-parameters: the groups are the connected components of the ops that move values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observers import MinMaxObserver, PerChannelMinMaxObserver
from fxquant.pass_manager import fingerprint
from fxquant.passes.share_parameters import ShareParameters
from fxquant.qconfig import QConfig
from tests.passes.helpers import captured, graph_text, lively, run_alone, run_before

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)
IMAGES = torch.randn(1, 4, 8, 8)


def shared(model: nn.Module, *inputs: Any, mapping: Any = None) -> QuantGraphModule:
    lively(model)
    gm = captured(model, *inputs)
    run_before(ShareParameters, gm, model, {"": A} if mapping is None else mapping)
    before = fingerprint(gm)
    result = run_alone(ShareParameters(), gm)
    assert result.changes == sum(record_of(n).share_group is not None for n in gm.graph.nodes)
    assert (result.changes > 0) == (fingerprint(gm) != before)
    after = fingerprint(gm)
    assert run_alone(ShareParameters(), gm).changes == 0
    assert fingerprint(gm) == after
    return gm


def groups(gm: QuantGraphModule) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for node in gm.graph.nodes:
        number = record_of(node).share_group
        if number is not None:
            found.setdefault(number, []).append(node.name)
    assert list(found) == list(range(len(found)))  # numbered in graph order
    return list(found.values())


class Branches(nn.Module):
    """Two convolutions whose values meet in a cat, one of them pooled; a third stands aside."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(self.a(x), 2)
        b = F.relu(self.b(F.avg_pool2d(self.c(x).relu(), 2)))
        return self.last(torch.cat([a, b], 1).transpose(2, 3))


def test_connected_components() -> None:
    gm = shared(Branches(), IMAGES)
    assert groups(gm) == [
        ["a", "max_pool2d", "relu_1", "cat", "transpose"],
        ["relu", "avg_pool2d"],
    ]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("share-parameters", graph_text(shared(Branches(), IMAGES)))


def test_the_input_of_the_model_shares_too() -> None:
    gm = shared(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)), IMAGES)
    assert groups(gm) == [["input_1", "_0"]]


def test_a_fused_relu_behind_a_cat_is_the_value_of_the_group() -> None:
    class CatRelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(torch.cat([x, x * x], 1)))

    gm = shared(CatRelu(), IMAGES)
    assert groups(gm) == [["x", "mul", "relu"]]


def test_without_movers_there_are_no_groups() -> None:
    gm = shared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), IMAGES)
    assert groups(gm) == []


def test_movers_in_floating_point_form_no_groups() -> None:
    gm = shared(Branches(), IMAGES, mapping={})
    assert groups(gm) == []


def test_one_value_twice_in_a_cat() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(torch.cat([y, y], 1))

    assert groups(shared(Twice(), IMAGES)) == [["first", "cat"]]
