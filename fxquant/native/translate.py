"""From nodes of a lowered graph to steps of a plan; ``None`` from a rule leaves the node to torch.

The rules compute what the kernels of torch compute, bit by bit: the comments in
``src/requantize.h`` and the numbers made here say in which order each engine multiplies and adds.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant import engine_free, kernels
from fxquant.graph_module import QuantGraphModule
from fxquant.native.agreement import (
    MASK_KINDS,
    agrees_on_attention,
    agrees_on_gelu,
    agrees_on_layer_norm,
    agrees_on_mean,
)
from fxquant.native.library import exponential
from fxquant.native.plan import PlanBuilder, Value
from fxquant.op_view import attribute

_ACTIVATIONS: Final = {"none": 0, "relu": 1, "hardswish": 2, "swish": 3, "hardtanh": 4, "gelu": 5}
_FLOAT_FUNCTIONS: Final = {"relu": 0, "hardsigmoid": 1, "sigmoid": 2, "add": 3, "gelu": 4}
_GRAIN: Final = 32768
"""Elements that torch does not split between threads."""
_GROUP_LIMIT: Final = 16
"""Outputs of a group, below which torch's kernels are faster: a vector would be partly empty."""
_WINDOW_LIMIT: Final = 1024
"""Positions of a window; a pointer each is on the stack for every row of a tile."""
_DEPTHWISE_LIMIT: Final = (16, 8)
"""Largest window of the depthwise kernel."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What a node's tensor was in the run that a plan is made from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    scale: float = 1.0
    zero_point: int = 0

    @staticmethod
    def of(x: object) -> Meta | None:
        """Of a dense CPU tensor; ``None`` for anything else."""
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.device.type != "cpu":
            return None
        if not x.is_quantized:
            return Meta(tuple(x.shape), x.dtype, tuple(x.stride()))
        if x.qscheme() != torch.per_tensor_affine:
            return None
        return Meta(tuple(x.shape), x.dtype, tuple(x.stride()), x.q_scale(), x.q_zero_point())


@dataclass(frozen=True, slots=True)
class Heads:
    """Floats of a plan, ``[N, L, heads * size]``, seen as the heads of an attention.

    Attributes:
        value: the floats.
        count: of heads.
        transposed: seen as ``[N, heads, L, size]``; else as ``[N, L, heads, size]``.
    """

    value: Value
    count: int
    transposed: bool

    @property
    def stride(self) -> tuple[int, ...]:
        """As PyTorch sees it."""
        _, length, channels = self.value.shape
        size = channels // self.count
        if self.transposed:
            return (length * channels, size, channels, 1)
        return (length * channels, channels, size, 1)


@dataclass
class Translation:
    """The state of one translation.

    Attributes:
        gm: the lowered module.
        builder: of the plan.
        metas: what each node's value was.
        bring: makes a plan's value of what torch computes in front of it; ``None`` where it is
            of no use here.
        place: names the place of what torch computes, in its own strides and type.
        values: the nodes that are in the plan.
        heads: those that are values of the plan with their channels in groups.
        quantized: floats that were quantized in the call: (node, highest integer) -> integers,
            scale and zero point.
    """

    gm: QuantGraphModule
    builder: PlanBuilder
    metas: Mapping[fx.Node, Meta]
    bring: Callable[[fx.Node], Value | None]
    place: Callable[[fx.Node], Value]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    heads: dict[fx.Node, Heads] = field(default_factory=dict)
    quantized: dict[tuple[fx.Node, int], tuple[Value, Value]] = field(default_factory=dict)

    def value(self, argument: object) -> Value | None:
        """The plan's value of an argument, if it has one without a detour."""
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def integers(self, argument: object) -> Value | None:
        """Bytes that a kernel can read; brought into the plan where torch computed them."""
        if not isinstance(argument, fx.Node):
            return None
        found = self.values.get(argument)
        if found is None:
            found = self.bring(argument)
        return found if found is not None and found.dtype == torch.uint8 else None

    def floats(self, argument: object) -> Value | None:
        """Floats of the plan; dequantized now if that was put off."""
        value = self.value(argument)
        if value is None or value.dtype != torch.float32:
            return None
        source = value.bytes_of
        if source is not None:
            self.builder.add(
                "dequantize", {"a": source}, value,
                a_scale=single(source.scale), a_zero_point=source.zero_point,
            )  # fmt: skip
            value.bytes_of = None
        return value

    def constant(self, argument: object) -> Any:
        """The value of a constant of the module, or the argument itself."""
        if isinstance(argument, fx.Node):
            if argument.op != "get_attr":
                raise NotConstantError
            return attribute(self.gm, str(argument.target))
        return argument

    def packed_tensors(self, argument: object, packer: str) -> tuple[list[Tensor | None], Any]:
        """The plain tensors and options that a packed constant was made from."""
        name = str(argument.target) if isinstance(argument, fx.Node) else ""
        for record in self.gm.state.packs:
            if record.name == name and record.packer == packer:
                tensors = [attribute(self.gm, n).detach() if n else None for n in record.tensors]
                return tensors, record.options
        raise NotConstantError


class NotConstantError(Exception):
    """A kernel's constant is computed in the graph, or packed in another way."""


Rule = Callable[[Translation, fx.Node], Value | Heads | None]
"""Adds the steps of a node; its value, or ``None`` where torch computes the node."""


