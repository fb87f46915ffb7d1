"""Patterns are validated when they are built, and users build them like the library does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from fxquant.errors import ConfigError
from fxquant.op_catalog import KIND_BY_NAME
from fxquant.patterns.guards import single_user
from fxquant.patterns.library import FOLD_PATTERNS, FUSION_PATTERNS, QAT_PATTERNS, pattern_named
from fxquant.patterns.match import Match, Reason
from fxquant.patterns.pattern import Guard, Pattern, Step, chain, guard, step

LIBRARY = (*FOLD_PATTERNS, *FUSION_PATTERNS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: step("conv", "conv2dd"), "unknown kind 'conv2dd'; did you mean 'conv2d'"),
        (lambda: step("conv"), "needs a frozenset of kinds"),
        (lambda: Step("conv", {"conv2d"}), "needs a frozenset of kinds"),  # type: ignore[arg-type]
        (lambda: step("1conv", "conv2d"), "'1conv' cannot be a binding"),
        (lambda: step("_conv", "conv2d"), "'_conv' cannot be a binding"),
        (lambda: step("nodes", "conv2d"), "'nodes' cannot be a binding"),
        (lambda: step("add", "add", other="last"), "'last' cannot be a binding"),
        (lambda: step("relu", "relu", other="y"), "'relu' is no binary op"),
        (lambda: Pattern("Conv BN", chain(step("conv", "conv2d"))), "no pattern name"),
        (lambda: Pattern("conv-", chain(step("conv", "conv2d"))), "no pattern name"),
        (lambda: Pattern("empty", ()), "'empty' has no steps"),
        (lambda: Pattern("a", [step("a", "relu")]), "are a tuple"),  # type: ignore[arg-type]
        (lambda: Pattern("a", ("relu",)), "hold 'relu'; make one with step"),  # type: ignore[arg-type]
        (
            lambda: Pattern("a", chain(step("a", "relu")), (print,)),  # type: ignore[arg-type]
            "make one of a function with @guard",
        ),
        (
            lambda: Pattern("a", chain(step("add", "add", other="y"))),
            "no operand of it comes from a step before",
        ),
        (
            lambda: Pattern("a", chain(step("x", "relu"), step("x", "relu"))),
            "binds 'x' twice",
        ),
        (
            lambda: Pattern("a", chain(step("x", "relu"), step("add", "add", other="x"))),
            "binds 'x' twice",
        ),
        (lambda: Guard("", single_user.check), "a guard needs a name"),
        (lambda: Guard("g", None), "needs a function"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_pattern_is_refused_when_built(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_patterns_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern_named("conv2d-bn").name = "other"  # type: ignore[misc]


def test_a_guard_of_a_function_has_its_name() -> None:
    @guard
    def only_on_tuesdays(match: Match) -> Reason | None:
        return None

    assert only_on_tuesdays.name == "only_on_tuesdays"


def test_names_are_unique() -> None:
    names = [pattern.name for pattern in LIBRARY]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("pattern", [*LIBRARY, *QAT_PATTERNS], ids=lambda pattern: pattern.name)
def test_every_built_in_pattern_is_complete(pattern: Pattern) -> None:
    assert len(pattern.source) > 20, "the source is a paper and section, or a page"
    assert single_user in pattern.guards
    assert len({check.name for check in pattern.guards}) == len(pattern.guards)
    first = pattern.name.split("-")[0]
    assert pattern.steps[0].kinds == {"batch_norm" if first == "bn" else first}
    last = pattern.name.split("-")[-1]
    assert ("batch_norm" if last == "bn" else last) in pattern.steps[-1].kinds


def test_the_library_covers_what_it_promises() -> None:
    convs = [f"conv{d}d" for d in (1, 2, 3)] + [f"conv_transpose{d}d" for d in (1, 2, 3)]
    clamps = ["relu", "relu6", "hardtanh", "clamp"]
    acts = [*clamps, "leaky_relu", "hardswish", "silu", "gelu", "sigmoid", "tanh"]
    folds = {f"{kind}-bn" for kind in (*convs, "linear")}
    assert {pattern.name for pattern in FOLD_PATTERNS} == folds
    assert {pattern.name for pattern in QAT_PATTERNS} == folds
    assert {pattern.name for pattern in FUSION_PATTERNS} == {
        *(f"{kind}-{act}" for kind in (*convs, "linear") for act in acts),
        *(f"{kind}-{act}" for kind in ("bn", "add", "mul", "matmul", "bmm") for act in clamps),
        "conv2d-add",
        *(f"conv2d-add-{act}" for act in clamps),
        "cat-relu",
    }


def test_every_element_wise_activation_of_the_catalogue_is_decided_on() -> None:
    """A kind added to the catalogue must be put into the patterns or into this list."""
    left_out = {"elu", "hardsigmoid", "mish", "softmax", "prelu"}
    left_out |= {"celu", "selu", "softplus", "logsigmoid", "log_softmax"}
    catalogue = list(KIND_BY_NAME)
    functions = set(catalogue[catalogue.index("relu") : catalogue.index("prelu") + 1])
    taken = {k for p in FUSION_PATTERNS for k in p.steps[-1].kinds if p.steps[0].bind == "linear"}
    assert taken == functions - left_out


def test_pattern_named() -> None:
    assert pattern_named("conv2d-bn") in FOLD_PATTERNS
    assert pattern_named("conv2d-add-relu") in FUSION_PATTERNS
    with pytest.raises(ConfigError, match="no pattern 'conv2d-rellu'; did you mean 'conv2d-relu'"):
        pattern_named("conv2d-rellu")
