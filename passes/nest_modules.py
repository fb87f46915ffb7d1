"""nest-modules: modules that are quantized on their own take the place of the float ones.

::

    y = self.float_part(x)      y = self.float_part(x), a module with observers of its own
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn

from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import Annotation, TensorRecord, ValueRecord, record_of, update_record
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.qconfig import QConfig, spec_of
from fxquant.rewriter import GraphRewriter, leaves_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """What becomes of a module that is quantized on its own.

    Attributes:
        module: takes the place of the float module; it computes on floats, and observes.
        takes: positions of arguments that are quantized tensors after conversion; ``None``: all.
        gives: positions of results that are quantized tensors after conversion, 0 where it is one
            tensor; ``None``: all.
        observed: a result that is one tensor is observed in the graph around it.
        results: the structure of its result, where no example inputs tell.
        qconfig: by which the graph around it observes.
        reason: why the graph does not look into it.
    """

    module: nn.Module
    takes: tuple[int, ...] | None = ()
    gives: tuple[int, ...] | None = ()
    observed: bool = False
    results: tuple[Any, ...] | None = None
    qconfig: QConfig | None = None
    reason: str = ""


#: (path, float module, its qconfig) -> what becomes of it; ``None`` leaves it as it is.
Nest = Callable[[str, nn.Module, QConfig | None], Nested | None]


def nothing(path: str, module: nn.Module, qconfig: QConfig | None) -> None:
    """No module is quantized on its own."""


@dataclass(frozen=True)
class NestModules(Pass):
    """Put in what ``nest`` makes of a called module, once for all calls of it.

    A result that is a tuple of quantized tensors is taken apart into its tensors, each of which is
    dequantized for those who want floats; who wants the tuple gets one of them.

    Attributes:
        nest: decides.
    """

    nest: Nest = nothing

    name: ClassVar[str] = "nest-modules"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QCONFIGS})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.NESTED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Replace modules in graph order."""
        work = _Work(GraphRewriter(gm, self.name), self.nest)
        calls = [node for node in gm.graph.nodes if node.op == "call_module"]
        found = [(node, nested) for node in calls if (nested := work.replace(node)) is not None]
        for node, nested in found:
            structure = _structure(node, nested)
            if nested.gives != () and isinstance(structure, tuple):
                _TakenApart(work.rewriter, node, nested.gives).deliver(node, structure)
        return PassResult(changes=work.rewriter.finish())


@dataclass
class _Work:
    """One run of the pass.

    Attributes:
        rewriter: of the graph.
        nest: decides.
        made: path -> what became of the module there.
    """

    rewriter: GraphRewriter
    nest: Nest
    made: dict[str, Nested | None] = field(default_factory=dict)

    def replace(self, node: fx.Node) -> Nested | None:
        """Put in the module that ``node`` is to call, and mark what it exchanges."""
        gm, path = self.rewriter.gm, str(node.target)
        if path not in self.made:
            module, qconfig = gm.get_submodule(path), record_of(node).qconfig
            nested = self.nest(path, module, qconfig)
            self.made[path] = nested
            if nested is not None:
                self.rewriter.set_module(path, nested.module)
        nested = self.made[path]
        if nested is not None:
            _mark(node, nested)
        return nested


def _mark(node: fx.Node, nested: Nested) -> None:
    count = len(leaves_of(node))
    takes = tuple(range(count)) if nested.takes is None else nested.takes
    one = not isinstance(_structure(node, nested), tuple)
    annotation = None
    factory = None if nested.qconfig is None else spec_of(nested.qconfig.activation)
    if nested.observed and one and factory is not None:
        annotation = Annotation(output=factory.spec)
    update_record(
        node,
        takes_quantized=tuple(position for position in takes if 0 <= position < count),
        gives_quantized=one and not nested.observed and nested.gives == (0,),
        annotation=annotation,
        qconfig=nested.qconfig,
        reasons=(f"opaque island: {nested.reason}",),
    )


def _structure(node: fx.Node, nested: Nested) -> ValueRecord:
    record = record_of(node)
    return record.value if record.has_value else nested.results


@dataclass
class _TakenApart:
    """A call whose result is a tuple: every tensor in it that is read, by an item of its own.

    Attributes:
        rewriter: of the graph.
        call: the call.
        gives: positions of the results that are quantized tensors; ``None``: all.
    """

    rewriter: GraphRewriter
    call: fx.Node
    gives: tuple[int, ...] | None

    def __post_init__(self) -> None:
        self.last = self.call
        self.known = record_of(self.call).has_value

    def deliver(
        self, node: fx.Node, value: tuple[ValueRecord, ...], *, whole: bool = False
    ) -> tuple[Any, ...]:
        """The parts of ``node``, nested as they are; who reads it whole reads them in a tuple.

        Args:
            node: gives a tuple.
            value: what is in it.
            whole: all parts are read, whoever reads ``node``.
        """
        users = list(node.users)
        readers = [user for user in users if not _is_item(user)]
        whole = whole or bool(readers)
        parts: list[Any] = []
        for index, part in enumerate(value):
            found = [u for u in users if _is_item(u) and u.args[1] in (index, index - len(value))]
            if not whole and not any(user.users for user in found):
                continue
            item = self.last = self.rewriter.call(
                operator.getitem, (node, index), after=self.last, like=node, value=part
            )
            for other in found:
                self.rewriter.replace_uses(other, item)
            if isinstance(part, tuple):
                parts.append(self.deliver(item, part, whole=whole))
            else:
                self._mark(item, index if node is self.call else None)
                parts.append(item)
        for reader in readers:
            self._rebuild(reader, node, tuple(parts))
        for user in users:
            if not user.users and _is_item(user):
                self.rewriter.erase(user)
        return tuple(parts)

    def _mark(self, item: fx.Node, position: int | None) -> None:
        chosen = self.gives is None or position in self.gives
        tensor = isinstance(record_of(item).value, TensorRecord) or not self.known
        update_record(item, gives_quantized=chosen and tensor)

    def _rebuild(self, reader: fx.Node, node: fx.Node, parts: tuple[Any, ...]) -> None:
        """Let ``reader`` read ``parts`` in the place of ``node``, as a tuple that is made there."""
        takes = reader.op == "call_module" and record_of(reader).takes_quantized
        made = parts if takes else self._tuple(reader, parts)
        reader.args = tuple(_replaced(argument, node, made) for argument in reader.args)
        reader.kwargs = {key: _replaced(v, node, made) for key, v in reader.kwargs.items()}
        self.rewriter.changes += 1

    def _tuple(self, reader: fx.Node, parts: tuple[Any, ...]) -> fx.Node:
        items = [self._tuple(reader, part) if isinstance(part, tuple) else part for part in parts]
        value = tuple(record_of(item).value for item in items)
        return self.rewriter.call(tuple, (items,), before=reader, like=self.call, value=value)


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _replaced(argument: Any, old: fx.Node, new: Any) -> Any:
    if argument is old:
        return new
    if isinstance(argument, (tuple, list)):
        return type(argument)(_replaced(item, old, new) for item in argument)
    if isinstance(argument, dict):
        return {key: _replaced(item, old, new) for key, item in argument.items()}
    return argument
