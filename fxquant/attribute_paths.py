"""Attributes of modules set and removed by dotted paths; :mod:`fxquant.op_view` reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def set_attribute(root: nn.Module, path: str, value: Any) -> None:
    """Set a module, parameter, buffer or object at a dotted ``path``, making modules on the way."""
    *parents, last = path.split(".")
    holder = root
    for atom in parents:
        if not hasattr(holder, atom):
            child = nn.Module()
            child.training = root.training
            holder.add_module(atom, child)
        holder = getattr(holder, atom)
    for registry in (holder._parameters, holder._buffers, holder._modules):
        registry.pop(last, None)
    holder.__dict__.pop(last, None)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        holder.register_buffer(last, value)
    else:
        setattr(holder, last, value)


def delete_attribute(root: nn.Module, path: str) -> None:
    """Remove what is at ``path``, and the modules above it that are left empty."""
    *parents, last = path.split(".")
    chain = [root]
    for atom in parents:
        chain.append(getattr(chain[-1], atom))
    delattr(chain[-1], last)
    for holder, atom in zip(reversed(chain[:-1]), reversed(parents), strict=True):
        child = getattr(holder, atom)
        if type(child) is not nn.Module or any((child._parameters, child._buffers, child._modules)):
            return
        delattr(holder, atom)
