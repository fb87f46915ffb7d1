"""Section 3: which qconfig a node gets, and what becomes of one that does not fit."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Names,
    Peers,
    default_mapping,
    everywhere,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, conv, images, linear

pytestmark = pytest.mark.peer

X = images()


class Block(nn.Module):
    """Two convolutions with functions and a method between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(padding=1), conv(padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.max_pool2d(self.a(x) + x, 1).clamp(-1, 1))
        return y


def blocks() -> nn.Module:
    return nn.Sequential(*[Calls(lambda s, x: s.e(s.d(x)), d=Block(), e=Block())]).eval()[0]


def unit(names: Names) -> Any:
    """A qconfig for functions whose results are between 0 and 1."""
    return names.QConfig(
        activation=names.default_fixed_qparams_range_0to1_observer,
        weight=names.default_weight_observer,
    )


def rules(*calls: tuple[Any, ...]) -> Build:
    """A mapping of calls of its setters; the qconfig in them is ``True`` for one, or ``None``."""

    def build(names: Names) -> Any:
        mapping = names.QConfigMapping()
        for setter, *arguments, wanted in calls:
            getattr(mapping, f"set_{setter}")(*arguments, names.default_qconfig if wanted else None)
        return mapping

    return build


ALL = ("global", True)
PRECEDENCE: dict[str, tuple[tuple[Any, ...], ...]] = {
    "global": (ALL,),
    "type": (("object_type", nn.Conv2d, True),),
    "type-over-global": (ALL, ("object_type", nn.Conv2d, None)),
    "regex-over-type": (("object_type", nn.Conv2d, None), ("module_name_regex", "d.*", True)),
    "regex-none-over-type": (
        ALL,
        ("object_type", nn.Conv2d, True),
        ("module_name_regex", "e", None),
    ),
    "name-over-regex": (("module_name_regex", "d.*", True), ("module_name", "d.a", None)),
    "name-none-over-regex": (ALL, ("module_name_regex", "d.*", True), ("module_name", "d", None)),
    "order-over-name": (
        ("module_name", "d", True),
        ("module_name_object_type_order", "d", nn.Conv2d, 0, None),
    ),
    "order-over-none": (
        ALL,
        ("module_name", "d", None),
        ("module_name_object_type_order", "d", nn.Conv2d, 1, True),
    ),
}


@pytest.mark.statement("S3.1a")
@pytest.mark.parametrize("case", PRECEDENCE)
def test_stronger_rules_win_and_none_is_a_value(peers: Peers, case: str) -> None:
    peers.compare(blocks(), (X,), rules(*PRECEDENCE[case]))


class Convolution(nn.Conv2d):
    """A class of its own."""


TYPES: dict[str, tuple[nn.Module, tuple[tuple[Any, ...], ...]]] = {
    "exact-class": (
        Calls(lambda s, x: s.b(s.a(x)), a=Convolution(3, 3, 3), b=conv()),
        (("object_type", nn.Conv2d, True),),
    ),
    "function": (
        Calls(lambda s, x: torch.add(s.a(x) + s.b(x), s.a(x)), a=conv(), b=conv()),
        (ALL, ("object_type", torch.add, None)),
    ),
    "operator": (
        Calls(lambda s, x: torch.add(s.a(x) + s.b(x), s.a(x)), a=conv(), b=conv()),
        (ALL, ("object_type", operator.add, None)),
    ),
    "method": (
        Calls(lambda s, x: F.max_pool2d(s.a(x).clamp(0, 1), 2), a=conv()),
        (("object_type", "clamp", True),),
    ),
    "method-none": (
        Calls(lambda s, x: F.gelu(s.a(x).clamp(0, 1)), a=conv()),
        (ALL, ("object_type", "clamp", None)),
    ),
}


@pytest.mark.statement("S3.2a")
@pytest.mark.parametrize("case", TYPES)
def test_types_of_modules_functions_and_methods(peers: Peers, case: str) -> None:
    model, calls = TYPES[case]
    reads_conv_twice = case in ("function", "operator")
    peers.compare(model, (X,), rules(*calls), lowered_alike=not reads_conv_twice)
    if case == "exact-class":
        peers.compare(model, (X,), rules(ALL))


SCOPES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "name": (ALL, ("module_name", "d", None)),
    "regex": (ALL, ("module_name_regex", "d$", None)),
    "class": (("object_type", Block, True),),
    "class-none": (ALL, ("object_type", Block, None)),
    "class-and-function": (("object_type", Block, True), ("object_type", operator.add, None)),
    "function-and-class": (("object_type", operator.add, True), ("object_type", Block, None)),
    "class-and-name": (ALL, ("object_type", Block, None), ("module_name", "e", True)),
}


