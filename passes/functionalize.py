"""functionalize: ``relu_(y); use(y)  ->  z = relu(y); use(z)``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.attribute_paths import set_attribute
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, record_of, shape_of
from fxquant.op_view import OUT_OF_PLACE_OPERATORS
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.patterns.aliasing import Aliasing, written_value
from fxquant.rewriter import GraphRewriter

_OTHER_MEANING = frozenset(
    {"bernoulli", "float_power", "requires_grad", "resize", "resize_as"}
    | {"logical_and", "logical_or", "logical_xor", "logical_not"}
    | {"eq", "ne", "lt", "le", "gt", "ge"}
    | {"not_equal", "less", "less_equal", "greater", "greater_equal"}
)
"""Names whose form without underscore gives other values or another dtype."""


@dataclass(frozen=True)
class Functionalize(Pass):
    """Replace ops that write their input by their out-of-place forms.

    Later readers of the overwritten value read the new value instead, which is what they saw.
    Refuses where a tensor that may be a view of the overwritten one is read later (it would have
    changed too), where a parameter or buffer is written (the next call would read it), and where
    the op has no form that gives the same values. An input of the model is no longer written.
    """

    name: ClassVar[str] = "functionalize"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Rewrite in-place ops; every refusal names what forbids it."""
        work = _Work(gm, GraphRewriter(gm, self.name))
        for node, written in work.writers():
            work.rewrite(node, written)
        work.flip_modules()
        return PassResult(changes=work.rewriter.finish(), refusals=tuple(work.refusals))


@dataclass
class _Work:
    """One run of the pass.

    Attributes:
        gm: the module.
        rewriter: counts the changes.
        refusals: the in-place ops that stay.
        modules: the calls of in-place modules that may lose the flag, by module.
        kept: paths of modules of which some call must keep it.
    """

    gm: QuantGraphModule
    rewriter: GraphRewriter
    refusals: list[Refusal] = field(default_factory=list)
    modules: dict[str, list[fx.Node]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in self.gm.graph.nodes:
            self.rewriter.changes += _name_flag(node)
        self.position = {node: index for index, node in enumerate(self.gm.graph.nodes)}
        self.aliasing = Aliasing(self.gm, self.position)

    def writers(self) -> list[tuple[fx.Node, fx.Node]]:
        """Every node that writes a value in place, with that value, in graph order."""
        found = [(node, written_value(self.gm, node)) for node in self.position]
        return [(node, written) for node, written in found if written is not None]

    def rewrite(self, node: fx.Node, written: fx.Node) -> None:
        """Make one op functional, or say why not."""
        written = written_value(self.gm, node) or written  # as an earlier rewrite left it
        external = self.aliasing.external(written)
        if external is not None and external.op == "get_attr":
            self.refuse(
                node,
                f"{node.name!r} writes {str(external.target)!r} in place, which the next call of"
                " the model reads",
                external.name,
            )
            return
        replacement = self.out_of_place(node)
        if replacement is None:
            self.refuse(
                node,
                f"{node.name!r} ({node.target}) writes {written.name!r} in place and has no known"
                " out-of-place form",
            )
            return
        wider = _promoting_operand(node, written)
        if wider is not None:
            self.refuse(
                node,
                f"{node.name!r} writes {written.name!r} in place and keeps its dtype; out of place"
                f" it would take the dtype of {wider.name!r}",
                wider.name,
            )
            return
        if node.target in OUT_OF_PLACE_OPERATORS and not _is_tensor(written):
            self.rewrite_operator(node, written, replacement)
            return
        reader = self.redirect(node, written)
        if reader is not None:
            self.refuse(
                node,
                f"{node.name!r} writes {written.name!r} in place, and {reader.name!r} reads"
                " afterwards what may be a view of it",
                reader.name,
            )
            return
        replacement()
        self.rewriter.changes += 1

    def rewrite_operator(
        self, node: fx.Node, written: fx.Node, replacement: Callable[[], None]
    ) -> None:
        """``+=`` on what may be a number: it writes nothing then, so nobody is redirected."""
        reader = self.aliasing.reader_after(written, node)
        if reader is not None and not _is_number(written):
            self.refuse(
                node,
                f"{node.name!r} may write {written.name!r} in place, and {reader.name!r} reads"
                " afterwards what may be its memory; example inputs would tell whether it is a"
                " tensor",
                reader.name,
            )
            return
        replacement()
        self.rewriter.changes += 1

    def refuse(self, node: fx.Node, reason: str, *culprits: str) -> None:
        """Leave ``node`` in place."""
        self.refusals.append(Refusal(node=node.name, reason=reason, culprits=culprits))
        if node.op == "call_module":
            self.kept.add(str(node.target))

    def redirect(self, node: fx.Node, written: fx.Node) -> fx.Node | None:
        """Let later readers of ``written`` read ``node``, unless a view is read later too.

        Returns:
            The reader of the view, in which case nothing was changed.
        """
        if self.aliasing.reader_after(written, node) is None:
            return None
        after = [
            user
            for user in written.users
            if user is not node and self.position[user] > self.position[node]
        ]
        before = [(user, user.args, user.kwargs) for user in after]
        for user in after:
            user.replace_input_with(written, node)
        reader = Aliasing(self.gm, self.position).reader_after(written, node)
        if reader is not None:
            for user, args, kwargs in before:
                user.args, user.kwargs = args, kwargs
        return reader

    def out_of_place(self, node: fx.Node) -> Callable[[], None] | None:
        """What turns ``node`` into its out-of-place form, or ``None`` where there is none."""
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if not type(module).__module__.startswith("torch.nn."):
                return None
            return lambda: self.modules.setdefault(str(node.target), []).append(node)
        if node.kwargs.get("inplace") is True:
            return lambda: setattr(node, "kwargs", {**node.kwargs, "inplace": False})
        target = _out_of_place_target(node)
        return None if target is None else lambda: setattr(node, "target", target)

    def flip_modules(self) -> None:
        """Clear the flag of in-place modules, of a copy where another call needs the flag."""
        for path, nodes in self.modules.items():
            module = self.gm.get_submodule(path)
            if path in self.kept:
                module = copy.deepcopy(module)
                copied = self.rewriter.fresh_path(f"{path}_out_of_place")
                set_attribute(self.gm, copied, module)
                for node in nodes:
                    node.target = copied
            module.inplace = False  # type: ignore[assignment]  # nn.Module types attributes as tensors or modules


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(record_of(node).value, TensorRecord)


def _is_number(node: fx.Node) -> bool:
    record = record_of(node)
    return record.has_value and isinstance(record.value, (bool, int, float, str))


def _name_flag(node: fx.Node) -> bool:
    """Give an ``inplace=True`` that is given by position by name; whether there was one."""
    if node.op != "call_function":
        return False
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]  # a function's node has a callable target
    except (TypeError, ValueError):  # a builtin; those have no flag
        return False
    position = names.index("inplace") if "inplace" in names else len(node.args)
    if position >= len(node.args) or node.args[position] is not True:
        return False
    node.kwargs = {**node.kwargs, **dict(zip(names[position:], node.args[position:], strict=False))}
    node.args = node.args[:position]
    return True


