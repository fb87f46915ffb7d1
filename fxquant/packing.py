"""Packed weights and inlined numbers: caches, made from the plain tensors of a lowered module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from fxquant.attribute_paths import set_attribute
from fxquant.engines import consume_deprecation_warning, engine
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.metadata import record_of
from fxquant.op_view import attribute
from fxquant.script_kernels import expected_shape, pack_table


def pack(root: nn.Module, record: PackRecord) -> Any:
    """One packed constant from the plain tensors of ``root``.

    It may come about inside a call, so whatever watches or fakes that call is kept out.
    """
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        consume_deprecation_warning()
        if record.packer == "conv":
            _lay_out_for_conv(root, record.tensors[0])
        tensors = [attribute(root, name).detach() if name else None for name in record.tensors]
        return PACKERS[record.packer].function(*tensors, *record.options)


def _lay_out_for_conv(root: nn.Module, name: str) -> None:
    """Store a weight in channels_last, in which oneDNN keeps the original beside the packed form.

    It keeps what it is given, without a copy, if that has the layout already.
    """
    weight = attribute(root, name)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if weight.dim() in formats:
        set_attribute(root, name, weight.contiguous(memory_format=formats[weight.dim()]))


def rebind_constants(gm: QuantGraphModule) -> None:
    """Inline the current values of the buffers that nodes are bound to, and recompile."""
    changed = False
    for node in gm.graph.nodes:
        bound = record_of(node).bound
        if not bound:
            continue
        args = list(node.args)
        for position, name in bound:
            if not isinstance(args[position], fx.Node):  # else it is read at every call
                args[position] = scalar(attribute(gm, name))
        if tuple(args) != node.args:
            node.args = tuple(args)
            changed = True
    if changed:
        gm.recompile()


def scalar(value: Tensor) -> float | int:
    """A 0-d tensor as the Python number to inline."""
    number: float | int = value.item()
    return number


def quantized_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """A quantized tensor on the memory of ``weight``, int8."""
    shape = [0] * weight.dim()
    if scale.dim() == 0:
        empty = torch._empty_affine_quantized(
            shape, scale=float(scale), zero_point=int(zero_point), dtype=torch.qint8
        )
    else:
        shape[axis] = len(scale)
        empty = torch._empty_per_channel_affine_quantized(
            shape,
            scales=scale.to(torch.float64),
            zero_points=zero_point.to(torch.int64),
            axis=axis,
            dtype=torch.qint8,
        )
    return empty.set_(
        weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride()
    )


def pack_conv(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    dimensions: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    engine_name: str,
) -> Any:
    """Pack a convolution weight ``[O, I / groups, ...]`` for ``quantized::conv{n}d``."""
    operator = getattr(torch.ops.quantized, f"conv{dimensions}d_prepack")
    with engine(engine_name):
        return operator(
            quantized_weight(weight, scale, zero_point, 0), bias, stride, padding, dilation, groups
        )


def pack_conv_transpose(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    dimensions: int,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    engine_name: str,
) -> Any:
    """Pack a weight ``[I, O / groups, ...]`` for ``quantized::conv_transpose{n}d``."""
    operator = getattr(torch.ops.quantized, f"conv_transpose{dimensions}d_prepack")
    with engine(engine_name):
        return operator(
            quantized_weight(weight, scale, zero_point, 1),
            bias,
            stride,
            padding,
            output_padding,
            dilation,
            groups,
        )


def pack_non_overlapping(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, engine_name: str
) -> Any:
    """Pack a transposed weight ``[I, O, h, w]``, stride ``(h, w)``, as ``[h * w * O, I, 1, 1]``."""
    inputs, _, height, width = weight.shape
    blocks = weight.permute(2, 3, 1, 0).reshape(-1, inputs, 1, 1)
    times = height * width
    if scale.dim() > 0:
        scale, zero_point = scale.repeat(times), zero_point.repeat(times)
    bias = None if bias is None else bias.repeat(times)
    return pack_conv(blocks, scale, zero_point, bias, 2, [1, 1], [0, 0], [1, 1], 1, engine_name)


def pack_linear(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, engine_name: str
) -> Any:
    """Pack a weight ``[O, I]`` for ``quantized::linear``."""
    with engine(engine_name):
        return torch.ops.quantized.linear_prepack(
            quantized_weight(weight, scale, zero_point, 0), bias
        )


def pack_onednn_conv(
    weight: Tensor,
    scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero_point: int = 0,
    input_shape: list[int] | None = None,
) -> Any:
    """Pack a convolution weight for ``onednn::qconv_pointwise``.

    The integers are the same for any zero point and shape of the input, but the operator's code
    wants the weight in an order that depends on both, and where it comes in another one it is
    reordered in *every call*: 17 ms instead of 0.14 for 256 to 1024 channels, 1 x 1, at 14 x 14.

    Args:
        weight: int8 ``[O, I / groups, ...]``.
        scale: of each output channel, or one.
        stride: of the convolution; as are the following.
        padding: zeros on both sides.
        dilation: distance of taps.
        groups: number of groups.
        zero_point: of the input.
        input_shape: of the input, as it is expected; empty where nobody knows.
    """
    shape = expected_shape(zero_point, input_shape or [])
    return torch.ops.onednn.qconv_prepack(
        weight.contiguous(),
        scale.reshape(-1),
        1.0,
        zero_point,
        stride,
        padding,
        dilation,
        groups,
        shape if len(shape) > 0 else None,
    )


def as_vector(value: Tensor) -> Tensor:
    """A 0-d scale as oneDNN's matmul wants it: on SSE4.1 and AVX2 it dies of a 0-d one."""
    return value.reshape(-1)