@pytest.mark.statement("S3.2b", "S3.3b")
@pytest.mark.parametrize("case", SCOPES)
def test_functions_obey_the_module_around_them(peers: Peers, case: str) -> None:
    peers.compare(blocks(), (X,), rules(*SCOPES[case]), lowered_alike=case != "class-none")


@pytest.mark.statement("S3.3b")
def test_the_class_of_a_container_does_not_reach_its_modules(peers: Peers) -> None:
    model = nn.Sequential(nn.Sequential(conv(), nn.Hardswish()), conv()).eval()
    done = peers.compare(model, (X,), rules(ALL, ("object_type", nn.Sequential, None)), quantizes=1)
    assert len(placement(done.ours.prepared)) == 4


NAMES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "covers": (("module_name", "d", True),),
    "nearest": (ALL, ("module_name", "d", None), ("module_name", "d.a", True)),
    "beats-type-below": (("object_type", nn.Conv2d, None), ("module_name", "d", True)),
    "no-prefix": (ALL, ("module_name", "d.", None), ("module_name", "x", None)),
}


@pytest.mark.statement("S3.3a")
@pytest.mark.parametrize("case", NAMES)
def test_the_nearest_configured_ancestor_governs(peers: Peers, case: str) -> None:
    peers.compare(blocks(), (X,), rules(*NAMES[case]))


REGEXES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "anchored-left": (ALL, ("module_name_regex", "d", None)),
    "not-anchored-right": (ALL, ("module_name_regex", r"d\.", None)),
    "does-not-search": (ALL, ("module_name_regex", "a", None)),
    "first-wins": (ALL, ("module_name_regex", r".*\.a", None), ("module_name_regex", "d.*", True)),
    "first-wins-too": (("module_name_regex", "d.*", True), ("module_name_regex", r".*\.a", None)),
}


@pytest.mark.statement("S3.4a")
@pytest.mark.parametrize("case", REGEXES)
def test_regexes(peers: Peers, case: str) -> None:
    peers.compare(blocks(), (X,), rules(*REGEXES[case]))


def order(scope: str, kind: Any, index: int) -> Build:
    return rules(ALL, ("module_name_object_type_order", scope, kind, index, None))


ORDERS: dict[str, tuple[nn.Module, Build]] = {
    "second-of-a-scope": (blocks(), order("d", nn.Conv2d, 1)),
    "function": (blocks(), order("e", operator.add, 0)),
    "the-root-has-none": (blocks(), order("", nn.Conv2d, 0)),
    "root": (Calls(lambda s, x: s.b(s.a(x)), a=conv(), b=conv()), order("", nn.Conv2d, 1)),
    "second-call-of-one": (
        Calls(lambda s, x: s.a(s.b(s.a(x))), a=conv(), b=conv()),
        order("", nn.Conv2d, 1),
    ),
    "in-a-scope-that-is-called-twice": (
        Calls(lambda s, x: s.d(s.d(x)), d=nn.Sequential(conv())),
        order("d", nn.Conv2d, 1),
    ),
}


@pytest.mark.statement("S3.5a")
@pytest.mark.parametrize("case", ORDERS)
def test_calls_are_counted_in_their_scope(peers: Peers, case: str) -> None:
    model, mapping = ORDERS[case]
    if case != "in-a-scope-that-is-called-twice":
        peers.compare(model, (X,), mapping, lowered_alike=case != "second-call-of-one")
        return
    # torch.ao rounds the weight for the call in float too: see docs/differences.md.
    theirs, ours = (peers.prepare(names, model, (X,), mapping)[0] for names in (THEIRS, OURS))
    assert placement(ours) == placement(theirs)
    with torch.no_grad():
        run(ours, (X,))
        reference, lowered = peers.convert(OURS, ours)
        calls = [str(node.target) for node in reference.graph.nodes if node.op == "call_module"]
        modules = [reference.get_submodule(path) for path in calls]
        (exact,) = (module for module in modules if "Reference" not in module._get_name())
        assert isinstance(exact, nn.Conv2d)
        assert torch.equal(exact.weight, model.d[0].weight)
        assert steps(lowered) == (1, 0, 1)