def translate(t: Translation, node: fx.Node) -> bool:
    """Add the steps of ``node`` to the plan; ``False`` where no rule knows how to."""
    rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
    if rule is None:
        return False
    before = len(t.builder.steps)
    t.builder.node = node.name
    try:
        made = rule(t, node)
    except NotConstantError:
        del t.builder.steps[before:]
        return False
    if isinstance(made, Heads):
        t.heads[node] = made
    elif made is not None:
        t.values[node] = made
    return made is not None


def single(value: float) -> float:
    """``value`` rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def divided(a: float, b: float) -> float:
    """``a / b`` of two float32 in float32."""
    return single(single(a) / single(b))


def onednn_scale(scale: float) -> float:
    """A scale as ``quantized::conv*`` hands it to oneDNN: the reciprocal of a reciprocal."""
    return divided(1.0, 1.0 / scale)


# Views: the same integers under another name.


def _same(t: Translation, node: fx.Node) -> Value | None:
    return t.value(node.args[0])


def _as_quantized(t: Translation, node: fx.Node) -> Value | None:
    value = t.value(node.args[0])
    if value is None or not _numbers(node.args[1:3]):
        return None
    return t.builder.like(value, scale=node.args[1], zero_point=node.args[2])


def _accumulator(t: Translation, node: fx.Node) -> Value | None:
    value, other = t.value(node.args[0]), t.value(node.args[1])
    if value is None or other is None or value.shape[0] != other.shape[0]:
        return None
    return value


def _flatten(t: Translation, node: fx.Node) -> Value | Heads | None:
    regrouped = _regroup(t, node)
    if regrouped is not None:
        return regrouped
    value, meta = t.value(node.args[0]), t.metas.get(node)
    if value is None or meta is None or value.bytes_of is not None:
        return None
    n, h, w, c = value.sizes
    if meta.shape != (n, c) or h * w != 1:
        return None
    return t.builder.like(value, shape=meta.shape)


def _regroup(t: Translation, node: fx.Node) -> Value | Heads | None:
    """Channels in groups, or groups of channels side by side again."""
    source, meta = node.args[0], t.metas.get(node)
    if meta is None or not isinstance(source, fx.Node):
        return None
    heads, known = t.heads.get(source), t.metas.get(source)
    if heads is not None and known is not None and known.shape == meta.shape:
        return heads
    if heads is not None:
        return heads.value if not heads.transposed and meta.shape == heads.value.shape else None
    if known is None or len(known.shape) != 3 or len(meta.shape) != 4:
        return None
    if meta.shape[:2] != known.shape[:2]:
        return None
    value = t.floats(source)
    return None if value is None else Heads(value, meta.shape[2], transposed=False)


def _transpose(t: Translation, node: fx.Node) -> Heads | None:
    source, *dimensions = node.args
    heads = t.heads.get(source) if isinstance(source, fx.Node) else None
    if heads is None or node.kwargs or not all(isinstance(d, int) for d in dimensions):
        return None
    if sorted(int(d) % 4 for d in dimensions) != [1, 2]:  # type: ignore[arg-type]  # integers
        return None
    return Heads(heads.value, heads.count, not heads.transposed)


def _permute(t: Translation, node: fx.Node) -> Heads | None:
    source, *order = node.args
    heads = t.heads.get(source) if isinstance(source, fx.Node) else None
    if len(order) == 1 and isinstance(order[0], (list, tuple)):
        order = list(order[0])
    if heads is None or order != [0, 2, 1, 3]:
        return None
    return Heads(heads.value, heads.count, not heads.transposed)


def _contiguous(t: Translation, node: fx.Node) -> Heads | None:
    source = node.args[0]
    heads = t.heads.get(source) if isinstance(source, fx.Node) else None
    if heads is None or heads.transposed or len(node.args) > 1 or node.kwargs:
        return None
    return heads


def _slice(t: Translation, value: Value, first: int, count: int) -> Value:
    n, _, h, w = value.shape
    return t.builder.like(
        value, shape=(n, count, h, w), offset=value.offset + first * value.element
    )


def _chunk(t: Translation, node: fx.Node) -> Value | None:
    value, meta = t.value(node.args[0]), t.metas.get(node)
    if value is None or meta is None or len(value.shape) != 4 or node.args[2] not in (1, -3):
        return None
    sizes, index = node.args[1], node.args[3]
    if not isinstance(index, int):
        return None
    if node.target is kernels.chunk:
        each = -(-value.shape[1] // int(sizes))  # type: ignore[arg-type]  # an argument of fx
        first = each * index
    elif isinstance(sizes, int):
        first = sizes * index
    else:
        first = sum(sizes[:index])  # type: ignore[index, arg-type]  # an argument of fx
    if index < 0 or first + meta.shape[1] > value.shape[1]:
        return None
    if value.bytes_of is None:
        return _slice(t, value, first, meta.shape[1])
    part = t.builder.value(meta.shape, torch.float32)
    part.bytes_of = _slice(t, value.bytes_of, first, meta.shape[1])
    return part


# Conversions.


def _quantize(t: Translation, node: fx.Node) -> Value | None:
    source, scale, zero_point, dtype = node.args[:4]
    if dtype != torch.quint8 or not _numbers((scale, zero_point)):
        return None
    numbers: dict[str, Any] = {"scale": scale, "zero_point": zero_point}
    value = t.floats(source)
    if value is None:
        value = t.bring(source) if isinstance(source, fx.Node) else None
        if value is None or value.dtype != torch.float32:
            return None
        strides = t.metas[source].stride  # type: ignore[index]  # a node, or nothing was brought
    else:
        _, h, w, _ = value.sizes
        strides = (h * w * value.pixel, 1, w * value.pixel, value.pixel)
        if len(value.shape) != 4:
            strides = (value.pixel, 1)
    if len(value.shape) == 4:
        stride_n, stride_c, stride_h, stride_w = strides
    elif len(value.shape) == 2:
        stride_n, stride_c, stride_h, stride_w = strides[0], strides[1], 0, 0
    else:
        return None
    _, _, w, c = value.sizes
    few = len(value.shape) == 4 and c < 4 and stride_w == 1 and w > 1
    pixel, margin = _image_layout(t, node, c) if few else (None, 0)
    out = t.builder.value(value.shape, torch.uint8, pixel=pixel, margin=margin, **numbers)
    return t.builder.add(
        "quantize", {"a": value}, out,
        stride_n=stride_n, stride_c=stride_c, stride_h=stride_h, stride_w=stride_w,
        inverse=divided(1.0, scale), zero_point=zero_point, padding_w=margin,  # type: ignore[arg-type]  # numbers
    )  # fmt: skip


def _image_layout(t: Translation, node: fx.Node, channels: int) -> tuple[int, int]:
    """Bytes of a pixel and padding at the sides, of an image with few channels.

    Four bytes can be loaded at once. With padding in memory that all its convolutions agree on, the
    pixels of a line of a window are one string of bytes, which three bytes a pixel may shorten.
    """
    windows = _windows(t, node)
    paddings = {padding for _, padding in windows}
    if len(paddings) != 1:
        return 4, 0
    shorter = channels == 3 and all(-(-3 * width // 4) < width for width, _ in windows)
    return 3 if shorter else 4, paddings.pop()


def _windows(t: Translation, node: fx.Node) -> set[tuple[int, int]]:
    """Width and padding of the windows that look at an image; empty where something else does."""
    found: set[tuple[int, int]] = set()
    for user in node.users:
        if user.target is kernels.as_bytes:
            one = _windows(t, user)
        elif user.target in (_Q.conv2d.new, _Q.conv2d_relu.new):
            tensors, options = t.packed_tensors(user.args[1], "conv")
            one = _window_of(tensors[0], *options[2:5]) if options[0] == 2 else set()
        elif user.target is _O.qconv_pointwise.default:
            (weight, *_), _ = t.packed_tensors(user.args[3], "onednn-conv")
            one = _window_of(weight, *user.args[8:11])
        else:
            one = set()
        if not one:
            return set()
        found |= one
    return found


def _window_of(
    weight: Tensor | None, padding: Any, dilation: Any, groups: Any
) -> set[tuple[int, int]]:
    if weight is None or groups != 1 or dilation[1] != 1:
        return set()
    return {(weight.shape[3], int(padding[1]))}


def _dequantize(t: Translation, node: fx.Node) -> Value | None:
    value = t.value(node.args[0])
    if value is None or value.dtype != torch.uint8:
        return None
    made = t.builder.value(value.shape, torch.float32)
    made.bytes_of = value
    return made


# Convolutions and linears.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A convolution or a linear, in numbers."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1
    in_scale: float
    scale: float
    inverse: float
    zero_point: int
    to_float: bool = False
    activation: int = 0
    low: float = 0.0
    alpha: float = 0.0
    beta: float = 0.0
    fbgemm: bool = False
    other: Value | None = None
    other_scale: float = 0.0
    other_zero_point: int = 0


def _constants(
    weight: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The constants of a product as C++ takes them: what must stay alive, and the addresses."""
    weight = weight.contiguous()
    each = scale.reshape(-1).to(torch.float32).expand(weight.shape[0]).contiguous()
    term = None if bias is None else bias.to(torch.float32).contiguous()
    keep = (weight, each) if term is None else (weight, each, term)
    return keep, {
        "weight": weight.data_ptr(),
        "weight_scale": each.data_ptr(),
        "bias": None if term is None else term.data_ptr(),
    }


