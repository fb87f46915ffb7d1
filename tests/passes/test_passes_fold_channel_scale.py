"""fold-channel-scale: a constant factor goes into the weight before it, where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.observers import MinMaxObserver
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.fold_channel_scale import FoldChannelScale
from fxquant.patterns.library import SCALE_PATTERNS
from fxquant.patterns.matcher import match_all
from fxquant.qconfig import QConfig
from fxquant.quantize_fx import prepare_fx
from tests.passes.helpers import (
    captured,
    graph_text,
    lively,
    node_named,
    propagate,
    reasons,
    run_alone,
)

Use = Callable[["Scaled", Tensor], Tensor]


class Scaled(nn.Module):
    """``use(base(x))`` with a factor of the given shape."""

    def __init__(self, base: nn.Module, shape: tuple[int, ...], use: Use) -> None:
        super().__init__()
        self.base, self.factor, self.use = base, nn.Parameter(torch.empty(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.base(x)) + 1


def _conv(dimensions: int, **options: Any) -> nn.Module:
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return module(4, 6, 3, **options)


def _transposed(dimensions: int, **options: Any) -> nn.Module:
    module = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    return module(4, 6, 3, **options)


def times(scaled: Scaled, y: Tensor) -> Tensor:
    return y * scaled.factor


SHAPES = {1: (2, 4, 7), 2: (2, 4, 7, 5), 3: (2, 4, 5, 4, 6)}

# the model, its input
FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        f"conv{d}d": (lambda d=d: Scaled(_conv(d), (6, *[1] * d), times), SHAPES[d])
        for d in (1, 2, 3)
    },
    **{
        f"conv_transpose{d}d": (
            lambda d=d: Scaled(_transposed(d, groups=2), (6, *[1] * d), times),
            SHAPES[d],
        )
        for d in (1, 2, 3)
    },
    "no bias": (lambda: Scaled(_conv(2, bias=False), (1, 6, 1, 1), times), SHAPES[2]),
    "the factor first": (
        lambda: Scaled(_conv(2), (6, 1, 1), lambda s, y: torch.mul(s.factor, y)),
        SHAPES[2],
    ),
    "one factor": (lambda: Scaled(_conv(2), (), times), SHAPES[2]),
    "one factor in an array": (lambda: Scaled(_conv(2), (1, 1), times), SHAPES[2]),
    "a number": (lambda: Scaled(_conv(2), (), lambda s, y: y.mul(-0.25)), SHAPES[2]),
    "linear": (lambda: Scaled(nn.Linear(4, 6), (6,), times), (2, 4)),
    "linear of a sequence": (lambda: Scaled(nn.Linear(4, 6), (1, 6), times), (2, 3, 4)),
    "ConvNeXt": (
        lambda: Scaled(nn.Linear(4, 6), (6, 1, 1), lambda s, y: s.factor * y.permute(0, 3, 1, 2)),
        (2, 5, 7, 4),
    ),
    "transposed": (
        lambda: Scaled(nn.Linear(4, 6), (6, 1), lambda s, y: y.transpose(-1, 1) * s.factor),
        (2, 5, 4),
    ),
    "square, where shapes cannot tell the channels": (
        lambda: Scaled(nn.Linear(4, 6), (6, 1, 1), lambda s, y: s.factor * y.permute(0, 3, 2, 1)),
        (2, 6, 6, 4),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    make, shape = FOLDED[name]
    model = lively(make())
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
    gm = captured(model, x)
    result = run_alone(FoldChannelScale(), gm)
    assert result.changes > 0
    assert not result.refusals
    assert not any("mul" in n.name for n in gm.graph.nodes)
    assert not hasattr(gm, "factor")
    # One rounding of each product to float32, in sums of up to 4 * 27 + 1 terms.
    with torch.no_grad():
        torch.testing.assert_close(gm(x), wanted, rtol=1e-5, atol=1e-4)
    before = fingerprint(gm)
    assert run_alone(FoldChannelScale(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before


def _read_twice(scaled: Scaled, y: Tensor) -> Tensor:
    return y * scaled.factor + y


def _weight_read_twice(scaled: Scaled, y: Tensor) -> Tensor:
    return y * scaled.factor + scaled.base.weight.sum()


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "along the width": (
        lambda: Scaled(_conv(2), (5,), times),
        (2, 4, 9, 7),
        "no constant factor of its channels",
    ),
    "along the wrong dimension of a square": (
        lambda: Scaled(nn.Linear(4, 6), (6, 1, 1), times),
        (2, 6, 6, 4),
        "no constant factor of its channels",
    ),
    "along two dimensions": (
        lambda: Scaled(_conv(2), (6, 5, 1), times),
        SHAPES[2],
        "no constant factor of its channels",
    ),
    "more dimensions than the value": (
        lambda: Scaled(nn.Linear(4, 6), (3, 1, 6), times),
        (2, 4),
        "no constant factor of its channels",
    ),
    "read twice": (lambda: Scaled(_conv(2), (6, 1, 1), _read_twice), SHAPES[2], "also used by"),
    "a weight that is read twice": (
        lambda: Scaled(_conv(2), (6, 1, 1), _weight_read_twice),
        SHAPES[2],
        "weight",
    ),
    "a factor of almost nothing": (
        lambda: Scaled(_conv(2), (), lambda s, y: y * 1e-9),
        SHAPES[2],
        "too small for an int8 scale",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, shape, reason = REFUSED[name]
    model = lively(make())
    x = torch.randn(shape)
    gm = captured(model, x)
    result = run_alone(FoldChannelScale(), gm)
    assert len(result.refusals) == 1
    assert reason in result.refusals[0].reason
    assert reason in reasons(gm, "mul")
    assert torch.equal(gm(x), model(x))
    again = run_alone(FoldChannelScale(), gm)
    assert again.changes == 0
    assert again.refusals == result.refusals


def test_a_gate_is_nothing_to_fold_and_nothing_to_refuse() -> None:
    model = Scaled(_conv(2), (), lambda s, y: y * y.mean((2, 3), keepdim=True).sigmoid())
    gm = captured(lively(model), torch.randn(SHAPES[2]))
    assert run_alone(FoldChannelScale(), gm) == PassResult(changes=0)


def test_without_shapes_only_a_number_is_folded() -> None:
    number = Scaled(_conv(2), (), lambda s, y: y * 0.5)
    assert run_alone(FoldChannelScale(), captured(lively(number))).changes > 0
    tensor = Scaled(_conv(2), (6, 1, 1), times)
    assert run_alone(FoldChannelScale(), captured(lively(tensor))).refusals


PER_TENSOR = QConfig(
    activation=MinMaxObserver.with_args(dtype=torch.quint8),
    weight=MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
)


def test_factors_do_not_go_into_a_weight_with_one_scale() -> None:
    model = lively(Scaled(_conv(2), (6, 1, 1), times))
    x = torch.randn(SHAPES[2])
    for mapping, folded in ((None, True), ({"": PER_TENSOR}, False), ({"": None}, True)):
        gm = captured(model, x)
        run_alone(propagate(model, mapping), gm)
        assert bool(run_alone(FoldChannelScale(), gm).refusals) != folded
    one = lively(Scaled(_conv(2), (), times))
    gm = captured(one, x)
    run_alone(propagate(one, {"": PER_TENSOR}), gm)
    assert not run_alone(FoldChannelScale(), gm).refusals  # one factor changes one scale


def test_transposed_convolutions_have_one_scale() -> None:
    model = lively(Scaled(_transposed(2), (6, 1, 1), times))
    gm = captured(model, torch.randn(SHAPES[2]))
    run_alone(propagate(model), gm)
    assert "one scale for all channels" in run_alone(FoldChannelScale(), gm).refusals[0].reason


def test_the_product_is_accounted_for() -> None:
    model = lively(Scaled(_conv(2), (6, 1, 1), times))
    gm = prepare_fx(model, None, (torch.randn(SHAPES[2]),))
    assert ("mul", "folded into the weight of 'base'") in gm.state.fates
    assert "mul" in node_named(gm, "base").meta["fxquant"].origins


def test_patterns_match_by_themselves() -> None:
    model = lively(Scaled(_conv(2), (6, 1, 1), times))
    report = match_all(captured(model, torch.randn(SHAPES[2])), SCALE_PATTERNS)
    assert [str(match) for match in report.matches] == ["scaled(base, mul)"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    make, shape = FOLDED["ConvNeXt"]
    gm = captured(lively(make()), torch.randn(shape))
    before = graph_text(gm)
    run_alone(FoldChannelScale(), gm)
    golden("fold-channel-scale", f"{before}\n\n-- fold-channel-scale -->\n\n{graph_text(gm)}")
