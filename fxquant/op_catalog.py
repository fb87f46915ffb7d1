"""The kinds of operation that fxquant knows, and every form PyTorch code spells them in.

A kind is one mathematical operation. A form is a module class, a function or a method name.
Everything here is data; :mod:`fxquant.op_view` reads it. Adding a form is adding a name to a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import kernels, recurrent
from fxquant.qat_modules import FLOAT_BY_QAT
from fxquant.reference_modules import REFERENCE_BY_FLOAT

REQUIRED = object()
"""Marks a parameter of a signature that has no default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpKind:
    """One operation and all its spellings.

    Attributes:
        name: the canonical name, also printed in reports.
        signature: parameter names and defaults in positional order, of the functional form;
            a method has the same with ``self`` as the first.
        activations: the parameters that carry activations (float tensors to be quantized).
        constants: the parameters that carry weights, biases and statistics.
        functions: the callables that mean this kind with :attr:`signature`.
        methods: the ``torch.Tensor`` method names that mean this kind.
        modules: module class -> names of the attributes that stand for parameters
            (parameter name -> attribute name); constants are read under their own names.
        named: qualified names of functions of other libraries, which are not imported for it.
        inplace: functions and methods that also write their first argument.
        variadic: the method form takes the last parameter as separate arguments too
            (``x.view(2, -1)``).
        definition: the function only defines the kind, slowly: reference graphs alone call it.
        fixed: module class -> values of parameters that it fixes and has no attribute for.
        gives_floats: the result is one float tensor where the input is one: no comparison, index or
            tuple.
    """

    name: str
    signature: tuple[tuple[str, object], ...]
    activations: tuple[str, ...] = ("input",)
    constants: tuple[str, ...] = ()
    functions: tuple[Callable[..., object], ...] = ()
    methods: tuple[str, ...] = ()
    modules: dict[type[nn.Module], dict[str, str]] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    inplace: tuple[object, ...] = ()
    variadic: bool = False
    definition: bool = False
    fixed: dict[type[nn.Module], dict[str, object]] = field(default_factory=dict)
    gives_floats: bool = True


