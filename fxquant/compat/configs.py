"""The config classes, reading dicts as torch.ao does: unknown keys are no error.

Each class here makes and recognizes instances of fxquant's class of the same name, so configs made
under either name are the same objects to everyone; ``from_dict`` alone asks which class it is
called on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from fxquant import backend_config, custom_config, dtype_config, qconfig, qconfig_mapping
from fxquant.dict_policy import TORCH_AO, DictPolicy, Severity

_POLICY: Final[DictPolicy] = replace(TORCH_AO, legacy_form=Severity.NOTHING)
"""Who calls ``from_dict`` has a dict, and is told nothing about that."""


class _SameAs(type):
    """Of a class that stands for its base; a class derived from it is one of its own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if type(cls.__base__) is not type:
            return super().__call__(*args, **kwargs)
        return cls.__base__(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        if type(cls.__base__) is not type:
            return super().__instancecheck__(instance)
        return isinstance(instance, cls.__base__)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if type(cls.__base__) is not type:
            return super().__subclasscheck__(subclass)
        return issubclass(subclass, cls.__base__)


class _AsGiven(_SameAs):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return qconfig.QConfig.as_given(*args, **kwargs)


class QConfig(qconfig.QConfig, metaclass=_AsGiven):
    """:class:`fxquant.QConfig`; what is no factory is refused where it is used, by prepare."""

    __slots__ = ()


class QConfigMapping(qconfig_mapping.QConfigMapping, metaclass=_SameAs):
    """:class:`fxquant.QConfigMapping`; ``from_dict`` warns of unknown keys."""

    dict_policy = _POLICY


class PrepareCustomConfig(custom_config.PrepareCustomConfig, metaclass=_SameAs):
    """:class:`fxquant.PrepareCustomConfig`; ``from_dict`` warns of unknown keys."""

    dict_policy = _POLICY


class ConvertCustomConfig(custom_config.ConvertCustomConfig, metaclass=_SameAs):
    """:class:`fxquant.ConvertCustomConfig`; ``from_dict`` warns of unknown keys."""

    dict_policy = _POLICY


class FuseCustomConfig(custom_config.FuseCustomConfig, metaclass=_SameAs):
    """:class:`fxquant.custom_config.FuseCustomConfig`; ``from_dict`` warns of unknown keys."""

    dict_policy = _POLICY


class BackendConfig(backend_config.BackendConfig, metaclass=_SameAs):
    """:class:`fxquant.backend_config.BackendConfig`; ``from_dict`` warns of unknown keys."""

    dict_policy = _POLICY


class BackendPatternConfig(backend_config.BackendPatternConfig, metaclass=_SameAs):
    """:class:`fxquant.backend_config.BackendPatternConfig`; ``from_dict`` warns of unknown keys."""

    dict_policy = _POLICY


class DTypeConfig(dtype_config.DTypeConfig, metaclass=_SameAs):
    """:class:`fxquant.dtype_config.DTypeConfig`; ``from_dict`` warns of unknown keys."""

    __slots__ = ()
    dict_policy = _POLICY
