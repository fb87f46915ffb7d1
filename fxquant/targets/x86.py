"""The ``x86`` target: PyTorch's own int8 operators, as a table.

Times in reasons: one thread, AVX512-VNNI, 200,704 elements (1 x 64 x 56 x 56), torch 2.13.
"""

from __future__ import annotations

import torch

from fxquant.half import HALF_KINDS
from fxquant.targets.guards import (
    batched,
    constant_bounds,
    constant_hyperparameters,
    evaluation_statistics,
    four_or_five_dimensional,
    layered_evaluation,
    looks_up_plainly,
    no_indices,
    no_wrong_fast_path,
    resizes_by_integers,
    surely_floats,
    tensor_operands,
    zero_constant_padding,
    zero_padding_mode,
)
from fxquant.targets.saturation import kernel_for
from fxquant.targets.table import Epilogue, OutputPolicy, Role, Row, Target

_SATURATION = dict.fromkeys(
    ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), Epilogue.SATURATION
)
_FLOAT_FUNCTIONS = ("leaky_relu", "hardswish", "silu", "gelu", "sigmoid", "tanh")
_CONV_EPILOGUES = (
    _SATURATION
    | dict.fromkeys(_FLOAT_FUNCTIONS, Epilogue.FLOAT)
    | {"hardswish": Epilogue.KERNEL, "silu": Epilogue.KERNEL, "add": Epilogue.KERNEL}
)
_LINEAR_EPILOGUES = (
    _SATURATION
    | dict.fromkeys(_FLOAT_FUNCTIONS, Epilogue.FLOAT)
    | dict.fromkeys(("leaky_relu", "hardswish", "silu", "gelu", "tanh"), Epilogue.KERNEL)
)


def _conv(dimensions: int) -> Row:
    epilogues = dict(_CONV_EPILOGUES)
    if dimensions != 2:
        del epilogues["add"]
        epilogues |= {"hardswish": Epilogue.FLOAT, "silu": Epilogue.FLOAT}
    return Row(
        kind=f"conv{dimensions}d",
        role=Role.COMPUTE,
        kernel=f"quantized::conv{dimensions}d",
        weight_dtypes=(torch.int8,),
        weight_axis=0,
        float_output=True,
        epilogues=epilogues,
        guards=(constant_hyperparameters, zero_padding_mode, batched),
    )


def _conv_transpose(dimensions: int) -> Row:
    return Row(
        kind=f"conv_transpose{dimensions}d",
        role=Role.COMPUTE,
        kernel=f"quantized::conv_transpose{dimensions}d",
        weight_dtypes=(torch.int8,),
        symmetric_weight=False,
        weight_axis=None,  # both engines refuse per-channel weights; fbgemm, since oneDNN is wrong
        output=OutputPolicy.ALWAYS,
        epilogues=_SATURATION,
        guards=(constant_hyperparameters, no_wrong_fast_path, batched),
    )


def _binary(kind: str) -> Row:
    return Row(
        kind=kind,
        role=Role.COMPUTE,
        kernel=f"quantized::{kind}",
        epilogues=_SATURATION,
        guards=(tensor_operands, surely_floats),
    )


def _shares(kind: str, kernel: str, **options: object) -> Row:
    return Row(kind=kind, role=Role.SHARES, kernel=kernel, **options)  # type: ignore[arg-type]  # forwarded as given


def _float(kind: str, reason: str) -> Row:
    return Row(kind=kind, role=Role.FLOAT, reason=reason)


_OWN_SCALE = (
    "an average has a far smaller range than what it averages, and the int8 kernel would keep the"
    " wide scale (2 to 3 bits lost); dequantize + float mean + quantize take 22 us where the int8"
    " kernel takes 13"
)

