"""From decisions to a mapping, without the model: what a report keeps of the network for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.config_file import (
    from_plain,
    qconfig_from_plain,
    qconfig_to_plain,
    qualified_name,
    to_plain,
)
from fxquant.errors import ConfigError
from fxquant.observers import PartialFactory
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.sensitivity.cures import CURE_BY_NAME
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.network import FP32, INT8, Assignment, CalibratedNetwork, Rule
from fxquant.sensitivity.policy import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What a mapping is made of.

    Attributes:
        base: everything lowered.
        precision: that ``base`` stands for.
        members: group -> the layers in it.
        feeders: layer -> the layers whose results it reads.
        rules: layer -> for each of its ops the rule that names it, and precision -> qconfig.
    """

    base: QConfigMapping
    precision: str
    members: Mapping[str, tuple[str, ...]]
    feeders: Mapping[str, tuple[str, ...]]
    rules: Mapping[str, Sequence[tuple[Rule, Mapping[str, QConfig | None]]]]

    @staticmethod
    def of(network: CalibratedNetwork, groups: Iterable[Layer], precision: str) -> Configuration:
        """What is to be kept of a network."""
        known = [FP32, precision, *(name for name in CURE_BY_NAME if name in network.precisions)]
        rules = {}
        for layer in network.layers:
            by_precision = {name: network.rules(layer.name, name) for name in dict.fromkeys(known)}
            found = [rule for rule, _ in by_precision[FP32]]
            rules[layer.name] = [
                (rule, {name: pairs[i][1] for name, pairs in by_precision.items()})
                for i, rule in enumerate(found)
            ]
        return Configuration(
            base=network.mapping(Assignment(rest=precision)),
            precision=precision,
            members={group.name: group.members or (group.name,) for group in groups},
            feeders={layer.name: network.feeders(layer.name) for layer in network.layers},
            rules=rules,
        )

    def assignment(self, decisions: Mapping[str, Decision]) -> Assignment:
        """Decisions about groups as precisions of layers.

        A cure of activations is set on the layers that feed the fragile one, too, unless they are
        kept in FP32 or have a cure of their own.
        """
        layers: dict[str, str] = {}
        cured = {name: d.cure for name, d in decisions.items() if d.cure}
        for name, cure in cured.items():
            layers.update(dict.fromkeys(self.members[name], cure))
        for name, cure in cured.items():
            if CURE_BY_NAME[cure].changes_activations:
                for member in self.members[name]:
                    for feeder in self.feeders[member]:
                        layers.setdefault(feeder, cure)
        for name, decision in decisions.items():
            if decision.precision == FP32:
                layers.update(dict.fromkeys(self.members[name], FP32))
        return Assignment(layers, self.precision)

    def mapping(self, decisions: Mapping[str, Decision]) -> QConfigMapping:
        """The mapping for :func:`fxquant.prepare_fx`."""
        mapping = QConfigMapping.from_dict(self.base.to_dict())
        mapping._default_object_types = self.base.default_object_types
        for name, precision in self.assignment(decisions).layers.items():
            for rule, qconfigs in self.rules[name]:
                rule.set_on(mapping, qconfigs[precision])
        return mapping

    def to_plain(self) -> dict[str, Any] | None:
        """As JSON data; ``None`` where an observer has no name to be written by."""
        try:
            base = to_plain(self.base)
            rules = {name: [_plain_rule(*pair) for pair in r] for name, r in self.rules.items()}
        except ConfigError:
            return None
        defaults = QConfigMapping()
        for kind in self.base.default_object_types:
            defaults.set_object_type(kind, None)
        return {
            "base": base,
            "default_types": to_plain(defaults),
            "precision": self.precision,
            "members": {name: list(value) for name, value in self.members.items()},
            "feeders": {name: list(value) for name, value in self.feeders.items()},
            "rules": rules,
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any] | None) -> Configuration:
        """What :meth:`to_plain` wrote; one that makes no mapping where that was ``None``."""
        if plain is None:
            return _Unwritten(
                base=QConfigMapping(), precision=INT8, members={}, feeders={}, rules={}
            )
        base = from_plain(plain["base"])
        defaults = from_plain(plain["default_types"])
        base._default_object_types = frozenset(defaults.object_type_qconfigs)
        return Configuration(
            base=base,
            precision=plain["precision"],
            members={name: tuple(value) for name, value in plain["members"].items()},
            feeders={name: tuple(value) for name, value in plain["feeders"].items()},
            rules={n: [_rule_from(pair) for pair in r] for n, r in plain["rules"].items()},
        )

    def code(self, mapping: QConfigMapping) -> str:
        """Python source of ``mapping`` as a dict called ``qconfig_dict``."""
        return _Writer().source(mapping)


