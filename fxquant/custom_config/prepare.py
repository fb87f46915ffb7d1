"""What ``prepare_fx`` and ``prepare_qat_fx`` are told beside the qconfigs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch.utils import _pytree

from fxquant.backend_config import as_backend_config
from fxquant.custom_config.class_mapping import (
    ClassMapping,
    QuantType,
    map_class,
    mapping_as_dict,
    read_classes,
)
from fxquant.custom_config.reading import checked_item, checked_items, dict_of
from fxquant.custom_config.standalone import StandaloneModuleConfigEntry
from fxquant.custom_config.text import shown
from fxquant.dict_policy import OWN, DictPolicy, read_keys
from fxquant.errors import ConfigError, Diagnostics
from fxquant.qconfig_mapping import normalize

_KEYS: Final = {
    "standalone_module_names": "standalone_module_name",
    "standalone_module_classes": "standalone_module_class",
    "float_to_observed_mapping": "float_to_observed_custom_module_class",
    "non_traceable_module_names": "non_traceable_module_name",
    "non_traceable_module_classes": "non_traceable_module_class",
    "input_quantized_indexes": "input_quantized_idxs",
    "output_quantized_indexes": "output_quantized_idxs",
    "preserved_attributes": "preserved_attributes",
}
"""Attribute -> key of the dict form."""


class PrepareCustomConfig:
    """What ``prepare_fx`` and ``prepare_qat_fx`` are told about parts of a model.

    Attributes:
        standalone_module_names: path -> how the module there is prepared on its own.
        standalone_module_classes: class -> the same for all its instances.
        float_to_observed_mapping: how a custom module is quantized -> float class -> observed
            class, which has a class method ``from_float``.
        non_traceable_module_names: paths of modules that stay as they are.
        non_traceable_module_classes: classes of such modules.
        input_quantized_indexes: positions of inputs that come quantized.
        output_quantized_indexes: positions of outputs that leave quantized.
        preserved_attributes: names of the model's attributes that the result keeps.
    """

    dict_policy: ClassVar[DictPolicy] = OWN
    """How :meth:`from_dict` reads, unless told otherwise."""

    def __init__(self) -> None:
        self.standalone_module_names: dict[str, StandaloneModuleConfigEntry] = {}
        self.standalone_module_classes: dict[type, StandaloneModuleConfigEntry] = {}
        self.float_to_observed_mapping: ClassMapping = {}
        self.non_traceable_module_names: list[str] = []
        self.non_traceable_module_classes: list[type] = []
        self.input_quantized_indexes: list[int] = []
        self.output_quantized_indexes: list[int] = []
        self.preserved_attributes: list[str] = []

    def set_standalone_module_name(
        self,
        module_name: str,
        qconfig_mapping: object,
        example_inputs: tuple[Any, ...],
        prepare_custom_config: object,
        backend_config: object,
    ) -> PrepareCustomConfig:
        """Prepare the module at a path on its own.

        Args:
            module_name: its path.
            qconfig_mapping: its mapping; ``None`` takes that of the model around it.
            example_inputs: inputs of the submodule.
            prepare_custom_config: its custom config, or ``None``.
            backend_config: its backend config; ``None`` takes that of the model around it.

        Raises:
            ConfigError: an argument of another type.
        """
        name = checked_item("standalone_module_name", module_name, str)
        self.standalone_module_names[name] = _entry(
            (qconfig_mapping, example_inputs, prepare_custom_config, backend_config),
            "standalone_module_name",
        )
        return self

    def set_standalone_module_class(
        self,
        module_class: type,
        qconfig_mapping: object,
        example_inputs: tuple[Any, ...],
        prepare_custom_config: object,
        backend_config: object,
    ) -> PrepareCustomConfig:
        """Prepare every instance of a class on its own; arguments as for a name.

        Raises:
            ConfigError: an argument of another type.
        """
        key = checked_item("standalone_module_class", module_class, type)
        self.standalone_module_classes[key] = _entry(
            (qconfig_mapping, example_inputs, prepare_custom_config, backend_config),
            "standalone_module_class",
        )
        return self

    def set_float_to_observed_mapping(
        self, float_class: type, observed_class: type, quant_type: object = QuantType.STATIC
    ) -> PrepareCustomConfig:
        """Replace a class of custom modules by its observed class.

        Args:
            float_class: of the modules in the float model.
            observed_class: has a class method ``from_float(float_module)``.
            quant_type: under which kind of quantization. torch.ao takes ``STATIC`` alone.

        Raises:
            ConfigError: an argument of another type.
        """
        map_class(self.float_to_observed_mapping, float_class, observed_class, quant_type)
        return self

    def set_non_traceable_module_names(self, module_names: Sequence[str]) -> PrepareCustomConfig:
        """Leave the modules at these paths as they are."""
        self.non_traceable_module_names = checked_items(
            "non_traceable_module_name", module_names, str
        )
        return self

    def set_non_traceable_module_classes(
        self, module_classes: Sequence[type]
    ) -> PrepareCustomConfig:
        """Leave the instances of these classes as they are."""
        self.non_traceable_module_classes = checked_items(
            "non_traceable_module_class", module_classes, type
        )
        return self

    def set_input_quantized_indexes(self, indexes: Sequence[int]) -> PrepareCustomConfig:
        """Say which inputs come quantized, by position."""
        self.input_quantized_indexes = checked_items("input_quantized_idxs", indexes, int)
        return self

    def set_output_quantized_indexes(self, indexes: Sequence[int]) -> PrepareCustomConfig:
        """Say which outputs leave quantized, by position."""
        self.output_quantized_indexes = checked_items("output_quantized_idxs", indexes, int)
        return self

    def set_preserved_attributes(self, attributes: Sequence[str]) -> PrepareCustomConfig:
        """Say which attributes of the model the result keeps."""
        self.preserved_attributes = checked_items("preserved_attributes", attributes, str)
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is set, under the keys that :meth:`from_dict` reads.

        Mappings and custom configs inside are dicts too; backend configs stay objects.
        """
        found: dict[str, Any] = {}
        for key, entries in (
            ("standalone_module_name", self.standalone_module_names),
            ("standalone_module_class", self.standalone_module_classes),
        ):
            rows = [_entry_as_tuple(name, entry) for name, entry in entries.items()]
            if rows:
                found[key] = rows
        if self.float_to_observed_mapping:
            found["float_to_observed_custom_module_class"] = mapping_as_dict(
                self.float_to_observed_mapping
            )
        for key, value in (
            ("non_traceable_module_name", self.non_traceable_module_names),
            ("non_traceable_module_class", self.non_traceable_module_classes),
            ("input_quantized_idxs", self.input_quantized_indexes),
            ("output_quantized_idxs", self.output_quantized_indexes),
            ("preserved_attributes", self.preserved_attributes),
        ):
            if value:
                found[key] = value
        return found

    @classmethod
    def from_dict(
        cls, prepare_custom_config_dict: Mapping[str, Any], policy: DictPolicy | None = None
    ) -> PrepareCustomConfig:
        """Read a dict.

        Args:
            prepare_custom_config_dict: any of the keys ``standalone_module_name`` and
                ``standalone_module_class`` (lists of ``(key, qconfig_mapping, example_inputs,
                prepare_custom_config, backend_config)``),
                ``float_to_observed_custom_module_class`` (``{"static": {Float: Observed}}``),
                ``non_traceable_module_name``, ``non_traceable_module_class``,
                ``input_quantized_idxs``, ``output_quantized_idxs`` and ``preserved_attributes``.
            policy: about unknown keys; by default the class's.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another form.
        """
        policy = cls.dict_policy if policy is None else policy
        return _read(cls(), prepare_custom_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrepareCustomConfig):
            return NotImplemented
        return _same(vars(self), vars(other))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return shown("PrepareCustomConfig", vars(self))


