"""``QConfigMapping``: which qconfig governs which op.

Five levels, from weak to strong; at each, an explicit ``None`` means "leave it in floating point"
and wins over the weaker ones like any other value:

==============================  ==================================================================
level                           matches
==============================  ==================================================================
global                          everything
object type                     the exact class of a module, a function, or a method's name; for a
                                function or method also the class of the module it is called in,
                                which is the stronger of the two
module-name regex               ``re.match`` on the path, first match in insertion order
module name                     the module itself or its nearest configured ancestor
module name, type and order     the n-th op of a type called directly in a module
==============================  ==================================================================

Anything that takes a mapping also takes two kinds of dict:

* a *legacy* dict, whose keys are ``""``, ``"object_type"``, ``"module_name_regex"``,
  ``"module_name"`` and ``"module_name_object_type_order"``, the last four with lists of tuples;
* a *flat* dict, whose keys are ``""`` for all, module paths, and types or functions:
  ``{"": qconfig, "layer1.0.conv1": None, torch.nn.Linear: qconfig}``.

A dict is legacy when it holds one of the four level names, or a list as a value; else it is flat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.dict_policy import OWN, DictPolicy, read_keys
from fxquant.errors import ConfigError, Diagnostics, UnknownKeyError, did_you_mean
from fxquant.fake_quantize import (
    FixedQParamsFakeQuantize,
    default_weight_fake_quant,
)
from fxquant.observers import (
    PartialFactory,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_placeholder_observer,
    default_weight_observer,
)
from fxquant.qconfig import (
    QConfig,
    as_qconfig,
    backend_defaults,
    default_quint8_weight_qconfig,
    default_reuse_input_qconfig,
)

#: A module class, a function, or the name of a tensor method.
ObjectType = Callable[..., Any] | str

_LEVELS: Final = (
    "object_type",
    "module_name_regex",
    "module_name",
    "module_name_object_type_order",
)


class QConfigMapping:
    """Which qconfig governs which op; see the module's table of levels.

    ::

        QConfigMapping().set_global(qconfig).set_object_type(torch.nn.Linear, None)

    Attributes:
        global_qconfig: for what no other rule names.
        object_type_qconfigs: type -> qconfig.
        module_name_regex_qconfigs: regex -> qconfig, in insertion order.
        module_name_qconfigs: path -> qconfig.
        module_name_object_type_order_qconfigs: ``(path, type, index)`` -> qconfig.
        is_default: made by :func:`get_default_qconfig_mapping`; its object-type rules name what
            a model may have, so one that matches nothing deserves no warning.
        from_torch_ao: made from a mapping of torch.ao, where names that match nothing are common;
            they draw a warning, not an error.
    """

    dict_policy: ClassVar[DictPolicy] = OWN
    """How :meth:`from_dict` reads, unless told otherwise."""

    def __init__(self) -> None:
        self.global_qconfig: QConfig | None = None
        self.object_type_qconfigs: dict[ObjectType, QConfig | None] = {}
        self.module_name_regex_qconfigs: dict[str, QConfig | None] = {}
        self.module_name_qconfigs: dict[str, QConfig | None] = {}
        self.module_name_object_type_order_qconfigs: dict[
            tuple[str, ObjectType, int], QConfig | None
        ] = {}
        self.is_default = False
        self.from_torch_ao = False
        self._default_object_types: frozenset[ObjectType] = frozenset()

    def set_global(self, global_qconfig: object) -> QConfigMapping:
        """Set what governs everything that no other rule names.

        Raises:
            ConfigError: not a qconfig.
        """
        self.global_qconfig = as_qconfig(global_qconfig, "the global rule")
        return self

    def set_object_type(self, object_type: ObjectType, qconfig: object) -> QConfigMapping:
        """Set the qconfig of a module class, a function, or a method name.

        Raises:
            ConfigError: not such a type, or not a qconfig.
        """
        if not (isinstance(object_type, str) or callable(object_type)):
            raise ConfigError(
                "object_type needs a module class, a function or a method name, "
                f"got {object_type!r}"
            )
        if isinstance(object_type, nn.Module):
            raise ConfigError(
                f"object_type needs a class, got an instance of {type(object_type).__name__}"
            )
        where = f"object_type {_type_name(object_type)}"
        self.object_type_qconfigs[object_type] = as_qconfig(qconfig, where)
        self._default_object_types -= {object_type}
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: object) -> QConfigMapping:
        """Set the qconfig of modules whose path starts with a match of a regular expression.

        Raises:
            ConfigError: not a regular expression, or not a qconfig.
        """
        _compile(module_name_regex)
        where = f"module_name_regex {module_name_regex!r}"
        self.module_name_regex_qconfigs[module_name_regex] = as_qconfig(qconfig, where)
        return self

    def set_module_name(self, module_name: str, qconfig: object) -> QConfigMapping:
        """Set the qconfig of a module and everything in it.

        Raises:
            ConfigError: not a path, or not a qconfig.
        """
        if not isinstance(module_name, str):
            raise ConfigError(f"module_name needs a path such as 'layer1.0', got {module_name!r}")
        where = f"module_name {module_name!r}"
        self.module_name_qconfigs[module_name] = as_qconfig(qconfig, where)
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: object
    ) -> QConfigMapping:
        """Set the qconfig of the ``index``-th op of a type called directly in a module.

        Args:
            module_name: path of the module; ``""`` is the model itself.
            object_type: a module class, a function, or a method name.
            index: counted from 0, in the order of the graph.
            qconfig: the qconfig, or ``None``.

        Raises:
            ConfigError: an argument of another type.
        """
        well_formed = (
            isinstance(module_name, str)
            and (isinstance(object_type, str) or callable(object_type))
            and isinstance(index, int)
            and index >= 0
        )
        if not well_formed:
            raise ConfigError(
                "module_name_object_type_order needs (path, type, index from 0), "
                f"got ({module_name!r}, {object_type!r}, {index!r})"
            )
        key = (module_name, object_type, index)
        where = f"module_name_object_type_order {_order_name(key)}"
        self.module_name_object_type_order_qconfigs[key] = as_qconfig(qconfig, where)
        return self

    @property
    def default_object_types(self) -> frozenset[ObjectType]:
        """The object types that only the defaults set, not the user."""
        return self._default_object_types

    def to_dict(self) -> dict[str, Any]:
        """The mapping as a legacy dict, which :meth:`from_dict` reads back."""
        return {
            "": self.global_qconfig,
            "object_type": list(self.object_type_qconfigs.items()),
            "module_name_regex": list(self.module_name_regex_qconfigs.items()),
            "module_name": list(self.module_name_qconfigs.items()),
            "module_name_object_type_order": [
                (*key, qconfig)
                for key, qconfig in self.module_name_object_type_order_qconfigs.items()
            ],
        }

    @classmethod
    def from_dict(
        cls,
        qconfig_dict: Mapping[str, Any],
        policy: DictPolicy | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> QConfigMapping:
        """Read a legacy dict.

        Args:
            qconfig_dict: any of the keys ``""`` (a qconfig), ``object_type``,
                ``module_name_regex``, ``module_name`` (lists of ``(key, qconfig)``) and
                ``module_name_object_type_order`` (a list of ``(path, type, index, qconfig)``).
            policy: about unknown keys; by default the class's.
            diagnostics: where warnings go; by default to ``warnings``.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another form.
        """
        policy = cls.dict_policy if policy is None else policy
        mapping = cls()
        known = ("", *_LEVELS)
        given: Mapping[str, Any] = read_keys(
            qconfig_dict, known, "qconfig dict", policy, diagnostics
        )
        if "" in given:
            mapping.set_global(given[""])
        setters: dict[str, tuple[int, Callable[..., object]]] = {
            "object_type": (2, mapping.set_object_type),
            "module_name_regex": (2, mapping.set_module_name_regex),
            "module_name": (2, mapping.set_module_name),
            "module_name_object_type_order": (4, mapping.set_module_name_object_type_order),
        }
        for level, (length, setter) in setters.items():
            for entry in _entries(level, given.get(level, []), length):
                setter(*entry)
        return mapping

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QConfigMapping):
            return NotImplemented
        regexes = list(self.module_name_regex_qconfigs.items())  # their order decides
        return (
            self.global_qconfig == other.global_qconfig
            and self.object_type_qconfigs == other.object_type_qconfigs
            and regexes == list(other.module_name_regex_qconfigs.items())
            and self.module_name_qconfigs == other.module_name_qconfigs
            and self.module_name_object_type_order_qconfigs
            == other.module_name_object_type_order_qconfigs
        )

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        lines = [f"QConfigMapping (\n  global: {self.global_qconfig!r}"]
        sections: tuple[tuple[str, dict[str, QConfig | None]], ...] = (
            ("object_type", {_type_name(k): v for k, v in self.object_type_qconfigs.items()}),
            ("module_name_regex", _quoted(self.module_name_regex_qconfigs)),
            ("module_name", _quoted(self.module_name_qconfigs)),
            (
                "module_name_object_type_order",
                {_order_name(k): v for k, v in self.module_name_object_type_order_qconfigs.items()},
            ),
        )
        for title, rules in sections:
            if rules:
                lines.append(f"  {title}:")
                lines.extend(f"    {name}: {qconfig!r}" for name, qconfig in rules.items())
        return "\n".join([*lines, ")"])


def _quoted(rules: Mapping[str, QConfig | None]) -> dict[str, QConfig | None]:
    return {repr(name): qconfig for name, qconfig in rules.items()}


def _type_name(object_type: object) -> str:
    """How people write it: ``torch.nn.Linear``, ``torch.sigmoid``, ``'sigmoid'`` for a method."""
    if isinstance(object_type, str):
        return repr(object_type)
    name = getattr(object_type, "__name__", None)
    if name is None:
        return repr(object_type)
    for module in (nn, F, torch):
        if getattr(module, name, None) is object_type:
            return f"{module.__name__}.{name}"
    module_name = str(getattr(object_type, "__module__", None) or "").lstrip("_")
    qualified = getattr(object_type, "__qualname__", name)
    return f"{module_name}.{qualified}" if module_name else str(qualified)


def _order_name(key: tuple[str, ObjectType, int]) -> str:
    return f"({key[0]!r}, {_type_name(key[1])}, {key[2]})"


def _compile(pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ConfigError(f"module_name_regex needs a regular expression, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"module_name_regex {pattern!r} is no regular expression: {error}") from (
            error
        )


def _entries(level: str, entries: object, length: int) -> list[tuple[Any, ...]]:
    form = "(path, type, index, qconfig)" if length == 4 else "(key, qconfig)"
    if isinstance(entries, Mapping) and length == 2:
        return list(entries.items())
    if not isinstance(entries, list | tuple) or _is_qconfig(entries):
        raise ConfigError(f"{level!r} needs a list of {form}, got {entries!r}")
    for entry in entries:
        # A QConfig is a tuple too, but never an entry.
        if (
            not isinstance(entry, list | tuple)
            or len(entry) != length
            or isinstance(entry, QConfig)
        ):
            raise ConfigError(f"{level!r} needs a list of {form}, but holds {entry!r}")
    return [tuple(entry) for entry in entries]


def _unknown_key(key: object) -> str:
    known = ", ".join(repr(k) for k in ("", *_LEVELS))
    hint = did_you_mean(key, _LEVELS) if isinstance(key, str) else ""
    return f"qconfig dict: unknown key {key!r}; known are {known}{hint}"


def normalize(arg: object) -> QConfigMapping:
    """Any way to say which qconfig governs what, as a :class:`QConfigMapping`.

    Args:
        arg: a mapping of fxquant or torch.ao, a legacy dict, a flat dict (see the module's text),
            a single ``QConfig`` for everything, or ``None`` for nothing.

    Returns:
        ``arg`` itself if it is fxquant's, else a new mapping.

    Raises:
        UnknownKeyError: a legacy dict with a key that nobody reads.
        ConfigError: anything else that cannot be read, naming key and value.
    """
    if isinstance(arg, QConfigMapping):
        return arg
    if arg is None:
        return QConfigMapping()
    if isinstance(arg, Mapping):
        return _mark_defaults(_from_legacy_or_flat(arg))
    if hasattr(arg, "global_qconfig") and hasattr(arg, "to_dict"):
        mapping = _mark_defaults(QConfigMapping.from_dict(arg.to_dict()))
        mapping.from_torch_ao = True
        return mapping
    if hasattr(arg, "activation") and hasattr(arg, "weight"):
        return QConfigMapping().set_global(arg)
    raise ConfigError(
        "qconfig_mapping needs a QConfigMapping, a dict or a QConfig, got "
        f"{type(arg).__name__} {arg!r}"
    )


def _from_legacy_or_flat(given: Mapping[Any, Any]) -> QConfigMapping:
    if any(key in given for key in _LEVELS):
        return QConfigMapping.from_dict(given)
    mapping = QConfigMapping()
    for key, value in given.items():
        if isinstance(key, str) and isinstance(value, list | tuple) and not _is_qconfig(value):
            # Only a legacy dict holds lists: a level name is misspelt.
            raise UnknownKeyError(_unknown_key(key))
        if key == "":
            mapping.set_global(value)
        elif isinstance(key, str):
            mapping.set_module_name(key, value)
        elif callable(key) and not isinstance(key, nn.Module):
            mapping.set_object_type(key, value)
        else:
            raise ConfigError(
                f"qconfig dict: key {key!r} is no module path, type or function (value {value!r})"
            )
    return mapping


def _is_qconfig(value: object) -> bool:
    return hasattr(value, "activation") and hasattr(value, "weight")


def _mark_defaults(mapping: QConfigMapping) -> QConfigMapping:
    """Recognise the default mapping in a foreign one, or in a dict, by the types it names."""
    given = frozenset(mapping.object_type_qconfigs)
    if given >= _TORCH_DEFAULT_TYPES:
        mapping.is_default = True
        mapping._default_object_types = given & _TORCH_DEFAULT_TYPES
    return mapping


def with_default_types(mapping: QConfigMapping) -> QConfigMapping:
    """``mapping``, whose object types no user wrote: those that match nothing are not reported."""
    mapping._default_object_types = frozenset(mapping.object_type_qconfigs)
    return mapping


@dataclass(frozen=True, slots=True)
class Resolution:
    """Which qconfig governs an op, and why.

    Attributes:
        qconfig: the winner's; ``None`` leaves the op in floating point.
        rule: the winner in words, e.g. ``module_name 'layer1'``, or ``no rule``.
        matched_keys: ``(level, key)`` of every rule that matches the op, the winner last.
    """

    qconfig: QConfig | None
    rule: str
    matched_keys: tuple[tuple[str, object], ...]


def resolve(
    mapping: QConfigMapping,
    *,
    module_path: str,
    target_types: tuple[object, ...] = (),
    scope_types: tuple[object, ...] = (),
    order_index: tuple[tuple[str, object, int], ...] = (),
) -> Resolution:
    """Find the qconfig of one op; a pure function of its arguments.

    Args:
        mapping: the rules.
        module_path: path of the module, or for a function or method of the module it is called
            in; ``""`` is the model itself.
        target_types: the class of the module, the function, or the method's name; more than one
            where an op has several names, the strongest first.
        scope_types: for functions and methods, the class of the module they are called in.
        order_index: ``(path, type, index)`` of the op in its scope, under each of its types.

    Returns:
        The winner, and every rule that matched.
    """
    matches: list[tuple[str, object, QConfig | None]] = []
    if mapping.global_qconfig is not None:
        matches.append(("global", "", mapping.global_qconfig))
    by_type = mapping.object_type_qconfigs
    for object_type in (*reversed(target_types), *reversed(scope_types)):
        if _is_hashable(object_type) and object_type in by_type:
            matches.append(("object_type", object_type, by_type[object_type]))
    regexes = [
        ("module_name_regex", pattern, qconfig)
        for pattern, qconfig in mapping.module_name_regex_qconfigs.items()
        if re.match(pattern, module_path)
    ]
    matches.extend(reversed(regexes))
    for name in _ancestors(module_path):
        if name in mapping.module_name_qconfigs:
            matches.append(("module_name", name, mapping.module_name_qconfigs[name]))
    by_order = mapping.module_name_object_type_order_qconfigs
    for key in reversed(order_index):
        if _is_hashable(key) and key in by_order:
            level = "module_name_object_type_order"
            matches.append((level, key, by_order[key]))
    if not matches:
        return Resolution(None, "no rule", ())
    level, key_of_winner, qconfig = matches[-1]
    keys = tuple((level, key) for level, key, _ in matches)
    return Resolution(qconfig, rule_text(level, key_of_winner), keys)


def rule_text(level: str, key: object) -> str:
    """A rule in words: ``global``, ``object_type torch.nn.Linear``, ``module_name 'layer1'``."""
    if level == "global":
        return "global"
    if level == "object_type":
        return f"object_type {_type_name(key)}"
    if level == "module_name_object_type_order" and isinstance(key, tuple):
        return f"{level} {_order_name(key)}"
    return f"{level} {key!r}"


def _ancestors(path: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``: the nearest last."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


_ZERO_TO_ONE: Final[tuple[ObjectType, ...]] = (
    nn.Hardsigmoid,
    F.hardsigmoid,
    "hardsigmoid",
    "hardsigmoid_",
    nn.Sigmoid,
    torch.sigmoid,
    F.sigmoid,
    "sigmoid",
    "sigmoid_",
    nn.Softmax,
    F.softmax,
    torch.softmax,
    "softmax",
)
_MINUS_ONE_TO_ONE: Final[tuple[ObjectType, ...]] = (nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_")
_CONV_TRANSPOSE: Final[tuple[ObjectType, ...]] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_LAYER_NORM: Final[tuple[ObjectType, ...]] = (nn.LayerNorm, F.layer_norm)
# Of these, torch.ao's default mapping does not know the following forms.
_OURS_ALONE: Final[tuple[ObjectType, ...]] = (
    F.sigmoid,
    F.tanh,
    F.softmax,
    torch.softmax,
    "softmax",
)
_TORCH_DEFAULT_TYPES: Final[frozenset[ObjectType]] = frozenset(
    ("reshape", nn.PReLU, *_CONV_TRANSPOSE, *_LAYER_NORM, *_ZERO_TO_ONE, *_MINUS_ONE_TO_ONE)
).difference(_OURS_ALONE)


def _default_mapping(general: QConfig, per_tensor_weight: Any, fixed: bool) -> QConfigMapping:
    """The defaults common to PTQ and QAT.

    Args:
        general: for everything without a rule of its own.
        per_tensor_weight: for what has no per-channel kernel.
        fixed: whether fixed-qparams ops get fake quantizers instead of observers.
    """

    def fixed_qconfig(observer: PartialFactory) -> QConfig:
        if fixed:
            return QConfig(FixedQParamsFakeQuantize.with_args(observer=observer), per_tensor_weight)
        return QConfig(observer, per_tensor_weight)

    mapping = QConfigMapping().set_global(general)
    mapping.set_object_type("reshape", default_reuse_input_qconfig)
    # No engine runs a transposed convolution with per-channel weights.
    for target in _CONV_TRANSPOSE:
        mapping.set_object_type(target, QConfig(general.activation, per_tensor_weight))
    # The weight of a normalization stays in floating point.
    for target in _LAYER_NORM:
        norm = QConfig(general.activation, default_placeholder_observer)
        mapping.set_object_type(target, norm)
    mapping.set_object_type(nn.PReLU, default_quint8_weight_qconfig)
    for target in _ZERO_TO_ONE:
        mapping.set_object_type(target, fixed_qconfig(default_fixed_qparams_range_0to1_observer))
    for target in _MINUS_ONE_TO_ONE:
        mapping.set_object_type(target, fixed_qconfig(default_fixed_qparams_range_neg1to1_observer))
    mapping.is_default = True
    mapping._default_object_types = frozenset(mapping.object_type_qconfigs)
    return mapping


def get_default_qconfig_mapping(backend: str = "x86") -> QConfigMapping:
    """The default mapping for post-training quantization.

    Args:
        backend: ``x86``, ``x86-compat``, ``fbgemm``, ``onednn`` or ``qnnpack``.

    Raises:
        ConfigError: another one (also an ``AssertionError``).
    """
    return _default_mapping(backend_defaults(backend).ptq, default_weight_observer, fixed=False)


def get_default_qat_qconfig_mapping(backend: str = "x86") -> QConfigMapping:
    """The default mapping for quantization-aware training.

    Args:
        backend: ``x86``, ``x86-compat``, ``fbgemm``, ``onednn`` or ``qnnpack``.

    Raises:
        ConfigError: another one (also an ``AssertionError``).
    """
    return _default_mapping(backend_defaults(backend).qat, default_weight_fake_quant, fixed=True)
