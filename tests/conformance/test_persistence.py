"""Section 10: states of prepared and converted models, in memory and in files."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Peers,
    assert_same,
    assert_same_weights,
    equal,
    everywhere,
    observed_with,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, conv, images, linear

pytestmark = pytest.mark.peer

SLOW = pytest.mark.slow
X = images()


def through_a_file(state: Any, *, weights_only: bool) -> Any:
    """What ``torch.save`` and ``torch.load`` make of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with quiet():
        return torch.load(file, weights_only=weights_only)


def weight(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(*shape, generator=generator))


def block() -> nn.Module:
    """Convolutions, norms, a residual, a pooling, a linear."""
    torch.manual_seed(11)
    return Calls(
        lambda s, x: s.fc(
            F.adaptive_avg_pool2d(F.relu(s.n(s.b(F.hardswish(s.a(x)))) + x), 1)[..., 0, 0]
        ),
        a=conv(padding=1),
        b=conv(padding=1),
        n=nn.BatchNorm2d(3),
        fc=linear(3, 4),
    )


def functional() -> nn.Module:
    return Calls(
        lambda s, x: F.relu(F.linear(x, s.w, s.b)) + F.linear(x, s.v),
        w=weight(6, 8),
        b=weight(6),
        v=weight(6, 8),
    )


MODELS: dict[str, Any] = {"modules": block, "functions": functional}
QCONFIGS: dict[str, Build] = {
    "per-tensor": everywhere("default_qconfig"),
    "per-channel": everywhere("default_per_channel_qconfig"),
    "histogram": lambda n: n.get_default_qconfig_mapping("x86"),
}


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """A model with other weights and statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


# -- observers ------------------------------------------------------------------------------------


@pytest.mark.statement("S10.1a")
@pytest.mark.parametrize("weights_only", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize(
    "qconfig",
    [name if name != "histogram" else pytest.param(name, marks=SLOW) for name in QCONFIGS],
)
@pytest.mark.parametrize("case", MODELS)
def test_statistics_of_observers_go_through_files(
    peers: Peers, case: str, qconfig: str, weights_only: bool
) -> None:
    found = []
    for names in (THEIRS, OURS):
        model = MODELS[case]()
        prepared, _ = peers.prepare(names, model, (X,), QCONFIGS[qconfig])
        run(prepared, (X * 3,))
        state = names.get_observer_state_dict(prepared)
        assert len(state) >= len({id(m) for m in _observers(prepared)})
        fresh, _ = peers.prepare(names, model, (X,), QCONFIGS[qconfig])
        assert observed_with(fresh) != observed_with(prepared)
        with quiet():
            names.load_observer_state_dict(fresh, through_a_file(state, weights_only=weights_only))
        equal(observed_with(fresh), observed_with(prepared), "parameters")
        results = [run(peers.convert(names, graph)[1], (X,)) for graph in (prepared, fresh)]
        assert_same(results[1], results[0])
        found.append((observed_with(fresh), results[0]))
    equal(found[1][0], found[0][0], "parameters")
    assert_same(found[1][1], found[0][1])


def _observers(prepared: fx.GraphModule) -> list[nn.Module]:
    return [prepared.get_submodule(name) for name, *_ in placement(prepared)]


@pytest.mark.statement("S10.1a")
@pytest.mark.parametrize("case", MODELS)
def test_whole_states_of_prepared_models_load(peers: Peers, case: str) -> None:
    found = []
    for names in (THEIRS, OURS):
        mapping = QCONFIGS["per-channel"]
        first, _ = peers.prepare(names, MODELS[case](), (X,), mapping)
        run(first, (X * 2,))
        second, _ = peers.prepare(names, scaled(MODELS[case](), -2.0), (X,), mapping)
        run(second, (X,))
        state = through_a_file(first.state_dict(), weights_only=True)
        with quiet():
            assert second.load_state_dict(state).missing_keys == []
        equal(observed_with(second), observed_with(first), "parameters")
        results = [run(peers.convert(names, graph)[1], (X,)) for graph in (first, second)]
        assert_same(results[1], results[0])
        found.append(results[0])
    assert_same(found[1], found[0])


# -- converted models -----------------------------------------------------------------------------


@pytest.mark.statement("S10.2a")
@pytest.mark.parametrize("how", ["memory", pytest.param("file", marks=SLOW)])
@pytest.mark.parametrize(
    "qconfig",
    [name if name != "histogram" else pytest.param(name, marks=SLOW) for name in QCONFIGS],
)
@pytest.mark.parametrize("case", MODELS)
def test_states_of_converted_models_load_exactly(
    peers: Peers, case: str, qconfig: str, how: str
) -> None:
    found = []
    for names in (THEIRS, OURS):
        pair = []
        for factor in (1.0, -2.0):
            prepared, _ = peers.prepare(
                names, scaled(MODELS[case](), factor), (X,), QCONFIGS[qconfig]
            )
            run(prepared, (X,))
            pair.append(peers.convert(names, prepared))
        for first, second in zip(*pair, strict=True):  # the reference graphs, the lowered ones
            expected = run(first, (X,))
            assert not torch.equal(run(second, (X,)), expected)
            state = first.state_dict()
            with quiet():
                second.load_state_dict(
                    state if how == "memory" else through_a_file(state, weights_only=False)
                )
            assert_same(run(second, (X,)), expected)
        assert_same_weights(pair[1][1], pair[0][1])
        assert steps(pair[1][1])[0] >= 1
        found.append((run(pair[1][1], (X,)), steps(pair[1][1])))
    assert_same(found[1], found[0])


@pytest.mark.statement("S10.2a")
def test_what_has_no_packed_weight_in_it_loads_as_weights_only(peers: Peers) -> None:
    done = peers.compare(block(), (X,), quantizes=2)
    for graph in (done.ours.lowered, done.ours.reference):
        state = through_a_file(graph.state_dict(), weights_only=True)
        other = copy.deepcopy(graph)
        other.load_state_dict(state)
        assert_same(run(other, (X,)), run(graph, (X,)))


# -- training -------------------------------------------------------------------------------------


def with_sub() -> nn.Module:
    """A linear, and a submodule with one."""
    return nn.Sequential(linear(5, 5), nn.Sequential(linear(5, 5)))


@pytest.mark.statement("S10.3a")
@pytest.mark.parametrize("scripted", [False, True])
def test_switches_reach_every_fake_quantizer(peers: Peers, scripted: bool) -> None:
    x = torch.randn(1, 5)
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(
            names,
            with_sub().train(),
            (x,),
            everywhere("default_qat_qconfig"),
            call="prepare_qat_fx",
        )
        assert len(placement(prepared)) == 3
        model: Any = prepared
        if scripted:
            with quiet():
                model = torch.jit.script(prepared)
        configs = peers.configs(names)
        flags = lambda m, end: [int(b) for n, b in m.named_buffers() if n.endswith(end)]  # noqa: E731
        count = len(flags(model, "fake_quant_enabled"))
        assert count >= 5  # the input, two weights, two results
        for switch, buffer, value in (
            (configs.disable_fake_quant, "fake_quant_enabled", 0),
            (configs.enable_fake_quant, "fake_quant_enabled", 1),
            (configs.disable_observer, "observer_enabled", 0),
            (configs.enable_observer, "observer_enabled", 1),
        ):
            model.apply(switch)
            assert flags(model, buffer) == [value] * count
        plain = with_sub()
        model.apply(configs.disable_fake_quant)
        plain.load_state_dict(
            {k: v for k, v in prepared.state_dict().items() if k in plain.state_dict()}
        )
        assert torch.equal(model(x), plain(x))


@pytest.mark.statement("S10.3b")
@pytest.mark.parametrize("training", [True, False])
def test_fused_and_plain_fake_quantizers_train_alike(peers: Peers, training: bool) -> None:
    """Activations; of weights torch.ao's fused kernel takes other scales: docs/differences.md."""
    for names in (THEIRS, OURS):
        configs, results = peers.configs(names), []
        for fused in (True, False):
            kind = configs.FusedMovingAvgObsFakeQuantize if fused else configs.FakeQuantize
            qconfig = configs.QConfig(
                activation=kind.with_args(
                    observer=configs.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
                ),
                weight=configs.default_weight_fake_quant,
            )
            torch.manual_seed(5)
            model = nn.Sequential(linear(5, 6), nn.ReLU(), linear(6, 5)).train()
            mapping = configs.QConfigMapping().set_global(qconfig)
            with quiet():
                prepared = names.prepare_qat_fx(model, mapping, (torch.randn(2, 5),))
            x = torch.randn(4, 5, requires_grad=True)
            prepared(x.detach())
            prepared.train(training)
            result = prepared(x)
            result.sum().backward()
            assert not torch.equal(result, model(x))
            results.append((result.detach(), x.grad, prepared.get_submodule("2").weight.grad))
        for fused_one, plain_one in zip(*results, strict=True):
            assert torch.equal(fused_one, plain_one)


