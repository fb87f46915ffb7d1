"""tell-unhonoured: what a user's backend config cannot have is told, once a pattern."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import compat
from fxquant.compat import BackendConfig, BackendPatternConfig, DTypeConfig, ObservationType
from fxquant.errors import ConfigWarning, Diagnostics, StrictModeError
from fxquant.metadata import update_record
from fxquant.pass_manager import PassContext, PassResult
from fxquant.passes.tell_unhonoured import TellUnhonoured
from fxquant.targets.compat import compat_target
from fxquant.targets.x86 import X86
from tests.passes.nested_models import float_graph

STATIC = DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float32)
ACTIVATIONS = DTypeConfig(torch.quint8, torch.quint8)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
CALLS = ("prepare_fx", "prepare_qat_fx")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.soft = nn.Softmax(dim=1)
        self.shrink = nn.Softshrink()
        self.other = nn.Softshrink()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.shrink(self.soft(self.bn(self.conv(x)))))


class Fused(nn.Module):
    """What a batch-norm is folded for."""


def config(*patterns: BackendPatternConfig) -> BackendConfig:
    return BackendConfig("mine").set_backend_pattern_configs(patterns)


def pattern(what: Any, dtypes: DTypeConfig = STATIC) -> BackendPatternConfig:
    return BackendPatternConfig(what).add_dtype_config(dtypes)


def told(backend: Any, call: str = "prepare_fx", mapping: Any = None) -> list[str]:
    defaults = {
        "prepare_fx": compat.get_default_qconfig_mapping,
        "prepare_qat_fx": compat.get_default_qat_qconfig_mapping,
    }
    given = defaults[call]("qnnpack") if mapping is None else mapping
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(compat, call)(Net().eval(), given, (X,), backend_config=backend)
    found = [str(w.message) for w in caught if issubclass(w.category, ConfigWarning)]
    return [text for text in found if "cannot be honoured" in text]  # annotate says the rest


@pytest.mark.parametrize("call", CALLS)
def test_a_pattern_is_told_with_node_wanted_and_possible(call: str) -> None:
    one_op = (nn.Conv2d, nn.BatchNorm2d, nn.Softmax)
    fused = pattern((nn.Conv2d, nn.BatchNorm2d)).set_fused_module(Fused)
    found = told(config(pattern(nn.Conv2d), fused, pattern(one_op)), call)
    assert found == [
        "backend config 'mine' cannot be honoured for 'conv': Conv2d -> BatchNorm2d -> Softmax:"
        " wanted one op; possible: each op on its own"
    ]


@pytest.mark.parametrize("call", CALLS)
def test_what_is_observed_in_another_way_is_told(call: str) -> None:
    shared = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    found = told(config(pattern(nn.Conv2d).set_observation_type(shared)), call)
    assert found == [
        "backend config 'mine' cannot be honoured for 'conv': Conv2d: wanted"
        " OUTPUT_SHARE_OBSERVER_WITH_INPUT; possible: an output scale of its own"
    ]


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_told_of_what_nobody_asked_for(call: str) -> None:
    shared = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    backend = config(pattern(nn.Conv2d).set_observation_type(shared))
    assert told(backend, call, compat.QConfigMapping()) == []
    off = compat.get_default_qconfig_mapping("qnnpack").set_object_type(nn.Conv2d, None)
    off.set_object_type(nn.BatchNorm2d, None)
    assert told(backend, call, off) == []
    assert told(config(pattern(nn.Conv2d)), call) == []
    assert told(None, call) == []


def test_an_op_without_a_kernel_is_told_once_for_all_its_calls() -> None:
    """The pass alone, on a table that has no modules of the user's beside its rows."""
    gm = float_graph(Net().eval(), X)
    target = compat_target(config(pattern(torch.nn.functional.softshrink, ACTIVATIONS)))
    context = PassContext(target=target, diagnostics=Diagnostics(silent=True))
    assert TellUnhonoured().run(gm, context) == PassResult(changes=0)
    assert context.diagnostics.messages == []
    target = compat_target(config(pattern(nn.Softshrink, ACTIVATIONS)))
    context = PassContext(target=target, diagnostics=Diagnostics(silent=True))
    qconfig = compat.get_default_qconfig("qnnpack")
    for node in gm.graph.nodes:
        update_record(node, qconfig=qconfig)
    TellUnhonoured().run(gm, context)
    ((category, text),) = context.diagnostics.messages
    assert category is ConfigWarning
    assert text == (
        "backend config 'mine' cannot be honoured for 'shrink' and 1 more: Softshrink: wanted it"
        " quantized; possible: FP32 (Softshrink has no int8 kernel)"
    )
    strict = PassContext(target=target, diagnostics=Diagnostics(strict=True))
    with pytest.raises(StrictModeError, match="Softshrink"):
        TellUnhonoured().run(gm, strict)
    none = PassContext(target=X86, diagnostics=Diagnostics(strict=True))
    assert TellUnhonoured().run(gm, none) == PassResult(changes=0)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["native", "fbgemm", "qnnpack", "onednn", "tensorrt"])
@pytest.mark.parametrize("call", CALLS)
def test_torch_s_own_configs_are_honoured(name: str, call: str) -> None:
    import torch.ao.quantization.quantize_fx  # noqa: F401  # without it the next module fails
    from torch.ao.quantization import backend_config

    backend = getattr(backend_config, f"get_{name}_backend_config")()
    assert told(backend, call) == []
    off = compat.QConfigMapping().set_global(compat.default_dynamic_qconfig)
    assert told(backend, "prepare_fx", off) == []