def _signature(text: str, **defaults: object) -> tuple[tuple[str, object], ...]:
    """``_signature("input weight bias", bias=None)``: names in order, defaults by keyword."""
    return tuple((name, defaults.get(name, REQUIRED)) for name in text.split())


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_CONV_ATTRIBUTES = _same("stride", "padding", "dilation", "groups", "padding_mode")
_CONV_TRANSPOSE_ATTRIBUTES = _same("stride", "padding", "output_padding", "groups", "dilation")
_MAX_POOL_ATTRIBUTES = _same(
    "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
)
_AVG_POOL_ATTRIBUTES = _same("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


_PADDING_MODULES: dict[type[nn.Module], str] = {
    getattr(nn, f"{name}Pad{dim}d"): mode
    for name, mode in (
        ("Reflection", "reflect"),
        ("Replication", "replicate"),
        ("Circular", "circular"),
    )
    for dim in (1, 2, 3)
}


def _conv(dim: int, module: type[nn.Module], function: Callable[..., object]) -> OpKind:
    return OpKind(
        name=f"conv{dim}d",
        signature=_signature(
            "input weight bias stride padding dilation groups",
            bias=None,
            stride=1,
            padding=0,
            dilation=1,
            groups=1,
        ),
        constants=("weight", "bias"),
        functions=(function,),
        modules={module: _CONV_ATTRIBUTES},
    )


def _conv_transpose(dim: int, module: type[nn.Module], function: Callable[..., object]) -> OpKind:
    return OpKind(
        name=f"conv_transpose{dim}d",
        signature=_signature(
            "input weight bias stride padding output_padding groups dilation",
            bias=None,
            stride=1,
            padding=0,
            output_padding=0,
            groups=1,
            dilation=1,
        ),
        constants=("weight", "bias"),
        functions=(function,),
        modules={module: _CONV_TRANSPOSE_ATTRIBUTES},
    )


def _max_pool(dim: int, module: type[nn.Module], functions: tuple[object, ...]) -> OpKind:
    return OpKind(
        name=f"max_pool{dim}d",
        signature=_signature(
            "input kernel_size stride padding dilation ceil_mode return_indices",
            stride=None,
            padding=0,
            dilation=1,
            ceil_mode=False,
            return_indices=False,
        ),
        functions=functions,  # type: ignore[arg-type]  # boolean_dispatch objects are callables without a type
        modules={module: _MAX_POOL_ATTRIBUTES},
    )


def _avg_pool(dim: int, module: type[nn.Module], function: Callable[..., object]) -> OpKind:
    attributes = dict(_AVG_POOL_ATTRIBUTES)
    if dim > 1:
        attributes["divisor_override"] = "divisor_override"
    return OpKind(
        name=f"avg_pool{dim}d",
        signature=_signature(
            "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
            stride=None,
            padding=0,
            ceil_mode=False,
            count_include_pad=True,
            divisor_override=None,
        ),
        functions=(function,),
        modules={module: attributes},
    )


def _unary(
    name: str,
    functions: tuple[Callable[..., object], ...] = (),
    module: type[nn.Module] | None = None,
    *,
    extra: str = "",
    attributes: dict[str, str] | None = None,
    methods: tuple[str, ...] = (),
    inplace: tuple[object, ...] = (),
    variadic: bool = False,
    gives_floats: bool = True,
    **defaults: object,
) -> OpKind:
    """A unary function; ``extra`` lists the further parameters after ``input``."""
    return OpKind(
        gives_floats=gives_floats,
        name=name,
        signature=_signature(f"input {extra}", **({"inplace": False} | defaults)),
        variadic=variadic,
        functions=functions,
        methods=methods,
        modules={} if module is None else {module: attributes or {}},
        inplace=inplace,
    )


def _arithmetic(
    name: str,
    functions: tuple[Callable[..., object], ...],
    methods: tuple[str, ...],
    inplace: tuple[object, ...] = (),
    *,
    extra: str = "",
    gives_floats: bool = True,
    **defaults: object,
) -> OpKind:
    return OpKind(
        gives_floats=gives_floats,
        name=name,
        signature=_signature(f"input other {extra}", **defaults),
        activations=("input", "other"),
        functions=functions,
        methods=methods,
        inplace=inplace,
    )


KINDS: tuple[OpKind, ...] = (
    # -- convolutions and matrix products ---------------------------------------------------------
    _conv(1, nn.Conv1d, F.conv1d),
    _conv(2, nn.Conv2d, F.conv2d),
    _conv(3, nn.Conv3d, F.conv3d),
    _conv_transpose(1, nn.ConvTranspose1d, F.conv_transpose1d),
    _conv_transpose(2, nn.ConvTranspose2d, F.conv_transpose2d),
    _conv_transpose(3, nn.ConvTranspose3d, F.conv_transpose3d),
    OpKind(
        name="linear",
        signature=_signature("input weight bias", bias=None),
        constants=("weight", "bias"),
        functions=(F.linear,),
        modules={nn.Linear: {}},
    ),
    OpKind(
        name="bilinear",
        signature=_signature("input1 input2 weight bias", bias=None),
        activations=("input1", "input2"),
        constants=("weight", "bias"),
        functions=(F.bilinear,),
        modules={nn.Bilinear: {}},
    ),
    _arithmetic(
        "matmul", (torch.matmul, operator.matmul, torch.mm), ("matmul", "mm", "__matmul__")
    ),
    _arithmetic("bmm", (torch.bmm,), ("bmm",), extra="out_dtype", out_dtype=None),
    OpKind(
        name="baddbmm",
        signature=_signature("input batch1 batch2 beta alpha", beta=1, alpha=1),
        activations=("input", "batch1", "batch2"),
        functions=(torch.baddbmm,),
        methods=("baddbmm",),
    ),
    OpKind(
        name="addmm",
        signature=_signature("input mat1 mat2 beta alpha", beta=1, alpha=1),
        activations=("input", "mat1", "mat2"),
        functions=(torch.addmm,),
        methods=("addmm",),
    ),
    OpKind(
        name="einsum",
        signature=_signature("equation operands"),
        activations=("operands",),
        functions=(torch.einsum,),
    ),
    OpKind(
        name="scaled_dot_product_attention",
        signature=_signature(
            "query key value attn_mask dropout_p is_causal scale enable_gqa",
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
            scale=None,
            enable_gqa=False,
        ),
        activations=("query", "key", "value"),
        functions=(F.scaled_dot_product_attention,),
    ),
    # -- tables and recurrent networks ------------------------------------------------------------
    OpKind(
        name="embedding",
        signature=_signature(
            "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
            padding_idx=None,
            max_norm=None,
            norm_type=2.0,
            scale_grad_by_freq=False,
            sparse=False,
        ),
        activations=(),
        constants=("weight",),
        functions=(F.embedding,),
        modules={
            nn.Embedding: _same(
                "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
            )
        },
    ),
    OpKind(
        name="embedding_bag",
        signature=_signature(
            "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse"
            " per_sample_weights include_last_offset padding_idx",
            offsets=None,
            max_norm=None,
            norm_type=2,
            scale_grad_by_freq=False,
            mode="mean",
            sparse=False,
            per_sample_weights=None,
            include_last_offset=False,
            padding_idx=None,
        ),
        activations=(),
        constants=("weight",),
        functions=(F.embedding_bag,),
        modules={
            nn.EmbeddingBag: _same(
                "max_norm",
                "norm_type",
                "scale_grad_by_freq",
                "mode",
                "sparse",
                "include_last_offset",
                "padding_idx",
            )
        },
    ),
    *(
        OpKind(
            name=name,
            signature=_signature(
                "input hx weights bidirectional batch_first levels rounded",
                hx=None,
                bidirectional=False,
                batch_first=False,
                levels=None,
                rounded=False,
            ),
            functions=(function,),
            modules={module: _same("bidirectional", "batch_first")},
            definition=True,
        )
        for name, function, module in (
            ("lstm", recurrent.lstm, nn.LSTM),
            ("gru", recurrent.gru, nn.GRU),
        )
    ),
    *(
        OpKind(
            name=name,
            signature=_signature(
                "input hx weights levels rounded", hx=None, levels=None, rounded=False
            ),
            functions=(function,),
            modules={module: {}},
            definition=True,
        )
        for name, function, module in (
            ("lstm_cell", recurrent.lstm_cell, nn.LSTMCell),
            ("gru_cell", recurrent.gru_cell, nn.GRUCell),
        )
    ),
    OpKind(
        name="rnn_cell",
        signature=_signature(
            "input hx weights nonlinearity levels rounded", hx=None, levels=None, rounded=False
        ),
        functions=(recurrent.rnn_cell,),
        modules={nn.RNNCell: _same("nonlinearity")},
        definition=True,
    ),
    OpKind(
        name="rnn",
        signature=_signature("input hx", hx=None),
        modules={nn.RNN: {}},
        gives_floats=False,
    ),
    OpKind(
        name="multihead_attention",
        signature=_signature(
            "query key value key_padding_mask need_weights attn_mask average_attn_weights"
            " is_causal",
            key_padding_mask=None,
            need_weights=True,
            attn_mask=None,
            average_attn_weights=True,
            is_causal=False,
        ),
        activations=("query", "key", "value"),
        modules={nn.MultiheadAttention: {}},
        gives_floats=False,
    ),
    OpKind(
        name="transformer",
        signature=_signature("src tgt", tgt=None),
        activations=("src", "tgt"),
        modules={
            module: {}
            for module in (
                *(nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.Transformer),
                *(nn.TransformerDecoderLayer, nn.TransformerDecoder),
            )
        },
    ),
    # -- normalisation ----------------------------------------------------------------------------
    OpKind(
        name="batch_norm",
        signature=_signature(
            "input running_mean running_var weight bias training momentum eps",
            weight=None,
            bias=None,
            training=False,
            momentum=0.1,
            eps=1e-5,
        ),
        constants=("running_mean", "running_var", "weight", "bias"),
        functions=(F.batch_norm,),
        modules={
            nn.BatchNorm1d: _same("training", "eps"),
            nn.BatchNorm2d: _same("training", "eps"),
            nn.BatchNorm3d: _same("training", "eps"),
        },
    ),
    OpKind(
        name="layer_norm",
        signature=_signature(
            "input normalized_shape weight bias eps", weight=None, bias=None, eps=1e-5
        ),
        constants=("weight", "bias"),
        functions=(F.layer_norm,),
        modules={nn.LayerNorm: _same("normalized_shape", "eps")},
    ),
    OpKind(
        name="group_norm",
        signature=_signature("input num_groups weight bias eps", weight=None, bias=None, eps=1e-5),
        constants=("weight", "bias"),
        functions=(F.group_norm,),
        modules={nn.GroupNorm: _same("num_groups", "eps")},
    ),
    OpKind(
        name="instance_norm",
        signature=_signature(
            "input running_mean running_var weight bias use_input_stats momentum eps",
            running_mean=None,
            running_var=None,
            weight=None,
            bias=None,
            use_input_stats=True,
            momentum=0.1,
            eps=1e-5,
        ),
        constants=("running_mean", "running_var", "weight", "bias"),
        functions=(F.instance_norm,),
        modules={
            nn.InstanceNorm1d: _same("eps"),
            nn.InstanceNorm2d: _same("eps"),
            nn.InstanceNorm3d: _same("eps"),
        },
    ),
    OpKind(
        name="rms_norm",
        signature=_signature("input normalized_shape weight eps", weight=None, eps=None),
        constants=("weight",),
        functions=(F.rms_norm, torch.rms_norm),
        modules={nn.RMSNorm: _same("normalized_shape", "eps")},
    ),
    # -- arithmetic -------------------------------------------------------------------------------
    _arithmetic(
        "add",
        (operator.add, torch.add, operator.iadd),
        ("add", "add_"),
        (operator.iadd, "add_"),
        extra="alpha",
        alpha=1,
    ),
    _arithmetic(
        "sub",
        (operator.sub, torch.sub, torch.subtract, operator.isub),
        ("sub", "sub_", "subtract"),
        (operator.isub, "sub_"),
        extra="alpha",
        alpha=1,
    ),
    _arithmetic(
        "mul",
        (operator.mul, torch.mul, torch.multiply, operator.imul),
        ("mul", "mul_", "multiply"),
        (operator.imul, "mul_"),
    ),
    _arithmetic(
        "div",
        (operator.truediv, torch.div, torch.divide, torch.true_divide, operator.itruediv),
        ("div", "div_", "divide", "true_divide"),
        (operator.itruediv, "div_"),
        extra="rounding_mode",
        rounding_mode=None,
    ),
    OpKind(
        name="cat",
        signature=_signature("tensors dim", dim=0),
        activations=("tensors",),
        functions=(torch.cat, torch.concat, torch.concatenate),
    ),
    OpKind(
        name="stack",
        signature=_signature("tensors dim", dim=0),
        activations=("tensors",),
        functions=(torch.stack,),
    ),
    _arithmetic("maximum", (torch.maximum,), ("maximum",)),
    _arithmetic("minimum", (torch.minimum,), ("minimum",)),
    *(
        _arithmetic(
            name,
            (getattr(operator, name), getattr(torch, name)),
            (name,),
            gives_floats=False,
        )
        for name in ("gt", "ge", "lt", "le", "eq", "ne")
    ),
    OpKind(
        name="where",
        signature=_signature("condition input other"),
        activations=("input", "other"),
        functions=(torch.where,),
    ),
    # -- activation functions ---------------------------------------------------------------------
    _unary(
        "relu",
        (F.relu, torch.relu, torch.relu_, F.relu_),
        nn.ReLU,
        extra="inplace",
        inplace=(torch.relu_, F.relu_, "relu_"),
        methods=("relu", "relu_"),
    ),
    _unary("relu6", (F.relu6,), nn.ReLU6, extra="inplace"),
    _unary(
        "hardtanh",
        (F.hardtanh, F.hardtanh_),
        nn.Hardtanh,
        extra="min_val max_val inplace",
        attributes=_same("min_val", "max_val"),
        inplace=(F.hardtanh_,),
        min_val=-1.0,
        max_val=1.0,
    ),
    _unary(
        "clamp",
        (torch.clamp, torch.clip, torch.clamp_, torch.clip_),
        extra="min max",
        methods=("clamp", "clamp_", "clip", "clip_"),
        inplace=(torch.clamp_, torch.clip_, "clamp_", "clip_"),
        min=None,
        max=None,
    ),
    _unary(
        "clamp_min",
        (torch.clamp_min, torch.clamp_min_),
        extra="min",
        methods=("clamp_min", "clamp_min_"),
        inplace=(torch.clamp_min_, "clamp_min_"),
    ),
    _unary(
        "clamp_max",
        (torch.clamp_max, torch.clamp_max_),
        extra="max",
        methods=("clamp_max", "clamp_max_"),
        inplace=(torch.clamp_max_, "clamp_max_"),
    ),
    _unary(
        "leaky_relu",
        (F.leaky_relu, F.leaky_relu_),
        nn.LeakyReLU,
        extra="negative_slope inplace",
        attributes=_same("negative_slope"),
        inplace=(F.leaky_relu_,),
        negative_slope=0.01,
    ),
    _unary(
        "elu",
        (F.elu, F.elu_),
        nn.ELU,
        extra="alpha inplace",
        attributes=_same("alpha"),
        inplace=(F.elu_,),
        alpha=1.0,
    ),
    _unary(
        "celu",
        (F.celu, torch.celu, torch.celu_),
        nn.CELU,
        extra="alpha inplace",
        attributes=_same("alpha"),
        inplace=(torch.celu_,),
        alpha=1.0,
    ),
    _unary(
        "selu",
        (F.selu, torch.selu, torch.selu_),
        nn.SELU,
        extra="inplace",
        inplace=(torch.selu_,),
    ),
    _unary(
        "softplus",
        (F.softplus,),
        nn.Softplus,
        extra="beta threshold",
        attributes=_same("beta", "threshold"),
        beta=1.0,
        threshold=20.0,
    ),
    _unary("logsigmoid", (F.logsigmoid,), nn.LogSigmoid),
    _unary("hardswish", (F.hardswish,), nn.Hardswish, extra="inplace"),
    _unary("hardsigmoid", (F.hardsigmoid,), nn.Hardsigmoid, extra="inplace"),
    _unary("silu", (F.silu,), nn.SiLU, extra="inplace"),
    _unary("mish", (F.mish,), nn.Mish, extra="inplace"),
    _unary(
        "gelu",
        (F.gelu,),
        nn.GELU,
        extra="approximate",
        attributes=_same("approximate"),
        approximate="none",
    ),
    _unary(
        "sigmoid",
        (torch.sigmoid, F.sigmoid, torch.sigmoid_),
        nn.Sigmoid,
        methods=("sigmoid", "sigmoid_"),
        inplace=(torch.sigmoid_, "sigmoid_"),
    ),
    _unary(
        "tanh",
        (torch.tanh, F.tanh, torch.tanh_),
        nn.Tanh,
        methods=("tanh", "tanh_"),
        inplace=(torch.tanh_, "tanh_"),
    ),
    _unary(
        "softmax",
        (F.softmax, torch.softmax),
        nn.Softmax,
        extra="dim",
        attributes=_same("dim"),
        methods=("softmax",),
        dim=None,
    ),
    _unary(
        "log_softmax",
        (F.log_softmax, torch.log_softmax),
        nn.LogSoftmax,
        extra="dim",
        attributes=_same("dim"),
        methods=("log_softmax",),
        dim=None,
    ),
    OpKind(
        name="prelu",
        signature=_signature("input weight"),
        constants=("weight",),
        functions=(F.prelu, torch.prelu),
        methods=("prelu",),
        modules={nn.PReLU: {}},
    ),
    # -- pooling and resampling -------------------------------------------------------------------
    _max_pool(1, nn.MaxPool1d, (F.max_pool1d, torch.max_pool1d, F.max_pool1d_with_indices)),
    _max_pool(2, nn.MaxPool2d, (F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)),
    _max_pool(3, nn.MaxPool3d, (F.max_pool3d, torch.max_pool3d, F.max_pool3d_with_indices)),
    _avg_pool(1, nn.AvgPool1d, F.avg_pool1d),
    _avg_pool(2, nn.AvgPool2d, F.avg_pool2d),
    _avg_pool(3, nn.AvgPool3d, F.avg_pool3d),
    OpKind(
        name="adaptive_avg_pool1d",
        signature=_signature("input output_size"),
        functions=(F.adaptive_avg_pool1d,),
        modules={nn.AdaptiveAvgPool1d: _same("output_size")},
    ),
    OpKind(
        name="adaptive_avg_pool2d",
        signature=_signature("input output_size"),
        functions=(F.adaptive_avg_pool2d,),
        modules={nn.AdaptiveAvgPool2d: _same("output_size")},
    ),
    OpKind(
        name="adaptive_avg_pool3d",
        signature=_signature("input output_size"),
        functions=(F.adaptive_avg_pool3d,),
        modules={nn.AdaptiveAvgPool3d: _same("output_size")},
    ),
    *(
        OpKind(
            name=f"lp_pool{d}d",
            signature=_signature(
                "input norm_type kernel_size stride ceil_mode", stride=None, ceil_mode=False
            ),
            functions=(getattr(F, f"lp_pool{d}d"),),
            modules={
                getattr(nn, f"LPPool{d}d"): _same("norm_type", "kernel_size", "stride", "ceil_mode")
            },
        )
        for d in (1, 2, 3)
    ),
    *(
        OpKind(
            name=f"adaptive_max_pool{d}d",
            signature=_signature("input output_size return_indices", return_indices=False),
            functions=(getattr(F, f"adaptive_max_pool{d}d"),),
            modules={getattr(nn, f"AdaptiveMaxPool{d}d"): _same("output_size", "return_indices")},
        )
        for d in (1, 2, 3)
    ),
    OpKind(
        name="interpolate",
        signature=_signature(
            "input size scale_factor mode align_corners recompute_scale_factor antialias",
            size=None,
            scale_factor=None,
            mode="nearest",
            align_corners=None,
            recompute_scale_factor=None,
            antialias=False,
        ),
        functions=(F.interpolate,),
        modules={
            nn.Upsample: _same(
                "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"
            ),
            **{
                module: _same("size", "scale_factor", "mode", "align_corners")
                for module in (nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
            },
        },
    ),
    OpKind(
        name="mean",
        signature=_signature("input dim keepdim", dim=None, keepdim=False),
        functions=(torch.mean,),
        methods=("mean",),
    ),
    _unary("sum", (torch.sum,), extra="dim keepdim", methods=("sum",), dim=None, keepdim=False),
    _unary("amax", (torch.amax,), extra="dim keepdim", methods=("amax",), dim=(), keepdim=False),
    _unary("amin", (torch.amin,), extra="dim keepdim", methods=("amin",), dim=(), keepdim=False),
    *(
        _unary(
            name,
            (getattr(torch, name),),
            extra="dim keepdim",
            methods=(name,),
            gives_floats=False,
            dim=None,
            keepdim=False,
        )
        for name in ("max", "min")
    ),
    _unary(
        "topk",
        (torch.topk,),
        extra="k dim largest sorted",
        methods=("topk",),
        gives_floats=False,
        dim=-1,
        largest=True,
        sorted=True,
    ),
    _unary(
        "sort",
        (torch.sort,),
        extra="dim descending stable",
        methods=("sort",),
        gives_floats=False,
        dim=-1,
        descending=False,
        stable=False,
    ),
    # -- moving values about ----------------------------------------------------------------------
    OpKind(
        name="pad",
        signature=_signature("input pad mode value", mode="constant", value=None),
        functions=(F.pad, torch.nn.functional.pad),
        modules={
            nn.ZeroPad1d: _same() | {"pad": "padding"},
            nn.ZeroPad2d: {"pad": "padding"},
            nn.ZeroPad3d: {"pad": "padding"},
            nn.ConstantPad1d: {"pad": "padding", "value": "value"},
            nn.ConstantPad2d: {"pad": "padding", "value": "value"},
            nn.ConstantPad3d: {"pad": "padding", "value": "value"},
            **{module: {"pad": "padding"} for module in _PADDING_MODULES},
        },
        fixed={module: {"mode": mode} for module, mode in _PADDING_MODULES.items()},
    ),
    OpKind(
        name="flatten",
        signature=_signature("input start_dim end_dim", start_dim=0, end_dim=-1),
        functions=(torch.flatten,),
        methods=("flatten",),
        modules={nn.Flatten: _same("start_dim", "end_dim")},
    ),
    _unary("reshape", (torch.reshape,), extra="shape", methods=("reshape",), variadic=True),
    _unary("view", (), extra="shape", methods=("view",), variadic=True),
    _unary("permute", (torch.permute,), extra="dims", methods=("permute",), variadic=True),
    _unary(
        "transpose",
        (torch.transpose, torch.swapaxes, torch.swapdims),
        extra="dim0 dim1",
        methods=("transpose", "swapaxes", "swapdims"),
    ),
    _unary("squeeze", (torch.squeeze,), extra="dim", methods=("squeeze",), dim=None),
    _unary("unsqueeze", (torch.unsqueeze,), extra="dim", methods=("unsqueeze",)),
    # One piece each: the take-pieces pass makes these of ``x.chunk(2)[0]`` and its like.
    _unary("chunk", (kernels.chunk,), extra="chunks dim index"),
    _unary("split", (kernels.split,), extra="sizes dim index"),
    _unary("tensor_split", (kernels.tensor_split,), extra="sections dim index"),
    _unary("select", (torch.select,), extra="dim index", methods=("select",)),
    _unary("narrow", (torch.narrow,), extra="dim start length", methods=("narrow",)),
    OpKind(
        name="slice",
        signature=_signature("input index"),
        functions=(operator.getitem,),
        methods=("__getitem__",),
    ),
    _unary(
        "contiguous",
        (),
        extra="memory_format",
        methods=("contiguous",),
        memory_format=torch.contiguous_format,
    ),
    _unary("detach", (torch.detach,), methods=("detach", "detach_"), inplace=("detach_",)),
    _unary(
        "unflatten",
        (torch.unflatten,),
        nn.Unflatten,
        extra="dim sizes",
        attributes={"dim": "dim", "sizes": "unflattened_size"},
        methods=("unflatten",),
    ),
    _unary("expand", (), extra="sizes", methods=("expand",), variadic=True),
    _unary("roll", (torch.roll,), extra="shifts dims", methods=("roll",), dims=None),
    _unary("flip", (torch.flip,), extra="dims", methods=("flip",), variadic=True),
    _unary("repeat", (), extra="sizes", methods=("repeat",), variadic=True),
    _unary(
        "repeat_interleave",
        (torch.repeat_interleave,),
        extra="repeats dim output_size",
        methods=("repeat_interleave",),
        dim=None,
        output_size=None,
    ),
    _unary(
        "dropout",
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
        nn.Dropout,
        extra="p training inplace",
        attributes=_same("p", "training"),
        p=0.5,
        training=True,
    ),
    OpKind(
        name="stochastic_depth",
        signature=_signature("input p mode training", training=True),
        named=("torchvision.ops.stochastic_depth.stochastic_depth",),
    ),
    _unary("identity", (), nn.Identity),
    _unary(
        "pixel_shuffle",
        (F.pixel_shuffle,),
        nn.PixelShuffle,
        extra="upscale_factor",
        attributes=_same("upscale_factor"),
    ),
    _unary(
        "pixel_unshuffle",
        (F.pixel_unshuffle,),
        nn.PixelUnshuffle,
        extra="downscale_factor",
        attributes=_same("downscale_factor"),
    ),
    _unary(
        "channel_shuffle",
        (F.channel_shuffle, F.native_channel_shuffle),
        nn.ChannelShuffle,
        extra="groups",
        attributes=_same("groups"),
    ),
)

KIND_BY_NAME: dict[str, OpKind] = {kind.name: kind for kind in KINDS}
KIND_BY_FUNCTION: dict[object, OpKind] = {f: kind for kind in KINDS for f in kind.functions}
KIND_BY_QUALIFIED_NAME: dict[str, OpKind] = {n: kind for kind in KINDS for n in kind.named}
KIND_BY_METHOD: dict[str, OpKind] = {m: kind for kind in KINDS for m in kind.methods}
KIND_BY_MODULE: dict[type[nn.Module], OpKind] = {
    module: kind for kind in KINDS for module in kind.modules
} | {
    nn.Dropout1d: KIND_BY_NAME["dropout"],
    nn.Dropout2d: KIND_BY_NAME["dropout"],
    nn.Dropout3d: KIND_BY_NAME["dropout"],
}
KIND_BY_MODULE |= {qat: KIND_BY_MODULE[plain] for qat, plain in FLOAT_BY_QAT.items()}
KIND_BY_MODULE |= {made: KIND_BY_MODULE[plain] for plain, made in REFERENCE_BY_FLOAT.items()}

COMPUTE_KINDS = frozenset(
    {f"conv{d}d" for d in (1, 2, 3)}
    | {f"conv_transpose{d}d" for d in (1, 2, 3)}
    | {"linear", "bilinear", "matmul", "bmm", "baddbmm", "addmm", "einsum"}
    | {"lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"}
    | {"scaled_dot_product_attention", "multihead_attention", "transformer"}
)
"""The kinds whose multiply-accumulates are counted by :mod:`fxquant.audit`."""
