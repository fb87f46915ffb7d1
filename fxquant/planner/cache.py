"""Measured latencies, kept in one small file for each machine.

A time is found again only by the same graph (operators, arguments, shapes and memory formats) on
the same machine, with the same torch, threads and settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.machine_file import MachineFile, digest
from fxquant.metadata import record_of, shape_of
from fxquant.planner.clock import NodeTimes

_ENTRIES: Final = 200
"""Graphs that are kept; the oldest go first."""


class LatencyCache:
    """Times of graphs, by what they compute.

    Args:
        folder: where the file is; ``None`` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file = MachineFile(folder, "latency", largest=_ENTRIES)

    def get(self, key: str) -> NodeTimes | None:
        """The times of a graph, or ``None``."""
        found = self.file.get(key)
        if found is None:
            return None
        return NodeTimes({k: float(v) for k, v in found["nodes"].items()}, float(found["whole"]))

    def put(self, times: Mapping[str, NodeTimes]) -> None:
        """Keep the times of graphs, and write the file."""
        self.file.put({key: {"nodes": dict(t.nodes), "whole": t.whole} for key, t in times.items()})


def graph_key(gm: QuantGraphModule, bound: inspect.BoundArguments) -> str:
    """The same for graphs that run the same kernels on tensors of the same form.

    Scales and zero points do not count; shapes are those of the inputs and of the constants.
    """
    parts = [f"{name}={_form(value)}" for name, value in bound.arguments.items()]
    for node in gm.graph.nodes:
        bound_here = {position for position, _ in record_of(node).bound}
        own = tuple("bound" if i in bound_here else a for i, a in enumerate(node.args))
        arguments = fx.node.map_aggregate((own, tuple(node.kwargs.items())), _plain)
        value = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        parts.append(f"{node.name} {node.op} {node.target} {arguments} {_form(value)}")
        parts.append(str(shape_of(node)))
    return digest("\n".join(parts))


def _plain(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    return "float" if isinstance(argument, float) else str(argument)


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}"
    return type(value).__name__
