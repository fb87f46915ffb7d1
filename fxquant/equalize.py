"""Cross-layer equalization: per-tensor weights without the loss, on the float model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxquant.errors import ConfigError, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.pass_manager import PassContext
from fxquant.pipelines import equalize_pipeline
from fxquant.quantize_fx import fuse_fx
from fxquant.targets.registry import target_named

_CHOICES = ("keep", "relu")


def equalize(
    model: nn.Module, example_inputs: Any = None, *, relu6: str = "keep", strict: bool = False
) -> QuantGraphModule:
    """Make the channel ranges of weights equal across layers that follow each other.

    For backends that take one scale for a whole weight, where channels of very different ranges
    (depthwise convolutions) lose most of their levels; with per-channel weights it gains little.
    Batch-norms are folded first.

    Args:
        model: a module in evaluation mode. It is not touched.
        example_inputs: a tuple of inputs; a flatten between two layers is only equalized across
            where they tell the shape.
        relu6: ``keep`` leaves pairs of layers with a clamp between them alone. ``relu`` makes the
            clamp a relu and equalizes them: the model changes where values exceed the bound, so
            measure it.
        strict: turn every warning into an error.

    Returns:
        A float ``GraphModule`` with the same function, for :func:`fxquant.prepare_fx`.
        :func:`fxquant.explain` says what was equalized, and why the rest was not.

    Raises:
        ConfigError: another ``relu6``.
        TrainingModeError: a batch-norm would be folded while the model trains.
        CaptureError: the model cannot be traced.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
        Correction", section 4.1.
    """
    if relu6 not in _CHOICES:
        raise ConfigError(f"relu6 needs to be one of {', '.join(_CHOICES)}, got {relu6!r}")
    gm = fuse_fx(model, example_inputs=example_inputs, strict=strict)
    context = PassContext(target=target_named("x86"), diagnostics=Diagnostics(strict=strict))
    equalize_pipeline(open_clamps=relu6 == "relu").run(gm, context)
    return gm
