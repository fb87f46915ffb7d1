"""Sections 9 and 5: parts that are quantized on their own, quantized inputs and results."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantizable as nnqz
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.utils import _pytree as pytree

import fxquant.compat
from fxquant.audit import audit
from fxquant.custom_config import QuantType
from fxquant.errors import ConfigError, ConfigWarning, LegacyFormWarning, LoweringWarning
from fxquant.explain import explain
from fxquant.parity import parity
from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Names,
    Peers,
    assert_same,
    default_mapping,
    equal,
    everywhere,
    observers,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, CallsTwo

pytestmark = pytest.mark.peer

RANDOM = torch.Generator().manual_seed(9)
IMAGES = torch.randn(2, 3, 8, 8, generator=RANDOM)
QUANTIZED = torch.quantize_per_tensor(IMAGES, 0.05, 64, torch.quint8)
STATIC = everywhere("default_qconfig")


def _full_range(names: Names) -> Any:
    """A mapping of which no warning says that it halves the range."""
    qconfig = names.QConfig(names.MinMaxObserver, names.default_weight_observer)
    return names.QConfigMapping().set_global(qconfig)


Graphs = tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(9)


def conv() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def parts_of(graph_module: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The graph, and those of its standalone modules."""
    children = graph_module.named_modules()
    return {name: child for name, child in children if isinstance(child, fx.GraphModule)}


def sides(
    peers: Peers,
    model: nn.Module,
    inputs: tuple[Any, ...],
    mapping: Build,
    custom: Build,
    convert: Callable[[Names], dict[str, Any]] | None = None,
    *,
    computes_the_same: bool = True,
) -> tuple[Graphs, Graphs]:
    """Prepared, reference and lowered graphs of both libraries, which observe and count alike.

    Args:
        peers: the libraries.
        model: the float model.
        inputs: floats.
        mapping: gives the qconfigs.
        custom: gives the prepare config.
        convert: gives more arguments for converting.
        computes_the_same: the prepared graphs give the float result to the last bit.
    """
    found = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, inputs, mapping, custom)
        result = run(prepared, inputs)
        if computes_the_same:
            assert_same(result, run(model, inputs))
        found.append((prepared, *peers.convert(names, prepared, convert)))
    theirs, ours = found
    for mine, other in zip(ours, theirs, strict=True):
        equal(list(parts_of(mine)), list(parts_of(other)), "graphs")
        for name, part in parts_of(mine).items():
            equal(placement(part), placement(parts_of(other)[name]), f"observers of {name!r}")
            equal(steps(part), steps(parts_of(other)[name]), f"steps of {name!r}")
    return theirs, ours


def alike(
    peers: Peers, model: nn.Module, given: tuple[Any, ...], *args: Any, **more: Any
) -> Graphs:
    """Our graphs: they observe, count and compute as torch.ao's on ``given``."""
    floats = tuple(x.dequantize() if x.is_quantized else x for x in given)
    theirs, ours = sides(peers, model, floats, *args, **more)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert_same(run(mine, given), run(other, given))
    return ours


# -- quantized inputs and results -----------------------------------------------------------------


def boundary(inputs: list[int], outputs: list[int]) -> Build:
    def build(names: Names) -> Any:
        config = names.PrepareCustomConfig().set_input_quantized_indexes(inputs)
        return config.set_output_quantized_indexes(outputs)

    return build


BOUNDARIES: dict[str, tuple[Callable[[], nn.Module], list[int], list[int]]] = {
    "input": (lambda: Calls(lambda m, x: m.a(x), a=conv()), [0], []),
    "output": (lambda: Calls(lambda m, x: m.a(x), a=conv()), [], [0]),
    "both": (lambda: Calls(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv()), [0], [0]),
    "moved": (lambda: Calls(lambda m, x: F.max_pool2d(x, 2)), [0], [0]),
    "moved-then-conv": (lambda: Calls(lambda m, x: m.a(F.max_pool2d(x, 2)), a=conv()), [0], []),
    "relu": (lambda: Calls(lambda m, x: F.relu(x)), [0], []),
    "add-number": (lambda: Calls(lambda m, x: m.a(x + 2), a=conv()), [0], []),
    "add-other": (lambda: Calls(lambda m, x: x + m.a(x), a=conv()), [0], [0]),
    "after-a-copy": (
        lambda: Calls(lambda m, x: m.same(m.a(x)), a=conv(), same=nn.Identity()),
        [],
        [0],
    ),
    "copy": (lambda: Calls(lambda m, x: m.same(x), same=nn.Identity()), [], [0]),
    "float-op": (lambda: Calls(lambda m, x: F.gelu(x)), [0], [0]),
    "float-op-behind": (lambda: Calls(lambda m, x: F.gelu(m.a(x)), a=conv()), [0], [0]),
    "float-and-int-readers": (
        lambda: Calls(lambda m, x: (m.a(x), F.gelu(x), x.shape), a=conv()),
        [0],
        [],
    ),
    "returned": (lambda: Calls(lambda m, x: x), [0], [0]),
    "returned-as-float": (lambda: Calls(lambda m, x: x), [0], []),
    "second-of-tuple": (
        lambda: Calls(lambda m, x: (m.a(x), m.b(x)), a=conv(), b=conv()),
        [],
        [1],
    ),
    "first-of-list": (
        lambda: Calls(lambda m, x: [m.a(x), m.b(x)], a=conv(), b=conv()),
        [0],
        [0],
    ),
    "dict": (
        lambda: Calls(lambda m, x: {"a": m.a(x), "b": x + 1, "c": F.gelu(x)}, a=conv()),
        [],
        [0],
    ),
    "nested": (
        lambda: Calls(lambda m, x: (m.a(x), (m.b(x), x + 1)), a=conv(), b=conv()),
        [],
        [1],
    ),
}


