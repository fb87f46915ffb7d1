"""A backend config narrows a target: forms, fusions, dtypes; and what it cannot have is told."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.backend_config import BackendConfig, BackendPatternConfig, ObservationType
from fxquant.dtype_config import DTypeConfig, DTypeWithConstraints
from fxquant.errors import ConfigWarning, Diagnostics, StrictModeError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observers import MinMaxObserver, default_weight_observer
from fxquant.qconfig import QConfig, default_dynamic_qconfig
from fxquant.quantize_fx import prepare_fx
from fxquant.targets.allow_list import restrict, unhonoured_in, warn_unhonoured
from fxquant.targets.registry import TARGETS
from fxquant.targets.table import Target
from fxquant.targets.x86 import X86

STATIC = DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float32)
ACTIVATION = DTypeConfig(torch.quint8, torch.quint8)
DYNAMIC = DTypeConfig(torch.quint8, torch.float32, torch.qint8, torch.float32, True)
QCONFIG = QConfig(MinMaxObserver, default_weight_observer)
SHARED = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT


class Fused(nn.Module):
    pass


def fuse(is_qat: bool, *modules: nn.Module) -> nn.Module:
    return modules[0]


def _pattern(pattern: Any, *dtype_configs: DTypeConfig) -> BackendPatternConfig:
    return BackendPatternConfig(pattern).set_dtype_configs(dtype_configs or (STATIC,))


def _target(*patterns: BackendPatternConfig) -> Target:
    return restrict(X86, BackendConfig("mine").set_backend_pattern_configs(patterns))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3)
        self.c = nn.Conv2d(4, 4, 3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x = F.relu(self.b(x))
        x = self.c(x).mean((2, 3))
        return F.linear(x, self.fc.weight) + self.fc(x)


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., QuantGraphModule]:
    def run(target: Target, model: nn.Module | None = None, qconfig: Any = QCONFIG) -> Any:
        monkeypatch.setitem(TARGETS, "narrowed", target)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigWarning)
            model = Net().eval() if model is None else model
            return prepare_fx(model, qconfig, (torch.randn(1, 3, 10, 10),), target="narrowed")

    return run


def _quantized(gm: fx.GraphModule) -> set[str]:
    return {n.name for n in gm.graph.nodes if record_of(n).annotation is not None}


def _reasons(gm: fx.GraphModule, name: str) -> str:
    return " ".join(record_of(next(n for n in gm.graph.nodes if n.name == name)).reasons)


# -- what is quantized ----------------------------------------------------------------------------


def test_an_empty_config_allows_nothing(prepare: Any) -> None:
    target = _target()
    assert dict(target.rows) == {}
    assert _quantized(prepare(target)) == set()


def test_the_whole_table_is_untouched_by_it() -> None:
    before = dict(X86.rows)
    _target(_pattern(nn.Conv2d))
    assert dict(X86.rows) == before
    assert X86.allow is None


def test_only_the_listed_forms_are_quantized(prepare: Any) -> None:
    gm = prepare(_target(_pattern(nn.Linear), _pattern(nn.Conv2d)))
    assert _quantized(gm) == {"a", "b", "c", "fc"}
    assert _reasons(gm, "linear") == "backend config 'mine' has no pattern for F.linear"
    gm = prepare(_target(_pattern(F.linear)))
    assert _quantized(gm) == {"linear"}


def test_only_the_listed_chains_are_fused(prepare: Any) -> None:
    gm = prepare(_target(_pattern(nn.Conv2d)))
    assert record_of(next(n for n in gm.graph.nodes if n.name == "a")).fusion is None
    both = _target(_pattern((nn.Conv2d, nn.ReLU)), _pattern(nn.Conv2d))
    gm = prepare(both)
    fusions = {n.name: record_of(n).fusion for n in gm.graph.nodes}
    assert fusions["a"] is not None
    assert fusions["b"] is None  # F.relu follows, which is not listed
    assert {"a", "b", "c"} <= _quantized(gm)
    assert "'mine' does not fuse Conv2d -> F.relu" in _reasons(gm, "b")
    gm = prepare(_target(_pattern((nn.Conv2d, nn.ReLU))))
    assert _quantized(gm) >= {"a"}
    assert "c" not in _quantized(gm)
    assert "has no pattern for Conv2d" in _reasons(gm, "c")


def test_a_chain_with_a_fused_class_takes_the_dtypes_of_that_class() -> None:
    chain = _pattern((nn.Conv2d, nn.ReLU), ACTIVATION).set_fused_module(Fused)
    narrowed = _target(chain, _pattern(Fused, STATIC, DYNAMIC).set_observation_type(SHARED))
    assert narrowed.allow is not None
    allowed = narrowed.allow.pattern_of((nn.Conv2d, nn.ReLU))
    assert allowed is not None
    assert allowed.dtype_configs == (STATIC, DYNAMIC)
    assert allowed.observation is SHARED


def test_a_folded_norm_leaves_a_shorter_chain() -> None:
    chain = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    allow = _target(
        _pattern(chain).set_fuser_method(fuse), _pattern((nn.Linear, nn.BatchNorm1d))
    ).allow
    assert allow is not None
    shorter = allow.pattern_of((nn.Conv2d, nn.ReLU))
    assert shorter is not None
    assert shorter.kinds == ("conv2d", "relu")
    assert allow.folds(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    assert not allow.folds(nn.Conv2d, nn.BatchNorm2d)
    assert not allow.folds(nn.Linear, nn.BatchNorm1d)  # listed, but nothing fuses it


def test_only_listed_norms_are_folded(prepare: Any) -> None:
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    alone = _pattern((nn.Conv2d, nn.BatchNorm2d)).set_fuser_method(fuse)
    three = _pattern((nn.Conv2d, nn.BatchNorm2d, nn.ReLU)).set_fuser_method(fuse)
    for patterns, folded in (((), False), ((alone,), True), ((three,), True)):
        gm = prepare(_target(_pattern(nn.Conv2d), *patterns), norm.eval())
        assert ("_1" not in {node.name for node in gm.graph.nodes}) is folded
    gm = prepare(_target(_pattern(nn.Conv2d)), norm)
    assert "'mine' does not fuse Conv2d -> BatchNorm2d" in _reasons(gm, "_1")
    # A batch-norm that is not folded may train.
    assert prepare(_target(_pattern(nn.Conv2d)), norm.train()) is not None


DTYPES: list[tuple[DTypeConfig, bool]] = [
    (STATIC, True),
    (DTypeConfig(torch.quint8, torch.quint8, torch.qint8), True),
    (DTypeConfig(DTypeWithConstraints(torch.quint8, 0, 127)), False),
    (DTypeConfig(torch.quint8, torch.quint8, DTypeWithConstraints(torch.qint8, -127, 127)), False),
    (DTypeConfig(torch.qint8, torch.qint8, torch.qint8), False),
    (DYNAMIC, False),
]


@pytest.mark.parametrize(("config", "served"), DTYPES)
def test_a_qconfig_must_fit(prepare: Any, config: DTypeConfig, served: bool) -> None:
    gm = prepare(_target(_pattern(nn.Conv2d, config)))
    assert _quantized(gm) == ({"a", "b", "c"} if served else set())
    assert bool(_reasons(gm, "c")) is not served


def test_a_misfit_is_told(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _target(_pattern(nn.Conv2d, DTypeConfig(DTypeWithConstraints(torch.quint8, 0, 127))))
    monkeypatch.setitem(TARGETS, "narrowed", target)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8)
    with pytest.warns(ConfigWarning, match=r"'_0' .* must fall within the backend's(.|\n)*127"):
        prepare_fx(model, QCONFIG, (x,), target="narrowed")
    with pytest.raises(StrictModeError, match="must fall within the backend's"):
        prepare_fx(model, QCONFIG, (x,), target="narrowed", strict=True)


def test_rows_lose_the_ways_that_no_config_has() -> None:
    both = _target(_pattern(nn.Linear, STATIC, DYNAMIC)).rows["linear"]
    assert (both.static, bool(both.dynamic)) == (True, True)
    one = _target(_pattern(nn.Linear, STATIC)).rows["linear"]
    assert (one.static, bool(one.dynamic)) == (True, False)
    other = _target(_pattern(nn.Linear, DYNAMIC)).rows["linear"]
    assert (other.static, bool(other.dynamic)) == (False, True)


# -- what cannot be honoured ----------------------------------------------------------------------


def _told(*patterns: BackendPatternConfig) -> list[str]:
    allow = _target(*patterns).allow
    assert allow is not None
    return [str(entry) for entry in allow.unhonoured]


UNHONOURED: list[tuple[BackendPatternConfig, str]] = [
    (_pattern(nn.GRUCell, STATIC), "no kernel for calibrated activations"),
    (_pattern(nn.Softshrink), r"Softshrink: wanted it quantized; possible: FP32 \(Soft"),
    (_pattern(nn.Sigmoid, ACTIVATION), r"Sigmoid: wanted it quantized; possible: FP32 \(quant"),
    (_pattern(nn.Conv2d, DTypeConfig(torch.qint8)), "possible: activation uint8"),
    (_pattern(nn.Conv2d, DTypeConfig(None, torch.qint8)), "possible: activation uint8, float32"),
    (_pattern(nn.Conv2d, DTypeConfig(None, None, torch.quint8)), "possible: weight int8"),
    (_pattern(nn.Conv2d, DYNAMIC), "possible: no dynamic kernel"),
    (
        _pattern(nn.Conv2d, DTypeConfig(torch.float32, None, torch.qint8)),
        "no kernel for an integer weight alone",
    ),
    (_pattern((nn.Conv2d, nn.Softmax)), "Conv2d -> Softmax: wanted one op; possible: each op on"),
    (
        _pattern(nn.Conv2d).set_observation_type(SHARED),
        "wanted OUTPUT_SHARE_OBSERVER_WITH_INPUT; possible: an output scale of its own",
    ),
    (_pattern(torch.cat, ACTIVATION), "an output scale of its own; possible: that of its input"),
    (
        BackendPatternConfig()._set_pattern_complex_format((torch.add, nn.Conv2d, nn.Linear)),
        r"wanted torch.add\(Conv2d, Linear\) as one op; possible: chains of ops only",
    ),
]


@pytest.mark.parametrize(("pattern", "message"), UNHONOURED, ids=[m for _, m in UNHONOURED])
def test_what_the_target_lacks_is_listed(pattern: BackendPatternConfig, message: str) -> None:
    (told,) = _told(pattern)
    assert re.search(message, told), told


def test_what_the_target_has_is_not_listed() -> None:
    add = _pattern(torch.add, ACTIVATION)._set_num_tensor_args_to_observation_type({1: SHARED})
    assert _told(_pattern(nn.Conv2d), _pattern((nn.Conv2d, nn.BatchNorm2d, nn.ReLU)), add) == []
    fused = _pattern((nn.Conv2d, nn.ReLU)).set_fused_module(Fused).set_qat_module(nn.ReLU)
    assert _told(fused, _pattern(Fused), _pattern(nn.ReLU)) == []
    not_observed = _pattern("size").set_observation_type(ObservationType.INPUT_OUTPUT_NOT_OBSERVED)
    assert _told(not_observed) == []
    assert _told(_pattern((nn.Conv2d, nn.ReLU)).set_fuser_method(fuse)) == []  # it is called


def test_only_what_the_model_has_is_told_with_its_node(prepare: Any) -> None:
    target = _target(
        _pattern(nn.Conv2d, STATIC, DYNAMIC), _pattern("mean", ACTIVATION), _pattern(nn.Sigmoid)
    )
    gm = prepare(target)
    assert target.allow is not None
    found = [(node.name, entry.types) for node, entry in unhonoured_in(gm, target.allow)]
    assert found == [("mean", ("mean",))]
    with pytest.warns(
        ConfigWarning, match=r"'mine' cannot be honoured for 'mean': \.mean\(\): wan"
    ):
        warn_unhonoured(gm, target.allow, Diagnostics())
    with pytest.raises(StrictModeError):
        warn_unhonoured(gm, target.allow, Diagnostics(strict=True))
    gm = prepare(target, qconfig=default_dynamic_qconfig)
    diagnostics = Diagnostics(silent=True)
    warn_unhonoured(gm, target.allow, diagnostics)
    assert any("'a' and 2 more: Conv2d: wanted DType" in text for _, text in diagnostics.messages)
    gm = prepare(target, qconfig={"": None})
    assert list(unhonoured_in(gm, target.allow)) == []


def test_a_chain_is_told_only_where_it_is() -> None:
    target = _target(_pattern((nn.Conv2d, nn.Softmax)), _pattern(nn.Conv2d))
    assert target.allow is not None
    for model, count in (
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(dim=1)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 0),
    ):
        gm = prepare_fx(model.eval(), QCONFIG, (torch.randn(1, 3, 8, 8),))
        assert len(list(unhonoured_in(gm, target.allow))) == count


def test_a_qconfig_that_asks_for_something_else_is_told_nothing(prepare: Any) -> None:
    """Of an op that stays in floating point, and of values that are no tensors."""
    target = _target(_pattern(torch.flatten, ACTIVATION), _pattern("mean", ACTIVATION))
    assert target.allow is not None
    gm = prepare(target, qconfig=default_dynamic_qconfig)
    assert list(unhonoured_in(gm, target.allow)) == []
    target = _target(_pattern(operator.floordiv, ACTIVATION))
    assert target.allow is not None

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.size(0) // 2, -1) // 2

    for inputs in ((torch.randn(4, 3),), None):
        found = prepare_fx(Halves(), QCONFIG, inputs)
        assert [n.name for n, _ in unhonoured_in(found, target.allow)] == ["floordiv_1"]


# -- torch.ao's backends --------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("name", ["native", "onednn", "fbgemm"])
def test_the_backends_of_torch_ao_keep_their_own_list(prepare: Any, name: str) -> None:
    import torch.ao.quantization.quantize_fx  # noqa: F401  # without it the next module fails
    from torch.ao.quantization import backend_config

    from fxquant.backend_config import as_backend_config

    config = as_backend_config(getattr(backend_config, f"get_{name}_backend_config")())
    assert config is not None
    target = restrict(X86, config)
    assert {"conv2d", "linear", "cat", "add"} <= set(target.rows)
    # Ops that torch.ao never quantizes and fxquant's table has.
    assert {"pad", "chunk", "split", "slice"} & set(target.rows) == set()
    assert "silu" not in target.rows["conv2d"].epilogues
    assert ("leaky_relu" in target.rows["linear"].epilogues) is (name == "onednn")
    assert ("add" in target.rows["conv2d"].epilogues) is (name == "onednn")
    assert target.allow is not None
    assert target.allow.folds(nn.Conv2d, nn.BatchNorm2d)
    assert _quantized(prepare(target)) >= {"a", "b", "c", "linear", "fc"}
    pixels = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    assert _quantized(prepare(target, pixels)) == {"_0"}
