"""tell-unhonoured: what a backend config asks for and the target does not do, as warnings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxquant.graph_module import QuantGraphModule
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.targets.allow_list import warn_unhonoured


@dataclass(frozen=True)
class TellUnhonoured(Pass):
    """Name each pattern of the model that is not quantized as the user's backend config says.

    One warning a pattern: node, what was wanted, what is possible. It changes nothing.

    Raises:
        StrictModeError: under ``strict``.
    """

    name: ClassVar[str] = "tell-unhonoured"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ANNOTATED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Warn of what qconfigs ask for; a target without a config has nothing to tell."""
        if context.target.allow is not None:
            warn_unhonoured(gm, context.target.allow, context.diagnostics)
        return PassResult(changes=0)
