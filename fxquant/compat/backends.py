"""torch.ao's backend configs under their names: what each backend quantizes, with which dtypes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.backend_config import BackendConfig, BackendPatternConfig, ObservationType
from fxquant.backend_patterns import MatchAllNode
from fxquant.dtype_config import DTypeConfig, DTypeWithConstraints
from fxquant.targets.compat_config import (
    DYNAMIC,
    FLOAT16_DYNAMIC,
    NORMALIZING,
    TABLES,
    WEIGHTED,
    compat_backend_config,
    fused,
)

_LEAST_SCALE: Final = 2.0**-12
_SYMMETRIC: Final = DTypeWithConstraints(torch.qint8, scale_min_lower_bound=_LEAST_SCALE)
_SYMMETRIC_WEIGHT: Final = DTypeWithConstraints(
    torch.qint8,
    quant_min_lower_bound=-127,
    quant_max_upper_bound=127,
    scale_min_lower_bound=_LEAST_SCALE,
)
_WEIGHTED_SYMMETRIC: Final = DTypeConfig(_SYMMETRIC, _SYMMETRIC, _SYMMETRIC_WEIGHT, torch.float32)
_UNWEIGHTED_SYMMETRIC: Final = DTypeConfig(_SYMMETRIC, _SYMMETRIC)

_Dtypes = list[DTypeConfig]


def get_native_backend_config() -> BackendConfig:
    """What torch.ao quantizes where no backend config is given: all that its engines have."""
    return compat_backend_config()


def get_fbgemm_backend_config() -> BackendConfig:
    """What torch.ao quantizes for FBGEMM: all but layer norms."""
    return _changed("fbgemm", lambda dtypes: dtypes)


def get_qnnpack_backend_config() -> BackendConfig:
    """What torch.ao quantizes for QNNPACK: symmetric int8 activations too, and no layer norms."""

    def with_symmetric(dtypes: _Dtypes) -> _Dtypes:
        static = [d for d in dtypes if not d.is_dynamic and d.input_dtype is torch.quint8]
        if not static:
            return dtypes
        weighted = static[0].weight_dtype is not None
        return [_WEIGHTED_SYMMETRIC if weighted else _UNWEIGHTED_SYMMETRIC, *dtypes]

    return _changed("qnnpack", with_symmetric)


def get_onednn_backend_config() -> BackendConfig:
    """What torch.ao quantizes for oneDNN.

    Sums of convolutions, and leaky_relu and tanh behind linears, are fused; nothing is float16.
    """

    def without_half(dtypes: _Dtypes) -> _Dtypes:
        if dtypes == list(TABLES):
            return [DTypeConfig(torch.float32, torch.float32, torch.qint8)]
        return [d for d in dtypes if d != FLOAT16_DYNAMIC]

    config = _changed("onednn", without_half, normalizes=True)
    return config.set_backend_pattern_configs([*_sums(), *_activated_linears()])


def _changed(
    name: str, change: Callable[[_Dtypes], _Dtypes], *, normalizes: bool = False
) -> BackendConfig:
    """The native config under another name, with other dtypes."""
    made = BackendConfig(name)
    for config in compat_backend_config().configs:
        if normalizes or config.dtype_configs != [NORMALIZING]:
            made.set_backend_pattern_config(config.set_dtype_configs(change(config.dtype_configs)))
    return made


def _sums() -> Iterator[BackendPatternConfig]:
    bases: tuple[Any, ...] = (nn.Conv2d, (nn.BatchNorm2d, nn.Conv2d))
    for base in bases:
        for add in (torch.add, operator.add):
            for operands in ((base, MatchAllNode), (MatchAllNode, base)):
                for tree in ((add, *operands), (nn.ReLU, (add, *operands))):
                    config = fused(dtypes=[WEIGHTED])
                    yield config._set_pattern_complex_format(tree)


def _activated_linears() -> Iterator[BackendPatternConfig]:
    dtypes = [WEIGHTED, DYNAMIC]
    own = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    for module, function in ((nn.LeakyReLU, F.leaky_relu), (nn.Tanh, torch.tanh)):
        for activation in (module, function):
            yield fused(nn.Linear, activation, dtypes=dtypes)
            config = BackendPatternConfig((F.linear, activation)).set_observation_type(own)
            yield config.set_dtype_configs(dtypes)
    yield fused(nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, dtypes=dtypes)
