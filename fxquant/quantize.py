"""``quantize`` and ``quantize_dynamic``: from a float model to an int8 model in one call."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.audit import audit
from fxquant.calibration import Forward, calibrate
from fxquant.data_free import estimate
from fxquant.errors import (
    CalibrationError,
    CalibrationWarning,
    ConfigError,
    Diagnostics,
    LoweringWarning,
    MissingExampleInputsError,
)
from fxquant.explain import explain
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_table import KernelTable
from fxquant.op_catalog import COMPUTE_KINDS
from fxquant.op_rows import HALF, OpRow, Runs
from fxquant.qconfig import (
    QConfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    get_default_dynamic_qconfig,
)
from fxquant.qconfig_mapping import ObjectType, QConfigMapping, with_default_types
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.ways_in import Steering, as_module, capture_any

DATA_FREE_COST = (
    "at most 0.4 points of top-1, and the class of 0 to 7 % of the inputs changes (0.2 to 4 % with"
    " data; docs/quantize.md)"
)
"""What going without data costs on the zoo's models, see the table there."""


def quantize(
    model: nn.Module,
    data: Iterable[Any] | None,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    num_batches: int | None = None,
    input_mean: float = 0.0,
    input_deviation: float = 1.0,
    target: str = "x86",
    bias_correction: bool = True,
    tune: bool | KernelTable = False,
    strict: bool = False,
    progress: bool = True,
) -> QuantGraphModule:
    """Prepare, calibrate, convert and audit.

    Args:
        model: a module in evaluation mode, or whatever :func:`fxquant.prepare_fx` takes. It is not
            touched.
        data: calibration batches, fed as :func:`fxquant.calibrate` says; a few hundred inputs do.
            ``None`` goes without: ranges come from batch-norms and from made-up inputs of the given
            mean and deviation (see :mod:`fxquant.synthetic`). A warning says what that costs.
        qconfig_mapping: see :func:`fxquant.prepare_fx`.
        example_inputs: needed where ``data`` is ``None`` or ``forward`` is given; else the first
            batch serves.
        forward: ``forward(model, batch)`` runs the model on one batch.
        num_batches: take at most so many batches.
        input_mean: mean of the model's inputs; read where ``data`` is ``None``.
        input_deviation: standard deviation of the model's inputs, likewise.
        target: ``"x86"`` or ``"reference"``.
        bias_correction: see :func:`fxquant.prepare_fx`.
        tune: choose kernels by measurement, see :func:`fxquant.convert_fx`.
        strict: turn every warning into an error.
        progress: show a progress bar, on a terminal and after two seconds only.

    Returns:
        The int8 model. Convolutions, linears and matrix products that stay in FP32 are named in
        one :class:`LoweringWarning`; ``print(audit(result))`` has the rest.

    Raises:
        MissingExampleInputsError: neither data nor example inputs show what the model takes.
        CalibrationError: ``data`` holds no batch, or one that does not fit.
    """
    diagnostics = Diagnostics(strict=strict)
    model = as_module(model, "quantize")
    if data is None:
        if example_inputs is None:
            raise MissingExampleInputsError(
                "quantize(model, None) goes without data, but needs example_inputs to know what the"
                " model takes: pass example_inputs=(torch.randn(1, 3, 224, 224),) or the like"
            )
    elif example_inputs is None and forward is None:
        data, example_inputs = first_inputs(model, data)
    prepared = prepare_fx(
        model,
        qconfig_mapping,
        example_inputs,
        target=target,
        bias_correction=bias_correction,
        strict=strict,
    )
    if data is None:
        estimate_ranges(prepared, model, example_inputs, input_mean, input_deviation, diagnostics)
    else:
        calibrate(prepared, data, forward=forward, num_batches=num_batches, progress=progress)
    int8 = convert_fx(prepared, tune=tune, strict=strict)
    _say_what_stays(int8, diagnostics)
    return int8


