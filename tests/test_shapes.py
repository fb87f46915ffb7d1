"""shapes: what every value is with the example inputs, or one warning that says why not."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.capture import capture
from fxquant.errors import CaptureWarning, Diagnostics, StrictModeError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import EMPTY, DictRecord, TensorRecord, record_of, shape_of
from fxquant.shapes import as_arguments, bind_examples, record_shapes

IMAGES = torch.randn(2, 3, 8, 8)


def recorded(model: nn.Module, examples: Any) -> QuantGraphModule:
    gm = capture(model, Diagnostics())
    assert record_shapes(gm, examples, Diagnostics())
    assert gm.state.shapes_known
    assert all(record_of(node).has_value for node in gm.graph.nodes)
    return gm


def value(gm: QuantGraphModule, name: str) -> Any:
    return record_of(next(node for node in gm.graph.nodes if node.name == name)).value


class Values(nn.Module):
    """Gives a value of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        mask = y > 0
        size = x.size(0)
        halves = y.chunk(2, 1)
        return y, (mask, {"size": size, "halves": halves}), x.shape, None


def test_every_sort_of_value() -> None:
    gm = recorded(Values(), (IMAGES,))
    image = TensorRecord(shape=(2, 4, 6, 6), dtype=torch.float32)
    half = TensorRecord(shape=(2, 2, 6, 6), dtype=torch.float32)
    assert value(gm, "x") == TensorRecord(shape=(2, 3, 8, 8), dtype=torch.float32)
    assert value(gm, "bn") == image
    assert value(gm, "gt") == TensorRecord(shape=(2, 4, 6, 6), dtype=torch.bool)
    assert value(gm, "size") == 2
    assert value(gm, "chunk") == (half, half)
    assert value(gm, "output") == (
        image,
        (
            TensorRecord(shape=(2, 4, 6, 6), dtype=torch.bool),
            DictRecord(keys=("size", "halves"), values=(2, (half, half))),
        ),
        (2, 3, 8, 8),
        None,
    )
    assert shape_of(next(n for n in gm.graph.nodes if n.name == "chunk")) is None


@pytest.mark.parametrize("train", [True, False])
def test_the_run_is_in_evaluation_and_writes_nothing(train: bool) -> None:
    gm = capture(Values().train(train), Diagnostics())
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    assert record_shapes(gm, (IMAGES,), Diagnostics())
    for name, tensor in gm.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(module.training == train for module in gm.modules())


class NeedsValues(nn.Module):
    """The shape of its result is a matter of values, so fake tensors do not do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.leaf = _Leaf()

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.seen.add_(x.sum())
        return self.leaf(x)[torch.nonzero(x > 2)[:, 0]]


class _Leaf(nn.ReLU):
    """A module that keeps what it saw, and that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x) if x.sum() > -1e9 else x


def test_values_that_decide_shapes_need_a_real_run() -> None:
    gm = capture(NeedsValues(), Diagnostics())
    x = torch.tensor([0.5, 2.0, 3.0])
    assert record_shapes(gm, (x,), Diagnostics())
    assert value(gm, "getitem_1") == TensorRecord(shape=(2,), dtype=torch.float32)
    assert x.tolist() == [0.5, 2.0, 3.0]
    assert gm.seen.tolist() == [0.0, 0.0, 0.0]
    assert not hasattr(gm.leaf, "last")


