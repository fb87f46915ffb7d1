"""torchvision's quantizable networks through fxquant.compat: torch.ao's numbers to the last bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant import compat
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.operators import DEQUANTIZE, QUANTIZE

pytestmark = pytest.mark.peer

# network -> (side of the images, LSBs by which outputs may differ, test takes minutes)
NETWORKS = {
    "resnet18": (96, 0, False),
    "mobilenet_v2": (96, 0, False),
    "mobilenet_v3_large": (96, 0, False),
    # Its channel shuffles stay in float between a dequantize and a quantize, where sums differ.
    "shufflenet_v2_x1_0": (96, 1, False),
    "googlenet": (96, 0, False),
    "resnet50": (96, 0, True),
    "inception_v3": (299, 0, True),
}


@pytest.fixture(autouse=True)
def _x86_engine() -> Iterator[None]:
    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86"
    yield
    torch.backends.quantized.engine = kept


def _network(name: str) -> nn.Module:
    networks = import_torchvision().models.quantization
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(networks, name)(weights=None, quantize=False, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def _observers(gm: fx.GraphModule) -> list[str]:
    return [
        str(node.target)
        for node in gm.graph.nodes
        if node.op == "call_module" and str(node.target).startswith("activation_post_process")
    ]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _steps(gm: fx.GraphModule) -> tuple[int, int]:
    """Quantize and dequantize steps of activations."""
    quantize = (QUANTIZE, torch.quantize_per_tensor)
    dequantize = ("dequantize", torch.dequantize)
    activations = [
        node
        for node in gm.graph.nodes
        if node.target is DEQUANTIZE and node.args[0].op != "get_attr"
    ]
    return (
        sum(node.target in quantize for node in gm.graph.nodes),
        sum(node.target in dequantize for node in gm.graph.nodes) + len(activations),
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if row[2] else []) for n, row in NETWORKS.items()],
)
def test_post_training(name: str) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization import quantize_fx as peer

    side, lsb, _ = NETWORKS[name]
    model, x = _network(name), torch.randn(2, 3, side, side)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        ours = compat.prepare_fx(model, compat.get_default_qconfig_mapping("x86"), (x,))
        assert torch.equal(_first(ours(x)), _first(theirs(x)))
        assert _observers(ours) == _observers(theirs)
        for path in _observers(ours):
            wanted = theirs.get_submodule(path).calculate_qparams()
            assert [t.item() for t in ours.get_submodule(path).calculate_qparams()] == [
                t.item() for t in wanted
            ], path
        reference = peer.convert_to_reference_fx(copy.deepcopy(theirs))
        assert _steps(compat.convert_to_reference_fx(ours)) == _steps(reference)
        lowered, expected = compat.convert_fx(ours), peer.convert_fx(theirs)
        assert _steps(lowered) == _steps(expected)
        given, wanted = _first(lowered(x)), _first(expected(x))
    step = _last_scale(lowered)
    assert float((given - wanted).abs().max()) <= (lsb + 1e-3) * step


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "shufflenet_v2_x1_0"])
def test_networks_that_torch_ao_prepared(name: str, trains: bool) -> None:
    """Taken over with their observers, and what they trained to, they give torch.ao's numbers."""
    from torch.ao import quantization as tq
    from torch.ao.quantization import quantize_fx as peer

    side, _, _ = NETWORKS[name]
    model, x = _network(name).train(trains), torch.randn(2, 3, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trains:
            mapping = tq.get_default_qat_qconfig_mapping("x86")
            prepared = peer.prepare_qat_fx(model, mapping, (x,))
            _first(prepared(x)).square().mean().backward()
            torch.optim.SGD(prepared.parameters(), lr=0.01).step()
            prepared.eval()
        else:
            qconfig = tq.QConfig(tq.MinMaxObserver, tq.default_per_channel_weight_observer)
            mapping = tq.get_default_qconfig_mapping("x86").set_global(qconfig)
            prepared = peer.prepare_fx(model, mapping, (x,))
            prepared(x)
        reference = compat.convert_to_reference_fx(prepared)
        lowered = compat.convert_fx(prepared)
        theirs = peer.convert_to_reference_fx(copy.deepcopy(prepared))
        assert _steps(reference) == _steps(theirs)
        assert _steps(lowered) == _steps(peer.convert_fx(prepared))
        with torch.no_grad():
            assert torch.equal(_first(reference(x)), _first(theirs(x)))


def _last_scale(lowered: QuantGraphModule) -> float:
    """The scale of the logits: of the last kernel that writes integers."""
    scales = [b for n, b in lowered.named_buffers() if "_scale_" in n and b.dim() == 0]
    return float(scales[-1])