@pytest.mark.statement("S5.16a", "S5.16b", "S6.1a")
@pytest.mark.parametrize("case", BOUNDARIES)
def test_quantized_inputs_and_results(peers: Peers, case: str) -> None:
    make, inputs, outputs = BOUNDARIES[case]
    given = (QUANTIZED if inputs else IMAGES,)
    alike(peers, make(), given, STATIC, boundary(inputs, outputs))
    if case in ("float-op", "returned", "returned-as-float"):  # beside what is quantized, too
        model = Calls(lambda m, x: (m.inner(x), m.a(x)), a=conv(), inner=make())
        alike(peers, model, given, STATIC, boundary(inputs, outputs))


@pytest.mark.statement("S5.16a")
def test_one_quantized_input_of_two(peers: Peers) -> None:
    model = CallsTwo(lambda m, x, y: x + y)
    ours = alike(peers, model, (QUANTIZED, IMAGES), STATIC, boundary([0], []))
    assert len(observers(ours[0])) == 2
    assert steps(ours[2]) == (1, 0, 1)


@pytest.mark.statement("S5.16a", "S5.16b")
def test_without_a_qconfig_a_quantized_input_is_dequantized(peers: Peers) -> None:
    def nothing(names: Names) -> Any:
        return names.QConfigMapping().set_global(None)

    model = Calls(lambda m, x: m.a(x), a=conv())
    ours = alike(peers, model, (QUANTIZED,), nothing, boundary([0], [0]))
    assert steps(ours[2]) == (0, 0, 1)
    assert not run(ours[2], (QUANTIZED,)).is_quantized


@pytest.mark.statement("S5.16a", "S5.3c")
def test_a_dynamic_linear_takes_no_quantized_tensor(peers: Peers) -> None:
    rows = torch.quantize_per_tensor(IMAGES.reshape(-1, 8), 0.05, 64, torch.quint8)
    model = Calls(lambda m, x: m.fc(x), fc=nn.Linear(8, 3))
    dynamic = everywhere("default_dynamic_qconfig")
    ours = alike(peers, model, (rows,), dynamic, boundary([0], [0]))
    assert len(observers(ours[0])) == 1


@pytest.mark.statement("S5.16a", "S1.5a")
def test_a_model_with_quantized_inputs_is_copied_scripted_and_explained() -> None:
    model = Calls(lambda m, x: m.a(m.relu(F.max_pool2d(x, 2))), a=conv(), relu=nn.ReLU6())
    ours = Peers(OURS)
    prepared, _ = ours.prepare(OURS, model, (IMAGES,), STATIC, boundary([0], [0]))
    run(prepared, (IMAGES,))
    reference, lowered = ours.convert(OURS, prepared)
    expected = run(lowered, (QUANTIZED,))
    assert expected.is_quantized
    with quiet():
        copies = [
            copy.deepcopy(lowered),
            pickle.loads(pickle.dumps(lowered)),
            torch.jit.script(lowered),
            torch.jit.trace(lowered, (QUANTIZED,)),
            fx.Transformer(lowered).transform(),
        ]
    for made in copies:
        assert_same(run(made, (QUANTIZED,)), expected)
    assert {row.runs.value for row in explain(lowered).rows} == {"int8"}
    assert "quantized::conv2d" in str(audit(lowered))
    assert all(row.more == 0 for row in parity(reference, lowered, (QUANTIZED,)).rows)
    with pytest.raises(ConfigError, match="the result of its convert_to_reference_fx"):
        parity(prepared, lowered, (QUANTIZED,))


@pytest.mark.statement("S5.16a")
def test_a_position_that_is_not_there_is_told() -> None:
    with pytest.warns(ConfigWarning, match="input_quantized_idxs names input 3"):
        prepared = fxquant.compat.prepare_fx(
            Calls(lambda m, x: m.a(x), a=conv()),
            _full_range(OURS),
            (IMAGES,),
            boundary([3], [])(OURS),
        )
    assert len(observers(prepared)) == 2


@pytest.mark.statement("S5.16a")
def test_a_value_that_is_returned_twice_leaves_quantized_where_it_is_named() -> None:
    """torch.ao lets it leave quantized at the other position too."""
    model = Calls(lambda m, x: (lambda y: (y, F.gelu(y), y))(m.a(x)), a=conv())
    ours = Peers(OURS)
    prepared, _ = ours.prepare(OURS, model, (IMAGES,), STATIC, boundary([], [0]))
    run(prepared, (IMAGES,))
    for graph_module in ours.convert(OURS, prepared):
        results = run(graph_module, (IMAGES,))
        assert [x.is_quantized for x in results] == [True, False, False]
        assert torch.equal(results[0].dequantize(), results[2])


