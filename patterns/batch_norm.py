"""A batch-norm that nothing absorbs, with the clamp after it: ``clamp(x * g / s + t)``."""

from __future__ import annotations

from fxquant.patterns.activations import CLAMPS
from fxquant.patterns.guards import (
    constant_bounds,
    constant_weight,
    evaluation_mode,
    has_running_statistics,
    no_hooks,
    no_mutation_between,
    same_dtype,
    single_user,
)
from fxquant.patterns.pattern import Guard, Pattern, chain, step


def _batch_norm_before(name: str, kinds: tuple[str, ...], *mode: Guard) -> Pattern:
    return Pattern(
        f"bn-{name}",
        chain(step("bn", "batch_norm"), step("activation", *kinds)),
        guards=(
            single_user,
            *mode,
            constant_weight,
            has_running_statistics,
            constant_bounds,
            same_dtype,
            no_hooks,
            no_mutation_between,
        ),
        source="PyTorch, quantized::batch_norm_relu; Jacob et al. 2018, section 2.4 (clamps)",
    )


BATCH_NORM_ACTIVATION = tuple(
    _batch_norm_before(name, kinds, evaluation_mode) for name, kinds in CLAMPS.items()
)
"""In evaluation mode, where a batch-norm is a fixed affine map."""

BATCH_NORM_ACTIVATION_QAT = tuple(_batch_norm_before(name, kinds) for name, kinds in CLAMPS.items())
"""The same while the batch-norm trains: it will be that map."""
