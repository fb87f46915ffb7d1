"""plan_mixed_precision on small networks: budgets are kept, and plans are what prepare_fx makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import (
    CalibrationError,
    ConfigError,
    ConfigWarning,
    EntropyRule,
    HistogramObserver,
    MinMaxRule,
    MSERule,
    PercentileRule,
    Plan,
    QConfig,
    bfloat16_static_qconfig,
    calibrate,
    convert_fx,
    default_dynamic_qconfig,
    default_weight_observer,
    get_default_qconfig,
    plan_mixed_precision,
    prepare_fx,
)
from fxquant.planner.build import lowered
from fxquant.planner.cache import LatencyCache, graph_key
from fxquant.planner.candidates import CANDIDATES, precisions_of, representation_of
from fxquant.planner.clock import node_times
from fxquant.planner.planner import STRATEGIES
from fxquant.planner.pricing import Priced, price
from fxquant.planner.problem import OUTSIDE, Choice, Costs, Edge, Problem
from fxquant.planner.units import Unit, Wiring, shares_of, wiring_of
from fxquant.sensitivity.network import Assignment, CalibratedNetwork
from tests.made_layers import made_layer

PER_TENSOR = QConfig(
    activation=get_default_qconfig("x86").activation, weight=default_weight_observer
)

BUDGET = 0.6
"""Points of ``error``; all layers in int8 lose about twice that."""


class Net(nn.Module):
    """Four convolutions, a residual sum, a head; the third convolution is fragile per tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 1)
        self.d = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            factor = torch.full((16,), 1.0)
            factor[0] = 100.0
            self.c.weight *= factor.reshape(-1, 1, 1, 1)
            self.c.bias *= factor
            self.d.weight /= factor.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = (self.b(y) + y).relu()
        y = self.d(self.c(y).relu()).relu()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randn(16, 3, 12, 12)]


def plan_of(model: nn.Module, data: Sequence[Tensor], **options: Any) -> Plan:
    wanted: dict[str, Any] = {
        "qconfig_mapping": {"": PER_TENSOR},
        "metric": "error",
        "repeats": 3,
        "progress": False,
        "budget": {"accuracy_drop": BUDGET, "latency": "1000x"},  # made small: size
    }
    return plan_mixed_precision(model, data, **(wanted | options))


@dataclass(frozen=True)
class Case:
    model: nn.Module
    data: list[Tensor]
    plan: Plan


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(16, 3, 12, 12)]
    return Case(model, data, plan_of(model, data, cache=False, measure_front=True))


def test_the_fragile_layer_stays_in_fp32(case: Case) -> None:
    plan = case.plan
    assert plan.feasible
    assert plan.models["int8"].drop > 1.5 * BUDGET
    assert plan.models["plan"].drop <= BUDGET
    assert {"fp32"} <= {plan.precisions["c"], plan.precisions["d"]}
    assert "int8" in plan.precisions.values()
    assert plan.gap is not None  # five layers: all plans were tried
    assert 0 <= plan.gap < 0.5


