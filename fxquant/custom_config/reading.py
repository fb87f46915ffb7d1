"""Reading what the user gave: torch.ao's objects as dicts, and lists of one type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fxquant.custom_config.standalone import fields_of
from fxquant.dict_policy import DictPolicy, note_legacy_form
from fxquant.errors import ConfigError, Diagnostics

_Item = TypeVar("_Item")


def dict_of(
    value: object,
    kind: str,
    step: str,
    keys: Mapping[str, str],
    policy: DictPolicy,
    diagnostics: Diagnostics | None,
) -> Mapping[str, Any]:
    """The dict form of nothing, of a dict, or of torch.ao's object of a kind.

    Args:
        value: what the user gave.
        kind: the class's name.
        step: ``prepare``, ``convert`` or ``fuse``.
        keys: attribute of the class -> key of the dict form.
        policy: how dicts are read.
        diagnostics: where warnings go.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        note_legacy_form(f"{step}_custom_config_dict", step, kind, policy, diagnostics)
        return value
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in keys):
        raise ConfigError(f"expected a {kind} or a dict, got {type(value).__name__} {value!r}")
    found = {key: getattr(value, attribute) for attribute, key in keys.items()}
    for key in ("standalone_module_name", "standalone_module_class"):
        if key in found:
            found[key] = [(name, *fields_of(entry)) for name, entry in found[key].items()]
    return found


def checked_item(key: str, value: object, kind: type[_Item]) -> _Item:
    """``value``, an item of what ``key`` names.

    Raises:
        ConfigError: it is no ``kind``.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key!r} holds {value!r}, where {kind.__name__} is wanted")
    return value


def checked_items(key: str, values: object, kind: type[_Item]) -> list[_Item]:
    """``values`` as a list; a string is none.

    Raises:
        ConfigError: they are no collection, or an item is no ``kind``.
    """
    if isinstance(values, str) or not isinstance(values, list | tuple | set | frozenset | range):
        raise ConfigError(f"{key!r} needs a list of {kind.__name__}, got {values!r}")
    return [checked_item(key, value, kind) for value in values]
