"""The metrics against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.errors import FxQuantError
from fxquant.models_zoo.metrics import agreement, sqnr_db, top1


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
