"""functionalize: in-place ops become functions wherever nobody can tell the difference."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.op_view import is_inplace
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.functionalize import Functionalize
from tests.passes.helpers import captured, context, graph_text, run_alone

Function = Callable[..., Any]


class Around(nn.Module):
    """``function`` of a value that the model computes, so that writing it shows only inside."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x * 2 - 1)


def functionalized(
    model: nn.Module, *inputs: Any, shapes: bool = True
) -> tuple[QuantGraphModule, PassResult]:
    gm = captured(model, *(inputs if shapes else ()))
    return gm, run_alone(Functionalize(), gm)


def check(model: nn.Module, *inputs: Any) -> tuple[QuantGraphModule, PassResult]:
    """Functionalize, and compare the results on inputs that are not written."""
    model.eval()
    gm, result = functionalized(model, *copy.deepcopy(inputs))
    torch.testing.assert_close(
        gm(*copy.deepcopy(inputs)), model(*copy.deepcopy(inputs)), rtol=0, atol=0
    )
    before = fingerprint(gm)
    assert run_alone(Functionalize(), gm).changes == 0
    assert fingerprint(gm) == before
    return gm, result


class ThenRead(nn.Module):
    """Reads the written value, not the result of the write."""

    def __init__(self, write: Function) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 - 1
        self.write(y)
        return y + 1


