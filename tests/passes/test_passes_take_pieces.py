"""take-pieces: every piece of a split tensor is an op of its own, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.take_pieces import TakePieces
from fxquant.quantize_fx import prepare_fx
from tests.passes.helpers import captured, graph_text, node_named, reasons, run_alone

Function = Callable[..., Any]


class Split(nn.Module):
    """``use(split(conv(x)))``."""

    def __init__(self, split: Function, use: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.split = split
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.split(self.conv(x)))


SPELLINGS: dict[str, Function] = {
    "torch.chunk": lambda y: torch.chunk(y, 2, 1),
    "chunk by keyword": lambda y: torch.chunk(y, chunks=2, dim=1),
    "y.chunk": lambda y: y.chunk(2, dim=1),
    "y.chunk along the batch": lambda y: y.chunk(2),
    "torch.split": lambda y: torch.split(y, 4, 1),
    "y.split": lambda y: y.split(4, dim=1),
    "y.split by keyword": lambda y: y.split(split_size=4, dim=1),
    "torch.split by keyword": lambda y: torch.split(y, split_size_or_sections=[2, 6], dim=1),
    "y.split of a computed size": lambda y: y.split(y.shape[1] // 2, 1),
    "torch.tensor_split": lambda y: torch.tensor_split(y, 2, 1),
    "y.tensor_split by indices": lambda y: y.tensor_split(indices=(3,), dim=1),
    "torch.unbind": lambda y: torch.unbind(y, 1),
    "y.unbind": lambda y: y.unbind(-1),
}


SPLITTING = (
    *(torch.chunk, torch.split, torch.tensor_split, torch.unbind),
    *("chunk", "split", "tensor_split", "unbind"),
)


@pytest.mark.parametrize("name", SPELLINGS)
def test_taken(name: str) -> None:
    model = Split(SPELLINGS[name], lambda pieces: (pieces[0].relu(), pieces[1] * 2)).eval()
    x = torch.randn(2, 3, 4, 5)
    gm = captured(model, x)
    run_alone(Functionalize(), gm)
    result = run_alone(TakePieces(), gm)
    assert result.changes > 0
    assert not result.refusals
    assert not any(n.target in SPLITTING for n in gm.graph.nodes)
    for given, wanted in zip(gm(x), model(x), strict=True):
        assert torch.equal(given, wanted)
    before = fingerprint(gm)
    assert run_alone(TakePieces(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before


def test_the_first_piece_carries_the_split_in_reports() -> None:
    def unpacked(pieces: Any) -> Tensor:
        first, second = pieces
        return first.relu() + second

    model = Split(lambda y: y.chunk(2, 1), unpacked).eval()
    gm = prepare_fx(model, None, (torch.randn(2, 3, 4, 4),))
    carried = {entry.name for entry in gm.state.ledger}
    assert "chunk" in carried
    carriers = [n.name for n in gm.graph.nodes if "chunk" in n.meta["fxquant"].origins]
    assert carriers == ["getitem"]


def test_a_piece_that_nobody_wants_goes() -> None:
    def second_only(pieces: Any) -> Tensor:
        _, second = pieces
        return second.relu()

    gm = captured(Split(lambda y: y.chunk(2, 1), second_only).eval(), torch.randn(2, 3, 4, 4))
    run_alone(TakePieces(), gm)
    assert [n.name for n in gm.graph.nodes] == ["x", "conv", "getitem_1", "relu", "output"]
    assert "chunk" in node_named(gm, "getitem_1").meta["fxquant"].origins


REFUSED: dict[str, tuple[Function, str]] = {
    "all of them to one op": (lambda pieces: torch.stack(pieces, 1), "'stack' reads all pieces"),
    "returned": (lambda pieces: pieces, "'output' reads all pieces"),
    "a slice of the tuple": (lambda pieces: torch.cat(pieces[:1], 1), "'getitem' reads all pieces"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    use, reason = REFUSED[name]
    model = Split(lambda y: torch.chunk(y, 2, 1), use).eval()
    x = torch.randn(2, 3, 4, 4)
    gm = captured(model, x)
    result = run_alone(TakePieces(), gm)
    assert [refusal.node for refusal in result.refusals] == ["chunk"]
    assert reason in result.refusals[0].reason
    assert reason in reasons(gm, "chunk")
    again = run_alone(TakePieces(), gm)
    assert again.changes == 0
    assert again.refusals == result.refusals


def test_the_rule_for_the_split_governs_its_pieces() -> None:
    model = Split(lambda y: torch.chunk(y, 2, 1), lambda pieces: pieces[0].relu()).eval()
    gm = prepare_fx(model, {"object_type": [(torch.chunk, None)]}, (torch.randn(2, 3, 4, 4),))
    record = node_named(gm, "getitem").meta["fxquant"]
    assert record.qconfig is None
    assert "chunk" in record.rule


def test_integers_are_left_alone() -> None:
    class OfIndices(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argsort(-1).chunk(2, 1)[0]

    gm = captured(OfIndices(), torch.randn(2, 4))
    assert run_alone(TakePieces(), gm) == PassResult(changes=0)


def test_golden(golden: Callable[[str, str], None]) -> None:
    model = Split(
        lambda y: y.chunk(2, dim=1), lambda pieces: torch.cat([pieces[1], pieces[0]], 1)
    ).eval()
    gm = captured(model, torch.randn(2, 3, 4, 4))
    before = graph_text(gm)
    run_alone(TakePieces(), gm)
    golden("take-pieces", f"{before}\n\n-- take-pieces -->\n\n{graph_text(gm)}")
