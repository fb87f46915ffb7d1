"""Metrics against their definitions, in float64, on tensors of every form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigError
from fxquant.sensitivity.metrics import Metrics, MetricSums
from fxquant.sensitivity.rank import ranks, spearman


def measured(pairs: list[tuple[object, object]], *, classes: bool = True) -> Metrics:
    sums = MetricSums(classes=classes)
    for expected, found in pairs:
        sums.add(expected, found)
    return sums.result()


def test_the_definitions_over_all_batches() -> None:
    batches = [(torch.randn(n, 7), torch.randn(n, 7)) for n in (4, 1, 9)]
    y = torch.cat([a for a, _ in batches]).double()
    z = torch.cat([b for _, b in batches]).double()
    found = measured(batches)
    assert found.sqnr == pytest.approx(10 * math.log10(y.square().sum() / (y - z).square().sum()))
    assert found.mse == pytest.approx(F.mse_loss(z, y).item())
    assert found.cosine == pytest.approx(F.cosine_similarity(y.flatten(), z.flatten(), 0).item())
    expected = F.kl_div(z.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(expected.item())
    assert found.top1 == pytest.approx((y.argmax(1) == z.argmax(1)).double().mean().item())


def test_large_tensors_are_summed_to_a_millionth() -> None:
    y = torch.randn(3, 1 << 20)
    z = y + 1e-3 * torch.randn_like(y)
    found = measured([(y, z)], classes=False)
    noise = (y.double() - z.double()).square()
    # the difference of float32 numbers carries half an ulp of y: 6e-8 of 1 in 1e-3, uncorrelated
    assert found.mse == pytest.approx(noise.mean().item(), rel=1e-6)
    ratio = y.double().square().sum() / noise.sum()
    assert found.sqnr == pytest.approx(10 * math.log10(ratio), abs=1e-5)


def test_segmentation_has_its_classes_second() -> None:
    y, z = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    found = measured([(y, z)])
    p, q = (t.double().permute(0, 2, 3, 1).reshape(-1, 5) for t in (y, z))
    assert found.top1 == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())


def test_several_outputs_count_together_and_the_first_has_classes() -> None:
    y, z = torch.randn(4, 3), torch.randn(4, 3)
    a, b = torch.randn(4, 2), torch.randn(4, 2)
    found = measured([({"out": y, "n": 3, "aux": a}, {"out": z, "n": 3, "aux": b})])
    noise = ((y - z).double().square().sum() + (a - b).double().square().sum()) / 20
    assert found.mse == pytest.approx(noise.item())
    assert found.kl == pytest.approx(measured([(y, z)]).kl)


@pytest.mark.parametrize(
    ("expected", "found", "sqnr", "cosine"),
    [
        (torch.ones(3), torch.ones(3), math.inf, 1.0),
        (torch.zeros(3), torch.ones(3), -math.inf, 0.0),
        (torch.ones(3), torch.tensor([1.0, math.nan, 1.0]), -math.inf, -1.0),
        (torch.ones(3), -torch.ones(3), 10 * math.log10(3 / 12), -1.0),
    ],
)
def test_the_ends_of_the_scales(
    expected: Tensor, found: Tensor, sqnr: float, cosine: float
) -> None:
    metrics = measured([(expected, found)])
    assert metrics.sqnr == pytest.approx(sqnr)
    assert metrics.cosine == pytest.approx(cosine)
    assert metrics.kl is None
    assert metrics.top1 is None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"shapes \[3\] and \[4\]"):
        measured([(torch.ones(3), torch.ones(4))])
    with pytest.raises(CalibrationError, match="cannot be compared"):
        measured([(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))])
    with pytest.raises(CalibrationError, match="no output value"):
        measured([])


def test_damage_grows_as_things_get_worse() -> None:
    y = torch.randn(64, 5)
    noise = torch.randn_like(y)
    good, bad = (measured([(y, y + size * noise)]) for size in (0.01, 1.0))
    for metric in ("sqnr", "mse", "cosine", "kl", "top1"):
        assert good.damage(metric) < bad.damage(metric), metric
    assert good.noise == pytest.approx(10 ** (-good.sqnr / 10))
    with pytest.raises(ConfigError, match="no metric 'sqn'; did you mean 'sqnr'"):
        good.damage("sqn")
    with pytest.raises(ConfigError, match="no rows of classes"):
        measured([(torch.ones(3), torch.ones(3))]).damage("kl")


def test_spearman_is_pearson_of_ranks() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 * sum(d^2) / (n (n^2 - 1)) with d = 1, 1, 0, 0, where nothing ties
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
