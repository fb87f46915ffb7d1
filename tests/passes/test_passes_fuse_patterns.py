"""fuse-patterns: all that the x86 target says it runs as one, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observers import MinMaxObserver, PerChannelMinMaxObserver
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.fuse_patterns import FusePatterns, supports
from fxquant.patterns.library import FUSION_PATTERNS
from fxquant.qconfig import QConfig
from fxquant.quantize_fx import prepare_fx
from fxquant.targets.registry import target_named
from tests.passes.helpers import (
    captured,
    graph_text,
    lively,
    node_named,
    observers,
    reasons,
    run_alone,
    run_before,
)

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)

CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -2.0, 2.0),
    "clamp": lambda x: x.clamp(-1, 4),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ALL = CLAMPS | FUNCTIONS

# What the target claims, written down a second time.
CLAIMED = {
    *(f"conv{d}d-{name}" for d in (1, 2, 3) for name in ALL),
    *(f"conv_transpose{d}d-{name}" for d in (1, 2, 3) for name in CLAMPS),
    *(f"linear-{name}" for name in ALL),
    *(f"{kind}-{name}" for kind in ("bn", "add", "mul") for name in CLAMPS),
    *(f"conv2d-add-{name}" for name in CLAMPS),
    "conv2d-add",
    "cat-relu",
}


SHAPES = {0: (2, 4), 1: (2, 4, 6), 2: (2, 4, 6, 6), 3: (1, 4, 4, 4, 4)}


class Chain(nn.Module):
    """The ops of one pattern, by its name, on inputs of the dimensions that its first op takes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, *rest = name.split("-")
        self.dim = 0 if self.first == "linear" else 2
        for dim in (1, 2, 3):
            if self.first.endswith(f"{dim}d"):
                self.dim = dim
        made: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dim - 1](4, 4, 1),
            "conv_transpose": lambda: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[
                self.dim - 1
            ](4, 4, 1),
            "linear": lambda: nn.Linear(4, 4),
            "bn": lambda: nn.BatchNorm2d(4),
        }
        make = made.get(self.first.removesuffix(f"{self.dim}d"))
        if make is not None:
            self.op = make()
        self.rest = rest
        if self.dim == 2 and self.first != "bmm":
            self.last = nn.Conv2d(8 if self.first == "cat" else 4, 4, 1)

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = SHAPES[self.dim]
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "add": torch.add,
            "mul": torch.mul,
            "cat": lambda a, b: torch.cat([a, b], 1),
            "matmul": torch.matmul,
            "bmm": lambda a, b: torch.bmm(a.flatten(0, 1), b.flatten(0, 1)),
        }
        y = functions[self.first](x, other) if self.first in functions else self.op(x)
        for name in self.rest:
            y = y + other if name == "add" else ALL[name](y)
        return self.last(y) if hasattr(self, "last") else y


def fuse(
    model: nn.Module, *inputs: Any, mapping: Any = None
) -> tuple[QuantGraphModule, PassResult]:
    lively(model)
    gm = captured(model, *inputs)
    run_before(FusePatterns, gm, model, {"": A} if mapping is None else mapping)
    result = run_alone(FusePatterns(), gm)
    before = fingerprint(gm)
    assert run_alone(FusePatterns(), gm).changes == 0
    assert fingerprint(gm) == before
    return gm, result


def marked(gm: QuantGraphModule) -> list[str]:
    """The patterns that were marked, one for each group, each with all its members."""
    groups: dict[int, list[Any]] = {}
    for node in gm.graph.nodes:
        fusion = record_of(node).fusion
        if fusion is not None:
            groups.setdefault(fusion.group, []).append((node.name, fusion))
    for members in groups.values():
        names = [name for name, _ in members]
        assert {fusion.first for _, fusion in members} == {names[0]}
        assert {fusion.last for _, fusion in members} == {names[-1]}
        assert len({fusion.role for _, fusion in members}) == len(members)
    return [members[0][1].pattern for members in groups.values()]