def _add_product(t: Translation, node: fx.Node, x: Value | None, p: _Product) -> Value | None:
    meta = t.metas.get(node)
    if x is None or meta is None or p.activation < 0 or p.weight.dim() not in (2, 4):
        return None
    weight = p.weight
    outputs, inputs = weight.shape[:2]
    window = tuple(weight.shape[2:]) or (1, 1)
    depthwise = inputs == 1 and p.groups == outputs and p.groups > 1
    if depthwise and (p.fbgemm or p.to_float or any(
        size > limit for size, limit in zip(window, _DEPTHWISE_LIMIT, strict=True)
    )):  # fmt: skip
        return None
    if p.groups > 1 and not depthwise and outputs // p.groups < _GROUP_LIMIT:
        return None
    if math.prod(window) > _WINDOW_LIMIT:
        return None
    if p.fbgemm and p.activation:
        return None
    dtype = torch.float32 if p.to_float else torch.uint8
    activation, low = p.activation, p.low
    if activation == _ACTIVATIONS["relu"] and not p.to_float:
        activation, low = _ACTIVATIONS["none"], float(p.zero_point)  # the same, on the integers
    out = t.builder.value(meta.shape, dtype, scale=p.scale, zero_point=p.zero_point)
    keep, constants = _constants(weight, p.weight_scale, p.bias)
    padding_w = p.padding[1]
    if x.margin:  # the padding is there; what reads other margins was not given one
        n, channels, h, w = x.shape
        x = t.builder.like(x, shape=(n, channels, h, w + 2 * x.margin), margin=0)
        padding_w = 0
    reads = {"in_": x} if p.other is None else {"in_": x, "other": p.other}
    return t.builder.add(
        "convolution", reads, out, keep, **constants,
        has_other=p.other is not None, groups=p.groups,
        kernel_h=window[0], kernel_w=window[1], stride_h=p.stride[0], stride_w=p.stride[1],
        padding_h=p.padding[0], padding_w=padding_w,
        dilation_h=p.dilation[0], dilation_w=p.dilation[1],
        fbgemm=p.fbgemm, to_float=p.to_float, activation=activation,
        in_zero_point=x.zero_point, depthwise=depthwise,
        in_scale=p.in_scale, inverse=p.inverse, zero_point=p.zero_point, out_scale=p.scale,
        low=low, high=255.0, alpha=p.alpha, beta=p.beta,
        other_scale=p.other_scale, other_zero_point=p.other_zero_point,
    )  # fmt: skip


