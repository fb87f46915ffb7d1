"""Plans for EfficientNet-Lite0 with one scale a weight, which costs it 9 points of top-1."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.planner import PER_TENSOR, SLACK, agreement, halves
from fxquant import Plan, plan_mixed_precision, quantize
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.planner.build import lowered
from fxquant.planner.judge import int8_share
from fxquant.sensitivity.network import Assignment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def entry(data_dir: Path) -> ZooEntry:
    pytest.importorskip("PIL", reason="the images are JPEG files")
    return load("efficientnet_lite0", data_dir=data_dir)


@pytest.mark.timeout(3600)
def test_a_plan_recovers_what_one_scale_a_weight_loses(entry: ZooEntry) -> None:
    mine, theirs = halves(entry)
    assert sum(map(len, theirs)) >= 700
    per_channel = quantize(entry.model, entry.calibration, progress=False)
    drop = 100 - agreement(entry, per_channel, mine) + SLACK
    plan = plan_mixed_precision(
        entry.model,
        [entry.calibration[0][:32]],
        budget={"accuracy_drop": drop},
        judge_data=mine,
        qconfig_mapping={"": PER_TENSOR},
        example_inputs=(mine[0][:1],),
        cache=False,
        progress=False,
    )
    _check(entry, plan, agreement(entry, per_channel, theirs), theirs)


def _check(entry: ZooEntry, plan: Plan, wanted: float, theirs: list[Tensor]) -> None:
    assert plan.feasible
    int8 = plan.convert()
    found = agreement(entry, int8, theirs)
    assert found >= wanted - 1.5
    assert int8_share(int8) >= 0.75
    # Predicted, as tests do not rely on the clock: `python -m benchmarks.planner fragile` measures.
    greedy = agreement(entry, plan.convert("greedy"), theirs)
    if greedy >= found:
        assert plan.predicted["plan"].latency <= 1.02 * plan.predicted["greedy"].latency
    layers = [layer.name for layer in plan.layers]
    ends = lowered(plan.network, Assignment({layers[0]: "fp32", layers[-1]: "fp32"}))
    assert found > agreement(entry, ends, theirs)
