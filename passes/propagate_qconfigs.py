"""propagate-qconfigs: which qconfig governs each op, and which rule of the mapping won."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxquant.attention import written_as
from fxquant.errors import ConfigWarning, UnmatchedRuleError, did_you_mean
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.op_catalog import KIND_BY_METHOD
from fxquant.op_view import OUT_OF_PLACE_OPERATORS, type_name, type_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.qconfig_mapping import QConfigMapping, resolve

_OPS = ("call_module", "call_function", "call_method")


DEFAULT = "(default)"
"""Ends a rule that the default mapping brings along and no user wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An op as rules see it.

    Attributes:
        keywords: of :func:`fxquant.qconfig_mapping.resolve`.
        scope: path of the module that makes the call.
        type_name: short name of its type.
    """

    keywords: Mapping[str, Any]
    scope: str
    type_name: str


def subjects_of(gm: QuantGraphModule) -> Iterator[Subject]:
    """The ops of a graph as rules see them."""
    for node in gm.graph.nodes:
        if node.op in _OPS:
            scope, name = record_of(node).scope, type_name(gm, node)
            yield Subject(keywords=subject(gm, node), scope=scope, type_name=name)


@dataclass(frozen=True)
class PropagateQConfigs(Pass):
    """Record for every op the qconfig that the mapping gives it, and the rule.

    Attributes:
        mapping: what the user asked for.
        known_paths: every module path of the user's model, for rules that match nothing.
        elsewhere: ops in other graphs of the same model, which rules may match instead.

    Raises:
        UnmatchedRuleError: a module-name, regex or call-order rule names nothing in the model.
    """

    mapping: QConfigMapping
    known_paths: tuple[str, ...] = field(default=())
    elsewhere: tuple[Subject, ...] = ()

    name: ClassVar[str] = "propagate-qconfigs"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.QCONFIGS})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Resolve every op; rules that match nothing are errors, types that match nothing warn."""
        changes = 0
        matched: set[Any] = set()
        seen: set[str] = set(self.known_paths)
        for node in gm.graph.nodes:
            if node.op not in _OPS:
                continue
            record = record_of(node)
            seen.add(record.scope)
            found = subject(gm, node)
            resolution = resolve(self.mapping, **found)
            matched.update(resolution.matched_keys)
            rule = resolution.rule
            if rule.startswith("object_type") and self._is_default(found["target_types"]):
                rule = f"{rule} {DEFAULT}"
            if record.qconfig != resolution.qconfig or record.rule != rule:
                update_record(node, qconfig=resolution.qconfig, rule=rule)
                changes += 1
        for other in self.elsewhere:
            matched.update(resolve(self.mapping, **other.keywords).matched_keys)
            seen.add(other.scope)
        names = {type_name(gm, n) for n in gm.graph.nodes if n.op in _OPS}
        names |= {other.type_name for other in self.elsewhere}
        self._report_unmatched(matched, seen, names, context)
        return PassResult(changes=changes)

    def _is_default(self, kinds: tuple[object, ...]) -> bool:
        return any(kind in self.mapping.default_object_types for kind in kinds)

    def _report_unmatched(
        self, matched: set[Any], paths: set[str], names: set[str], context: PassContext
    ) -> None:
        mapping = self.mapping
        problems = []
        for name in mapping.module_name_qconfigs:
            if ("module_name", name) not in matched and name not in paths:
                problems.append(
                    f"module_name rule {name!r} matches no module of the model"
                    + (did_you_mean(name, paths) or _method_hint(name))
                )
            elif ("module_name", name) not in matched:
                context.diagnostics.warn(
                    f"module_name rule {name!r} governs no op: the model does not call that module,"
                    " or only from code that cannot be traced, or calls it under another of its"
                    " names. Remove the rule, or name the module that is called",
                    ConfigWarning,
                )
        for pattern in mapping.module_name_regex_qconfigs:
            if ("module_name_regex", pattern) not in matched:
                problems.append(
                    f"module_name_regex rule {pattern!r} matches no module of the model (it is"
                    " matched from the start of the path, as re.match does)"
                )
        for key in mapping.module_name_object_type_order_qconfigs:
            if ("module_name_object_type_order", key) not in matched:
                scope, kind, index = key
                problems.append(
                    f"module_name_object_type_order rule ({scope!r},"
                    f" {getattr(kind, '__name__', kind)}, {index}) matches no call"
                    + (did_you_mean(scope, paths) if scope not in paths else "")
                )
        if problems:
            text = "; ".join(problems)
            end = "" if text.endswith("?") else "."
            if not mapping.from_torch_ao:
                raise UnmatchedRuleError(
                    f"{text}{end} Correct the rule or remove it; nothing was quantized"
                )
            context.diagnostics.warn(f"{text}{end} The rule has no effect", ConfigWarning)
        for kind in mapping.object_type_qconfigs:
            if ("object_type", kind) not in matched and kind not in mapping.default_object_types:
                name = kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))
                called = sorted(names)
                more = ", ..." if len(called) > 12 else ""
                context.diagnostics.warn(
                    f"object_type rule {name!r} matches no op of the model"
                    f"{did_you_mean(name, called) or '.'} The model calls"
                    f" {', '.join(called[:12])}{more}; a module, a function and a method of one"
                    " name are different types",
                    ConfigWarning,
                )


def _method_hint(name: str) -> str:
    return "; the name of a method goes under object_type" if name in KIND_BY_METHOD else ""


def subject(gm: QuantGraphModule, node: fx.Node) -> dict[str, Any]:
    """What the precedence of :func:`fxquant.qconfig_mapping.resolve` looks at."""
    record = record_of(node)
    kinds = tuple(dict.fromkeys((type_of(gm, node), *_written_as(node))))
    path = str(node.target) if node.op == "call_module" else record.scope
    scope_types: tuple[object, ...] = ()
    if node.op != "call_module" and record.scope_types:
        scope_types = (record.scope_types[-1],)
    # A rule for a module that is taken apart governs what is in it, the innermost first.
    scopes = (kind for kind in reversed(record.scope_types) if isinstance(kind, type))
    scope_types += tuple(w for kind in scopes if (w := written_as(kind)) is not None)
    return {
        "module_path": path,
        "target_types": kinds,
        "scope_types": scope_types,
        "order_index": tuple((record.scope, kind, record.call_index) for kind in kinds),
    }


def _written_as(node: fx.Node) -> tuple[object, ...]:
    """The operator as the code has it: ``+=`` also counts as ``+``."""
    return (node.target,) if node.target in OUT_OF_PLACE_OPERATORS else ()
