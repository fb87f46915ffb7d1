"""Custom configs as people would write them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from fxquant.custom_config.standalone import StandaloneModuleConfigEntry


def shown(name: str, attributes: Mapping[str, Any]) -> str:
    """A config as a call of its class, with the attributes that are set."""
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
