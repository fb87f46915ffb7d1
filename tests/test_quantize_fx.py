"""quantize_fx: the public steps end to end, and that none of them touches what it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxquant.errors import ConfigWarning
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import record_of
from fxquant.observers import MinMaxObserver, PerChannelMinMaxObserver
from fxquant.pass_manager import fingerprint, run_pass
from fxquant.pipelines import fuse_pipeline, prepare_pipeline
from fxquant.qconfig import QConfig, get_default_qconfig
from fxquant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping, normalize
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx
from tests.passes.helpers import captured, context, lively, observers

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def small() -> Small:
    return lively(Small())


def state(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# -- the steps ------------------------------------------------------------------------------------


def test_stages() -> None:
    model = small()
    assert fuse_fx(model).state.stage is Stage.FUSED
    prepared = prepare_fx(model, None, (IMAGES,))
    assert prepared.state.stage is Stage.PREPARED
    assert prepared.state.target == "x86"
    prepared(IMAGES)
    assert convert_to_reference_fx(prepared).state.stage is Stage.REFERENCE
    assert convert_fx(prepared).state.stage is Stage.LOWERED
    assert isinstance(prepared, fx.GraphModule)
    assert type(prepared).__name__ != "GraphModule"


def test_target_reference_is_not_lowered() -> None:
    prepared = prepare_fx(small(), None, (IMAGES,), target="reference")
    prepared(IMAGES)
    converted = convert_fx(prepared)
    assert converted.state.stage is Stage.REFERENCE
    assert torch.equal(converted(IMAGES), convert_to_reference_fx(prepared)(IMAGES))


def test_no_step_touches_what_it_is_given() -> None:
    model = small()
    before = state(model)
    prepared = prepare_fx(model, None, (IMAGES,))
    assert same(before, state(model))
    prepared(IMAGES)
    seen, nodes = state(prepared), fingerprint(prepared)
    first = convert_fx(prepared)
    assert same(seen, state(prepared))
    assert fingerprint(prepared) == nodes
    prepared(IMAGES * 3)  # calibrated further, and converted again
    second = convert_fx(prepared)
    assert not torch.equal(first(IMAGES * 3), second(IMAGES * 3))
    assert same(before, state(model))


def test_the_results_follow_their_float_model() -> None:
    model = small()
    prepared = prepare_fx(model, None, (IMAGES,))
    wanted = model(IMAGES)
    torch.testing.assert_close(prepared(IMAGES), wanted, rtol=1e-5, atol=1e-5)
    for convert in (convert_fx, convert_to_reference_fx):
        error = (convert(prepared)(IMAGES) - wanted).norm() / wanted.norm()
        assert error < 0.1  # 20 dB, and a wrong scale or zero point gives 0 dB
        assert error > 0


def test_the_result_owns_its_tensors() -> None:
    model = small()
    prepared = prepare_fx(model, None, (IMAGES,))
    before = prepared(IMAGES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(prepared(IMAGES), before)


def test_example_inputs_are_not_written() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return x.relu_()

    x = torch.ones(2)
    prepare_fx(Writes(), None, (x,))
    assert x.tolist() == [1.0, 1.0]


MAPPINGS: dict[str, Any] = {
    "none": None,
    "mapping": QConfigMapping().set_global(A),
    "flat dict": {"": A},
    "legacy dict": {"object_type": [(nn.Linear, A), (nn.Conv2d, A)]},
    "qconfig": A,
    "default": get_default_qconfig_mapping("x86"),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_ways_to_say_which_qconfig(name: str) -> None:
    prepared = prepare_fx(small(), MAPPINGS[name], (IMAGES,))
    assert list(observers(prepared).values()) == ["x", "mean"]


def test_an_empty_mapping_quantizes_nothing() -> None:
    model = small()
    prepared = prepare_fx(model, {}, (IMAGES,))
    assert not observers(prepared)
    assert convert_fx(prepared)(IMAGES).shape == (2, 2)


EXAMPLES: dict[str, Any] = {
    "tuple": (IMAGES,),
    "list": [IMAGES],
    "bare": IMAGES,
    "dict": {"x": IMAGES},
    "none": None,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_forms_of_example_inputs(name: str) -> None:
    prepared = prepare_fx(small(), {"": A}, EXAMPLES[name])
    assert prepared.state.shapes_known == (name != "none")
    assert list(observers(prepared).values()) == ["x", "mean"]
    prepared(IMAGES)
    convert_fx(prepared)(IMAGES)


def test_positional_arguments_are_those_of_torch() -> None:
    prepare_fx(small(), QConfigMapping().set_global(get_default_qconfig("x86")), (IMAGES,))


def test_fused_and_traced_models_can_be_prepared() -> None:
    model = small()
    for source in (fuse_fx(model), fx.symbolic_trace(model), fuse_fx(fuse_fx(model))):
        prepared = prepare_fx(source, {"": A}, (IMAGES,))
        assert list(observers(prepared).values()) == ["x", "mean"]
        torch.testing.assert_close(prepared(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_model_in_training_mode_without_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.ReLU()).train()
    with pytest.warns(ConfigWarning, match=r"drop values at random .* \('_1'\)"):
        prepared = prepare_fx(model, {"": A}, (IMAGES,))
    assert all(module.training for module in (prepared, prepared.get_submodule("1")))
    assert "dropout" not in {name for name, _ in prepared.state.fates}
    assert model.training


def test_another_resolution_than_that_of_the_examples() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    prepared = prepare_fx(model, {"": A}, (IMAGES,))
    for size in (8, 13):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(prepared(x), model(x))
    assert convert_fx(prepared)(torch.randn(3, 3, 20, 11)).shape == (3, 4, 16, 7)


def test_copies_of_a_prepared_model_convert_alike() -> None:
    prepared = prepare_fx(small(), {"": A}, (IMAGES,))
    prepared(IMAGES)
    copied = copy.deepcopy(prepared)
    assert torch.equal(convert_fx(copied)(IMAGES), convert_fx(prepared)(IMAGES))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.spectral_norm. is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_does_not_stop_the_conversion() -> None:
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3)).eval()
    x = torch.randn(4, 3)
    prepared = prepare_fx(model, {"": A}, (x,))
    prepared(x)  # with gradients: the weight has a history, which a plain copy refuses
    assert convert_fx(prepared)(x).shape == (4, 3)


# -- random graphs --------------------------------------------------------------------------------


class Random(nn.Module):
    """A float model after a recipe: steps, and the two values that each of them works on."""

    def __init__(self, recipe: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.recipe = recipe
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(len(recipe) + 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in recipe)
        self.relu = nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout()
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [self.convs[-1](x)]
        for index, (step, first, second) in enumerate(self.recipe):
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(STEPS[step](self, index, a, b))
        return values[-1], values[len(values) // 2]


def functional_bn(m: Random, index: int, a: Tensor, b: Tensor) -> Tensor:
    bn = m.bns[index]
    return F.batch_norm(a, bn.running_mean, bn.running_var, bn.weight, bn.bias)


def unread(m: Random, index: int, a: Tensor, b: Tensor) -> Tensor:
    F.relu(a, inplace=True)
    return a


def augmented_add(m: Random, index: int, a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def write_a_view(m: Random, index: int, a: Tensor, b: Tensor) -> Tensor:
    a.view(-1).clamp_(min=-2.0)
    return a


def write_a_piece(m: Random, index: int, a: Tensor, b: Tensor) -> Tensor:
    a.chunk(2, 1)[1].mul_(0.5)
    return a


def swap(m: Random, index: int, a: Tensor, b: Tensor) -> Tensor:
    first, second = a.split(2, 1)
    return torch.cat([second, first], 1)


STEPS: dict[str, Callable[[Random, int, Tensor, Tensor], Tensor]] = {
    "conv": lambda m, i, a, b: m.convs[i](a),
    "conv of another step": lambda m, i, a, b: m.convs[0](a),
    "functional conv": lambda m, i, a, b: F.conv2d(a, m.convs[i].weight, m.convs[i].bias),
    "bn": lambda m, i, a, b: m.bns[i](a),
    "functional bn": functional_bn,
    "relu": lambda m, i, a, b: m.relu(a),
    "relu method": lambda m, i, a, b: a.relu(),
    "relu in place": lambda m, i, a, b: m.relu_in_place(a),
    "relu in place, unread": unread,
    "add": lambda m, i, a, b: a + b,
    "add_": lambda m, i, a, b: a.add_(b),
    "augmented add": augmented_add,
    "mul": lambda m, i, a, b: a * torch.sigmoid(b),
    "view": lambda m, i, a, b: a.flatten(1).view(a.shape),
    "write a view": write_a_view,
    "write a piece": write_a_piece,
    "swap": swap,
    "slice and cat": lambda m, i, a, b: torch.cat([a[:, 2:], b[:, :2]], 1),
    "pool": lambda m, i, a, b: F.max_pool2d(a, 3, 1, 1),
    "dropout": lambda m, i, a, b: m.dropout(a),
    "identity": lambda m, i, a, b: m.identity(a),
    "clamp": lambda m, i, a, b: torch.clamp(a, -3, 3),
    "number": lambda m, i, a, b: 0.5 * a + 1,
}

PLACE = st.one_of(st.just(-1), st.integers(0, 9))  # mostly the value before
RECIPES = st.lists(st.tuples(st.sampled_from(list(STEPS)), PLACE, PLACE), min_size=1, max_size=9)
RANDOM_INPUT = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(9))
EVERY_RUN = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> None:
    """Largest error relative to the largest value."""
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= bound * max(1.0, other.abs().max().item())


@EVERY_RUN
@given(RECIPES)
def test_fusing_keeps_the_meaning(recipe: list[tuple[str, int, int]]) -> None:
    """1e-5: see tests/passes/test_passes_fold_batch_norm.py; the graphs are nine steps deep."""
    model = lively(Random(recipe))
    fused = fuse_fx(model, example_inputs=(RANDOM_INPUT,))
    with torch.no_grad():
        near(fused(RANDOM_INPUT.clone()), model(RANDOM_INPUT.clone()), 1e-5)


@EVERY_RUN
@given(RECIPES, st.booleans())
def test_preparing_keeps_the_meaning_and_explains(
    recipe: list[tuple[str, int, int]], shapes: bool
) -> None:
    model = lively(Random(recipe))
    prepared = prepare_fx(model, {"": A}, (RANDOM_INPUT,) if shapes else None)
    with torch.no_grad():
        near(prepared(RANDOM_INPUT.clone()), model(RANDOM_INPUT.clone()), 1e-5)
    assert unexplained(prepared) == []


def unexplained(prepared: QuantGraphModule) -> list[str]:
    """Ops of the float model that nothing carries out, or that stay in FP32 without a reason."""
    told = {name for name, _ in prepared.state.fates}
    carried = {
        origin: record_of(node)
        for node in prepared.graph.nodes
        for origin in record_of(node).origins
    }
    return [
        entry.name
        for entry in prepared.state.ledger
        if entry.name not in told
        and (
            entry.name not in carried
            or (carried[entry.name].annotation is None and not carried[entry.name].reasons)
        )
    ]


@settings(EVERY_RUN, max_examples=25)
@given(RECIPES)
def test_every_refusal_has_a_reason(recipe: list[tuple[str, int, int]]) -> None:
    model = lively(Random(recipe))
    gm = captured(model, RANDOM_INPUT)
    mapping = normalize({"": A})
    for pipeline in (prepare_pipeline(mapping, ()),):
        for name, result in pipeline.run(gm, context()).items():
            for refusal in result.refusals:
                assert refusal.reason.strip(), name
                assert refusal.node, name


@settings(EVERY_RUN, max_examples=25)
@given(RECIPES)
def test_every_pass_is_idempotent(recipe: list[tuple[str, int, int]]) -> None:
    model = lively(Random(recipe))
    for pipeline in (fuse_pipeline(), prepare_pipeline(normalize({"": A}), ())):
        gm, shared = captured(model, RANDOM_INPUT), context()
        for item in pipeline.passes:
            run_pass(item, gm, shared)
            before = fingerprint(gm)
            assert run_pass(item, gm, shared).changes == 0, item.name
            assert fingerprint(gm) == before, item.name


@settings(EVERY_RUN, max_examples=40)
@given(RECIPES)
def test_converting_keeps_the_meaning_roughly(recipe: list[tuple[str, int, int]]) -> None:
    """Nine steps of 8 bits stay far below half of the signal; a wrong value does not."""
    model = lively(Random(recipe))
    prepared = prepare_fx(model, {"": A}, (RANDOM_INPUT,))
    with torch.no_grad():  # autograd forbids writing a piece
        wanted = model(RANDOM_INPUT.clone())
        prepared(RANDOM_INPUT.clone())
        found = convert_to_reference_fx(prepared)(RANDOM_INPUT.clone())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.5 * other.norm() + 1e-3
