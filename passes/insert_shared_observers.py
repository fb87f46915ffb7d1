"""insert-shared-observers: observers as torch.ao places them, one at every quantized value.

::

    x -> conv -> pool -> y        x -> obs_0 -> conv -> obs_1 -> pool -> obs_2 (= obs_1) -> y
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.dataflow import is_float_tensor
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.metadata import Annotation, record_of
from fxquant.observed import spec_of_observer
from fxquant.op_view import Form, op_of
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult
from fxquant.passes.insert_observers import OBSERVER_PREFIX, device_of, external_inputs, on_device
from fxquant.qconfig import QConfig, spec_of
from fxquant.rewriter import GraphRewriter, leaves_of
from fxquant.specs import QuantSpec


@dataclass(frozen=True)
class InsertSharedObservers(Pass):
    """Insert root modules ``activation_post_process_N``, numbered in the order of the ops.

    For every quantized op its inputs are observed first, by its own qconfig, unless something
    observed them already, and the weight of a function with them (that of a module is observed when
    it is final); then its output. An op that keeps the parameters of its input has the
    *same module* behind it under a new name, and an op of several inputs (cat) gives all of them
    the module of the first: what one of them sees, all do.
    """

    name: ClassVar[str] = "insert-shared-observers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ANNOTATED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Insert in graph order."""
        if gm.state.stage is Stage.PREPARED:
            return PassResult(changes=0)
        nodes = list(gm.graph.nodes)
        work = _Work(
            rewriter=GraphRewriter(gm, self.name),
            is_float=context.target.is_float,
            device=device_of(gm),
            by_name={node.name: node for node in nodes},
        )
        for node in nodes:
            work.observe(node)
        gm.update_state(stage=Stage.PREPARED)
        work.rewriter.changes += 1
        return PassResult(changes=work.rewriter.finish())