FORMS: dict[str, Function] = {
    "method": lambda y: y.relu_(),
    "function": torch.relu_,
    "flag": lambda y: F.relu(y, inplace=True),
    "flag by position": lambda y: F.relu(y, True),
    "flag between others": lambda y: F.hardtanh(y, -0.5, 0.5, True),
    "flag of a function unknown to the catalogue": lambda y: F.threshold(y, 0.1, 2.0, inplace=True),
    "the same by position": lambda y: F.threshold(y, 0.1, 2.0, True),
    "function of torch unknown to the catalogue": torch.neg_,
    "function of nn.functional unknown to the catalogue": lambda y: F.threshold_(y, 0.1, 2.0),
    "method unknown to the catalogue": lambda y: y.masked_fill_(y > 0, 3.0),
    "sum": lambda y: operator.iadd(y, 1.0),
    "product": lambda y: operator.imul(y, y),
    "method with operand": lambda y: y.add_(y, alpha=2),
    "module": nn.ReLU(inplace=True),
    "module unknown to the catalogue": nn.Threshold(0.1, 2.0, inplace=True),
    "shape": lambda y: y.unsqueeze_(0),
    "the shape that it has": lambda y: y.resize_(2, 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_readers_of_what_was_written_read_the_new_value(form: str) -> None:
    model = ThenRead(FORMS[form])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    gm, result = check(model, x)
    assert result.changes > 0
    assert not result.refusals
    assert not any(is_inplace(gm, node) for node in gm.graph.nodes)


def test_chain_of_writes_to_one_value() -> None:
    def function(y: Tensor) -> Any:
        first = y.relu_()
        second = first.add_(1)
        y.mul_(3)
        return y + first, second

    _, result = check(Around(function), torch.randn(4))
    assert result.changes == 3
    assert not result.refusals


class Shared(nn.Module):
    """One in-place ReLU after two values, both read afterwards under their first names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        self.relu(a)
        b = self.two(a)
        self.relu(b)
        return a + b


def test_every_call_of_a_shared_module_is_rewritten() -> None:
    gm, result = check(Shared(), torch.randn(2, 4))
    assert result.changes == 2
    assert not gm.get_submodule("relu").inplace


def test_golden(golden: Callable[[str, str], None]) -> None:
    gm = captured(Shared().eval(), torch.randn(2, 4))
    before = graph_text(gm)
    run_alone(Functionalize(), gm)
    golden("functionalize", f"{before}\n\n-- functionalize -->\n\n{graph_text(gm)}")


VIEWS: dict[str, Function] = {
    "view": lambda y: y.view(-1),
    "view of a view": lambda y: y.view(-1).unsqueeze(0),
    "slice": lambda y: y[0],
    "transpose": lambda y: y.transpose(0, 1),
    "more of it": lambda y: y.expand(2, 2, 3),
    "two of one": lambda y: y.unflatten(1, (3, 1)),
    "unknown to the catalogue": lambda y: y.expand_as(y),
    "one of several": lambda y: y.chunk(2)[0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_refused_where_a_view_is_read_later(view: str) -> None:
    def function(y: Tensor) -> Any:
        viewed = VIEWS[view](y)
        y.mul_(2)
        return viewed + 1

    with torch.no_grad():  # autograd forbids such writes to one of several views
        _gm, result = check(Around(function), torch.randn(2, 3))
    (refusal,) = result.refusals
    assert refusal.node == "mul_"
    assert "reads afterwards what may be a view" in refusal.reason
    assert refusal.culprits
    assert result.changes == 0


def test_refused_where_a_view_is_written_and_the_base_read() -> None:
    def function(y: Tensor) -> Any:
        y.view(-1).relu_()
        return y + 1

    _, result = check(Around(function), torch.randn(2, 3))
    assert [refusal.node for refusal in result.refusals] == ["relu_"]


def test_a_view_read_before_the_write_does_not_matter() -> None:
    def function(y: Tensor) -> Any:
        before = y.view(-1) + 1
        y.relu_()
        return y, before

    _, result = check(Around(function), torch.randn(2, 3))
    assert (result.changes, result.refusals) == (1, ())


def test_a_view_made_of_the_written_value_does_not_matter() -> None:
    def function(y: Tensor) -> Any:
        y.relu_()
        return y.view(-1) + 1

    _, result = check(Around(function), torch.randn(2, 3))
    assert (result.changes, result.refusals) == (1, ())


class OneCallRefused(nn.Module):
    """Of two calls of one in-place module, the second writes a value with a living view."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        a = x * 2
        self.relu(a)
        b = x - 1
        viewed = b.view(-1)
        self.relu(b)
        return a, viewed.sum()


def test_a_module_with_a_refused_call_keeps_its_flag_for_that_call() -> None:
    gm, result = check(OneCallRefused(), torch.randn(2, 3))
    first, second = (n for n in gm.graph.nodes if n.op == "call_module")
    assert [refusal.node for refusal in result.refusals] == [second.name]
    assert is_inplace(gm, second)
    assert not is_inplace(gm, first)


WITHOUT_FORM: dict[str, Function] = {
    "zero_": lambda y: y.zero_(),
    "fill_": lambda y: y.fill_(3.0),
    "copy_": lambda y: y.copy_(y * 2),
    "lt_ gives floats, lt booleans": lambda y: y.lt_(0.0),
    "out": lambda y: torch.add(y, 1, out=y),
    "another shape": lambda y: y.resize_(3, 2),
}


@pytest.mark.parametrize("form", WITHOUT_FORM)
def test_refused_where_there_is_no_form_of_the_same_meaning(form: str) -> None:
    with torch.no_grad():
        _gm, result = check(ThenRead(WITHOUT_FORM[form]), torch.randn(2, 3))
    (refusal,) = result.refusals
    assert "no known out-of-place form" in refusal.reason


def test_bernoulli_is_left_alone() -> None:
    gm, result = functionalized(Around(lambda y: y.bernoulli_(1.0)), torch.randn(2, 3))
    assert [refusal.node for refusal in result.refusals] == ["bernoulli_"]
    assert torch.equal(gm(torch.full((2, 3), -5.0)), torch.ones(2, 3))


def test_refused_where_the_result_would_have_another_dtype() -> None:
    class Kept(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x * 2
            z += y
            return z

    _, result = check(Kept(), torch.ones(2), torch.ones(2))
    assert not result.refusals
    inputs = torch.ones(2), torch.ones(2, dtype=torch.float64)
    _gm, result = check(Kept(), *inputs)
    (refusal,) = result.refusals
    assert refusal.culprits == ("y",)
    assert "dtype" in refusal.reason


class Residual(nn.Module):
    """``+=`` writes a tensor that has another name."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        skip = y
        y += x
        return y, skip


def test_augmented_assignment_is_seen_under_every_name() -> None:
    gm, result = check(Residual(), torch.ones(2))
    assert result.changes == 1
    assert gm(torch.ones(2))[1].tolist() == [3.0, 3.0]


def test_augmented_assignment_of_a_number_is_seen_under_one_name() -> None:
    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[0]
            padded = size
            padded += 1
            padded *= 2
            return x.sum() + padded * 10 + size

    gm, result = check(Count(), torch.zeros(3))
    assert (result.changes, result.refusals) == (2, ())
    assert gm(torch.zeros(5)).item() == 125


def test_augmented_assignment_of_who_knows_what_stays() -> None:
    gm, result = functionalized(Residual(), torch.ones(2), shapes=False)
    (refusal,) = result.refusals
    assert "example inputs would tell" in refusal.reason
    assert gm(torch.ones(2))[1].tolist() == [3.0, 3.0]


def test_refused_where_the_model_keeps_state() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.total.add_(x) * 1

    model = Sum()
    gm, result = functionalized(model, torch.ones(3))
    (refusal,) = result.refusals
    assert "'total'" in refusal.reason
    for _ in range(2):
        assert torch.equal(gm(torch.ones(3)), model(torch.ones(3)))
    assert model.total.tolist() == [2.0, 2.0, 2.0]  # the graph has a buffer of its own


def test_an_input_of_the_model_is_written_no_more() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.relu_()
            return x + 1

    gm, result = functionalized(Writes(), torch.randn(3))
    assert result.changes == 1
    x = torch.tensor([-1.0, 2.0])
    assert gm(x).tolist() == [1.0, 3.0]
    assert x.tolist() == [-1.0, 2.0]


def test_operators_whose_names_end_in_an_underscore_write_nothing() -> None:
    _, result = check(Around(lambda y: (y > 0) & (y < 1)), torch.randn(3))
    assert (result.changes, result.refusals) == (0, ())


def test_every_refusal_has_a_reason_without_shapes_too() -> None:
    def function(y: Tensor) -> Any:
        viewed = y.view(-1)
        y.relu_()
        return viewed

    _, result = functionalized(Around(function), torch.randn(2, 3), shapes=False)
    assert all(refusal.reason for refusal in result.refusals)
    assert result.refusals


def test_nothing_in_place_is_nothing_to_do() -> None:
    gm = captured(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), torch.randn(1, 2))
    assert Functionalize().run(gm, context()) == PassResult(changes=0)
