"""The one object that changes a graph: it keeps metadata, records who did what, and counts."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.attribute_paths import delete_attribute, set_attribute
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.metadata import (
    NodeRecord,
    TensorRecord,
    ValueRecord,
    record_of,
    set_record,
    update_record,
)
from fxquant.op_view import attribute


@dataclass
class GraphRewriter:
    """Inserts, replaces and erases nodes of one module on behalf of one pass.

    Attributes:
        gm: the module whose graph is changed.
        made_by: name of the pass, kept on every node it makes.
        changes: number of insertions, replacements and erasures so far.
    """

    gm: QuantGraphModule
    made_by: str
    changes: int = field(default=0, init=False)
    _orphans: list[str] = field(default_factory=list, init=False)

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        like: fx.Node,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> fx.Node:
        """Insert a function call.

        Args:
            target: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            before: insert before this node ...
            after: ... or after this one.
            like: the node whose stack trace, scope and value record the new node inherits.
            name: wished-for node name.
            dtype: dtype of the result where it differs from that of ``like``.
            changes: further fields of the new node's record.
        """
        return self._insert(
            "call_function", target, args, kwargs or {}, before, after, like, name, dtype, changes
        )

    def module_call(
        self,
        path: str,
        args: tuple[Any, ...],
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        like: fx.Node,
        **changes: Any,
    ) -> fx.Node:
        """Insert a call of the submodule at ``path``; arguments as for :meth:`call`."""
        name = path.replace(".", "_")
        return self._insert("call_module", path, args, {}, before, after, like, name, None, changes)

    def get_attr(
        self, path: str, *, before: fx.Node, like: fx.Node | None = None, name: str | None = None
    ) -> fx.Node:
        """Insert a read of the parameter, buffer or constant at ``path``."""
        graph = self.gm.graph
        with graph.inserting_before(before):
            node = graph.create_node("get_attr", path, name=name or path.replace(".", "_"))
        value = attribute(self.gm, path)
        record = NodeRecord(made_by=self.made_by)
        if isinstance(value, torch.Tensor) and not value.is_mkldnn:
            record = replace(
                record,
                value=TensorRecord(shape=tuple(value.shape), dtype=value.dtype),
                has_value=self.gm.state.shapes_known,
            )
        set_record(node, record)
        if like is not None and like.stack_trace is not None:
            node.stack_trace = like.stack_trace
        self.changes += 1
        return node

    def new_buffer(self, wish: str, value: torch.Tensor) -> str:
        """Register ``value`` on the root under a free name near ``wish`` and return the name."""
        name = self.fresh_name(wish)
        set_attribute(self.gm, name, value)
        self.changes += 1
        return name

    def fresh_name(self, wish: str, taken: Container[str] = ()) -> str:
        """``wish`` with dots as underscores, numbered where the root already has it.

        Args:
            wish: the name.
            taken: names that the root will have.
        """
        base = wish.replace(".", "_")
        name, number = base, 0
        while name in taken or has_own(self.gm, name):
            number += 1
            name = f"{base}_{number}"
        return name

    def fresh_path(self, wish: str) -> str:
        """A dotted path near ``wish`` at which nothing is stored yet (``None`` counts as free)."""
        path, number = wish, 0
        while _stored(self.gm, path):
            number += 1
            path = f"{wish}_{number}"
        return path

    def set_tensor(self, path: str, value: torch.Tensor) -> None:
        """Replace the parameter or buffer at ``path``."""
        set_attribute(self.gm, path, value)
        self.changes += 1

    def set_module(self, path: str, module: nn.Module) -> None:
        """Put ``module`` at ``path``, in the place of what is there."""
        set_attribute(self.gm, path, module)
        self.changes += 1

    def retarget(
        self,
        node: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Turn ``node`` into a call of ``target``, keeping its name, users and metadata."""
        op, old = node.op, str(node.target)
        node.op = "call_function"
        node.target = target
        node.args = args
        node.kwargs = kwargs or {}
        self.changes += 1
        if op == "call_module":
            update_record(node, module=old)
        if op in ("call_module", "get_attr"):
            self._orphans.append(old)

    def replace_arguments(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """Call ``node`` with other positional arguments."""
        node.args = args
        self.changes += 1

    def rename_packed(self, named: Mapping[str, PackRecord]) -> None:
        """Keep packed constants under other names, and read them there.

        Args:
            named: name -> the record that takes the place of the one with this name.
        """
        gm = self.gm
        gm.update_state(packs=tuple(named.get(pack.name, pack) for pack in gm.state.packs))
        for name in named:
            gm.__dict__.pop(name, None)
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target in named:
                node.target = named[str(node.target)].name
        self.changes += len(named)

    def retarget_module(
        self,
        node: fx.Node,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Turn ``node`` into a call of the submodule at ``path``."""
        node.op = "call_module"
        node.target = path
        node.args = args
        node.kwargs = kwargs or {}
        self.changes += 1

    def retarget_method(self, node: fx.Node, method: str) -> None:
        """Let ``node``, a call without a module, call a method with the same arguments."""
        node.op = "call_method"
        node.target = method
        self.changes += 1

    def replace_argument(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let ``user`` read ``new`` wherever it read ``old``."""
        user.replace_input_with(old, new)
        self.changes += 1

    def replace_leaf(
        self, user: fx.Node, old: fx.Node, new: fx.Node, *, keep: Container[int] = ()
    ) -> None:
        """Let ``user`` read ``new`` for ``old``, but not in the arguments at positions ``keep``.

        Positions are those of :func:`leaves_of`.
        """
        made = [
            item if i in keep else fx.map_arg(item, lambda leaf: new if leaf is old else leaf)
            for i, item in enumerate(_arguments(user))
        ]
        if user.op == "output":
            whole = user.args[0]
            user.args = (type(whole)(made) if isinstance(whole, (tuple, list)) else made[0],)
        else:
            count = len(user.args)
            user.args = tuple(made[:count])
            user.kwargs = dict(zip(user.kwargs, made[count:], strict=True))
        self.changes += 1

    def replace_uses(self, old: fx.Node, new: fx.Node, *, keep: tuple[fx.Node, ...] = ()) -> None:
        """Let every user of ``old`` but those in ``keep`` read ``new``."""
        skip = {new, *keep}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in skip)
        self.changes += 1

    def absorb(self, survivor: fx.Node, gone: fx.Node) -> None:
        """Let ``survivor`` carry out ``gone`` too: its users, its origins; then erase ``gone``."""
        origins = record_of(survivor).origins
        added = tuple(o for o in record_of(gone).origins if o not in origins)
        reasons = record_of(survivor).reasons
        more = tuple(r for r in record_of(gone).reasons if r not in reasons)
        update_record(survivor, origins=(*origins, *added), reasons=(*reasons, *more))
        self.replace_uses(gone, survivor)
        self.erase(gone)

    def erase(self, node: fx.Node) -> None:
        """Erase a node without users, and the modules and tensors that only it used."""
        self.gm.graph.erase_node(node)
        self.changes += 1
        if node.op in ("call_module", "get_attr"):
            self._orphans.append(str(node.target))

    def erase_dead(self, nodes: list[fx.Node]) -> None:
        """Erase those of ``nodes``, and then of their arguments, that nobody reads."""
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node.users or node.op in ("placeholder", "output") or node._erased:
                continue
            arguments = list(node.all_input_nodes)
            self.erase(node)
            pending.extend(arguments)

    def finish(self) -> int:
        """Recompile when something changed; returns the number of changes."""
        if self.changes:
            self._drop_orphans()
            self.gm.recompile()
        return self.changes

    def _drop_orphans(self) -> None:
        """Delete the modules and tensors that nothing reads any more."""
        if not self._orphans:
            return
        used = {str(n.target) for n in self.gm.graph.nodes if n.op in ("call_module", "get_attr")}
        for node in self.gm.graph.nodes:
            used.update(name for _, name in record_of(node).bound)
        for pack in self.gm.state.packs:
            used.update((pack.name, *pack.tensors))
        used.update(n.target for n in self.gm.state.reference if n.op == "get_attr")
        holders = {path for name in used for path in paths_to(name)}
        for path in dict.fromkeys(self._orphans):
            inside = any(holder in used for holder in paths_to(path))
            if inside or not _stored(self.gm, path):
                continue
            if path not in holders:
                delete_attribute(self.gm, path)
            else:  # a module that is read in parts: a batch-norm without its num_batches_tracked
                self._drop_unread(path, used)
        self._orphans.clear()

    def _drop_unread(self, path: str, used: set[str]) -> None:
        """Delete the tensors below ``path`` that nothing reads."""
        module = attribute(self.gm, path)
        if not isinstance(module, torch.nn.Module):
            return
        for name, _ in [*module.named_parameters(), *module.named_buffers()]:
            if not any(holder in used for holder in paths_to(f"{path}.{name}")):
                delete_attribute(self.gm, f"{path}.{name}")

    def _insert(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: fx.Node | None,
        after: fx.Node | None,
        like: fx.Node,
        name: str | None,
        dtype: torch.dtype | None,
        changes: dict[str, Any],
    ) -> fx.Node:
        graph = self.gm.graph
        place = (
            graph.inserting_before(before)
            if before is not None
            else graph.inserting_after(after or like)
        )
        with place:
            node = graph.create_node(op, target, args, kwargs, name=name)
        model = record_of(like)
        record = NodeRecord(
            value=_with_dtype(model.value, dtype),
            has_value=model.has_value,
            scope=model.scope,
            scope_types=model.scope_types,
            made_by=self.made_by,
        )
        set_record(node, replace(record, **changes))
        if like.stack_trace is not None:
            node.stack_trace = like.stack_trace
        self.changes += 1
        return node


def has_own(gm: QuantGraphModule, name: str) -> bool:
    """Whether ``gm`` has an attribute of this name; packs nothing, and makes no view of a kernel.

    Unlike ``hasattr``, which does both.
    """
    stores = (gm.__dict__, gm._parameters, gm._buffers, gm._modules)
    return any(name in store for store in stores) or hasattr(type(gm), name)


def paths_to(path: str) -> tuple[str, ...]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    if "." not in path:
        return (path,)
    atoms = path.split(".")
    return tuple(".".join(atoms[:i]) for i in range(1, len(atoms) + 1))


def leaves_of(node: fx.Node) -> list[list[fx.Node]]:
    """The nodes in each argument of ``node``: by position, then by name; of the output, by result.

    What is returned as anything but a tuple or a list is one result.
    """
    found: list[list[fx.Node]] = []
    for item in _arguments(node):
        leaves: list[fx.Node] = []
        fx.map_arg(item, leaves.append)
        found.append(leaves)
    return found


def _arguments(node: fx.Node) -> list[Any]:
    if node.op == "output":
        whole = node.args[0]
        return list(whole) if isinstance(whole, (tuple, list)) else [whole]
    return [*node.args, *node.kwargs.values()]


def _stored(root: object, path: str) -> bool:
    value: object = root
    for atom in path.split("."):
        value = getattr(value, atom, None)
        if value is None:
            return False
    return True


def _with_dtype(value: ValueRecord, dtype: torch.dtype | None) -> ValueRecord:
    if dtype is None or not isinstance(value, TensorRecord):
        return value
    return replace(value, dtype=dtype)
