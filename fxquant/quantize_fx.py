"""The public steps: ``prepare_fx``, ``convert_fx``, ``convert_to_reference_fx``, ``fuse_fx``.

None of them touches what it is given: each works on a copy and returns a new module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import fx, nn

from fxquant.autocast import without_autocast
from fxquant.capture import capture, own_copy, take_apart
from fxquant.errors import (
    CaptureError,
    ConfigError,
    ConfigWarning,
    Diagnostics,
    MissingExampleInputsError,
    NotAGraphModuleError,
    NotPreparedError,
)
from fxquant.graph_codec import encode_graph
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.ledger import build_ledger
from fxquant.op_view import op_of
from fxquant.pass_manager import PassContext
from fxquant.pipelines import (
    fuse_pipeline,
    lowering_pipeline,
    prepare_pipeline,
    reference_pipeline,
)
from fxquant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping, normalize
from fxquant.shapes import record_shapes
from fxquant.targets.registry import target_here, target_named


class _Missing:
    """Tells an omitted argument from ``None``."""

    def __repr__(self) -> str:
        return "<required>"


_MISSING: Final = _Missing()


@without_autocast
def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
    example_inputs: Any = _MISSING,
    *,
    target: str = "x86",
    bias_correction: bool = True,
    strict: bool = False,
) -> QuantGraphModule:
    """Trace ``model``, fold and fuse it, and insert observers.

    The result computes what the model computes, in floating point, and its observers watch: run
    calibration data through it (:func:`fxquant.calibrate`), then :func:`convert_fx`.

    Args:
        model: a module in evaluation mode, or a traced ``GraphModule``. It is not touched.
        qconfig_mapping: which op is quantized how: a ``QConfigMapping``, a dict such as
            ``{"": qconfig, "layer1.0.conv1": None, torch.nn.Linear: qconfig}``, or a legacy dict.
            ``None`` is the default mapping of the target.
        example_inputs: a tuple of inputs that the model accepts (one tensor, or a dict of keyword
            inputs, will do). Shapes come from them. ``None`` goes without shapes: residual adds
            are then not fused and MACs not counted.
        target: ``"x86"``, ``"qnnpack"`` (ARM) or ``"reference"``. Where its kernels cannot run,
            ``"reference"`` is taken, with a warning.
        bias_correction: correct the biases of convolutions and linears for the mean error of their
            rounded weights (4 dB on EfficientNet-Lite0); calibration then also watches the mean of
            every channel, in modules ``channel_mean_N``.
        strict: turn every warning into an error.

    Returns:
        A prepared module, with ``activation_post_process_N`` observers.

    Raises:
        MissingExampleInputsError: ``example_inputs`` was omitted.
        ConfigError: the mapping has unknown keys or names something that is not there.
        TrainingModeError: a batch-norm would be folded while the model trains.
        CaptureError: the model cannot be traced.
        StrictModeError: under ``strict``, what would have been a warning.
    """
    if isinstance(example_inputs, _Missing):
        raise MissingExampleInputsError(
            "prepare_fx() misses the argument example_inputs: a tuple of inputs that the model"
            " accepts, such as (torch.randn(1, 3, 224, 224),). Pass None to go without shapes"
        )
    _check_module(model, "prepare_fx")
    diagnostics = Diagnostics(strict=strict)
    chosen = target_here(target, diagnostics)
    mapping = (
        get_default_qconfig_mapping("x86")
        if qconfig_mapping is None
        else normalize(qconfig_mapping)
    )
    gm = capture(model, diagnostics, example_inputs, share=True)
    record_shapes(gm, example_inputs, diagnostics)
    gm.update_state(target=chosen.name, ledger=build_ledger(gm))
    paths = tuple(name for name, _ in model.named_modules(remove_duplicate=False))
    context = PassContext(target=chosen, diagnostics=diagnostics)
    prepare_pipeline(mapping, paths, bias_correction=bias_correction).run(gm, context)
    take_apart(gm, model)
    if model.training:
        _warn_of_dropout(gm, diagnostics)
    return gm


@without_autocast
def convert_fx(prepared: nn.Module, *, strict: bool = False) -> QuantGraphModule:
    """Turn a calibrated module into one that runs int8 kernels.

    Args:
        prepared: what :func:`prepare_fx` returned, calibrated. It is not touched: it can be
            calibrated further and converted again.
        strict: turn every warning into an error.

    Returns:
        A module on the CPU whose ops are kernels of the target it was prepared for (target
        ``reference`` gives the result of :func:`convert_to_reference_fx`).

    Raises:
        NotAGraphModuleError: ``prepared`` was never traced.
        NotPreparedError: ``prepared`` has no observers.
        NonFiniteStatisticError: a weight or a statistic is NaN or Inf.
        StrictModeError: under ``strict``, what would have been a warning (no calibration).
    """
    gm, context = _reference(prepared, "convert_fx", strict=strict)
    if context.target.executes:
        gm.cpu()  # calibrated on a GPU, it still runs where the kernels are
        gm.update_state(reference=tuple(encode_graph(gm.graph)))
        lowering_pipeline().run(gm, context)
    return gm


@without_autocast
def convert_to_reference_fx(prepared: nn.Module, *, strict: bool = False) -> QuantGraphModule:
    """Turn a calibrated module into quantize, dequantize and float ops.

    It computes on the same integers as the result of :func:`convert_fx`, slowly and on any device,
    and shows every scale, zero point and integer weight as a buffer.

    Args:
        prepared: what :func:`prepare_fx` returned, calibrated. It is not touched.
        strict: turn every warning into an error.

    Raises:
        NotAGraphModuleError: ``prepared`` was never traced.
        NotPreparedError: ``prepared`` has no observers.
    """
    return _reference(prepared, "convert_to_reference_fx", strict=strict)[0]


@without_autocast
def fuse_fx(
    model: nn.Module, *, example_inputs: Any = None, strict: bool = False
) -> QuantGraphModule:
    """Trace ``model`` and fold its batch-norms; nothing is quantized.

    Args:
        model: a module in evaluation mode. It is not touched.
        example_inputs: as for :func:`prepare_fx`. Without them a linear before a batch-norm is
            taken to have two-dimensional inputs, and conditions on shapes cannot be traced.
        strict: turn every warning into an error.

    Raises:
        TrainingModeError: a batch-norm would be folded while the model trains.
        CaptureError: the model cannot be traced.
    """
    _check_module(model, "fuse_fx")
    diagnostics = Diagnostics(strict=strict)
    gm = capture(model, diagnostics, example_inputs, share=True)
    record_shapes(gm, example_inputs, diagnostics)
    gm.update_state(ledger=build_ledger(gm))
    fuse_pipeline().run(gm, PassContext(target=target_named("x86"), diagnostics=diagnostics))
    gm.update_state(stage=Stage.FUSED)
    take_apart(gm, model)
    return gm


def _warn_of_dropout(gm: QuantGraphModule, diagnostics: Diagnostics) -> None:
    """Say that a model in training mode goes on dropping values."""
    found = [op for op in (op_of(gm, node) for node in gm.graph.nodes) if op is not None]
    random = [o.node.name for o in found if o.arguments.get("training") and o.arguments.get("p")]
    if random:
        diagnostics.warn(
            f"{len(random)} op(s) drop values at random because the model is in training mode"
            f" ({', '.join(map(repr, random[:5]))}), and the converted model will go on doing so."
            " Call model.eval() before",
            ConfigWarning,
        )


def _check_module(model: object, caller: str) -> None:
    if isinstance(model, QuantGraphModule) and model.state.stage is not Stage.FLOAT:
        if model.state.stage is Stage.FUSED:
            return
        raise ConfigError(
            f"{caller} got a model that is {model.state.stage.value} already; pass the float model"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{caller} needs a torch.nn.Module, got {type(model).__name__}")


def _reference(
    prepared: object, caller: str, *, strict: bool
) -> tuple[QuantGraphModule, PassContext]:
    if not isinstance(prepared, fx.GraphModule):
        raise NotAGraphModuleError(
            f"input model must be a GraphModule, Got type:{type(prepared)} Please make sure to"
            f" follow the tutorials. {caller} takes what prepare_fx returned"
        )
    if not isinstance(prepared, QuantGraphModule) or prepared.state.stage is not Stage.PREPARED:
        stage = (
            f"is {prepared.state.stage.value}"
            if isinstance(prepared, QuantGraphModule)
            else "was not made by fxquant"
        )
        raise NotPreparedError(
            f"incoming model must be produced by prepare_fx; this GraphModule {stage}. Call"
            f" prepare_fx(model, qconfig_mapping, example_inputs), calibrate, then {caller}"
        )
    gm = own_copy(prepared, share=True)
    assert isinstance(gm, QuantGraphModule)
    diagnostics = Diagnostics(strict=strict)
    context = PassContext(target=target_here(gm.state.target, diagnostics), diagnostics=diagnostics)
    gm.update_state(target=context.target.name)
    reference_pipeline().run(gm, context)
    take_apart(gm, prepared)
    return gm, context