def _packed_conv(relu: bool) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        source, packed, scale, zero_point = node.args[:4]
        if not _numbers((scale, zero_point)):
            return None
        tensors, options = t.packed_tensors(packed, "conv")
        weight, weight_scale, weight_zero, bias = tensors
        dimensions, stride, padding, dilation, groups, engine = options
        if dimensions != 2 or _asymmetric(weight_zero):
            return None
        x = t.integers(source)
        if x is None:
            return None
        fbgemm = engine == "fbgemm"
        out_scale = float(scale)  # type: ignore[arg-type]  # a number
        return _add_product(t, node, x, _Product(
            weight=weight, weight_scale=weight_scale, bias=bias,  # type: ignore[arg-type]  # there
            stride=stride, padding=padding, dilation=dilation, groups=groups,
            in_scale=single(x.scale) if fbgemm else onednn_scale(x.scale),
            scale=out_scale, inverse=divided(1.0, onednn_scale(out_scale)),
            zero_point=zero_point, low=float(zero_point) if relu else 0.0,  # type: ignore[arg-type]
            fbgemm=fbgemm,
        ))  # fmt: skip

    return rule


def _packed_linear(relu: bool) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        source, packed, scale, zero_point = node.args[:4]
        if not _numbers((scale, zero_point)):
            return None
        tensors, (engine,) = t.packed_tensors(packed, "linear")
        weight, weight_scale, weight_zero, bias = tensors
        x = t.integers(source)
        if engine != "fbgemm" or _asymmetric(weight_zero) or x is None or len(x.shape) == 4:
            return None
        return _add_product(t, node, x, _Product(
            weight=weight, weight_scale=weight_scale, bias=bias,  # type: ignore[arg-type]  # there
            in_scale=single(x.scale), scale=float(scale), inverse=1.0,  # type: ignore[arg-type]
            zero_point=zero_point, low=float(zero_point) if relu else 0.0,  # type: ignore[arg-type]
            fbgemm=True,
        ))  # fmt: skip

    return rule


def _dynamic_linear(activation: int) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        source, packed = node.args[:2]
        reduced = bool(node.args[2]) if len(node.args) > 2 else False
        tensors, (engine,) = t.packed_tensors(packed, "linear")
        weight, weight_scale, weight_zero, bias = tensors
        meta = t.metas.get(node)
        if engine != "fbgemm" or _asymmetric(weight_zero) or meta is None or 0 in meta.shape:
            return None
        found = _quantized_now(t, source, 127 if reduced else 255)
        if found is None or weight is None or weight_scale is None:
            return None
        x, parameters = found
        out = t.builder.value(meta.shape, torch.float32)
        keep, constants = _constants(weight, weight_scale, bias)
        return t.builder.add(
            "convolution", {"in_": x, "parameters": parameters}, out, keep, **constants,
            groups=1, kernel_h=1, kernel_w=1, stride_h=1, stride_w=1,
            dilation_h=1, dilation_w=1, to_float=True, dynamic=True, activation=activation,
            in_zero_point=1, depthwise=False,
        )  # fmt: skip

    return rule


def _quantized_now(t: Translation, source: object, highest: int) -> tuple[Value, Value] | None:
    """Floats in integers by their own range, which is found in each call."""
    if not isinstance(source, fx.Node):
        return None
    known = t.quantized.get((source, highest))
    if known is not None:
        return known
    value = t.floats(source)
    if value is None:
        value = t.bring(source)
        if value is None or value.dtype != torch.float32:
            return None
        if t.metas[source].stride != contiguous(value.shape):
            return None
    if len(value.shape) == 4:
        return None
    parameters = t.builder.value((1, 8), torch.uint8)
    t.builder.add("choose", {"a": value}, parameters, divisor=highest)
    x = t.builder.value(value.shape, torch.uint8)
    channels = value.shape[-1]
    t.builder.add(
        "quantize", {"a": value, "b": parameters}, x,
        stride_n=channels, stride_c=1, stride_h=channels, stride_w=channels, from_bytes=True,
    )  # fmt: skip
    t.quantized[source, highest] = x, parameters
    return x, parameters


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)


