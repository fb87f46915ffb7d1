"""Random graphs: every anchor is matched or has a reason, and folding keeps the float meaning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxquant.op_view import kind_of
from fxquant.patterns.library import FOLD_PATTERNS, FUSION_PATTERNS
from fxquant.patterns.match import Match
from fxquant.patterns.matcher import MatchReport, match_all
from fxquant.patterns.pattern import Pattern

Trace = Callable[..., fx.GraphModule]
Fold = Callable[[Iterable[Match]], None]

EVERYTHING = (*FOLD_PATTERNS, *FUSION_PATTERNS)
CHANNELS = 2
CONVS = ("conv0", "conv1", "conv2", "tied")
NORMS = ("bn0", "bn1", "bn2", "batch_statistics")
UNARY: tuple[Callable[..., Any], ...] = (
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    F.relu6,
    lambda x: x.clamp(0, 6),
    lambda x: x.view(2, CHANNELS, 3, 3),
    lambda x: x + 1,
    lambda x: (x * 1).relu_(),
    lambda x: torch.abs(x),
)
BINARY: tuple[Callable[..., Any], ...] = (
    torch.add,
    torch.mul,
    lambda x, y: torch.add(x, y, alpha=2),
    lambda x, y: y + x.mean((2, 3), keepdim=True),
    lambda x, y: torch.cat([x, y], 1)[:, :CHANNELS],
    lambda x, y: x.clamp(y, None),
    torch.matmul,
)

Instruction = tuple[str, Any, int, int]


class Program(nn.Module):
    """Runs instructions; each takes one or two of the values so far, the last two are returned."""

    def __init__(self, instructions: list[Instruction]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in CONVS:
            setattr(self, name, nn.Conv2d(CHANNELS, CHANNELS, 1))
        for name in NORMS:
            setattr(
                self, name, nn.BatchNorm2d(CHANNELS, track_running_stats=not name.startswith("ba"))
            )
        self.get_submodule("tied").weight = self.get_submodule("conv2").weight
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        self.instructions = instructions

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = [x]
        for kind, what, first, second in self.instructions:
            one, two = values[-1 - first % len(values)], values[-1 - second % len(values)]
            if kind == "modules":
                for name in what:
                    one = getattr(self, name)(one)
                values.append(one)
            elif kind == "function":
                conv = getattr(self, what)
                values.append(F.conv2d(one, conv.weight, conv.bias))
            elif kind == "residual":
                main, shortcut, last = what
                other = two if shortcut is None else getattr(self, shortcut)(two)
                values.append(last(getattr(self, main)(one) + other))
            elif kind == "unary":
                values.append(what(one))
            else:
                values.append(what(one, two))
        return values[-1], values[-2]


def _instruction() -> st.SearchStrategy[Instruction]:
    near = st.sampled_from([0, 0, 0, 0, 1, 2])
    kinds = st.one_of(
        st.tuples(st.just("modules"), st.tuples(st.sampled_from((*CONVS, *NORMS)))),
        st.tuples(st.just("modules"), st.tuples(st.sampled_from(CONVS), st.sampled_from(NORMS))),
        st.tuples(
            st.just("residual"),
            st.tuples(
                st.sampled_from(CONVS),
                st.sampled_from((None, *CONVS)),
                st.sampled_from((torch.relu, torch.abs)),
            ),
        ),
        st.tuples(st.just("function"), st.sampled_from(CONVS)),
        st.tuples(st.just("unary"), st.sampled_from(UNARY)),
        st.tuples(st.just("binary"), st.sampled_from(BINARY)),
    )
    return st.tuples(kinds, near, near).map(lambda drawn: (*drawn[0], *drawn[1:]))


programs = st.lists(_instruction(), min_size=1, max_size=12)


def anchors(gm: fx.GraphModule, patterns: Iterable[Pattern]) -> list[fx.Node]:
    starting = {kind for pattern in patterns for kind in pattern.steps[0].kinds}
    kinds = ((node, kind_of(gm, node)) for node in gm.graph.nodes)
    return [node for node, kind in kinds if kind is not None and kind.name in starting]


def texts(report: MatchReport) -> tuple[list[str], list[str], int]:
    return list(map(str, report.matches)), list(map(str, report.refusals)), report.visits


@pytest.mark.parametrize("library", [FOLD_PATTERNS, FUSION_PATTERNS], ids=["fold", "fusion"])
@pytest.mark.parametrize("example", [True, False], ids=["shapes known", "shapes unknown"])
@settings(deadline=None, max_examples=60)
@given(instructions=programs)
def test_every_anchor_is_matched_or_has_a_reason(
    trace: Trace, library: tuple[Pattern, ...], example: bool, instructions: list[Instruction]
) -> None:
    inputs = [torch.ones(2, CHANNELS, 3, 3)] if example else []
    gm = trace(Program(instructions), *inputs)
    report = match_all(gm, library)
    names = {node.name for node in gm.graph.nodes}
    claimed = [node for match in report.matches for node in match.nodes]
    assert len(claimed) == len(set(claimed)), "matches are disjoint"
    for node in anchors(gm, library):
        match, miss = report.match_of(node), report.nearest_miss(node)
        assert (match is not None and node in match.nodes) or miss is not None
    for match in report.matches:
        assert len(match.nodes) == len(match.pattern.steps)
        for node, following in zip(match.nodes, match.nodes[1:], strict=False):
            assert node in following.all_input_nodes
            assert list(node.users) == [following]
    for refusal in report.refusals:
        assert len(refusal.reason.split()) > 3
        assert "{" not in refusal.reason, "the sentence is formatted"
        assert set(refusal.culprits) - {"table"} <= names
        assert refusal.anchor in names
        assert refusal.depth == len(refusal.bound)
    assert texts(match_all(gm, library)) == texts(report)


@settings(deadline=None, max_examples=150)
@given(instructions=programs)
def test_folding_what_matched_keeps_the_float_meaning(
    trace: Trace, fold: Fold, instructions: list[Instruction]
) -> None:
    """The bound: 12 ops of about 10 roundings (2**-53) each, relative to the largest value met."""
    model = Program(instructions).double().eval()
    x = torch.linspace(-1, 1, 2 * CHANNELS * 9, dtype=torch.float64).view(2, CHANNELS, 3, 3)
    gm = trace(copy.deepcopy(model), x)
    with torch.no_grad():
        expected = model(x)
        matches = match_all(gm, FOLD_PATTERNS).matches
        fold(matches)
        found = gm(x)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max() + 1))


def test_the_generator_reaches_matches_and_most_kinds_of_refusal(trace: Trace) -> None:
    """Else the properties above would hold of nothing."""
    seen: set[str] = set()

    @settings(deadline=None, max_examples=200, derandomize=True, database=None)
    @given(instructions=programs)
    def collect(instructions: list[Instruction]) -> None:
        for inputs in ((), (torch.ones(2, CHANNELS, 3, 3),)):
            report = match_all(trace(Program(instructions), *inputs), EVERYTHING)
            seen.update(f"match of {len(match.nodes)}" for match in report.matches)
            seen.update(refusal.guard or "structure" for refusal in report.refusals)

    collect()
    assert seen >= {
        "match of 2",
        "match of 3",
        "structure",
        "claimed",
        "single_user",
        "sole_owner_of_parameter",
        "has_running_statistics",
        "same_shape",
        "not_scalar_operand",
    }