DYNAMIC_TYPES: Final[tuple[ObjectType, ...]] = (
    nn.Linear,
    F.linear,
    nn.LSTM,
    nn.GRU,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
)
"""What :func:`quantize_dynamic` quantizes to int8 or float16 weights unless told otherwise."""

TABLE_TYPES: Final[tuple[ObjectType, ...]] = (
    nn.Embedding,
    F.embedding,
    nn.EmbeddingBag,
    F.embedding_bag,
)
"""What :func:`quantize_dynamic` quantizes to tables of 8- or 4-bit integers."""


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Mapping[Any, object] | Collection[Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    *,
    example_inputs: Any = None,
    target: str = "x86",
    tune: bool | KernelTable = False,
    strict: bool = False,
) -> QuantGraphModule:
    """Quantize weights now and activations at run time: no calibration data are needed.

    It suits linears and recurrent modules whose weights are large for the work they do
    (transformers, LSTMs, batch 1); convolutions want :func:`quantize`.

    Args:
        model: a module in evaluation mode. It is not touched.
        qconfig_spec: what is quantized: a dict from module class, function or module path to a
            dynamic or weight-only qconfig (``None`` leaves it in floating point), or a set of such
            keys, which get the default of ``dtype``. ``None`` stands for :data:`DYNAMIC_TYPES`, or
            :data:`TABLE_TYPES` where ``dtype`` is one of tables.
        dtype: of the weights: ``torch.qint8`` (or ``int8``), ``torch.float16`` for dynamic ops,
            ``torch.quint8`` and ``torch.quint4x2`` for tables.
        example_inputs: see :func:`fxquant.prepare_fx`; without them ``audit`` cannot weigh ops by
            their multiply-accumulates, and conditions on shapes cannot be traced.
        target: see :func:`fxquant.prepare_fx`.
        tune: choose kernels by measurement, see :func:`fxquant.convert_fx`; it needs
            ``example_inputs`` for the shapes.
        strict: turn every warning into an error.

    Returns:
        The quantized model, which takes and gives floats.

    Raises:
        ConfigError: an unknown dtype, or a spec that is none.
        UnmatchedRuleError: a path in ``qconfig_spec`` that the model does not have.
    """
    mapping = _dynamic_mapping(qconfig_spec, dtype)
    diagnostics = Diagnostics(strict=strict)
    prepared = prepare_fx(model, mapping, example_inputs, target=target, strict=strict)
    made = convert_fx(prepared, tune=tune, strict=strict)
    if not any(row.runs in (Runs.INT8, Runs.EMULATED, *HALF) for row in explain(made).rows):
        wanted = ", ".join(sorted(map(_key_name, _dynamic_keys(qconfig_spec, dtype))))
        diagnostics.warn(
            f"quantize_dynamic quantized nothing: the model calls none of {wanted} that it could;"
            " print(explain(result)) has the reasons",
            LoweringWarning,
        )
    return made


def _dynamic_mapping(spec: Any, dtype: torch.dtype) -> QConfigMapping:
    default = _dynamic_default(dtype)
    mapping = QConfigMapping()
    for key in _dynamic_keys(spec, dtype):
        qconfig = spec[key] if isinstance(spec, Mapping) else default
        if isinstance(key, str):
            mapping.set_module_name(key, qconfig)
        else:
            mapping.set_object_type(key, qconfig)
    return mapping if spec is not None else with_default_types(mapping)


