"""Reasons why a row of a target does not serve a particular call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.dataflow import is_surely_float_tensor
from fxquant.metadata import TensorRecord, record_of, shape_of
from fxquant.op_view import Form, Op, attribute
from fxquant.operators import DEQUANTIZE

_HYPERPARAMETERS = ("stride", "padding", "output_padding", "dilation", "groups")


def expand(value: Any, dimensions: int) -> list[int]:
    """``2 -> [2, 2]`` for two dimensions; sequences stay."""
    if isinstance(value, (tuple, list)):
        items = [int(v) for v in value]
        return items * dimensions if len(items) == 1 else items
    return [int(value)] * dimensions


def constant_hyperparameters(op: Op) -> str | None:
    """Stride, padding and so on must be numbers: they are packed with the weight."""
    for name in _HYPERPARAMETERS:
        value = op.arguments.get(name)
        items = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, fx.Node) for item in items):
            return (
                f"{name} is computed in the graph; the int8 kernel packs it with the weight."
                " Make it a number"
            )
    if isinstance(op.arguments.get("padding"), str):
        try:
            resolve_padding(op)
        except ValueError as error:
            return str(error)
    return None


def layered_evaluation(op: Op) -> str | None:
    """Recurrent layers without projections, in evaluation: what PyTorch's kernels compute."""
    module = op.owner.get_submodule(str(op.node.target)) if op.form is Form.MODULE else None
    if getattr(module, "proj_size", 0):
        return "PyTorch's int8 kernel has no projections (proj_size)"
    if getattr(module, "dropout", 0.0) and getattr(module, "training", False):
        return "it drops values between its layers while it trains; call model.eval() before"
    return None


def looks_up_plainly(op: Op) -> str | None:
    """Look-ups that only read: no renormalisation of rows, sums and means of bags."""
    if op.arguments.get("max_norm") is not None:
        return "max_norm writes the table at every call, integers cannot be written so"
    mode = op.arguments.get("mode", "sum")
    if op.name == "embedding_bag":
        if mode not in ("sum", "mean"):
            return f"PyTorch's int8 kernel gives sums of bags only (mode={mode!r})"
        if op.arguments.get("padding_idx") is not None:
            return "PyTorch's int8 kernel counts rows at padding_idx like others"
    return None


def batched(op: Op) -> str | None:
    """The int8 convolutions take no single image without a batch dimension."""
    shape = shape_of(op.activations[0]) if op.activations else None
    if shape is None or len(shape) == int(op.name[-2]) + 2:
        return None
    return f"its input {list(shape)} has no batch dimension, which the int8 kernel needs"