def as_prepare_custom_config(
    value: object, policy: DictPolicy = OWN, diagnostics: Diagnostics | None = None
) -> PrepareCustomConfig:
    """Read fxquant's or torch.ao's ``PrepareCustomConfig``, or its dict form, as fxquant's.

    Args:
        value: what the user gave; ``None`` is an empty one.
        policy: how dicts are read.
        diagnostics: where warnings go.

    Returns:
        ``value`` itself if it is fxquant's, else a new config.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, PrepareCustomConfig):
        return value
    given = dict_of(value, "PrepareCustomConfig", "prepare", _KEYS, policy, diagnostics)
    return _read(PrepareCustomConfig(), given, policy, diagnostics)


_Prepare = TypeVar("_Prepare", bound=PrepareCustomConfig)


def _read(
    made: _Prepare, given: object, policy: DictPolicy, diagnostics: Diagnostics | None
) -> _Prepare:
    where = "prepare_custom_config_dict"
    entries: Mapping[str, Any] = read_keys(given, tuple(_KEYS.values()), where, policy, diagnostics)
    for key, kind, registry in (
        ("standalone_module_name", str, made.standalone_module_names),
        ("standalone_module_class", type, made.standalone_module_classes),
    ):
        for row in _rows(key, entries.get(key, ())):
            registry[checked_item(key, row[0], kind)] = _entry(row[1:], key, policy, diagnostics)  # type: ignore[index]  # the kinds go together
    key = "float_to_observed_custom_module_class"
    read_classes(made.float_to_observed_mapping, key, entries.get(key, {}))
    for key, setter in (
        ("non_traceable_module_name", made.set_non_traceable_module_names),
        ("non_traceable_module_class", made.set_non_traceable_module_classes),
        ("input_quantized_idxs", made.set_input_quantized_indexes),
        ("output_quantized_idxs", made.set_output_quantized_indexes),
        ("preserved_attributes", made.set_preserved_attributes),
    ):
        setter(entries.get(key, ()))
    return made


def _entry(
    values: Sequence[Any],
    key: str,
    policy: DictPolicy = OWN,
    diagnostics: Diagnostics | None = None,
) -> StandaloneModuleConfigEntry:
    mapping, example_inputs, prepare, backend = values
    where = f'in prepare_custom_config_dict["{key}"], got'
    if mapping is not None and not (isinstance(mapping, Mapping) or hasattr(mapping, "to_dict")):
        raise ConfigError(f"Expected QConfigMapping {where} {type(mapping)!r}")
    if prepare is not None and not (isinstance(prepare, Mapping) or hasattr(prepare, "to_dict")):
        raise ConfigError(f"Expected PrepareCustomConfig {where} {type(prepare)!r}")
    if backend is not None and not (isinstance(backend, Mapping) or hasattr(backend, "configs")):
        raise ConfigError(f"Expected BackendConfig {where} {type(backend)!r}")
    return StandaloneModuleConfigEntry(
        qconfig_mapping=None if mapping is None else normalize(mapping),
        example_inputs=example_inputs,
        prepare_custom_config=(
            None if prepare is None else as_prepare_custom_config(prepare, policy, diagnostics)
        ),
        backend_config=as_backend_config(backend, policy, diagnostics),
    )


def _entry_as_tuple(key: object, entry: StandaloneModuleConfigEntry) -> tuple[Any, ...]:
    mapping, prepare = entry.qconfig_mapping, entry.prepare_custom_config
    return (
        key,
        None if mapping is None else mapping.to_dict(),
        entry.example_inputs,
        None if prepare is None else prepare.to_dict(),
        entry.backend_config,
    )


def _rows(key: str, rows: object) -> list[tuple[Any, ...]]:
    form = "(key, qconfig_mapping, example_inputs, prepare_custom_config, backend_config)"
    if not isinstance(rows, list | tuple):
        raise ConfigError(f"{key!r} needs a list of {form}, got {rows!r}")
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 5:
            raise ConfigError(f"{key!r} needs a list of {form}, but holds {row!r}")
    return [tuple(row) for row in rows]


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Equality of attributes; example inputs are tensors, so they are compared by value."""

    def key(value: Any) -> Any:
        if isinstance(value, StandaloneModuleConfigEntry):
            inputs, spec = _pytree.tree_flatten(value.example_inputs)
            parts = [
                (str(x.dtype), x.tolist()) if isinstance(x, torch.Tensor) else x for x in inputs
            ]
            others = (value.qconfig_mapping, value.prepare_custom_config, value.backend_config)
            return (*others, parts, spec)
        if isinstance(value, dict):
            return {name: key(item) for name, item in value.items()}
        return value

    return bool({n: key(v) for n, v in left.items()} == {n: key(v) for n, v in right.items()})
