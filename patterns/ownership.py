"""Which nodes read a parameter, under any name and through any tensor that shares its memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxquant.op_view import attribute

_PLAIN = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
"""Tensors with an address of their own; fake tensors and other subclasses may have none."""


@dataclass(frozen=True, slots=True)
class ParameterUse:
    """One node that reads a tensor.

    Attributes:
        node: the node whose result depends on the tensor; never a ``get_attr``.
        path: where the tensor is found in the module.
    """

    node: fx.Node
    path: str


class ParameterOwners:
    """The readers of every parameter, buffer and tensor attribute that a graph reaches.

    Two tensors are one when their bytes overlap: tied modules, ``Parameter(other.data)``, views,
    and arrays that share memory without sharing a storage.

    Args:
        gm: the module that owns the graph and the parameters.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        spans: dict[object, list[tuple[int, int, ParameterUse]]] = {}
        for tensor, use in _uses(gm):
            space, start, end = _span(tensor)
            spans.setdefault(space, []).append((start, end, use))
        self._starts: dict[object, list[int]] = {}
        self._groups: dict[object, list[tuple[ParameterUse, ...]]] = {}
        self._ends: dict[object, list[int]] = {}
        for space, found in spans.items():
            self._merge(space, found)

    def _merge(self, space: object, spans: list[tuple[int, int, ParameterUse]]) -> None:
        """Unite overlapping byte ranges by one sweep over the sorted ranges."""
        starts: list[int] = []
        ends: list[int] = []
        groups: list[list[ParameterUse]] = []
        for start, end, use in sorted(spans, key=lambda span: span[:2]):
            if ends and start < ends[-1]:
                ends[-1] = max(ends[-1], end)
                groups[-1].append(use)
            else:
                starts.append(start)
                ends.append(end)
                groups.append([use])
        self._starts[space] = starts
        self._ends[space] = ends
        self._groups[space] = [tuple(dict.fromkeys(group)) for group in groups]

    def uses(self, tensor: torch.Tensor) -> tuple[ParameterUse, ...]:
        """The nodes that read ``tensor`` or anything that shares its memory."""
        space, start, _ = _span(tensor)
        index = bisect_right(self._starts.get(space, []), start) - 1
        if index < 0 or start >= self._ends[space][index]:
            return ()
        return self._groups[space][index]


def _uses(gm: fx.GraphModule) -> Iterator[tuple[torch.Tensor, ParameterUse]]:
    tensors: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        if path not in tensors:
            tensors[path] = list(_tensors(attribute(gm, path), path))
        for user in (node,) if node.op == "call_module" else node.users:
            for name, tensor in tensors[path]:
                yield tensor, ParameterUse(user, name)


def _tensors(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors under ``value``, registered or plain attributes, with their paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    if not isinstance(value, nn.Module):
        return
    for prefix, module in value.named_modules(prefix=path):
        for owned in (module._parameters, module._buffers, vars(module)):
            for name, tensor in owned.items():
                if isinstance(tensor, torch.Tensor):
                    yield f"{prefix}.{name}", tensor


def _span(tensor: torch.Tensor) -> tuple[object, int, int]:
    """The memory of ``tensor``: an address space, the first byte and the byte past the last."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor), 0, 1
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    length = (reach + 1) * tensor.element_size()
    if type(tensor) in _PLAIN and not tensor.is_meta:
        start = tensor.data_ptr()
        return tensor.device, start, start + length
    start = int(tensor.storage_offset()) * tensor.element_size()
    return ("storage", tensor.untyped_storage()._cdata), start, start + length
