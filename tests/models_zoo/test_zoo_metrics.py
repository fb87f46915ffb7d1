"""The metrics against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.errors import FxQuantError
from fxquant.models_zoo.metrics import agreement, equal_error_rate, spearman, sqnr_db, top1


def test_top1_counts_rows_whose_largest_logit_is_the_label() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert top1(logits, torch.tensor([1, 0, 0, 0])) == 75.0


def test_agreement_is_symmetric_and_ignores_the_margin() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    b = torch.tensor([[1.0, 1.1], [0.0, 9.0]])
    assert agreement(a, b) == agreement(b, a) == 50.0
    assert agreement(a, 10 * a) == 100.0


def test_sqnr_is_ten_times_the_log_of_the_power_ratio() -> None:
    reference = torch.tensor([3.0, 4.0])  # power 25
    other = torch.tensor([3.0, 4.5])  # noise power 0.25
    assert sqnr_db(reference, other) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([0.0, 0.0], [1.0, 0.0], -math.inf),
    ],
)
def test_sqnr_at_its_limits(reference: list[float], other: list[float], expected: float) -> None:
    assert sqnr_db(torch.tensor(reference), torch.tensor(other)) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sqnr_of_a_non_finite_result_is_nan(bad: float) -> None:
    assert math.isnan(sqnr_db(torch.tensor([1.0, 1.0]), torch.tensor([1.0, bad])))
    assert math.isnan(sqnr_db(torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0])))


def test_mismatched_or_empty_inputs_are_refused() -> None:
    with pytest.raises(FxQuantError, match="one label per row"):
        top1(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(FxQuantError, match="no rows"):
        top1(torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(FxQuantError, match="same inputs"):
        agreement(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(FxQuantError, match="same shape"):
        sqnr_db(torch.zeros(3), torch.zeros(4))


def test_spearman_is_pearson_on_ranks_with_shared_ranks_for_equals() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 30.0, 20.0, 90.0])
    assert spearman(a, b) == pytest.approx(0.8)  # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    ties = spearman(torch.tensor([5.0, 5.0, 7.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert ties == pytest.approx(1.5 / math.sqrt(3.0))


def test_spearman_refuses_what_has_no_order() -> None:
    with pytest.raises(FxQuantError, match="all the same"):
        spearman(torch.ones(3), torch.arange(3.0))
    with pytest.raises(FxQuantError, match="pass two vectors"):
        spearman(torch.ones(3), torch.ones(4))


def test_equal_error_rate_by_hand() -> None:
    scores = torch.tensor([0.9, 0.8, 0.4, 0.7, 0.3, 0.2])
    same = torch.tensor([True, True, True, False, False, False])
    # At 0.7 and above two of three are accepted rightly, and one of three wrongly.
    assert equal_error_rate(scores, same) == pytest.approx(100 / 3)
    assert equal_error_rate(torch.tensor([0.9, 0.1]), torch.tensor([True, False])) == 0.0
    with pytest.raises(FxQuantError, match="alike"):
        equal_error_rate(scores, same | True)
