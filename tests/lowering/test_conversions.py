"""Functions looked up among 256 integers, and as few conversions as the graph allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.elementwise import FUNCTIONS, chosen
from fxquant.kernels import lookup
from fxquant.metadata import record_of
from fxquant.packing import LOOKED_UP, pack_lookup
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.targets.x86 import X86

Lower = Callable[..., Any]
ROOT = Path(__file__).parents[2]


# -- tables ---------------------------------------------------------------------------------------


def test_every_function_of_the_table_has_its_definition() -> None:
    assert {kind for kind, row in X86.rows.items() if row.looked_up} == set(LOOKED_UP)


@pytest.mark.parametrize("kind", LOOKED_UP)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.04, 128), (0.3, 0), (0.002, 255)])
def test_tables_are_the_definition(kind: str, scale: float, zero_point: int) -> None:
    """Each integer: dequantized, the function in float64, quantized; ties to even."""
    given = torch.tensor([scale, 0.017], dtype=torch.float32)
    table = pack_lookup(
        given[0], torch.tensor(zero_point), given[1], torch.tensor(99), kind, [], 0, 255
    )
    function = LOOKED_UP[kind]
    for integer in range(256):
        value = (integer - zero_point) * float(given[0])
        exact = float(function(torch.tensor(value, dtype=torch.float64))) / float(given[1]) + 99
        assert int(table[integer]) == min(max(round(exact), 0), 255)


def test_a_narrower_range_cuts_the_table() -> None:
    one, zero = torch.tensor(0.05), torch.tensor(64)
    table = pack_lookup(one, zero, one, zero, "elu", [1.0], 0, 127)
    assert int(table.max()) == 127


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 8, 5), (2, 8, 5, 6), (2, 8, 3, 4, 5)])
def test_lookup_keeps_shape_and_order(shape: tuple[int, ...]) -> None:
    table = torch.randperm(256).to(torch.uint8)
    x = torch.randint(0, 256, shape).to(torch.uint8)
    assert torch.equal(lookup(x, table), table[x.long()])
    for moved in (x.transpose(0, -1), x.flip(0)[::2]):
        assert torch.equal(lookup(moved, table), table[moved.long()])
    if len(shape) == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        found = lookup(last, table)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, table[x.long()])


class Mish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.mish(self.stem(x)))


def test_new_scales_make_new_tables(lower: Lower) -> None:
    x = torch.randn(2, 3, 9, 9)
    small, large = lower(Mish(), x), lower(Mish(), 5 * x)
    taken = copy.deepcopy(small.int8)
    taken(x)  # packs
    taken.load_state_dict(large.int8.state_dict())
    assert torch.equal(taken(x), large.int8(x))
    assert not torch.equal(taken(x), small.int8(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_page_shows_what_the_target_does(name: str) -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    lines = [line.split("|") for line in page.splitlines() if line.startswith(f"| `{name}` ")]
    assert len(lines) >= 3
    assert {cells[-2].strip() for cells in lines} == {chosen(name)}


# -- conversions ----------------------------------------------------------------------------------


class Branches(nn.Module):
    """One int8 value, read by three float ops and one int8 op."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(self.stem(x), 2)
        z = torch.sigmoid(y) * 2 + torch.softmax(y, 1) - torch.cos(y)
        return self.head(z), self.side(y)


class Region(nn.Module):
    """Four float ops in a row and in parallel, between int8 ops."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(self.stem(x), 2).permute(0, 2, 3, 1)
        z = self.norm(y)
        z = torch.softmax(z * 1.5, -1) - torch.cos(z)
        z = z.permute(0, 3, 1, 2)
        return self.a(z), self.b(z)


class Inputs(nn.Module):
    """The input of the network, read by two convolutions and a float op."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, k, padding=k // 2) for k in (1, 3, 1))

    def forward(self, x: Tensor) -> Any:
        return self.a(x), self.b(x), self.c(torch.softmax(x, 1))


@pytest.mark.parametrize(
    ("model", "quantizes", "dequantizes"),
    [
        (Branches, 2, 1),  # the input and z; y for all three
        (Region, 2, 1),
        (Inputs, 2, 0),  # the input once, and the result of the softmax
    ],
)
def test_as_few_conversions_as_possible(
    model: Callable[[], nn.Module], quantizes: int, dequantizes: int
) -> None:
    torch.manual_seed(0)
    made, x = model().eval(), torch.randn(2, 3, 8, 8)
    prepared = prepare_fx(made, None, (x,))
    prepared(x)
    int8 = convert_fx(prepared)
    kernels = [record_of(node).kernel for node in int8.graph.nodes]
    assert kernels.count("aten::quantize_per_tensor") == quantizes
    assert kernels.count("aten::dequantize") == dequantizes
    for given, wanted in zip(int8(x), made(x), strict=True):
        assert float((given - wanted).detach().abs().max()) < 0.1 * float(wanted.detach().max())
