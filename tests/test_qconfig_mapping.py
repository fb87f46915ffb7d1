"""QConfigMapping: its forms, its precedence, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import operator
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigError, UnknownKeyError
from fxquant.fake_quantize import FixedQParamsFakeQuantize
from fxquant.observers import FixedQParamsObserver, HistogramObserver, MinMaxObserver
from fxquant.qconfig import (
    QConfig,
    default_qconfig,
    default_reuse_input_qconfig,
    get_default_qconfig,
)
from fxquant.qconfig_mapping import (
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    normalize,
    resolve,
    rule_text,
)


def numbered(number: int) -> QConfig:
    """A qconfig that can be told from others by its ``quant_max``."""
    return QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=number), None)


A, B, C, D, E = (numbered(n) for n in range(1, 6))


def full_mapping() -> QConfigMapping:
    return (
        QConfigMapping()
        .set_global(A)
        .set_object_type(nn.Linear, B)
        .set_module_name_regex(r"layer\d", C)
        .set_module_name("layer1.0", D)
        .set_module_name_object_type_order("layer1.0", nn.Linear, 1, E)
    )


# ---------------------------------------------------------------------------------- precedence


@pytest.mark.parametrize(
    ("subject", "qconfig", "rule"),
    [
        ({"module_path": "head", "target_types": (nn.Conv2d,)}, A, "global"),
        ({"module_path": "head", "target_types": (nn.Linear,)}, B, "object_type torch.nn.Linear"),
        (
            {"module_path": "layer2.3", "target_types": (nn.Linear,)},
            C,
            r"module_name_regex 'layer\\d'",
        ),
        (
            {"module_path": "layer1.0", "target_types": (nn.Linear,)},
            D,
            "module_name 'layer1.0'",
        ),
        (
            {"module_path": "layer1.0.fc", "target_types": (nn.Linear,)},
            D,
            "module_name 'layer1.0'",
        ),
        (
            {
                "module_path": "layer1.0.fc",
                "target_types": (nn.Linear,),
                "order_index": (("layer1.0", nn.Linear, 1),),
            },
            E,
            "module_name_object_type_order ('layer1.0', torch.nn.Linear, 1)",
        ),
        (
            {
                "module_path": "layer1.0.fc",
                "target_types": (nn.Linear,),
                "order_index": (("layer1.0", nn.Linear, 0),),
            },
            D,
            "module_name 'layer1.0'",
        ),
    ],
)
def test_precedence(subject: dict[str, Any], qconfig: QConfig, rule: str) -> None:
    found = resolve(full_mapping(), **subject)
    assert found.qconfig == qconfig
    assert found.rule == rule


def test_none_wins_over_weaker_levels_and_loses_to_stronger_ones() -> None:
    mapping = full_mapping().set_object_type(nn.Linear, None)
    assert resolve(mapping, module_path="head", target_types=(nn.Linear,)).qconfig is None
    assert resolve(mapping, module_path="layer1.0", target_types=(nn.Linear,)).qconfig == D
    mapping.set_module_name("layer1.0.fc", None)
    assert resolve(mapping, module_path="layer1.0.fc").qconfig is None
    assert resolve(mapping, module_path="layer1.0.fc").rule == "module_name 'layer1.0.fc'"


def test_no_rule_leaves_an_op_in_float() -> None:
    found = resolve(QConfigMapping(), module_path="a", target_types=(nn.Linear,))
    assert (found.qconfig, found.rule, found.matched_keys) == (None, "no rule", ())


def test_the_nearest_ancestor_wins() -> None:
    mapping = QConfigMapping().set_module_name("sub.a", A).set_module_name("sub", B)
    assert resolve(mapping, module_path="sub.a.b").qconfig == A
    assert resolve(mapping, module_path="sub.ab").qconfig == B
    assert resolve(mapping, module_path="subway").qconfig is None
    assert resolve(mapping, module_path="").qconfig is None


def test_regexes_are_anchored_left_and_the_first_match_wins() -> None:
    mapping = QConfigMapping().set_module_name_regex("b", A).set_module_name_regex("a.*c", B)
    mapping.set_module_name_regex("a", C)
    assert resolve(mapping, module_path="abc").qconfig == B
    assert resolve(mapping, module_path="ab").qconfig == C
    assert resolve(mapping, module_path="cb").qconfig is None
    mapping.set_module_name_regex("b", D)  # keeps its place
    assert list(mapping.module_name_regex_qconfigs) == ["b", "a.*c", "a"]


def test_the_class_of_the_scope_beats_the_function() -> None:
    mapping = QConfigMapping().set_object_type(F.linear, A).set_object_type(nn.Bilinear, B)
    subject: dict[str, Any] = {"module_path": "h", "target_types": (F.linear,)}
    assert resolve(mapping, **subject).qconfig == A
    assert resolve(mapping, scope_types=(nn.Bilinear,), **subject).qconfig == B
    assert resolve(mapping, scope_types=(nn.ReLU,), **subject).qconfig == A


def test_of_several_types_the_first_wins() -> None:
    mapping = QConfigMapping().set_object_type(torch.add, A).set_object_type(operator.add, B)
    found = resolve(mapping, module_path="", target_types=(operator.add, torch.add))
    assert found.qconfig == B
    assert found.rule == "object_type operator.add"


def test_methods_are_named_by_strings() -> None:
    mapping = QConfigMapping().set_object_type("sigmoid", A)
    assert resolve(mapping, module_path="", target_types=("sigmoid",)).rule == (
        "object_type 'sigmoid'"
    )


def test_every_rule_that_matches_is_reported() -> None:
    found = resolve(
        full_mapping(),
        module_path="layer1.0.fc",
        target_types=(nn.Linear,),
        order_index=(("layer1.0", nn.Linear, 1),),
    )
    assert found.matched_keys == (
        ("global", ""),
        ("object_type", nn.Linear),
        ("module_name_regex", r"layer\d"),
        ("module_name", "layer1.0"),
        ("module_name_object_type_order", ("layer1.0", nn.Linear, 1)),
    )


def test_subjects_that_cannot_be_hashed_match_nothing() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

    found = resolve(full_mapping(), module_path="", target_types=(Unhashable(),))
    assert found.rule == "global"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (nn.Conv2d, "torch.nn.Conv2d"),
        (F.relu, "torch.nn.functional.relu"),
        (torch.sigmoid, "torch.sigmoid"),
        (torch.add, "torch.add"),
        (operator.add, "operator.add"),
        ("sigmoid_", "'sigmoid_'"),
        (F.conv2d, "torch.nn.functional.conv2d"),
    ],
)
def test_types_are_named_as_people_write_them(key: object, text: str) -> None:
    assert rule_text("object_type", key) == f"object_type {text}"


# ------------------------------------------------------------------------------------- forms


def test_legacy_dicts_round_trip() -> None:
    mapping = full_mapping()
    as_dict = mapping.to_dict()
    assert list(as_dict) == [
        "",
        "object_type",
        "module_name_regex",
        "module_name",
        "module_name_object_type_order",
    ]
    assert as_dict["module_name_object_type_order"] == [("layer1.0", nn.Linear, 1, E)]
    assert QConfigMapping.from_dict(as_dict) == mapping
    assert normalize(as_dict) == mapping
    assert normalize({"": A, "object_type": [(nn.Linear, None)]}) == (
        QConfigMapping().set_global(A).set_object_type(nn.Linear, None)
    )
    assert normalize({"object_type": {nn.Linear: A}}) == QConfigMapping().set_object_type(
        nn.Linear, A
    )


def test_flat_dicts() -> None:
    flat = {"": A, "layer1.0.conv1": None, nn.Linear: B, F.relu: C}
    expected = (
        QConfigMapping()
        .set_global(A)
        .set_module_name("layer1.0.conv1", None)
        .set_object_type(nn.Linear, B)
        .set_object_type(F.relu, C)
    )
    assert normalize(flat) == expected


def test_other_forms() -> None:
    mapping = full_mapping()
    assert normalize(mapping) is mapping
    assert normalize({}) == normalize(None) == QConfigMapping()
    assert normalize({"": None}) == QConfigMapping()
    assert normalize(A) == QConfigMapping().set_global(A)


@pytest.mark.parametrize(
    ("given_", "error", "text"),
    [
        (
            {"modul_name": [("a", A)]},
            UnknownKeyError,
            "unknown key 'modul_name'; known are '', 'object_type', 'module_name_regex', "
            "'module_name', 'module_name_object_type_order'; did you mean 'module_name'",
        ),
        ({"object_type": [], "layer1": A}, UnknownKeyError, "unknown key 'layer1'"),
        ({"layer1": 3}, ConfigError, "module_name 'layer1' needs a QConfig or None, got 3"),
        ({nn.Linear: "int8"}, ConfigError, "object_type torch.nn.Linear needs a QConfig or None"),
        ({"": MinMaxObserver}, ConfigError, "the global rule needs a QConfig or None"),
        ({3: A}, ConfigError, "key 3 is no module path, type or function"),
        ({"object_type": A}, ConfigError, "'object_type' needs a list of (key, qconfig)"),
        ({"object_type": [A]}, ConfigError, "'object_type' needs a list of (key, qconfig), but"),
        ({"module_name": [("a",)]}, ConfigError, "but holds ('a',)"),
        (
            {"module_name_object_type_order": [("a", nn.Linear, A)]},
            ConfigError,
            "needs a list of (path, type, index, qconfig)",
        ),
        ({"module_name_regex": [("(", A)]}, ConfigError, "'(' is no regular expression"),
        ([("a", A)], ConfigError, "needs a QConfigMapping, a dict or a QConfig, got list"),
    ],
)
def test_what_cannot_be_read_is_refused(
    given_: object, error: type[ConfigError], text: str
) -> None:
    with pytest.raises(error) as caught:
        normalize(given_)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("setter", "arguments", "text"),
    [
        ("set_object_type", (3, A), "needs a module class, a function or a method name, got 3"),
        ("set_object_type", (nn.ReLU(), A), "needs a class, got an instance of ReLU"),
        ("set_module_name", (nn.ReLU, A), "module_name needs a path"),
        ("set_module_name", ("a", 3), "module_name 'a' needs a QConfig or None, got 3"),
        ("set_module_name_regex", (3, A), "needs a regular expression, got 3"),
        ("set_module_name_object_type_order", ("a", nn.ReLU, -1, A), "got ('a', "),
        ("set_module_name_object_type_order", (nn.ReLU, "a", 0, A), "(path, type, index from 0)"),
    ],
)
def test_setters_refuse_other_types(setter: str, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(QConfigMapping(), setter)(*arguments)
    assert text in str(caught.value)


# ------------------------------------------------------------------------------------ values


def test_mappings_are_compared_by_value() -> None:
    assert full_mapping() == full_mapping()
    assert full_mapping() != full_mapping().set_module_name("x", None)
    assert full_mapping() != "a mapping"
    in_order = QConfigMapping().set_module_name_regex("a", A).set_module_name_regex("b", B)
    reversed_ = QConfigMapping().set_module_name_regex("b", B).set_module_name_regex("a", A)
    assert in_order != reversed_
    assert copy.deepcopy(full_mapping()) == full_mapping()
    assert pickle.loads(pickle.dumps(full_mapping())) == full_mapping()


def test_repr_has_a_line_per_rule() -> None:
    text = repr(QConfigMapping().set_object_type(nn.Linear, None).set_module_name("a", A))
    assert text.splitlines() == [
        "QConfigMapping (",
        "  global: None",
        "  object_type:",
        "    torch.nn.Linear: None",
        "  module_name:",
        f"    'a': {A!r}",
        ")",
    ]


# ---------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("backend", ["x86", "x86-compat", "fbgemm", "onednn", "qnnpack"])
def test_default_mappings(backend: str) -> None:
    ptq, qat = get_default_qconfig_mapping(backend), get_default_qat_qconfig_mapping(backend)
    for mapping, fixed in ((ptq, FixedQParamsObserver), (qat, FixedQParamsFakeQuantize)):
        assert mapping.is_default
        assert mapping.default_object_types == set(mapping.object_type_qconfigs)
        for kind in (nn.Sigmoid, torch.sigmoid, "sigmoid", "sigmoid_", nn.Softmax, F.hardsigmoid):
            qconfig = mapping.object_type_qconfigs[kind]
            assert qconfig is not None
            made = qconfig.activation()
            assert isinstance(made, fixed)
            assert made.spec.fixed == (1 / 256, 0)
        tanh = mapping.object_type_qconfigs["tanh_"]
        assert tanh is not None
        assert tanh.activation().spec.fixed == (1 / 128, 128)
        assert mapping.object_type_qconfigs["reshape"] == default_reuse_input_qconfig
        transposed = mapping.object_type_qconfigs[nn.ConvTranspose2d]
        assert transposed is not None
        assert transposed.weight().spec.short() == "int8 sym -128..127"
    assert ptq.global_qconfig == get_default_qconfig(backend)
    assert isinstance(get_default_qconfig(backend).activation(), HistogramObserver)


def test_a_rule_that_the_user_adds_to_the_defaults_is_his() -> None:
    mapping = get_default_qconfig_mapping()
    mapping.set_object_type(nn.Sigmoid, None).set_object_type(nn.Linear, None)
    assert nn.Sigmoid not in mapping.default_object_types
    assert nn.Linear not in mapping.default_object_types
    assert nn.Tanh in mapping.default_object_types


def test_unknown_backends_are_refused() -> None:
    for get in (get_default_qconfig_mapping, get_default_qat_qconfig_mapping):
        with pytest.raises(AssertionError, match="not supported"):
            get("no such")


# -------------------------------------------------------------------------------------- peer


def peer_module() -> Any:
    return importlib.import_module("torch.ao.quantization")


@pytest.mark.peer
def test_mappings_of_torch_ao_are_read() -> None:
    peer = peer_module()
    theirs = (
        peer.QConfigMapping()
        .set_global(peer.default_qconfig)
        .set_object_type(nn.Linear, None)
        .set_module_name_regex("a.*", peer.default_dynamic_qconfig)
        .set_module_name("b", None)
        .set_module_name_object_type_order("c", F.relu, 1, None)
    )
    ours = normalize(theirs)
    assert ours.global_qconfig == QConfig(*peer.default_qconfig)
    assert ours.object_type_qconfigs == {nn.Linear: None}
    assert list(ours.module_name_regex_qconfigs) == ["a.*"]
    assert ours.module_name_qconfigs == {"b": None}
    assert ours.module_name_object_type_order_qconfigs == {("c", F.relu, 1): None}
    assert not ours.is_default


@pytest.mark.peer
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_the_default_mapping_of_torch_ao_is_recognised(backend: str) -> None:
    peer = peer_module()
    theirs = peer.get_default_qconfig_mapping(backend)
    ours = get_default_qconfig_mapping()
    assert set(ours.object_type_qconfigs) >= set(theirs.object_type_qconfigs)
    read = normalize(theirs)
    assert read.is_default
    assert read.default_object_types == set(theirs.object_type_qconfigs)
    assert normalize(theirs.to_dict()).is_default


class Scope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = Scope()

    def forward(self, x: Tensor) -> Tensor:
        return self.h(x)


class WithModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


#: Each a chain of setters; the qconfigs are numbers for ``quant_max``, or None.
RULES: list[list[tuple[Any, ...]]] = [
    [("global", 9)],
    [("global", 9), ("object_type", F.linear, 1), ("object_type", Scope, 2)],
    [("object_type", Scope, None), ("object_type", F.linear, 1)],
    [("global", 9), ("object_type", nn.Linear, None)],
    [("global", 9), ("object_type", nn.Sequential, 3)],
    [("object_type", F.linear, 1), ("module_name_regex", "h", 2), ("module_name_regex", ".*", 3)],
    [("module_name_regex", "0", 1), ("module_name_regex", r"a\.0\.0$", 2)],
    [("module_name", "a", 1), ("module_name", "a.0", 2), ("object_type", nn.Linear, 3)],
    [("module_name_regex", "a.*", 1), ("module_name", "a", None)],
    [("global", 9), ("module_name", "", 1)],
    [("module_name", "h", None), ("module_name_object_type_order", "h", F.linear, 0, 2)],
    [("global", 9), ("module_name_object_type_order", "a.0", nn.Linear, 0, 2)],
    [("global", 9), ("module_name_object_type_order", "a", nn.Linear, 0, 2)],
    [("global", 9), ("module_name_object_type_order", "", nn.Linear, 0, 2)],
]


@pytest.mark.peer
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_resolution_is_that_of_torch_ao(rules: list[tuple[Any, ...]]) -> None:
    peer = peer_module()
    ours, theirs = QConfigMapping(), peer.QConfigMapping()
    for level, *key, number in rules:
        getattr(ours, f"set_{level}")(*key, None if number is None else numbered(number))
        qconfig = number and peer.QConfig(
            peer.MinMaxObserver.with_args(quant_min=0, quant_max=number),
            peer.default_weight_observer,
        )
        getattr(theirs, f"set_{level}")(*key, qconfig)
    prepare = importlib.import_module("torch.ao.quantization.quantize_fx").prepare_fx

    def peer_choice(model: nn.Module) -> int | None:
        """What the observer behind the only op was made from."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = prepare(model.eval(), theirs, (torch.ones(1, 4),))
        output = next(node for node in prepared.graph.nodes if node.op == "output").args[0]
        if "activation_post_process" not in str(output.target):
            return None
        return int(prepared.get_submodule(output.target).quant_max)

    def our_choice(**subject: Any) -> int | None:
        qconfig = resolve(ours, **subject).qconfig
        return None if qconfig is None else int(qconfig.activation().quant_max)

    function = our_choice(
        module_path="h",
        target_types=(F.linear,),
        scope_types=(Scope,),
        order_index=(("h", F.linear, 0),),
    )
    assert function == peer_choice(WithFunction())
    module = our_choice(
        module_path="a.0.0",
        target_types=(nn.Linear,),
        order_index=(("a.0", nn.Linear, 0),),
    )
    assert module == peer_choice(WithModule())


def test_default_qconfig_is_no_mapping() -> None:
    assert normalize(default_qconfig).global_qconfig == default_qconfig