def chain(functional: bool) -> nn.Module:
    relu: Any = F.relu if functional else nn.ReLU()
    return Calls(
        lambda s, x: s.b(s.relu(s.norm(s.a(x)))),
        a=conv(),
        b=conv(),
        relu=relu,
        norm=nn.BatchNorm2d(3),
    )


BY_BASE: dict[str, tuple[tuple[Any, ...], ...]] = {
    "base-by-name": (("module_name", "a", True),),
    "base-none-by-name": (ALL, ("module_name", "a", None)),
    "others-by-name": (ALL, ("module_name", "relu", None), ("module_name", "norm", None)),
    "others-alone": (("module_name", "relu", True), ("module_name", "norm", True)),
    "base-by-regex": (ALL, ("module_name_regex", "a", None)),
    "base-by-order": (ALL, ("module_name_object_type_order", "", nn.Conv2d, 0, None)),
    "relu-by-order": (ALL, ("module_name_object_type_order", "", nn.ReLU, 0, None)),
    "both-types": (("object_type", nn.Conv2d, True), ("object_type", nn.ReLU, True)),
}


@pytest.mark.statement("S3.6a")
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("case", BY_BASE)
def test_fused_ops_have_the_qconfig_of_their_base(
    peers: Peers, case: str, functional: bool
) -> None:
    peers.compare(chain(functional), (X,), rules(*BY_BASE[case]))


@pytest.mark.statement("S3.6a")
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU])
def test_types_of_a_fused_op_must_agree(peers: Peers, kind: type, functional: bool) -> None:
    text = (
        "During fusion, we need to specify the same qconfigs for all module types in .* offending"
    )
    for names in (THEIRS, OURS):
        with quiet(), pytest.raises(LookupError, match=text):
            peers.prepare(names, chain(functional), (X,), rules(("object_type", kind, True)))
    peers.compare(chain(functional), (X,), rules(ALL))


@pytest.mark.statement("S3.6b")
def test_equal_qconfigs_are_the_same(peers: Peers) -> None:
    def mapping(names: Names) -> Any:
        made = [
            names.QConfig(
                activation=names.MinMaxObserver.with_args(quant_max=127, quant_min=0),
                weight=names.default_weight_observer,
            )
            for _ in range(2)
        ]
        if made[0] != made[1]:  # factories of equal arguments are not equal: share them
            made[1] = names.QConfig(activation=made[0].activation, weight=made[0].weight)
        found = names.QConfigMapping().set_object_type(nn.Conv2d, made[0])
        return found.set_object_type(nn.ReLU, made[1])

    peers.compare(chain(functional=False), (X,), mapping)


@pytest.mark.statement("S3.7a", "S3.7b")
@pytest.mark.parametrize("keep", [False, True])
def test_modules_carry_their_qconfig(peers: Peers, keep: bool) -> None:
    model = nn.Sequential(conv(), nn.Hardswish(), nn.GELU()).eval()
    mapping = rules(ALL, ("module_name", "2", None))
    options = {"_remove_qconfig": False} if keep else {}
    done = peers.compare(model, (X,), mapping, convert=lambda _: options)
    for names, side in ((THEIRS, done.theirs), (OURS, done.ours)):
        wanted = peers.configs(names).default_qconfig
        for path in ("0", "1"):
            found = side.prepared.get_submodule(path).qconfig
            assert found.activation().dtype == wanted.activation().dtype
            assert found.weight().qscheme == wanted.weight().qscheme
        assert side.prepared.get_submodule("2").qconfig is None
        kept = side.reference  # ours calls functions once it is lowered
        assert any(hasattr(module, "qconfig") for module in kept.modules()) == keep
        if not keep:
            assert not any(hasattr(module, "qconfig") for module in side.lowered.modules())


FIXED: dict[str, Any] = {
    "sigmoid-module": (lambda s, x: s.part(s.a(x)), nn.Sigmoid()),
    "sigmoid": (lambda s, x: torch.sigmoid(s.a(x)), None),
    "sigmoid-method": (lambda s, x: s.a(x).sigmoid(), None),
    "hardsigmoid-module": (lambda s, x: s.part(s.a(x)), nn.Hardsigmoid()),
    "hardsigmoid": (lambda s, x: F.hardsigmoid(s.a(x)), None),
    "tanh-module": (lambda s, x: s.part(s.a(x)), nn.Tanh()),
    "tanh": (lambda s, x: torch.tanh(s.a(x)), None),
    "tanh-method": (lambda s, x: s.a(x).tanh(), None),
    "softmax-module": (lambda s, x: s.part(s.a(x)), nn.Softmax(1)),
}
IN_PLACE: dict[str, Any] = {
    "sigmoid_": (lambda s, x: s.a(x).sigmoid_(), None),
    "tanh_": (lambda s, x: s.a(x).tanh_(), None),
}
NO_FIXED = "QConfig must specify a FixedQParamsObserver or a FixedQParamsFakeQuantize for fixed"


