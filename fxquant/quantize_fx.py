"""The public steps: ``prepare_fx``, ``prepare_qat_fx``, ``convert_fx`` and their relatives.

None of them touches what it is given: each works on a copy and returns a new module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import fx, nn

from fxquant.autocast import outside_modes
from fxquant.capture import capture, warn_of_islands
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
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.islands import ConvertIslands, Island, NestIslands, Part, subjects_in
from fxquant.kernel_table import KernelTable, table_of
from fxquant.late_code import code_written_once
from fxquant.ledger import build_ledger
from fxquant.op_view import Form, op_of
from fxquant.own_copy import own_copy, take_apart
from fxquant.pass_manager import PassContext, Pipeline
from fxquant.passes.convert_nested import ConvertNested
from fxquant.passes.nest_modules import NestModules
from fxquant.passes.propagate_qconfigs import subjects_of
from fxquant.pipelines import (
    fuse_pipeline,
    lowering_pipeline,
    prepare_pipeline,
    qat_prepare_pipeline,
    reference_pipeline,
)
from fxquant.qat_modules import holds_training_modules
from fxquant.qconfig_mapping import (
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    normalize,
)
from fxquant.shapes import record_shapes
from fxquant.slow_regions import tell_slow_regions
from fxquant.targets.choice import measure
from fxquant.targets.registry import target_here, target_named
from fxquant.targets.training import while_training
from fxquant.torch_prepared import is_prepared_by_torch, refuse_trained
from fxquant.ways_in import Steering, as_module, capture_any


class _Missing:
    """Tells an omitted argument from ``None``."""

    def __repr__(self) -> str:
        return "<required>"


_MISSING: Final = _Missing()


@outside_modes
@code_written_once()
def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
    example_inputs: Any = _MISSING,
    *,
    target: str = "x86",
    bias_correction: bool = True,
    concrete_args: Mapping[str, Any] | None = None,
    leaf_modules: Iterable[str | type[nn.Module]] = (),
    strict_capture: bool = False,
    strict: bool = False,
) -> QuantGraphModule:
    """Trace ``model``, fold and fuse it, and insert observers.

    The result computes what the model computes, in floating point, and its observers watch: run
    calibration data through it (:func:`fxquant.calibrate`), then :func:`convert_fx`.

    Args:
        model: a module in evaluation mode, a traced ``GraphModule``, or a
            ``torch.export.ExportedProgram`` or its ``.module()``. It is not touched.
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
        concrete_args: inputs of ``forward`` that are fixed to a value, by name: their branches are
            taken while tracing, and another value is an error later.
        leaf_modules: paths and classes of modules to leave as they are: not traced into, and
            nothing in them quantized (layers of ``torch.nn`` are never traced into; the mapping
            says whether they are quantized).
        strict_capture: a module that cannot be traced is an error. Otherwise it runs as it is,
            with what it only calls quantized on its own; and where the ``forward`` of the whole
            model cannot be traced, ``torch.export`` captures it, or, if that fails, the model runs
            as it is with its layers quantized (docs/capture.md).
        strict: turn every warning into an error.

    Returns:
        A prepared module, with ``activation_post_process_N`` observers.

    Raises:
        MissingExampleInputsError: ``example_inputs`` was omitted.
        ConfigError: the mapping has unknown keys or names something that is not there.
        TrainingModeError: a batch-norm would be folded while the model trains.
        CaptureError: the model cannot be captured in any way, or, under ``strict_capture``, traced
            as a whole.
        StrictModeError: under ``strict``, what would have been a warning.
    """
    mapping = _mapping(qconfig_mapping, get_default_qconfig_mapping)
    pipeline = functools.partial(prepare_pipeline, mapping, bias_correction=bias_correction)
    steering = Steering(concrete_args or {}, tuple(leaf_modules), strict=strict_capture)
    call = _Call("prepare_fx", target, strict=strict, steering=steering)
    return _prepare(model, example_inputs, pipeline, call)


@outside_modes
@code_written_once()
def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
    example_inputs: Any = _MISSING,
    *,
    target: str = "x86",
    concrete_args: Mapping[str, Any] | None = None,
    leaf_modules: Iterable[str | type[nn.Module]] = (),
    strict_capture: bool = False,
    strict: bool = False,
) -> QuantGraphModule:
    """Trace ``model`` and let it train with what int8 will round: quantization-aware training.

    Train the result as the model was trained, with a small learning rate, then :func:`convert_fx`.
    Batch-norms train inside the convolution or linear before them, whose weight is rounded as it
    will be once they are folded; ``apply(freeze_bn_stats)`` fixes their statistics in late epochs.

    Args:
        model: in training or evaluation mode, which the result keeps. It is not touched, and
            shares no parameter with the result.
        qconfig_mapping: as for :func:`prepare_fx`, with qconfigs of fake quantizers. ``None`` is
            the default mapping of the target.
        example_inputs: as for :func:`prepare_fx`.
        target: as for :func:`prepare_fx`.
        concrete_args: as for :func:`prepare_fx`.
        leaf_modules: as for :func:`prepare_fx`.
        strict_capture: as for :func:`prepare_fx`, but a model whose ``forward`` cannot be traced is
            never exported: what ``torch.export`` gives does not train.
        strict: turn every warning into an error.

    Returns:
        A prepared module with the model's parameters, fake quantizers
        ``activation_post_process_N``, and a ``weight_fake_quant`` in each module with a weight.

    Raises:
        MissingExampleInputsError: ``example_inputs`` was omitted.
        ConfigError: the mapping has unknown keys or names something that is not there.
        CaptureError: as for :func:`prepare_fx`; also an ``ExportedProgram``.
        StrictModeError: under ``strict``, what would have been a warning.
    """
    mapping = _mapping(qconfig_mapping, get_default_qat_qconfig_mapping)
    pipeline = functools.partial(qat_prepare_pipeline, mapping)
    steering = Steering(concrete_args or {}, tuple(leaf_modules), strict=strict_capture)
    call = _Call("prepare_qat_fx", target, strict=strict, steering=steering, trains=True)
    return _prepare(model, example_inputs, pipeline, call)


@dataclass(frozen=True)
class _Call:
    """What a public prepare was asked for, beside its pipeline.

    Attributes:
        caller: its name.
        target: name of the target.
        strict: warnings are errors.
        steering: of the capture.
        trains: the result trains, so it has parameters of its own.
    """

    caller: str
    target: str
    strict: bool
    steering: Steering
    trains: bool = False


def _mapping(given: Any, default: Callable[[str], QConfigMapping]) -> QConfigMapping:
    return default("x86") if given is None else normalize(given)


def _paths(model: object) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        return ()  # refused in a moment, with a message
    return tuple(name for name, _ in model.named_modules(remove_duplicate=False))


def _prepare(
    model: nn.Module, example_inputs: Any, pipeline: Callable[..., Pipeline], call: _Call
) -> QuantGraphModule:
    if isinstance(example_inputs, _Missing):
        raise MissingExampleInputsError(
            f"{call.caller}() misses the argument example_inputs: a tuple of inputs that the model"
            " accepts, such as (torch.randn(1, 3, 224, 224),). Pass None to go without shapes"
        )
    model = as_module(model, call.caller, trains=call.trains)
    _check_module(model, call.caller)
    diagnostics = Diagnostics(strict=call.strict)
    chosen = target_here(call.target, diagnostics)
    captured = capture_any(model, diagnostics, example_inputs, call.steering, trains=call.trains)
    gm = captured.graph
    refuse_trained(gm)
    table = while_training(chosen) if call.trains else chosen
    context = PassContext(target=table, diagnostics=diagnostics)
    elsewhere = (*subjects_of(gm), *subjects_in(captured.islands)) if captured.islands else ()
    run = functools.partial(pipeline, _paths(model), elsewhere=elsewhere)
    _run_prepare(gm, captured.islands, run, context, target_name=chosen.name)
    if call.trains:
        _warn_of_fixed_modes(gm, diagnostics)
    else:
        take_apart(gm, model)
        if model.training:
            _warn_of_dropout(gm, diagnostics)
    return gm


def _run_prepare(
    gm: QuantGraphModule,
    islands: tuple[Island, ...],
    pipeline: Callable[[NestModules], Pipeline],
    context: PassContext,
    *,
    target_name: str,
) -> None:
    """Prepare a graph, and the parts of its islands, in place."""

    def prepare(part: Part) -> None:
        _run_prepare(part.graph, part.islands, pipeline, context, target_name=target_name)

    gm.update_state(target=target_name)
    nest = (
        NestModules(NestIslands(islands, prepare, context.diagnostics))
        if islands
        else NestModules()
    )
    pipeline(nest).run(gm, context)


@outside_modes
@code_written_once()
def convert_fx(
    prepared: nn.Module, *, tune: bool | KernelTable = False, strict: bool = False
) -> QuantGraphModule:
    """Turn a calibrated module into one that runs int8 kernels.

    Args:
        prepared: what :func:`prepare_fx` returned, calibrated, or :func:`prepare_qat_fx`, trained.
            It is not touched: it can be calibrated or trained further and converted again. What
            trained gives a result in evaluation mode.
        tune: choose kernels by measurement: time, for every convolution and linear, the kernels
            that are exact here and the float op, for the shapes of the example inputs and the
            number of threads that torch has now. What was timed is kept in a file for this machine
            (docs/speed.md), or in the :class:`fxquant.KernelTable` that is given. ``explain`` says
            what was chosen, with the times.
        strict: turn every warning into an error.

    Returns:
        A module on the CPU whose ops are kernels of the target it was prepared for (target
        ``reference`` gives the result of :func:`convert_to_reference_fx`). One
        :class:`~fxquant.LoweringWarning` names the parts that are slower than in FP32: by
        measurement under ``tune``, else those that cannot be anything else.

    Raises:
        NotAGraphModuleError: ``prepared`` was never traced.
        NotPreparedError: ``prepared`` has no observers.
        NonFiniteStatisticError: a weight or a statistic is NaN or Inf.
        StrictModeError: under ``strict``, what would have been a warning (no calibration).
    """
    gm, context = _taken(prepared, "convert_fx", strict=strict)
    table = table_of(tune)
    if table is not None and not context.target.executes:
        context.diagnostics.warn(
            f"tune: target {context.target.name!r} runs no kernels, so none was timed",
            ConfigWarning,
        )
    _convert(gm, context, lower=context.target.executes, kernels=table)
    take_apart(gm, prepared)
    return gm


@outside_modes
@code_written_once()
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
    gm, context = _taken(prepared, "convert_to_reference_fx", strict=strict)
    _convert(gm, context, lower=False)
    take_apart(gm, prepared)
    return gm


@outside_modes
@code_written_once()
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
    model = as_module(model, "fuse_fx")
    _check_module(model, "fuse_fx")
    diagnostics = Diagnostics(strict=strict)
    gm = capture(model, diagnostics, example_inputs, share=True)
    record_shapes(gm, example_inputs, diagnostics)
    warn_of_islands(gm, diagnostics)
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


def _warn_of_fixed_modes(gm: QuantGraphModule, diagnostics: Diagnostics) -> None:
    """Say which functions were traced with ``training=True``, which nothing changes any more."""
    fixed = [
        op.node.name
        for op in (op_of(gm, node) for node in gm.graph.nodes)
        if op is not None and op.form is Form.FUNCTION and op.arguments.get("training") is True
    ]
    if fixed:
        diagnostics.warn(
            f"{len(fixed)} function call(s) were traced with training=True"
            f" ({', '.join(map(repr, fixed[:5]))}) and will go on training after model.eval() and"
            " convert_fx. Use the modules (nn.Dropout, nn.BatchNorm2d, ...), or prepare the model"
            " in evaluation mode and call .train() on the result",
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


def _taken(prepared: object, caller: str, *, strict: bool) -> tuple[QuantGraphModule, PassContext]:
    """A copy of a prepared model, to be converted."""
    if not isinstance(prepared, fx.GraphModule):
        raise NotAGraphModuleError(
            f"input model must be a GraphModule, Got type:{type(prepared)} Please make sure to"
            f" follow the tutorials. {caller} takes what prepare_fx returned"
        )
    if is_prepared_by_torch(prepared):
        raise NotPreparedError(
            "incoming model must be produced by prepare_fx of fxquant; torch.ao prepared this one."
            f" fxquant.compat.{caller} takes it over, with its observers and what they saw"
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
    if holds_training_modules(gm):
        gm.eval()  # training is over
    diagnostics = Diagnostics(strict=strict)
    context = PassContext(target=target_here(gm.state.target, diagnostics), diagnostics=diagnostics)
    return gm, context


def _convert(
    gm: QuantGraphModule,
    context: PassContext,
    *,
    lower: bool,
    kernels: KernelTable | None = None,
) -> None:
    """Convert a graph, and the parts of its islands, in place."""

    def convert(part: QuantGraphModule) -> None:
        _convert(part, context, lower=lower, kernels=kernels)

    gm.update_state(target=context.target.name)
    islands = ConvertIslands(convert, context.diagnostics)
    reference_pipeline(ConvertNested(islands)).run(gm, context)
    if lower:
        gm.cpu()  # calibrated on a GPU, it still runs where the kernels are
        gm.update_state(reference=tuple(encode_graph(gm.graph)))
        if kernels is not None:
            measure(gm, context.target, kernels, context.diagnostics)
        if not context.target.engines:
            tell_slow_regions(gm, context.diagnostics, kernels)
        lowering_pipeline(kernels=kernels).run(gm, context)
