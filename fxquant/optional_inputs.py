"""Inputs that the examples leave out: which of them a graph has to fix to a value.

A forward may ask whether an input is there (``if mask is not None:``); a trace takes one answer.
Two traces tell whether it does ask: one with the input fixed to its value, and one with the input
free. Where they are the same but for the reads of that input, nothing depends on the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx.node import map_arg


def same_but_for(free: fx.Graph, fixed: fx.Graph, values: Mapping[str, Any]) -> bool:
    """Whether ``free``, with ``values`` for its inputs of these names, is ``fixed``.

    Args:
        free: a trace with all inputs.
        fixed: a trace with some inputs fixed, which are still inputs, checked and not read.
        values: of the fixed inputs, by name.
    """
    meant: dict[fx.Node, Any] = {}
    ours = []
    for node in free.nodes:
        if node.op == "placeholder" and str(node.target) in values:
            meant[node] = values[str(node.target)]
        else:
            ours.append(node)
    theirs = [node for node in fixed.nodes if not _checks_fixed(node, values)]
    if len(ours) != len(theirs):
        return False
    for mine, other in zip(ours, theirs, strict=True):
        if (mine.op, mine.target) != (other.op, other.target):
            return False
        if map_arg((mine.args, mine.kwargs), meant.__getitem__) != (other.args, other.kwargs):
            return False
        meant[mine] = other
    return True


def _checks_fixed(node: fx.Node, values: Mapping[str, Any]) -> bool:
    """Whether ``node`` is a fixed input, or looks at nothing else."""
    if node.op == "placeholder":
        return str(node.target).removesuffix("_1") in values
    return bool(node.all_input_nodes) and all(
        _checks_fixed(source, values) for source in node.all_input_nodes
    )
