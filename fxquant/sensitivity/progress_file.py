"""What an interrupted sweep leaves, to go on from: results so far, and what they are of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.errors import ArtifactError
from fxquant.op_view import attribute
from fxquant.sensitivity.activations import tensors_in
from fxquant.sensitivity.network import CalibratedNetwork
from fxquant.sensitivity.results import LayerResult

_FORMAT: Final = 1


def fingerprint(network: CalibratedNetwork, options: Mapping[str, Any]) -> str:
    """Equal for runs that give the same numbers: of graph, weights, data, statistics and options.

    Args:
        network: what is analysed.
        options: of the analysis; written by their ``repr``.
    """
    digest = hashlib.sha256()
    for node in network.graph.graph.nodes:
        digest.update(_lasting((node.op, node.name, node.target, node.args, node.kwargs)))
        if node.op == "get_attr":
            _add(digest, attribute(network.graph, str(node.target)))
        elif node.op == "call_module":
            module = network.graph.get_submodule(str(node.target))
            for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
                _add(digest, tensor)
    for batch in (*network.batches, *network.statistics.batches):
        for value in tensors_in(list(batch.arguments.values())):
            _add(digest, value)
    for name, value in sorted(options.items()):
        digest.update(_lasting((name, value)))
    return digest.hexdigest()[:32]


def _lasting(value: Any) -> bytes:
    """What ``repr`` shows, but for addresses, which are others in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(type(value)).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    plain = value.detach().cpu().contiguous().flatten()
    digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")


class ProgressFile:
    """Results so far, written after each layer.

    Args:
        path: where they are; ``None`` keeps none.
        fingerprint: of what is analysed.
    """

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint

    def read(self) -> dict[str, LayerResult]:
        """Group -> result, of an earlier run; nothing where there is no file.

        Raises:
            ArtifactError: the file is of another model, other data or options, or is no such file.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            plain = json.loads(self.path.read_text(encoding="utf-8"))
            if plain["format"] != _FORMAT:
                raise ArtifactError(f"{self.path.name} has an unknown format {plain['format']!r}")
            found, theirs = plain["results"], plain["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(
                f"{self.path.name} is no file of an interrupted analysis: {error!r}"
            ) from error
        if theirs != self.fingerprint:
            raise ArtifactError(
                f"{self.path.name} belongs to another model, other data or other options; delete"
                " it, or give another resume=..."
            )
        results = [LayerResult.from_plain(value) for value in found]
        return {result.name: result for result in results}

    def write(self, results: Iterable[LayerResult]) -> None:
        """Replace the file, whole or not at all."""
        if self.path is None:
            return
        plain = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "results": [result.to_plain() for result in results],
        }
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(plain), encoding="utf-8")
        beside.replace(self.path)
