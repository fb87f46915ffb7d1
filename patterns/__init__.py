"""Which ops belong together: declarative patterns over ``torch.fx`` graphs, and their matcher.

A pattern is a chain of steps, read forward (conv, bn), with named guards. A guard that refuses
says why, and which nodes are the culprits::

    report = match_all(gm, FOLD_PATTERNS)
    for match in report.matches:
        print(match.conv.node, match.bn.node)
    print(report.nearest_miss("conv"))

Patterns of your own have the same form as the built-in ones: :class:`Pattern`, :func:`chain`,
:func:`step`, and guards from :mod:`fxquant.patterns.guards` or made with :func:`guard`.
"""

from fxquant.patterns.library import (
    FOLD_PATTERNS,
    FUSION_PATTERNS,
    QAT_PATTERNS,
    SCALE_PATTERNS,
    pattern_named,
)
from fxquant.patterns.match import Match, Reason, Refusal, because
from fxquant.patterns.matcher import MatchReport, match_all
from fxquant.patterns.pattern import Guard, Pattern, Step, chain, guard, step

__all__ = [
    "FOLD_PATTERNS",
    "FUSION_PATTERNS",
    "QAT_PATTERNS",
    "SCALE_PATTERNS",
    "Guard",
    "Match",
    "MatchReport",
    "Pattern",
    "Reason",
    "Refusal",
    "Step",
    "because",
    "chain",
    "guard",
    "match_all",
    "pattern_named",
    "step",
]
