"""The ``x86`` target: PyTorch's own int8 operators, as a table.

Times in reasons: one thread, AVX512-VNNI, torch 2.13, 200,704 elements (1 x 64 x 56 x 56) unless
another size is given; benchmarks/elementwise.py measures the element-wise functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxquant.half import HALF_KINDS
from fxquant.targets.guards import (
    batched,
    constant_bounds,
    constant_hyperparameters,
    constant_numbers,
    evaluation_statistics,
    exact_padding,
    four_or_five_dimensional,
    instance_statistics,
    known_batch,
    layered_evaluation,
    looks_up_plainly,
    no_indices,
    no_wrong_fast_path,
    resizes_by_integers,
    surely_floats,
    tensor_operands,
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


_OWN_SCALE_OF_POOLS = (
    "its int8 kernel takes 463 us, dequantize + float avg_pool1d + quantize 511, and keeps the wide"
    " scale of what it averages"
)
_OWN_SCALE = (
    "an average has a far smaller range than what it averages, and the int8 kernel would keep the"
    " wide scale (2 to 3 bits lost); dequantize + float mean + quantize take 22 us where the int8"
    " kernel takes 13"
)

_NO_KERNEL = "PyTorch has no int8 kernel for it"
_COMPARES = (
    "integers of different scales cannot be compared, and the result is no number: the operands"
    " are compared in FP32 (25 us)"
)
_TWO_RESULTS = (
    "it gives values and indices, and finding them takes far longer than the conversions do:"
)
_FLOAT_REASONS: Mapping[str, str] = {
    "bilinear": (
        f"{_NO_KERNEL}: the product of three tensors; 8 x 64 x 64 features take 1135 us with both"
        " conversions, 1130 without"
    ),
    "baddbmm": f"{_NO_KERNEL}; torch.bmm and an addition of their own run in int8",
    "addmm": (
        f"{_NO_KERNEL} with a computed second factor; with a constant one it is a linear, in int8"
    ),
    "einsum": (
        f"{_NO_KERNEL}, and quantized::matmul is no faster than the float product (12 x 128 x 64 x"
        " 128: 288 us, 258 in FP32); with a constant matrix it is a linear, in int8"
    ),
    "multihead_attention": (
        "its weights lie in one module that PyTorch computes as a whole. Prepared in evaluation"
        " mode by prepare_fx it is taken apart, and its linears run in int8"
    ),
    "transformer": (
        "its layers lie in one module that PyTorch computes as a whole. Prepared in evaluation"
        " mode by prepare_fx it is taken apart, and its linears run in int8"
    ),
    "rnn": f"{_NO_KERNEL}; nn.LSTM, nn.GRU and nn.RNNCell run in int8 with a dynamic qconfig",
    "scaled_dot_product_attention": (
        "its matrix products are as fast in FP32 (197 x 64, 12 heads: 735 us, quantized::matmul"
        " 781), and the softmax between them is computed in FP32 anyway"
    ),
    "sub": (
        f"{_NO_KERNEL}; dequantize twice + float difference + quantize take 61 us, quantized::add"
        " of 255 - q 43, but 16 and 17 for 50 K elements, and 4 and 10 for 3 K"
    ),
    "div": f"{_NO_KERNEL}; dequantize twice + float quotient + quantize take 65 us",
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _COMPARES),
    "where": (
        "PyTorch selects bytes no faster than floats (936 and 839 us, of the 901 that conversions"
        " and selection take together)"
    ),
    "layer_norm": (
        "quantized::layer_norm takes 80 us where dequantize + float layer_norm + quantize take 59"
        " (197 x 768)"
    ),
    "rms_norm": f"{_NO_KERNEL}; dequantize + float rms_norm + quantize take 76 us (197 x 768)",
    "softmax": (
        "quantized::softmax takes 89 us, dequantize + float softmax + quantize the same (197 x"
        " 768), and its scale is always 1/256"
    ),
    "log_softmax": f"{_NO_KERNEL}; with both conversions it takes 84 us in FP32 (197 x 768)",
    "prelu": (
        "quantized::prelu takes 44 us, dequantize + float prelu + quantize 48, and it rounds the"
        " slopes"
    ),
    "silu": (
        "dequantize + float silu + quantize take 74 us, a table of 256 bytes 89 (behind a conv2d or"
        " a linear it runs inside their kernel)"
    ),
    "gelu": (
        "dequantize + float gelu + quantize take 81 us, a table of 256 bytes 89, the int8 kernel"
        " 174 (behind a linear it runs inside its kernel)"
    ),
    "avg_pool1d": _OWN_SCALE_OF_POOLS,
    **{
        f"adaptive_max_pool{d}d": (
            f"{_NO_KERNEL}; finding the maxima takes 262 us, both conversions 17. A max_pool of"
            " the same windows runs in int8"
        )
        for d in (1, 2, 3)
    },
    **{
        f"lp_pool{d}d": f"{_NO_KERNEL}, and powers need more than 8 bits; it takes 390 us in FP32"
        for d in (1, 2, 3)
    },
    "sum": (
        "a sum has a far larger range than what it adds up; dequantize + float sum + quantize take"
        " 25 us, a sum of bytes 37"
    ),
    **dict.fromkeys(("max", "min"), f"{_TWO_RESULTS} 257 us of 275; amax and amin run in int8"),
    "topk": f"{_TWO_RESULTS} 248 us of 262 (197 x 768)",
    "sort": f"{_TWO_RESULTS} 13.2 ms of 13.4",
}
"""Kind -> why it is computed in FP32, with the measurement."""

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
    *(
        Row(kind=kind, role=Role.COMPUTE, kernel="quantized::matmul", guards=(tensor_operands,))
        for kind in ("matmul", "bmm")
    ),
    Row(
        kind="batch_norm",
        role=Role.COMPUTE,
        kernel="quantized::batch_norm",
        epilogues=_SATURATION,
        guards=(four_or_five_dimensional, evaluation_statistics),
    ),
    Row(
        kind="group_norm",
        role=Role.COMPUTE,
        kernel="quantized::group_norm",
        guards=(known_batch,),
    ),
    Row(
        kind="instance_norm",
        role=Role.COMPUTE,
        kernel="quantized::instance_norm",
        guards=(known_batch, instance_statistics),
    ),
    _binary("add"),
    _binary("mul"),
    Row(
        kind="leaky_relu",
        role=Role.COMPUTE,
        kernel="quantized::leaky_relu",
    ),
    *(
        Row(
            kind=kind,
            role=Role.COMPUTE,
            kernel="aten::index_select on a table of 256 bytes",
            looked_up=True,
            guards=(constant_numbers,),
        )
        for kind in ("elu", "celu", "selu", "mish", "softplus", "logsigmoid", "tanh")
    ),
    # -- ops whose output has the parameters of their input ---------------------------------------
    *(
        _shares(kind, "aten::clamp on int8", guards=(constant_bounds,))
        for kind in ("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
    ),
    _shares("relu", "aten::relu on int8"),
    _shares("max_pool1d", "quantized::max_pool1d", worth_alone=True, guards=(no_indices,)),
    _shares("max_pool2d", "quantized::max_pool2d", worth_alone=True, guards=(no_indices,)),
    _shares("max_pool3d", "aten::max_pool3d on int8", worth_alone=True, guards=(no_indices,)),
    _shares("avg_pool2d", "aten::avg_pool2d on int8"),
    _shares("avg_pool3d", "aten::avg_pool3d on int8", guards=(batched,)),
    _shares("interpolate", "aten::upsample on int8", guards=(resizes_by_integers,)),
    _shares("pad", "aten::pad on bytes", guards=(exact_padding,)),
    Row(
        kind="cat",
        role=Role.SHARES,
        kernel="aten::cat on bytes",
        worth_alone=True,
        epilogues={"relu": Epilogue.SATURATION},
    ),
    _shares("stack", "aten::stack on bytes"),
    *(
        _shares(kind, f"aten::{kind} on bytes", guards=(tensor_operands,))
        for kind in ("maximum", "minimum")
    ),
    *(
        _shares(kind, f"aten::{kind} on bytes")
        for kind in ("amax", "amin", "roll", "flip", "repeat", "repeat_interleave")
    ),
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
            "expand",
            "unflatten",
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
        "hardsigmoid",
        "the int8 kernel takes as long as dequantize + float hardsigmoid + quantize (45 us), and"
        " its scale is always 1/256",
    ),
    _float(
        "hardswish",
        "quantized::hardswish takes 48 us; dequantize + float hardswish + quantize take 43"
        " (behind a conv2d or a linear it runs inside their kernel)",
    ),
    *(_float(kind, reason) for kind, reason in _FLOAT_REASONS.items()),
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
