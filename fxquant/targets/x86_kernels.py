"""Which emitter of the ``x86`` target serves which op."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxquant.engine_free import avg_pool2d
from fxquant.kernels import chunk, split, tensor_split
from fxquant.targets.emit_common import BYTES, QUANTIZED, Emitter
from fxquant.targets.emit_compat import (
    emit_arithmetic,
    emit_dropout,
    emit_elu,
    hardsigmoid,
    repeat,
    repeat_interleave,
    same,
    with_fixed_scale,
    with_own_scale,
)
from fxquant.targets.emit_convolution import emit_convolution
from fxquant.targets.emit_dynamic import emit_cell, emit_embedding, emit_recurrent
from fxquant.targets.emit_elementwise import (
    emit_batch_norm,
    emit_leaky_relu,
    emit_lookup,
    emit_matmul,
)
from fxquant.targets.emit_linear import emit_linear
from fxquant.targets.emit_movement import (
    AVG_POOL,
    MAX_POOL,
    contiguous,
    emit_clamp,
    emit_extremes,
    emit_interpolate,
    emit_list,
    emit_pad,
    expanded,
    item,
    moved,
    permuted,
    pool_with_stride,
    squeeze,
    view_of,
)
from fxquant.targets.emit_transpose import emit_convolution_transpose

EMITTERS: dict[str, Emitter] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), emit_convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), emit_convolution_transpose
    ),
    "linear": emit_linear,
    **dict.fromkeys(("lstm", "gru"), emit_recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_cell"), emit_cell),
    **dict.fromkeys(("embedding", "embedding_bag"), emit_embedding),
    "matmul": emit_matmul,
    "bmm": emit_matmul,
    **dict.fromkeys(("celu", "selu", "mish", "softplus", "logsigmoid"), emit_lookup),
    "batch_norm": emit_batch_norm,
    "add": emit_arithmetic,
    "mul": emit_arithmetic,
    # The kinds from here to "batch_norm" are in float by design on ``x86``: see its table.
    "elu": emit_elu,
    "hardswish": with_own_scale("hardswish"),
    "softmax": with_own_scale("softmax", "dim"),
    "instance_norm": with_own_scale("instance_norm", "eps", constants=("weight", "bias")),
    "group_norm": with_own_scale("group_norm", "num_groups", "eps", constants=("weight", "bias")),
    "layer_norm": with_own_scale(
        "layer_norm", "normalized_shape", "eps", constants=("weight", "bias")
    ),
    "sigmoid": with_fixed_scale(torch.sigmoid),
    "tanh": with_fixed_scale(torch.tanh),
    "hardsigmoid": with_fixed_scale(hardsigmoid),
    "dropout": emit_dropout,
    "identity": moved(same),
    "adaptive_avg_pool1d": moved(F.adaptive_avg_pool1d, "output_size", held=QUANTIZED),
    "adaptive_avg_pool2d": moved(F.adaptive_avg_pool2d, "output_size", held=QUANTIZED),
    "adaptive_avg_pool3d": moved(F.adaptive_avg_pool3d, "output_size", held=QUANTIZED),
    "mean": moved(torch.mean, "dim", "keepdim", held=QUANTIZED),
    "avg_pool1d": pool_with_stride(F.avg_pool1d, *AVG_POOL[:5]),
    "max_pool3d": pool_with_stride(F.max_pool3d, *MAX_POOL),
    "repeat": moved(repeat, "sizes", held=BYTES),
    "repeat_interleave": moved(repeat_interleave, "repeats", "dim", held=BYTES),
    "detach": moved(torch.detach, view=True),
    "leaky_relu": emit_leaky_relu,
    **dict.fromkeys(("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), emit_clamp),
    "relu": moved(torch.relu, held=QUANTIZED),
    "max_pool1d": pool_with_stride(torch.max_pool1d, *MAX_POOL),
    "max_pool2d": pool_with_stride(torch.max_pool2d, *MAX_POOL),
    "avg_pool2d": pool_with_stride(avg_pool2d, *AVG_POOL),
    "avg_pool3d": pool_with_stride(F.avg_pool3d, *AVG_POOL),
    "interpolate": emit_interpolate,
    "pad": emit_pad,
    "cat": emit_list(torch.cat),
    "stack": emit_list(torch.stack),
    "maximum": emit_extremes(torch.maximum),
    "minimum": emit_extremes(torch.minimum),
    "amax": moved(torch.amax, "dim", "keepdim", held=BYTES),
    "amin": moved(torch.amin, "dim", "keepdim", held=BYTES),
    "roll": moved(torch.roll, "shifts", "dims", held=BYTES),
    "flip": moved(torch.flip, "dims", held=BYTES),
    "unflatten": moved(torch.unflatten, "dim", "sizes", held=BYTES, view=True),
    "expand": moved(expanded, "sizes", view=True),
    "flatten": moved(torch.flatten, "start_dim", "end_dim", held=BYTES, view=True),
    "reshape": moved(view_of, "shape", held=BYTES, view=True),
    "view": moved(view_of, "shape", held=BYTES, view=True),
    "permute": moved(permuted, "dims", view=True),
    "transpose": moved(torch.transpose, "dim0", "dim1", view=True),
    "squeeze": moved(squeeze, "dim", view=True),
    "unsqueeze": moved(torch.unsqueeze, "dim", view=True),
    "slice": moved(item, "index", held=BYTES, view=True),
    "chunk": moved(chunk, "chunks", "dim", "index", held=BYTES, view=True),
    "split": moved(split, "sizes", "dim", "index", held=BYTES, view=True),
    "tensor_split": moved(tensor_split, "sections", "dim", "index", held=BYTES, view=True),
    "select": moved(torch.select, "dim", "index", held=BYTES, view=True),
    "narrow": moved(torch.narrow, "dim", "start", "length", held=BYTES, view=True),
    "contiguous": moved(contiguous, "memory_format", held=BYTES, view=True),
    "pixel_shuffle": moved(F.pixel_shuffle, "upscale_factor", held=BYTES, view=True),
    "pixel_unshuffle": moved(F.pixel_unshuffle, "downscale_factor", held=BYTES, view=True),
    "channel_shuffle": moved(F.channel_shuffle, "groups", held=BYTES, view=True),
}
"""Kind -> emitter."""
