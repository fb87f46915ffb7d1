"""fold-batch-norm: folds where the float result stays, refuses with the reason elsewhere.

Bound of the float comparisons: a folded weight is computed in float64 and rounded once to float32,
as is the bias; with the reassociation of sums of at most a few hundred products of float32 (unit
round-off 6e-8), 1e-5 relative to the largest output is more than ten times what is possible. For
float64 models the same argument gives 1e-13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import CaptureWarning, FxQuantError, TrainingModeError
from fxquant.graph_module import QuantGraphModule
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.quantize_fx import fuse_fx, prepare_fx
from tests.passes.helpers import captured, graph_text, lively, reasons, run_alone

IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def near(given: Any, wanted: Any, bound: float = 1e-5) -> None:
    scale = wanted.abs().max().item()
    assert (given - wanted).abs().max().item() <= bound * scale


def fold(
    model: nn.Module, *inputs: Any, bound: float = 1e-5
) -> tuple[QuantGraphModule, PassResult]:
    """Fold, compare with the model, and check that a second run finds nothing to do."""
    lively(model)
    gm = captured(model, *inputs)
    result = run_alone(FoldBatchNorm(), gm)
    with torch.no_grad():
        near(gm(*inputs), model(*inputs), bound)
    before = fingerprint(gm)
    again = run_alone(FoldBatchNorm(), gm)
    assert again.changes == 0
    assert fingerprint(gm) == before
    return gm, result


def norms(gm: QuantGraphModule) -> int:
    """How many batch-norms are left, whatever their form."""
    functions = [n for n in gm.graph.nodes if n.target is F.batch_norm]
    modules = [m for m in gm.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return len(functions) + len(modules)


# -- the traps of today's tools -------------------------------------------------------------------


class Plain(nn.Module):
    """``bn(conv(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AlsoRead(Plain):
    """``y = conv(x); bn(y) + y``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class TwoNorms(Plain):
    """``y = conv(x); bn1(y) + bn2(y)``."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + self.bn2(y)


class CalledTwice(TwoNorms):
    """One convolution called twice, two batch-norms."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn2(self.conv(x * 0.5))


class OneCallBare(Plain):
    """One convolution called twice, one call bare."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x * 0.5)


def test_plain_folds() -> None:
    gm, result = fold(Plain(), IMAGES)
    assert norms(gm) == 0
    assert not result.refusals


REFUSED: dict[type[nn.Module], tuple[str, ...]] = {
    AlsoRead: ("the output of 'conv' is also used by 'add'",),
    TwoNorms: ("the output of 'conv' is also used by 'bn2'",),
    CalledTwice: (
        "module 'conv' is called by 'conv' and also by 'conv_1'",
        "module 'conv' is called by 'conv_1' and also by 'conv'",
    ),
    OneCallBare: ("module 'conv' is called by 'conv' and also by 'conv_1'",),
}


@pytest.mark.parametrize("model", REFUSED)
def test_traps_are_refused_with_the_reason(model: type[nn.Module]) -> None:
    gm, result = fold(model(), IMAGES)
    assert norms(gm) == norms(captured(lively(model()), IMAGES))
    assert len(result.refusals) == len(REFUSED[model])
    for refusal, reason in zip(result.refusals, REFUSED[model], strict=True):
        assert refusal.reason.startswith(reason)
        assert refusal.culprits
    assert f"not folded: {REFUSED[model][0]}" in reasons(gm, "bn")


@pytest.mark.parametrize("model", [Plain, *REFUSED])
def test_golden(model: type[nn.Module], golden: Callable[[str, str], None]) -> None:
    gm = captured(lively(model()), IMAGES)
    before = graph_text(gm)
    result = run_alone(FoldBatchNorm(), gm)
    refused = [f"\nrefused at {r.node}: {r.reason}" for r in result.refusals]
    text = f"{before}\n\n-- fold-batch-norm -->\n\n{graph_text(gm)}\n{''.join(refused)}".rstrip()
    golden(f"fold-batch-norm-{model.__name__}", text)


@pytest.mark.parametrize("model", [Plain, *REFUSED])
def test_public_steps_keep_the_meaning(model: type[nn.Module]) -> None:
    """``fuse_fx`` and ``prepare_fx`` compute what the model computes, and leave it alone."""
    made = lively(model())
    before = copy.deepcopy(made.state_dict())
    for step in (fuse_fx(made), prepare_fx(made, None, (IMAGES,))):
        with torch.no_grad():
            near(step(IMAGES), made(IMAGES))
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# -- every kind and form --------------------------------------------------------------------------

SHAPES: dict[int, tuple[int, ...]] = {1: (2, 4, 9), 2: (2, 4, 6, 6), 3: (2, 4, 4, 4, 4)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSED], ids=["conv", "transposed"])
def test_modules(dim: int, groups: int, bias: bool, affine: bool, kinds: Any) -> None:
    conv = kinds[dim](4, 6, 3, groups=groups, bias=bias, stride=2)
    model = nn.Sequential(conv, NORMS[dim](6, affine=affine))
    gm, result = fold(model, torch.randn(SHAPES[dim]))
    assert norms(gm) == 0
    assert not result.refusals
    assert gm.get_submodule("0").bias is not None


@pytest.mark.parametrize("groups", [1, 4])
def test_depthwise_and_float64(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8)).double()
    gm, _ = fold(model, IMAGES.double(), bound=1e-13)
    assert norms(gm) == 0
    assert gm.get_submodule("0").weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6))
    gm, result = fold(model, torch.randn(3, 5))
    assert norms(gm) == 0
    assert not result.refusals