def _activation(name: object, arguments: Sequence[Any]) -> dict[str, Any]:
    bounds = (
        {"alpha": float(arguments[0]), "beta": float(arguments[1])} if name == "hardtanh" else {}
    )
    if name == "swish" and arguments and arguments[0] != 1.0:
        return {"activation": -1}
    return {"activation": _ACTIVATIONS.get(str(name), -1), **bounds}


def _onednn_product(
    t: Translation,
    node: fx.Node,
    packer: str,
    inputs: Sequence[Any],
    result: Sequence[Any],
    post: Sequence[Any],
    **rest: Any,
) -> Value | None:
    """A product of a pointwise operator of oneDNN.

    Args:
        t: the translation.
        node: the operator's call.
        packer: of its weight.
        inputs: bytes, scale, zero point, packed weight, the weight's scale and zero point, bias.
        result: scale, zero point and dtype.
        post: name and arguments of what follows.
        **rest: further fields of the product.
    """
    source, in_scale, in_zero, packed, weight_scale, weight_zero, bias = inputs
    scale, zero_point, dtype = result
    if dtype not in (torch.float32, torch.uint8):
        return None
    if not _numbers((in_scale, in_zero, scale, zero_point)):
        return None
    (weight, *_), _ = t.packed_tensors(packed, packer)
    x = t.integers(source)
    if x is None or weight is None or _asymmetric(t.constant(weight_zero)):
        return None
    if (len(x.shape) == 4) != (weight.dim() == 4):
        return None
    x = t.builder.like(x, scale=in_scale, zero_point=in_zero)
    return _add_product(t, node, x, _Product(
        weight=weight, weight_scale=t.constant(weight_scale), bias=t.constant(bias),
        in_scale=single(in_scale), scale=scale, inverse=divided(1.0, scale),
        zero_point=zero_point, to_float=dtype == torch.float32, **_activation(*post), **rest,
    ))  # fmt: skip


def _geometry(stride: Any, padding: Any, dilation: Any, groups: Any) -> dict[str, Any]:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def _onednn_conv(t: Translation, node: fx.Node) -> Value | None:
    a: tuple[Any, ...] = node.args
    return _onednn_product(t, node, "onednn-conv", a[:7], a[11:14], a[14:16], **_geometry(*a[7:11]))


def _onednn_sum(t: Translation, node: fx.Node) -> Value | None:
    a: tuple[Any, ...] = node.args
    other, other_scale, other_zero, name, alpha = (a[6], *a[15:19])
    added = t.value(other)
    if added is None or a[14] != torch.uint8 or name != "sum" or alpha != 1.0:
        return None
    if not _numbers((other_scale, other_zero)):
        return None
    return _onednn_product(
        t, node, "onednn-conv", (*a[:6], a[7]), a[12:15], a[19:21], **_geometry(*a[8:12]),
        other=added, other_scale=single(other_scale), other_zero_point=other_zero,
    )  # fmt: skip


def _onednn_linear(t: Translation, node: fx.Node) -> Value | None:
    a: tuple[Any, ...] = node.args
    return _onednn_product(t, node, "onednn-linear", a[:7], a[7:10], a[10:12])


# Pooling.


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _window(kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, Any]:
    stride = kernel if stride is None or stride == [] else stride
    names = ("kernel", "window_stride", "padding", "dilation")
    return {
        f"{name}_{axis}": size
        for name, value in zip(names, (kernel, stride, padding, dilation), strict=True)
        for axis, size in zip("hw", _pair(value), strict=True)
    }


def _max_pool(t: Translation, node: fx.Node) -> Value | None:
    names = ("kernel_size", "stride", "padding", "dilation")
    given = dict(zip(names, node.args[1:5], strict=False)) | dict(node.kwargs)
    value, meta = t.value(node.args[0]), t.metas.get(node)
    if value is None or meta is None or value.dtype != torch.uint8 or len(value.shape) != 4:
        return None
    window = _window(
        given["kernel_size"], given.get("stride"), given.get("padding", 0), given.get("dilation", 1)
    )
    out = t.builder.value(meta.shape, torch.uint8, scale=value.scale, zero_point=value.zero_point)
    return t.builder.add("max_pool", {"a": value}, out, **window)


def _average_pool(t: Translation, node: fx.Node) -> Value | None:
    _, kernel, stride, padding, _, count_padding, divisor = node.args
    value, meta = t.value(node.args[0]), t.metas.get(node)
    if value is None or meta is None or value.dtype != torch.uint8 or len(value.shape) != 4:
        return None
    out = t.builder.value(meta.shape, torch.uint8, scale=value.scale, zero_point=value.zero_point)
    return t.builder.add(
        "average_pool", {"a": value}, out,
        **_window(kernel, stride, padding, 1), count_padding=bool(count_padding),
        divisor=divisor or 0, a_zero_point=value.zero_point,
    )  # fmt: skip


