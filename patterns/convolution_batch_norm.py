"""Batch-norms that fold into the convolution or linear before them.

``BN(Conv(x; W, b)) = Conv(x; W * g / s, (b - m) * g / s + beta)`` with ``s = sqrt(var + eps)``,
one factor per output channel.
"""

from __future__ import annotations

from fxquant.patterns.guards import (
    channel_match,
    constant_weight,
    evaluation_mode,
    has_running_statistics,
    no_hooks,
    no_mutation_between,
    same_dtype,
    same_training_mode,
    single_user,
    sole_owner_of_parameter,
)
from fxquant.patterns.pattern import Guard, Pattern, chain, step

_SOURCE = "Jacob et al. 2018 (arXiv:1712.05877), section 3.2 (batch normalization folding)"
_KINDS = tuple(f"conv{d}d" for d in (1, 2, 3)) + tuple(f"conv_transpose{d}d" for d in (1, 2, 3))


def _batch_norm_after(bind: str, kind: str, owner: Guard, mode: Guard) -> Pattern:
    """The mode is asked last: what it refuses would fold in the other mode."""
    return Pattern(
        f"{kind}-bn",
        chain(step(bind, kind), step("bn", "batch_norm")),
        guards=(
            single_user,
            owner,
            constant_weight,
            has_running_statistics,
            channel_match(bind, "bn"),
            same_dtype,
            no_hooks,
            no_mutation_between,
            mode,
        ),
        source=_SOURCE,
    )


CONVOLUTION_BATCH_NORM = tuple(
    _batch_norm_after(bind, kind, sole_owner_of_parameter(bind), evaluation_mode)
    for bind, kind in (*(("conv", kind) for kind in _KINDS), ("linear", "linear"))
)
"""Foldable: in evaluation mode, the weight's only use. The batch-norm is read, not rewritten."""

CONVOLUTION_BATCH_NORM_QAT = tuple(
    _batch_norm_after(bind, kind, sole_owner_of_parameter(bind, "bn"), same_training_mode)
    for bind, kind in (*(("conv", kind) for kind in _KINDS), ("linear", "linear"))
)
"""To be trained as one module: neither the weight nor the moving statistics are shared."""
