"""What ``convert_fx`` is told beside the qconfigs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

from fxquant.custom_config.class_mapping import (
    ClassMapping,
    QuantType,
    map_class,
    mapping_as_dict,
    read_classes,
)
from fxquant.custom_config.reading import checked_items, dict_of
from fxquant.custom_config.text import shown
from fxquant.dict_policy import OWN, DictPolicy, read_keys
from fxquant.errors import Diagnostics

_KEYS: Final = {
    "observed_to_quantized_mapping": "observed_to_quantized_custom_module_class",
    "preserved_attributes": "preserved_attributes",
}
"""Attribute -> key of the dict form."""


class ConvertCustomConfig:
    """What ``convert_fx`` is told about parts of a model.

    Attributes:
        observed_to_quantized_mapping: how a custom module is quantized -> observed class ->
            quantized class, which has a class method ``from_observed``.
        preserved_attributes: names of the prepared model's attributes that the result keeps.
    """

    dict_policy: ClassVar[DictPolicy] = OWN
    """How :meth:`from_dict` reads, unless told otherwise."""

    def __init__(self) -> None:
        self.observed_to_quantized_mapping: ClassMapping = {}
        self.preserved_attributes: list[str] = []

    def set_observed_to_quantized_mapping(
        self, observed_class: type, quantized_class: type, quant_type: object = QuantType.STATIC
    ) -> ConvertCustomConfig:
        """Replace a class of observed custom modules by its quantized class.

        Args:
            observed_class: of the modules in the prepared model.
            quantized_class: has a class method ``from_observed(observed_module)``.
            quant_type: under which kind of quantization.

        Raises:
            ConfigError: an argument of another type.
        """
        map_class(self.observed_to_quantized_mapping, observed_class, quantized_class, quant_type)
        return self

    def set_preserved_attributes(self, attributes: Sequence[str]) -> ConvertCustomConfig:
        """Say which attributes of the prepared model the result keeps."""
        self.preserved_attributes = checked_items("preserved_attributes", attributes, str)
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is set, under the keys that :meth:`from_dict` reads."""
        found: dict[str, Any] = {}
        if self.observed_to_quantized_mapping:
            found["observed_to_quantized_custom_module_class"] = mapping_as_dict(
                self.observed_to_quantized_mapping
            )
        if self.preserved_attributes:
            found["preserved_attributes"] = self.preserved_attributes
        return found

    @classmethod
    def from_dict(
        cls, convert_custom_config_dict: Mapping[str, Any], policy: DictPolicy | None = None
    ) -> ConvertCustomConfig:
        """Read a dict.

        Args:
            convert_custom_config_dict: any of the keys
                ``observed_to_quantized_custom_module_class``
                (``{"static": {Observed: Quantized}}``) and ``preserved_attributes``.
            policy: about unknown keys; by default the class's.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another form.
        """
        policy = cls.dict_policy if policy is None else policy
        return _read(cls(), convert_custom_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConvertCustomConfig):
            return NotImplemented
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return shown("ConvertCustomConfig", vars(self))


def as_convert_custom_config(
    value: object, policy: DictPolicy = OWN, diagnostics: Diagnostics | None = None
) -> ConvertCustomConfig:
    """Read fxquant's or torch.ao's ``ConvertCustomConfig``, or its dict form, as fxquant's.

    Arguments, result and errors as for :func:`as_prepare_custom_config`.
    """
    if isinstance(value, ConvertCustomConfig):
        return value
    given = dict_of(value, "ConvertCustomConfig", "convert", _KEYS, policy, diagnostics)
    return _read(ConvertCustomConfig(), given, policy, diagnostics)


_Convert = TypeVar("_Convert", bound=ConvertCustomConfig)


def _read(
    made: _Convert, given: object, policy: DictPolicy, diagnostics: Diagnostics | None
) -> _Convert:
    where = "convert_custom_config_dict"
    entries: Mapping[str, Any] = read_keys(given, tuple(_KEYS.values()), where, policy, diagnostics)
    key = "observed_to_quantized_custom_module_class"
    read_classes(made.observed_to_quantized_mapping, key, entries.get(key, {}))
    made.set_preserved_attributes(entries.get("preserved_attributes", ()))
    return made