def _global_mean(t: Translation, node: fx.Node) -> Value | None:
    value, meta = t.value(node.args[0]), t.metas.get(node)
    if value is None or meta is None or len(value.shape) != 4 or value.dtype != torch.float32:
        return None
    if node.target is F.adaptive_avg_pool2d:
        if meta.shape[2:] != (1, 1):
            return None
    elif not _over_pixels(node):
        return None
    if not agrees_on_mean(value.shape, node.target is F.adaptive_avg_pool2d):
        return None
    source = value if value.bytes_of is None else value.bytes_of
    out = t.builder.value(meta.shape, torch.float32)
    return t.builder.add(
        "global_mean", {"a": source}, out, from_bytes=value.bytes_of is not None,
        a_scale=single(source.scale), a_zero_point=source.zero_point,
    )  # fmt: skip


def _over_pixels(node: fx.Node) -> bool:
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(axes, (list, tuple)) and sorted(int(a) % 4 for a in axes) == [2, 3]


# Element-wise.


def _add_integers(low: bool) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        operands = _operands(t, node)
        if operands is None:
            return None
        a, b, out = operands
        return t.builder.add(
            "add", {"a": a, "b": b}, out,
            a_scale=single(a.scale), a_zero_point=a.zero_point,
            b_scale=single(b.scale), b_zero_point=b.zero_point,
            inverse=divided(1.0, out.scale), zero_point=out.zero_point,
            low=out.zero_point if low else 0,
        )  # fmt: skip

    return rule


def _multiply(low: bool) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        operands = _operands(t, node)
        if operands is None:
            return None
        a, b, out = operands
        both = single(single(a.scale) * single(b.scale))
        return t.builder.add(
            "multiply", {"a": a, "b": b}, out,
            a_zero_point=a.zero_point, b_zero_point=b.zero_point,
            multiplier=single(both * divided(1.0, out.scale)), zero_point=out.zero_point,
            low=out.zero_point if low else 0,
        )  # fmt: skip

    return rule


def _operands(t: Translation, node: fx.Node) -> tuple[Value, Value, Value] | None:
    first, second, scale, zero_point = node.args[:4]
    a, b, meta = t.integers(first), t.integers(second), t.metas.get(node)
    if a is None or b is None or meta is None or not _numbers((scale, zero_point)):
        return None
    for operand in (a, b):  # whole, or one pixel for each image
        whole = operand.shape == meta.shape
        one = len(meta.shape) == 4 and operand.shape == (*meta.shape[:2], 1, 1)
        if not (whole or one):
            return None
    numbers: dict[str, Any] = {"scale": scale, "zero_point": zero_point}
    return a, b, t.builder.value(meta.shape, torch.uint8, **numbers)


def _batch_norm(low: bool) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        source, weight, bias, mean, variance, eps, scale, zero_point = node.args
        value = t.value(source)
        if value is None or len(value.shape) != 4 or not _numbers((eps, scale, zero_point)):
            return None
        gamma, beta, mu, var = (t.constant(c) for c in (weight, bias, mean, variance))
        if gamma is None or beta is None:
            return None
        # In the kernel's order: float32, and the scales in double. (torch.sqrt is not correctly
        # rounded in float32; the kernel's is.)
        deviation = torch.sqrt((var.detach() + eps).double()).float()
        inverse = (1.0 / deviation.double()).float()
        factor = ((inverse * gamma.detach()).double() * (value.scale / float(scale))).float()  # type: ignore[arg-type]  # a number
        shift = beta.detach() - mu.detach() * inverse * gamma.detach()
        term = (shift.double() / float(scale)).float()  # type: ignore[arg-type]  # a number
        numbers: dict[str, Any] = {"scale": scale, "zero_point": zero_point}
        out = t.builder.value(value.shape, torch.uint8, **numbers)
        return t.builder.add(
            "channel_affine", {"a": value}, out, (factor, term),
            table=factor.data_ptr(), term=term.data_ptr(), a_zero_point=value.zero_point,
            zero_point=zero_point, low=zero_point if low else 0,
        )  # fmt: skip

    return rule


def _float_map(name: str) -> Rule:
    def rule(t: Translation, node: fx.Node) -> Value | None:
        if any(node.kwargs[given] is not False for given in node.kwargs):
            return None  # in place, or a factor
        a = t.floats(node.args[0])
        b = t.floats(node.args[1]) if name == "add" and len(node.args) > 1 else a
        if a is None or b is None or a.shape != b.shape:
            return None
        address = exponential() if name == "sigmoid" else None
        # Of large tensors each thread of torch takes a part, with a scalar tail of its own.
        whole = a.pixel == a.sizes[3] and math.prod(a.shape) <= _GRAIN
        if name == "sigmoid" and (address is None or not whole):
            return None
        out = t.builder.value(a.shape, torch.float32)
        return t.builder.add(
            "float_map", {"a": a, "b": b}, out, function=_FLOAT_FUNCTIONS[name], exp16=address
        )

    return rule


