"""separate-padding: copied values are padded before the convolution, on integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.explain import explain
from fxquant.parity import parity
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.separate_padding import SeparatePadding
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx
from tests.passes.helpers import captured, graph_text, propagate, run_alone

MODES = ("reflect", "replicate", "circular")
SHAPES = {1: (8, 17), 2: (8, 9, 11), 3: (8, 5, 6, 7)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES: dict[str, dict[str, object]] = {
    "plain": {"padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "groups and stride": {"padding": 2, "stride": 2, "groups": 4},
    "none": {"padding": 0},
}


class Between(nn.Module):
    """``head(conv(stem(x)))``; the convolution is called twice."""

    def __init__(self, rank: int, mode: str, geometry: dict[str, object]) -> None:
        super().__init__()
        conv = CONVOLUTIONS[rank]
        self.stem = conv(3, 8, 1)
        self.conv = conv(8, 8, 3, padding_mode=mode, **geometry)
        self.head = conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(self.conv(self.stem(x)))))  # type: ignore[no-any-return]  # of a module


@pytest.mark.parametrize(
    ("rank", "mode", "geometry"),
    [(rank, mode, "plain") for rank in SHAPES for mode in MODES]
    + [(2, "reflect", "same"), (2, "circular", "groups and stride"), (2, "replicate", "none")],
)
def test_runs_in_int8(rank: int, mode: str, geometry: str) -> None:
    torch.manual_seed(0)
    model = Between(rank, mode, GEOMETRIES[geometry]).eval()
    x = torch.randn(2, 3, *SHAPES[rank][1:])
    with torch.no_grad():
        prepared = prepare_fx(model, None, (x,))
        assert float((prepared(x) - model(x)).abs().max()) < 1e-5
        reference, int8 = convert_to_reference_fx(prepared), convert_fx(prepared)
        report = parity(reference, int8, (2 * torch.randn_like(x),))
    assert report.ok, f"\n{report}"
    assert [row.kind for row in report.rows if row.floating] == [
        f"conv{rank}d"
    ]  # the head's result
    pads = [row for row in report.rows if row.kind == "pad"]
    assert len(pads) == (0 if geometry == "none" else 2)
    assert all(f"[{mode}]" in row.kernel and row.off_by_one == 0 for row in pads)
    notes = [row.notes for row in explain(int8).rows if row.path == "conv"]
    told = f"{mode} padding runs before it, on its input"
    assert all((told in note) == bool(pads) for note in notes)
    assert len(notes) == 2


def test_graph(golden: Callable[[str, str], None]) -> None:
    model = Between(2, "reflect", {"padding": (1, 2)}).eval()
    x = torch.randn(2, 3, 9, 11)
    gm = captured(model, x)
    run_alone(propagate(model), gm)
    assert run_alone(SeparatePadding(), gm).changes > 0
    golden("separate-padding", graph_text(gm))
    assert torch.equal(gm(x), model(x))
    assert model.conv.padding == (1, 2)  # the caller's module is another one
    before = fingerprint(gm)
    assert run_alone(SeparatePadding(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before


def test_hooks_refuse() -> None:
    model = Between(2, "reflect", {"padding": 1}).eval()
    model.conv.register_forward_pre_hook(lambda *_: None)
    x = torch.randn(2, 3, 9, 11)
    gm = captured(model, x)
    run_alone(propagate(model), gm)
    result = run_alone(SeparatePadding(), gm)
    assert "forward hooks" in result.refusals[0].reason
    assert result.changes == 0


def test_trains() -> None:
    torch.manual_seed(0)
    model = Between(2, "circular", {"padding": 1}).train()
    x = torch.randn(2, 3, 9, 11)
    prepared = prepare_qat_fx(model, None, (x,))
    prepared(x).sum().backward()
    assert prepared.get_parameter("conv.weight").grad is not None
    int8 = convert_fx(prepared)
    assert parity(convert_to_reference_fx(prepared), int8, (x,)).ok
