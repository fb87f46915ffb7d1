"""What reading a configuration from a dict does about what torch.ao passes over in silence.

A policy is data: the functions that read dicts ask it, and know no mode. fxquant's own front door
reads with :data:`OWN`, ``fxquant.compat`` with :data:`TORCH_AO`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fxquant.errors import (
    ConfigError,
    ConfigWarning,
    Diagnostics,
    LegacyFormWarning,
    UnknownKeyError,
    did_you_mean,
)


class Severity(Enum):
    """What happens about something that deserves a word."""

    NOTHING = "nothing"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class DictPolicy:
    """How strictly dicts are read.

    Attributes:
        unknown_key: about a key that nobody reads.
        legacy_form: about a dict where torch.ao has a class for it by now.
    """

    unknown_key: Severity = Severity.ERROR
    legacy_form: Severity = Severity.NOTHING


OWN: Final = DictPolicy()
"""fxquant's own: an unknown key is an error, a dict is as good as an object."""

TORCH_AO: Final = DictPolicy(unknown_key=Severity.WARNING, legacy_form=Severity.WARNING)
"""``fxquant.compat``: unknown keys are passed over, as torch.ao does, but not in silence; a dict
draws torch.ao's deprecation."""


def read_keys(
    given: object,
    known: Iterable[str],
    where: str,
    policy: DictPolicy = OWN,
    diagnostics: Diagnostics | None = None,
) -> Mapping[str, object]:
    """The entries of a dict configuration whose keys are known.

    Args:
        given: what the user passed.
        known: the keys that somebody reads.
        where: what the dict configures, for messages (``prepare_custom_config``).
        policy: what happens about an unknown key.
        diagnostics: where warnings go; by default to ``warnings``.

    Raises:
        UnknownKeyError: an unknown key, where the policy says so.
        ConfigError: ``given`` is no dict, or has keys that are no strings.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} needs a dict, got {type(given).__name__} {given!r}")
    names = tuple(known)
    for key in given:
        if key in names:
            continue
        hint = did_you_mean(key, names) if isinstance(key, str) else ""
        message = f"{where}: unknown key {key!r}; known are {', '.join(map(repr, names))}{hint}"
        if policy.unknown_key is Severity.ERROR:
            raise UnknownKeyError(message)
        if policy.unknown_key is Severity.WARNING:
            _diagnostics(diagnostics).warn(f"{message} (it is ignored)", ConfigWarning)
    return {str(key): value for key, value in given.items() if key in names}


def note_legacy_form(
    name: str,
    verb: str,
    replacement: str,
    policy: DictPolicy,
    diagnostics: Diagnostics | None = None,
) -> None:
    """Say what torch.ao says of a dict: ``Passing a <name> to <verb> is deprecated ...``.

    Args:
        name: what was passed, such as ``prepare_custom_config_dict``.
        verb: to what, such as ``prepare``.
        replacement: the class to pass instead.
        policy: whether to say it.
        diagnostics: where the warning goes; by default to ``warnings``.

    Raises:
        ConfigError: where the policy makes it an error.
    """
    message = (
        f"Passing a {name} to {verb} is deprecated and will not be supported in a future version."
        f" Please pass in a {replacement} instead."
    )
    if policy.legacy_form is Severity.ERROR:
        raise ConfigError(message)
    if policy.legacy_form is Severity.WARNING:
        _diagnostics(diagnostics).warn(message, LegacyFormWarning)


def _diagnostics(given: Diagnostics | None) -> Diagnostics:
    return Diagnostics() if given is None else given