def _out_of_place_target(node: fx.Node) -> Any:
    """``"relu_"`` -> ``"relu"``, ``torch.relu_`` -> ``torch.relu``, ``iadd`` -> ``add``.

    ``resize_`` to the shape that is there is ``reshape``; to another it may show other memory.
    """
    if node.kwargs.get("out") is not None:
        return None
    if node.target in OUT_OF_PLACE_OPERATORS:
        return OUT_OF_PLACE_OPERATORS[node.target]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "resize_" and _keeps_shape(node):
        return "reshape"
    plain = name.removesuffix("_")
    if plain == name or plain in _OTHER_MEANING:
        return None
    if node.op == "call_method":
        return plain if callable(getattr(torch.Tensor, plain, None)) else None
    known = [space for space in (torch, F) if getattr(space, name, None) is node.target]
    return next((getattr(space, plain) for space in known if hasattr(space, plain)), None)


def _keeps_shape(node: fx.Node) -> bool:
    """Whether ``node`` gives its first argument in the shape that it has."""
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    return before is not None and before == after


def _promoting_operand(node: fx.Node, written: fx.Node) -> fx.Node | None:
    """An operand whose dtype the out-of-place result would have, or ``None``."""
    value = record_of(written).value
    if not isinstance(value, TensorRecord):
        return None
    for operand in node.all_input_nodes:
        other = record_of(operand).value
        if not isinstance(other, TensorRecord) or not other.shape:
            continue
        if torch.promote_types(value.dtype, other.dtype) != value.dtype:
            return operand
    return None
