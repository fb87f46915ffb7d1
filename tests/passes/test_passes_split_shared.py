"""split-shared: one scale for what is joined, or requantizing, whichever loses less."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.compat import QConfigMapping
from fxquant.compat import convert_fx as convert_compat
from fxquant.compat import prepare_fx as prepare_compat
from fxquant.explain import explain
from fxquant.metadata import record_of
from fxquant.observers import FixedQParamsObserver, MinMaxObserver
from fxquant.parity import parity
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.split_shared import SplitShared
from fxquant.qconfig import QConfig, get_default_qconfig
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx
from tests.passes.helpers import graph_text, run_alone

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
QUICK = QConfig(
    activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=get_default_qconfig().weight
)


class Skip(nn.Module):
    """``head(join(y, up(down(y))))``, the second branch ``gain`` times as large.

    Args:
        gain: of the second branch.
        readers: of ``y`` beside the joint.
        join: the two.
    """

    def __init__(
        self, gain: float, readers: int = 1, join: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(readers))
        self.join = join or (lambda y, z: torch.cat([y, z], 1))
        self.head = nn.Conv2d(8 if join else 16, 4, 1)
        with torch.no_grad():
            self.up.weight *= gain

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.stem(x))
        z = F.relu(self.up(x))
        return (self.head(self.join(y, z)), *(layer(y) for layer in self.down))


def _prepared(model: nn.Module, mapping: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        prepared = prepare_fx(model.eval(), mapping or {"": QUICK}, (X,), **options)
        prepared(X)
    return prepared


def _scales(int8: Any) -> dict[str, float]:
    return {row.name: row.scale for row in explain(int8).rows if row.scale is not None}


JOINTS: dict[str, Callable[..., Tensor] | None] = {
    "cat": None,
    "stack": lambda y, z: torch.stack([y, z], 1)[:, 0],
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@pytest.mark.parametrize("name", JOINTS)
def test_a_branch_with_another_reader_keeps_its_scale(name: str) -> None:
    model = Skip(20.0, join=JOINTS[name])
    prepared = _prepared(model)
    int8 = convert_fx(prepared)
    with torch.no_grad():
        report = parity(convert_to_reference_fx(prepared), int8, (2 * X,))
    assert report.ok, f"\n{report}"
    scales = _scales(int8)
    assert scales["stem"] < scales["up"] / 5
    notes = " ".join(note for row in explain(int8).rows for note in row.notes)
    assert "'relu' keeps its scale" in notes
    assert "requantized here" in notes


@pytest.mark.parametrize(
    ("gain", "readers", "apart"),
    [(20.0, 0, False), (20.0, 1, True), (1.0, 1, False), (1.6, 1, None), (1.6, 4, None)],
)
def test_the_choice_is_the_one_that_loses_less(
    gain: float, readers: int, apart: bool | None
) -> None:
    """The noise powers of both ways, from the scales that the observers alone would give."""
    model = Skip(gain, readers).eval()
    with torch.no_grad():
        y, z = F.relu(model.stem(X)), F.relu(model.up(X))
    own = float(y.max()) / 255
    whole = max(float(y.max()), float(z.max())) / 255
    shared = (readers + 1) * whole**2
    split = readers * own**2 + whole**2 + own**2
    wanted = split < shared
    assert apart is None or wanted is apart
    scales = _scales(convert_fx(_prepared(model)))
    assert math.isclose(scales["stem"], own if wanted else whole, rel_tol=1e-3)


def test_it_is_better_where_it_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Skip(20.0)
    with torch.no_grad():
        wanted = model.eval()(X)
        split = convert_fx(_prepared(model))(X)
        monkeypatch.setattr(SplitShared, "run", lambda *_: PassResult(changes=0))
        shared = convert_fx(_prepared(model))(X)
    noise = [[float((g - w).square().mean()) for g, w in zip(given, wanted, strict=True)]
             for given in (split, shared)]  # fmt: skip
    assert noise[0][1] < noise[1][1] / 10  # the other reader
    assert noise[0][0] < noise[1][0] * 1.1  # behind the joint


def test_a_fixed_scale_is_honoured() -> None:
    """A value whose observer fixes its scale, joined with one that is free."""
    fixed = QConfig(
        activation=FixedQParamsObserver.with_args(
            scale=1 / 64, zero_point=0, dtype=torch.quint8, quant_min=0, quant_max=255
        ),
        weight=get_default_qconfig().weight,
    )
    int8 = convert_fx(_prepared(Skip(20.0, 0), {"": QUICK, "stem": fixed}))
    assert math.isclose(_scales(int8)["stem"], 1 / 64)
    notes = " ".join(note for row in explain(int8).rows for note in row.notes)
    assert "which its observer fixes" in notes


def test_what_shares_says_so() -> None:
    int8 = convert_fx(_prepared(Skip(20.0, 0)))
    notes = explain(int8).row("cat").notes
    assert any("has the common scale" in note and "nobody else reads it" in note for note in notes)


def test_graph(golden: Callable[[str, str], None]) -> None:
    prepared = _prepared(Skip(20.0), bias_correction=False)
    assert run_alone(SplitShared(), prepared).changes > 0
    golden("split-shared", graph_text(prepared))
    groups = {n.name: record_of(n).share_group for n in prepared.graph.nodes}
    assert groups["relu"] != groups["relu_1"] == groups["cat"]
    before = fingerprint(prepared)
    assert run_alone(SplitShared(), prepared) == PassResult(changes=0)
    assert fingerprint(prepared) == before


def test_what_trained_with_one_scale_keeps_it() -> None:
    prepared = prepare_qat_fx(Skip(20.0).train(), None, (X,))
    prepared(X)
    scales = _scales(convert_fx(prepared))
    assert scales["stem"] == scales["up"]


def test_compat_shares_as_torch() -> None:
    model = Skip(20.0).eval()
    prepared = prepare_compat(model, QConfigMapping().set_global(QUICK), (X,))
    prepared(X)
    int8 = convert_compat(prepared)
    assert "requantized here" not in str(explain(int8).rows)


def test_a_branch_in_two_widths_is_told() -> None:
    """Its readers want other integers: 4 bits for one, 8 for the other."""
    narrow = QConfig(
        activation=MinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=15),
        weight=get_default_qconfig().weight,
    )
    prepared = _prepared(Skip(1.0, 1), {"": QUICK, "down.0": narrow})
    int8 = convert_fx(prepared)
    notes = explain(int8).row("down_0").notes
    assert any("'relu' is uint8 affine 0..255 for others" in note for note in notes)
    assert any("quantized again to uint8 affine 0..15 for this" in note for note in notes)
    with torch.no_grad():
        assert parity(convert_to_reference_fx(prepared), int8, (X,)).ok
