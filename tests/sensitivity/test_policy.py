"""Policies on made-up measurements: what is fragile, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from fxquant.errors import ConfigError, UnmatchedRuleError
from fxquant.sensitivity.metrics import Metrics
from fxquant.sensitivity.policy import UNCURED, Decision, Evidence, Policy, decide
from fxquant.sensitivity.results import FIRST, LAST, LayerResult, Measurement
from tests.made_layers import made_layer


def measurement(sqnr: float, user: Mapping[str, float] | None = None) -> Measurement:
    noise = 10 ** (-sqnr / 10)
    metrics = Metrics(sqnr=sqnr, mse=2 * noise, cosine=1 - noise / 2, kl=noise, top1=1.0)
    return Measurement(output=metrics, user=user or {})


def result(
    name: str,
    sqnr: float | None,
    *,
    place: str = "",
    cures: Mapping[str, float] | None = None,
    user: Mapping[str, float] | None = None,
    estimates: Mapping[str, float] | None = None,
) -> LayerResult:
    return LayerResult(
        layer=made_layer(name),
        place=place,
        measurements={} if sqnr is None else {"int8": measurement(sqnr, user)},
        cures={cure: measurement(value) for cure, value in (cures or {}).items()},
        estimates=estimates or {},
    )


def evidence(*results: LayerResult, baseline: float | None = None, **changes: Any) -> Evidence:
    known: dict[str, Any] = {
        "results": results,
        "precision": "int8",
        "all_but_one": baseline is not None,
        "baseline": None if baseline is None else measurement(baseline),
        "metric": "sqnr",
        "float_user": {},
    }
    return Evidence(**{**known, **changes})


def verdicts(found: Evidence, **options: Any) -> dict[str, str]:
    return {name: d.verdict for name, d in decide(found, Policy(**options)).items()}


ROBUST = [result(f"robust{i}", 45.0) for i in range(5)]


@pytest.mark.parametrize(
    ("sqnr", "fragile"),
    [
        (45.0, False),
        (35.5, False),  # ten times the median's noise and more, but little of the output
        (30.5, False),
        (29.5, True),  # 0.1 % of the output's power, and 35 times the median
        (19.9, True),
    ],
)
def test_outliers_and_much_noise_are_fragile(sqnr: float, fragile: bool) -> None:
    found = decide(evidence(*ROBUST, result("x", sqnr)), Policy())
    assert found["x"].fragile is fragile
    assert found["x"].verdict == ("keep FP32" if fragile else "int8")
    assert not any(found[r.name].fragile for r in ROBUST)


def test_where_all_are_bad_one_percent_decides() -> None:
    bad = [result(f"bad{i}", 25.0) for i in range(5)]
    found = verdicts(evidence(*bad, result("x", 19.0)))
    assert found == {**{r.name: "int8" for r in bad}, "x": "keep FP32"}


def test_the_ends_stay_in_fp32_when_they_are_nearly_fragile() -> None:
    # a third of what makes a layer fragile: 30 dB and 4.8 dB more, 34.8
    for place in (FIRST, LAST):
        nearly = evidence(*ROBUST, result("x", 34.0, place=place))
        assert verdicts(nearly)["x"] == "keep FP32"
        assert verdicts(nearly, keep_first_last_fp32=False)["x"] == "int8"
        well = evidence(*ROBUST, result("x", 36.0, place=place))
        assert verdicts(well)["x"] == "int8"
        assert verdicts(well, keep_first_last_fp32=True)["x"] == "keep FP32"
    inside = evidence(*ROBUST, result("x", 34.0))
    assert verdicts(inside)["x"] == "int8"


def test_without_a_measurement_the_ends_are_a_prior() -> None:
    found = evidence(
        result("a", None, place=FIRST), result("b", None), result("c", None, place=LAST)
    )
    assert verdicts(found) == {"a": "keep FP32", "b": "int8", "c": "keep FP32"}
    assert set(verdicts(found, keep_first_last_fp32=False).values()) == {"int8"}


@pytest.mark.parametrize(
    ("cures", "verdict"),
    [
        ({"per-channel": 30.0}, "int8 with per-channel weights"),
        ({"per-channel": 20.5}, "keep FP32"),  # leaves more than a quarter of the noise
        ({"min-max": 15.0, "per-channel": 16.0}, "keep FP32"),
        # the plainest of those within a factor of two of the best
        ({"per-channel": 38.0, "percentile": 40.0}, "int8 with per-channel weights"),
        ({"per-channel": 36.0, "percentile": 40.0}, "int8 with 99.99 % activation ranges"),
        ({}, "keep FP32"),
    ],
)
def test_cures_have_to_help(cures: dict[str, float], verdict: str) -> None:
    found = evidence(*ROBUST, result("x", 15.0, cures=cures))
    assert verdicts(found)["x"] == verdict
    assert verdicts(found, cures=False)["x"] == "keep FP32"
    first = evidence(*ROBUST, result("x", 15.0, cures=cures, place=FIRST))
    assert verdicts(first)["x"] == "keep FP32"


def test_a_cure_that_still_makes_much_noise_is_none() -> None:
    found = evidence(*ROBUST, result("x", 5.0, cures={"per-channel": 18.0}))
    assert verdicts(found)["x"] == "keep FP32"


def test_thresholds_are_of_the_metric_that_is_named() -> None:
    found = evidence(result("a", 40.0), result("b", 30.0), result("c", 20.0))
    assert verdicts(found, threshold=35)["a"] == "int8"
    assert list(verdicts(found, threshold=35).values()).count("keep FP32") == 2
    by_mse = verdicts(found, metric="mse", threshold=2 * 10**-2.5)
    assert by_mse == {"a": "int8", "b": "int8", "c": "keep FP32"}
    by_cosine = verdicts(found, metric="cosine", threshold=1 - 10**-3.5 / 2)
    assert by_cosine == {"a": "int8", "b": "keep FP32", "c": "keep FP32"}


def test_top_k_and_lists() -> None:
    found = evidence(result("a", 40.0), result("b", 30.0), result("c", 20.0))
    assert verdicts(found, top_k=1) == {"a": "int8", "b": "int8", "c": "keep FP32"}
    assert verdicts(found, top_k=0) == dict.fromkeys("abc", "int8")
    listed = verdicts(found, top_k=1, keep_fp32=("a",), keep_int8=("c",))
    assert listed == {"a": "keep FP32", "b": "int8", "c": "int8"}


def test_all_but_one_counts_what_a_layer_in_fp32_saves() -> None:
    # everything in int8: 20 dB, noise 0.01; without b a quarter of it is gone, without c 10 %
    b, c = (-10 * math.log10(0.01 * left) for left in (0.75, 0.9))
    found = evidence(
        result("a", 20.0),
        result("b", b + 1e-6, cures={UNCURED: 20.0, "per-channel": 40.0}),
        result("c", c),
        baseline=20.0,
    )
    assert verdicts(found) == {"a": "int8", "b": "int8 with per-channel weights", "c": "int8"}
    assert found.damage(found.results[1]) == pytest.approx(b - 20.0)
    assert found.damage(found.results[1], "mse") == pytest.approx(2 * 0.01 * 0.25, rel=1e-5)


def test_all_but_one_leaves_small_noise_alone() -> None:
    # everything in int8: 40 dB; half of that little is no reason for FP32
    assert verdicts(evidence(result("a", 43.0), result("b", 40.0), baseline=40.0))["a"] == "int8"


def test_functions_of_the_user_count_what_is_lost() -> None:
    results = [result(f"r{i}", 40.0, user={"accuracy": 0.9}) for i in range(4)]
    results.append(result("x", 40.0, user={"accuracy": 0.5}))
    found = evidence(*results, metric="accuracy", float_user={"accuracy": 0.91})
    assert found.damage(results[-1]) == pytest.approx(0.41)
    assert verdicts(found)["x"] == "keep FP32"
    assert verdicts(found, threshold=0.6)["x"] == "keep FP32"
    assert verdicts(found, threshold=0.4)["x"] == "int8"


def test_estimates_decide_by_outliers() -> None:
    results = [result(f"r{i}", None, estimates={"hessian": 1.0}) for i in range(5)]
    results.append(result("x", None, estimates={"hessian": 11.0}))
    found = evidence(*results, metric="hessian")
    assert verdicts(found)["x"] == "keep FP32"
    assert verdicts(found)["r0"] == "int8"


def test_contradictions_and_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="not both"):
        Policy(threshold=1.0, top_k=2)
    with pytest.raises(ConfigError, match="top_k"):
        Policy(top_k=-1)
    with pytest.raises(ConfigError, match="one string"):
        Policy(keep_fp32="conv1")  # type: ignore[arg-type]  # what people write
    with pytest.raises(ConfigError, match="in keep_fp32 and in keep_int8"):
        Policy(keep_fp32=("a",), keep_int8=("a",))
    with pytest.raises(UnmatchedRuleError, match="no layer 'robust'; did you mean"):
        decide(evidence(*ROBUST), Policy(keep_fp32=("robust",)))
    with pytest.raises(ConfigError, match="no metric"):
        decide(evidence(*ROBUST), Policy(metric="accuracy"))
    assert Decision(precision="fp32").verdict == "keep FP32"
