"""What ``prepare_fx``, ``convert_fx`` and ``fuse_fx`` are told beside the qconfigs.

::

    PrepareCustomConfig()
        .set_non_traceable_module_names(["decoder"])
        .set_standalone_module_class(Backbone, None, (x,), None, None)
        .set_preserved_attributes(["classes"])

The classes have the setters, attributes and dict forms of torch.ao's;
:func:`as_prepare_custom_config` and its like read torch.ao's objects and dicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, IntEnum
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch.utils import _pytree

from fxquant.backend_config import BackendConfig, as_backend_config
from fxquant.dict_policy import OWN, DictPolicy, note_legacy_form, read_keys
from fxquant.errors import ConfigError, Diagnostics, did_you_mean
from fxquant.qconfig_mapping import QConfigMapping, normalize


class QuantType(IntEnum):
    """A way to quantize; equal to torch.ao's of the same name, and found under it in a dict."""

    DYNAMIC = 0
    STATIC = 1
    QAT = 2
    WEIGHT_ONLY = 3


#: How a custom module is quantized -> class before -> class after.
ClassMapping = dict[QuantType, dict[type, type]]

_PREPARE_KEYS: Final = (
    "standalone_module_name",
    "standalone_module_class",
    "float_to_observed_custom_module_class",
    "non_traceable_module_name",
    "non_traceable_module_class",
    "input_quantized_idxs",
    "output_quantized_idxs",
    "preserved_attributes",
)
_CONVERT_KEYS: Final = ("observed_to_quantized_custom_module_class", "preserved_attributes")
_FUSE_KEYS: Final = ("preserved_attributes",)