def resolve_padding(op: Op) -> Any:
    """``padding`` as numbers, also where it is given as ``'same'`` or ``'valid'``.

    Raises:
        ValueError: ``'same'`` needs a different padding before and after.
    """
    padding = op.arguments.get("padding", 0)
    if padding == "valid":
        return 0
    if padding != "same":
        return padding
    spatial = weight_shape(op)[2:]
    dilation = op.arguments.get("dilation", 1)
    dilations = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(spatial)
    total = [d * (k - 1) for d, k in zip(dilations, spatial, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(
            f"padding='same' with kernel {list(spatial)} pads more after than before, which the"
            " int8 kernel cannot; pad explicitly before the convolution"
        )
    return [t // 2 for t in total]


def weight_shape(op: Op) -> tuple[int, ...]:
    """Shape of the weight, in a float graph and in a reference graph."""
    weight, node = op.constant("weight"), op.arguments.get("weight")
    if isinstance(node, fx.Node) and node.target is DEQUANTIZE:
        weight = attribute(op.owner, str(node.all_input_nodes[0].target))
    assert isinstance(weight, torch.Tensor)
    return tuple(weight.shape)


def is_non_overlapping(op: Op) -> bool:
    """Whether a ``conv_transpose2d`` reads one input pixel for each output pixel."""
    if op.name != "conv_transpose2d" or op.arguments["groups"] != 1:
        return False
    kernel = list(weight_shape(op)[2:])
    names = ("padding", "output_padding", "dilation")
    others = [expand(op.arguments[name], 2) for name in names]
    return expand(op.arguments["stride"], 2) == kernel and others == [[0, 0], [0, 0], [1, 1]]


def no_wrong_fast_path(op: Op) -> str | None:
    """Fbgemm's direct kernel for transposed convolutions gives garbage (checked by the tests)."""
    inputs, outputs, *kernel = weight_shape(op)
    plain = all(
        expand(op.arguments[name], len(kernel)) == [value] * len(kernel)
        for name, value in (("padding", 0), ("dilation", 1))
    )
    if (
        op.name == "conv_transpose2d"
        and op.arguments["groups"] == 1
        and inputs % 8 == outputs % 8 == 0
        and kernel[0] == 2
        and plain
        and not is_non_overlapping(op)
    ):
        return (
            f"fbgemm's kernel for a {kernel[0]} x {kernel[1]} transposed convolution without"
            " padding is wrong, and oneDNN's is too"
        )
    return None


def zero_padding_mode(op: Op) -> str | None:
    """The int8 convolutions pad with zeros only."""
    mode = op.arguments.get("padding_mode", "zeros")
    padding = op.arguments.get("padding", 0)
    if mode == "zeros" or padding in (0, (0,), (0, 0), (0, 0, 0)):
        return None
    return (
        f"padding_mode={mode!r}: the int8 kernels pad with zeros only. Pad before the convolution"
        f" with F.pad(x, ..., mode={mode!r}) and set padding=0"
    )


def tensor_operands(op: Op) -> str | None:
    """Both operands must be float tensors that the graph computes."""
    names = op.kind.activations
    for name in names:
        value = op.arguments.get(name)
        if not isinstance(value, fx.Node):
            return f"operand {value!r} is a number; the int8 kernel takes two tensors"
        if value.op == "get_attr":
            return (
                f"operand {value.target!r} is a constant tensor; it is added or multiplied in FP32"
            )
        record = record_of(value)
        if record.has_value and not (
            isinstance(record.value, TensorRecord) and record.value.dtype.is_floating_point
        ):
            return f"operand {value.name!r} is no floating-point tensor"
    if op.arguments.get("alpha", 1) != 1:
        return f"alpha={op.arguments['alpha']}: the int8 kernel adds without a factor"
    return None


def surely_floats(op: Op) -> str | None:
    """Operands that without example inputs might be numbers as well."""
    for source in op.activations:
        if not is_surely_float_tensor(op.owner, source):
            return (
                f"{source.name!r} may be something else than a float tensor, which example inputs"
                " would tell"
            )
    return None


def constant_bounds(op: Op) -> str | None:
    """The bounds of a clamp must be numbers."""
    for name in ("min", "max", "min_val", "max_val"):
        value = op.arguments.get(name)
        if value is not None and not isinstance(value, (int, float)):
            shown = value.name if isinstance(value, fx.Node) else value
            return f"its bound {name}={shown!r} is no number but computed, or a tensor"
    return None


def no_indices(op: Op) -> str | None:
    """Pooling that also returns indices has no int8 kernel."""
    function = getattr(op.node.target, "__name__", "")
    if op.arguments.get("return_indices", False) or function.endswith("_with_indices"):
        return "it returns indices too; the int8 kernel gives values only"
    return None


def constant_numbers(op: Op) -> str | None:
    """Parameters of the function must be numbers: the table is made of them."""
    for name, value in op.arguments.items():
        if name not in op.kind.activations and not isinstance(value, (int, float)):
            return f"{name} is computed in the graph; a table needs a number"
    return None


def exact_padding(op: Op) -> str | None:
    """Zeros are the zero point, and copies of values are exact; another constant has no integer."""
    mode, value = op.arguments.get("mode", "constant"), op.arguments.get("value")
    if mode == "constant" and value not in (None, 0, 0.0):
        return f"value={value}: only zero has an exact integer under every scale"
    return None


def resizes_by_integers(op: Op) -> str | None:
    """Nearest and bilinear resizing of images keep the parameters; the rest has no int8 kernel."""
    mode = op.arguments.get("mode", "nearest")
    shape = shape_of(op.activations[0]) if op.activations else None
    if mode not in ("nearest", "bilinear"):
        return f"mode={mode!r}: int8 resizing exists for 'nearest' and 'bilinear'"
    if shape is None or len(shape) != 4:
        return "int8 resizing takes images (4-d tensors with known example shapes)"
    if op.arguments.get("antialias", False):
        return "antialias=True: no int8 kernel"
    return None


def instance_statistics(op: Op) -> str | None:
    """An instance-norm that normalizes by stored statistics is another function."""
    if op.constant("running_mean") is not None:
        return (
            "the int8 kernel normalizes by the instance's own statistics, this one by stored ones"
        )
    return None


def known_batch(op: Op) -> str | None:
    """The int8 norms take the channels for the second of at least three dimensions."""
    shape = shape_of(op.activations[0])
    needed = 3
    if op.form is Form.MODULE and op.name == "instance_norm":
        name = type(op.owner.get_submodule(str(op.node.target))).__name__
        needed = int(name[-2]) + 2
    if shape is None or len(shape) < needed:
        return (
            f"the int8 kernel takes at least {needed} dimensions, batch and channels first, with"
            " known example shapes"
        )
    return None


def four_or_five_dimensional(op: Op) -> str | None:
    """``quantized::batch_norm2d`` and ``3d`` exist; a 1-d form does not."""
    if op.form is Form.MODULE:
        module = op.owner.get_submodule(str(op.node.target))
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            return None
        return "an unfused BatchNorm1d has no int8 kernel"
    shape = shape_of(op.activations[0])
    if shape is None or len(shape) not in (4, 5):
        return "the int8 batch-norm takes 4-d and 5-d inputs with known example shapes"
    return None


def evaluation_statistics(op: Op) -> str | None:
    """A batch-norm that computes statistics at run time is no fixed affine map."""
    if op.arguments.get("training", False):
        return "the batch-norm is in training mode; call model.eval() first"
    for name in ("running_mean", "running_var", "weight", "bias"):
        if op.constant(name) is None:
            return f"the batch-norm has no {name}, which the int8 kernel needs"
    return None
