"""mark-boundary: which inputs and results are torch's quantized tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import ConfigWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import PassResult
from fxquant.passes.mark_boundary import MarkBoundary
from tests.passes.nested_models import IMAGES, float_graph, run_alone


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": x + x, "x": x}


def marks(gm: QuantGraphModule) -> tuple[list[bool], tuple[int, ...]]:
    inputs = [record_of(n).gives_quantized for n in gm.graph.nodes if n.op == "placeholder"]
    returned = next(n for n in gm.graph.nodes if n.op == "output")
    return inputs, record_of(returned).takes_quantized


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ((), (), ([False, False], ())),
        ((1,), (), ([False, True], ())),
        ((0, 1), (1, 0, 1), ([True, True], (0, 1))),
    ],
)
def test_marks(
    inputs: tuple[int, ...], outputs: tuple[int, ...], expected: tuple[list[bool], tuple[int, ...]]
) -> None:
    gm = float_graph(Two(), IMAGES, IMAGES)
    result = run_alone(MarkBoundary(inputs, outputs), gm)
    assert marks(gm) == expected
    assert result.changes == len(inputs) + bool(outputs)
    assert run_alone(MarkBoundary(inputs, outputs), gm) == PassResult(changes=0)
    both = gm(IMAGES, IMAGES)
    assert torch.equal(both[0], IMAGES + IMAGES)


def test_a_dict_is_one_result() -> None:
    gm = float_graph(Named(), IMAGES)
    run_alone(MarkBoundary((), (0,)), gm)
    assert marks(gm) == ([False], (0,))


@pytest.mark.parametrize(
    ("inputs", "outputs", "what"),
    [((2,), (), "input 2, but the model has 2"), ((), (1, 5), "output 5, but the model has 2")],
)
def test_what_is_not_there_is_told(
    inputs: tuple[int, ...], outputs: tuple[int, ...], what: str
) -> None:
    gm = float_graph(Two(), IMAGES, IMAGES)
    with pytest.warns(ConfigWarning, match=what):
        run_alone(MarkBoundary(inputs, outputs), gm)
