"""What torch.ao's FX API quantizes by default, as a :class:`BackendConfig` of our own.

This is observed behaviour written down as data: which spellings of which ops, observed how, with
which dtypes. :mod:`fxquant.targets.compat` narrows its table by it, so ``fxquant.compat`` quantizes
what torch.ao would, spelling by spelling (``torch.flatten`` but not ``Tensor.flatten``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.backend_config import BackendConfig, BackendPatternConfig, ObservationType
from fxquant.dtype_config import DTypeConfig, DTypeWithConstraints

_OWN = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
_SHARED = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT

WEIGHTED: Final = DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float32)
DYNAMIC: Final = DTypeConfig(torch.quint8, torch.float32, torch.qint8, torch.float32, True)
FLOAT16_DYNAMIC: Final = DTypeConfig(
    torch.float16, torch.float32, torch.float16, torch.float32, True
)
UNWEIGHTED: Final = DTypeConfig(torch.quint8, torch.quint8)
NORMALIZING: Final = DTypeConfig(torch.quint8, torch.quint8, torch.float32, torch.float32)
TABLES: Final = tuple(
    DTypeConfig(torch.float32, torch.float32, dtype) for dtype in (torch.quint8, torch.quint4x2)
)


def _fixed(scale: float, zero_point: int) -> DTypeConfig:
    dtype = DTypeWithConstraints(
        dtype=torch.quint8,
        quant_min_lower_bound=0,
        quant_max_upper_bound=255,
        scale_exact_match=scale,
        zero_point_exact_match=zero_point,
    )
    return DTypeConfig(dtype, dtype)


UNIT_INTERVAL: Final = _fixed(1 / 256, 0)
SYMMETRIC_INTERVAL: Final = _fixed(2 / 256, 128)

_RELUS: Final = (nn.ReLU, F.relu)
_CONVOLUTIONS: Final = (
    (nn.Conv1d, F.conv1d, nn.ConvTranspose1d, F.conv_transpose1d, nn.BatchNorm1d),
    (nn.Conv2d, F.conv2d, nn.ConvTranspose2d, F.conv_transpose2d, nn.BatchNorm2d),
    (nn.Conv3d, F.conv3d, nn.ConvTranspose3d, F.conv_transpose3d, nn.BatchNorm3d),
)
_OWN_SCALE: Final[tuple[Any, ...]] = (
    *(nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Dropout, nn.PReLU),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(F.elu, F.leaky_relu, F.hardswish, F.dropout, F.group_norm, F.instance_norm),
)
_UNIT: Final[tuple[Any, ...]] = (
    *(nn.Hardsigmoid, F.hardsigmoid, "hardsigmoid", "hardsigmoid_"),
    *(nn.Sigmoid, torch.sigmoid, "sigmoid", "sigmoid_", nn.Softmax),
)
_SIGNED_UNIT: Final[tuple[Any, ...]] = (nn.Tanh, torch.tanh, "tanh", "tanh_")
_MOVING: Final[tuple[Any, ...]] = (
    torch.cat,
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(nn.Hardtanh, F.hardtanh, F.hardtanh_, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle),
    *(F.pixel_shuffle, F.pixel_unshuffle, F.interpolate),
    *(nn.ReLU, F.relu, "relu", "relu_", nn.ReLU6, F.relu6),
    *(torch.clamp, "clamp", torch.flatten, torch.mean, "mean", torch.narrow),
    *(torch.repeat_interleave, "repeat_interleave", "repeat", "resize_"),
    *(torch.transpose, "transpose", torch.squeeze, "squeeze", "squeeze_", torch.stack),
    *(torch.unsqueeze, "unsqueeze", "unsqueeze_", "contiguous", "detach", "detach_"),
    *("permute", "reshape", "view"),
)


def _entry(
    pattern: Any, observation: ObservationType, dtypes: Iterable[DTypeConfig]
) -> BackendPatternConfig:
    config = BackendPatternConfig(pattern)
    return config.set_observation_type(observation).set_dtype_configs(list(dtypes))


def fused(*pattern: Any, dtypes: Iterable[DTypeConfig]) -> BackendPatternConfig:
    """A chain that becomes one op before anything is observed; without one, it is set later."""
    return _entry(pattern or None, _OWN, dtypes).set_fuser_method(_fuse)


def _fuse(is_qat: bool, *modules: nn.Module) -> nn.Module:
    """Stands for the fusion of the passes, which need no function."""
    return nn.Sequential(*modules)


def _convolutions() -> Iterable[BackendPatternConfig]:
    for module, function, transposed, transposed_function, norm in _CONVOLUTIONS:
        for op in (module, function, transposed, transposed_function):
            yield _entry(op, _OWN, [WEIGHTED])
        yield fused(module, norm, dtypes=[WEIGHTED])
        yield fused(transposed, norm, dtypes=[WEIGHTED])
        for relu in _RELUS:
            yield fused(module, relu, dtypes=[WEIGHTED])
            yield fused(module, norm, relu, dtypes=[WEIGHTED])
            yield _entry((function, relu), _OWN, [WEIGHTED])


def _linears() -> Iterable[BackendPatternConfig]:
    dtypes = [WEIGHTED, DYNAMIC, FLOAT16_DYNAMIC]
    yield _entry(nn.Linear, _OWN, dtypes)
    yield _entry(F.linear, _OWN, dtypes)
    yield fused(nn.Linear, nn.BatchNorm1d, dtypes=dtypes)
    for relu in _RELUS:
        yield fused(nn.Linear, relu, dtypes=dtypes)
        yield _entry((F.linear, relu), _OWN, dtypes)


def _arithmetic() -> Iterable[BackendPatternConfig]:
    by_tensors = {0: _OWN, 1: _SHARED, 2: _OWN}
    for op in (operator.add, torch.add, operator.mul, torch.mul):
        for chain in (op, *((op, relu) for relu in (*_RELUS, torch.relu))):
            entry = _entry(chain, _OWN, [UNWEIGHTED])
            yield entry._set_num_tensor_args_to_observation_type(by_tensors)
    yield _entry(torch.matmul, _OWN, [UNWEIGHTED])


def _norms() -> Iterable[BackendPatternConfig]:
    for norm in (nn.BatchNorm2d, nn.BatchNorm3d):
        yield _entry(norm, _OWN, [UNWEIGHTED])
        for relu in _RELUS:
            yield fused(norm, relu, dtypes=[UNWEIGHTED])
    for op in (nn.LayerNorm, F.layer_norm):
        yield _entry(op, _OWN, [NORMALIZING])


def _simple() -> Iterable[BackendPatternConfig]:
    groups = (
        (_OWN_SCALE, _OWN, [UNWEIGHTED]),
        (_UNIT, _OWN, [UNIT_INTERVAL]),
        (_SIGNED_UNIT, _OWN, [SYMMETRIC_INTERVAL]),
        (_MOVING, _SHARED, [UNWEIGHTED]),
        (_RECURRENT, _OWN, [DYNAMIC, FLOAT16_DYNAMIC]),
        (_TABLES, _OWN, TABLES),
    )
    for ops, observation, dtypes in groups:
        for op in ops:
            yield _entry(op, observation, dtypes)


_RECURRENT: Final = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_TABLES: Final = (nn.Embedding, nn.EmbeddingBag)


def compat_backend_config() -> BackendConfig:
    """The native backend of torch.ao, without the classes that its fusion makes."""
    config = BackendConfig("native")
    for part in (_convolutions, _linears, _arithmetic, _norms, _simple):
        config.set_backend_pattern_configs(list(part()))
    return config