def fixed_model(case: str) -> nn.Module:
    function, part = {**FIXED, **IN_PLACE}[case]
    return Calls(function, a=conv(), part=part)


@pytest.mark.statement("S3.8a")
@pytest.mark.parametrize("case", FIXED)
def test_fixed_parameters_want_their_observers(peers: Peers, case: str) -> None:
    peers.compare(fixed_model(case), (X,), quantizes=1)
    done = peers.compare(fixed_model(case), (X,), everywhere("default_qconfig"), quantizes=1)
    for side in (done.theirs, done.ours):
        assert any(NO_FIXED in w for w in side.warned)
        assert len(placement(side.prepared)) == 2


@pytest.mark.statement("S3.5a")
def test_rules_for_calls_of_a_method(peers: Peers) -> None:
    """torch.ao passes over them: see docs/differences.md."""
    model = Calls(lambda s, x: s.a(x).clamp(-1, 1).clamp(0, 1), a=conv())
    mapping = order("", "clamp", 1)
    theirs, _ = peers.prepare(THEIRS, model, (X,), mapping)
    assert placement(theirs) == placement(peers.prepare(THEIRS, model, (X,), rules(ALL))[0])
    ours, _ = peers.prepare(OURS, model, (X,), mapping)
    assert placement(ours) == placement(theirs)[:-1]


@pytest.mark.statement("S3.8a")
@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_methods_of_fixed_parameters_run(peers: Peers, case: str) -> None:
    """torch.ao converts them to calls that have no kernel: see docs/differences.md."""
    model = fixed_model(case)
    made = {names.library: peers.prepare(names, model, (X,))[0] for names in (THEIRS, OURS)}
    assert placement(made["fxquant"]) == placement(made["torch.ao"])
    expected = run(made["torch.ao"], (X,))
    run(made["fxquant"], (X,))
    _, lowered = peers.convert(OURS, made["fxquant"])
    assert steps(lowered) == (1, 0, 1)
    assert float((run(lowered, (X,)) - expected).abs().max()) < 0.05
    _, theirs = peers.convert(THEIRS, made["torch.ao"])
    with pytest.raises(NotImplementedError):
        run(theirs, (X,))


@pytest.mark.statement("S3.8b")
@pytest.mark.parametrize("qconfig", ["default_qconfig", "default_dynamic_qconfig"])
def test_an_empty_backend_config_quantizes_nothing(peers: Peers, qconfig: str) -> None:
    model = Calls(lambda s, x: torch.sigmoid(s.l(s.a(x))), a=conv(), l=linear(6, 6))
    for mapping in (everywhere(qconfig), default_mapping):
        done = peers.compare(model, (X,), mapping, backend=lambda names: names.BackendConfig())
        for side in (done.theirs, done.ours):
            assert placement(side.prepared) == []
            assert not any(NO_FIXED in w for w in side.warned)
    peers.compare(model, (X,), quantizes=1)