@dataclass
class _Work:
    """One run of the pass.

    Attributes:
        rewriter: of the graph.
        is_float: what counts as an activation.
        device: where observers go.
        by_name: the nodes that are not observers.
        behind: value -> the observers behind it, with what they look for.
    """

    rewriter: GraphRewriter
    is_float: Callable[[fx.GraphModule, fx.Node], bool]
    device: torch.device | None
    by_name: dict[str, fx.Node]
    behind: dict[fx.Node, list[tuple[QuantSpec, fx.Node]]] = field(default_factory=dict)
    number: int = 0

    def observe(self, node: fx.Node) -> None:
        """Observe what an op reads and what it gives."""
        record = record_of(node)
        annotation, qconfig = record.annotation, record.qconfig
        if qconfig is not None and record.takes_quantized:
            self._taken(node, qconfig)
        if annotation is None or qconfig is None:
            return
        for source, spec in self._activations(node):
            self._input(node, source, spec, qconfig, qconfig.activation)
        self._constants(node, annotation, qconfig)
        ends = record.fusion is None or record.fusion.last == node.name
        if not ends or annotation.output is None:
            return
        if annotation.shares:
            self._share(node, annotation.output, qconfig)
        else:
            self._insert(node, annotation.output, qconfig, qconfig.activation(), list(node.users))

    def _activations(self, node: fx.Node) -> list[tuple[fx.Node, QuantSpec]]:
        """What an op reads as integers; of a recurrent module the sequence, not the state.

        A module that no kernel serves and that a backend config lists reads all it is given.
        """
        gm = self.rewriter.gm
        op, annotation = op_of(gm, node), record_of(node).annotation
        if annotation is None or (op is not None and not op.kind.definition):
            return external_inputs(gm, node, self.is_float)
        spec = next(iter(annotation.inputs), None)  # modules nested here say what they take
        sources = node.all_input_nodes if op is None else op.activations
        return [(x, spec) for x in sources if spec is not None and self.is_float(gm, x)]

    def _taken(self, reader: fx.Node, qconfig: QConfig) -> None:
        """Observe what a module that is quantized on its own takes as quantized tensors."""
        factory = spec_of(qconfig.activation)
        if factory is None or factory.spec is None:
            return
        for position, leaves in enumerate(leaves_of(reader)):
            if position in record_of(reader).takes_quantized:
                for leaf in leaves:
                    if is_float_tensor(self.rewriter.gm, leaf):
                        self._input(reader, leaf, factory.spec, qconfig, qconfig.activation)

    def _constants(self, reader: fx.Node, annotation: Annotation, qconfig: QConfig) -> None:
        """Observe the weight of a function, where the observer chooses what the op table wants.

        Its bias stays as it is, but for a function in float16 throughout.
        """
        weight = _constant_of_function(self.rewriter.gm, reader, "weight")
        spec, activation = annotation.weight, next(iter(annotation.inputs), None)
        if weight is None or spec is None or spec_of_observer(qconfig.weight()) != spec:
            return
        self._input(reader, weight, spec, qconfig, qconfig.weight)
        bias = _constant_of_function(self.rewriter.gm, reader, "bias")
        if bias is None or activation is None or not activation.is_float or activation.is_dynamic:
            return
        self._input(reader, bias, activation, qconfig, qconfig.activation)

    def _input(
        self,
        reader: fx.Node,
        source: fx.Node,
        spec: QuantSpec,
        qconfig: QConfig,
        factory: Callable[[], Any],
    ) -> None:
        """Let ``reader`` read ``source`` through an observer, one that is there if it fits."""
        if record_of(source).gives_quantized and not spec.is_dynamic:
            return  # its scale and zero point come with it
        value = _observed_value(source)
        for found, node in self.behind.get(value, []):
            if not self._is_of_kind(value, node, factory):
                continue
            if found.dtype is spec.dtype and found.is_dynamic == spec.is_dynamic:
                if node is not source:
                    self.rewriter.replace_argument(reader, source, node)
                return
        self._insert(source, spec, qconfig, factory(), [reader])

    def _is_of_kind(self, value: fx.Node, node: fx.Node, factory: Callable[[], Any]) -> bool:
        """Whether an observer is what a reader's qconfig makes, or the producer's, for all."""
        annotation, wanted = record_of(value).annotation, spec_of(factory)
        if annotation is not None and annotation.output is not None:
            return True
        found = type(self.rewriter.gm.get_submodule(str(node.target))).__name__
        return wanted is None or found == wanted.name

    def _share(self, node: fx.Node, spec: QuantSpec, qconfig: QConfig) -> None:
        """Put the observer of the first input behind ``node`` and in place of the others."""
        gm = self.rewriter.gm
        first = self._head(node)
        sources = [s for s in first.all_input_nodes if _is_observer(s)]
        if not sources:
            self._insert(node, spec, qconfig, qconfig.activation(), list(node.users))
            return
        shared = gm.get_submodule(str(sources[0].target))
        for other in sources[1:]:
            gm.add_module(str(other.target), shared)
        self._insert(node, spec, qconfig, shared, list(node.users))

    def _head(self, node: fx.Node) -> fx.Node:
        fusion = record_of(node).fusion
        return node if fusion is None else self.by_name[fusion.first]

    def _insert(
        self,
        value: fx.Node,
        spec: QuantSpec,
        qconfig: QConfig,
        observer: Any,
        readers: list[fx.Node],
    ) -> None:
        gm = self.rewriter.gm
        path = f"{OBSERVER_PREFIX}{self.number}"
        self.number += 1
        if not hasattr(observer, "owner"):
            observer.owner = f"{path} (output of {value.name!r})"
        gm.add_module(path, on_device(observer, self.device))
        node = self.rewriter.module_call(path, (value,), after=value, like=value, qconfig=qconfig)
        for reader in readers:
            self.rewriter.replace_argument(reader, value, node)
        self.behind.setdefault(_observed_value(value), []).append((spec, node))


def _constant_of_function(gm: QuantGraphModule, node: fx.Node, name: str) -> fx.Node | None:
    """The read of the weight or bias of ``F.linear`` and its like."""
    op = op_of(gm, node)
    value = None if op is None or op.form is Form.MODULE else op.arguments.get(name)
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_observer(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX)


def _observed_value(node: fx.Node) -> fx.Node:
    """The value that a chain of observers looks at."""
    while _is_observer(node):
        node = node.all_input_nodes[0]
    return node