def test_a_fake_run_writes_no_buffer() -> None:
    class Counts(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(
        graph.call_method("add", (x, graph.call_method("add_", (graph.get_attr("count"), 1))))
    )
    gm = capture(fx.GraphModule(Counts(), graph), Diagnostics())
    assert record_shapes(gm, (torch.ones(2),), Diagnostics())
    assert gm.count.tolist() == [0.0]


def test_a_fake_run_leaves_no_fake_tensor_behind() -> None:
    gm = capture(nn.Sequential(_Leaf()), Diagnostics())
    assert record_shapes(gm, (IMAGES,), Diagnostics())
    assert not hasattr(gm.get_submodule("0"), "last")


# -- forms of example inputs ----------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor, y: Any = 3.0) -> Tensor:
        return x + y


FORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "tuple": ((torch.ones(2), torch.ones(5, 2)), (5, 2)),
    "list": ([torch.ones(2), torch.ones(4, 2)], (4, 2)),
    "keywords": ({"y": torch.ones(3, 2), "x": torch.ones(2)}, (3, 2)),
    "bare tensor": (torch.ones(7), (7,)),
    "default": ((torch.ones(2),), (2,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_example_inputs(form: str) -> None:
    examples, shape = FORMS[form]
    gm = recorded(Two(), examples)
    assert value(gm, "add").shape == shape


def test_variable_inputs() -> None:
    class Variable(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor, scale: Any = 1.0, **more: Tensor) -> Tensor:
            return (x + rest[1]) * scale + more["last"]

    gm = capture(Variable(), Diagnostics())
    given = {"x": torch.ones(2), "scale": 2, "last": torch.ones(1)}
    with pytest.warns(CaptureWarning, match="do not run"):  # rest has no second item
        assert not record_shapes(gm, given, Diagnostics())

    class Rest(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor, scale: Any = 1.0) -> Tensor:
            return (x + rest[1]) * scale

    gm = recorded(Rest(), (torch.ones(2), torch.ones(1), torch.ones(3, 1)))
    assert value(gm, "mul").shape == (3, 2)


def test_none_is_no_run_and_no_warning() -> None:
    gm = capture(Two(), Diagnostics())
    assert not record_shapes(gm, None, Diagnostics(strict=True))
    assert not gm.state.shapes_known
    assert not any(record_of(node).has_value for node in gm.graph.nodes)


def test_a_dict_without_string_keys_is_one_input() -> None:
    given = {0: torch.ones(1)}
    assert as_arguments(given) == ((given,), {})


def test_as_arguments() -> None:
    x = torch.ones(1)
    assert as_arguments((x, 1)) == ((x, 1), {})
    assert as_arguments([x]) == ((x,), {})
    assert as_arguments({"a": x}) == ((), {"a": x})
    assert as_arguments(x) == ((x,), {})


def test_bind_examples() -> None:
    def forward(
        self: Any, a: Any, b: Any = None, *rest: Any, c: Any = True, d: Any = 1
    ) -> None: ...

    found = bind_examples(forward, (1, 2, 3, 4))
    assert found is not None
    assert found.values == (1, 2, True, 1, (3, 4))  # the order in which fx makes inputs
    assert found.fixed == {"c": True}
    found = bind_examples(forward, {"a": None, "c": False})
    assert found is not None
    assert found.fixed == {"a": None, "b": None}
    assert bind_examples(forward, None) is None
    assert bind_examples(forward, {"unknown": 1}) is None


# -- example inputs that fail ---------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.mean((2, 3)))


def test_inputs_that_fail_are_told_once_with_shapes_node_cause_and_cure() -> None:
    gm = capture(Fails(), Diagnostics())
    diagnostics = Diagnostics()
    with pytest.warns(CaptureWarning) as seen:
        assert not record_shapes(gm, (IMAGES,), diagnostics)
    assert not record_shapes(gm, (IMAGES,), diagnostics)  # a second warning would be an error
    (message,) = [str(warning.message) for warning in seen]
    _, first = inspect.getsourcelines(Fails.forward)
    assert "float32[2, 3, 8, 8]" in message
    assert re.search(rf"at node 'fc' \(call_module fc in .*test_shapes\.py:{first + 2}\)", message)
    assert "mat1 and mat2 shapes cannot be multiplied" in message
    assert "pass example inputs that the model accepts" in message
    assert not gm.state.shapes_known
    assert not any(record_of(node).has_value for node in gm.graph.nodes)


MISFITS: dict[str, tuple[Any, str]] = {
    "too many": ((IMAGES, IMAGES), r"the model takes \['x'\], the example inputs are 2 positional"),
    "unknown name": ({"z": IMAGES}, r"and the keywords \['z'\]"),
    "too few": ((), "lack a value for 'x'"),
    "wrong type": (("text",), r"\(str\) do not run"),
    "wrong rank": (torch.ones(2, 3), r"\(float32\[2, 3\]\) do not run"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits(case: str) -> None:
    examples, message = MISFITS[case]
    gm = capture(Fails(), Diagnostics())
    with pytest.warns(CaptureWarning, match=message):
        assert not record_shapes(gm, examples, Diagnostics())


def test_strict() -> None:
    gm = capture(Fails(), Diagnostics())
    with pytest.raises(StrictModeError, match="do not run on the model"):
        record_shapes(gm, (IMAGES,), Diagnostics(strict=True))


def test_a_failed_run_forgets_what_an_earlier_one_knew() -> None:
    class Good(Fails):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

    gm = recorded(Good(), (IMAGES,))
    with pytest.warns(CaptureWarning):
        assert not record_shapes(gm, (torch.ones(1),), Diagnostics())
    assert all(record_of(n).value is EMPTY.value for n in gm.graph.nodes)
