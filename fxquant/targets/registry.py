"""Targets by name."""

from __future__ import annotations

from fxquant.errors import ConfigError, did_you_mean
from fxquant.targets.compat import X86_COMPAT
from fxquant.targets.reference import REFERENCE
from fxquant.targets.table import Target
from fxquant.targets.x86 import X86

TARGETS: dict[str, Target] = {target.name: target for target in (X86, X86_COMPAT, REFERENCE)}


def target_named(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ConfigError: there is none.
    """
    found = TARGETS.get(name)
    if found is None:
        raise ConfigError(
            f"target {name!r} is not supported; known are {', '.join(sorted(TARGETS))}"
            + did_you_mean(name, TARGETS)
        )
    return found