# -- standalone modules ---------------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x))


def standalone(
    *, by: str, inputs: list[int], outputs: list[int], own: Build | None = None
) -> Build:
    """A config that quantizes ``part`` on its own, by its name or its class."""

    def build(names: Names) -> Any:
        config = names.PrepareCustomConfig()
        mapping = None if own is None else own(names)
        rest = (mapping, (IMAGES,), boundary(inputs, outputs)(names), None)
        if by == "name":
            return config.set_standalone_module_name("part", *rest)
        return config.set_standalone_module_class(Part, *rest)

    return build


def around() -> nn.Module:
    return Calls(lambda m, x: m.part(m.a(x)), a=conv(), part=Part())


@pytest.mark.statement("S9.1a")
@pytest.mark.parametrize("by", ["name", "class"])
def test_a_float_interface(peers: Peers, by: str) -> None:
    model = around()
    ours = alike(peers, model, (IMAGES,), STATIC, standalone(by=by, inputs=[], outputs=[]))
    prepared, _, lowered = ours
    assert isinstance(prepared.part, fx.GraphModule)
    assert (len(observers(prepared)), len(observers(prepared.part))) == (2, 2)
    assert (steps(lowered), steps(lowered.part)) == ((1, 0, 1), (1, 0, 1))
    assert_same(run(lowered, (IMAGES,)), _flat(peers, model))


@pytest.mark.statement("S9.1a")
@pytest.mark.parametrize("by", ["name", "class"])
def test_a_quantized_interface(peers: Peers, by: str) -> None:
    model = around()
    ours = alike(peers, model, (IMAGES,), STATIC, standalone(by=by, inputs=[0], outputs=[0]))
    prepared, _, lowered = ours
    assert (len(observers(prepared)), len(observers(prepared.part))) == (2, 1)
    assert (steps(lowered), steps(lowered.part)) == ((1, 0, 1), (0, 0, 0))
    assert_same(run(lowered, (IMAGES,)), _flat(peers, model))


def _flat(peers: Peers, model: nn.Module) -> Any:
    """What the model gives without a standalone part."""
    return run(peers.compare(model, (IMAGES,), STATIC).ours.lowered, (IMAGES,))


@pytest.mark.statement("S9.1a")
@pytest.mark.parametrize(("inputs", "outputs"), [([0], []), ([], [0])])
def test_one_end_quantized(peers: Peers, inputs: list[int], outputs: list[int]) -> None:
    config = standalone(by="name", inputs=inputs, outputs=outputs)
    alike(peers, around(), (IMAGES,), STATIC, config)


@pytest.mark.statement("S9.1a")
def test_an_own_mapping(peers: Peers) -> None:
    def nothing(names: Names) -> Any:
        return names.QConfigMapping().set_global(None)

    config = standalone(by="name", inputs=[], outputs=[], own=STATIC)
    ours = alike(peers, around(), (IMAGES,), nothing, config)
    assert (len(observers(ours[0])), len(observers(ours[0].part))) == (0, 2)
    config = standalone(by="name", inputs=[], outputs=[], own=nothing)
    ours = alike(peers, around(), (IMAGES,), STATIC, config)
    assert (len(observers(ours[0])), len(observers(ours[0].part))) == (2, 0)


@pytest.mark.statement("S9.1a")
@pytest.mark.parametrize("name", ["part", "part.conv"])
def test_no_mapping_is_the_qconfig_that_the_part_has_outside(peers: Peers, name: str) -> None:
    def mapping(names: Names) -> Any:
        return STATIC(names).set_module_name(name, None)

    config = standalone(by="name", inputs=[], outputs=[])
    ours = alike(peers, around(), (IMAGES,), mapping, config)
    assert len(observers(ours[0].part)) == (0 if name == "part" else 2)


@pytest.mark.statement("S9.1a")
def test_float_readers_of_a_quantized_part(peers: Peers) -> None:
    model = Calls(lambda m, x: F.gelu(m.part(x)), part=Part())
    config = standalone(by="name", inputs=[0], outputs=[0])
    ours = alike(peers, model, (IMAGES,), STATIC, config)
    assert steps(ours[2]) == (1, 0, 1)


BEYOND: dict[str, Callable[[], nn.Module]] = {
    # torch.ao does not quantize what its standalone module then takes as quantized ...
    "first": lambda: Calls(lambda m, x: m.a(m.part(x)), a=conv(), part=Part()),
    # ... and cannot trace an observer in a second call of it.
    "twice": lambda: Calls(lambda m, x: m.part(m.part(x)), part=Part()),
}


@pytest.mark.statement("S9.1a")
@pytest.mark.parametrize("case", BEYOND)
def test_standalone_modules_that_torch_ao_cannot_run(case: str) -> None:
    ours, model = Peers(OURS), BEYOND[case]()
    config = standalone(by="class", inputs=[0], outputs=[0])
    prepared, _ = ours.prepare(OURS, model, (IMAGES,), STATIC, config)
    run(prepared, (IMAGES,))
    _, lowered = ours.convert(OURS, prepared)
    assert steps(lowered) == (1, 0, 1)
    result, flat = run(lowered, (IMAGES,)), _ours_flat(model)
    if case == "first":
        assert_same(result, flat)
    else:  # one module, with one observer for both of its calls
        assert float((result - flat).abs().max()) < 4 * float(result.abs().max()) / 127


