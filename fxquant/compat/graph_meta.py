"""What a prepared graph carries for those who read it: its mapping, attributes, qconfigs."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from fxquant.graph_module import PRESERVED_ATTRIBUTES, QuantGraphModule
from fxquant.metadata import record_of
from fxquant.passes.to_reference import is_observer

MAPPING: Final = "fxquant_qconfig_mapping"
"""Key in ``GraphModule.meta`` of the mapping that a model was prepared with."""


def preserve(gm: QuantGraphModule, source: nn.Module, names: list[str]) -> None:
    """Keep attributes of ``source``, through copies too, and none that were kept before."""
    kept = {name: getattr(source, name) for name in names if hasattr(source, name)}
    for name in gm.meta.get(PRESERVED_ATTRIBUTES, {}):
        if name not in kept and hasattr(gm, name):
            delattr(gm, name)
    gm.meta[PRESERVED_ATTRIBUTES] = kept
    for name, value in kept.items():
        setattr(gm, name, value)


def set_qconfigs(gm: QuantGraphModule) -> None:
    """Let every called module carry its qconfig; code looks there."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and not is_observer(node):
            module: Any = gm.get_submodule(str(node.target))
            module.qconfig = record_of(node).qconfig


def remove_qconfigs(module: nn.Module) -> None:
    """Undo :func:`set_qconfigs`, or what torch.ao did."""
    for part in module.modules():
        if "qconfig" in vars(part):
            del part.qconfig
