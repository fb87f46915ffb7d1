"""Who reads a parameter: other calls, tied modules, attributes, and tensors that share memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.patterns.ownership import ParameterOwners


def owners(root: nn.Module, *calls: str) -> tuple[ParameterOwners, fx.GraphModule]:
    """A graph that calls modules (``conv``) and adds attributes (``.w``), in order."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for call in calls:
        if call.startswith("."):
            value = graph.call_function(torch.add, (value, graph.get_attr(call[1:])))
        else:
            value = graph.call_module(call, (value,))
    graph.output(value)
    gm = fx.GraphModule(root, graph)
    return ParameterOwners(gm), gm


def readers(found: ParameterOwners, tensor: torch.Tensor) -> list[tuple[str, str]]:
    return sorted((use.node.name, use.path) for use in found.uses(tensor))


def root(**children: object) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def test_a_parameter_of_one_call_has_one_reader() -> None:
    conv = nn.Conv2d(2, 2, 1)
    found, _ = owners(root(a=conv, b=nn.Conv2d(2, 2, 1)), "a", "b")
    assert readers(found, conv.weight) == [("a", "a.weight")]
    assert conv.bias is not None
    assert readers(found, conv.bias) == [("a", "a.bias")]


def test_each_call_of_a_module_is_a_reader() -> None:
    conv = nn.Conv2d(2, 2, 1)
    found, _ = owners(root(a=conv), "a", "a")
    assert readers(found, conv.weight) == [("a", "a.weight"), ("a_1", "a.weight")]


def test_one_module_under_two_names() -> None:
    conv = nn.Conv2d(2, 2, 1)
    found, _ = owners(root(a=conv, b=conv), "a", "b")
    assert [node for node, _ in readers(found, conv.weight)] == ["a", "b"]


def test_an_attribute_is_read_by_its_users_not_by_itself() -> None:
    conv = nn.Conv2d(2, 2, 1)
    found, _ = owners(root(a=conv), "a", ".a.weight")
    assert readers(found, conv.weight) == [("a", "a.weight"), ("add", "a.weight")]


def test_an_attribute_that_nobody_uses_is_no_reader() -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    graph.get_attr("a.weight")
    graph.output(graph.call_module("a", (value,)))
    conv = nn.Conv2d(2, 2, 1)
    found = ParameterOwners(fx.GraphModule(root(a=conv), graph))
    assert readers(found, conv.weight) == [("a", "a.weight")]


def tied(kind: str, weight: nn.Parameter) -> nn.Parameter:
    if kind == "same parameter":
        return weight
    if kind == "parameter of data":
        return nn.Parameter(weight.data)
    if kind == "transposed view":
        return nn.Parameter(weight.data.transpose(0, 1))
    if kind == "overlapping slice":
        return nn.Parameter(weight.data[1:])
    return nn.Parameter(torch.from_numpy(weight.data.numpy()))


@pytest.mark.parametrize(
    "kind",
    ["same parameter", "parameter of data", "transposed view", "overlapping slice", "numpy"],
)
def test_memory_in_common_makes_one_tensor(kind: str) -> None:
    first = nn.Parameter(torch.from_numpy(np.ones((4, 4, 1, 1), dtype=np.float32)))
    other = tied(kind, first)
    one, two = nn.Module(), nn.Module()
    one.weight, two.weight = first, other
    found, _ = owners(root(a=one, b=two), "a", "b")
    expected = [("a", "a.weight"), ("b", "b.weight")]
    assert readers(found, first) == expected
    assert readers(found, other) == expected


def test_slices_of_one_buffer_that_do_not_overlap_are_not_tied() -> None:
    flat = torch.zeros(8)
    one, two = nn.Module(), nn.Module()
    one.weight, two.weight = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    found, _ = owners(root(a=one, b=two), "a", "b")
    assert readers(found, one.weight) == [("a", "a.weight")]
    assert readers(found, two.weight) == [("b", "b.weight")]


def test_a_tensor_that_holds_several_others_has_all_their_readers() -> None:
    whole = torch.zeros(8)
    modules = {}
    for name, data in {"whole": whole, "head": whole[1:2], "tail": whole[6:]}.items():
        modules[name] = nn.Module()
        modules[name].weight = nn.Parameter(data)
    found, _ = owners(root(**modules), "whole", "head", "tail")
    assert [node for node, _ in readers(found, whole)] == ["head", "tail", "whole"]


def test_buffers_are_tied_like_parameters() -> None:
    one, two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    two.running_mean = one.running_mean
    found, _ = owners(root(a=one, b=two), "a", "b")
    assert one.running_mean is not None
    assert one.running_var is not None
    assert readers(found, one.running_mean) == [("a", "a.running_mean"), ("b", "b.running_mean")]
    assert readers(found, one.running_var) == [("a", "a.running_var")]


def test_fake_tensors_are_told_apart_by_storage() -> None:
    with FakeTensorMode():
        one, two = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    two.bias = one.bias
    found, _ = owners(root(a=one, b=two), "a", "b")
    assert one.bias is not None
    assert readers(found, one.weight) == [("a", "a.weight")]
    assert readers(found, one.bias) == [("a", "a.bias"), ("b", "b.bias")]


@pytest.mark.parametrize("shared", [False, True])
def test_meta_tensors_are_told_apart_by_storage(shared: bool) -> None:
    one, two = nn.Module(), nn.Module()
    one.weight = nn.Parameter(torch.zeros(4, device="meta"))
    two.weight = nn.Parameter(one.weight.data if shared else torch.zeros(4, device="meta"))
    found, _ = owners(root(a=one, b=two), "a", "b")
    assert len(found.uses(one.weight)) == (2 if shared else 1)


def test_tensors_inside_an_opaque_module_count_even_unregistered() -> None:
    conv = nn.Conv2d(2, 2, 1)
    island = nn.Module()
    object.__setattr__(island, "plain", conv.weight.data)
    found, _ = owners(root(a=conv, island=root(inner=island)), "a", "island")
    assert readers(found, conv.weight) == [("a", "a.weight"), ("island", "island.inner.plain")]


def test_empty_and_sparse_tensors_are_only_themselves() -> None:
    one = nn.Module()
    one.empty, one.other = torch.zeros(0), torch.zeros(0)
    one.sparse = torch.eye(2).to_sparse()
    found, _ = owners(root(a=one), "a")
    assert readers(found, one.empty) == [("a", "a.empty")]
    assert readers(found, one.sparse) == [("a", "a.sparse")]


def test_an_unknown_tensor_has_no_reader() -> None:
    found, _ = owners(root(a=nn.Conv2d(2, 2, 1)), "a")
    assert found.uses(torch.zeros(3)) == ()