def test_the_mapping_makes_the_model_of_the_plan(case: Case) -> None:
    model, data, plan = case.model, case.data, case.plan
    prepared = prepare_fx(model, plan.qconfig_mapping(), (data[0],))
    int8 = convert_fx(calibrate(prepared, data, progress=False))
    assert torch.equal(int8(data[0]), plan.convert()(data[0]))
    with torch.no_grad():
        expected, found = model(data[0]), int8(data[0])
    error = float((found - expected).norm() / expected.norm())
    assert plan.models["plan"].drop == pytest.approx(100 * error, rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_budget(
    model: nn.Module, data: list[Tensor], strategy: str
) -> None:
    plan = plan_of(
        model, data, strategy=strategy, budget=f"accuracy_drop <= {BUDGET}, size <= 0.9x"
    )
    assert plan.feasible
    assert plan.strategy == strategy
    assert plan.models["plan"].drop <= BUDGET
    assert plan.models["plan"].size <= 0.9 * plan.models["fp32"].size


def test_exact_searches_are_not_beaten(model: nn.Module, data: list[Tensor]) -> None:
    """Before repair; all use the same measured costs, which the cache holds."""
    costs = {}
    for strategy in ("exhaustive", "pareto", "greedy"):
        plan = plan_of(model, data, strategy=strategy, budget={"size": "0.6x"}, repairs=0)
        costs[strategy] = plan.predicted["plan"].damage
    assert costs["pareto"] == pytest.approx(costs["exhaustive"])
    assert costs["greedy"] >= costs["exhaustive"] * (1 - 1e-9)


def test_budgets_of_latency_and_size(model: nn.Module, data: list[Tensor]) -> None:
    wide = plan_of(model, data, budget={"latency": "1000x"})
    assert wide.feasible
    assert set(wide.precisions.values()) == {"fp32"}  # the least damage
    small = plan_of(model, data, budget={"size": "0.5x"})
    assert small.feasible
    assert small.models["plan"].size <= 0.5 * small.models["fp32"].size
    assert small.predicted["plan"].size == pytest.approx(small.models["plan"].size, rel=0.05)
    with pytest.warns(ConfigWarning, match="no plan keeps to the budget"):
        narrow = plan_of(model, data, budget={"size": "0.01x"})
    assert not narrow.feasible
    assert "NOT met" in str(narrow)
    assert set(narrow.precisions.values()) == {"int8"}


def test_candidates_are_offered_where_they_run(model: nn.Module, data: list[Tensor]) -> None:
    plan = plan_of(
        model,
        data,
        candidates=("fp32", "int8", "bf16", "int8-dynamic", "weight-only", "int8-per-channel"),
    )
    offered = {layer.name: set(layer.costs) for layer in plan.layers}
    assert offered["a"] == {"fp32", "int8", "bf16", "int8-per-channel"}
    assert offered["head"] == {
        "fp32",
        "int8",
        "bf16",
        "int8-dynamic",
        "weight-only",
        "int8-per-channel",
    }
    costs = {layer.name: layer.costs for layer in plan.layers}
    assert costs["c"]["int8-per-channel"].damage < costs["c"]["int8"].damage / 2
    assert costs["a"]["bf16"].size == pytest.approx(costs["a"]["fp32"].size / 2)
    assert costs["head"]["weight-only"].size < costs["head"]["fp32"].size
    assert plan.strategy == "min-cut (frontier search)"
    assert plan.feasible


def test_own_candidates_and_metrics(model: nn.Module, data: list[Tensor]) -> None:
    seen: list[tuple[object, object]] = []
    judged = [torch.randn(4, 3, 12, 12)]

    def metric(candidate: nn.Module, given: object) -> float:
        seen.append((candidate, given))
        return 50.0 - float((candidate(judged[0]) - model(judged[0])).abs().max())

    plan = plan_of(
        model,
        data,
        candidates={"fp32": None, "mine": get_default_qconfig("x86")},
        metric=metric,
        judge_data=judged,
        budget={"accuracy_drop": 0.5},
    )
    assert plan.feasible
    assert set(plan.precisions.values()) <= {"fp32", "mine"}
    assert all(given is not None and given[0] is judged[0] for _, given in seen)  # type: ignore[index]
    assert plan.models["fp32"].accuracy == pytest.approx(50.0, abs=1e-4)
    with pytest.raises(ConfigError, match="NaN"):
        plan_of(model, data, metric=lambda *_: float("nan"))


def test_the_models_beside_the_plan(case: Case) -> None:
    plan, x = case.plan, case.data[0]
    assert plan.choices["plan"] == plan.precisions
    assert set(plan.choices["int8"].values()) == {"int8"}
    assert plan.choices["first-last"] == plan.choices["int8"] | {"a": "fp32", "head": "fp32"}
    with torch.no_grad():
        assert torch.allclose(plan.convert("fp32")(x), case.model(x), atol=1e-5)
        assert not torch.allclose(plan.convert("int8")(x), case.model(x), atol=1e-5)
    with pytest.raises(ConfigError, match="no model 'other'"):
        plan.convert("other")


def test_agreement_counts_classes(model: nn.Module, data: list[Tensor]) -> None:
    plan = plan_of(model, data, metric="agreement", budget={"accuracy_drop": 100})
    int8 = plan.convert()
    with torch.no_grad():
        same = (int8(data[0]).argmax(1) == model(data[0]).argmax(1)).float().mean()
    assert plan.models["plan"].accuracy == pytest.approx(100 * float(same))
    flat = nn.Sequential(nn.Linear(8, 1)).eval()
    with pytest.raises(ConfigError, match="metric='error'"):
        plan_mixed_precision(
            flat, [torch.randn(4, 8)], budget={"accuracy_drop": 1}, progress=False, repeats=1
        )


def test_the_model_is_not_touched(model: nn.Module, data: list[Tensor]) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan_of(model, data)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_makes_no_sense(model: nn.Module, data: list[Tensor]) -> None:
    for options, message in (
        ({"strategy": "mincut"}, "did you mean 'min-cut'"),
        ({"candidates": ["fp32", "int9"]}, "no candidate 'int9'"),
        ({"candidates": ["fp32"]}, "two different names"),
        ({"candidates": ["int8", "int8"]}, "two different names"),
        ({"candidates": "int8"}, "a list of names"),
        ({"candidates": {"fp32": None, "bf16": PER_TENSOR}}, "its meaning already"),
        ({"metric": "top5"}, "no metric 'top5'"),
        ({"budget": {"latency": 3}}, "no unit"),
        ({"repeats": 0}, "repeats"),
        ({"repairs": -1}, "repairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_of(model, data, **options)
    with pytest.raises(CalibrationError):
        plan_of(model, [])
    assert list(precisions_of(["int8", "fp32"])) == ["fp32", "int8"]
    assert set(precisions_of(list(CANDIDATES))) == set(CANDIDATES)


def test_the_plan_prints(case: Case) -> None:
    plan = case.plan
    text = plan.to_text(100)
    assert max(map(len, text.splitlines())) <= 160
    assert (
        f"budget: accuracy drop <= {BUDGET}, latency <= 1000 x FP32 (met); made small: size" in text
    )
    for name in ("fp32", "int8", "first-last", "greedy", "plan"):
        assert f"\n{name} " in text
    assert "Pareto front" in plan.to_markdown()
    plain = json.loads(plan.to_json())
    assert {layer["name"]: layer["precision"] for layer in plain["layers"]} == plan.precisions
    assert "<table>" in plan._repr_html_()
    assert plan.front_table()
    assert all(point.measured is not None for point in plan.front)
    costs = [point.predicted for point in plan.front]
    assert sorted(costs, key=lambda c: c.latency) == costs


def test_the_plot(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    case.plan.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


# -- what the costs are made of -------------------------------------------------------------------


@pytest.fixture
def network(model: nn.Module, data: list[Tensor]) -> CalibratedNetwork:
    return CalibratedNetwork(model, data, {"": PER_TENSOR})


def no_damage(*_: object) -> dict[tuple[str, str], float]:
    return {}


def priced_of(network: CalibratedNetwork, cache: LatencyCache) -> Priced:
    return price(network, ["fp32", "int8"], network.batches[0], no_damage, cache=cache, repeats=2)


def test_units_and_tensors(network: CalibratedNetwork) -> None:
    wiring = wiring_of(network)
    names = [unit.name for unit in wiring.units]
    assert names == ["a", "b", "c", "d", "mean", "head"]
    wires = {
        (names[w.producer] if w.producer != OUTSIDE else "in"): {
            names[c] if c != OUTSIDE else "out" for c in w.consumers
        }
        for w in wiring.wires
    }
    assert wires == {
        "in": {"a"},
        "a": {"b"},  # twice, as input and as residual: one tensor
        "b": {"c"},
        "c": {"d"},
        "d": {"mean"},
        "mean": {"head"},
        "head": {"out"},
    }
    assert wiring.levels() == (1, 2, 3, 4, 4, 5)


def test_every_node_is_somebody_s(network: CalibratedNetwork) -> None:
    wiring = wiring_of(network)
    for assignment in (Assignment(), Assignment(rest="fp32"), Assignment({"b": "fp32"})):
        gm = lowered(network, assignment)
        share = shares_of(gm, wiring)
        every = {n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output")}
        assert share.units.keys() | share.wires.keys() | set(share.rest) == every
        assert not share.units.keys() & share.wires.keys()
        times = node_times({"x": gm}, network.batches[0], repeats=1, warmup=0)["x"]
        assert times.nodes.keys() == every
        assert times.whole > 0


def test_conversions_have_a_price(network: CalibratedNetwork, tmp_path: Path) -> None:
    priced = priced_of(network, LatencyCache(tmp_path))
    down = [e.conversions["float", "int8"] for e in priced.problem.edges if e.name in ("x", "relu")]
    assert len(down) == 2
    assert min(down) > 0
    floats = priced.problem.uniform(["fp32"])
    assert priced.costs(floats) == priced.problem.costs(floats) + priced.fixed
    assert priced.assignment(floats).layers == dict.fromkeys("abcd", "fp32") | {"head": "fp32"}
    with_int8 = priced.problem.uniform(["int8"])
    assert priced.problem.costs(with_int8).size < priced.problem.costs(floats).size / 2
    assert Costs(1.0).dominates(Costs(2.0))


def test_latencies_are_measured_once(network: CalibratedNetwork, tmp_path: Path) -> None:
    first = priced_of(network, LatencyCache(tmp_path))
    again = priced_of(network, LatencyCache(tmp_path))
    assert first.measured == 4  # two precisions, alone and alternating
    assert again.measured == 0
    assert again.problem == first.problem
    assert priced_of(network, LatencyCache(None)).measured == 4
    (file,) = tmp_path.iterdir()
    file.write_text("{")  # a damaged file is measured anew
    with pytest.warns(ConfigWarning, match="is damaged"):
        damaged = LatencyCache(tmp_path)
    assert priced_of(network, damaged).measured == 4


def test_the_cache_knows_graphs_by_form(network: CalibratedNetwork, model: nn.Module) -> None:
    gm = lowered(network, Assignment())
    same = CalibratedNetwork(model, [2 * torch.randn(16, 3, 12, 12)], {"": PER_TENSOR})
    other = CalibratedNetwork(model, [torch.randn(8, 3, 12, 12)], {"": PER_TENSOR})
    key = graph_key(gm, network.batches[0])
    assert graph_key(lowered(same, Assignment()), same.batches[0]) == key
    assert graph_key(lowered(other, Assignment()), other.batches[0]) != key
    assert graph_key(lowered(network, Assignment({"b": "fp32"})), network.batches[0]) != key


def test_what_belongs_to_no_layer_follows_its_neighbours() -> None:
    units = tuple(
        Unit(n, (n,), n, made_layer(n) if n != "pad" else None) for n in ("a", "pad", "b")
    )
    both = tuple(
        (Choice("fp32", Costs(3.0)), Choice("int8", Costs(1.0), reads="int8", writes="int8"))
        for _ in units
    )
    pairs = {("float", "int8"): 1.5, ("int8", "float"): 1.5}
    edges = (Edge(0, (1,), pairs), Edge(1, (2,), pairs), Edge(2, (OUTSIDE,), pairs))
    priced = Priced(Problem(("a", "pad", "b"), both, edges), Wiring(units, ()), Costs(), 0)
    assert priced.settled((0, 1, 0)) == (0, 0, 0)  # int8 saves 2 and two conversions cost 3
    assert priced.settled((0, 0, 1)) == (0, 1, 1)
    assert priced.settled((1, 0, 1)) == (1, 1, 1)
    assert priced.settled((0, 1, 1)) == (0, 1, 1)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("int8-minmax", MinMaxRule),
        ("int8-percentile", PercentileRule),
        ("int8-mse", MSERule),
        ("int8-entropy", EntropyRule),
    ],
)
def test_candidates_for_activations_keep_the_integers(name: str, rule: type) -> None:
    change = CANDIDATES[name]
    assert callable(change)
    before = get_default_qconfig("x86")
    after = change(before)
    made = after.activation()
    assert type(made) is HistogramObserver
    assert type(made.rule) is rule
    assert made.spec == before.activation().spec
    assert after.weight == before.weight
    assert change(default_dynamic_qconfig) == default_dynamic_qconfig
    assert representation_of(after) == "int8"
    assert representation_of(default_dynamic_qconfig) == representation_of(None) == "float"
    assert representation_of(bfloat16_static_qconfig) == "bfloat16"


@pytest.mark.parametrize(
    ("name", "rule"),
    [("int8-weights-mse", MSERule), ("int8-weights-percentile", PercentileRule)],
)
@pytest.mark.parametrize("before", [get_default_qconfig("x86"), PER_TENSOR])
def test_candidates_for_weights_keep_the_integers(name: str, rule: type, before: QConfig) -> None:
    change = CANDIDATES[name]
    assert callable(change)
    after = change(before)
    made = after.weight()
    assert type(made.rule) is rule
    assert made.spec == before.weight().spec
    assert after.activation == before.activation
    assert change(bfloat16_static_qconfig) == bfloat16_static_qconfig


def test_weights_with_an_outlier_get_another_range() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).eval(), [torch.randn(64, 64)]
    with torch.no_grad():
        model[0].weight[0, 0] = 40.0
    data[0][:, 0] = 0.0  # nothing reads the outlier
    plan = plan_of(
        model,
        data,
        budget={"size": "0.4x"},
        qconfig_mapping={"": PER_TENSOR},
        candidates=["fp32", "int8", "int8-weights-percentile"],
    )
    assert plan.precisions["0"] == "int8-weights-percentile"
    costs = plan.layers[0].costs
    assert costs["int8-weights-percentile"].damage < 0.01 * costs["int8"].damage
    assert costs["int8-weights-percentile"].latency == costs["int8"].latency  # the same kernels