def with_range(**bounds: Any) -> Build:
    """A backend that has linear with the given constraints on activations."""

    def backend(names: Names) -> Any:
        activation = names.DTypeWithConstraints(dtype=torch.quint8, **bounds)
        weight = names.DTypeWithConstraints(dtype=torch.qint8)
        dtypes = names.DTypeConfig(activation, activation, weight, torch.float)
        pattern = names.BackendPatternConfig(nn.Linear).set_dtype_configs([dtypes])
        pattern.set_observation_type(names.ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        if hasattr(pattern, "set_root_module"):
            import torch.ao.nn.quantized.reference as nnqr

            pattern.set_root_module(nn.Linear).set_reference_quantized_module(nnqr.Linear)
        return names.BackendConfig("mine").set_backend_pattern_config(pattern)

    return backend


def observed_by(**options: Any) -> Build:
    def mapping(names: Names) -> Any:
        qconfig = names.QConfig(
            activation=names.MinMaxObserver.with_args(**options),
            weight=names.default_weight_observer,
        )
        return names.QConfigMapping().set_global(qconfig)

    return mapping


RANGE = "QConfig activation quantization range must fall within the backend's"
FITS: dict[str, tuple[Build, Build, bool, str]] = {
    "no-bounds": (with_range(), observed_by(quant_min=0, quant_max=127), True, ""),
    "inside": (
        with_range(quant_min_lower_bound=0, quant_max_upper_bound=127),
        observed_by(quant_min=0, quant_max=127),
        True,
        "",
    ),
    "narrower": (
        with_range(quant_min_lower_bound=0, quant_max_upper_bound=200),
        observed_by(reduce_range=True),
        True,
        "",
    ),
    "wider": (
        with_range(quant_min_lower_bound=0, quant_max_upper_bound=127),
        observed_by(quant_min=0, quant_max=255),
        False,
        RANGE,
    ),
    "below": (
        with_range(quant_min_lower_bound=5, quant_max_upper_bound=255),
        observed_by(quant_min=0, quant_max=255),
        False,
        RANGE,
    ),
    "eps": (
        with_range(scale_min_lower_bound=2**-12),
        observed_by(eps=2**-12),
        True,
        "",
    ),
    "eps-too-small": (
        with_range(scale_min_lower_bound=2**-12),
        observed_by(eps=2**-13),
        False,
        "must be greater than or equal to the backend's min scale value",
    ),
    "dtype": (with_range(), observed_by(dtype=torch.qint8), False, ""),
}


@pytest.mark.statement("S3.9a")
@pytest.mark.parametrize("case", FITS)
def test_a_qconfig_must_fit_the_backend(peers: Peers, case: str) -> None:
    backend, mapping, fits, warning = FITS[case]
    model = nn.Sequential(linear()).eval()
    options = {"convert": lambda names: {"backend_config": backend(names)}}
    done = peers.compare(model, (X,), mapping, backend=backend, **options)
    for side in (done.theirs, done.ours):
        assert bool(placement(side.prepared)) == fits
        if warning:
            assert any(warning in w for w in side.warned)
    if not fits:
        peers.compare(model, (X,), observed_by())


@pytest.mark.statement("S3.9b")
@pytest.mark.parametrize(
    "qconfig",
    ["default_symmetric_qnnpack_qconfig", "default_per_channel_symmetric_qnnpack_qconfig"],
)
def test_defaults_of_qnnpack_fit_its_backend_config(peers: Peers, qconfig: str) -> None:
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), linear(3, 3)).eval()
    backend = THEIRS.get_qnnpack_backend_config()
    options: dict[str, Any] = {"convert": lambda _: {"backend_config": backend}}
    for names in (THEIRS, OURS):
        prepared, warned = peers.prepare(
            names, model, (X,), everywhere(qconfig), backend=lambda _: backend
        )
        assert len(placement(prepared)) == 4
        assert not any("QConfig activation" in w for w in warned)
    peers.compare(
        model, (X,), everywhere(qconfig), **options, backend=lambda _: backend, lowered_alike=False
    )


SWITCHES: dict[str, Any] = {
    "nothing": lambda mapping: mapping,
    "type": lambda mapping: mapping.set_object_type(nn.Linear, None),
    "name": lambda mapping: mapping.set_module_name("0", None),
    "in-the-middle": lambda mapping: mapping.set_module_name("1", None),
    "a-mover": lambda mapping: mapping.set_module_name("3", None),
    "absent-key": lambda mapping: mapping.set_module_name("nowhere", None),
}


@pytest.mark.statement("S3.10a", "S3.10b")
@pytest.mark.parametrize("case", SWITCHES)
def test_convert_may_switch_off(peers: Peers, case: str) -> None:
    model = nn.Sequential(conv(), conv(), linear(4, 4), nn.MaxPool2d(2)).eval()
    peers.compare(
        model,
        (X,),
        convert=lambda names: {"qconfig_mapping": SWITCHES[case](default_mapping(names))},
    )


@pytest.mark.statement("S3.10a")
def test_convert_may_not_switch_to_something_else(peers: Peers) -> None:
    model = nn.Sequential(conv(), linear(6, 6)).eval()
    for names in (THEIRS, OURS):
        configs = peers.configs(names)
        with quiet():
            prepared, _ = peers.prepare(names, model, (X,), everywhere("default_qconfig"))
            other = configs.QConfigMapping().set_global(configs.default_per_channel_qconfig)
            with pytest.raises(
                AssertionError, match=r"Expected .*global.* qconfigs? to be the same"
            ):
                names.convert_fx(prepared, qconfig_mapping=other)
    peers.compare(model, (X,))
