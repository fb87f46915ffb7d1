"""Run as a script: load saved models, without the code that made them, and print what they compute.

``python tests/integration/fresh_process.py FOLDER`` reads ``FOLDER/NAME/model.fxq`` and
``FOLDER/NAME/inputs.pt`` and prints, as JSON, what :func:`values` and :func:`stored` find for every
``NAME``.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import artifact


def values(model: fx.GraphModule, inputs: Tensor) -> list[list[Any]]:
    """Name, dtype and checksum of every tensor that the graph computes, integers as integers."""
    found: list[list[Any]] = []

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op != "get_attr":
                found.extend([n.name, *_sum(tensor)] for tensor in _tensors(value))
            return value

    with torch.no_grad():
        Watching(model).run(inputs)
    return found


def stored(model: fx.GraphModule) -> dict[str, list[Any]]:
    """Dtype and checksum of every buffer and parameter."""
    return {name: _sum(tensor) for name, tensor in sorted(model.state_dict().items())}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _sum(tensor: Tensor) -> list[Any]:
    dtype = str(tensor.dtype)
    plain = tensor.int_repr() if tensor.is_quantized else tensor
    return [dtype, zlib.crc32(plain.contiguous().numpy().tobytes())]


def main() -> None:
    """Print what every model in the folder computes."""
    torch.set_num_threads(1)
    found = {}
    for path in sorted(Path(sys.argv[1]).glob("*/model.fxq")):
        model = artifact.load(path)
        inputs = torch.load(path.with_name("inputs.pt"), weights_only=True)
        found[path.parent.name] = {"values": values(model, inputs), "stored": stored(model)}
    strangers = [name for name in sys.modules if name.split(".")[0] in ("torchvision", "tests")]
    strangers += [name for name in sys.modules if name.startswith("fxquant.models_zoo")]
    print(json.dumps({"models": found, "strangers": strangers}))


if __name__ == "__main__":
    main()
