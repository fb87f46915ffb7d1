"""nest-modules: modules that are quantized on their own take the place of the float ones."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import PassResult
from fxquant.passes.nest_modules import Nested, NestModules
from fxquant.qconfig import QConfig
from tests.passes.helpers import graph_text, node_named
from tests.passes.nested_models import (
    IMAGES,
    QCONFIG,
    ObservedTwice,
    Pair,
    Twice,
    float_graph,
    run_alone,
    run_until,
)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.part = Twice()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(self.conv(x)))


class Parts(nn.Module):
    """``read`` says what is read of a tuple."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.part = Pair()
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.part(x))


def observed(path: str, module: nn.Module, qconfig: QConfig | None) -> Nested | None:
    if path != "part":
        return None
    made = ObservedTwice() if isinstance(module, Twice) else Pair()
    return Nested(
        module=made, takes=None, gives=None, observed=True, qconfig=qconfig, reason="its own"
    )


def nested(model: nn.Module, *inputs: Any) -> tuple[QuantGraphModule, PassResult]:
    gm = float_graph(model, *inputs, leaves=["part"])
    run_until(NestModules, gm)
    return gm, run_alone(NestModules(observed), gm)


def test_the_module_is_made_once_and_its_calls_are_marked() -> None:
    gm, result = nested(Around(), IMAGES)
    assert result.changes
    assert type(gm.part) is ObservedTwice
    for name in ("part", "part_1"):
        record = record_of(node_named(gm, name))
        assert record.takes_quantized == (0,)
        assert not record.gives_quantized
        assert record.annotation is not None
        assert record.annotation.output is not None
        assert record.reasons == ("opaque island: its own",)
    assert record_of(node_named(gm, "conv")).takes_quantized == ()


def test_nothing_is_nested_without_a_config() -> None:
    gm = float_graph(Around(), IMAGES, leaves=["part"])
    run_until(NestModules, gm)
    assert run_alone(NestModules(), gm) == PassResult(changes=0)
    assert type(gm.part) is Twice


def test_what_gives_quantized_tensors_is_marked_without_an_observer() -> None:
    def own(path: str, module: nn.Module, qconfig: QConfig | None) -> Nested | None:
        return Nested(module=Twice(), takes=(), gives=(0,), qconfig=QCONFIG)

    gm = float_graph(Around(), IMAGES, leaves=["part"])
    run_until(NestModules, gm)
    run_alone(NestModules(own), gm)
    record = record_of(node_named(gm, "part"))
    assert record.gives_quantized
    assert record.annotation is None
    assert record.takes_quantized == ()


READS: dict[str, tuple[Callable[[Any], Any], Counter[Any]]] = {
    "parts": (lambda y: (y[0], y[1][0], y[1][1]), Counter({operator.getitem: 4})),
    "one": (lambda y: y[1][-1], Counter({operator.getitem: 2})),
    "whole": (lambda y: y, Counter({operator.getitem: 4, tuple: 2})),
    "inner": (lambda y: y[1], Counter({operator.getitem: 3, tuple: 1})),
    "inner-and-part": (lambda y: (y[1], y[1][0], y[0]), Counter({operator.getitem: 4, tuple: 1})),
    "in-a-dict": (lambda y: {"all": [y, y[0]]}, Counter({operator.getitem: 4, tuple: 2})),
}


@pytest.mark.parametrize("case", READS)
def test_a_tuple_is_taken_apart(case: str, golden: Callable[[str, str], None]) -> None:
    read, calls = READS[case]
    gm, _ = nested(Parts(read), IMAGES)
    golden(f"nest-modules-{case}", graph_text(gm))
    found = Counter(n.target for n in gm.graph.nodes if n.op == "call_function")
    assert found == calls
    given = [n for n in gm.graph.nodes if record_of(n).gives_quantized]
    assert given
    assert all(n.target is operator.getitem for n in given)
    assert all(isinstance(record_of(n).value, tuple) for n in gm.graph.nodes if n.target is tuple)
    expected, got = (pytree.tree_leaves(f(IMAGES)) for f in (Parts(read), gm))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_without_example_inputs_the_structure_is_that_of_the_config() -> None:
    def own(path: str, module: nn.Module, qconfig: QConfig | None) -> Nested | None:
        results = (None, (None, None))
        return Nested(
            module=Pair(), takes=None, gives=None, observed=True, results=results, qconfig=qconfig
        )

    gm = float_graph(Parts(lambda y: y), leaves=["part"])
    run_until(NestModules, gm)
    run_alone(NestModules(own), gm)
    assert len([n for n in gm.graph.nodes if record_of(n).gives_quantized]) == 3
