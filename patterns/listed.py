"""Guards that a backend config's allow-list adds: only what it fuses is fused or folded."""

from __future__ import annotations

from fxquant.backend_patterns import op_name
from fxquant.op_view import type_of
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.pattern import Guard
from fxquant.targets.table import Target


def listed_chain(target: Target) -> tuple[Guard, ...]:
    """The guard that a chain of ops is listed, in the forms it is written in.

    Empty for a target that no backend config narrows.
    """
    allow = target.allow
    if allow is None:
        return ()

    def check(match: Match) -> Reason | None:
        types = tuple(type_of(match.gm, node) for node in match.nodes)
        if allow.pattern_of(types) is not None:
            return None
        return _unlisted(allow.name, types, match)

    return (Guard("listed_chain", check),)


def listed_fold(target: Target) -> tuple[Guard, ...]:
    """The guard that a batch-norm is fused with the op before it, alone or with the op behind."""
    allow = target.allow
    if allow is None:
        return ()

    def check(match: Match) -> Reason | None:
        base, norm = (type_of(match.gm, node) for node in match.nodes)
        users = list(match.last.users)
        behind = type_of(match.gm, users[0]) if len(users) == 1 else None
        if allow.folds(base, norm, behind):
            return None
        return _unlisted(allow.name, (base, norm), match)

    return (Guard("listed_fold", check),)


def _unlisted(name: str, types: tuple[object, ...], match: Match) -> Reason:
    return because(
        "backend config {name!r} does not fuse {chain}",
        match.last.name,
        name=name,
        chain=" -> ".join(map(op_name, types)),
    )
