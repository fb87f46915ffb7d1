"""Shapes of what common modules give, without running them: fake mode takes a millisecond for one.

A rule answers where the outcome is certain: a plain module of ``torch.nn`` whose input fits it and
is contiguous. Everything else is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

Rule = Callable[[Any, Tensor], "tuple[int, ...] | None"]


def _same(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _batch_norm(dims: tuple[int, ...]) -> Rule:
    def rule(module: Any, x: Tensor) -> tuple[int, ...] | None:
        tensors = (module.running_mean, module.running_var, module.weight, module.bias)
        fits = x.dim() in dims and x.shape[1] == module.num_features
        known = module.running_mean is not None and _alike(x, *tensors)
        return tuple(x.shape) if fits and known else None

    return rule


def _layer_norm(module: Any, x: Tensor) -> tuple[int, ...] | None:
    last = tuple(module.normalized_shape)
    fits = tuple(x.shape[x.dim() - len(last) :]) == last and x.dim() >= len(last)
    return tuple(x.shape) if fits and _alike(x, module.weight, module.bias) else None


def _linear(module: Any, x: Tensor) -> tuple[int, ...] | None:
    fits = x.dim() > 0 and x.shape[-1] == module.in_features
    if not fits or not _alike(x, module.weight, module.bias):
        return None
    return (*x.shape[:-1], module.out_features)


def _convolution(module: Any, x: Tensor) -> tuple[int, ...] | None:
    weight = module.weight
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    if x.dim() != weight.dim() or x.shape[1] != module.in_channels:
        return None
    if not weight.is_contiguous() or not _alike(x, weight, module.bias):
        return None
    geometry = zip(
        x.shape[2:],
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        strict=True,
    )
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    return (x.shape[0], module.out_channels, *sides) if min(sides) > 0 else None


def _alike(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether a kernel takes ``x`` with these parameters: one dtype, one device."""
    return all(t is None or (t.dtype is x.dtype and t.device == x.device) for t in tensors)


_RULES: Final[dict[type, Rule]] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid), _same),
    **dict.fromkeys((nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh), _same),
    **dict.fromkeys((nn.Identity, nn.Dropout), _same),  # in evaluation
    nn.BatchNorm1d: _batch_norm((2, 3)),
    nn.BatchNorm2d: _batch_norm((4,)),
    nn.BatchNorm3d: _batch_norm((5,)),
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
}


def given_by_matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``torch.matmul`` gives for two stacks of matrices; ``None``: run it."""
    if len(args) != 2 or kwargs or not all(isinstance(x, Tensor) for x in args):
        return None
    left, right = args
    if left.dim() != right.dim() or left.dim() < 3 or left.shape[:-2] != right.shape[:-2]:
        return None  # others are broadcast, or computed as one product of two matrices
    fits = left.shape[-1] == right.shape[-2] and left.is_floating_point()
    if not fits or not _alike(left, right) or left.layout is not torch.strided:
        return None
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def given_by_rule(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor of the shape and dtype that ``module`` gives in evaluation; ``None``: run it.

    Args:
        module: that is called.
        args: of the call.
        kwargs: of the call.
    """
    rule = _RULES.get(type(module))
    if rule is None or len(args) != 1 or kwargs or not _is_plain(module):
        return None
    x = args[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.is_contiguous():
        return None
    if x.layout is not torch.strided:
        return None
    shape = rule(module, x)
    return None if shape is None else x.new_empty(shape)


def _is_plain(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)
