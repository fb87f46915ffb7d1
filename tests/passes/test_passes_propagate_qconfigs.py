"""propagate-qconfigs: which rule governs which op, by the known precedence, and complaints."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import (
    ConfigWarning,
    StrictModeError,
    UnmatchedRuleError,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observers import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from fxquant.pass_manager import fingerprint
from fxquant.passes.propagate_qconfigs import PropagateQConfigs
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from fxquant.quantize_fx import prepare_fx
from tests.passes.helpers import (
    captured,
    context,
    node_named,
    observers,
    propagate,
    reasons,
    run_alone,
)

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)
B = QConfig(HistogramObserver, WEIGHT)
C = QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=127), WEIGHT)


class Block(nn.Module):
    """Modules, functions and a method inside a scope."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x))
        y = self.conv2(y)
        y = y.relu()
        return x + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layer3 = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.layer3(x)
        return self.fc(x.mean((2, 3)))


IMAGES = torch.randn(1, 3, 4, 4)


def governed(mapping: object) -> dict[str, tuple[QConfig | None, str]]:
    """Node -> qconfig and rule."""
    model = Net().eval()
    gm = captured(model, IMAGES)
    run_alone(propagate(model, mapping), gm)
    found = {}
    for node in gm.graph.nodes:
        if node.op.startswith("call_"):
            record = record_of(node)
            found[node.name] = (record.qconfig, record.rule)
    return found


PRECEDENCE: dict[str, tuple[dict[str, Any], dict[str, tuple[QConfig | None, str]]]] = {
    "global": (
        {"": A},
        {"stem": (A, "global"), "relu": (A, "global"), "layer3_0_conv1": (A, "global")},
    ),
    "no rule": ({"object_type": [(nn.Linear, A)]}, {"stem": (None, "no rule")}),
    "object type beats global": (
        {"": A, "object_type": [(nn.Conv2d, B), (F.relu, C), ("relu", None), (operator.add, B)]},
        {
            "stem": (B, "object_type torch.nn.Conv2d"),
            "fc": (A, "global"),
            "relu": (C, "object_type torch.nn.functional.relu"),
            "relu_2": (None, "object_type 'relu'"),
            "add": (B, "object_type operator.add"),
        },
    ),
    "regex beats object type, the first that matches wins": (
        {
            "": A,
            "object_type": [(nn.Conv2d, B)],
            "module_name_regex": [(r"layer3\.\d+\.conv1", C), ("layer3", None)],
        },
        {
            "stem": (B, "object_type torch.nn.Conv2d"),
            "layer3_0_conv1": (C, r"module_name_regex 'layer3\\.\\d+\\.conv1'"),
            "layer3_1_conv2": (None, "module_name_regex 'layer3'"),
            "add_1": (None, "module_name_regex 'layer3'"),
        },
    ),
    "a regex is anchored on the left only": (
        {"": A, "module_name_regex": [("layer", B), (".*conv2", C)]},
        {"layer3_0_conv2": (B, "module_name_regex 'layer'"), "stem": (A, "global")},
    ),
    "a name beats a regex, and a type below it": (
        {
            "": A,
            "object_type": [(nn.Conv2d, None)],
            "module_name_regex": [("layer3.*", None)],
            "module_name": [("layer3.1", B), ("layer3.1.conv2", C)],
        },
        {
            "layer3_0_conv1": (None, "module_name_regex 'layer3.*'"),
            "layer3_1_conv1": (B, "module_name 'layer3.1'"),
            "layer3_1_conv2": (C, "module_name 'layer3.1.conv2'"),
            "relu_3": (B, "module_name 'layer3.1'"),
            "add_1": (B, "module_name 'layer3.1'"),
        },
    ),
    "the call order beats a name": (
        {
            "": A,
            "module_name": [("layer3", None)],
            "module_name_object_type_order": [
                ("layer3.0", nn.Conv2d, 1, B),
                ("layer3.1", F.relu, 0, C),
                ("", nn.Linear, 0, None),
            ],
        },
        {
            "layer3_0_conv1": (None, "module_name 'layer3'"),
            "layer3_0_conv2": (
                B,
                "module_name_object_type_order ('layer3.0', torch.nn.Conv2d, 1)",
            ),
            "relu_3": (
                C,
                "module_name_object_type_order ('layer3.1', torch.nn.functional.relu, 0)",
            ),
            "fc": (None, "module_name_object_type_order ('', torch.nn.Linear, 0)"),
        },
    ),
    "a container's class reaches its functions, not its modules": (
        {"": A, "object_type": [(Block, B)]},
        {
            "layer3_0_conv1": (A, "global"),
            "relu_1": (B, f"object_type {__name__}.Block"),
            "add": (B, f"object_type {__name__}.Block"),
            "relu": (A, "global"),
        },
    ),
}


