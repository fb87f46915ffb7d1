"""Whether the state of a model is still what it was when it was optimized."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

from fxquant.graph_module import QuantGraphModule, graphs_in


class Snapshot:
    """Which tensors and packed constants a model had, without a copy of their numbers.

    A change is seen where a tensor is another one, or was written to in place; writing to its
    ``.data`` leaves no trace.
    """

    def __init__(self, model: QuantGraphModule) -> None:
        self._model = model
        self._tensors = {name: (t, _version(t)) for name, t in _tensors(model).items()}
        self._packed = _packed(model)

    def change(self) -> str | None:
        """The name of something that was changed since; ``None`` where nothing was."""
        changed = self._changed_tensors()
        if changed:
            return changed[0]
        for name, packed in _packed(self._model).items():
            if self._packed.get(name, packed) is not packed:
                return name
        return None

    def after_a_call(self) -> None:
        """Take note of what a call did: of constants it packed, and tensors it writes to itself."""
        for name in self._changed_tensors():
            self._tensors.pop(name, None)
        self._packed = {**_packed(self._model), **self._packed}

    def _changed_tensors(self) -> list[str]:
        now = _tensors(self._model)
        return [
            name
            for name, (tensor, version) in self._tensors.items()
            if now.get(name) is not tensor or _version(tensor) != version
        ]


def _tensors(model: QuantGraphModule) -> dict[str, Tensor]:
    every = model.named_parameters, model.named_buffers
    return dict(chain.from_iterable(named(remove_duplicate=False) for named in every))


def _packed(model: QuantGraphModule) -> dict[str, Any]:
    return {
        f"{number}.{pack.name}" if number else pack.name: graph.__dict__[pack.name]
        for number, graph in enumerate(graphs_in(model))
        for pack in graph.state.packs
        if pack.name in graph.__dict__
    }


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