def _gelu(t: Translation, node: fx.Node) -> Value | None:
    if node.kwargs.get("approximate", "none") != "none" or len(node.args) > 1:
        return None
    meta = t.metas.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if meta is None or meta.stride != contiguous(meta.shape) or math.prod(meta.shape) < 2:
        return None  # torch has another gelu for these
    value = t.floats(node.args[0])
    if value is None or not agrees_on_gelu():
        return None
    last = t.builder.steps[-1]
    alone = isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1
    if (
        alone and last.out is value and last.kind == "convolution"
        and last.fields["to_float"] and not last.fields.get("fbgemm")
        and last.fields["activation"] == _ACTIVATIONS["none"]
    ):  # fmt: skip
        last.fields["activation"] = _ACTIVATIONS["gelu"]
        return value
    out = t.builder.value(value.shape, torch.float32)
    return t.builder.add(
        "float_map", {"a": value, "b": value}, out, function=_FLOAT_FUNCTIONS["gelu"]
    )


def _layer_norm(t: Translation, node: fx.Node) -> Value | None:
    given = dict(zip(("input", "shape", "weight", "bias", "eps"), node.args, strict=False))
    given |= {"shape": node.kwargs["normalized_shape"]} if "normalized_shape" in node.kwargs else {}
    given |= {name: node.kwargs[name] for name in ("weight", "bias", "eps") if name in node.kwargs}
    source, meta, eps = given["input"], t.metas.get(node), given.get("eps", 1e-5)
    weight, bias = t.constant(given.get("weight")), t.constant(given.get("bias"))
    if meta is None or len(meta.shape) not in (2, 3) or len(given["shape"]) != 1:  # type: ignore[arg-type]  # a list
        return None
    if weight is None or bias is None or not _numbers((eps,)):
        return None
    value = t.floats(source) or _brought(t, source)
    if value is None or not agrees_on_layer_norm(meta.shape[-1]):
        return None
    reads, last = {"a": value}, t.builder.steps[-1] if t.builder.steps else None
    if (
        last is not None and last.out is value and last.kind == "float_map"
        and last.fields["function"] == _FLOAT_FUNCTIONS["add"]
        and len(source.users) == 1  # type: ignore[union-attr]  # a value's node
    ):  # fmt: skip
        reads = dict(last.reads)
        t.builder.steps.pop()
    keep = tuple(c.detach().to(torch.float32).contiguous() for c in (weight, bias))
    return t.builder.add(
        "layer_norm", reads, t.builder.value(meta.shape, torch.float32), keep,
        function=len(reads) == 2, table=keep[0].data_ptr(), term=keep[1].data_ptr(), epsilon=eps,
    )  # fmt: skip


def _brought(t: Translation, source: object) -> Value | None:
    """Contiguous floats that torch computed."""
    if not isinstance(source, fx.Node) or source not in t.metas:
        return None
    meta = t.metas[source]
    if meta.dtype != torch.float32 or meta.stride != contiguous(meta.shape):
        return None
    return t.bring(source)


def _attention(t: Translation, node: fx.Node) -> Heads | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    nodes = [given[name] for name in names[:3]]
    sources = [t.heads.get(n) if isinstance(n, fx.Node) else None for n in nodes]
    if any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    if any(s is None or not s.transposed for s in sources):
        return None
    query, key, value = (s for s in sources if s is not None)
    if len({s.count for s in (query, key, value)}) > 1 or key.value.shape != value.value.shape:
        return None
    images, length, channels = query.value.shape
    size, keys = channels // query.count, key.value.shape[1]
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    if channels != key.value.shape[2] or not _numbers((scale,)):
        return None
    mask = _mask(t, given.get("attn_mask"), (images, query.count, length, keys))
    shape = (images, length, keys, query.count, size)
    if mask is None or not agrees_on_attention(shape, float(scale), mask.kind):  # type: ignore[arg-type]  # a number
        return None
    reads = {"query": query.value, "key": key.value, "value": value.value}
    if mask.node is not None:
        reads["mask"] = t.place(mask.node)
    out = t.builder.value(query.value.shape, torch.float32)
    t.builder.add(
        "attention", reads, out, images=images, heads=query.count, scale=scale,
        mask_kind=MASK_KINDS[mask.kind], **mask.strides,
    )  # fmt: skip
    return Heads(out, query.count, transposed=True)


@dataclass(frozen=True, slots=True)
class _Mask:
    kind: str
    node: fx.Node | None = None
    strides: dict[str, Any] = field(default_factory=dict)


def _mask(t: Translation, source: object, scores: tuple[int, ...]) -> _Mask | None:
    """An attention's mask; ``None`` where the kernel does not take it."""
    if source is None:
        return _Mask("none")
    meta = t.metas.get(source) if isinstance(source, fx.Node) else None
    if meta is None or meta.dtype not in (torch.float32, torch.bool) or len(meta.shape) > 4:
        return None
    missing = 4 - len(meta.shape)
    shape, stride = (1,) * missing + meta.shape, (0,) * missing + meta.stride
    if any(size not in (1, whole) for size, whole in zip(shape, scores, strict=True)):
        return None
    stride = tuple(0 if size == 1 else step for size, step in zip(shape, stride, strict=True))
    if stride[3] not in (0, 1):
        return None
    names = ("mask_image", "mask_head", "mask_query", "mask_key")
    kind = "booleans" if meta.dtype == torch.bool else "floats"
    return _Mask(kind, source, dict(zip(names, stride, strict=True)))  # type: ignore[arg-type]  # a node: it has a meta


# Movement.