def _ours_flat(model: nn.Module) -> Any:
    ours = Peers(OURS)
    prepared, _ = ours.prepare(OURS, model, (IMAGES,), STATIC)
    run(prepared, (IMAGES,))
    return run(ours.convert(OURS, prepared)[1], (IMAGES,))


@pytest.mark.statement("S9.1a")
def test_a_part_with_a_qconfig_of_its_own_quantizes_what_it_is_given() -> None:
    """torch.ao hands it floats, which its int8 kernel refuses."""

    def nothing(names: Names) -> Any:
        return names.QConfigMapping().set_global(None)

    ours = Peers(OURS)
    config = standalone(by="name", inputs=[0], outputs=[0], own=STATIC)
    prepared, _ = ours.prepare(OURS, around(), (IMAGES,), nothing, config)
    run(prepared, (IMAGES,))
    _, lowered = ours.convert(OURS, prepared)
    assert (steps(lowered), len(observers(prepared))) == ((1, 0, 1), 1)
    assert run(lowered, (IMAGES,)).dtype is torch.float32


def _nested_config(names: Names) -> Any:
    inner = names.PrepareCustomConfig().set_standalone_module_class(
        Part, None, (IMAGES,), boundary([0], [0])(names), None
    )
    config = names.PrepareCustomConfig()
    return config.set_standalone_module_name("outer", None, (IMAGES,), inner, None)


@pytest.mark.statement("S9.1a", "S4.2a")
def test_standalone_modules_nest_and_train() -> None:
    """torch.ao does not read a standalone module's config for standalone modules inside it."""
    model = Calls(lambda m, x: m.outer(x), outer=nn.Sequential(conv(), Part(), nn.ReLU()))
    ours = Peers(OURS)
    prepared, _ = ours.prepare(OURS, model, (IMAGES,), STATIC, _nested_config)
    run(prepared, (IMAGES,))
    lowered = ours.convert(OURS, prepared)[1]
    assert list(parts_of(lowered)) == ["", "outer", "outer.1"]
    assert [steps(part) for part in parts_of(lowered).values()] == [
        (0, 0, 0),
        (1, 0, 1),
        (0, 0, 0),
    ]
    assert_same(run(lowered, (IMAGES,)), _ours_flat(model))
    trained, _ = ours.prepare(
        *(OURS, copy.deepcopy(model).train(), (IMAGES,), _training, _nested_config),
        call="prepare_qat_fx",
    )
    assert hasattr(trained.outer.get_submodule("0"), "weight_fake_quant")
    assert hasattr(trained.outer.get_submodule("1").conv, "weight_fake_quant")


@pytest.mark.statement("S9.1a")
def test_a_part_may_have_a_backend_of_its_own(peers: Peers) -> None:
    def empty_backend(names: Names) -> Any:
        rest = (None, (IMAGES,), None, names.BackendConfig("nothing"))
        return names.PrepareCustomConfig().set_standalone_module_name("part", *rest)

    ours = alike(peers, around(), (IMAGES,), STATIC, empty_backend)
    assert (len(observers(ours[0])), len(observers(ours[0].part))) == (2, 0)


def _training(names: Names) -> Any:
    return names.get_default_qat_qconfig_mapping("x86")


@pytest.mark.statement("S9.1a", "S1.5a", "S10.2a")
def test_a_model_with_standalone_parts_is_copied_saved_and_explained() -> None:
    ours = Peers(OURS)
    config = standalone(by="name", inputs=[0], outputs=[0])
    made = []
    for _ in range(2):
        prepared, _ = ours.prepare(OURS, around(), (IMAGES,), STATIC, config)
        assert_same(run(copy.deepcopy(prepared), (IMAGES,)), run(prepared, (IMAGES,)))
        made.append(ours.convert(OURS, prepared))
    (reference, lowered), (_, other) = made
    expected = run(lowered, (IMAGES,))
    with quiet():
        copies = [copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))]
        copies.append(torch.jit.script(lowered))
    assert not torch.equal(run(other, (IMAGES,)), expected)
    other.load_state_dict(lowered.state_dict())
    for same in (*copies, other):
        assert_same(run(same, (IMAGES,)), expected)
    rows = {row.name: row for row in explain(lowered).rows}
    assert "a standalone module, quantized on its own" in str(rows["part"])
    assert "a standalone module" in str(audit(lowered))
    inside = {name for name in rows if name.startswith("part.")}
    assert inside == {f"part.{row.name}" for row in explain(lowered.part).rows} != set()
    for name in inside:
        assert rows[name].runs.value == "int8"
        assert f"{rows[name].path}.".startswith("part.")
    assert {row.name for row in audit(lowered).counted} >= inside
    assert {r.runs.value for r in explain(prepared).rows if r.name in inside} == {"planned"}
    assert all(row.more == 0 for row in parity(reference, lowered, (IMAGES,)).rows)
    assert {row.runs.value for row in explain(lowered.part).rows} == {"int8"}


