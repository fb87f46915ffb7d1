"""The parity tool itself: what it counts, what it finds, and the bounds over many elements."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.parity import parity
from fxquant.quantize_fx import convert_fx, prepare_fx

Lower = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        y = F.relu(self.a(x))
        y = F.relu(self.b(y) + y)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(y, 2)], 3)
        z = torch.sigmoid(self.b(y)).mean((2, 3))
        return self.head(z)


def _input() -> Tensor:
    return torch.randn(2, 3, 10, 14)


def test_one_row_for_every_kernel_in_order(lower: Lower) -> None:
    case = lower(Net(), _input())
    report = case.check(2 * _input())
    assert [(row.name, row.kind) for row in report.rows] == [
        ("x", "quantize"),
        ("a", "conv2d"),
        ("add", "conv2d+add"),
        ("max_pool2d", "max_pool2d"),
        ("avg_pool2d", "avg_pool2d"),
        ("cat", "cat"),
        ("b_1", "conv2d"),
        ("mean", "quantize"),
        ("head", "linear"),
    ]
    assert [row.floating for row in report.rows] == [False] * 6 + [True, False, True]
    assert all(row.kernel for row in report.rows)
    assert report.failures == ()
    text = str(report)
    for row in report.rows:
        assert f"{row.name} " in text
    assert "WRONG" not in text
    elements = {row.name: row.elements for row in report.rows}
    assert elements["a"] == 2 * 8 * 10 * 14


def test_prepared_and_reference_are_both_accepted(lower: Lower) -> None:
    case, x = lower(Net(), _input()), _input()
    assert parity(case.prepared, case.int8, (x,)) == parity(case.reference, case.int8, (x,))
    assert parity(case.prepared, case.int8, x) == parity(case.prepared, case.int8, {"x": x})


def _tampered(int8: QuantGraphModule, kernel: str, position: int, change: Any) -> Any:
    changed = copy.deepcopy(int8)
    node = next(n for n in changed.graph.nodes if record_of(n).kernel.startswith(kernel))
    args = list(node.args)
    args[position] = change(args[position])
    node.args = tuple(args)
    changed.recompile()
    return changed


CONV, SUM, HEAD = "quantized::conv2d", "onednn::qconv2d_pointwise.binary", "onednn::qlinear"

TAMPERINGS: dict[str, tuple[str, int, Callable[..., Any], list[str]]] = {
    "output scale": (CONV, 2, lambda s: s * 1.01, ["a"]),
    "output zero point": (CONV, 3, lambda z: z + 1, ["a"]),
    "input scale of a sum": (SUM, 1, lambda s: s * 1.003, ["add"]),
    "scale of the other operand": (SUM, 15, lambda s: s * 1.02, ["add"]),
    "zero point of the other operand": (SUM, 16, lambda z: z + 1, ["add"]),
    "input scale of a float head": (HEAD, 1, lambda s: s * (1 + 1e-5), ["head"]),
    "order of a concatenation": ("aten::cat", 0, lambda nodes: list(reversed(nodes)), ["cat"]),
    # a quantized tensor carries its zero point to the kernel that reads it
    "quantization of the input": ("aten::quantize_per_tensor", 2, lambda z: z - 1, ["x", "a"]),
    "nothing": (CONV, 2, lambda s: s, []),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_kernel_is_found_and_only_that(lower: Lower, name: str) -> None:
    kernel, position, change, culprits = TAMPERINGS[name]
    case = lower(Net(), _input())
    report = parity(case.reference, _tampered(case.int8, kernel, position, change), (_input(),))
    assert [row.name for row in report.failures] == culprits, f"\n{report}"
    assert ("WRONG" in str(report)) == bool(culprits)


def test_an_accumulator_that_is_still_needed_is_found(lower: Lower) -> None:
    """Without its copy, the sum overwrites what the pool reads later: the pool is wrong."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.c, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.c(self.b(y)) + y
            return self.head(torch.cat([F.max_pool2d(y, 2), F.max_pool2d(z, 2)], 1)[:, 4:12])

    case = lower(Late(), _input())
    case.check(_input())
    tampered = _tampered(case.int8, SUM, 6, lambda node: node.args[0])
    report = parity(case.reference, tampered, (_input(),))
    assert [row.name for row in report.failures] == ["max_pool2d"], f"\n{report}"


