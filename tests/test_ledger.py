"""ledger: every op that a float tensor enters, with the multiply-accumulates of its definition."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.dataflow import is_float_tensor
from fxquant.errors import Diagnostics
from fxquant.graph_module import OpEntry
from fxquant.ledger import build_ledger
from fxquant.quantize_fx import prepare_fx
from fxquant.shapes import record_shapes


def ledger(model: nn.Module, *inputs: Any) -> dict[str, OpEntry]:
    gm = capture(model, Diagnostics())
    record_shapes(gm, inputs or None, Diagnostics())
    return {entry.name: entry for entry in build_ledger(gm)}


def macs(model: nn.Module, *inputs: Any) -> int | None:
    """Of the whole model."""
    found = [entry.macs for entry in ledger(model, *inputs).values()]
    return None if None in found else sum(m for m in found if m is not None)


# Per case the count by hand: for each output (transposed: input) element, the products added to it.
COUNTS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 8), 2 * 6 * 6 * (4 * 3)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), 2 * 6 * 64 * (4 * 9)),
    "stride": (nn.Conv2d(4, 6, 3, stride=2), (1, 4, 9, 9), 6 * 16 * (4 * 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (1, 4, 8, 8), 6 * 64 * (2 * 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (1, 4, 8, 8), 4 * 64 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 8 * (2 * 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * (6 * 4)),
    "transposed groups": (
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        (1, 4, 5, 5),
        4 * 25 * (3 * 4),
    ),
    "linear": (nn.Linear(5, 7), (3, 5), 3 * 7 * 5),
    "linear on more dimensions": (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 7 * 5),
    "lstm": (nn.LSTM(4, 5), (7, 2, 4), 7 * 2 * (4 * 5 * 4 + 4 * 5 * 5)),
    "gru, two layers": (
        nn.GRU(4, 5, num_layers=2),
        (7, 2, 4),
        7 * 2 * (3 * 5 * 4 + 3 * 5 * 5 + 3 * 5 * 5 + 3 * 5 * 5),
    ),
    "rnn, both directions": (nn.RNN(4, 5, bidirectional=True), (7, 2, 4), 7 * 2 * 2 * (20 + 25)),
    "relu": (nn.ReLU(), (3, 5), 0),
    "batch norm": (nn.BatchNorm2d(4), (1, 4, 3, 3), 0),
}


@pytest.mark.parametrize("case", COUNTS)
def test_macs(case: str) -> None:
    model, shape, wanted = COUNTS[case]
    assert macs(nn.Sequential(model), torch.randn(shape)) == wanted


class Products(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        functions = {
            "matmul": torch.matmul,
            "@": lambda a, b: a @ b,
            "bmm": torch.bmm,
            "method": lambda a, b: a.matmul(b),
            "baddbmm": lambda a, b: torch.baddbmm(torch.ones(2, 3, 4), a, b),
            "einsum": lambda a, b: torch.einsum("nij, njk -> nik", a, b),
            "einsum of a list": lambda a, b: torch.einsum("nij,njk", [a, b]),
            "F.linear": lambda a, b: F.linear(a, self.weight),
        }
        return functions[self.name](x, y)


PRODUCTS = ["matmul", "@", "bmm", "method", "F.linear", "baddbmm", "einsum", "einsum of a list"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    x, y = torch.randn(2, 3, 5), torch.randn(2, 5, 4)
    wanted = 2 * 3 * 7 * 5 if name == "F.linear" else 2 * 3 * 4 * 5
    assert macs(Products(name), x, y) == wanted


class Two(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def test_attention_is_two_products() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    model = Two(lambda q, k: F.scaled_dot_product_attention(q, k, k))
    assert macs(model, query, key) == 2 * 4 * (5 * 8 * 7 + 5 * 7 * 8)


def test_einsums_that_cannot_be_counted() -> None:
    x = torch.randn(2, 3, 3)
    assert macs(Two(lambda a, b: torch.einsum("...i,...i->...", a, b)), x, x) is None
    assert macs(Two(lambda a, b: torch.einsum("nij->ni", a)), x, x) is None


def test_macs_are_unknown_without_shapes() -> None:
    found = ledger(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert [entry.macs for entry in found.values()] == [None, 0]


class Mixed(nn.Module):
    """Float ops, integer ops, shapes and outputs that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        y = self.block(x)
        size = y.shape[-1] * 2
        ids = ids + 1
        y = F.linear(y.mean((2, 3)), self.weight).relu()
        return y, ids, size, y.argmax(1)


def test_which_ops_are_listed() -> None:
    found = ledger(Mixed(), torch.randn(2, 3, 4, 4), torch.arange(3))
    assert [(e.name, e.kind, e.type_name, e.path, e.parameters) for e in found.values()] == [
        ("block_0", "conv2d", "Conv2d", "block.0", 16),
        ("block_1", "batch_norm", "BatchNorm2d", "block.1", 8),
        ("mean", "mean", "mean", "", 0),
        ("linear", "linear", "linear", "", 16),
        ("relu", "relu", "relu", "", 0),
        ("argmax", "argmax", "argmax", "", 0),
    ]
    assert all(entry.float_input for entry in found.values())


def test_a_prepared_model_lists_the_ops_of_the_float_model() -> None:
    model = Mixed().eval()
    inputs = (torch.randn(2, 3, 4, 4), torch.arange(3))
    gm = prepare_fx(model, None, inputs)
    assert {entry.name: entry for entry in gm.state.ledger} == ledger(model, *inputs)


def test_a_dict_input_is_no_op_without_shapes() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.fc(batch["x"])

    assert "fc" in ledger(Takes())


def test_a_deep_model_without_shapes() -> None:
    """Deeper than Python's stack would be, were it walked by recursion."""
    depth = sys.getrecursionlimit() // 2 + 50
    gm = capture(nn.Sequential(*[nn.ReLU()] * depth), Diagnostics())
    last = list(gm.graph.nodes)[-2]
    assert is_float_tensor(gm, last)
