"""A concatenation with the ReLU after it: the quantized kernel requantizes and clamps at once."""

from __future__ import annotations

from fxquant.patterns.guards import no_hooks, no_mutation_between, same_dtype, single_user
from fxquant.patterns.pattern import Pattern, chain, step

CONCATENATION_ACTIVATION = (
    Pattern(
        "cat-relu",
        chain(step("cat", "cat"), step("activation", "relu")),
        guards=(single_user, same_dtype, no_hooks, no_mutation_between),
        source="PyTorch, quantized::cat_relu; Jacob et al. 2018, appendix A.3",
    ),
)