def _dynamic_keys(spec: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    if isinstance(spec, (str, bytes)) or not isinstance(spec, (Collection, type(None))):
        raise ConfigError(
            "qconfig_spec takes a dict from module classes, functions or paths to qconfigs, or a"
            f" set of such keys, got {spec!r}"
        )
    if spec is not None:
        return tuple(spec)
    return TABLE_TYPES if dtype in (torch.quint8, torch.quint4x2) else DYNAMIC_TYPES


def _dynamic_default(dtype: torch.dtype) -> QConfig:
    defaults = {
        torch.qint8: get_default_dynamic_qconfig(),
        torch.int8: get_default_dynamic_qconfig(),
        torch.float16: float16_dynamic_qconfig,
        torch.quint8: float_qparams_weight_only_qconfig,
        torch.quint4x2: float_qparams_weight_only_qconfig_4bit,
    }
    if dtype not in defaults:
        raise ConfigError(
            f"quantize_dynamic has no default for dtype {dtype!r}; it takes"
            f" {', '.join(map(str, defaults))}"
        )
    return defaults[dtype]


def _key_name(key: object) -> str:
    return repr(key) if isinstance(key, str) else str(getattr(key, "__name__", key))


def estimate_ranges(
    prepared: QuantGraphModule,
    model: nn.Module,
    example_inputs: Any,
    mean: float,
    deviation: float,
    diagnostics: Diagnostics,
) -> None:
    """Fill the observers of ``prepared`` from made-up inputs and batch-norms instead of data.

    Args:
        prepared: what ``prepare_fx`` made of ``model``; its observers are filled.
        model: the float model, batch-norms in place. It is not touched.
        example_inputs: for the shapes.
        mean: of the inputs.
        deviation: of the inputs.
        diagnostics: takes the warning that says what was done and what it costs.

    Raises:
        CalibrationError: the model does not run on inputs made up like the example inputs.
    """
    quiet = Diagnostics(silent=True)  # prepare_fx has said everything about the trace already
    graph = capture_any(model, quiet, example_inputs, Steering(), trains=False).graph
    found = estimate(prepared, graph, example_inputs, mean=mean, deviation=deviation)
    statistics = (
        f"; the running statistics of {', '.join(map(repr, found.unnormalized[:5]))} were used, as"
        " they see one value per channel"
        if found.unnormalized
        else ""
    )
    unseen = f"; unknown for {', '.join(map(repr, found.blind[:5]))}" if found.blind else ""
    diagnostics.warn(
        "quantized without data: activation ranges come from batch-norms and made-up inputs of mean"
        f" {mean:g} and deviation {deviation:g}{statistics}{unseen}."
        f" On the zoo's models this costs {DATA_FREE_COST}; pass calibration data to do better",
        CalibrationWarning,
    )


def first_inputs(model: nn.Module, data: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """The data, untouched, and the inputs in its first batch."""
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "the data hold no batch. Pass batches, or data=None to go without calibration"
        ) from None
    again = itertools.chain([first], iterator) if iterator is data else data
    if isinstance(first, (tuple, list)):
        return again, tuple(first[: _wanted(model, len(first))])
    return again, first if isinstance(first, Mapping) else (first,)


def _wanted(model: nn.Module, given: int) -> int:
    """How many items of a batch are inputs: as many as the model requires; the rest are labels."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return given
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, min(len(required), given))


def _say_what_stays(model: QuantGraphModule, diagnostics: Diagnostics) -> None:
    report = audit(model)
    if report.confirmed is False:
        seen = "; ".join(report.discrepancies)
        diagnostics.warn(
            f"the profiler saw other kernels than the graph claims: {seen}", LoweringWarning
        )
    stays = [row for row in report.fp32 if _computes(row)]
    if stays:
        shown = "; ".join(f"{row.name!r} ({row.op}): {row.reason}" for row in stays[:5])
        more = f"; and {len(stays) - 5} more, see audit(model)" if len(stays) > 5 else ""
        diagnostics.warn(
            f"{len(stays)} op(s) that multiply and accumulate stay in FP32: {shown}{more}",
            LoweringWarning,
        )


def _computes(row: OpRow) -> bool:
    wished = row.reason.startswith(("no qconfig", "nobody reads its result"))
    return row.runs is Runs.FP32 and row.kind in COMPUTE_KINDS and not wished