class Functional(nn.Module):
    """A convolution and a batch-norm, each as a module or as a function of parameters."""

    def __init__(self, conv: bool, norm: bool, *, bias: bool, keywords: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, bias=bias)
        self.norm = nn.BatchNorm2d(6)
        self.conv_as_module, self.norm_as_module, self.keywords = conv, norm, keywords

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if self.conv_as_module:
            y = conv(x)
        elif self.keywords:
            y = F.conv2d(input=x, weight=conv.weight, stride=2, bias=conv.bias)
        else:
            y = F.conv2d(x, conv.weight, conv.bias, 2)
        if self.norm_as_module:
            return norm(y)
        return F.batch_norm(
            y,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=self.training,
            eps=1e-3,
        )


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keywords", [True, False])
def test_forms(conv: bool, norm: bool, bias: bool, keywords: bool) -> None:
    gm, result = fold(Functional(conv, norm, bias=bias, keywords=keywords), IMAGES)
    assert norms(gm) == 0
    assert not result.refusals
    assert len([n for n in gm.graph.nodes if n.op.startswith("call_")]) == 1


def test_two_in_a_row() -> None:
    gm, result = fold(nn.Sequential(nn.Conv2d(4, 6, 1), *map(nn.BatchNorm2d, (6, 6, 6))), IMAGES)
    assert norms(gm) == 0
    assert not result.refusals


def test_gradients_are_asked_for_as_before() -> None:
    model = lively(Plain())
    model.conv.weight.requires_grad_(False)
    gm = captured(model, IMAGES)
    run_alone(FoldBatchNorm(), gm)
    assert not gm.get_submodule("conv").weight.requires_grad
    assert not model.conv.weight.requires_grad


def test_counts_and_origins() -> None:
    gm = captured(lively(nn.Sequential(Plain(), Plain2())), IMAGES)
    result = run_alone(FoldBatchNorm(), gm)
    assert result.changes > 0
    kept = [n for n in gm.graph.nodes if n.op == "call_module"]
    assert [n.meta["fxquant"].origins for n in kept] == [("_0_conv", "_0_bn"), ("_1_conv", "_1_bn")]
    assert not hasattr(gm.get_submodule("0"), "bn")


class Plain2(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)


# -- what is refused ------------------------------------------------------------------------------


def test_without_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False))
    gm, result = fold(model, IMAGES)
    (refusal,) = result.refusals
    assert "track_running_stats=False" in refusal.reason
    assert norms(gm) == 1


def test_linear_whose_channels_are_not_the_normalised_dimension() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    gm, result = fold(model, torch.randn(2, 6, 6))
    assert norms(gm) == 1
    assert "dimension 1" in result.refusals[0].reason


def test_linear_without_shapes_says_what_is_taken_for_granted() -> None:
    model = lively(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    with pytest.warns(CaptureWarning, match=r"'_1' is folded into '_0' as if .*\(N, F\)"):
        gm = fuse_fx(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        near(gm(x), model(x))
    assert norms(fuse_fx(model, example_inputs=(x,))) == 0
    assert norms(fuse_fx(model, example_inputs=(torch.randn(2, 6, 6),))) == 1


def test_shared_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 4, 1)
            self.two = nn.Conv2d(4, 4, 1)
            self.two.weight = self.one.weight
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.bn(self.one(x)))

    gm, result = fold(Tied(), IMAGES)
    assert norms(gm) == 1
    assert "shares its memory with 'two.weight'" in result.refusals[0].reason


def test_hook() -> None:
    model = Plain()
    model.conv.register_forward_hook(lambda module, inputs, output: output * 2)
    gm, result = fold(model, IMAGES)
    assert norms(gm) == 1
    assert "forward hook" in result.refusals[0].reason


def test_function_that_always_trains_stays() -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 1)
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, training=True)

    gm = captured(Trains().eval(), IMAGES)
    (refusal,) = run_alone(FoldBatchNorm(), gm).refusals
    assert "training=True" in refusal.reason
    near(gm(IMAGES), Trains.forward(gm, IMAGES))  # the graph's own parameters


# -- training mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Plain, lambda: Functional(True, False, bias=True)])
def test_training_mode_is_an_error_where_it_would_fold(model: Callable[[], nn.Module]) -> None:
    gm = captured(model().train(), IMAGES)
    with pytest.raises(
        TrainingModeError, match=r"^Fusion only for eval! '.*model\.eval\(\)|training=True"
    ):
        run_alone(FoldBatchNorm(), gm)
    with pytest.raises(AssertionError, match="Fusion only for eval!") as caught:
        fuse_fx(model().train())
    assert isinstance(caught.value, FxQuantError)


def test_training_mode_is_none_where_nothing_would_fold() -> None:
    gm = captured(AlsoRead().train(), IMAGES)
    result = run_alone(FoldBatchNorm(), gm)
    assert "also used by" in result.refusals[0].reason
    assert gm.training
