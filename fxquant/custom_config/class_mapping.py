"""Custom modules: which class becomes which, under which way of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum

from fxquant.errors import ConfigError, did_you_mean


class QuantType(IntEnum):
    """A way to quantize; equal to torch.ao's of the same name, and found under it in a dict."""

    DYNAMIC = 0
    STATIC = 1
    QAT = 2
    WEIGHT_ONLY = 3


#: How a custom module is quantized -> class before -> class after.
ClassMapping = dict[QuantType, dict[type, type]]


def as_quant_type(value: object) -> QuantType:
    """Read fxquant's or torch.ao's ``QuantType``, or its name in lower case, as fxquant's.

    Raises:
        ConfigError: it is none of these.
    """
    name = value.name if isinstance(value, Enum) else str(value).upper()
    if name in QuantType.__members__ and (isinstance(value, Enum) or value == name.lower()):
        return QuantType[name]
    known = [member.lower() for member in QuantType.__members__]
    raise ConfigError(
        f"Unknown QuantType name {value!r}; known are {', '.join(known)}"
        f"{did_you_mean(str(value).lower(), known)}"
    )


def map_class(mapping: ClassMapping, before: object, after: object, quant_type: object) -> None:
    """Enter a class and what it becomes.

    Raises:
        ConfigError: one of the two is no class, or ``quant_type`` is no way to quantize.
    """
    if not isinstance(before, type) or not isinstance(after, type):
        raise ConfigError(
            f"a custom module is mapped from class to class, not {before!r}: {after!r}"
        )
    mapping.setdefault(as_quant_type(quant_type), {})[before] = after


def read_classes(mapping: ClassMapping, key: str, given: object) -> None:
    """Enter what a dict has under ``key``: ``{"static": {Class: OtherClass}}``.

    Raises:
        ConfigError: another form.
    """
    form = f'{key!r} needs {{"static": {{Class: OtherClass}}}}'
    if not isinstance(given, Mapping):
        raise ConfigError(f"{form}, got {given!r}")
    for name, classes in given.items():
        quant_type = as_quant_type(name)
        if not isinstance(classes, Mapping):
            raise ConfigError(f"{form}, but holds {classes!r}")
        for before, after in classes.items():
            map_class(mapping, before, after, quant_type)


def mapping_as_dict(mapping: ClassMapping) -> dict[str, dict[type, type]]:
    """The form that :func:`read_classes` reads."""
    return {quant_type.name.lower(): dict(classes) for quant_type, classes in mapping.items()}
