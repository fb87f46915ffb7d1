"""lay-out-weights: float convolutions between int8 ones write channels_last; values stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import calibrate, convert_fx, get_default_qconfig, load, prepare_fx, save
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.passes.lay_out_weights import LayOutWeights
from tests.passes.helpers import captured, graph_text, run_alone

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))
ROWS = torch.channels_last


class Model(nn.Module):
    """Three convolutions, a weight that two calls read, and one that is read otherwise as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.last = nn.Conv2d(8, 4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 2))
        self.also = nn.Parameter(torch.randn(4, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(F.relu(self.second(F.relu(self.first(x)))))
        x = F.conv2d(F.conv2d(x, self.kernel), self.kernel)
        return F.conv2d(x, self.also) * self.also.sum()


def strides(gm: QuantGraphModule) -> dict[str, tuple[int, ...]]:
    return {name: parameter.stride() for name, parameter in gm.named_parameters()}


def in_rows(gm: QuantGraphModule) -> set[str]:
    """Float tensors that are held in channels_last, and would not be otherwise."""
    return {
        name
        for name, tensor in gm.state_dict().items()
        if tensor.dim() == 4
        and tensor.is_floating_point()
        and tensor.is_contiguous(memory_format=ROWS)
        and not tensor.is_contiguous()
    }


def mixed(model: nn.Module) -> tuple[QuantGraphModule, QuantGraphModule]:
    """A prepared model whose first two convolutions stay in floating point, and the int8 one."""
    mapping = {"": get_default_qconfig("x86"), "first": None, "second": None}
    prepared = prepare_fx(model, mapping, (X,))
    calibrate(prepared, [X], progress=False)
    return prepared, convert_fx(prepared)


def test_golden(golden: Callable[[str, str], None]) -> None:
    _, int8 = mixed(Model().eval())
    held = [f"{name} {stride}" for name, stride in strides(int8).items()]
    golden("lay-out-weights", "\n".join([graph_text(int8), *held]))


def test_weights_of_float_convolutions_only() -> None:
    prepared, int8 = mixed(Model().eval())
    assert {"first.weight", "second.weight"} <= in_rows(int8)
    assert "also" not in in_rows(int8)  # a sum reads it, too
    assert in_rows(prepared) == set()
    assert run_alone(LayOutWeights(), int8).changes == 0  # once is enough


def test_results_are_laid_out_and_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    before = {name: p.stride() for name, p in model.named_parameters()}
    gm = captured(model, X)
    with torch.no_grad():
        expected = gm(X)
        assert not expected.is_contiguous(memory_format=ROWS)
        inlined = convert_fx(
            calibrate(prepare_fx(model, {"": None}, (X,), strict=False), [X], progress=False)
        )
        node = next(n for n in inlined.graph.nodes if n.op == "call_function")
        assert record_of(node).origins
        found = inlined(X)
    assert found.is_contiguous()  # callers get what the float model gives
    assert in_rows(inlined) == {"0.weight", "2.weight"}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert {name: p.stride() for name, p in model.named_parameters()} == before


def test_layout_survives_copies_and_files(tmp_path: Path) -> None:
    _, int8 = mixed(Model().eval())
    save(int8, tmp_path / "model.fxq")
    for other in (copy.deepcopy(int8), load(tmp_path / "model.fxq")):
        assert {"first.weight", "second.weight"} <= in_rows(other)
        assert torch.equal(other(X), int8(X))
