"""Budgets, parsed strictly: what a plan may cost, and what is made small under it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fxquant.errors import ConfigError, did_you_mean

_UNITS: Final = {
    "accuracy_drop": {"": 1.0},
    "latency": {"x": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
    "size": {"x": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
}
_LIMIT: Final = re.compile(
    r"^\s*(?P<value>[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*(?P<unit>[a-zA-Z]*)\s*$"
)
_FORM: Final = (
    "a budget is a dict such as {'accuracy_drop': 0.5}, {'latency': '0.8x'}, {'latency': '3 ms'},"
    " {'size': '0.4x'}, {'size': '12 MB'}, or two of them; or the same as text:"
    " 'accuracy_drop <= 0.5, size <= 0.4x'"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a plan may cost; ``None`` does not ask.

    Attributes:
        accuracy_drop: in the unit of the metric (points).
        latency: seconds.
        latency_ratio: of the FP32 model's.
        size: bytes.
        size_ratio: of the FP32 model's.
    """

    accuracy_drop: float | None = None
    latency: float | None = None
    latency_ratio: float | None = None
    size: float | None = None
    size_ratio: float | None = None

    @property
    def objective(self) -> str:
        """What is made small: the first of damage, latency and size that has no limit."""
        if self.accuracy_drop is not None:
            return "size" if "latency" in self.limited else "latency"
        return "damage"

    @property
    def limited(self) -> tuple[str, ...]:
        """Which of damage, latency and size have a limit."""
        limits = {
            "damage": (self.accuracy_drop,),
            "latency": (self.latency, self.latency_ratio),
            "size": (self.size, self.size_ratio),
        }
        return tuple(name for name, found in limits.items() if any(v is not None for v in found))

    def __str__(self) -> str:
        parts = []
        if self.accuracy_drop is not None:
            parts.append(f"accuracy drop <= {self.accuracy_drop:g}")
        if self.latency is not None:
            parts.append(f"latency <= {1e3 * self.latency:.4g} ms")
        if self.latency_ratio is not None:
            parts.append(f"latency <= {self.latency_ratio:g} x FP32")
        if self.size is not None:
            parts.append(f"size <= {self.size:,.0f} bytes")
        if self.size_ratio is not None:
            parts.append(f"size <= {self.size_ratio:g} x FP32")
        return ", ".join(parts)


def parse_budget(given: object) -> Budget:
    """Read a budget.

    Args:
        given: a :class:`Budget`, a dict or a text; see the error for the form.

    Raises:
        ConfigError: it says nothing, something unknown, three things, or a value or unit that makes
            no sense.
    """
    if isinstance(given, Budget):
        return given
    entries = _entries(given)
    unknown = [name for name in entries if name not in _UNITS]
    if unknown:
        raise ConfigError(
            f"a budget has no {unknown[0]!r}{did_you_mean(str(unknown[0]), _UNITS)}; {_FORM}"
        )
    if not 1 <= len(entries) <= 2:
        raise ConfigError(f"a budget limits one or two things, got {len(entries)}; {_FORM}")
    found: dict[str, float] = {}
    for name, value in entries.items():
        number, unit = _number(name, value)
        if unit == "x":
            found[f"{name}_ratio"] = number
        else:
            found[name] = number * _UNITS[name][unit]
    return Budget(**found)


def _entries(given: object) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str):
        raise ConfigError(f"{_FORM}; got {given!r}")
    found: dict[str, str] = {}
    for part in given.split(","):
        name, sign, value = part.partition("<=")
        name = name.strip()
        if not sign or not name:
            raise ConfigError(f"{part.strip()!r} is no limit; {_FORM}")
        if name in found:
            raise ConfigError(f"the budget limits {name!r} twice")
        found[name] = value
    return found


def _number(name: str, value: object) -> tuple[float, str]:
    """The number and the unit of a limit."""
    units = _UNITS[name]
    unit = ""
    if isinstance(value, str):
        match = _LIMIT.match(value)
        if match is None:
            raise ConfigError(f"{name} <= {value.strip()!r}: that is no number; {_FORM}")
        number, unit = float(match["value"]), match["unit"]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ConfigError(f"{name} is a number or text, got {value!r}; {_FORM}")
    if unit not in units:
        known = ", ".join(u for u in units if u) or "none"
        said = f"the unit {unit!r}" if unit else "no unit"
        raise ConfigError(
            f"{name} <= {str(value).strip()!r} has {said}; units are {known} (x is the share of the"
            " FP32 model)"
        )
    if not math.isfinite(number) or number < 0 or (number == 0 and name != "accuracy_drop"):
        raise ConfigError(f"{name} <= {value!r}: it is to be finite and above 0")
    return number, unit
