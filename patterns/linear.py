"""A linear with its activation function: ``act(x W^T + b)`` leaves the accumulator once."""

from __future__ import annotations

from fxquant.patterns.activations import ACTIVATIONS
from fxquant.patterns.guards import (
    constant_bounds,
    constant_weight,
    no_hooks,
    no_mutation_between,
    same_dtype,
    single_user,
)
from fxquant.patterns.pattern import Pattern, chain, step

LINEAR_ACTIVATION = tuple(
    Pattern(
        f"linear-{name}",
        chain(step("linear", "linear"), step("activation", *kinds)),
        guards=(
            single_user,
            constant_bounds,
            constant_weight,
            same_dtype,
            no_hooks,
            no_mutation_between,
        ),
        source="oneDNN developer guide, Primitive Attributes: Post-ops (eltwise)",
    )
    for name, kinds in ACTIVATIONS.items()
)
