"""How ops on float activations are emitted: quantized at run time, or with an integer table.

Their kernels read and write float32; what the reference graph has as ``quantize_dynamic`` and
``dequantize`` happens inside them.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import fx

from fxquant.clamps import bounds_of
from fxquant.kernel_probe import exact_engine, is_exact
from fxquant.kernels import embedding, embedding_bag
from fxquant.lowering import Site, Weight
from fxquant.metadata import add_reason, record_of, shape_of, update_record
from fxquant.op_view import Op, attribute
from fxquant.operators import DEQUANTIZE, QUANTIZE_DYNAMIC, TO_DTYPE
from fxquant.recurrent import TENSORS_PER_LAYER
from fxquant.recurrent_kernels import (
    gru_cell,
    lstm_cell,
    quantized_gru,
    quantized_lstm,
    rnn_cell,
)
from fxquant.targets.choice import faster_dynamic
from fxquant.targets.emit_common import BYTES, FLOAT_WEIGHT, clamp_epilogue, emit_float_head, finish

_HALVED: Final = 127


def is_dynamic(site: Site) -> bool:
    """Whether the op quantizes its activations at run time."""
    annotation = record_of(site.op.node).annotation
    return annotation is not None and any(s is not None and s.is_dynamic for s in annotation.inputs)


def _source(value: object) -> tuple[fx.Node, int] | None:
    """The float value behind ``dequantize(quantize_dynamic(x))``, and its largest integer."""
    if not isinstance(value, fx.Node) or value.target is not DEQUANTIZE:
        return None
    part = value.args[0]
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    quantize = part.args[0]
    if not isinstance(quantize, fx.Node) or quantize.target is not QUANTIZE_DYNAMIC:
        return None
    source, _, quant_max, *_ = quantize.args
    assert isinstance(source, fx.Node) and isinstance(quant_max, int)
    return source, quant_max


def _half(value: object) -> fx.Node | None:
    """The float16 value behind a cast to float32."""
    if isinstance(value, fx.Node) and value.target is TO_DTYPE:
        stored = value.args[0]
        assert isinstance(stored, fx.Node)
        return stored
    return None


def _unrounded(value: object) -> object:
    """The float value that a kernel reads, which rounds it itself or not at all."""
    found = _source(value)
    if found is not None:
        return found[0]
    half = _half(value)
    if half is not None and half.target is TO_DTYPE:
        return half.args[0]
    return value


def _reduce_range(site: Site, quant_max: int) -> bool:
    """Whether the kernel is to use half of the range; where it must, though it was not planned."""
    if quant_max <= _HALVED:
        return True
    if is_exact("linear", exact_engine("linear")):
        return False
    add_reason(
        site.op.node,
        "activations quantized to 0..127 instead of 0..255: the kernels of this CPU saturate",
    )
    return True


# -- linear ---------------------------------------------------------------------------------------


def emit_dynamic_linear(site: Site) -> str | None:
    """``linear`` on float activations, with a relu behind it."""
    shape = shape_of(site.op.activations[0])
    if shape is not None and len(shape) < 2:
        return "the dynamic kernels take no vectors; add a batch dimension"
    clamp = clamp_epilogue(site.epilogues)
    if site.epilogues and (clamp is None or bounds_of(clamp) != (0.0, None)):
        return emit_float_head(site, _emit_linear)
    return _emit_linear(
        Site(op=site.op, epilogues=site.epilogues, quantize=None, lowering=site.lowering)
    )


def _emit_linear(site: Site) -> str | None:
    half = _half(site.op.arguments["weight"])
    return _emit_int8_linear(site) if half is None else _emit_float16_linear(site, half)


def _emit_int8_linear(site: Site) -> str | None:
    lowering, weight = site.lowering, site.weight()
    found = _source(site.op.activations[0])
    if weight is None:
        return FLOAT_WEIGHT
    if found is None:
        return "its activation is not quantized at run time"
    source, quant_max = found
    engine = faster_dynamic(site, exact_engine("linear"))
    name = f"linear{'_relu' if site.epilogues else ''}_dynamic"
    packed = lowering.pack("linear", (*_tensors(weight), _bias(site.op), engine), at=site.last)
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (source, packed, _reduce_range(site, quant_max)),
        f"quantized::{name} ({engine}) -> fp32",
    )
    finish(site, node, BYTES)
    return None


def _emit_float16_linear(site: Site, half: fx.Node) -> str | None:
    lowering = site.lowering
    name = f"linear{'_relu' if site.epilogues else ''}_dynamic_fp16"
    packed = lowering.pack("linear-float16", (half, _bias(site.op)), at=site.last)
    node = lowering.emit(
        site,
        getattr(torch.ops.quantized, name).default,
        (_unrounded(site.op.activations[0]), packed),
        f"quantized::{name} -> fp32",
    )
    finish(site, node, BYTES)
    return None


def _bias(op: Op) -> Any:
    return op.arguments.get("bias")


def _tensors(weight: Weight) -> tuple[fx.Node, fx.Node, fx.Node]:
    return weight.integers, weight.scale, weight.zero_point


# -- recurrent modules ----------------------------------------------------------------------------

_CELLS: Final = {
    "lstm_cell": (lstm_cell, "quantized::quantized_lstm_cell_dynamic"),
    "gru_cell": (gru_cell, "quantized::quantized_gru_cell_dynamic"),
    "rnn_cell": (rnn_cell, "quantized::quantized_rnn_{}_cell_dynamic"),
}


def emit_recurrent(site: Site) -> str | None:
    """``nn.LSTM`` and ``nn.GRU``."""
    op, weights = site.op, site.op.arguments["weights"]
    half = _half(weights[0]) is not None
    groups = [
        weights[first : first + TENSORS_PER_LAYER]
        for first in range(0, len(weights), TENSORS_PER_LAYER)
    ]
    common = (
        _unrounded(op.arguments["input"]),
        op.arguments["hx"],
        [_cell_parameters(site, group) for group in groups],
        _hidden_features(site, weights[1]),
        op.arguments["bidirectional"],
        op.arguments["batch_first"],
    )
    how = "float16" if half else exact_engine("linear")
    kernel = f"aten::quantized_{op.name} ({how}) -> fp32"
    if op.name == "lstm":
        dtype = torch.float16 if half else torch.qint8
        _emit_floats(site, quantized_lstm, (*common, dtype), kernel)
    else:
        _emit_floats(site, quantized_gru, common, kernel)
    return None


def emit_cell(site: Site) -> str | None:
    """``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell``."""
    op, weights = site.op, site.op.arguments["weights"]
    target, kernel = _CELLS[op.name]
    packed = [_packed_linear(site, weights[i], weights[i + 2]) for i in (0, 1)]
    biases = [_bias_or_zeros(site, weights[i], weights[i + 2]) for i in (0, 1)]
    args = (_unrounded(op.arguments["input"]), op.arguments["hx"], *packed, *biases)
    args = (*args, _hidden_features(site, weights[1]))
    if op.name == "rnn_cell":
        args = (*args, op.arguments["nonlinearity"])
    kernel = kernel.format(op.arguments.get("nonlinearity"))
    _emit_floats(site, target, args, f"{kernel} -> fp32")
    return None


def _emit_floats(site: Site, target: Any, args: tuple[Any, ...], kernel: str) -> None:
    """Emit a kernel that writes floats, of whatever structure."""
    node = site.lowering.emit(site, target, args, kernel)
    update_record(node, value=record_of(site.op.node).value)
    site.lowering.result_float(site, node)


def _cell_parameters(site: Site, tensors: list[fx.Node | None]) -> fx.Node:
    """The packed weights and biases of one layer and direction."""
    w_ih, w_hh, *_ = tensors
    biases = [_bias_or_zeros(site, w, b) for w, b in zip(tensors[:2], tensors[2:], strict=True)]
    halves = [_half(w) for w in (w_ih, w_hh)]
    if None not in halves:
        return site.lowering.pack("cell-float16", (*halves, *biases), at=site.last)
    parts = [_dequantized(w) for w in (w_ih, w_hh)]
    levels = site.op.arguments["levels"]
    options = (_reduce_range(site, levels[1]), exact_engine("linear"))
    return site.lowering.pack("cell", (*parts[0], *parts[1], *biases, *options), at=site.last)


def _packed_linear(site: Site, weight: fx.Node | None, bias: fx.Node | None) -> fx.Node:
    half = _half(weight)
    if half is not None:
        return site.lowering.pack("linear-float16", (half, bias), at=site.last)
    args = (*_dequantized(weight), bias, exact_engine("linear"))
    return site.lowering.pack("linear", args, at=site.last)


def _bias_or_zeros(site: Site, weight: fx.Node | None, bias: fx.Node | None) -> fx.Node:
    """The cell kernels want biases, also where the module has none."""
    if bias is not None:
        return bias
    lowering = site.lowering
    rows = _stored_weight(site, weight).shape[0]
    name = lowering.rewriter.new_buffer(f"{site.op.node.name}_no_bias", torch.zeros(rows))
    return lowering.rewriter.get_attr(name, before=site.last, like=site.last)


def _dequantized(weight: fx.Node | None) -> tuple[fx.Node, fx.Node, fx.Node]:
    assert weight is not None and weight.target is DEQUANTIZE
    integers, scale, zero_point = weight.args[:3]
    assert isinstance(integers, fx.Node) and isinstance(scale, fx.Node)
    assert isinstance(zero_point, fx.Node)
    return integers, scale, zero_point


def _stored_weight(site: Site, weight: fx.Node | None) -> torch.Tensor:
    assert weight is not None
    stored = weight.args[0]
    assert isinstance(stored, fx.Node)
    value = attribute(site.lowering.gm, str(stored.target))
    assert isinstance(value, torch.Tensor)
    return value


def _hidden_features(site: Site, weight: fx.Node | None) -> int:
    return int(_stored_weight(site, weight).shape[1])


# -- tables ---------------------------------------------------------------------------------------


_TABLES: Final[dict[str, tuple[Any, tuple[str, ...]]]] = {
    "embedding": (embedding, ("input",)),
    "embedding_bag": (
        embedding_bag,
        ("input", "offsets", "per_sample_weights", "include_last_offset", "mode"),
    ),
}


def emit_embedding(site: Site) -> str | None:
    """``embedding`` and ``embedding_bag`` of an integer table."""
    op, weight = site.op, site.weight()
    if weight is None:
        return FLOAT_WEIGHT
    annotation = record_of(op.node).annotation
    assert annotation is not None and annotation.weight is not None
    bits = 4 if annotation.weight.levels == 16 else 8
    packed = site.lowering.pack("table", (*_tensors(weight), bits), at=site.last)
    name = f"{op.name}_{'4bit' if bits == 4 else 'byte'}"
    features = _stored_weight(site, op.arguments["weight"]).shape[1]
    target, names = _TABLES[op.name]
    args = (packed, *(op.arguments[argument] for argument in names), bits, features)
    _emit_floats(site, target, args, f"quantized::{name} -> fp32")
    return None