def test_the_target_supports_what_it_claims() -> None:
    found = {p.name for p in FUSION_PATTERNS if supports(target_named("x86"), p)}
    assert found == CLAIMED


@pytest.mark.parametrize("name", sorted(p.name for p in FUSION_PATTERNS))
def test_every_combination(name: str) -> None:
    model = Chain(name)
    gm, result = fuse(model, *model.inputs())
    found = marked(gm)
    assert (name in found) == (name in CLAIMED)
    if name in CLAIMED:
        steps = 1 + len(model.rest)
        assert result.changes >= steps
    with torch.no_grad():
        torch.testing.assert_close(gm(*model.inputs()), model(*model.inputs()))


@pytest.mark.parametrize("name", sorted(CLAIMED))
def test_the_value_inside_is_not_observed(name: str) -> None:
    model = lively(Chain(name))
    gm = prepare_fx(model, {"": A}, model.inputs())
    inside = [
        node.name
        for node in gm.graph.nodes
        if (fusion := record_of(node).fusion) is not None and fusion.last != node.name
    ]
    assert inside
    assert not set(observers(gm).values()) & set(inside)
    with torch.no_grad():
        torch.testing.assert_close(gm(*model.inputs()), model(*model.inputs()))


# -- what breaks a pattern ------------------------------------------------------------------------

IMAGES = torch.randn(2, 4, 6, 6)


class ReluAndBare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.relu(y), y


def test_two_readers() -> None:
    gm, result = fuse(ReluAndBare(), IMAGES)
    (refusal,) = result.refusals
    assert refusal.reason.startswith("the output of 'conv' is also used by 'output'")
    assert refusal.culprits == ("output",)
    assert "pattern conv2d-relu refused: the output of 'conv'" in reasons(gm, "conv")


def test_a_rule_on_the_epilogue() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    gm, result = fuse(model, IMAGES, mapping={"": A, "1": None})
    assert marked(gm) == []
    (refusal,) = result.refusals
    assert refusal.reason == "'_1' is governed by module_name '1', '_0' by global"
    assert refusal.culprits == ("_1",)
    assert record_of(node_named(gm, "_1")).qconfig is None


def test_a_rule_on_the_first_op() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    gm, result = fuse(model, IMAGES, mapping={"": A, "0": None})
    assert marked(gm) == []
    assert result.refusals[0].reason == "'_0' stays in FP32 (module_name '0')"


def test_the_first_op_governs() -> None:
    other = QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=127), WEIGHT)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    gm, _ = fuse(model, IMAGES, mapping={"": A, "0": other})
    assert marked(gm) == ["conv2d-relu"]
    for name in ("_0", "_1"):
        assert record_of(node_named(gm, name)).qconfig == other
        assert record_of(node_named(gm, name)).rule == "module_name '0'"


def test_an_epilogue_that_the_target_has_not() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.GELU())
    gm, result = fuse(model, IMAGES)
    assert marked(gm) == []
    assert not result.refusals


def test_broadcasting_add_is_no_residual() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x) + y

    gm, result = fuse(Broadcast(), IMAGES, torch.randn(1, 4, 1, 1))
    assert marked(gm) == []
    assert "broadcasts" in result.refusals[0].reason


@pytest.mark.parametrize("inputs", [(IMAGES,), ()])
def test_golden(inputs: Any, golden: Callable[[str, str], None]) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(4, 4, 1)
            self.conv2 = nn.Conv2d(4, 4, 1)
            self.relu = nn.ReLU()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv1(x))
            x = self.relu(self.conv2(x) + x)
            return self.fc(x.mean((2, 3))).tanh()

    gm, result = fuse(Residual(), *inputs)
    refused = [f"\nrefused at {r.node}: {r.reason}" for r in result.refusals]
    name = "fuse-patterns" if inputs else "fuse-patterns-without-shapes"
    golden(name, f"{graph_text(gm)}\n{''.join(refused)}".rstrip())