@dataclass(frozen=True, slots=True)
class StandaloneModuleConfigEntry:
    """How a submodule is prepared on its own.

    Attributes:
        qconfig_mapping: its mapping; ``None`` takes that of the model around it.
        example_inputs: inputs of the submodule.
        prepare_custom_config: its custom config, with which of its inputs and outputs are
            quantized; ``None`` is an empty one.
        backend_config: its backend config; ``None`` takes that of the model around it.
    """

    qconfig_mapping: QConfigMapping | None
    example_inputs: tuple[Any, ...]
    prepare_custom_config: PrepareCustomConfig | None
    backend_config: BackendConfig | None


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
        name = _item("standalone_module_name", module_name, str)
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
        key = _item("standalone_module_class", module_class, type)
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
        _map_class(self.float_to_observed_mapping, float_class, observed_class, quant_type)
        return self

    def set_non_traceable_module_names(self, module_names: Sequence[str]) -> PrepareCustomConfig:
        """Leave the modules at these paths as they are."""
        self.non_traceable_module_names = _items("non_traceable_module_name", module_names, str)
        return self

    def set_non_traceable_module_classes(
        self, module_classes: Sequence[type]
    ) -> PrepareCustomConfig:
        """Leave the instances of these classes as they are."""
        self.non_traceable_module_classes = _items(
            "non_traceable_module_class", module_classes, type
        )
        return self

    def set_input_quantized_indexes(self, indexes: Sequence[int]) -> PrepareCustomConfig:
        """Say which inputs come quantized, by position."""
        self.input_quantized_indexes = _items("input_quantized_idxs", indexes, int)
        return self

    def set_output_quantized_indexes(self, indexes: Sequence[int]) -> PrepareCustomConfig:
        """Say which outputs leave quantized, by position."""
        self.output_quantized_indexes = _items("output_quantized_idxs", indexes, int)
        return self

    def set_preserved_attributes(self, attributes: Sequence[str]) -> PrepareCustomConfig:
        """Say which attributes of the model the result keeps."""
        self.preserved_attributes = _items("preserved_attributes", attributes, str)
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
            found["float_to_observed_custom_module_class"] = _mapping_as_dict(
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
        return _read_prepare(cls(), prepare_custom_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrepareCustomConfig):
            return NotImplemented
        return _same(vars(self), vars(other))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return _shown("PrepareCustomConfig", vars(self))


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
        _map_class(self.observed_to_quantized_mapping, observed_class, quantized_class, quant_type)
        return self

    def set_preserved_attributes(self, attributes: Sequence[str]) -> ConvertCustomConfig:
        """Say which attributes of the prepared model the result keeps."""
        self.preserved_attributes = _items("preserved_attributes", attributes, str)
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is set, under the keys that :meth:`from_dict` reads."""
        found: dict[str, Any] = {}
        if self.observed_to_quantized_mapping:
            found["observed_to_quantized_custom_module_class"] = _mapping_as_dict(
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
        return _read_convert(cls(), convert_custom_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConvertCustomConfig):
            return NotImplemented
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return _shown("ConvertCustomConfig", vars(self))


class FuseCustomConfig:
    """What ``fuse_fx`` is told about a model.

    Attributes:
        preserved_attributes: names of the model's attributes that the result keeps.
    """

    dict_policy: ClassVar[DictPolicy] = OWN
    """How :meth:`from_dict` reads, unless told otherwise."""

    def __init__(self) -> None:
        self.preserved_attributes: list[str] = []

    def set_preserved_attributes(self, attributes: Sequence[str]) -> FuseCustomConfig:
        """Say which attributes of the model the result keeps."""
        self.preserved_attributes = _items("preserved_attributes", attributes, str)
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is set, under the keys that :meth:`from_dict` reads."""
        kept = self.preserved_attributes
        return {"preserved_attributes": kept} if kept else {}

    @classmethod
    def from_dict(
        cls, fuse_custom_config_dict: Mapping[str, Any], policy: DictPolicy | None = None
    ) -> FuseCustomConfig:
        """Read a dict.

        Args:
            fuse_custom_config_dict: may have the key ``preserved_attributes``.
            policy: about unknown keys; by default the class's.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another form.
        """
        policy = cls.dict_policy if policy is None else policy
        return _read_fuse(cls(), fuse_custom_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FuseCustomConfig):
            return NotImplemented
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return _shown("FuseCustomConfig", vars(self))


# -- reading what the user gave -------------------------------------------------------------------


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
    given = _dict_of(value, "PrepareCustomConfig", "prepare", policy, diagnostics)
    return _read_prepare(PrepareCustomConfig(), given, policy, diagnostics)


def as_convert_custom_config(
    value: object, policy: DictPolicy = OWN, diagnostics: Diagnostics | None = None
) -> ConvertCustomConfig:
    """Read fxquant's or torch.ao's ``ConvertCustomConfig``, or its dict form, as fxquant's.

    Arguments, result and errors as for :func:`as_prepare_custom_config`.
    """
    if isinstance(value, ConvertCustomConfig):
        return value
    given = _dict_of(value, "ConvertCustomConfig", "convert", policy, diagnostics)
    return _read_convert(ConvertCustomConfig(), given, policy, diagnostics)


def as_fuse_custom_config(
    value: object, policy: DictPolicy = OWN, diagnostics: Diagnostics | None = None
) -> FuseCustomConfig:
    """Read fxquant's or torch.ao's ``FuseCustomConfig``, or its dict form, as fxquant's.

    Arguments, result and errors as for :func:`as_prepare_custom_config`.
    """
    if isinstance(value, FuseCustomConfig):
        return value
    given = _dict_of(value, "FuseCustomConfig", "fuse", policy, diagnostics)
    return _read_fuse(FuseCustomConfig(), given, policy, diagnostics)


# Attribute of torch.ao's objects -> key of the dict form.
_ATTRIBUTE_KEYS: Final = {
    "PrepareCustomConfig": {
        "standalone_module_names": "standalone_module_name",
        "standalone_module_classes": "standalone_module_class",
        "float_to_observed_mapping": "float_to_observed_custom_module_class",
        "non_traceable_module_names": "non_traceable_module_name",
        "non_traceable_module_classes": "non_traceable_module_class",
        "input_quantized_indexes": "input_quantized_idxs",
        "output_quantized_indexes": "output_quantized_idxs",
        "preserved_attributes": "preserved_attributes",
    },
    "ConvertCustomConfig": {
        "observed_to_quantized_mapping": "observed_to_quantized_custom_module_class",
        "preserved_attributes": "preserved_attributes",
    },
    "FuseCustomConfig": {"preserved_attributes": "preserved_attributes"},
}


def _dict_of(
    value: object, kind: str, step: str, policy: DictPolicy, diagnostics: Diagnostics | None
) -> Mapping[str, Any]:
    """The dict form of nothing, of a dict, or of torch.ao's object of a kind."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        note_legacy_form(f"{step}_custom_config_dict", step, kind, policy, diagnostics)
        return value
    keys = _ATTRIBUTE_KEYS[kind]
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in keys):
        raise ConfigError(f"expected a {kind} or a dict, got {type(value).__name__} {value!r}")
    found = {key: getattr(value, attribute) for attribute, key in keys.items()}
    for key in ("standalone_module_name", "standalone_module_class"):
        if key in found:
            found[key] = [(name, *_fields(entry)) for name, entry in found[key].items()]
    return found


def _fields(entry: Any) -> tuple[Any, ...]:
    """The fields of an entry for a standalone module, fxquant's or torch.ao's."""
    return tuple(getattr(entry, field.name) for field in fields(StandaloneModuleConfigEntry))


_Prepare = TypeVar("_Prepare", bound=PrepareCustomConfig)
_Convert = TypeVar("_Convert", bound=ConvertCustomConfig)
_Fuse = TypeVar("_Fuse", bound=FuseCustomConfig)


def _read_prepare(
    made: _Prepare, given: object, policy: DictPolicy, diagnostics: Diagnostics | None
) -> _Prepare:
    where = "prepare_custom_config_dict"
    entries: Mapping[str, Any] = read_keys(given, _PREPARE_KEYS, where, policy, diagnostics)
    for key, kind, registry in (
        ("standalone_module_name", str, made.standalone_module_names),
        ("standalone_module_class", type, made.standalone_module_classes),
    ):
        for row in _rows(key, entries.get(key, ())):
            registry[_item(key, row[0], kind)] = _entry(row[1:], key, policy, diagnostics)  # type: ignore[index]  # the kinds go together
    key = "float_to_observed_custom_module_class"
    _read_classes(made.float_to_observed_mapping, key, entries.get(key, {}))
    for key, setter in (
        ("non_traceable_module_name", made.set_non_traceable_module_names),
        ("non_traceable_module_class", made.set_non_traceable_module_classes),
        ("input_quantized_idxs", made.set_input_quantized_indexes),
        ("output_quantized_idxs", made.set_output_quantized_indexes),
        ("preserved_attributes", made.set_preserved_attributes),
    ):
        setter(entries.get(key, ()))
    return made


def _read_convert(
    made: _Convert, given: object, policy: DictPolicy, diagnostics: Diagnostics | None
) -> _Convert:
    where = "convert_custom_config_dict"
    entries: Mapping[str, Any] = read_keys(given, _CONVERT_KEYS, where, policy, diagnostics)
    key = "observed_to_quantized_custom_module_class"
    _read_classes(made.observed_to_quantized_mapping, key, entries.get(key, {}))
    made.set_preserved_attributes(entries.get("preserved_attributes", ()))
    return made


def _read_fuse(
    made: _Fuse, given: object, policy: DictPolicy, diagnostics: Diagnostics | None
) -> _Fuse:
    where = "fuse_custom_config_dict"
    entries: Mapping[str, Any] = read_keys(given, _FUSE_KEYS, where, policy, diagnostics)
    made.set_preserved_attributes(entries.get("preserved_attributes", ()))
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


def _map_class(mapping: ClassMapping, before: object, after: object, quant_type: object) -> None:
    if not isinstance(before, type) or not isinstance(after, type):
        raise ConfigError(
            f"a custom module is mapped from class to class, not {before!r}: {after!r}"
        )
    mapping.setdefault(as_quant_type(quant_type), {})[before] = after


def _read_classes(mapping: ClassMapping, key: str, given: object) -> None:
    form = f'{key!r} needs {{"static": {{Class: OtherClass}}}}'
    if not isinstance(given, Mapping):
        raise ConfigError(f"{form}, got {given!r}")
    for name, classes in given.items():
        quant_type = as_quant_type(name)
        if not isinstance(classes, Mapping):
            raise ConfigError(f"{form}, but holds {classes!r}")
        for before, after in classes.items():
            _map_class(mapping, before, after, quant_type)


def _mapping_as_dict(mapping: ClassMapping) -> dict[str, dict[type, type]]:
    return {quant_type.name.lower(): dict(classes) for quant_type, classes in mapping.items()}


_Item = TypeVar("_Item")


def _item(key: str, value: object, kind: type[_Item]) -> _Item:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key!r} holds {value!r}, where {kind.__name__} is wanted")
    return value


def _items(key: str, values: object, kind: type[_Item]) -> list[_Item]:
    if isinstance(values, str) or not isinstance(values, list | tuple | set | frozenset | range):
        raise ConfigError(f"{key!r} needs a list of {kind.__name__}, got {values!r}")
    return [_item(key, value, kind) for value in values]


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


def _shown(name: str, attributes: Mapping[str, Any]) -> str:
    parts = [f"{key}={_short(value)}" for key, value in attributes.items() if value]
    return f"{name}({', '.join(parts)})"


def _short(value: Any) -> str:
    """A value as people would write it: classes by name, example inputs by shape."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, StandaloneModuleConfigEntry):
        mapping = "parent's" if value.qconfig_mapping is None else "its own"
        return f"<{mapping} qconfigs, {_short(value.prepare_custom_config)}>"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_short(k)}: {_short(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return value.name if isinstance(value, Enum) else repr(value)