@pytest.mark.parametrize("case", PRECEDENCE)
def test_precedence(case: str) -> None:
    mapping, wanted = PRECEDENCE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = governed(mapping)
    assert {name: found[name] for name in wanted} == wanted


def test_flat_dict() -> None:
    found = governed({"": A, "layer3.1.conv2": None, nn.Linear: B})
    assert found["layer3_1_conv2"] == (None, "module_name 'layer3.1.conv2'")
    assert found["fc"] == (B, "object_type torch.nn.Linear")
    assert found["stem"] == (A, "global")


def test_augmented_assignment_is_an_addition() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += x
            y += y
            return y

    for rule, index in ((operator.add, 1), (operator.iadd, 0)):
        order = [("", rule, index, None)]
        model = Adds()
        gm = captured(model, IMAGES)
        run_alone(propagate(model, {"": A, "module_name_object_type_order": order}), gm)
        names = [n.name for n in gm.graph.nodes if record_of(n).rule.startswith("module_name")]
        assert names == [["add", "add_1"][index]]


def test_changes_are_counted_once() -> None:
    model = Net().eval()
    gm = captured(model, IMAGES)
    ops = sum(node.op.startswith("call_") for node in gm.graph.nodes)
    assert run_alone(propagate(model, {"": A}), gm).changes == ops
    before = fingerprint(gm)
    assert run_alone(propagate(model, {"": A}), gm).changes == 0
    assert fingerprint(gm) == before
    assert run_alone(propagate(model, {"": A, "fc": None}), gm).changes == 1


# -- end to end -----------------------------------------------------------------------------------


def prepared(mapping: object, model: nn.Module | None = None) -> QuantGraphModule:
    return prepare_fx(Net().eval() if model is None else model, mapping, (IMAGES,))


def test_none_leaves_the_op_in_floating_point_and_says_the_rule() -> None:
    gm = prepared({"": A, "layer3.1.conv2": None})
    node = node_named(gm, "layer3_1_conv2")
    assert record_of(node).annotation is None
    assert "no qconfig: module_name 'layer3.1.conv2'" in record_of(node).reasons
    assert record_of(node_named(gm, "layer3_0_conv2")).annotation is not None


def test_the_rule_decides_the_observer() -> None:
    gm = prepared({"": A, "module_name": [("fc", B)]})
    made = {value: type(gm.get_submodule(path)) for path, value in observers(gm).items()}
    assert made.pop("mean") is HistogramObserver
    assert set(made.values()) == {MinMaxObserver}


def test_a_rule_on_the_function_of_a_scope_breaks_its_pattern_with_the_reason() -> None:
    order = [("layer3.0", F.relu, 0, None)]
    gm = prepared({"": A, "module_name_object_type_order": order})
    assert record_of(node_named(gm, "layer3_0_conv1")).fusion is None
    said = reasons(gm, "layer3_0_conv1")
    assert (
        "pattern conv2d-relu refused: 'relu_1' is governed by module_name_object_type_order" in said
    )
    assert "'layer3_0_conv1' by global" in said
    other = record_of(node_named(gm, "layer3_1_conv1")).fusion
    assert other is not None
    assert other.pattern == "conv2d-relu"


def test_equal_qconfigs_of_two_rules_make_one_pattern() -> None:
    again = QConfig(MinMaxObserver, WEIGHT.with_args())
    gm = prepared({nn.Conv2d: A, F.relu: again, operator.add: A, nn.Linear: A})
    fused = [record_of(node_named(gm, name)).fusion for name in ("stem", "relu")]
    assert [f.pattern for f in fused if f is not None] == ["conv2d-relu"] * 2


