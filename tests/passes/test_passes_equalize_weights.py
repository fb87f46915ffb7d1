"""equalize-weights: like channel ranges, and the float function as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import PassResult
from fxquant.passes.equalize_weights import EqualizeWeights
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.functionalize import Functionalize
from tests.passes.helpers import captured, context, graph_text, lively, run_alone

X = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0))


def uneven(model: nn.Module) -> nn.Module:
    """``model`` with channel ranges that differ by up to 50 times."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in lively(model).modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() > 1:
                factors = (4 * torch.rand(weight.shape[0], generator=generator)).exp()
                weight.mul_(factors.reshape(-1, *[1] * (weight.dim() - 1)) / 50)
    return model


def folded(model: nn.Module, x: Tensor = X) -> QuantGraphModule:
    gm = captured(model, x)
    for one in (Functionalize(), FoldBatchNorm()):
        one.run(gm, context())
    return gm


class Chain(nn.Module):
    """Every form of layer, and everything that may stand between two."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, groups=3)
        self.slopes = nn.PReLU(6)
        self.weight = nn.Parameter(torch.zeros(10, 6, 1, 1))
        self.first, self.last = nn.Linear(40, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.plain(x)).relu()
        x = F.leaky_relu(self.depthwise(F.pad(x, (1, 0, 0, 1))), 0.1)
        x = self.slopes(self.up(F.max_pool2d(self.grouped(x), 2)))
        x = F.adaptive_avg_pool2d(F.conv2d(x, self.weight), 2)
        y: Tensor = self.last(F.relu(self.first(x.flatten(1))))
        return y


def of_reading(module: nn.Module) -> Tensor:
    """The largest weight that reads each input channel."""
    weight = getattr(module, "weight", module)
    assert isinstance(weight, Tensor)
    if weight.dim() == 2:
        return weight.abs().amax(0)
    if isinstance(module, nn.ConvTranspose2d):
        return weight.abs().flatten(1).amax(1)
    split = weight.abs().unflatten(0, (getattr(module, "groups", 1), -1))  # [groups, out, in, ...]
    return split.flatten(3).amax(3).amax(1).flatten()


def of_writing(module: nn.Module) -> Tensor:
    """The largest weight that writes each output channel."""
    weight = getattr(module, "weight", module)
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.ConvTranspose2d):
        split = weight.abs().unflatten(0, (module.groups, -1))  # [groups, in, out, ...]
        return split.flatten(3).amax(3).amax(1).flatten()
    return weight.abs().flatten(1).amax(1)


def test_equal_ranges_and_the_same_function(golden: Callable[[str, str], None]) -> None:
    model = uneven(Chain())
    expected = model(X).detach()
    gm = folded(model)
    result = run_alone(EqualizeWeights(), gm)
    golden("equalize-weights", graph_text(gm))
    assert result.changes
    assert result.refusals == ()
    torch.testing.assert_close(gm(X).detach(), expected, rtol=1e-5, atol=1e-5)
    chain: list[Any] = [gm.plain, gm.depthwise, gm.grouped, gm.up, gm.weight, gm.first, gm.last]
    for first, second in itertools.pairwise(chain):
        read = of_reading(second)
        read = read.reshape(len(of_writing(first)), -1).amax(1)
        torch.testing.assert_close(of_writing(first), read, rtol=0.02, atol=0)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["transposed", "conv1d", "conv3d"])
def test_other_dimensions(kind: str) -> None:
    layers, shape = {
        "transposed": (
            (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2)),
            (2, 4, 5, 5),
        ),
        "conv1d": ((nn.Conv1d(4, 6, 3), nn.AvgPool1d(2), nn.Conv1d(6, 4, 2)), (2, 4, 11)),
        "conv3d": ((nn.Conv3d(4, 6, 2), nn.ReLU(), nn.Conv3d(6, 4, 2)), (2, 4, 5, 5, 5)),
    }[kind]
    model, x = uneven(nn.Sequential(*layers)), torch.randn(shape)
    gm = folded(model, x)
    run_alone(EqualizeWeights(), gm)
    assert "equalized with '_2'" in record_of(_node(gm, "0")).reasons[-1]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(gm.get_parameter("0.weight"), model[0].weight)


def _node(gm: QuantGraphModule, target: str) -> Any:
    return next(node for node in gm.graph.nodes if node.target == target)


def test_a_second_run_changes_little() -> None:
    gm = folded(uneven(Chain()))
    run_alone(EqualizeWeights(), gm)
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    run_alone(EqualizeWeights(), gm)
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0.02, atol=1e-6)


class Refused(nn.Module):
    """A pair of convolutions, and what keeps them from being one."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), between
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.a(x))


def _hooked(model: Refused) -> Refused:
    model.b.register_forward_hook(lambda module, inputs, output: output)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two-readers": (lambda: Refused(lambda s, y: s.b(y) + y), "'a' is read by 2 ops"),
    "relu6": (lambda: Refused(lambda s, y: s.b(F.relu6(y))), "'relu6' saturates; equalize with"),
    "from-minus-one": (lambda: Refused(lambda s, y: s.b(F.hardtanh(y))), "'hardtanh' saturates"),
    "padded-with-ones": (
        lambda: Refused(lambda s, y: s.b(F.pad(y, (1, 1), value=1.0))),
        "'pad' does not pad with zeros",
    ),
    "called-twice": (lambda: Refused(lambda s, y: s.b(s.b(y))), "shares its weight with 'b_1'"),
    "hooks": (
        lambda: _hooked(Refused(lambda s, y: s.b(y))),
        "module 'b' has forward hooks",
    ),
    "all-flattened": (
        lambda: Refused(lambda s, y: s.c(y.flatten()), c=nn.Linear(4 * 81 * 3, 2)),
        "'flatten' joins more than",
    ),
    "positions": (
        lambda: Refused(lambda s, y: s.c(y), c=nn.Linear(9, 2)),
        "'c' reads other channels than 'a' writes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    model = uneven(make())
    gm = folded(model)
    result = run_alone(EqualizeWeights(), gm)
    assert any(message in refusal.reason for refusal in result.refusals)
    assert any(message in reason for reason in record_of(_node(gm, "a")).reasons)
    assert torch.equal(gm(X), model(X))


@pytest.mark.parametrize(
    "between", [F.relu6, lambda x: x.clamp(0, 6), lambda x: F.hardtanh(x, 0.0, 6.0)]
)
def test_clamps_are_opened_where_asked(between: Callable[[Tensor], Tensor]) -> None:
    model = uneven(Refused(lambda s, y: s.b(between(y))))
    gm = folded(model)
    run_alone(EqualizeWeights(open_clamps=True), gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [F.relu]
    expected = model.b(F.relu(model.a(X)))
    torch.testing.assert_close(gm(X), expected, rtol=1e-5, atol=1e-5)


def test_channels_without_weights_stay() -> None:
    model = uneven(Refused(lambda s, y: s.b(F.relu(y))))
    with torch.no_grad():
        model.a.weight[0] = 0
        model.b.weight[:, 1] = 0
    gm = folded(model)
    run_alone(EqualizeWeights(), gm)
    torch.testing.assert_close(gm(X), model(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(gm.get_parameter("a.weight")[1], model.a.weight[1])
    assert torch.equal(gm.get_parameter("a.bias")[:2], model.a.bias[:2])


def test_nothing_to_equalize() -> None:
    gm = folded(uneven(nn.Sequential(nn.Conv2d(4, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1))))
    assert run_alone(EqualizeWeights(), gm) == PassResult(changes=0)