def _cat(t: Translation, node: fx.Node) -> Value | None:
    parts = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    meta = t.metas.get(node)
    if not isinstance(parts, (list, tuple)) or meta is None or len(meta.shape) != 4:
        return None
    values = [t.value(part) for part in parts]
    if axis not in (1, -3) or any(v is None or v.dtype != torch.uint8 for v in values):
        return None
    known = [v for v in values if v is not None]
    out = t.builder.value(
        meta.shape, torch.uint8, scale=known[0].scale, zero_point=known[0].zero_point
    )
    channel = 0
    for value in known:
        part = _slice(t, out, channel, value.shape[1])
        if not _move_into(t, value, part):
            t.builder.add("copy", {"a": value}, part, element=1)
        channel += value.shape[1]
    return out


def _move_into(t: Translation, value: Value, place: Value) -> bool:
    """Let whoever computes ``value`` write it into ``place``, if nothing else shares its memory."""
    buffer = value.buffer
    if buffer.slot or value.offset or value.pixel != value.shape[1] or value.pixel < 4:
        return False
    if buffer.size != value.pixel * value.shape[0] * value.shape[2] * value.shape[3]:
        return False
    views = {
        id(v): v
        for step in t.builder.steps
        for v in (*step.reads.values(), step.out)
        if v.buffer is buffer
    }
    views.update({id(v): v for v in t.values.values() if v.buffer is buffer})
    views[id(value)] = value
    if any(v.pixel != value.pixel or v.shape != value.shape for v in views.values()):
        return False
    for view in views.values():
        view.buffer, view.offset, view.pixel = place.buffer, place.offset, place.pixel
    return True


def _channel_shuffle(t: Translation, node: fx.Node) -> Value | None:
    value, groups = t.value(node.args[0]), node.args[1]
    if value is None or value.dtype != torch.uint8 or not isinstance(groups, int):
        return None
    channels = value.shape[1]
    source = torch.arange(channels, dtype=torch.int32).reshape(groups, -1).T.contiguous()
    out = t.builder.value(value.shape, torch.uint8, scale=value.scale, zero_point=value.zero_point)
    return t.builder.add("copy", {"a": value}, out, (source,), element=1, table=source.data_ptr())


def _lookup(t: Translation, node: fx.Node) -> Value | None:
    value = t.value(node.args[0])
    table = t.constant(node.args[1])
    if value is None or value.dtype != torch.uint8:
        return None
    table = table.contiguous()
    out = t.builder.value(value.shape, torch.uint8)
    return t.builder.add("lookup", {"a": value}, out, (table,), table=table.data_ptr())


def _numbers(arguments: Sequence[object]) -> bool:
    return all(isinstance(a, (int, float)) for a in arguments)


def _asymmetric(zero_point: Tensor | None) -> bool:
    return zero_point is not None and bool((zero_point != 0).any())


_Q: Final = torch.ops.quantized
_O: Final = torch.ops.onednn

RULES: Final[Mapping[Any, Rule]] = {
    kernels.checked_input: _same,
    kernels.as_bytes: _same,
    kernels.as_quantized: _as_quantized,
    kernels.accumulator: _accumulator,
    kernels.chunk: _chunk,
    kernels.split: _chunk,
    kernels.lookup: _lookup,
    torch.flatten: _flatten,
    "flatten": _regroup,
    "unflatten": _regroup,
    "view": _regroup,
    "reshape": _regroup,
    torch.reshape: _regroup,
    torch.unflatten: _regroup,
    "transpose": _transpose,
    torch.transpose: _transpose,
    "permute": _permute,
    torch.permute: _permute,
    "contiguous": _contiguous,
    torch.quantize_per_tensor: _quantize,
    torch.dequantize: _dequantize,
    _Q.conv2d.new: _packed_conv(relu=False),
    _Q.conv2d_relu.new: _packed_conv(relu=True),
    _Q.linear.default: _packed_linear(relu=False),
    _Q.linear_relu.default: _packed_linear(relu=True),
    _Q.linear_dynamic.default: _dynamic_linear(_ACTIVATIONS["none"]),
    _Q.linear_relu_dynamic.default: _dynamic_linear(_ACTIVATIONS["relu"]),
    _O.qconv_pointwise.default: _onednn_conv,
    _O.qconv2d_pointwise.binary: _onednn_sum,
    _O.qlinear_pointwise.default: _onednn_linear,
    torch.max_pool2d: _max_pool,
    F.max_pool2d: _max_pool,
    engine_free.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _global_mean,
    torch.mean: _global_mean,
    "mean": _global_mean,
    _Q.add.default: _add_integers(low=False),
    _Q.add_relu.default: _add_integers(low=True),
    _Q.mul.default: _multiply(low=False),
    _Q.mul_relu.default: _multiply(low=True),
    _Q.batch_norm2d.default: _batch_norm(low=False),
    _Q.batch_norm2d_relu.default: _batch_norm(low=True),
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    F.relu: _float_map("relu"),
    torch.relu: _float_map("relu"),
    F.hardsigmoid: _float_map("hardsigmoid"),
    torch.sigmoid: _float_map("sigmoid"),
    operator.add: _float_map("add"),
    torch.add: _float_map("add"),
    torch.cat: _cat,
    torch.channel_shuffle: _channel_shuffle,
}
"""What a node calls -> the rule that adds its steps."""
