"""An addition or a product of two tensors with the clamp after it."""

from __future__ import annotations

from fxquant.patterns.activations import CLAMPS
from fxquant.patterns.guards import (
    constant_bounds,
    no_hooks,
    no_mutation_between,
    not_scalar_operand,
    same_dtype,
    single_user,
    unit_alpha,
)
from fxquant.patterns.pattern import Pattern, chain, step

ELEMENTWISE_ACTIVATION = tuple(
    Pattern(
        f"{kind}-{name}",
        chain(step(kind, kind), step("activation", *kinds)),
        guards=(
            single_user,
            unit_alpha,
            not_scalar_operand,
            constant_bounds,
            same_dtype,
            no_hooks,
            no_mutation_between,
        ),
        source="PyTorch, quantized::add_relu and mul_relu; Jacob et al. 2018, appendix A.2",
    )
    for kind in ("add", "mul")
    for name, kinds in CLAMPS.items()
)
