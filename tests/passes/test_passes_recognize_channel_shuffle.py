"""recognize-channel-shuffle: the four ops that are one, at every resolution, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.recognize_channel_shuffle import RecognizeChannelShuffle
from tests.passes.helpers import Around, captured, graph_text, node_named, run_alone

Function = Callable[[Tensor], Any]


def as_in_torchvision(x: Tensor, groups: int = 2) -> Tensor:
    """``channel_shuffle`` of torchvision's ShuffleNet."""
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


SPELLINGS: dict[str, Function] = {
    "torchvision": as_in_torchvision,
    "torchvision with 4 groups": lambda x: as_in_torchvision(x, 4),
    "shape and reshape": lambda x: (
        x.reshape(x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3])
        .permute(0, 2, 1, 3, 4)
        .reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    ),
    "sizes one by one": lambda x: (
        x.view(x.size(0), 2, -1, x.size(2), x.size(3))
        .transpose(-4, 2)
        .contiguous()
        .view(x.size(0), -1, x.size(2), x.size(3))
    ),
    "numbers": lambda x: x.view(2, 4, 2, 6, 5).transpose(2, 1).reshape(2, 8, 6, 5),
    "a shape in one argument": lambda x: (
        torch.reshape(x, (-1, 2, 4, 6, 5)).transpose(1, 2).reshape((-1, 8, 6, 5))
    ),
    "the size of a group as a number": lambda x: (
        x.view(x.size(0), x.size(1) // 4, 4, x.size(2), x.size(3))
        .transpose(1, 2)
        .reshape(x.size(0), x.size(1), x.size(2), x.size(3))
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_recognized(name: str) -> None:
    model = Around(SPELLINGS[name])
    x = torch.randn(2, 8, 6, 5)
    gm = captured(model, x)
    run_alone(Functionalize(), gm)
    assert run_alone(RecognizeChannelShuffle(), gm).changes > 0
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    assert [n.target for n in calls][1:-1] == [F.channel_shuffle]
    assert len(calls[1].meta["fxquant"].origins) >= 3
    assert torch.equal(gm(x), model(x))
    if not any(word in name for word in ("numbers", "one argument")):
        other = torch.randn(3, 8, 4, 7)
        assert torch.equal(gm(other), model(other))
    before = fingerprint(gm)
    assert run_alone(RecognizeChannelShuffle(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before


def _read_between(x: Tensor) -> Tensor:
    split = x.view(x.size(0), 2, 4, x.size(2), x.size(3))
    shuffled = split.transpose(1, 2).reshape(x.size(0), 8, x.size(2), x.size(3))
    return shuffled + split.sum()


OTHERS: dict[str, Function] = {
    "other dimensions": lambda x: x.view(2, 2, 4, 6, 5).transpose(2, 3).reshape(2, 8, 6, 5),
    "another shape behind": lambda x: x.view(2, 2, 4, 6, 5).transpose(1, 2).reshape(2, 4, 12, 5),
    "not split into groups": lambda x: x.view(2, 8, 2, 3, 5).transpose(1, 2).reshape(2, 8, 6, 5),
    "no transposition": lambda x: x.view(2, 2, 4, 6, 5).reshape(2, 8, 6, 5),
    "read between": _read_between,
    "sizes of something else": lambda x: (
        x.view(x.size(0), 2, 4, x.size(2), x.size(3))
        .transpose(1, 2)
        .reshape(x.size(0), 8, x.size(3) + 1, x.size(3))
    ),
    "groups that depend on the channels": lambda x: (
        x.view(x.size(0), x.size(1) // 4, -1, x.size(2), x.size(3))
        .transpose(1, 2)
        .reshape(x.size(0), 8, x.size(2), x.size(3))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    model = Around(OTHERS[name])
    x = torch.randn(2, 8, 6, 5)
    gm = captured(model, x)
    assert run_alone(RecognizeChannelShuffle(), gm) == PassResult(changes=0)
    assert torch.equal(gm(x), model(x))


def test_without_shapes_nothing_is_recognized() -> None:
    gm = captured(Around(as_in_torchvision))
    assert run_alone(RecognizeChannelShuffle(), gm) == PassResult(changes=0)


def test_sizes_that_others_read_stay() -> None:
    def twice(x: Tensor) -> Tensor:
        batch, channels, height, width = x.size()
        shuffled = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return shuffled.reshape(batch, channels, height, width) / height

    gm = captured(Around(twice), torch.randn(2, 8, 6, 5))
    run_alone(RecognizeChannelShuffle(), gm)
    assert node_named(gm, "size").users
    other = torch.randn(2, 8, 3, 3)
    assert torch.equal(gm(other), Around(twice)(other))


def test_golden(golden: Callable[[str, str], None]) -> None:
    gm = captured(Around(as_in_torchvision), torch.randn(2, 8, 6, 5))
    before = graph_text(gm)
    run_alone(RecognizeChannelShuffle(), gm)
    golden(
        "recognize-channel-shuffle",
        f"{before}\n\n-- recognize-channel-shuffle -->\n\n{graph_text(gm)}",
    )