def pack_onednn_linear(weight: Tensor) -> Any:
    """Pack a weight ``[O, I]`` for ``onednn::qlinear_pointwise``."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def pack_float16_linear(weight: Tensor, bias: Tensor | None) -> Any:
    """Pack a float16 weight ``[O, I]`` for ``quantized::linear_dynamic_fp16``."""
    with engine("fbgemm"):
        return torch.ops.quantized.linear_prepack_fp16(weight.to(torch.float32), bias)


def pack_cell(
    w_ih: Tensor,
    scale_ih: Tensor,
    zero_ih: Tensor,
    w_hh: Tensor,
    scale_hh: Tensor,
    zero_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    reduce_range: bool,
    engine_name: str,
) -> Any:
    """Pack one layer and direction, ``w_ih [G * H, I]``, for ``aten::quantized_{lstm,gru}``."""
    return torch.ops.quantized.make_quantized_cell_params_dynamic(
        pack_linear(w_ih, scale_ih, zero_ih, b_ih, engine_name),
        pack_linear(w_hh, scale_hh, zero_hh, b_hh, engine_name),
        b_ih,
        b_hh,
        reduce_range,
    )


def pack_float16_cell(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
    """Pack one layer and direction with float16 weights."""
    return torch.ops.quantized.make_quantized_cell_params_fp16(
        pack_float16_linear(w_ih, b_ih), pack_float16_linear(w_hh, b_hh)
    )


LOOKED_UP: Final[Mapping[str, Callable[..., Tensor]]] = {
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
}
"""Kind -> its function, of a float64 tensor and the further parameters in order."""


def pack_lookup(
    scale: Tensor,
    zero_point: Tensor,
    output_scale: Tensor,
    output_zero_point: Tensor,
    kind: str,
    options: list[float],
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """The 256 results of an element-wise function on integers, by its definition in float64."""
    values = (torch.arange(256) - zero_point).to(torch.float64) * scale.to(torch.float64)
    exact = LOOKED_UP[kind](values, *options) / output_scale.to(torch.float64) + output_zero_point
    return exact.round().clamp(quant_min, quant_max).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class Packer:
    """A function from plain tensors and options to a packed object.

    Attributes:
        function: takes the tensors first, then the options.
        tensors: how many of its arguments are tensors (or ``None``).
        scale: which of them is the scale of the weight; ``None`` where it has none.
    """

    function: Callable[..., Any]
    tensors: int
    scale: int | None = 1


PACKERS: dict[str, Packer] = {
    "conv": Packer(pack_conv, 4),
    "conv-transpose": Packer(pack_conv_transpose, 4),
    "conv-transpose-non-overlapping": Packer(pack_non_overlapping, 4),
    "linear": Packer(pack_linear, 4),
    "linear-float16": Packer(pack_float16_linear, 2, scale=None),
    "cell": Packer(pack_cell, 8),
    "cell-float16": Packer(pack_float16_cell, 4, scale=None),
    "table": Packer(pack_table, 3),
    "onednn-conv": Packer(pack_onednn_conv, 2),
    "onednn-linear": Packer(pack_onednn_linear, 1, scale=None),
    "lookup": Packer(pack_lookup, 4, scale=None),
    "vector": Packer(as_vector, 1, scale=None),
}
"""Packers by name."""


def unpack(record: PackRecord, packed: Any) -> dict[str, Tensor]:
    """The tensors of :data:`UNPACKED` packers that a packed weight was made from, by name."""
    weight, bias = packed.unpack()
    found = {} if bias is None else {record.tensors[-1]: bias}
    if not weight.is_quantized:
        return {record.tensors[0]: weight, **found}
    integers, scale, zero_point, _ = record.tensors
    if record.packer != "linear" and record.options[0] == 1:
        weight = weight.squeeze(2)  # torch packs it as a convolution of two dimensions
    if weight.qscheme() == torch.per_tensor_affine:
        scales, zero_points = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point())
    else:
        scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return {integers: weight.int_repr(), scale: scales, zero_point: zero_points, **found}


UNPACKED = ("conv", "conv-transpose", "linear", "linear-float16")
"""Packers whose objects give back what they were made from."""
