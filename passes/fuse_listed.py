"""fuse-listed: functions of the user's backend config make one module of a pattern's modules.

::

    x -> conv -> bn -> add(_, y) -> relu        x -> conv(_, y), what the fuser method returned
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch.nn.functional as F
from torch import fx, nn

from fxquant.backend_config import BackendPatternConfig
from fxquant.backend_patterns import MatchAllNode, PatternCall
from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.op_view import type_of
from fxquant.pass_manager import Pass, PassContext, PassResult
from fxquant.rewriter import GraphRewriter

#: A node, or ``(node, operand, ...)`` in the shape of the pattern in reverse.
NodeTree = Any


@dataclass(frozen=True)
class FuseListed(Pass):
    """Replace each match of a pattern that has a fuser method by the module it returns.

    The fuser method is given copies of the modules: in forward order for a chain, in the shape of
    the reversed nested tuple for a pattern in that form, where functions stand for themselves,
    ``F.relu`` is an ``nn.ReLU``, and inputs and tensors are ``MatchAllNode``. The module takes
    the place of the root module (the deepest, or what ``root_node_getter`` picks), reads what that
    read and what ``extra_inputs_getter`` finds, and is quantized by its qconfig. A value in the
    middle that others read too keeps the pattern from matching. Longer patterns go first.

    Attributes:
        trains: the first argument of the fuser methods.

    Raises:
        ConfigError: a fuser method returned no module, or a getter no node of the match.
    """

    trains: bool = False

    name: ClassVar[str] = "fuse-listed"

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Fuse from the last op to the first."""
        allow = context.target.allow
        if allow is None or not allow.fusions:
            return PassResult(changes=0)
        rewriter = GraphRewriter(gm, self.name)
        patterns = sorted(allow.fusions, key=lambda config: -_length(config.forward))
        for node in reversed(list(gm.graph.nodes)):
            if node._erased:
                continue
            for config in patterns:
                tree = _match(gm, node, config.forward)
                if tree is not None:
                    _Fusion(rewriter, config, tree, node).run(trains=self.trains)
                    break
        return PassResult(changes=rewriter.finish())


def _length(call: PatternCall) -> int:
    return 1 + sum(_length(operand) for operand in call.operands if operand is not None)