# -- a model of 2021 ------------------------------------------------------------------------------


class Child(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(size, size))
        self.b1 = nn.Parameter(torch.zeros(size))
        nn.init.kaiming_uniform_(self.w1, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.w1, self.b1))


class Functional(nn.Module):
    """A functional linear and relu behind a child with the same."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.child = Child(size)
        self.w1 = nn.Parameter(torch.empty(size, size))
        self.b1 = nn.Parameter(torch.zeros(size))
        nn.init.kaiming_uniform_(self.w1, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(self.child(x), self.w1, self.b1))


@pytest.mark.statement("S10.4a")
@pytest.mark.parametrize("as_graph", [False, True])
def test_names_and_numbers_of_a_saved_model(peers: Peers, as_graph: bool) -> None:
    x = images(1, 1, 4, 4)
    model: nn.Module = Functional().eval()
    if as_graph:  # as it comes out of a file, without the scopes that fx noted
        traced = fx.symbolic_trace(model)
        for node in traced.graph.nodes:
            node.type = None
        traced.recompile()
        model = pickle.loads(pickle.dumps(traced))
    mapping: Build = lambda n: {"": n.get_default_qconfig("fbgemm")}  # noqa: E731
    done = peers.compare(model, (x,), mapping, quantizes=1)
    read = [
        {str(n.target) for n in side.lowered.graph.nodes if n.op == "get_attr"}
        for side in (done.theirs, done.ours)
    ]
    assert read[0] == read[1]
    assert len(read[1]) == 8
    if not as_graph:
        assert read[1] == {
            *("child_input_scale_0", "child_input_zero_point_0", "child_packed_weight_0"),
            *("child_scale_1", "child_zero_point_1", "_packed_weight_0"),
            *("_scale_1", "_zero_point_1"),
        }
    for stage in ("reference", "lowered"):
        assert_same(run(getattr(done.ours, stage), (x,)), run(getattr(done.theirs, stage), (x,)))
