"""QConfig mappings as plain data, JSON and YAML, exactly there and back.

::

    global:
      activation: {make: fxquant.observers.HistogramObserver, dtype: torch.uint8}
      weight: {make: fxquant.observers.PerChannelMinMaxObserver, dtype: torch.int8}
    object_type:
      - [class torch.nn.modules.linear.Linear, null]
    module_name:
      - [layer1.0.conv1, null]

Classes, functions and dtypes are written by their qualified names; ``null`` leaves an op in FP32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import fx

from fxquant import observers, range_rules
from fxquant.errors import ConfigError, GraphError
from fxquant.graph_codec import decode_target
from fxquant.observers import PartialFactory
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping

_LEVELS = ("object_type", "module_name_regex", "module_name", "module_name_object_type_order")
_TORCH_VALUES = (torch.dtype, torch.qscheme)


def to_plain(mapping: QConfigMapping) -> dict[str, Any]:
    """``mapping`` as dicts, lists, strings and numbers.

    Raises:
        ConfigError: a factory or object type has no name to write (a lambda, a local class).
    """
    given = mapping.to_dict()
    plain: dict[str, Any] = {"global": qconfig_to_plain(given[""])}
    for level in _LEVELS:
        entries = given.get(level, [])
        if entries:
            plain[level] = [
                [*(_key_to_plain(part) for part in entry[:-1]), qconfig_to_plain(entry[-1])]
                for entry in entries
            ]
    return plain


def from_plain(plain: Mapping[str, Any]) -> QConfigMapping:
    """The mapping that :func:`to_plain` wrote.

    Raises:
        ConfigError: an unknown key, or a name that leads nowhere.
    """
    unknown = sorted(set(plain) - {"global", *_LEVELS})
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]!r} in the mapping; known are global, {', '.join(_LEVELS)}"
        )
    given: dict[str, Any] = {"": qconfig_from_plain(plain.get("global"))}
    for level in _LEVELS:
        given[level] = [
            (*(_key_from_plain(part) for part in entry[:-1]), qconfig_from_plain(entry[-1]))
            for entry in plain.get(level) or []
        ]
    return QConfigMapping.from_dict(given)


def save_qconfig_mapping(mapping: QConfigMapping, path: str | Path) -> None:
    """Write ``mapping`` to a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        ConfigError: another suffix, or something without a name.
    """
    plain = to_plain(mapping)
    text = (
        json.dumps(plain, indent=2) + "\n"
        if _is_json(Path(path))
        else yaml.safe_dump(plain, sort_keys=False)
    )
    Path(path).write_text(text, encoding="utf-8")


def load_qconfig_mapping(path: str | Path) -> QConfigMapping:
    """Read what :func:`save_qconfig_mapping` wrote, or what was written by hand.

    Raises:
        ConfigError: not a mapping, an unknown key, or a name that leads nowhere.
    """
    text = Path(path).read_text(encoding="utf-8")
    plain = json.loads(text) if _is_json(Path(path)) else yaml.safe_load(text)
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{path} holds {type(plain).__name__}, not a mapping of qconfigs")
    return from_plain(plain)


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path.name!r}: a mapping is a .json, .yaml or .yml file")
    return path.suffix == ".json"


def qconfig_to_plain(qconfig: QConfig | None) -> dict[str, Any] | None:
    """A qconfig as plain data; ``None`` stays."""
    if qconfig is None:
        return None
    return {
        "activation": _factory_to_plain(qconfig.activation),
        "weight": _factory_to_plain(qconfig.weight),
    }


def qconfig_from_plain(plain: Mapping[str, Any] | None) -> QConfig | None:
    """The qconfig that :func:`qconfig_to_plain` wrote."""
    if plain is None:
        return None
    if not isinstance(plain, Mapping) or set(plain) != {"activation", "weight"}:
        raise ConfigError(f"a qconfig has the keys activation and weight, got {plain!r}")
    return QConfig(
        activation=_factory_from_plain(plain["activation"]),
        weight=_factory_from_plain(plain["weight"]),
    )


def _factory_to_plain(factory: Any) -> dict[str, Any] | None:
    if factory is None:
        return None
    arguments: Mapping[str, Any] = {}
    target = factory
    if isinstance(factory, PartialFactory):
        if factory.callables:
            raise ConfigError(
                f"{factory!r} has arguments that are computed by calls; they cannot be written"
            )
        target, arguments = factory.target, factory.arguments
    wrapped = getattr(factory, "p", factory)
    if isinstance(wrapped, functools.partial):  # functools.partial, and torch.ao's with_args
        target, arguments = wrapped.func, wrapped.keywords
    return {
        "make": _name_of(target),
        **{name: _value_to_plain(value) for name, value in arguments.items()},
    }


def _factory_from_plain(plain: Mapping[str, Any] | None) -> Any:
    if plain is None:
        return None
    if not isinstance(plain, Mapping) or "make" not in plain:
        raise ConfigError(f"an observer is written as {{make: name, ...}}, got {plain!r}")
    target = _named(str(plain["make"]))
    arguments = {n: _value_from_plain(v) for n, v in plain.items() if n != "make"}
    if isinstance(target, type) and not arguments:
        return target
    return PartialFactory(target, arguments)


def _value_to_plain(value: Any) -> Any:
    if isinstance(value, _TORCH_VALUES):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"rule": type(value).__name__, **fields}
    if isinstance(value, (type, PartialFactory)):
        return _factory_to_plain(value)
    raise ConfigError(f"cannot write the observer argument {value!r} of {type(value).__name__}")


def _value_from_plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        return _named(value)
    if isinstance(value, Mapping) and "rule" in value:
        rule = getattr(range_rules, str(value["rule"]), None)
        if rule is None:
            raise ConfigError(f"there is no range rule {value['rule']!r}")
        return rule(**{name: field for name, field in value.items() if name != "rule"})
    if isinstance(value, Mapping):
        return _factory_from_plain(value)
    return value


def _key_to_plain(key: Any) -> Any:
    if isinstance(key, (str, int)):
        return key
    prefix = "class" if isinstance(key, type) else "function"
    return f"{prefix} {_name_of(key)}"


def _key_from_plain(key: Any) -> Any:
    if isinstance(key, str) and key.startswith(("class ", "function ")):
        return _named(key.partition(" ")[2])
    return key


def qualified_name(target: Callable[..., Any]) -> str:
    """Module and name of a class or function; an observer's module is its package."""
    if not isinstance(target, type):
        return fx.node._get_qualified_name(target)
    module, package = target.__module__, observers.__name__
    inside = module.startswith(f"{package}.")
    return f"{package if inside else module}.{target.__qualname__}"


def _name_of(target: Callable[..., Any]) -> str:
    name = qualified_name(target)
    if _named(name) is not target:
        raise ConfigError(
            f"{target!r} cannot be found again under the name {name!r}; define it at the top level"
            " of a module to write it"
        )
    return name


def _named(name: str) -> Any:
    try:
        return decode_target(f"fn:{name}")
    except (GraphError, AttributeError) as error:
        raise ConfigError(f"cannot find {name!r}, which the mapping names") from error
