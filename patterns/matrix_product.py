"""A product of two activations with the clamp after it, which saturation can give for free."""

from __future__ import annotations

from fxquant.patterns.activations import CLAMPS
from fxquant.patterns.guards import (
    constant_bounds,
    no_hooks,
    no_mutation_between,
    same_dtype,
    single_user,
)
from fxquant.patterns.pattern import Pattern, chain, step

MATRIX_PRODUCT_ACTIVATION = tuple(
    Pattern(
        f"{kind}-{name}",
        chain(step("matmul", kind), step("activation", *kinds)),
        guards=(single_user, constant_bounds, same_dtype, no_hooks, no_mutation_between),
        source="Jacob et al. 2018 (arXiv:1712.05877), section 2.4",
    )
    for kind in ("matmul", "bmm")
    for name, kinds in CLAMPS.items()
)
