"""What ``fuse_fx`` is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

from fxquant.custom_config.reading import checked_items, dict_of
from fxquant.custom_config.text import shown
from fxquant.dict_policy import OWN, DictPolicy, read_keys
from fxquant.errors import Diagnostics

_KEYS: Final = {"preserved_attributes": "preserved_attributes"}
"""Attribute -> key of the dict form."""


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
        self.preserved_attributes = checked_items("preserved_attributes", attributes, str)
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
        return _read(cls(), fuse_custom_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FuseCustomConfig):
            return NotImplemented
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return shown("FuseCustomConfig", vars(self))


def as_fuse_custom_config(
    value: object, policy: DictPolicy = OWN, diagnostics: Diagnostics | None = None
) -> FuseCustomConfig:
    """Read fxquant's or torch.ao's ``FuseCustomConfig``, or its dict form, as fxquant's.

    Arguments, result and errors as for :func:`as_prepare_custom_config`.
    """
    if isinstance(value, FuseCustomConfig):
        return value
    given = dict_of(value, "FuseCustomConfig", "fuse", _KEYS, policy, diagnostics)
    return _read(FuseCustomConfig(), given, policy, diagnostics)


_Fuse = TypeVar("_Fuse", bound=FuseCustomConfig)


def _read(made: _Fuse, given: object, policy: DictPolicy, diagnostics: Diagnostics | None) -> _Fuse:
    where = "fuse_custom_config_dict"
    entries: Mapping[str, Any] = read_keys(given, tuple(_KEYS.values()), where, policy, diagnostics)
    made.set_preserved_attributes(entries.get("preserved_attributes", ()))
    return made
