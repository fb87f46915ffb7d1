"""A convolution with its activation function, and with the residual that is added to it.

``act(Conv(x))`` and ``relu(Conv(x) + y)`` leave the accumulator once: the value between is never
rounded to int8.
"""

from __future__ import annotations

from fxquant.patterns.activations import ACTIVATIONS, CLAMPS
from fxquant.patterns.guards import (
    constant_bounds,
    constant_weight,
    no_hooks,
    no_mutation_between,
    not_scalar_operand,
    same_dtype,
    same_shape,
    single_user,
    unit_alpha,
)
from fxquant.patterns.pattern import Pattern, chain, step

_KINDS = tuple(f"conv{d}d" for d in (1, 2, 3)) + tuple(f"conv_transpose{d}d" for d in (1, 2, 3))
_POST_OPS = "oneDNN developer guide, Primitive Attributes: Post-ops"

CONVOLUTION_ACTIVATION = tuple(
    Pattern(
        f"{kind}-{name}",
        chain(step("conv", kind), step("activation", *kinds)),
        guards=(
            single_user,
            constant_bounds,
            constant_weight,
            same_dtype,
            no_hooks,
            no_mutation_between,
        ),
        source=f"{_POST_OPS} (eltwise)",
    )
    for kind in _KINDS
    for name, kinds in ACTIVATIONS.items()
)

_RESIDUAL = (
    single_user,
    unit_alpha,
    not_scalar_operand,
    same_shape,
    constant_weight,
    same_dtype,
    no_hooks,
    no_mutation_between,
)

CONVOLUTION_ADD = (
    *(
        Pattern(
            f"conv2d-add-{name}",
            chain(
                step("conv", "conv2d"),
                step("add", "add", other="other"),
                step("activation", *kinds),
            ),
            guards=(*_RESIDUAL, constant_bounds),
            source=f"{_POST_OPS} (sum, eltwise); residual block of He et al. 2016, figure 2",
        )
        for name, kinds in CLAMPS.items()
    ),
    Pattern(
        "conv2d-add",
        chain(step("conv", "conv2d"), step("add", "add", other="other")),
        guards=_RESIDUAL,
        source=f"{_POST_OPS} (sum); inverted residual of Sandler et al. 2018, figure 4",
    ),
)
