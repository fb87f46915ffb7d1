"""Measured latencies, kept in one small file for each machine.

A time is found again only by the same graph (operators, arguments, shapes and memory formats) on
the same machine, with the same torch, threads and settings.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from fxquant.artifact import made_on
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, shape_of
from fxquant.planner.clock import NodeTimes

CACHE_VARIABLE: Final = "FXQUANT_CACHE"
"""The environment variable that names the folder of the cache."""

_FORMAT: Final = 1
_ENTRIES: Final = 200
"""Graphs that are kept; the oldest go first."""


def default_folder() -> Path:
    """``$FXQUANT_CACHE``, else ``fxquant`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fxquant"


class LatencyCache:
    """Times of graphs, by what they compute.

    Args:
        folder: where the file is; ``None`` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        machine = {**made_on(), "threads": torch.get_num_threads(), "model": _processor()}
        digest = _digest(json.dumps(machine, sort_keys=True, default=str))
        self.path = None if folder is None else folder / f"latency-{digest}.json"
        self.entries: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """What the file holds; nothing where it is absent, of another format or damaged."""
        if self.path is None:
            return {}
        try:
            plain = json.loads(self.path.read_text(encoding="utf-8"))
            if plain["format"] != _FORMAT:
                return {}
            return dict(plain["graphs"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def get(self, key: str) -> NodeTimes | None:
        """The times of a graph, or ``None``."""
        found = self.entries.get(key)
        if found is None:
            return None
        return NodeTimes({k: float(v) for k, v in found["nodes"].items()}, float(found["whole"]))

    def put(self, times: Mapping[str, NodeTimes]) -> None:
        """Keep the times of graphs, and write the file."""
        for key, found in times.items():
            self.entries.pop(key, None)
            self.entries[key] = {"nodes": dict(found.nodes), "whole": found.whole}
        for key in list(self.entries)[: max(0, len(self.entries) - _ENTRIES)]:
            del self.entries[key]
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".latency-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "graphs": self.entries}, file)
        Path(name).replace(self.path)


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
    return _digest("\n".join(parts))


def _plain(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    return "float" if isinstance(argument, float) else str(argument)


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}"
    return type(value).__name__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        import platform

        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