def _match(gm: QuantGraphModule, node: fx.Node, call: PatternCall) -> NodeTree | None:
    """The nodes of a match that ends at ``node``."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    if type_of(gm, node) != call.op:
        return None
    if not call.operands:
        return node
    if len(node.args) < len(call.operands):
        return None
    found: list[NodeTree] = [node]
    for wanted, operand in zip(call.operands, node.args, strict=False):
        if not isinstance(operand, fx.Node):
            return None
        if wanted is None:
            found.append(operand)
            continue
        inner = _match(gm, operand, wanted) if len(operand.users) == 1 else None
        if inner is None:
            return None
        found.append(inner)
    return tuple(found)


@dataclass(frozen=True)
class _Fusion:
    """One match, to be replaced.

    Attributes:
        rewriter: of the graph.
        config: the pattern.
        tree: its nodes.
        last: the node whose value leaves the match.
    """

    rewriter: GraphRewriter
    config: BackendPatternConfig
    tree: NodeTree
    last: fx.Node

    def run(self, *, trains: bool) -> None:
        """Call the fuser method and let what it made take the place of the match."""
        gm = self.rewriter.gm
        members = list(_members(self.tree, self.config.forward))
        root = self._root(members)
        fused = self._fused(trains=trains)
        shared = any(
            other.op == "call_module" and other.target == root.target and other not in members
            for other in gm.graph.nodes
        )
        path = str(root.target)
        if shared:
            path = self.rewriter.fresh_path(f"{path}_fused")
        self.rewriter.set_module(path, fused)
        arguments, after = (*root.args, *self._extra_inputs()), self.last
        calls = []
        for part in _parts(path, fused):
            after = self.rewriter.module_call(part, arguments, after=after, like=root)
            arguments = (after,)
            calls.append(after)
        self._record(calls, root, [node for node in gm.graph.nodes if node in members])
        self.rewriter.replace_uses(self.last, calls[-1])
        for node in reversed([node for node in gm.graph.nodes if node in members]):
            self.rewriter.erase(node)

    def _record(self, calls: list[fx.Node], root: fx.Node, members: list[fx.Node]) -> None:
        """Let what was made speak for the match, and have the qconfig of its root."""
        record, last = record_of(root), record_of(self.last)
        origins = dict.fromkeys(o for n in members for o in record_of(n).origins or (n.name,))
        reason = f"fused by {_name(self.config.fuser_method)}()"
        for call in calls:
            update_record(
                call,
                qconfig=record.qconfig,
                rule=record.rule,
                reasons=(*record.reasons, reason),
                value=last.value,
                has_value=last.has_value,
                origins=tuple(origins) if call is calls[0] else (),
            )

    def _root(self, members: list[fx.Node]) -> fx.Node:
        getter = self.config._root_node_getter
        if getter is not None:
            root = getter(self.tree)
        else:
            root = self.tree
            while isinstance(root, tuple):
                root = root[-1]
        if root not in members or root.op != "call_module":
            raise ConfigError(
                f"the root of the pattern {self.config.forward} that ends at {self.last.name!r} is"
                f" {root!r}, which is no module of the match; set a root_node_getter that returns"
                " one"
            )
        assert isinstance(root, fx.Node)
        return root

    def _extra_inputs(self) -> list[fx.Node]:
        getter = self.config._extra_inputs_getter
        extra = [] if getter is None else list(getter(self.tree))
        wrong = next((item for item in extra if not isinstance(item, fx.Node)), None)
        if wrong is not None:
            raise ConfigError(
                f"extra_inputs_getter of the pattern {self.config.forward} returned {wrong!r} for"
                f" {self.last.name!r}; it needs to return nodes"
            )
        return extra

    def _fused(self, *, trains: bool) -> nn.Module:
        modules = self._modules(self.tree, self.config.forward)
        if self.config.pattern is not None:
            modules = tuple(reversed(list(_flat(modules))))
        elif not isinstance(modules, tuple):
            modules = (modules,)
        method = self.config.fuser_method
        assert method is not None
        fused = method(trains, *modules)
        if not isinstance(fused, nn.Module):
            raise ConfigError(
                f"fuser method {_name(method)}() of the pattern {self.config.forward} returned"
                f" {fused!r} for {self.last.name!r}; it needs to return a module"
            )
        return fused

    def _modules(self, tree: NodeTree, call: PatternCall) -> Any:
        """What the fuser method is given, in the shape of the pattern."""
        if isinstance(tree, tuple):
            inner = (
                self._module(operand) if wanted is None else self._modules(operand, wanted)
                for operand, wanted in zip(tree[1:], call.operands, strict=True)
            )
            return (self._module(tree[0]), *inner)
        return self._module(tree)

    def _module(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return copy.deepcopy(self.rewriter.gm.get_submodule(str(node.target)))
        if node.target is F.relu:
            return nn.ReLU().train(self.rewriter.gm.training)
        return MatchAllNode if node.op in ("placeholder", "get_attr") else node.target


def _parts(path: str, fused: nn.Module) -> list[str]:
    """The modules to call for ``fused``: those in it, where it is one of torch.ao's sequences."""
    if isinstance(fused, nn.Sequential) and type(fused).__module__.startswith(_SEQUENCES):
        return [f"{path}.{name}" for name, _ in fused.named_children()]
    return [path]


_SEQUENCES: Final = ("torch.ao.nn.intrinsic.modules", "torch.nn.intrinsic.modules")


def _members(tree: NodeTree, call: PatternCall) -> Iterator[fx.Node]:
    """The nodes that the pattern names, without what may be anything."""
    if not isinstance(tree, tuple):
        yield tree
        return
    yield tree[0]
    for operand, wanted in zip(tree[1:], call.operands, strict=True):
        if wanted is not None:
            yield from _members(operand, wanted)


def _flat(modules: Any) -> Iterator[Any]:
    if not isinstance(modules, tuple):
        yield modules
        return
    for item in modules:
        yield from _flat(item)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