def test_an_op_without_a_rule_follows_the_op_that_it_is_fused_to() -> None:
    gm = prepared({"stem": A})
    relu = record_of(node_named(gm, "relu"))
    assert relu.fusion is not None
    assert (relu.qconfig, relu.rule) == (A, "module_name 'stem'")


# -- complaints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"module_name": [("layer3.1.conv3", A)]},
            r"module_name rule 'layer3\.1\.conv3' matches no module of the model; did you mean"
            r" .*'layer3\.1\.conv2'",
        ),
        ({"layer3.1.conv22": A}, r"did you mean 'layer3\.1\.conv2'"),
        ({"": A, "relu": A}, r"'relu' .*; the name of a method goes under object_type"),
        (
            {"module_name_regex": [(r"conv\d", A)]},
            r"module_name_regex rule 'conv\\\\d' matches no module of the model \(it is matched"
            r" from the start of the path",
        ),
        (
            {"module_name_object_type_order": [("layer3.0", nn.Conv2d, 2, A)]},
            r"module_name_object_type_order rule \('layer3\.0', Conv2d, 2\) matches no call",
        ),
        (
            {"module_name_object_type_order": [("layr3.0", nn.Conv2d, 0, A)]},
            r"matches no call; did you mean .*'layer3\.0'",
        ),
    ],
)
def test_a_rule_that_names_nothing_is_an_error(mapping: Any, message: str) -> None:
    with pytest.raises(UnmatchedRuleError, match=message) as caught:
        prepared(mapping)
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, ValueError)
    assert "Correct the rule or remove it" in str(caught.value)


def test_all_such_rules_are_in_one_message() -> None:
    with pytest.raises(UnmatchedRuleError) as caught:
        prepared({"module_name": [("a", A)], "module_name_regex": [("b", A)]})
    assert "'a'" in str(caught.value)
    assert "'b'" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "name"), [(nn.Conv3d, "Conv3d"), (F.gelu, "gelu"), ("sigmoid", "sigmoid")]
)
def test_a_type_that_matches_nothing_is_a_warning(key: Any, name: str) -> None:
    mapping = QConfigMapping().set_global(A).set_object_type(key, B)
    with pytest.warns(ConfigWarning, match=f"object_type rule '{name}' matches no op of the model"):
        prepared(mapping)
    with pytest.raises(StrictModeError, match=f"'{name}'"):
        prepare_fx(Net().eval(), mapping, (IMAGES,), strict=True)


@pytest.mark.parametrize("mapping", [None, get_default_qconfig_mapping("x86")])
def test_the_types_of_the_default_mapping_are_no_ones_claim(mapping: Any) -> None:
    prepared(mapping)  # a warning would be an error


def test_a_type_added_to_the_default_mapping_is_a_claim() -> None:
    mapping = get_default_qconfig_mapping("x86").set_object_type(nn.Conv3d, A)
    with pytest.warns(ConfigWarning, match="'Conv3d' matches no op"):
        prepared(mapping)


class Unused(Net):
    """Has a branch that evaluation does not take, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4, 2)
        self.other_name = self.fc


@pytest.mark.parametrize("name", ["aux", "other_name"])
def test_a_rule_on_a_module_that_is_not_called_is_a_warning(name: str) -> None:
    with pytest.warns(ConfigWarning, match=f"module_name rule '{name}' governs no op"):
        prepared({"": A, name: B}, Unused().eval())


def test_a_rule_on_what_a_pass_removes_is_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).eval()
    prepare_fx(model, {"": A, "1": A, "2": None}, (IMAGES,))


def test_a_pass_alone_needs_no_paths() -> None:
    gm = captured(Net().eval(), IMAGES)
    mapping = QConfigMapping().set_module_name("fc", A)
    assert PropagateQConfigs(mapping).run(gm, context()).changes > 0


def test_golden(golden: Callable[[str, str], None]) -> None:
    mapping = {"": A, nn.Linear: None, "layer3.0": B, F.relu: C}
    lines = [f"{name}: {rule}" for name, (_, rule) in governed(mapping).items()]
    golden("propagate-qconfigs", "\n".join(lines))
