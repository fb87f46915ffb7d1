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
from fxquant.patterns.pattern import Pattern, chain, step

BATCH_NORM_ACTIVATION = tuple(
    Pattern(
        f"bn-{name}",
        chain(step("bn", "batch_norm"), step("activation", *kinds)),
        guards=(
            single_user,
            evaluation_mode,
            constant_weight,
            has_running_statistics,
            constant_bounds,
            same_dtype,
            no_hooks,
            no_mutation_between,
        ),
        source="PyTorch, quantized::batch_norm_relu; Jacob et al. 2018, section 2.4 (clamps)",
    )
    for name, kinds in CLAMPS.items()
)
