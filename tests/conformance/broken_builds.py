"""Builds of fxquant.compat in which one step does nothing, to see that tests notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fxquant.compat import (
    MovingAverageMinMaxObserver,
    QConfig,
    default_per_channel_weight_observer,
)
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.pass_manager import PassContext, PassResult
from fxquant.passes.insert_shared_observers import InsertSharedObservers
from fxquant.passes.lower import Lower
from fxquant.passes.propagate_qconfigs import PropagateQConfigs
from fxquant.qconfig_mapping import QConfigMapping

VARIABLE = "FXQUANT_BROKEN_BUILD"


def without_observers(patch: pytest.MonkeyPatch) -> None:
    """Nothing is observed."""

    def run(self: InsertSharedObservers, gm: QuantGraphModule, context: PassContext) -> PassResult:
        gm.update_state(stage=Stage.PREPARED)
        return PassResult(changes=1)

    patch.setattr(InsertSharedObservers, "run", run)


def without_qconfigs(patch: pytest.MonkeyPatch) -> None:
    """Every op has one qconfig, which no test asks for."""
    propagate = PropagateQConfigs.run
    other = QConfig(
        activation=MovingAverageMinMaxObserver.with_args(quant_min=0, quant_max=250),
        weight=default_per_channel_weight_observer,
    )

    def run(self: PropagateQConfigs, gm: QuantGraphModule, context: PassContext) -> PassResult:
        ignoring = replace(self, mapping=QConfigMapping().set_global(other))
        return propagate(ignoring, gm, context)

    patch.setattr(PropagateQConfigs, "run", run)


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    """The lowered graph is the reference graph."""

    def run(self: Lower, gm: QuantGraphModule, context: PassContext) -> PassResult:
        gm.update_state(stage=Stage.LOWERED)
        return PassResult(changes=1)

    patch.setattr(Lower, "run", run)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "observers": without_observers,
    "qconfigs": without_qconfigs,
    "kernels": without_kernels,
}