# -- custom modules -------------------------------------------------------------------------------


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class ObservedCustom(Custom):
    @classmethod
    def from_float(cls, module: Custom) -> ObservedCustom:
        assert module.qconfig is not None
        made = cls()
        made.conv, made.qconfig = module.conv, module.qconfig
        return made.eval()


class QuantizedCustom(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.conv = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    @classmethod
    def from_observed(cls, observed: ObservedCustom) -> QuantizedCustom:
        inner = observed.conv
        inner.qconfig = observed.qconfig
        inner.activation_post_process = observed.activation_post_process
        return cls(nnq.Conv2d.from_float(inner))


def custom_config(kind: str, before: type, after: type, **more: Any) -> Build:
    """As an object, which torch.ao's setter takes for static quantization only."""

    def build(names: Names) -> Any:
        config = names.PrepareCustomConfig()
        key = (tq.quant_type.QuantType if names is THEIRS else QuantType)[kind.upper()]
        config.float_to_observed_mapping = {key: {before: after}}
        for name, value in more.items():
            getattr(config, f"set_{name}")(value)
        return config

    return build


def converting(kind: str, before: type, after: type) -> Callable[[Names], dict[str, Any]]:
    def build(names: Names) -> dict[str, Any]:
        config = names.ConvertCustomConfig()
        key = (tq.quant_type.QuantType if names is THEIRS else QuantType)[kind.upper()]
        config.observed_to_quantized_mapping = {key: {before: after}}
        return {"convert_custom_config": config}

    return build


OBSERVED = custom_config("static", Custom, ObservedCustom)
QUANTIZING = converting("static", ObservedCustom, QuantizedCustom)
CUSTOM: dict[str, Callable[[], nn.Module]] = {
    "alone": lambda: Calls(lambda m, x: m.part(x), part=Custom()),
    "behind-conv": lambda: Calls(lambda m, x: m.part(m.a(x)), part=Custom(), a=conv()),
    "before-conv": lambda: Calls(lambda m, x: m.a(m.part(x)), part=Custom(), a=conv()),
    "between-float-ops": lambda: Calls(lambda m, x: F.gelu(m.part(F.gelu(x))), part=Custom()),
    "in-a-container": lambda: Calls(
        lambda m, x: m.seq(x), seq=nn.Sequential(conv(), Custom(), nn.ReLU())
    ),
    "input-with-several-readers": lambda: Calls(
        lambda m, x: (lambda y: m.b(y) + m.part(y) + F.gelu(y))(m.a(x)),
        part=Custom(),
        a=conv(),
        b=conv(),
    ),
    "result-with-several-readers": lambda: Calls(
        lambda m, x: (lambda y: (m.b(y), F.gelu(y), y))(m.part(x)), part=Custom(), b=conv()
    ),
    "the-same-input-twice": lambda: Calls(
        lambda m, x: m.part(x) + m.other(x), part=Custom(), other=Custom()
    ),
}


@pytest.mark.statement("S9.2a", "S9.2b")
@pytest.mark.parametrize("case", CUSTOM)
def test_custom_modules(peers: Peers, case: str) -> None:
    ours = alike(peers, CUSTOM[case](), (IMAGES,), STATIC, OBSERVED, convert=QUANTIZING)
    kinds = Counter(type(module).__name__ for module in ours[0].modules())
    count = 2 if case == "the-same-input-twice" else 1
    assert kinds["ObservedCustom"] == count
    for graph_module in ours[1:]:
        kinds = Counter(type(module).__name__ for module in graph_module.modules())
        assert (kinds["QuantizedCustom"], kinds["ObservedCustom"]) == (count, 0)


@pytest.mark.statement("S9.2a")
def test_observers_are_around_a_custom_module(peers: Peers) -> None:
    rows = IMAGES.reshape(-1, 8)

    class FloatLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    class ObservedLinear(FloatLinear):
        @classmethod
        def from_float(cls, module: FloatLinear) -> ObservedLinear:
            made = cls()
            made.fc = module.fc
            return made

    model = Calls(lambda m, x: m.part(m.a(x)), a=nn.Linear(8, 8), part=FloatLinear())
    config = custom_config("static", FloatLinear, ObservedLinear)
    for dtype in (torch.quint8, torch.qint32):

        def mapping(names: Names, dtype: torch.dtype = dtype) -> Any:
            activation = names.MinMaxObserver.with_args(dtype=dtype)
            qconfig = names.QConfig(activation, names.default_weight_observer)
            made = names.QConfigMapping().set_object_type(FloatLinear, qconfig)
            return made.set_object_type(nn.Linear, names.default_qconfig)

        sides_ = [
            peers.prepare(names, model, (rows,), mapping, config)[0] for names in (THEIRS, OURS)
        ]
        equal(placement(sides_[1]), placement(sides_[0]), "observers")
        kinds = [type(module).__name__ for _, module in observers(sides_[1])]
        assert kinds == ["MinMaxObserver"] * len(kinds)
        assert len(kinds) == (3 if dtype is torch.quint8 else 4)


@pytest.mark.statement("S9.2a")
def test_the_observer_of_the_result_is_handed_over(peers: Peers) -> None:
    given = []

    class Watching(QuantizedCustom):
        @classmethod
        def from_observed(cls, observed: ObservedCustom) -> QuantizedCustom:
            given.append(observed.activation_post_process)
            assert observed.qconfig is not None
            return QuantizedCustom.from_observed(observed)

    prepared, _ = peers.prepare(OURS, CUSTOM["alone"](), (IMAGES,), STATIC, OBSERVED)
    run(prepared, (IMAGES,))
    wanted = prepared.activation_post_process_1.calculate_qparams()
    peers.convert(OURS, prepared, converting("static", ObservedCustom, Watching))
    assert len(given) == 2
    for observer in given:
        assert observer.calculate_qparams() == wanted
        assert observer.dtype is torch.quint8


@pytest.mark.statement("S9.2a", "S3.7b")
def test_without_a_qconfig_a_custom_module_stays(peers: Peers) -> None:
    def mapping(names: Names) -> Any:
        return STATIC(names).set_object_type(Custom, None)

    model = CUSTOM["behind-conv"]()
    ours = alike(peers, model, (IMAGES,), mapping, OBSERVED, convert=QUANTIZING)
    assert type(ours[2].part) is Custom


@pytest.mark.statement("S9.2a", "S5.16a")
def test_quantized_tensors_go_through_a_custom_module(peers: Peers) -> None:
    config = custom_config(
        "static",
        Custom,
        ObservedCustom,
        input_quantized_indexes=[0],
        output_quantized_indexes=[0],
    )
    model = CUSTOM["alone"]()
    ours = alike(peers, model, (QUANTIZED,), STATIC, config, convert=QUANTIZING)
    assert steps(ours[2]) == (0, 0, 0)
    assert run(ours[2], (QUANTIZED,)).is_quantized


@pytest.mark.statement("S9.2b", "S7.10a")
def test_a_custom_module_that_is_called_twice_quantizes_for_both_calls() -> None:
    """torch.ao gives it the parameters of the last call."""
    model = Calls(lambda m, x: m.part(m.part(x) * 1.0), part=Custom())
    prepared, reference, lowered = _converted_here(model)
    found = dict(observers(prepared))
    seen = [found[name] for name in list(found) if name != "activation_post_process_0"]
    low = min(float(observer.min_val) for observer in seen)
    high = max(float(observer.max_val) for observer in seen)
    for graph_module in (reference, lowered):
        part = graph_module.part.conv
        reach = (127 - part.zero_point) * part.scale
        assert reach >= high - part.scale
        assert -part.zero_point * part.scale <= low + part.scale


def _converted_here(model: nn.Module) -> Graphs:
    ours = Peers(OURS)
    prepared, _ = ours.prepare(OURS, model, (IMAGES,), STATIC, OBSERVED)
    run(prepared, (IMAGES,))
    return (prepared, *ours.convert(OURS, prepared, QUANTIZING))


@pytest.mark.statement("S9.2a")
def test_a_custom_module_that_convert_does_not_know_stays_in_float(peers: Peers) -> None:
    model = CUSTOM["behind-conv"]()
    ours = alike(peers, model, (IMAGES,), STATIC, OBSERVED)
    assert type(ours[2].part) is ObservedCustom
    with pytest.warns(LoweringWarning, match=r"'part' \(ObservedCustom\) was to be quantized"):
        fxquant.compat.convert_fx(ours[0])


@pytest.mark.statement("S9.2a")
def test_a_static_custom_module_under_a_dynamic_qconfig_stays_in_float(peers: Peers) -> None:
    """torch.ao too leaves it, but rounds what it reads, at run time, for nothing."""
    model = CUSTOM["behind-conv"]()

    def mapping(names: Names) -> Any:
        return STATIC(names).set_module_name("part", names.default_dynamic_qconfig)

    theirs, _ = peers.prepare(THEIRS, model, (IMAGES,), mapping, OBSERVED)
    ours, warned = peers.prepare(OURS, model, (IMAGES,), mapping, OBSERVED)
    assert type(theirs.part) is type(ours.part) is Custom
    (told,) = [text for text in warned if "custom module" in text]
    assert "'part' (Custom) is a custom module for static quantization" in told
    assert "its qconfig is dynamic; it computes in floating point" in told
    run(theirs, (IMAGES,))
    run(ours, (IMAGES,))
    for graph, expected in zip(
        peers.convert(OURS, ours, QUANTIZING),
        peers.convert(THEIRS, theirs, QUANTIZING),
        strict=True,
    ):
        assert (steps(expected)[1], steps(graph)[1]) == (1, 0)
    _, silent = peers.prepare(OURS, model, (IMAGES,), STATIC, OBSERVED)
    assert not any("custom module" in text for text in silent)


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class ObservedDynamic(Dynamic):
    @classmethod
    def from_float(cls, module: Dynamic) -> ObservedDynamic:
        made = cls()
        made.fc, made.qconfig = module.fc, module.qconfig
        return made


class QuantizedDynamic(Dynamic):
    @classmethod
    def from_observed(cls, observed: ObservedDynamic) -> QuantizedDynamic:
        made = cls()
        observed.fc.qconfig = observed.qconfig
        made.fc = nnqd.Linear.from_float(observed.fc)
        return made


class RoundedDynamic(Dynamic):
    @classmethod
    def from_observed(cls, observed: ObservedDynamic) -> RoundedDynamic:
        assert not hasattr(observed, "activation_post_process")
        made = cls()
        made.load_state_dict(observed.state_dict())
        with torch.no_grad():
            made.fc.weight.copy_((made.fc.weight * 8).round() / 8)
        return made


@pytest.mark.statement("S9.2b")
@pytest.mark.parametrize("objects", [THEIRS, OURS], ids=lambda names: names.library)
def test_a_dynamic_custom_module_is_not_observed(objects: Names) -> None:
    rows = IMAGES.reshape(-1, 8)
    model = Calls(lambda m, x: m.part(F.gelu(m.part(x))), part=Dynamic())
    config = custom_config(
        "dynamic", Dynamic, ObservedDynamic, non_traceable_module_classes=[Dynamic]
    )
    peers = Peers(objects)
    dynamic = everywhere("default_dynamic_qconfig")
    prepared, _ = peers.prepare(OURS, model, (rows,), dynamic, config)
    assert observers(prepared) == []
    assert type(prepared.part) is ObservedDynamic
    converters = converting("dynamic", ObservedDynamic, QuantizedDynamic)
    with quiet():
        eager = tq.quantize_dynamic(model, {nn.Linear})
    for graph_module in peers.convert(OURS, prepared, converters):
        assert type(graph_module.part) is QuantizedDynamic
        assert_same(run(graph_module, (rows,)), run(eager, (rows,)))


@pytest.mark.statement("S9.2b")
@pytest.mark.parametrize("objects", [THEIRS, OURS], ids=lambda names: names.library)
def test_a_weight_only_custom_module(objects: Names) -> None:
    rows = IMAGES.reshape(-1, 8)
    model = Calls(lambda m, x: m.part(x), part=Dynamic())
    config = custom_config(
        "weight_only", Dynamic, ObservedDynamic, non_traceable_module_classes=[Dynamic]
    )
    peers = Peers(objects)
    mapping = everywhere("float_qparams_weight_only_qconfig")
    prepared, _ = peers.prepare(OURS, model, (rows,), mapping, config)
    assert observers(prepared) == []
    converters = converting("weight_only", ObservedDynamic, RoundedDynamic)
    for graph_module in peers.convert(OURS, prepared, converters):
        weight = graph_module.part.fc.weight
        assert torch.equal(weight * 8, (model.part.fc.weight * 8).round())


# -- LSTM -----------------------------------------------------------------------------------------

SEQUENCE = torch.randn(5, 2, 3, generator=RANDOM)
STATE = torch.randn(1, 2, 4, generator=RANDOM)
LSTM_INPUTS = (SEQUENCE, STATE, STATE * 2)
LSTM_OBSERVED = custom_config("static", nn.LSTM, nnqz.LSTM)
LSTM_QUANTIZED = converting("static", nnqz.LSTM, nnq.LSTM)


class Recurrent(nn.Module):
    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.fc = nn.Linear(4, 2)
        self.read = read
        self.eval()

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        return self.read(self, self.lstm(x, (h, c)))


def _parts(model: Recurrent, result: Any) -> Any:
    y, (h, c) = result
    return model.fc(y), F.gelu(h), c


def _hidden(model: Recurrent, result: Any) -> Any:
    _, hidden = result
    return hidden


READS: dict[str, tuple[Callable[..., Any], tuple[int, int, int]]] = {
    "elements": (_parts, (4, 0, 3)),
    "whole": (lambda model, result: result, (4, 2, 3)),
    "hidden": (_hidden, (3, 1, 2)),
}


def _counted(graph_module: fx.GraphModule) -> Counter[str]:
    return Counter(
        getattr(node.target, "__name__", str(node.target))
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_method")
    )


@pytest.mark.statement("S9.3a")
@pytest.mark.parametrize("case", READS)
def test_an_lstm_as_a_custom_module(peers: Peers, case: str) -> None:
    read, (items, tuples, dequantized) = READS[case]
    model = Recurrent(read)
    graphs = sides(
        *(peers, model, LSTM_INPUTS, default_mapping, LSTM_OBSERVED, LSTM_QUANTIZED),
        computes_the_same=False,
    )
    (_, _, theirs), (prepared, reference, ours) = graphs
    kinds = [type(module).__name__.removeprefix("Torch") for _, module in observers(prepared)]
    assert kinds[:3] == ["HistogramObserver"] * 3
    assert type(prepared.lstm) is nnqz.LSTM
    for graph_module in (reference, ours, theirs):
        counts = _counted(graph_module)
        assert (counts["getitem"], counts["tuple"]) == (items, tuples)
        assert type(graph_module.lstm) is nnq.LSTM
    assert steps(ours) == (3, 0, dequantized)
    assert_same(run(ours, LSTM_INPUTS), run(theirs, LSTM_INPUTS))


class NoState(Recurrent):
    def forward(self, x: torch.Tensor) -> Any:
        return self.lstm(x)[0]


class CalledTwice(Recurrent):
    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        y, hidden = self.lstm(x, (h, c))
        return self.lstm(y[:, :, :3], hidden)


@pytest.mark.statement("S9.3a")
@pytest.mark.parametrize(("kind", "inputs"), [(NoState, (SEQUENCE,)), (CalledTwice, LSTM_INPUTS)])
def test_lstms_that_torch_ao_cannot_convert(
    kind: type[Recurrent], inputs: tuple[torch.Tensor, ...]
) -> None:
    """What we give is what torch.ao's quantized module gives on the quantized inputs."""
    ours = Peers(OURS)
    prepared, _ = ours.prepare(OURS, kind(_hidden), inputs, default_mapping, LSTM_OBSERVED)
    run(prepared, inputs)
    lowered = ours.convert(OURS, prepared, LSTM_QUANTIZED)[1]

    def quantized(x: torch.Tensor, number: int) -> torch.Tensor:
        observer = getattr(prepared, f"activation_post_process_{number}")
        scale, zero_point = observer.calculate_qparams()
        return torch.quantize_per_tensor(x, float(scale), int(zero_point), torch.quint8)

    given = [quantized(x, number) for number, x in enumerate(inputs)]
    with torch.no_grad():
        if kind is NoState:
            expected = lowered.lstm(given[0])[0]
        else:
            y, hidden = lowered.lstm(given[0], tuple(given[1:]))
            expected = lowered.lstm(quantized(y.dequantize()[:, :, :3], 3), hidden)
    found = run(lowered, inputs)
    assert_same(found, pytree.tree_map(lambda x: x.dequantize(), expected))
    assert steps(lowered)[0] == len(inputs) + (kind is CalledTwice)


@pytest.mark.statement("S9.3a", "S1.3a")
def test_an_lstm_without_example_inputs() -> None:
    ours = Peers(OURS)
    model = Recurrent(_parts)
    prepared, _ = ours.prepare(OURS, model, None, default_mapping, LSTM_OBSERVED)
    run(prepared, LSTM_INPUTS)
    _, lowered = ours.convert(OURS, prepared, LSTM_QUANTIZED)
    counts = _counted(lowered)
    assert (counts["getitem"], counts["tuple"]) == (4, 0)
    assert steps(lowered) == (3, 0, 3)


# -- dict forms -----------------------------------------------------------------------------------


@pytest.mark.statement("S9.1a", "S9.2a", "S1.2a")
def test_dicts_say_the_same_as_objects() -> None:
    model = Calls(lambda m, x: m.own(m.part(m.a(x))), own=Custom(), part=Part(), a=conv())
    ends = {"input_quantized_idxs": [0], "output_quantized_idxs": [0]}
    prepare_dict = {
        "standalone_module_name": [("part", None, (IMAGES,), ends, None)],
        "float_to_observed_custom_module_class": {"static": {Custom: ObservedCustom}},
        **ends,
    }
    convert_dict = {
        "observed_to_quantized_custom_module_class": {"static": {ObservedCustom: QuantizedCustom}}
    }
    forms = [
        (prepare_dict, convert_dict),
        (PrepareCustomConfig.from_dict(prepare_dict), ConvertCustomConfig.from_dict(convert_dict)),
        (
            fxquant.compat.PrepareCustomConfig.from_dict(prepare_dict),
            fxquant.compat.ConvertCustomConfig.from_dict(convert_dict),
        ),
    ]
    results = []
    for prepare_config, convert_config in forms:
        with quiet():
            prepared = fxquant.compat.prepare_fx(
                copy.deepcopy(model), STATIC(OURS), (IMAGES,), prepare_config
            )
        run(prepared, (IMAGES,))
        with quiet():
            lowered = fxquant.compat.convert_fx(prepared, convert_config)
        assert (steps(lowered), steps(lowered.part)) == ((0, 0, 0), (0, 0, 0))
        results.append(run(lowered, (QUANTIZED,)))
        assert results[-1].is_quantized
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.statement("S1.2a")
def test_dicts_are_told_to_be_deprecated() -> None:
    with pytest.warns(LegacyFormWarning, match="deprecated"):
        prepared = fxquant.compat.prepare_fx(
            CUSTOM["alone"](), _full_range(OURS), (IMAGES,), {"input_quantized_idxs": [0]}
        )
    assert len(observers(prepared)) == 1


@pytest.mark.statement("S9.1a")
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("part", 3, (IMAGES,), None, None), "Expected QConfigMapping in"),
        (("part", None, (IMAGES,), 3, None), "Expected PrepareCustomConfig in"),
        (("part", None, (IMAGES,), None, 3), "Expected BackendConfig in"),
        (("part", None), "needs a list of"),
    ],
)
def test_entries_of_another_form_are_errors(entry: tuple[Any, ...], message: str) -> None:
    with quiet(), pytest.raises(ConfigError, match=message):
        fxquant.compat.prepare_fx(
            around(), STATIC(OURS), (IMAGES,), {"standalone_module_name": [entry]}
        )
    right = standalone(by="name", inputs=[], outputs=[])
    prepared, _ = Peers(OURS).prepare(OURS, around(), (IMAGES,), STATIC, right)
    assert (len(observers(prepared)), len(observers(prepared.part))) == (2, 2)
