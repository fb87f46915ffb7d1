"""Section 2: what is traced, what stays whole, and what vanishes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.conformance.harness import OURS, THEIRS, Names, Peers, placement, quiet, run
from tests.conformance.models import Calls, CallsTwo, CallsWithOptions, conv, images, linear

pytestmark = pytest.mark.peer

X = images()


class Branching(nn.Module):
    """What fx cannot trace; with a linear that must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


def leaves(graph: fx.GraphModule) -> list[str]:
    """The modules that a prepared graph calls, but for observers."""
    return [
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_module" and "activation_post_process" not in str(node.target)
    ]


@pytest.mark.statement("S2.1a")
@pytest.mark.parametrize("how", ["name", "class"])
@pytest.mark.parametrize("call", ["prepare_fx", "prepare_qat_fx"])
def test_modules_that_are_not_traced_stay_as_they_are(peers: Peers, how: str, call: str) -> None:
    def custom(names: Names) -> Any:
        config = names.PrepareCustomConfig()
        if how == "name":
            return config.set_non_traceable_module_names(["part"])
        return config.set_non_traceable_module_classes([Branching])

    def mapping(names: Names) -> Any:
        if call == "prepare_qat_fx":
            return names.get_default_qat_qconfig_mapping("x86")
        return names.get_default_qconfig_mapping("x86")

    model = Calls(lambda s, x: s.b(s.part(s.a(x))), a=conv(), b=conv(), part=Branching())
    model.train(call == "prepare_qat_fx")
    if call == "prepare_fx":
        peers.compare(model, (X,), mapping, custom)
    made = [
        peers.prepare(names, model, (X,), mapping, custom, call=call)[0] for names in (THEIRS, OURS)
    ]
    assert placement(made[1]) == placement(made[0])
    for graph in made:
        assert leaves(graph) == ["a", "part", "b"]
        assert type(graph.part) is Branching
        assert type(graph.part.inner) is nn.Linear


@pytest.mark.statement("S2.1a")
def test_modules_of_torch_are_leaves_and_containers_are_not(peers: Peers) -> None:
    model = nn.Sequential(
        nn.Sequential(conv(), nn.Hardswish()), Calls(lambda s, x: s.p(x), p=nn.MaxPool2d(2)), conv()
    ).eval()
    done = peers.compare(model, (X,))
    assert leaves(done.ours.prepared) == leaves(done.theirs.prepared) == ["0.0", "0.1", "1.p", "2"]


@pytest.mark.statement("S2.1a")
@pytest.mark.parametrize("nested", [False, True])
def test_control_flow_on_values_is_an_error_of_fx(peers: Peers, nested: bool) -> None:
    model: nn.Module = Branching()
    if nested:
        model = nn.Sequential(conv(), model)
    for names in (THEIRS, OURS):
        with quiet(), pytest.raises(fx.proxy.TraceError, match="symbolically traced variables"):
            peers.prepare(names, model.eval(), (X,))
    peers.compare(nn.Sequential(conv()).eval(), (X,))


@pytest.mark.statement("S2.2a")
def test_stubs_vanish_and_float_functionals_become_functions(peers: Peers) -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        x = s.quant(x)
        y = s.add.add(s.a(x), s.b(x))
        y = s.mul.mul(y, s.c(x))
        y = s.cat.cat([y, s.d(x)], 1)
        y = s.relu.add_relu(y, y)
        y = s.add.add_scalar(y, 0.5)
        return s.dequant(s.mul.mul_scalar(y, 2.0))

    parts = {name: nnq.FloatFunctional() for name in ("add", "mul", "cat", "relu")}
    stubs = {"quant": THEIRS.QuantStub(), "dequant": THEIRS.DeQuantStub()}
    convs = {name: conv() for name in "abcd"}
    done = peers.compare(Calls(function, **convs, **parts, **stubs), (X,), quantizes=1)
    for side in (done.theirs, done.ours):
        assert sorted(leaves(side.prepared)) == ["a", "b", "c", "d"]


