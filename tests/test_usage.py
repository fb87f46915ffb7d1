"""usage: what code does with modules, by a run and by its bytecode."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.usage import Reads, held_outside, names_in, reads_of, watch


def helper(layer: nn.Linear, x: Tensor) -> Tensor:
    return x + layer.bias


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.deep = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.deep[0].weight.sum()

    @property
    def scale(self) -> Tensor:
        return self.fc.weight.abs().max()

    @staticmethod
    def twice(layer: nn.Linear) -> int:
        return 2 * layer.out_features

    def method(self, x: Tensor) -> Tensor:
        return x * self.deep.training


class Code(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.scale + self.twice(self.fc)
        for layer in self.deep:
            y = layer(y) * layer.in_features
        return helper(self.fc, self.method(y)) + sum(self.fc.weight.sum() for _ in range(2))


def test_what_code_reads() -> None:
    """Of ``forward``, its base's, methods, properties, helpers and comprehensions."""
    found = reads_of(Code)
    assert found is not None
    assert {"fc", "fc.weight", "deep", "deep.training", "scale", "twice"} <= found.exact
    assert {"weight", "bias", "in_features", "out_features"} <= found.other
    assert "eval" not in found.names
    assert not found.walks
    assert not found.tests_types


def test_walks_tests_and_getattr() -> None:
    class Asks(Base):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.fc, nn.Linear):
                return x * getattr(self.fc, "out_features")  # noqa: B009  # the point
            return x.to(next(self.parameters()).dtype)

    found = reads_of(Asks)
    assert found is not None
    assert found.walks
    assert found.tests_types
    assert "Linear" in found.names
    assert "out_features" in found.other


def test_code_that_is_no_python() -> None:
    class Native(nn.Module):
        forward = torch.relu

    assert reads_of(Native) is None
    assert isinstance(reads_of(Base), Reads)


def used(model: Base, run: Any) -> Any:
    return watch(dict(model.named_modules()), lambda: run(model))


def test_calls_with_their_arguments() -> None:
    x = torch.ones(2, 4)

    def run(model: Base) -> None:
        for value in (x, 2 * x):
            model.fc(input=value)
        x.zero_()  # what was recorded is a copy

    found = used(Base(), run)
    assert (found["fc"].calls, found["fc"].reads, len(found["fc"].forms)) == (2, set(), 1)
    assert found["fc"].arguments is not None
    assert torch.equal(found["fc"].arguments[1]["input"], torch.ones(2, 4))
    assert (found["deep"].calls, found["deep.0"].calls) == (0, 0)


def test_forms_tell_what_a_trace_takes_for_constant() -> None:
    class Flag(nn.Module):
        def forward(self, x: Tensor, flag: bool = True, other: Any = None) -> Tensor:
            return x

    x = torch.ones(2)
    calls: list[tuple[Any, ...]] = [(x,), (x, True), (x, False), (x, True, x), (x.int(),)]
    model = Flag()
    found = watch({"": model}, lambda: [model(*call) for call in calls])
    assert len(found[""].forms) == 5
    found = watch({"": model}, lambda: [model(torch.ones(size)) for size in (1, 2)])
    assert len(found[""].forms) == 1  # sizes may differ


@pytest.mark.parametrize(
    ("run", "path", "name"),
    [
        (lambda model: model.fc.weight, "fc", "weight"),
        (lambda model: model.fc.forward(torch.ones(4)), "fc", "forward"),
        (lambda model: getattr(model.fc, "bias"), "fc", "bias"),  # noqa: B009  # the point
        (lambda model: hasattr(model.fc, "gain"), "fc", "gain"),
        (lambda model: model.deep[0], "deep", "_modules"),
        (lambda model: list(model.parameters()), "deep.0", "_parameters"),
        (lambda model: vars(model.fc), "fc", "__dict__"),
    ],
)
def test_reads_from_outside(run: Any, path: str, name: str) -> None:
    assert name in used(Base(), run)[path].reads


def test_what_a_module_does_with_itself_is_its_own_business() -> None:
    found = used(Base(), lambda model: model(torch.ones(2, 4)))
    assert found["fc"].reads == set()
    assert found["deep.0"].reads >= {"weight"}  # by the model, not by its sequence
    assert found[""].reads == set()
    assert type(Base().fc) is nn.Linear  # only what was passed is changed


def test_watching_goes_on_after_errors() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        used(Base(), lambda model: model.fc(torch.ones(3)))


def test_names_of_a_module() -> None:
    assert {"weight", "bias", "in_features"} <= names_in(nn.Linear(2, 2))
    assert not names_in(nn.Linear(2, 2)) & {"forward", "training", "parameters", "__init__"}


def test_other_holders() -> None:
    class Holds(Base):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, 4)
            self.kept = {"a": (functools.partial(helper, self.fc),)}
            self.bound = self.deep.forward

    model = Holds()
    assert held_outside(model, model.fc) == "kept"
    assert held_outside(model, model.deep) == "bound"
    assert held_outside(model, model.spare) == ""
    nested = nn.ModuleDict({"inner": model})
    assert held_outside(nested, model.fc) == "inner.kept"
