"""fuse-patterns: mark the chains of ops that the target runs as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from fxquant.backend_patterns import op_name
from fxquant.errors import FusedTypesError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import FusionRecord, NodeRecord, add_reason, record_of, update_record
from fxquant.op_view import type_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.passes.propagate_qconfigs import DEFAULT
from fxquant.patterns.library import FUSION_PATTERNS
from fxquant.patterns.listed import listed_chain
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.matcher import match_all
from fxquant.patterns.pattern import Guard, Pattern, guard
from fxquant.qat_modules import FLOAT_BY_QAT
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.targets.table import Target


@guard
def same_qconfig(match: Match) -> Reason | None:
    """The first op's qconfig governs the pattern, unless a rule of its own says otherwise."""
    first = record_of(match.first)
    if first.qconfig is None:
        return because("{node!r} stays in FP32 ({rule})", node=match.first.name, rule=first.rule)
    for node in match.nodes[1:]:
        record = record_of(node)
        own_rule = record.rule not in ("global", "no rule") and not record.rule.endswith(DEFAULT)
        if record.qconfig != first.qconfig and own_rule:
            return because(
                "{node!r} is governed by {rule}, {first!r} by {first_rule}",
                node.name,
                node=node.name,
                rule=record.rule,
                first=match.first.name,
                first_rule=first.rule,
            )
    return None


def qconfig_of_first(match: Match, target: Target) -> NodeRecord:
    """The first op's."""
    return record_of(match.first)


@dataclass(frozen=True)
class TorchFusionRule:
    """The qconfig of what torch.ao fuses, whatever the qconfigs of its ops are.

    Modules become one before qconfigs are looked up: names and regexes are those of the first, its
    type is that of all, which must be configured alike. Of functions both must have a qconfig.

    Attributes:
        mapping: the user's rules.

    Raises:
        FusedTypesError: the types of one fused module have different qconfigs.
    """

    mapping: QConfigMapping

    def __call__(self, match: Match, target: Target) -> NodeRecord:
        """The record whose qconfig and rule are those of the match."""
        first, last = record_of(match.first), record_of(match.last)
        types: tuple[Any, ...] = tuple(type_of(match.gm, node) for node in match.nodes)
        plain = tuple(FLOAT_BY_QAT.get(kind, kind) for kind in types)
        allowed = None if target.allow is None else target.allow.pattern_of(plain)
        if allowed is None or not allowed.fuses:
            return last if last.qconfig is None else first
        if plain == types:
            self._check_types(tuple(nn.ReLU if kind is F.relu else kind for kind in types))
        return first

    def _check_types(self, types: tuple[Any, ...]) -> None:
        rules = self.mapping.object_type_qconfigs
        values = [rules.get(kind) for kind in types]
        for kind, value in zip(types, values, strict=True):
            if value != values[0]:
                names = ", ".join(op_name(one) for one in types)
                raise FusedTypesError(
                    "During fusion, we need to specify the same qconfigs for all module types in"
                    f" ({names}) offending type: {op_name(kind)}. It has {value}, and"
                    f" {op_name(types[0])} has {values[0]}; set the same qconfig for both types"
                )


@dataclass(frozen=True)
class FusePatterns(Pass):
    """Mark matches of the patterns that the target has a kernel or an absorption for.

    Nothing is rewritten: the values inside a match are simply not observed, and lowering emits one
    kernel.

    Attributes:
        patterns: what is looked for.
        agreement: what the qconfigs of a match must agree on.
        governing: ``(match, target)`` -> the record whose qconfig governs the whole match.
    """

    patterns: tuple[Pattern, ...] = FUSION_PATTERNS
    agreement: tuple[Guard, ...] = (same_qconfig,)
    governing: Callable[[Match, Target], NodeRecord] = qconfig_of_first

    name: ClassVar[str] = "fuse-patterns"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BATCH_NORM_FOLDED, Fact.QCONFIGS})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Mark every match; near misses become reasons of their ops."""
        listed = listed_chain(context.target)
        patterns = [
            replace(pattern, guards=(*pattern.guards, *listed, *self.agreement))
            for pattern in self.patterns
            if supports(context.target, pattern)
        ]
        report = match_all(gm, patterns)
        changes = 0
        for number, match in enumerate(report.matches):
            governing = self.governing(match, context.target)
            for node, bind in zip(match.nodes, match.pattern.binds, strict=True):
                fusion = FusionRecord(
                    pattern=match.pattern.name,
                    group=number,
                    role=bind,
                    first=match.first.name,
                    last=match.last.name,
                )
                if record_of(node).fusion != fusion:
                    update_record(
                        node, fusion=fusion, qconfig=governing.qconfig, rule=governing.rule
                    )
                    changes += 1
        nodes = {node.name: node for node in gm.graph.nodes}
        refusals = []
        for refusal in report.refusals:
            if not refusal.guard or refusal.depth < 2:
                continue
            refusals.append(
                Refusal(node=refusal.anchor, reason=refusal.reason, culprits=refusal.culprits)
            )
            node = nodes[refusal.anchor]
            reasons = record_of(node).reasons
            add_reason(node, f"pattern {refusal.pattern.name} refused: {refusal.reason}")
            changes += record_of(node).reasons != reasons
        return PassResult(changes=changes, refusals=tuple(refusals))


def supports(target: Target, pattern: Pattern) -> bool:
    """Whether ``target`` can run all later steps of ``pattern`` behind its first."""
    for kind in pattern.steps[0].kinds:
        row = target.row(kind)
        if row is None or not all(step.kinds & set(row.epilogues) for step in pattern.steps[1:]):
            return False
    return len(pattern.steps) > 1