def test_swapped_weights_are_found(lower: Lower) -> None:
    case = lower(Net(), _input())
    tampered = copy.deepcopy(case.int8)
    name = next(p.name for p in tampered.state.packs if p.tensors[0].startswith("a_weight"))
    with torch.no_grad():
        tampered.get_buffer("a_weight")[0, 0, 0, 0] += 8
    tampered.rebuild_packed()
    tampered.get_buffer("a_weight")[0, 0, 0, 0] -= 8
    assert name in tampered.__dict__
    assert [row.name for row in parity(case.reference, tampered, (_input(),)).failures] == ["a"]


def test_models_that_do_not_belong_together(lower: Lower) -> None:
    case = lower(Net(), _input())
    with torch.no_grad():
        case.prepared(5 * _input())
    with pytest.raises(ConfigError, match="do not belong together"):
        parity(case.prepared, case.int8, (_input(),))
    with pytest.raises(ConfigError, match="do not belong together"):
        parity(lower(nn.Conv2d(3, 4, 1), _input()).prepared, case.int8, (_input(),))
    with pytest.raises(ConfigError, match="prepared or a reference model first"):
        parity(case.int8, case.int8, (_input(),))
    with pytest.raises(ConfigError, match="prepared or a reference model first"):
        parity(Net(), case.int8, (_input(),))
    with pytest.raises(ConfigError, match="result of convert_fx second"):
        parity(case.prepared, case.reference, (_input(),))


def test_exact_halves_are_ties_and_not_errors(lower: Lower) -> None:
    """``avg_pool2d`` on channels_last rounds before it adds the zero point: odd ones tell."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.AvgPool2d(2), nn.Conv2d(16, 2, 1))
    found = 0
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 24, 24)
        report = lower(model, x).check(x)
        row = next(row for row in report.rows if row.kind == "avg_pool2d")
        assert row.off_by_one == row.ties
        found += row.ties
    assert found > 100


class Wide(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(16, 64, 1), nn.Conv2d(16, 64, 1)
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.linear = nn.Linear(64, 64)
        self.head = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = F.max_pool2d(self.a(x), 1), F.max_pool2d(self.b(x), 1)
        if self.kind in ("add", "mul"):
            y = y + z if self.kind == "add" else y * z
        elif self.kind == "linear":
            y = self.linear(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.kind == "conv2d+add":
            y = self.conv(y) + z
        else:
            y = {"conv2d": self.conv, "conv2d+silu": lambda t: F.silu(self.conv(t))}[self.kind](y)
        return self.head(y)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("conv2d", 2e-4), ("conv2d+add", 2e-4), ("conv2d+silu", 2e-4), ("linear", 2e-4),
     ("add", 2e-4), ("mul", 2e-4)],
)  # fmt: skip
def test_how_many_differ_among_very_many(lower: Lower, kind: str, bound: float) -> None:
    """Differences are ties; a tie is within float32 rounding, 1e-4 LSB, so at most 2 in 10,000."""
    x = torch.randn(4, 16, 32, 32)
    report = lower(Wide(kind), x).check(torch.randn(4, 16, 32, 32))
    row = next(row for row in report.rows if row.kind == kind and not row.floating)
    assert row.elements == 4 * 64 * 32 * 32
    assert row.fraction <= bound, f"\n{report}"
    assert row.max_lsb <= 1


def test_a_model_of_the_default_mapping() -> None:
    x = torch.randn(4, 3, 16, 16)
    prepared = prepare_fx(Net().eval(), None, (x,))
    prepared(x)
    assert parity(prepared, convert_fx(prepared), (torch.randn(2, 3, 20, 12),)).ok