@pytest.mark.statement("S2.2a")
def test_stubs_of_our_own_vanish_too(peers: Peers) -> None:
    inner = [conv(), nn.ReLU()]
    wrapped = OURS.QuantWrapper(nn.Sequential(*inner)).eval()
    bare = nn.Sequential(*inner).eval()
    theirs, _ = peers.prepare(THEIRS, bare, (X,))
    ours, _ = peers.prepare(OURS, wrapped, (X,))
    run(theirs, (X,)), run(ours, (X,))
    assert placement(ours) == placement(theirs)
    assert leaves(ours) == ["module.0", "module.1"]
    peers.compare(bare, (X,))


@pytest.mark.statement("S2.2b")
@pytest.mark.parametrize("first", [operator.iadd, operator.imul])
@pytest.mark.parametrize("relu", [False, True])
def test_in_place_arithmetic_is_plain_arithmetic(peers: Peers, first: Any, relu: bool) -> None:
    def statements(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        y += s.b(x)
        y *= 2
        y += first(s.c(x), s.d(x))
        return F.relu(y) if relu else y

    model = Calls(statements, a=conv(), b=conv(), c=conv(), d=conv())
    done = peers.compare(model, (X,), quantizes=1)
    assert len(placement(done.ours.prepared)) == 9

    plain = Calls(lambda s, x: first(s.a(x), s.b(x)), a=conv(), b=conv())
    peers.compare(plain, (X,), quantizes=1)


@pytest.mark.statement("S2.3a")
@pytest.mark.parametrize("with_state", [False, True])
def test_tuple_arguments_stay_tuples(peers: Peers, with_state: bool) -> None:
    def mapping(names: Names) -> Any:
        return (
            names.QConfigMapping().set_global(names.default_qconfig).set_object_type(nn.LSTM, None)
        )

    model: nn.Module = Calls(lambda s, x: s.lstm(s.a(x)[0]), lstm=nn.LSTM(6, 6), a=conv())
    inputs: tuple[Any, ...] = (X,)
    if with_state:
        model = CallsTwo(lambda s, x, h: s.lstm(s.a(x)[0], (h, h * 2)), lstm=model.lstm, a=conv())
        inputs = (X, torch.randn(1, 6, 6))
    done = peers.compare(model, inputs, mapping)
    for graph in (done.ours.prepared, done.ours.reference, done.ours.lowered):
        (call,) = (node for node in graph.graph.nodes if node.target == "lstm")
        assert [type(argument) for argument in call.args[1:]] == [tuple] * with_state


RESULTS: dict[str, Any] = {
    "none": lambda s, x: None,
    "none-in-tuple": lambda s, x: (s.a(x), None),
    "list": lambda s, x: [s.a(x), s.b(x)],
    "dict": lambda s, x: {"a": s.a(x), "b": x},
    "nested": lambda s, x: {"a": [s.a(x), {"b": s.b(x)}], "c": (x, None)},
    "twice": lambda s, x: (lambda y: (y, y))(s.a(x)),
    "float-and-int8": lambda s, x: (F.gelu(s.a(x)), s.b(x), x),
}


@pytest.mark.statement("S2.3b")
@pytest.mark.parametrize("result", RESULTS)
def test_results_of_any_form(peers: Peers, result: str) -> None:
    peers.compare(Calls(RESULTS[result], a=conv(), b=conv()), (X,))
    if result == "none":  # nothing is observed; a model that gives something is
        peers.compare(Calls(lambda s, x: (None, s.a(x)), a=conv()), (X,))


@pytest.mark.statement("S2.3b")
@pytest.mark.parametrize("given", [(X,), (X, X * 2)])
def test_inputs_that_may_be_left_out(peers: Peers, given: tuple[Any, ...]) -> None:
    two = len(given) == 2
    model = CallsWithOptions(
        lambda s, x, y, z: s.a(x) + s.b(y) if two else s.a(x), a=conv(), b=conv()
    )
    peers.compare(model, given)
