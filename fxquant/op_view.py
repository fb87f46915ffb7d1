"""One view of an operation, whatever form the code spells it in.

``op_of(gm, node)`` gives the kind, the bound arguments and the constants of a node. Float graphs
keep their module, function and method nodes; patterns, annotation and targets see only this view.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from fxquant.op_catalog import (
    KIND_BY_FUNCTION,
    KIND_BY_METHOD,
    KIND_BY_MODULE,
    KIND_BY_QUALIFIED_NAME,
    REQUIRED,
    OpKind,
)
from fxquant.qat_modules import FLOAT_BY_QAT

OUT_OF_PLACE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
"""What ``+=`` and its like call -> what ``+`` and its like call."""


class Form(Enum):
    """How the code spells an operation."""

    MODULE = "module"
    FUNCTION = "function"
    METHOD = "method"


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A bound operation.

    Attributes:
        node: the node it is.
        kind: what it computes.
        form: how it is spelt.
        arguments: parameter name -> argument, defaults filled in, in canonical order; for modules,
            attributes stand in for parameters, and constants are absent (see :meth:`constant`).
    """

    node: fx.Node
    kind: OpKind
    form: Form
    arguments: Mapping[str, Any]
    owner: fx.GraphModule

    @property
    def name(self) -> str:
        """The kind's name."""
        return self.kind.name

    @property
    def activations(self) -> tuple[fx.Node, ...]:
        """The nodes that carry the activation inputs, flat, in order; constants not among them."""
        found: list[fx.Node] = []
        for name in self.kind.activations:
            value = self.arguments.get(name)
            items = value if isinstance(value, (tuple, list)) else (value,)
            found.extend(item for item in items if isinstance(item, fx.Node))
        return tuple(found)

    def constant_path(self, name: str) -> str | None:
        """Dotted path of the parameter or buffer that is this op's ``name``, or ``None``.

        ``None`` means that there is none (``bias=None``) or that it is computed in the graph;
        :meth:`computes` tells the two apart.
        """
        if self.form is Form.MODULE:
            module = submodule(self.owner, str(self.node.target))
            return f"{self.node.target}.{name}" if getattr(module, name, None) is not None else None
        value = self.arguments.get(name)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            return str(value.target)
        return None

    def constant(self, name: str) -> torch.Tensor | None:
        """The parameter or buffer that is this op's ``name``, or ``None``."""
        path = self.constant_path(name)
        if path is None:
            return None
        value = attribute(self.owner, path)
        return value if isinstance(value, torch.Tensor) else None

    def computes(self, name: str) -> bool:
        """Whether the constant ``name`` is computed in the graph (a weight that is no weight)."""
        value = self.arguments.get(name)
        return isinstance(value, fx.Node) and value.op != "get_attr"


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute of ``root`` at a dotted ``path``."""
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted ``path``: ``root.get_submodule(path)`` at a tenth of its time.

    Raises:
        AttributeError: there is none.
    """
    module = root
    for atom in path.split("."):
        children = module.__dict__.get("_modules")
        child = children.get(atom) if type(children) is dict else None
        if child is None:  # a module that keeps its children elsewhere, or no module
            return root.get_submodule(path)
        module = child
    return module


def kind_of(gm: fx.GraphModule, node: fx.Node) -> OpKind | None:
    """The kind of ``node``, or ``None`` for what the catalogue does not know."""
    if node.op == "call_module":
        return KIND_BY_MODULE.get(type(submodule(gm, str(node.target))))
    if node.op == "call_function":
        return KIND_BY_FUNCTION.get(node.target) or KIND_BY_QUALIFIED_NAME.get(
            f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')}"
        )
    if node.op == "call_method":
        return KIND_BY_METHOD.get(str(node.target))
    return None


