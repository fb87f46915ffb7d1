"""Plans for EfficientNet-Lite0 with one scale a weight, which costs it 9 points of top-1."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.planner import CANDIDATES, PER_TENSOR, SLACK, Half, halves, small
from fxquant import Plan, plan_mixed_precision, quantize
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.planner.judge import int8_share

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def entry(data_dir: Path) -> ZooEntry:
    pytest.importorskip("PIL", reason="the images are JPEG files")
    return load("efficientnet_lite0", data_dir=data_dir)


@pytest.mark.timeout(3600)
def test_a_plan_recovers_what_one_scale_a_weight_loses(entry: ZooEntry) -> None:
    mine, theirs = halves(entry)
    assert len(theirs.expected) >= 700
    per_channel = quantize(entry.model, small(entry.calibration), progress=False)
    drop = 100 - mine.agreement(per_channel) + SLACK
    plan = plan_mixed_precision(
        entry.model,
        small([entry.calibration[0][:32]]),
        budget={"accuracy_drop": drop},
        candidates=CANDIDATES,
        judge_data=mine.inputs,
        qconfig_mapping={"": PER_TENSOR},
        example_inputs=(mine.inputs[0][:1],),
        cache=False,
        progress=False,
    )
    _check(plan, theirs.agreement(per_channel), theirs)


def _check(plan: Plan, wanted: float, theirs: Half) -> None:
    assert plan.feasible
    int8 = plan.convert()
    found = theirs.agreement(int8)
    assert found >= wanted - 1.5
    assert int8_share(int8) >= 0.75
    # Predicted, as tests do not rely on the clock: `python -m benchmarks.planner fragile` measures.
    for rival in ("greedy", "first-last"):
        if theirs.agreement(plan.convert(rival)) >= found:
            assert plan.predicted["plan"].latency <= 1.02 * plan.predicted[rival].latency
