"""convert-nested: modules that were prepared on their own are converted on their own."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn

from fxquant.errors import LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of, update_record
from fxquant.observed import united_observer
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.to_reference import is_observer
from fxquant.qconfig import QConfig
from fxquant.rewriter import GraphRewriter

#: Gives the observer of a result; ``None`` where there is none.
Observed = Callable[[], Any]

#: (path, prepared module, its qconfig, observer of its result) -> the converted module; ``None``
#: leaves it.
Convert = Callable[[str, nn.Module, QConfig | None, Observed], nn.Module | None]


def nothing(path: str, module: nn.Module, qconfig: QConfig | None, observed: Observed) -> None:
    """No module was prepared on its own."""


@dataclass(frozen=True)
class ConvertNested(Pass):
    """Put in what ``convert`` makes of the modules that nest-modules put in.

    The observer of a result goes to the module, which quantizes its result itself; of several calls
    the union counts, since they are one module.

    Attributes:
        convert: converts one.
    """

    convert: Convert = nothing

    name: ClassVar[str] = "convert-nested"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.NESTED_CONVERTED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Convert each module once, and then mark its calls."""
        rewriter = GraphRewriter(gm, self.name)
        calls: dict[str, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if node.op == "call_module" and not is_observer(node):
                calls.setdefault(str(node.target), []).append(node)
        for path, nodes in calls.items():
            _Module(rewriter, path, nodes, context).convert(self.convert)
        return PassResult(changes=rewriter.finish())


@dataclass
class _Module:
    """One module and the nodes that call it.

    Attributes:
        rewriter: of the graph.
        path: where the module is.
        calls: in graph order.
        context: takes the warnings.
        observing: the nodes that observe their results.
    """

    rewriter: GraphRewriter
    path: str
    calls: list[fx.Node]
    context: PassContext
    observing: list[fx.Node] = field(default_factory=list)

    def convert(self, convert: Convert) -> None:
        """Replace the module, and take the observers of its results out of the graph."""
        gm = self.rewriter.gm
        observed = [n for n in self.calls if record_of(n).annotation is not None]
        self.observing = [u for n in observed for u in n.users if is_observer(u)]
        modules = [gm.get_submodule(str(n.target)) for n in self.observing]
        module = gm.get_submodule(self.path)
        qconfig = record_of(self.calls[0]).qconfig

        def observer() -> Any:
            return united_observer(modules) if modules else None

        made = convert(self.path, module, qconfig, observer)
        if made is None:
            self._leave_in_float()
            return
        self.rewriter.set_module(self.path, made)
        for node in self.observing:
            source = node.all_input_nodes[0]
            self.rewriter.replace_uses(node, source)
            self.rewriter.erase(node)
        for node in observed:
            gives = record_of(node).annotation
            update_record(node, gives_quantized=gives is not None and gives.output is not None)

    def _leave_in_float(self) -> None:
        """Let a module that nobody converts exchange floats, as it does in the prepared graph."""
        marked = [n for n in self.calls if record_of(n).takes_quantized]
        for node in marked:
            update_record(node, takes_quantized=(), gives_quantized=False)
            for item in _items(node):
                update_record(item, gives_quantized=False)
            self.rewriter.changes += 1
        if marked:
            kind = type(self.rewriter.gm.get_submodule(self.path)).__name__
            self.context.diagnostics.warn(
                f"module {self.path!r} ({kind}) was to be quantized on its own, but the config of"
                " convert maps its class to no quantized one; it computes in floating point. Name"
                " it with set_observed_to_quantized_mapping",
                LoweringWarning,
            )


def _items(node: fx.Node) -> list[fx.Node]:
    """What is taken out of the tuple that ``node`` gives, and out of that."""
    own = [user for user in node.users if user.target is operator.getitem]
    return [*own, *(item for user in own for item in _items(user))]