def op_of(gm: fx.GraphModule, node: fx.Node) -> Op | None:
    """The view of ``node``, or ``None`` where it is no known op or its arguments do not bind.

    Args:
        gm: the module that owns the node's graph and parameters.
        node: any node of that graph.
    """
    kind = kind_of(gm, node)
    if kind is None:
        return None
    names = [name for name, _ in kind.signature]
    if node.op == "call_module":
        names = _module_parameters(kind, type(submodule(gm, str(node.target))))
    bound = _bind(kind, node, names)
    if bound is None:
        return None
    form = {
        "call_module": Form.MODULE,
        "call_function": Form.FUNCTION,
        "call_method": Form.METHOD,
    }[node.op]
    if form is Form.MODULE:
        module = submodule(gm, str(node.target))
        attributes = _attributes(type(module))
        for parameter, default in kind.signature[1:]:
            if parameter in kind.constants:
                bound.pop(parameter, None)
            elif parameter in attributes:
                bound[parameter] = getattr(module, attributes[parameter])
            elif parameter not in bound and default is not REQUIRED:
                bound[parameter] = default
        for parameter, attribute_name in attributes.items():
            bound.setdefault(parameter, getattr(module, attribute_name))
        bound.update(kind.fixed.get(type(module), {}))
        if "inplace" in bound:
            bound["inplace"] = bool(getattr(module, "inplace", False))
    elif any(bound.get(name, REQUIRED) is REQUIRED for name, _ in kind.signature):
        return None
    return Op(node=node, kind=kind, form=form, arguments=bound, owner=gm)


def type_of(gm: fx.GraphModule, node: fx.Node) -> object:
    """What ``object_type`` rules compare with: module class, function or method name.

    ``+=`` counts as ``+``, and so on; modules that train count as what they train.
    """
    if node.op == "call_module":
        written = type(submodule(gm, str(node.target)))
        return FLOAT_BY_QAT.get(written, written)
    return OUT_OF_PLACE_OPERATORS.get(node.target, node.target)


def type_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """The short name of :func:`type_of`, for reports."""
    found = type_of(gm, node)
    return found if isinstance(found, str) else str(getattr(found, "__name__", found))


def is_inplace(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` writes the tensor that is its first argument."""
    kind = kind_of(gm, node)
    if node.op == "call_module":
        return bool(getattr(submodule(gm, str(node.target)), "inplace", False))
    if kind is not None and node.target in kind.inplace:
        return True
    if node.op == "call_function" and kind is not None:
        bound = _bind(kind, node, [name for name, _ in kind.signature])
        return bound is not None and bound.get("inplace", False) is True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return False


def _attributes(module_type: type[nn.Module]) -> Mapping[str, str]:
    kind = KIND_BY_MODULE[module_type]
    return kind.modules.get(module_type) or next(iter(kind.modules.values()))


def _module_parameters(kind: OpKind, module_type: type[nn.Module]) -> list[str]:
    """Parameters of a module's ``forward``, in order: neither constants nor attributes."""
    own = (*kind.constants, *_attributes(module_type))
    return [name for name, _ in kind.signature if name not in own]


def _bind(kind: OpKind, node: fx.Node, names: list[str]) -> dict[str, Any] | None:
    args = list(node.args)
    if kind.variadic and node.op == "call_method" and len(args) > 1:
        rest = args[1:]
        args = [args[0], rest[0] if isinstance(rest[0], (tuple, list)) else tuple(rest)]
    if len(args) > len(names):
        return None
    bound = dict(kind.signature)
    bound.update(zip(names, args, strict=False))
    known = {name for name, _ in kind.signature} | {"inplace"}
    aliases = {"x": "input", "self": "input", "axis": "dim", "A": "input", "B": "other"}
    for key, value in node.kwargs.items():
        name = key if key in known else aliases.get(key)
        if name is None:
            if value is None or value is False or key.startswith("_"):
                continue  # it asks for nothing; F.softmax has a _stacklevel for its warnings
            return None
        bound[name] = value
    return bound
