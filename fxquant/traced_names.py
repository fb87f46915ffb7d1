"""Inputs and attributes of a traced graph, under the names that the model has for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from fxquant.attribute_paths import set_attribute
from fxquant.errors import CaptureWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule


def order_inputs(graph: fx.Graph, fixed: Mapping[str, Any], forward: Callable[..., Any]) -> None:
    """Give the inputs the names and the order of ``forward``, before everything else.

    fx numbers the inputs that it fixes to a value, and puts ``*args`` behind keyword-only inputs.
    """
    nodes = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            if name.removesuffix("_1") in fixed and name.endswith("_1"):
                name = node.target = name.removesuffix("_1")
            nodes[name.lstrip("*")] = node
    order = [name for name in inspect.signature(forward).parameters if name in nodes]
    last: fx.Node | None = None
    for name in order:
        place = next(iter(graph.nodes)) if last is None else last.next
        if place is not nodes[name]:
            place.prepend(nodes[name])
        named = not str(nodes[name].target).startswith("*")
        if named and last is not None and last.args and not nodes[name].args:
            # Behind a "*", which graphs have no word for; so all calls name it.
            nodes[name].args = (None,)
        last = nodes[name]


def give_defaults(graph: fx.Graph, values: Mapping[str, Any]) -> None:
    """Let callers leave out the inputs that are fixed to a value, where Python can say so."""
    for node in reversed([node for node in graph.nodes if node.op == "placeholder"]):
        name = str(node.target)
        if name in values:
            node.args = (values[name],)
        elif not node.args and not name.startswith("*"):
            return  # inputs without a default cannot follow one that has it


@functools.cache
def _names_of_graph_modules() -> frozenset[str]:
    graph = fx.Graph()
    graph.output(None)
    return frozenset(dir(QuantGraphModule(nn.Module(), graph))) - frozenset(dir(nn.Module()))


def free_names(model: nn.Module, graph: fx.Graph, diagnostics: Diagnostics) -> None:
    """Rename what a graph reads under a name that graph modules have for themselves."""
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        atom, dot, rest = str(node.target).partition(".")
        if node.op not in ("call_module", "get_attr") or atom not in _names_of_graph_modules():
            continue
        if atom not in renamed:
            value = getattr(model, atom)
            new = f"{atom}_"
            while hasattr(model, new) or new in _names_of_graph_modules():
                new += "_"
            set_attribute(model, new, value)
            renamed[atom] = new
            diagnostics.warn(
                f"{atom!r} of the model is called {new!r} in the graph, because graph modules have"
                f" an attribute {atom!r} of their own; use {new!r} in rules",
                CaptureWarning,
            )
        node.target = f"{renamed[atom]}{dot}{rest}"
