"""insert-observers: one observer a tensor and spec, shared by its readers, in graph order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import record_of
from fxquant.observers import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.insert_observers import InsertObservers
from fxquant.qconfig import QConfig
from fxquant.quantize_fx import prepare_fx
from tests.passes.helpers import (
    captured,
    graph_text,
    lively,
    node_named,
    observers,
    run_alone,
    run_before,
)

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)
B = QConfig(HistogramObserver, WEIGHT)
REDUCED = QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=127), WEIGHT)
IMAGES = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def observed(model: nn.Module, *inputs: Any, mapping: Any = None) -> QuantGraphModule:
    lively(model)
    gm = captured(model, *inputs)
    run_before(InsertObservers, gm, model, {"": A} if mapping is None else mapping)
    result = run_alone(InsertObservers(), gm)
    assert result.changes >= len(observers(gm))
    assert gm.state.stage is Stage.PREPARED
    before = fingerprint(gm)
    assert run_alone(InsertObservers(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    return gm


class Residual(nn.Module):
    """A value with three readers, a residual add, moved values and a float head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        y = F.relu(self.conv2(x) + x)
        y = torch.cat([F.max_pool2d(y, 2), F.max_pool2d(self.conv3(x), 2)], 1)
        return self.fc(y.mean((2, 3)))


def test_counts_and_places() -> None:
    gm = observed(Residual(), IMAGES)
    assert observers(gm) == {
        "activation_post_process_0": "x",
        "activation_post_process_1": "relu",
        "activation_post_process_2": "relu_1",
        "activation_post_process_3": "conv3",
        "activation_post_process_4": "mean",
    }


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("insert-observers", graph_text(observed(Residual(), IMAGES)))


def test_all_readers_share_the_observed_value() -> None:
    gm = observed(Residual(), IMAGES)
    watched = node_named(gm, "relu")
    (observer,) = watched.users
    assert [user.name for user in observer.users] == ["conv2", "add", "conv3"]


def test_moved_values_have_no_observer() -> None:
    gm = observed(Residual(), IMAGES)
    assert not {"max_pool2d", "max_pool2d_1", "cat"} & set(observers(gm).values())


def test_the_observer_is_made_by_the_ops_own_qconfig_and_knows_its_place() -> None:
    gm = observed(Residual(), IMAGES, mapping={"": A, "conv3": B})
    made = {value: gm.get_submodule(path) for path, value in observers(gm).items()}
    assert isinstance(made["conv3"], HistogramObserver)
    assert type(made["relu"]) is MinMaxObserver  # conv3 reads it, but relu's qconfig decides
    assert made["conv3"].owner == "activation_post_process_3 (output of 'conv3')"


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 1)
        self.two = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).softmax(1) + self.two(x).softmax(1)


def test_an_input_is_observed_once_for_equal_specs() -> None:
    gm = observed(TwoReaders(), IMAGES, mapping={"one": A, "two": B})
    assert list(observers(gm).values()) == ["x"]


def test_an_input_is_observed_once_for_each_spec() -> None:
    gm = observed(TwoReaders(), IMAGES, mapping={"one": A, "two": REDUCED})
    assert list(observers(gm).values()) == ["x", "x"]
    one, two = (node_named(gm, name).args[0] for name in ("one", "two"))
    assert gm.get_submodule(str(one.target)).quant_max == 255
    assert gm.get_submodule(str(two.target)).quant_max == 127


def test_readers_in_floating_point_read_what_was_observed() -> None:
    class Mixed(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.one(x))
            return self.two(y) + y.exp()

    gm = observed(Mixed(), IMAGES)
    (observer,) = node_named(gm, "relu").users
    assert {user.name for user in observer.users} >= {"two", "exp"}


def test_an_input_that_only_float_ops_read_is_not_observed() -> None:
    class Head(TwoReaders):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.one(x).softmax(1) + y.exp()

    gm = observed(Head(), IMAGES, IMAGES)
    assert list(observers(gm).values()) == ["x"]


def test_one_module_called_twice_has_two_outputs() -> None:
    class Again(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    gm = observed(Again(), IMAGES)
    assert list(observers(gm).values()) == ["x", "one", "one_1"]


def test_nothing_to_quantize_is_nothing_to_observe() -> None:
    gm = observed(nn.Sequential(nn.Softmax(1)), IMAGES)
    assert observers(gm) == {}


# -- what is no float tensor ----------------------------------------------------------------------


class NotFloat(nn.Module):
    """Masks, indices, sizes and flags beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, ids: Tensor, mask: Tensor, scale: int, flag: bool) -> Any:
        x = self.fc(self.embedding(ids))
        lengths = mask.sum(1)
        shifted = ids + lengths.unsqueeze(1)
        x = x.masked_fill(mask.unsqueeze(-1), 0.0)
        x = self.fc(x.view(x.size(0), -1, 4)) * scale
        return x, shifted + 1, ~mask, flag


@pytest.mark.parametrize("shapes", [True, False])
def test_only_float_tensors_are_observed(shapes: bool) -> None:
    inputs = (torch.arange(6).view(2, 3), torch.zeros(2, 3, dtype=torch.bool), 2, True)
    model = NotFloat().eval()
    gm = prepare_fx(model, {"": A}, inputs if shapes else None)
    watched = set(observers(gm).values())
    # Without shapes it is not known that masked_fill gives floats, only that the linear takes them.
    assert watched == {"embedding", "masked_fill" if shapes else "view"}
    for given, wanted in zip(gm(*inputs), model(*inputs), strict=True):
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(given, wanted)
        else:
            assert given == wanted


@pytest.mark.parametrize("inputs", [(IMAGES,), None])
def test_the_prepared_graph_has_an_observer_for_each_spec(inputs: Any) -> None:
    gm = prepare_fx(Residual().eval(), {"": A}, inputs)
    for path in observers(gm):
        value = next(n for n in gm.graph.nodes if n.target == path).all_input_nodes[0]
        assert (
            record_of(value).annotation is not None
            or value.op == "placeholder"
            or (value.name == "mean")
        )
