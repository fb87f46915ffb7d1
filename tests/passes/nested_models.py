"""Modules that are quantized on their own, for the tests of the passes around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.compat import QConfigMapping, default_weight_observer
from fxquant.errors import Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.ledger import build_ledger
from fxquant.observers import MinMaxObserver
from fxquant.pass_manager import Pass, PassContext, PassResult, run_pass
from fxquant.passes.mark_boundary import MarkBoundary
from fxquant.passes.nest_modules import NestModules
from fxquant.pipelines import compat_prepare_pipeline, compat_reference_pipeline
from fxquant.qconfig import QConfig
from fxquant.shapes import record_shapes
from fxquant.targets.compat import X86_COMPAT

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))
QCONFIG = QConfig(MinMaxObserver, default_weight_observer)
EVERYWHERE = QConfigMapping().set_global(QCONFIG)


class Twice(nn.Module):
    """The float form of ``2 * x``."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class ObservedTwice(Twice):
    """What nest-modules puts in its place."""

    activation_post_process: Any


class QuantizedTwice(nn.Module):
    """What convert-nested puts in the place of that: quantized tensors in and out."""

    def __init__(self, observer: Any) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        self.scale, self.zero_point = float(scale), int(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_quantized
        y = 2 * x.dequantize()
        return torch.quantize_per_tensor(y, self.scale, self.zero_point, torch.quint8)


class Pair(nn.Module):
    """Gives a tensor, and two in a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return x, (2 * x, 3 * x)


def context() -> PassContext:
    return PassContext(target=X86_COMPAT, diagnostics=Diagnostics())


def float_graph(model: nn.Module, *inputs: Any, leaves: Any = ()) -> QuantGraphModule:
    """The float graph, not traced into ``leaves``; shapes are known where inputs are given."""
    names = dict.fromkeys(leaves, "quantized on its own")
    gm = capture(model.eval(), Diagnostics(), inputs or None, leaves=names)
    record_shapes(gm, inputs or None, Diagnostics())
    gm.update_state(target="x86-compat", ledger=build_ledger(gm))
    return gm


def run_until(
    wanted: type[Pass],
    gm: QuantGraphModule,
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    boundary: MarkBoundary = MarkBoundary(),  # noqa: B008  # frozen
) -> PassContext:
    """Run, checked, what the pipelines of the compat profile run before ``wanted``."""
    shared = context()
    prepare = compat_prepare_pipeline(EVERYWHERE, (), nest, boundary)
    for one in (*prepare.passes, *compat_reference_pipeline().passes):
        if isinstance(one, wanted):
            break
        run_pass(one, gm, shared)
        if one is prepare.passes[-1]:
            gm(*[IMAGES for node in gm.graph.nodes if node.op == "placeholder"])
    return shared


def run_alone(one: Pass, gm: QuantGraphModule, shared: PassContext | None = None) -> PassResult:
    return run_pass(one, gm, shared or context())
