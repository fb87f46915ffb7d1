"""Which nodes write in place, and what shares memory with what."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.patterns.aliasing import Aliasing, written_value


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node], **modules: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    root = nn.Module()
    for name, module in modules.items():
        setattr(root, name, module)
    return fx.GraphModule(root, graph)


def named(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in gm.graph.nodes}


def aliasing_of(gm: fx.GraphModule) -> Aliasing:
    return Aliasing(gm, {node: i for i, node in enumerate(gm.graph.nodes)})


Build = Callable[[fx.Graph, fx.Node], fx.Node]

WRITES: dict[str, Build] = {
    "catalogued method": lambda g, x: g.call_method("relu_", (x,)),
    "unknown method": lambda g, x: g.call_method("exp_", (x,)),
    "catalogued function": lambda g, x: g.call_function(torch.relu_, (x,)),
    "unknown function": lambda g, x: g.call_function(torch.exp_, (x,)),
    "operator": lambda g, x: g.call_function(operator.iadd, (x, 1)),
    "unknown operator": lambda g, x: g.call_function(operator.ipow, (x, 2)),
    "setitem": lambda g, x: g.call_function(operator.setitem, (x, 0, 0.0)),
    "keyword": lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}),
    "unknown keyword": lambda g, x: g.call_function(F.threshold, (x, 0, 0), {"inplace": True}),
    "aten": lambda g, x: g.call_function(torch.ops.aten.add_.Tensor, (x, x)),
    "out": lambda g, x: g.call_function(torch.add, (1, 2), {"out": x}),
    "module": lambda g, x: g.call_module("act", (x,)),
}


@pytest.mark.parametrize("build", WRITES.values(), ids=WRITES.keys())
def test_what_writes_in_place(build: Build) -> None:
    gm = graph_of(build, act=nn.ReLU(inplace=True))
    node = list(gm.graph.nodes)[1]
    assert written_value(gm, node) is named(gm)["x"]


READS: dict[str, Build] = {
    "method": lambda g, x: g.call_method("relu", (x,)),
    "dunder": lambda g, x: g.call_method("__add__", (x, x)),
    "function": lambda g, x: g.call_function(torch.exp, (x,)),
    "keyword": lambda g, x: g.call_function(F.relu, (x,), {"inplace": False}),
    "aten": lambda g, x: g.call_function(torch.ops.aten.add.Tensor, (x, x)),
    "module": lambda g, x: g.call_module("act", (x,)),
}


@pytest.mark.parametrize("build", READS.values(), ids=READS.keys())
def test_what_does_not_write(build: Build) -> None:
    gm = graph_of(build, act=nn.ReLU())
    assert written_value(gm, list(gm.graph.nodes)[1]) is None


@pytest.mark.parametrize(
    ("build", "shares"),
    [
        (lambda g, x: g.call_method("view", (x, -1)), True),
        (lambda g, x: g.call_function(torch.flatten, (x,)), True),
        (lambda g, x: g.call_function(operator.getitem, (x, 0)), True),
        (lambda g, x: g.call_function(torch.chunk, (x, 2)), True),
        (lambda g, x: g.call_module("flat", (x,)), True),
        (lambda g, x: g.call_module("drop", (x,)), True),
        (lambda g, x: g.call_module("alpha", (x,)), True),
        (lambda g, x: g.call_module("unflat", (x,)), True),
        (lambda g, x: g.call_module("own", (x,)), True),
        (lambda g, x: g.call_module("norm", (x,)), False),
        (lambda g, x: g.call_module("conv", (x,)), False),
        (lambda g, x: g.call_function(torch.relu, (x,)), False),
        (lambda g, x: g.call_function(torch.add, (x, 1)), False),
        (lambda g, x: g.call_function(torch.relu_, (x,)), True),
    ],
    ids=lambda value: "shares" if value is True else "own memory" if value is False else "",
)
def test_what_shares_memory_with_its_input(build: Build, shares: bool) -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    gm = graph_of(
        build,
        flat=nn.Flatten(),
        drop=nn.Dropout2d(),
        alpha=nn.AlphaDropout(),
        unflat=nn.Unflatten(0, (1, 1)),
        own=Own(),
        norm=nn.InstanceNorm2d(2),
        conv=nn.Conv2d(2, 2, 1),
    )
    nodes = list(gm.graph.nodes)
    found = aliasing_of(gm).external(nodes[1])
    assert (found is nodes[0]) is shares


def chain_graph(*calls: str) -> fx.GraphModule:
    """``"b=neg(a)"`` lines; functions are of torch."""
    graph = fx.Graph()
    env = {"x": graph.placeholder("x")}
    value = env["x"]
    for call in calls:
        name, rest = call.split("=")
        function, argument = rest.rstrip(")").split("(")
        value = graph.call_function(getattr(torch, function), (env[argument],))
        env[name] = value
        value.name = name
    graph.output(value)
    return fx.GraphModule(nn.Module(), graph)


def test_a_writer_is_found_between_two_nodes_only() -> None:
    gm = chain_graph("a=relu(x)", "v=detach(a)", "b=sigmoid(a)", "w=relu_(v)", "c=tanh(b)")
    nodes, aliasing = named(gm), aliasing_of(gm)

    def between(value: str, after: str, before: str, *ignoring: str) -> fx.Node | None:
        ignored = [nodes[name] for name in ignoring]
        return aliasing.writer_between(nodes[value], nodes[after], nodes[before], ignored)

    assert between("a", "b", "c") is nodes["w"]
    assert between("v", "b", "c") is nodes["w"]
    assert between("a", "b", "w") is None, "the bounds are not between"
    assert between("a", "w", "c") is None
    assert between("a", "b", "c", "w") is None
    assert between("b", "b", "c") is None, "b is other memory"


def test_a_writer_is_found_behind_writers_that_are_ignored() -> None:
    gm = chain_graph("a=relu(x)", "u=relu_(a)", "v=sigmoid_(u)", "w=tanh_(v)", "b=tanh(w)")
    nodes, aliasing = named(gm), aliasing_of(gm)
    ends = nodes["a"], nodes["a"], nodes["b"]
    assert aliasing.writer_between(*ends, [nodes["u"], nodes["v"]]) is nodes["w"]
    assert aliasing.writer_between(*ends, [nodes["u"], nodes["v"], nodes["w"]]) is None


def test_a_later_reader_counts_only_through_names_from_before_the_write() -> None:
    gm = chain_graph("a=relu(x)", "w=relu_(a)", "b=tanh(w)")
    nodes = named(gm)
    assert aliasing_of(gm).reader_after(nodes["a"], nodes["w"]) is None
    gm = chain_graph("a=relu(x)", "v=detach(a)", "w=relu_(a)", "b=tanh(v)", "c=tanh(w)")
    nodes = named(gm)
    assert aliasing_of(gm).reader_after(nodes["a"], nodes["w"]) is nodes["b"]


def test_a_later_reader_of_any_earlier_name_counts() -> None:
    """The name that is read last is not the newest one."""
    gm = chain_graph("a=relu(x)", "v=detach(a)", "u=detach(v)", "w=relu_(u)", "b=tanh(a)")
    nodes = named(gm)
    assert aliasing_of(gm).reader_after(nodes["u"], nodes["w"]) is nodes["b"]


def test_values_may_be_united_twice() -> None:
    """An unknown function takes a value and a view of it, which are one class already."""
    graph = fx.Graph()
    a = graph.call_function(torch.relu, (graph.placeholder("x"),))
    v = graph.call_function(torch.detach, (a,))
    both = graph.call_function(torch.broadcast_tensors, (a, v))
    w = graph.call_function(torch.relu_, (both,))
    end = graph.output(w)
    aliasing = aliasing_of(fx.GraphModule(nn.Module(), graph))
    assert aliasing.writer_between(a, a, end, []) is w


def test_external_memory_is_an_input_or_an_attribute() -> None:
    gm = chain_graph("a=relu(x)", "v=detach(x)", "w=relu_(v)")
    nodes, aliasing = named(gm), aliasing_of(gm)
    assert aliasing.external(nodes["w"]) is nodes["x"]
    assert aliasing.external(nodes["a"]) is None
    assert aliasing.written_by(nodes["w"]) is nodes["v"]
    assert aliasing.written_by(nodes["a"]) is None
