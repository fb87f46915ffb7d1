"""The ``x86-compat`` target: torch.ao's op list, observers and sharing, on the kernels of ``x86``.

Every op of the list that has a qconfig is quantized, whoever reads it; its output is observed, or,
for ops that move values, shares its input's observer.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fxquant.backend_config import BackendConfig
from fxquant.dataflow import is_presumably_float
from fxquant.errors import ChannelWeightError
from fxquant.op_view import Form, Op
from fxquant.qconfig import QConfig, spec_of
from fxquant.targets.allow_list import restrict
from fxquant.targets.compat_config import compat_backend_config
from fxquant.targets.guards import instance_statistics, surely_floats, zero_padding_mode
from fxquant.targets.table import OutputPolicy, Role, Row, Target
from fxquant.targets.x86 import X86

_ABOUT_ANY_FORM = frozenset({zero_padding_mode})
"""What the function that stands for an op in a reference graph cannot express either."""
_INTEGERS = (torch.uint8, torch.int8, torch.int32)
"""What a backend config may ask for; kernels take uint8, others stay as in the reference graph."""
_HALF_RANGE = 127
"""To which torch.ao quantizes at run time on x86, whatever the CPU."""


def _always(row: Row) -> Row:
    """A row of ``x86`` that is quantized wherever it has a qconfig, whatever its kernel takes."""
    return replace(
        row,
        guards=tuple(guard for guard in row.guards if not row.static or guard in _ABOUT_ANY_FORM),
        kernel_guards=tuple(g for g in row.guards if row.static and g is not surely_floats),
        output=OutputPolicy.ALWAYS,
        float_output=False,
        dynamic_quant_max=_HALF_RANGE,
    )


def _no_channels(op: Op, qconfig: QConfig) -> str | None:
    """Refuse weights per channel as torch.ao does, by an error."""
    factory = spec_of(qconfig.weight)
    if factory is None or factory.spec is None or not factory.spec.is_per_channel:
        return None
    is_module = op.form is Form.MODULE
    name = type(op.owner.get_submodule(str(op.node.target))).__name__ if is_module else op.name
    raise ChannelWeightError(
        "Per channel weight observer is not supported yet for ConvTranspose{n}d. Here it is"
        f" {op.node.name!r} ({name}): set a qconfig with a per-tensor weight for this type, as"
        " get_default_qconfig_mapping does, or use fxquant.prepare_fx, which takes one scale for"
        " the whole weight"
    )


def _unary(kind: str, kernel: str, *kernel_guards: object) -> Row:
    return Row(
        kind=kind,
        role=Role.COMPUTE,
        kernel=kernel,
        output=OutputPolicy.ALWAYS,
        kernel_guards=kernel_guards,  # type: ignore[arg-type]  # forwarded as given
    )


def _shares(kind: str, kernel: str = "") -> Row:
    return Row(
        kind=kind,
        role=Role.SHARES,
        kernel=kernel or f"aten::{kind} on int8",
        output=OutputPolicy.ALWAYS,
    )


_MORE: tuple[Row, ...] = (
    _unary("elu", "quantized::elu"),
    _unary("hardswish", "quantized::hardswish"),
    _unary("prelu", "float, between dequantize and quantize"),
    _unary("dropout", "nothing in evaluation"),
    _unary("instance_norm", "quantized::instance_norm", instance_statistics),
    _unary("group_norm", "quantized::group_norm"),
    _unary("layer_norm", "quantized::layer_norm"),
    _unary("hardsigmoid", "aten::hardsigmoid on int8"),
    _unary("sigmoid", "aten::sigmoid on int8"),
    _unary("tanh", "aten::tanh on int8"),
    _unary("softmax", "quantized::softmax"),
    *(
        _shares(kind)
        for kind in (
            *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
            *("avg_pool1d", "max_pool3d", "mean", "identity", "repeat", "repeat_interleave"),
        )
    ),
)

_ROWS = {
    row.kind: replace(
        row,
        input_dtypes=_INTEGERS,
        symmetric_weight=False,
        qconfig_guards=(_no_channels,) if row.kind.startswith("conv_transpose") else (),
    )
    for row in (*(_always(r) for r in X86.rows.values() if r.role is not Role.FLOAT), *_MORE)
}


def _with_scalar_rows(target: Target) -> Target:
    """``x + 2`` and ``x * 2`` keep the observer of ``x``, in the spellings of ``x + y``."""
    rows = dict(target.rows)
    for kind in ("add", "mul"):
        two = rows[kind]
        rows[f"{kind}_scalar"] = replace(
            two,
            kind=f"{kind}_scalar",
            role=Role.SHARES,
            kernel=f"quantized::{kind}.Scalar",
            kernel_guards=(),
        )
    return replace(target, rows=rows)


def compat_target(backend_config: BackendConfig) -> Target:
    """The table narrowed to what a backend config allows."""
    whole = replace(
        X86,
        name="x86-compat",
        rows=_ROWS,
        rounds_half_inputs=True,
        is_float=is_presumably_float,
        saturates_at_storage=True,
    )
    narrowed = restrict(whole, backend_config)
    both = {"add", "mul"} <= narrowed.rows.keys()
    return _with_scalar_rows(narrowed) if both else narrowed


X86_COMPAT = compat_target(compat_backend_config())
