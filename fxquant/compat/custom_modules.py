"""Custom modules: classes of the user that observe, and quantize, in their own way.

A float class is mapped to an observed one, which has a class method ``from_float``, and that to a
quantized one with a class method ``from_observed``. Both get the module before them: the float one
with its ``qconfig``, the observed one with the observer of its result, ``activation_post_process``.

These classes, which are often made of torch.ao's modules, ask observers for torch's quantized
dtypes (``quint8``); fxquant's say ``uint8`` elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from fxquant.custom_config import ClassMapping, ConvertCustomConfig, PrepareCustomConfig, QuantType
from fxquant.passes.nest_modules import Nested
from fxquant.qconfig import Factory, QConfig, spec_of


def is_custom(config: PrepareCustomConfig, module: nn.Module) -> bool:
    """Whether ``module`` is of a class that is mapped to an observed one."""
    mapping = config.float_to_observed_mapping
    return any(type(module) in classes for classes in mapping.values())


def quant_type(qconfig: QConfig) -> QuantType | None:
    """How a qconfig quantizes: by its activation, or, where it has none, its weight."""
    factory, weight = spec_of(qconfig.activation), spec_of(qconfig.weight)
    activation = None if factory is None else factory.spec
    if activation is None:
        return None if weight is None or weight.spec is None else QuantType.WEIGHT_ONLY
    return QuantType.DYNAMIC if activation.is_dynamic else QuantType.STATIC


def observed_module(
    config: PrepareCustomConfig,
    module: nn.Module,
    qconfig: QConfig | None,
    qconfig_inside: Callable[[str, nn.Module], QConfig | None],
) -> Nested | None:
    """The observed form of a custom module, or ``None`` where its class is not mapped.

    Args:
        config: maps classes.
        module: its copy. It and the modules in it are given their qconfigs, which torch.ao's
            quantized modules ask the float ones for.
        qconfig: of the module.
        qconfig_inside: of a module in it, by its path from there.
    """
    if qconfig is None:
        return None
    kind = quant_type(qconfig)
    made = _class_of(config.float_to_observed_mapping, kind, module)
    if made is None:
        return None
    given: Any = module
    given.qconfig = _in_torch_dtypes(qconfig)
    for path, part in module.named_modules():
        own = qconfig_inside(path, part) if path else None
        if own is not None:
            inside: Any = part
            inside.qconfig = _in_torch_dtypes(own)
    return nested_observed(made.from_float(given), type(module), qconfig)


def nested_observed(observed: nn.Module, float_class: type, qconfig: QConfig) -> Nested:
    """How a graph holds the observed form of a custom module of ``float_class``."""
    static = quant_type(qconfig) is QuantType.STATIC
    return Nested(
        module=observed,
        takes=None if static else (),
        gives=None if static else (),
        observed=static,
        results=_LSTM_RESULTS if issubclass(float_class, nn.LSTM) else None,
        qconfig=qconfig,
        reason=f"a custom module, observed by {type(observed).__name__}",
    )


_LSTM_RESULTS = (None, (None, None))


def converted_module(
    config: ConvertCustomConfig,
    module: nn.Module,
    qconfig: QConfig | None,
    observed: Callable[[], Any],
) -> nn.Module | None:
    """The quantized form of an observed custom module; ``None`` where its class is not mapped."""
    if qconfig is None:
        return None
    made = _class_of(config.observed_to_quantized_mapping, quant_type(qconfig), module)
    if made is None:
        return None
    given: Any = module
    given.qconfig = _in_torch_dtypes(qconfig)
    observer = observed()
    if observer is not None:
        given.activation_post_process = _with_torch_dtype(observer)
    quantized: nn.Module = made.from_observed(given)
    return quantized


def _class_of(mapping: ClassMapping, kind: QuantType | None, module: nn.Module) -> Any:
    return None if kind is None else mapping.get(kind, {}).get(type(module))


_TORCH_DTYPES: Final = {
    torch.uint8: torch.quint8,
    torch.int8: torch.qint8,
    torch.int32: torch.qint32,
}


def _in_torch_dtypes(qconfig: QConfig) -> QConfig:
    """``qconfig`` with observers that name their dtypes as torch.ao's do."""
    factories = (qconfig.activation, qconfig.weight)
    return QConfig(*(None if f is None else functools.partial(_made, f) for f in factories))


def _made(factory: Factory, *args: Any, **kwargs: Any) -> Any:
    return _with_torch_dtype(factory(*args, **kwargs))


def _with_torch_dtype(observer: Any) -> Any:
    dtype = getattr(observer, "dtype", None)
    if dtype in _TORCH_DTYPES:
        observer.dtype = _TORCH_DTYPES[dtype]
    inner = getattr(observer, "activation_post_process", None)
    if inner is not None:
        _with_torch_dtype(inner)
    return observer
