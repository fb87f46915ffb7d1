"""Which batch-norms fold, which must not, and what goes wrong where a guard is taken away."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.patterns.library import FOLD_PATTERNS, QAT_PATTERNS
from fxquant.patterns.match import Match
from fxquant.patterns.matcher import match_all
from fxquant.patterns.pattern import Pattern

Trace = Callable[..., fx.GraphModule]
Fold = Callable[[Iterable[Match]], None]

ROUNDING = 1e-11
"""Folding reassociates in float64: about 30 products per output with relative error 2**-53 each,
on magnitudes below 1e3, so below 4e-12. A wrong fold is off by a batch-norm's scale or shift, which
:func:`randomize` keeps away from those that would go unnoticed: above 1e-2."""


def randomize(model: nn.Module) -> nn.Module:
    """Float64, evaluation mode, statistics and affine parameters far from the identity."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    value = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                    tensor.data.copy_(value + 0.5)
    return model


class Chain(nn.Module):
    """``bn(op(x))`` of two modules."""

    def __init__(self, op: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.op = op
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.op(x))
        return out


MODULES: dict[str, tuple[str, nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": ("conv1d-bn", nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": ("conv2d-bn", nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": ("conv3d-bn", nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "no bias": ("conv2d-bn", nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "groups": ("conv2d-bn", nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "no affine": ("conv2d-bn", nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "reflect": (
        "conv2d-bn",
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        (2, 4, 9, 9),
    ),
    "conv_transpose1d": (
        "conv_transpose1d-bn",
        nn.ConvTranspose1d(4, 6, 3),
        nn.BatchNorm1d(6),
        (2, 4, 9),
    ),
    "conv_transpose2d": (
        "conv_transpose2d-bn",
        nn.ConvTranspose2d(4, 6, 3),
        nn.BatchNorm2d(6),
        (2, 4, 9, 9),
    ),
    "conv_transpose2d groups": (
        "conv_transpose2d-bn",
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        (2, 4, 9, 9),
    ),
    "conv_transpose3d": (
        "conv_transpose3d-bn",
        nn.ConvTranspose3d(4, 6, 3),
        nn.BatchNorm3d(6),
        (2, 4, 5, 5, 5),
    ),
    "linear": ("linear-bn", nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
}


@pytest.mark.parametrize("example", [True, False], ids=["shapes known", "shapes unknown"])
@pytest.mark.parametrize(("name", "op", "bn", "shape"), MODULES.values(), ids=MODULES.keys())
def test_modules_fold(
    trace: Trace,
    fold: Fold,
    name: str,
    op: nn.Module,
    bn: nn.Module,
    shape: tuple[int, ...],
    example: bool,
) -> None:
    model = randomize(Chain(copy.deepcopy(op), copy.deepcopy(bn)))
    x = torch.randn(shape, dtype=torch.float64)
    gm = trace(copy.deepcopy(model), *([x] if example else []))
    report = match_all(gm, FOLD_PATTERNS)
    assert [str(match) for match in report.matches] == [f"{name}(op, bn)"]
    assert report.refusals == ()
    fold(report.matches)
    assert torch.allclose(gm(x), model(x), rtol=0, atol=ROUNDING)


class Functional(nn.Module):
    """Functions on attributes; ``mixed`` calls the module for one of the two."""

    def __init__(self, mixed: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.conv, self.bn
        y = conv(x) if self.mixed == "conv" else F.conv2d(x, conv.weight, conv.bias)
        if self.mixed == "bn":
            out: Tensor = bn(y)
            return out
        return F.batch_norm(
            y, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=self.training
        )


@pytest.mark.parametrize(
    ("mixed", "match"),
    [
        ("", "conv2d-bn(conv2d, batch_norm)"),
        ("conv", "conv2d-bn(conv, batch_norm)"),
        ("bn", "conv2d-bn(conv2d, bn)"),
    ],
)
def test_functions_and_mixed_forms_fold(trace: Trace, mixed: str, match: str) -> None:
    report = match_all(trace(Functional(mixed), torch.ones(1, 3, 2, 2)), FOLD_PATTERNS)
    assert [str(found) for found in report.matches] == [match]


# -- the five graphs of the table of today's tools ------------------------------------------------


class Five(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)


class Plain(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv(x))
        return out


class AlsoAdded(Five):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn1(y) + y
        return out


class TwoNorms(Five):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn1(y) + self.bn2(y)
        return out


class CalledTwice(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv(x)) + self.bn2(self.conv(x + 1))
        return out


class OnceBare(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv(x)) + self.conv(x + 1)
        return out


FIVE: dict[type[Five], dict[str, tuple[str, str, tuple[str, ...]]]] = {
    AlsoAdded: {
        "conv": (
            "single_user",
            "the output of 'conv' is also used by 'add', "
            "so folding 'bn1' into its weight would change 'add'",
            ("add",),
        )
    },
    TwoNorms: {
        "conv": (
            "single_user",
            "the output of 'conv' is also used by 'bn2', "
            "so folding 'bn1' into its weight would change 'bn2'",
            ("bn2",),
        )
    },
    CalledTwice: {
        "conv": (
            "sole_owner_of_parameter",
            "module 'conv' is called by 'conv' and also by 'conv_1', so rewriting it for conv2d-bn "
            "would change 'conv_1'; give each call a module of its own",
            ("conv_1",),
        ),
        "conv_1": (
            "sole_owner_of_parameter",
            "module 'conv' is called by 'conv_1' and also by 'conv', so rewriting it for conv2d-bn "
            "would change 'conv'; give each call a module of its own",
            ("conv",),
        ),
    },
    OnceBare: {
        "conv": (
            "sole_owner_of_parameter",
            "module 'conv' is called by 'conv' and also by 'conv_1', so rewriting it for conv2d-bn "
            "would change 'conv_1'; give each call a module of its own",
            ("conv_1",),
        ),
        "conv_1": (
            "",
            "the output of 'conv_1' goes to 'add_1'; what may follow is batch_norm",
            ("add_1",),
        ),
    },
}


def test_the_plain_graph_folds(trace: Trace, fold: Fold) -> None:
    model, x = randomize(Plain()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gm = trace(copy.deepcopy(model), x)
    report = match_all(gm, FOLD_PATTERNS)
    assert [str(match) for match in report.matches] == ["conv2d-bn(conv, bn1)"]
    fold(report.matches)
    assert torch.allclose(gm(x), model(x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("graph", FIVE, ids=lambda graph: graph.__name__)
def test_the_traps_are_refused_with_their_reason(trace: Trace, graph: type[Five]) -> None:
    report = match_all(trace(graph(), torch.ones(2, 3, 4, 4)), FOLD_PATTERNS)
    assert report.matches == ()
    found = {miss.anchor: (miss.guard, miss.reason, miss.culprits) for miss in report.refusals}
    assert found == FIVE[graph]


@pytest.mark.parametrize("graph", FIVE, ids=lambda graph: graph.__name__)
def test_without_the_guard_the_fold_is_wrong(trace: Trace, fold: Fold, graph: type[Five]) -> None:
    """The traps are real, and it is the guard named in the refusal that averts them."""
    needed = FIVE[graph]["conv"][0]
    careless = [without(pattern, needed) for pattern in FOLD_PATTERNS]
    model, x = randomize(graph()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gm = trace(copy.deepcopy(model), x)
    matches = match_all(gm, careless).matches
    assert matches
    fold(matches)
    assert (gm(x) - model(x)).abs().max() > 1e-2


def without(pattern: Pattern, *names: str) -> Pattern:
    kept = tuple(check for check in pattern.guards if check.name not in names)
    assert len(kept) == len(pattern.guards) - len(names)
    return dataclasses.replace(pattern, guards=kept)


# -- what else must be refused --------------------------------------------------------------------


class Tied(Five):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Conv2d(3, 3, 1)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv(x)) + self.tied(x)
        return out


class Aliased(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.tied.weight = nn.Parameter(self.conv.weight.data)


class ReadAsAttribute(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv(x)) + self.conv.weight.sum()
        return out


class SharedFunctionalWeight(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(F.conv2d(x, self.conv.weight)) + F.conv2d(x, self.conv.weight)
        return out


class ComputedWeight(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(F.conv2d(x, self.conv.weight * 2, self.conv.bias))
        return out


class ComputedStatistics(Five):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        return F.batch_norm(self.conv(x), mean, self.bn1.running_var)


class InputAsWeight(Five):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self.bn1(F.conv2d(x, weight))
        return out


class TrainingFunction(Five):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.batch_norm(y, self.bn1.running_mean, self.bn1.running_var, training=True)


class NoStatistics(Five):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3, track_running_stats=False)

    forward = Plain.forward


class ForgottenTraining(Plain):
    def train(self, mode: bool = True) -> ForgottenTraining:
        super().train(mode)
        self.bn1.training = True
        return self


class OtherChannels(Five):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight[:, :, 0, 0].view(3, 3, 1, 1))
        out: Tensor = self.bn1(y)
        return out


class LinearOverSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.linear(x))
        return out


class Returned(Five):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn1(y), y


class InPlaceBetween(Five):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.conv(x)
        x.relu_()
        out: Tensor = self.bn1(y) + x
        return out


class WrongWidth(Five):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)

    forward = Plain.forward


class HalfStatistics(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bn1.double()


def hook(module: nn.Module, inputs: Any, output: Any) -> None:
    return None


class Hooked(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(hook)


class SpectralNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_pre_hook(lambda module, inputs: None)


class ReluBetween(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(torch.relu(self.conv(x)))
        return out


class BareAtEnd(Five):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class NotTheInput(Five):
    """The convolution feeds the batch-norm's bias, not its input."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.bn1.running_mean, self.bn1.running_var
        return F.batch_norm(x, mean, var, None, self.conv(x))


REFUSED: list[tuple[type[nn.Module], str, str, tuple[str, ...]]] = [
    (
        Tied,
        "sole_owner_of_parameter",
        "the weight of 'conv', 'conv.weight', shares its memory with 'tied.weight', which 'tied' "
        "uses, so rewriting it for conv2d-bn would change 'tied'; untie the two",
        ("tied",),
    ),
    (
        Aliased,
        "sole_owner_of_parameter",
        "the weight of 'conv', 'conv.weight', shares its memory with 'tied.weight', which 'tied' "
        "uses, so rewriting it for conv2d-bn would change 'tied'; untie the two",
        ("tied",),
    ),
    (
        ReadAsAttribute,
        "sole_owner_of_parameter",
        "the weight of 'conv', 'conv.weight', is also used by 'sum_1', so rewriting it for "
        "conv2d-bn would change 'sum_1'; give each use a parameter of its own",
        ("sum_1",),
    ),
    (
        SharedFunctionalWeight,
        "sole_owner_of_parameter",
        "the weight of 'conv2d', 'conv.weight', is also used by 'conv2d_1', so rewriting it for "
        "conv2d-bn would change 'conv2d_1'; give each use a parameter of its own",
        ("conv2d_1",),
    ),
    (
        ComputedWeight,
        "constant_weight",
        "the weight of 'conv2d' is computed in the graph by 'mul', it is no parameter whose value "
        "is known beforehand",
        ("mul",),
    ),
    (
        InputAsWeight,
        "constant_weight",
        "the weight of 'conv2d' is computed in the graph by 'weight', it is no parameter whose "
        "value is known beforehand",
        ("weight",),
    ),
    (
        ComputedStatistics,
        "constant_weight",
        "the running_mean of 'batch_norm' is computed in the graph by 'mean', it is no parameter "
        "whose value is known beforehand",
        ("mean",),
    ),
    (
        TrainingFunction,
        "evaluation_mode",
        "'batch_norm' is in training mode and normalises with the statistics of each batch; it is "
        "called with training=True",
        ("batch_norm",),
    ),
    (
        ForgottenTraining,
        "evaluation_mode",
        "'bn1' is in training mode and normalises with the statistics of each batch; call "
        "model.eval() first",
        ("bn1",),
    ),
    (
        NoStatistics,
        "has_running_statistics",
        "'bn1' has no running_mean (track_running_stats=False), so it normalises with the "
        "statistics of each batch even in evaluation mode",
        ("bn1",),
    ),
    (
        OtherChannels,
        "constant_weight",
        "the weight of 'conv2d' is computed in the graph by 'view', it is no parameter whose value "
        "is known beforehand",
        ("view",),
    ),
    (
        Returned,
        "single_user",
        "the output of 'conv' is also used by 'output', so folding 'bn1' into its weight would "
        "change 'output'",
        ("output",),
    ),
    (
        InPlaceBetween,
        "no_mutation_between",
        "'relu_' writes in place, between 'conv' and 'bn1', what may be the memory of 'add'",
        ("relu_",),
    ),
    (
        WrongWidth,
        "channel_match",
        "'bn1' has 4 features and 'conv' has 3 output channels",
        ("bn1",),
    ),
    (
        HalfStatistics,
        "same_dtype",
        "'conv.weight' is torch.float32 and 'bn1.running_mean' is torch.float64; one chain takes "
        "one dtype",
        ("bn1",),
    ),
    (
        Hooked,
        "no_hooks",
        "module 'conv' has the forward hook(s) 'hook', which would no longer run; remove them "
        "before, or keep the module out of quantization",
        ("conv",),
    ),
    (
        SpectralNorm,
        "no_hooks",
        "module 'conv' has the forward hook(s) '<lambda>', which would no longer run; remove them "
        "before, or keep the module out of quantization",
        ("conv",),
    ),
    (
        ReluBetween,
        "",
        "the output of 'conv' goes to 'relu'; what may follow is batch_norm",
        ("relu",),
    ),
    (
        BareAtEnd,
        "",
        "the output of 'conv' goes to 'output'; what may follow is batch_norm",
        ("output",),
    ),
    (
        NotTheInput,
        "",
        "'batch_norm' takes its inputs as something other than activations, or has arguments that "
        "fxquant does not know",
        ("batch_norm",),
    ),
]


@pytest.mark.parametrize(
    ("model", "guard", "reason", "culprits"), REFUSED, ids=[row[0].__name__ for row in REFUSED]
)
def test_refused(
    trace: Trace, model: type[nn.Module], guard: str, reason: str, culprits: tuple[str, ...]
) -> None:
    report = match_all(trace(model()), FOLD_PATTERNS)
    assert report.matches == ()
    refusal = report.refusals[0]
    assert (refusal.guard, refusal.reason, refusal.culprits) == (guard, reason, culprits)


def test_a_batch_norm_over_a_sequence_is_refused_where_shapes_are_known(
    trace: Trace, fold: Fold
) -> None:
    """``BatchNorm1d`` on ``(N, L, F)`` normalises L; with L = F no width gives it away."""
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    model = randomize(LinearOverSequence())
    gm = trace(copy.deepcopy(model), x)
    (refusal,) = match_all(gm, FOLD_PATTERNS).refusals
    assert refusal.guard == "channel_match"
    assert refusal.reason == (
        "the output of 'linear' has the shape (2, 4, 4), whose dimension 1, which 'bn' normalises, "
        "is not that of the output channels"
    )
    fold(match_all(gm, [without(pattern, "channel_match") for pattern in FOLD_PATTERNS]).matches)
    assert (gm(x) - model(x)).abs().max() > 1e-2, "the trap is real"


def test_an_unbatched_convolution_is_refused_where_shapes_are_known(trace: Trace) -> None:
    model = Chain(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))
    (refusal,) = match_all(trace(model, torch.ones(3, 3)), FOLD_PATTERNS).refusals
    assert refusal.guard == "channel_match"


def test_a_norm_shared_by_two_convolutions_folds_into_both(trace: Trace, fold: Fold) -> None:
    """Folding only reads the batch-norm."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)
            self.b = nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.bn(self.a(x)) + self.bn(self.b(x))
            return out

    model, x = randomize(Shared()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gm = trace(copy.deepcopy(model), x)
    matches = match_all(gm, FOLD_PATTERNS).matches
    assert [str(match) for match in matches] == ["conv2d-bn(a, bn)", "conv2d-bn(b, bn_1)"]
    fold(matches)
    assert torch.allclose(gm(x), model(x), rtol=0, atol=ROUNDING)
    refused = match_all(trace(Shared(), training=True), QAT_PATTERNS)
    assert refused.matches == ()
    assert [miss.guard for miss in refused.refusals] == ["sole_owner_of_parameter"] * 2
    assert "the running_mean" not in refused.refusals[0].reason
    assert "module 'bn' is called by 'bn' and also by 'bn_1'" in refused.refusals[0].reason


# -- while training -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_qat_patterns_match_in_both_modes(trace: Trace, training: bool) -> None:
    gm = trace(Plain(), torch.ones(2, 3, 4, 4), training=training)
    assert [str(m) for m in match_all(gm, QAT_PATTERNS).matches] == ["conv2d-bn(conv, bn1)"]


def test_qat_patterns_want_one_mode_for_both(trace: Trace) -> None:
    gm = trace(Plain(), training=True)
    gm.get_submodule("bn1").eval()
    (refusal,) = match_all(gm, QAT_PATTERNS).refusals
    assert refusal.guard == "same_training_mode"
    assert refusal.reason == ("'conv' is in training mode and 'bn1' is not; set one mode for both")
    assert refusal.culprits == ("conv",)


def test_whether_it_trains_must_be_a_constant() -> None:
    graph = fx.Graph()
    x, flag = graph.placeholder("x"), graph.placeholder("flag")
    conv = graph.call_module("conv", (x,))
    stats = [graph.get_attr(f"bn1.{name}") for name in ("running_mean", "running_var")]
    graph.output(graph.call_function(F.batch_norm, (conv, *stats), {"training": flag}))
    (refusal,) = match_all(fx.GraphModule(Five(), graph), FOLD_PATTERNS).refusals
    assert refusal.guard == "evaluation_mode"
    assert refusal.reason == (
        "whether 'batch_norm' trains is computed in the graph by 'flag'; pass a constant"
    )


def test_the_mode_is_refused_only_where_all_else_would_fold(trace: Trace) -> None:
    """So that a pass may raise for it: ``model.eval()`` is all that is missing."""
    assert all(pattern.guards[-1].name == "evaluation_mode" for pattern in FOLD_PATTERNS)
    guards = {
        model.__name__: match_all(trace(model(), training=True), FOLD_PATTERNS).refusals[0].guard
        for model in (Plain, AlsoAdded, CalledTwice, NoStatistics)
    }
    assert guards == {
        "Plain": "evaluation_mode",
        "AlsoAdded": "single_user",
        "CalledTwice": "sole_owner_of_parameter",
        "NoStatistics": "has_running_statistics",
    }