class _Unwritten(Configuration):
    """Of a report whose observers had no names to be written by."""

    def mapping(self, decisions: Mapping[str, Decision]) -> QConfigMapping:
        """Never.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "the report was read from a file that holds no qconfigs: an observer of the mapping was"
            " a lambda or a local class. Define it at the top level of a module, and write again"
        )


def _plain_rule(rule: Rule, qconfigs: Mapping[str, QConfig | None]) -> dict[str, Any]:
    holder = QConfigMapping()
    rule.set_on(holder, None)
    return {
        "rule": to_plain(holder),
        "qconfigs": {name: qconfig_to_plain(qconfig) for name, qconfig in qconfigs.items()},
    }


def _rule_from(plain: Mapping[str, Any]) -> tuple[Rule, dict[str, QConfig | None]]:
    holder = from_plain(plain["rule"])
    if holder.module_name_qconfigs:
        rule = Rule(next(iter(holder.module_name_qconfigs)))
    else:
        rule = Rule(*next(iter(holder.module_name_object_type_order_qconfigs)))
    return rule, {name: qconfig_from_plain(q) for name, q in plain["qconfigs"].items()}


class _Writer:
    """Writes a mapping as Python source."""

    def __init__(self) -> None:
        self.imports: dict[str, None] = {"import torch": None}
        self.names: dict[QConfig, str] = {}
        self.lines: list[str] = []

    def source(self, mapping: QConfigMapping) -> str:
        """Imports, one variable for each qconfig, and the dict."""
        entries = []
        for level, value in mapping.to_dict().items():
            if level == "":
                entries.append(f'    "": {self._qconfig(value)},')
            elif value:
                rows = [
                    f"        ({', '.join([*map(self._key, row[:-1]), self._qconfig(row[-1])])}),"
                    for row in value
                ]
                entries += [f'    "{level}": [', *rows, "    ],"]
        body = ["qconfig_dict = {", *entries, "}"]
        return "\n".join([*sorted(self.imports), "", *self.lines, "", *body, ""])

    def _qconfig(self, qconfig: QConfig | None) -> str:
        if qconfig is None:
            return "None"
        if qconfig not in self.names:
            self.imports["from fxquant import QConfig"] = None
            name = f"qconfig_{len(self.names) + 1}"
            self.names[qconfig] = name
            self.lines += [
                f"{name} = QConfig(",
                f"    activation={self._factory(qconfig.activation)},",
                f"    weight={self._factory(qconfig.weight)},",
                ")",
            ]
        return self.names[qconfig]

    def _factory(self, factory: Any) -> str:
        if factory is None:
            return "None"
        if isinstance(factory, PartialFactory) and not factory.callables:
            arguments = [f"{n}={self._value(v)}" for n, v in factory.arguments.items()]
            return f"{self._key(factory.target)}.with_args({', '.join(arguments)})"
        if isinstance(factory, type):
            return self._key(factory)
        raise ConfigError(
            f"{factory!r} cannot be written as code; use a class, or SomeObserver.with_args(...)"
        )

    def _value(self, value: Any) -> str:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            given = [f"{f.name}={getattr(value, f.name)!r}" for f in dataclasses.fields(value)]
            return f"{self._key(type(value))}({', '.join(given)})"
        if isinstance(value, (type, PartialFactory)):
            return self._factory(value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.qscheme)):
            return repr(value) if not isinstance(value, torch.qscheme) else str(value)
        raise ConfigError(f"the observer argument {value!r} cannot be written as code")

    def _key(self, key: Any) -> str:
        if isinstance(key, (str, int)):
            return repr(key)
        name = qualified_name(key)
        module, _, last = name.rpartition(".")
        if module.startswith("fxquant."):
            self.imports[f"from {module} import {last}"] = None
            return last
        self.imports[f"import {module}"] = None
        return name
