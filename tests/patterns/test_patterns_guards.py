"""Guards on their own, as users' patterns combine them, where the library's order hides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.patterns import guards
from fxquant.patterns.guards import (
    channel_match,
    has_running_statistics,
    no_hooks,
    no_mutation_between,
    not_scalar_operand,
    same_dtype,
    same_shape,
    same_training_mode,
    single_user,
    sole_owner_of_parameter,
)
from fxquant.patterns.match import Refusal
from fxquant.patterns.matcher import match_all
from fxquant.patterns.pattern import Guard, Pattern, Step, chain, step

Trace = Callable[..., fx.GraphModule]


def refusal_of(gm: fx.GraphModule, check: Guard, *steps: Step) -> Refusal | None:
    """The refusal by one guard alone, or ``None`` where it lets the only candidate pass."""
    report = match_all(gm, [Pattern("own", chain(*steps), (check,), "a test")])
    assert len(report.matches) + len(report.refusals) == 1
    if report.matches:
        return None
    (refusal,) = report.refusals
    assert refusal.guard == check.name
    return refusal


class Function(nn.Module):
    def __init__(self, run: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


RELU_TANH = (step("relu", "relu"), step("tanh", "tanh"))


def test_every_guard_that_the_brief_of_patterns_names_exists() -> None:
    names = {value.name for value in vars(guards).values() if isinstance(value, Guard)}
    assert names == {
        "single_user",
        "no_mutation_between",
        "constant_weight",
        "no_hooks",
        "evaluation_mode",
        "same_training_mode",
        "has_running_statistics",
        "same_shape",
        "not_scalar_operand",
        "unit_alpha",
        "constant_bounds",
        "same_dtype",
    }
    assert sole_owner_of_parameter("conv").name == "sole_owner_of_parameter"
    assert channel_match("conv", "bn").name == "channel_match"


def test_single_user_does_not_care_about_the_last(trace: Trace) -> None:
    gm = trace(Function(lambda m, x: (y := torch.tanh(torch.relu(x))) + y * y))
    assert refusal_of(gm, single_user, *RELU_TANH) is None


def test_single_user_counts_reads_of_the_shape(trace: Trace) -> None:
    gm = trace(Function(lambda m, x: torch.tanh(y := torch.relu(x)).view(y.size(0), -1)))
    refusal = refusal_of(gm, single_user, *RELU_TANH)
    assert refusal is not None
    assert refusal.culprits == ("size",)


@pytest.mark.parametrize(
    ("run", "culprits"),
    [
        (lambda m, x: (y := torch.relu(x), y.neg_(), torch.tanh(y))[2], ("neg_",)),
        (lambda m, x: (y := torch.relu(x), y.view(-1).neg_(), torch.tanh(y))[2], ("neg_",)),
        (lambda m, x: (y := x + 1, r := torch.relu(y), y.neg_(), torch.tanh(r))[3], ("neg_",)),
        (lambda m, x: torch.tanh(x.relu_()), ("relu_", "x")),
        (lambda m, x: torch.tanh((y := x + 1).relu_()) + y, ("relu_", "add_1")),
        (lambda m, x: ((y := x + 1), (v := y.view(-1)), torch.tanh(y.relu_()) + v)[2],
         ("relu_", "add_1")),
    ],
    ids=["interior", "view of interior", "input", "model input", "read later",
         "view read later"],
)  # fmt: skip
def test_mutation_is_seen(trace: Trace, run: Callable[..., Any], culprits: tuple[str, ...]) -> None:
    refusal = refusal_of(trace(Function(run)), no_mutation_between, *RELU_TANH)
    assert refusal is not None
    assert refusal.culprits == culprits


def test_mutation_of_an_attribute_is_seen() -> None:
    graph = fx.Graph()
    table = graph.get_attr("table")
    graph.output(graph.call_function(torch.tanh, (graph.call_method("relu_", (table,)),)))
    root = nn.Module()
    root.register_buffer("table", torch.ones(2))
    refusal = refusal_of(fx.GraphModule(root, graph), no_mutation_between, *RELU_TANH)
    assert refusal is not None
    assert refusal.reason == (
        "'relu_' writes 'table' in place, which may be the attribute 'table'; use the form that is "
        "not in place"
    )


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: torch.tanh(torch.relu(x)),
        lambda m, x: torch.tanh_(torch.relu(x)),
        lambda m, x: torch.tanh((x + 1).relu_()),
        lambda m, x: (y := x + 1, y.neg_(), torch.tanh(torch.relu(y)))[2],
        lambda m, x: (y := x + 1, r := torch.relu(y), t := torch.tanh(r), y.neg_(), t)[4],
        lambda m, x: (y := x + 1, r := torch.relu(y), x.neg_(), torch.tanh(r))[3],
        lambda m, x: torch.tanh((x + 1).relu_()).neg_().view(-1),
        lambda m, x: ((y := x + 1), (z := y * 2), torch.tanh(y.relu_()) + z)[2],
    ],
    ids=["none", "last writes interior", "fresh input", "before", "after", "other memory",
         "result written", "read before"],
)  # fmt: skip
def test_harmless_mutation_passes(trace: Trace, run: Callable[..., Any]) -> None:
    assert refusal_of(trace(Function(run)), no_mutation_between, *RELU_TANH) is None


ADD = (step("relu", "relu"), step("add", "add", other="other"))


@pytest.mark.parametrize("other", [1, 2.0])
def test_same_shape_refuses_numbers_by_itself(trace: Trace, other: float) -> None:
    gm = trace(Function(lambda m, x: torch.relu(x) + other), torch.ones(2, 3))
    refusal = refusal_of(gm, same_shape, *ADD)
    assert refusal is not None
    assert f"'relu' has the shape (2, 3) and '{other}' ()" in refusal.reason


def test_same_shape_blames_the_unknown_side(trace: Trace) -> None:
    gm = trace(Function(lambda m, x: torch.relu(x) + x.neg()), torch.ones(2, 3))
    nodes = {node.name: node for node in gm.graph.nodes}
    assert refusal_of(gm, same_shape, *ADD) is None
    nodes["neg"].meta.clear()
    refusal = refusal_of(gm, same_shape, *ADD)
    assert refusal is not None
    assert refusal.culprits == ("neg",)


def test_operands_of_unknown_kind_pass_without_records(trace: Trace) -> None:
    model = Function(lambda m, x: torch.relu(x) + x.size(0))
    assert refusal_of(trace(model), not_scalar_operand, *ADD) is None
    refusal = refusal_of(trace(model, torch.ones(2, 3)), not_scalar_operand, *ADD)
    assert refusal is not None
    assert refusal.culprits == ("size",)


def test_same_dtype_passes_one_dtype_whichever(trace: Trace) -> None:
    model = Function(lambda m, x: torch.tanh(x) + x)
    steps = (step("tanh", "tanh"), step("add", "add", other="other"))
    assert refusal_of(trace(model, torch.ones(2, dtype=torch.bfloat16)), same_dtype, *steps) is None
    refusal = refusal_of(trace(model, torch.ones(2, dtype=torch.complex64)), same_dtype, *steps)
    assert refusal is not None
    assert refusal.reason == (
        "'x' is torch.complex64; only tensors of floating point are quantized"
    )


def test_hooks_of_every_module_of_the_chain_count(trace: Trace) -> None:
    class Named:
        def __call__(self, module: nn.Module, inputs: Any) -> None:
            return None

    gm = trace(Function(lambda m, x: m.tanh(m.relu(x)), relu=nn.ReLU(), tanh=nn.Tanh()))
    assert refusal_of(gm, no_hooks, *RELU_TANH) is None
    gm.get_submodule("tanh").register_forward_pre_hook(Named())
    refusal = refusal_of(gm, no_hooks, *RELU_TANH)
    assert refusal is not None
    assert refusal.reason.startswith("module 'tanh' has the forward hook(s) 'Named', which")


def test_functions_have_no_training_mode(trace: Trace) -> None:
    gm = trace(Function(lambda m, x: torch.tanh(m.relu(x)), relu=nn.ReLU()), training=True)
    assert refusal_of(gm, same_training_mode, *RELU_TANH) is None


def test_a_norm_that_lost_its_variance_is_refused(trace: Trace) -> None:
    gm = trace(Function(lambda m, x: F.relu(m.bn(x)), bn=nn.BatchNorm1d(2)))
    bn = gm.get_submodule("bn")
    assert isinstance(bn, nn.BatchNorm1d)
    bn.running_var = None
    refusal = refusal_of(gm, has_running_statistics, step("bn", "batch_norm"), step("relu", "relu"))
    assert refusal is not None
    assert refusal.reason.startswith("'bn' has no running_var")


def test_channel_match_by_itself_needs_tensors(trace: Trace) -> None:
    run: Callable[..., Any] = lambda m, x: m.bn(F.conv1d(x, x * 2))  # noqa: E731
    refusal = refusal_of(
        trace(Function(run, bn=nn.BatchNorm1d(2))),
        channel_match("conv", "bn"),
        step("conv", "conv1d"),
        step("bn", "batch_norm"),
    )
    assert refusal is not None
    assert refusal.reason == (
        "the weight of 'conv1d' or the running mean of 'bn' is no tensor of the model"
    )
    assert refusal.culprits == ("conv1d", "bn")


@pytest.mark.parametrize(("features", "passes"), [(6, True), (3, False)])
def test_channel_match_counts_groups_of_transposed_convolutions(
    trace: Trace, features: int, passes: bool
) -> None:
    run: Callable[..., Any] = lambda m, x: m.bn(m.conv(x))  # noqa: E731
    model = Function(run, conv=nn.ConvTranspose2d(4, 6, 1, groups=2), bn=nn.BatchNorm2d(features))
    refusal = refusal_of(
        trace(model),
        channel_match("conv", "bn"),
        step("conv", "conv_transpose2d"),
        step("bn", "batch_norm"),
    )
    assert (refusal is None) is passes
