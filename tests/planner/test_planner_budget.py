"""Budgets: what is understood, and that everything else is refused with the form."""

from __future__ import annotations

import math

import pytest

from fxquant.errors import ConfigError
from fxquant.planner.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("given", "expected", "objective"),
    [
        ({"accuracy_drop": 0.5}, Budget(accuracy_drop=0.5), "latency"),
        ({"accuracy_drop": 0}, Budget(accuracy_drop=0.0), "latency"),
        ({"latency": "0.8x"}, Budget(latency_ratio=0.8), "damage"),
        ({"latency": "3 ms"}, Budget(latency=0.003), "damage"),
        ({"latency": "250us"}, Budget(latency=250e-6), "damage"),
        ({"latency": "1e-3 s"}, Budget(latency=1e-3), "damage"),
        ({"size": "12 MB"}, Budget(size=12e6), "damage"),
        ({"size": "0.4 x"}, Budget(size_ratio=0.4), "damage"),
        (
            {"accuracy_drop": 1, "latency": "0.5x"},
            Budget(accuracy_drop=1.0, latency_ratio=0.5),
            "size",
        ),
        (
            "accuracy_drop <= 0.5, size<=.4x",
            Budget(accuracy_drop=0.5, size_ratio=0.4),
            "latency",
        ),
        ("latency <= 2ms,size <= 800kB", Budget(latency=0.002, size=8e5), "damage"),
        (Budget(size=3.0), Budget(size=3.0), "damage"),
    ],
)
def test_what_is_understood(given: object, expected: Budget, objective: str) -> None:
    found = parse_budget(given)
    assert found == expected
    assert found.objective == objective
    assert str(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "a budget is a dict"),
        (0.5, "a budget is a dict"),
        ({}, "one or two things, got 0"),
        ({"accuracy_drop": 1, "latency": "1x", "size": "1x"}, "got 3"),
        ({"accuracy": 1}, "no 'accuracy'; did you mean 'accuracy_drop'"),
        ({"latency": 3}, "no unit; units are x, s, ms, us"),
        ({"latency": "3 MB"}, "the unit 'MB'"),
        ({"size": "3 mb"}, "the unit 'mb'"),
        ({"accuracy_drop": "1 %"}, "no number"),
        ({"accuracy_drop": "0.5x"}, "the unit 'x'"),
        ({"latency": "-1x"}, "no number"),
        ({"latency": "0x"}, "above 0"),
        ({"accuracy_drop": -1}, "above 0"),
        ({"accuracy_drop": math.nan}, "finite"),
        ({"accuracy_drop": True}, "is a number"),
        ({"size": "1.2.3x"}, "no number"),
        ("latency 3ms", "is no limit"),
        ("latency < 3ms", "is no limit"),
        ("size <= 1x, size <= 2x", "twice"),
        ("", "is no limit"),
    ],
)
def test_what_is_refused(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_budget(given)
