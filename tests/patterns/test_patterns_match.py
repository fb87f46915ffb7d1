"""Matches give bindings as attributes; refusals format their sentences when they are read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxquant.errors import ConfigError
from fxquant.patterns.library import FUSION_PATTERNS, pattern_named
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.matcher import match_all


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv(x))


@pytest.fixture
def match(trace: Callable[..., fx.GraphModule]) -> Match:
    gm = trace(Residual(), torch.ones(1, 3, 2, 2))
    (found,) = match_all(gm, FUSION_PATTERNS).matches
    return found


def test_bindings_are_attributes(match: Match) -> None:
    nodes = {node.name: node for node in match.gm.graph.nodes}
    assert match.pattern is pattern_named("conv2d-add-relu")
    assert match.conv.node is nodes["conv"]
    assert match.conv.name == "conv2d"
    assert match.op("conv") is match.conv
    assert match.add.node is nodes["add"]
    assert match.other is nodes["x"]
    assert match.activation.name == "relu"
    assert match.nodes == (nodes["conv"], nodes["add"], nodes["relu"])
    assert match.first is nodes["conv"]
    assert match.last is nodes["relu"]
    assert str(match) == "conv2d-add-relu(conv, add, relu)"


def test_an_unknown_binding_says_which_there_are(match: Match) -> None:
    with pytest.raises(
        AttributeError, match="'conv2d-add-relu' binds conv, add, activation, other, not 'bn'"
    ):
        match.bn  # noqa: B018
    assert not hasattr(match, "__deepcopy__")


def test_a_reason_is_formatted_when_it_is_read() -> None:
    class Loud:
        def __str__(self) -> str:
            raise RuntimeError("formatted")

    reason = because("{node!r} is {what}", "conv", node="conv", what=Loud())
    assert reason.culprits == ("conv",)
    with pytest.raises(RuntimeError, match="formatted"):
        str(reason)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a",), "by 'a'"),
        (("a", "b"), "by 'a' and 'b'"),
        (("a", "b", "c"), "by 'a', 'b' and 'c'"),
        (tuple("abcdefg"), "by 'a', 'b', 'c', 'd', 'e' and 2 more"),
    ],
)
def test_names_are_listed(names: tuple[str, ...], text: str) -> None:
    assert because("by {names}", names=names).text == text


@pytest.mark.parametrize("shape", [(1, 2), ()])
def test_shapes_are_no_names(shape: tuple[int, ...]) -> None:
    assert because("shape {shape}", shape=shape).text == f"shape {shape}"


def test_an_empty_reason_is_refused() -> None:
    with pytest.raises(ConfigError, match="must say why"):
        Reason("  ")


def test_a_refusal_prints_pattern_anchor_guard_and_reason(
    trace: Callable[..., fx.GraphModule],
) -> None:
    (refusal,) = match_all(trace(Residual()), [pattern_named("conv2d-add")]).refusals
    assert str(refusal).startswith("conv2d-add at 'conv' [same_shape]: the shape of 'conv' is not")