ROWS: tuple[Row, ...] = (
    *(_conv(d) for d in (1, 2, 3)),
    *(_conv_transpose(d) for d in (1, 2, 3)),
    Row(
        kind="linear",
        role=Role.COMPUTE,
        kernel="quantized::linear",
        weight_dtypes=(torch.int8,),
        weight_axis=0,
        float_output=True,
        dynamic="quantized::linear_dynamic",
        epilogues=_LINEAR_EPILOGUES,
    ),
    *(
        Row(
            kind=kind,
            role=Role.COMPUTE,
            static=False,
            dynamic=f"aten::quantized_{kind}",
            weight_axis=0,
            guards=(layered_evaluation,),
        )
        for kind in ("lstm", "gru")
    ),
    *(
        Row(
            kind=f"{kind}_cell",
            role=Role.COMPUTE,
            static=False,
            dynamic=f"quantized::quantized_{functions}_cell_dynamic",
            dynamic_quant_max=127,
            weight_axis=0,
        )
        for kind, functions in (("lstm", "lstm"), ("gru", "gru"), ("rnn", "rnn_{tanh,relu}"))
    ),
    *(
        Row(
            kind=kind,
            role=Role.COMPUTE,
            static=False,
            weight_only=kernel,
            weight_dtypes=(torch.uint8,),
            weight_axis=0,
            symmetric_weight=False,
            guards=(looks_up_plainly,),
        )
        for kind, kernel in (
            ("embedding", "quantized::embedding_{byte,4bit}"),
            ("embedding_bag", "quantized::embedding_bag_{byte,4bit}"),
        )
    ),
    Row(
        kind="matmul",
        role=Role.COMPUTE,
        kernel="quantized::matmul",
        epilogues={},
        guards=(tensor_operands,),
    ),
    Row(
        kind="batch_norm",
        role=Role.COMPUTE,
        kernel="quantized::batch_norm",
        epilogues=_SATURATION,
        guards=(four_or_five_dimensional, evaluation_statistics),
    ),
    _binary("add"),
    _binary("mul"),
    Row(
        kind="leaky_relu",
        role=Role.COMPUTE,
        kernel="quantized::leaky_relu",
    ),
    # -- ops whose output has the parameters of their input ---------------------------------------
    *(
        _shares(kind, "aten::clamp on int8", guards=(constant_bounds,))
        for kind in ("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
    ),
    _shares("relu", "aten::relu on int8"),
    _shares("max_pool1d", "quantized::max_pool1d", worth_alone=True, guards=(no_indices,)),
    _shares("max_pool2d", "quantized::max_pool2d", worth_alone=True, guards=(no_indices,)),
    _shares("avg_pool2d", "aten::avg_pool2d on int8"),
    _shares("avg_pool3d", "aten::avg_pool3d on int8", guards=(batched,)),
    _shares("interpolate", "aten::upsample on int8", guards=(resizes_by_integers,)),
    _shares("pad", "aten::constant_pad_nd on bytes", guards=(zero_constant_padding,)),
    Row(
        kind="cat",
        role=Role.SHARES,
        kernel="aten::cat on bytes",
        worth_alone=True,
        epilogues={"relu": Epilogue.SATURATION},
    ),
    _shares("stack", "aten::stack on bytes"),
    *(
        _shares(kind, f"aten::{kind} on int8", guards=(surely_floats,) if kind == "slice" else ())
        for kind in (
            "flatten",
            "reshape",
            "view",
            "permute",
            "transpose",
            "squeeze",
            "unsqueeze",
            "slice",
            "chunk",
            "split",
            "tensor_split",
            "select",
            "narrow",
            "contiguous",
            "detach",
            "pixel_shuffle",
            "pixel_unshuffle",
            "channel_shuffle",
        )
    ),
    # -- floating point by design ------------------------------------------------------------------
    _float("mean", _OWN_SCALE),
    _float("adaptive_avg_pool1d", _OWN_SCALE),
    _float("adaptive_avg_pool2d", _OWN_SCALE),
    _float("adaptive_avg_pool3d", _OWN_SCALE),
    _float(
        "sigmoid",
        "quantized::sigmoid takes 122 us; dequantize + float sigmoid + quantize take 71",
    ),
    _float(
        "tanh",
        "quantized::tanh takes 411 us, the float function the same, and float loses no bits",
    ),
    _float(
        "hardsigmoid",
        "the int8 kernel takes as long as dequantize + float hardsigmoid + quantize (45 us), and"
        " its scale is always 1/256",
    ),
    _float(
        "hardswish",
        "quantized::hardswish takes 48 us; dequantize + float hardswish + quantize take 43"
        " (behind a conv2d or a linear it runs inside their kernel)",
    ),
)

X86 = Target(
    name="x86",
    rows={row.kind: row for row in ROWS},
    select_kernel=kernel_for,
    half_kinds=HALF_KINDS,
)

NO_INT8_KERNEL = (
    "PyTorch has no int8 kernel for '{kind}' that beats float; it runs in FP32 between a"
    " dequantize and a quantize"
)
