"""A network that was calibrated once, and can be had with any layer in any precision.

The float graph is captured and folded once. Every value that some precision needs a range of is
watched in one run over the data, by one collector for each kind of statistics; ranges, weights and
corrected biases of a precision are computed from these by the very passes of ``prepare_fx`` and
``convert_to_reference_fx``. So the graph of an assignment is the one that preparing the model with
:meth:`CalibratedNetwork.mapping`, calibrating it on the same data and converting it would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch
from torch import fx, nn

from fxquant.calibration import Forward
from fxquant.capture import capture
from fxquant.errors import CalibrationError, ConfigError, Diagnostics, did_you_mean
from fxquant.graph_module import QuantGraphModule
from fxquant.ledger import build_ledger
from fxquant.metadata import record_of, update_record
from fxquant.op_view import op_of
from fxquant.own_copy import own_copy
from fxquant.pass_manager import Pass, PassContext, run_pass
from fxquant.passes.fuse_patterns import FusePatterns
from fxquant.passes.insert_channel_means import CHANNEL_AXES
from fxquant.passes.insert_observers import InsertObservers
from fxquant.passes.propagate_qconfigs import DEFAULT, subject
from fxquant.pipelines import prepare_pipeline, reference_pipeline
from fxquant.qconfig import QConfig, as_qconfig
from fxquant.qconfig_mapping import (
    ObjectType,
    QConfigMapping,
    get_default_qconfig_mapping,
    normalize,
)
from fxquant.sensitivity.feeding import bind_batches, inputs_of_first
from fxquant.sensitivity.layers import Layer, find_layers
from fxquant.sensitivity.statistics import Averaged, Statistics, Watched, watched
from fxquant.shapes import record_shapes
from fxquant.targets.registry import target_here

Precision = QConfig | Callable[[QConfig], QConfig] | None
"""A qconfig, a change of the qconfig that a layer has, or floating point."""
FP32: Final = "fp32"
"""The precision that is always there: floating point."""
INT8: Final = "int8"
"""The precision of the mapping that the network was made with."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a mapping names an op by: its module, or its type and number among the calls in one.

    Attributes:
        path: of the module.
        type: class, function or method name; ``None`` where the path says all.
        index: number of the call.
    """

    path: str
    type: ObjectType | None = None
    index: int = 0

    def set_on(self, mapping: QConfigMapping, qconfig: QConfig | None) -> None:
        """Add this rule to ``mapping``."""
        if self.type is None:
            mapping.set_module_name(self.path, qconfig)
        else:
            mapping.set_module_name_object_type_order(self.path, self.type, self.index, qconfig)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which layer is computed in which precision.

    Attributes:
        layers: layer name -> precision, a key of :attr:`CalibratedNetwork.precisions`.
        rest: precision of every other layer, and of the ops that belong to no layer.
    """

    layers: Mapping[str, str] = field(default_factory=dict)
    rest: str = INT8

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for assignments that say the same in the same words."""
        return (self.rest, tuple(sorted(self.layers.items())))


class CalibratedNetwork:
    """A folded float graph with its layers, its data, and statistics for every precision.

    Args:
        model: a float module in evaluation mode. It is not touched.
        data: batches, fed as :func:`fxquant.calibrate` says; they are kept, for calibration and for
            measuring.
        qconfig_mapping: what precision ``"int8"`` means, see :func:`fxquant.prepare_fx`.
        precisions: more precisions: name -> the qconfig of the layers that have it, or a function
            that makes it of the qconfig that they have. Ops with ranges of their own by default
            (sigmoid) keep them.
        example_inputs: see :func:`fxquant.prepare_fx`; where ``None``, the first batch serves.
        forward: ``forward(model, batch)`` calls ``model`` once with the inputs of a batch.
        num_batches: take at most so many batches.
        target: see :func:`fxquant.prepare_fx`.
        bias_correction: see :func:`fxquant.prepare_fx`.
        calibration_data: where ranges come from; where ``None``, from ``data``.

    Attributes:
        graph: the folded float graph, qconfigs of the mapping recorded.
        annotated: the same with the specs that lowering everything gives its ops.
        layers: what can be lowered, in graph order.
        batches: the inputs of each batch, bound to the graph's placeholders.
        watched_batches: the same of the batches that ranges come from.
        bias_correction: whether biases make up for rounded weights.
        precisions: every precision by name; ``INT8`` stands for the mapping and has no qconfig of
            its own.

    Raises:
        CalibrationError: the data hold no batch, or one that does not fit.
        ConfigError: a precision is no qconfig, or the mapping quantizes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
        *,
        precisions: Mapping[str, Precision] | None = None,
        example_inputs: Any = None,
        forward: Forward | None = None,
        num_batches: int | None = None,
        target: str = "x86",
        bias_correction: bool = True,
        calibration_data: Iterable[Any] | None = None,
    ) -> None:
        self.mapping_of_int8 = (
            get_default_qconfig_mapping("x86")
            if qconfig_mapping is None
            else normalize(qconfig_mapping)
        )
        self.precisions = _checked(precisions or {})
        diagnostics = Diagnostics()
        self.target = target_here(target, diagnostics)
        batches = list(islice(data, num_batches))
        if not batches:
            raise CalibrationError("the data hold no batch; pass at least one")
        if example_inputs is None:
            example_inputs = inputs_of_first(model, batches, forward)
        paths = tuple(name for name, _ in model.named_modules(remove_duplicate=False))
        pipeline = prepare_pipeline(self.mapping_of_int8, paths, bias_correction=bias_correction)
        at = next(i for i, p in enumerate(pipeline.passes) if isinstance(p, FusePatterns))
        self._marking, self._reference = pipeline.passes[at:], reference_pipeline().passes
        self.graph = capture(model, diagnostics, example_inputs, share=True)
        record_shapes(self.graph, example_inputs, diagnostics)
        self.graph.update_state(target=self.target.name, ledger=build_ledger(self.graph))
        context = PassContext(target=self.target, diagnostics=diagnostics)
        for item in pipeline.passes[:at]:
            run_pass(item, self.graph, context)
        self.batches = bind_batches(self.graph, batches, forward)
        self.bias_correction = bias_correction
        self.watched_batches = self.batches
        if calibration_data is not None:
            self.watched_batches = bind_batches(self.graph, calibration_data, forward)
        self.statistics = Statistics(self.graph, self.watched_batches)
        names = [INT8, *(name for name in self.precisions if name != FP32)]
        self._annotations = {name: self._annotated(name) for name in names}
        self.annotated = self._annotations[INT8]
        self.layers = find_layers(
            list(self._annotations.values()),
            {name: type(module) for name, module in model.named_modules()},
        )
        self._by_name = {layer.name: layer for layer in self.layers}
        self._calibrate()

    # -- layers -----------------------------------------------------------------------------------

    def layer(self, name: str) -> Layer:
        """The layer called ``name``.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._by_name:
            raise ConfigError(
                f"the network has no layer {name!r}{did_you_mean(name, self._by_name)}; layers are"
                " named like modules, or like the nodes of the float graph"
            )
        return self._by_name[name]

    def float_weight(self, path: str) -> torch.Tensor:
        """A weight of the folded float graph, by its path in :attr:`Layer.weights`."""
        found: Any = self.graph
        for atom in path.split("."):
            found = getattr(found, atom)
        assert isinstance(found, torch.Tensor)
        return found.detach()

    def qconfig_of(self, node: str, precision: str) -> QConfig | None:
        """The qconfig of a node of the float graph in a precision."""
        found = next(n for n in self.graph.graph.nodes if n.name == node)
        return self._qconfig(found, precision)

    def lowers(self, layer: str, precision: str) -> bool:
        """Whether a precision changes a layer at all, everything else lowered too."""
        if precision not in self._annotations:
            return False
        heads = self.layer(layer).heads
        records = [
            record_of(n) for n in self._annotations[precision].graph.nodes if n.name in heads
        ]
        return any(r.annotation is not None or r.runs_in is not None for r in records)

    # -- graphs -----------------------------------------------------------------------------------

    def prepared(self, assignment: Assignment) -> QuantGraphModule:
        """The calibrated graph with observers for an assignment; it is the caller's to change."""
        gm = self._marked(assignment)
        gm.recompile()
        return gm

    def _marked(self, assignment: Assignment) -> QuantGraphModule:
        """:meth:`prepared`, its code not written yet."""
        gm = self._assigned(assignment)
        self._run(self._marking, gm)
        self.statistics.fill(gm)
        return gm

    def reference(
        self, assignment: Assignment, *, without: tuple[type[Pass], ...] = ()
    ) -> QuantGraphModule:
        """The graph that computes an assignment, as :func:`fxquant.convert_to_reference_fx` has it.

        Args:
            assignment: which layer in which precision.
            without: classes of passes that are left out.

        Raises:
            ConfigError: a layer or precision that does not exist.
        """
        gm = self._marked(assignment)
        passes = tuple(item for item in self._reference if not isinstance(item, without))
        self._run(passes, gm)
        gm.recompile()
        return gm

    def mapping(self, assignment: Assignment) -> QConfigMapping:
        """What to give :func:`fxquant.prepare_fx` for an assignment."""
        self._check(assignment)
        if assignment.rest == INT8:
            mapping = QConfigMapping.from_dict(self.mapping_of_int8.to_dict())
            mapping._default_object_types = self.mapping_of_int8.default_object_types
        else:
            mapping = QConfigMapping().set_global(self._plain(assignment.rest))
        for name, precision in assignment.layers.items():
            if precision == assignment.rest:
                continue
            for rule, qconfig in self.rules(name, precision):
                rule.set_on(mapping, qconfig)
        return mapping

    def rules(self, layer: str, precision: str) -> list[tuple[Rule, QConfig | None]]:
        """The rules of a mapping that put a layer into a precision, one for each of its ops."""
        nodes = {node.name: node for node in self.graph.graph.nodes}
        targets = [str(n.target) for n in nodes.values() if n.op == "call_module"]
        found = []
        for member in self.layer(layer).nodes:
            node = nodes[member]
            if node.op == "call_module" and targets.count(str(node.target)) == 1:
                rule = Rule(str(node.target))
            else:
                rule = Rule(*subject(self.graph, node)["order_index"][0])
            found.append((rule, self._qconfig(node, precision)))
        return found

    def feeders(self, layer: str) -> tuple[str, ...]:
        """The layers whose results a layer reads, maybe through ops that only move values."""
        nodes = {node.name: node for node in self.graph.graph.nodes}
        owners = {node: other.name for other in self.layers for node in other.nodes}
        inside = set(self.layer(layer).nodes)
        pending = [s for n in inside for s in nodes[n].all_input_nodes if s.name not in inside]
        found: dict[str, None] = {}
        while pending:
            node = pending.pop(0)
            if node.name in owners:
                found[owners[node.name]] = None
            elif node.op != "get_attr":
                pending.extend(node.all_input_nodes)
        return tuple(found)

    def _check(self, assignment: Assignment) -> None:
        for name in assignment.layers:
            self.layer(name)
        for precision in {assignment.rest, *assignment.layers.values()}:
            if precision not in (INT8, *self.precisions):
                known = ", ".join(map(repr, (INT8, *self.precisions)))
                raise ConfigError(f"there is no precision {precision!r}; known are {known}")

    def _plain(self, precision: str) -> QConfig | None:
        """The qconfig of a precision that is the same for all layers."""
        found = self.precisions[precision]
        if found is None or isinstance(found, QConfig):
            return found
        raise ConfigError(
            f"precision {precision!r} is made of what each layer has, so it cannot be that of the"
            " rest: name the layers that have it"
        )

    def _qconfig(self, node: fx.Node, precision: str) -> QConfig | None:
        """The qconfig of a node in a precision."""
        record = record_of(node)
        if precision == INT8 or (record.rule.endswith(DEFAULT) and precision != FP32):
            return record.qconfig
        found = self.precisions[precision]
        if found is None or isinstance(found, QConfig) or record.qconfig is None:
            return found if isinstance(found, QConfig) else None
        return found(record.qconfig)

    def _assigned(self, assignment: Assignment) -> QuantGraphModule:
        """A copy of the float graph with the qconfigs of an assignment."""
        self._check(assignment)
        gm = own_copy(self.graph, share=True)
        assert isinstance(gm, QuantGraphModule)
        owners = {
            node: (name, precision)
            for name, precision in assignment.layers.items()
            for node in self.layer(name).nodes
        }
        for node in gm.graph.nodes:
            record = record_of(node)
            if node.name in owners:
                name, precision = owners[node.name]
                rule = record.rule if precision == INT8 else f"layer {name!r}"
                update_record(node, qconfig=self._qconfig(node, precision), rule=rule)
            elif assignment.rest != INT8 and record.rule:
                update_record(node, qconfig=self._plain(assignment.rest), rule="global")
        return gm

    def _annotated(self, precision: str) -> QuantGraphModule:
        """The graph with specs, everything that the mapping quantizes in one precision."""
        gm = own_copy(self.graph, share=True)
        assert isinstance(gm, QuantGraphModule)
        for node in gm.graph.nodes:
            if record_of(node).qconfig is not None:
                update_record(node, qconfig=self._qconfig(node, precision))
        at = next(i for i, p in enumerate(self._marking) if isinstance(p, InsertObservers))
        self._run(self._marking[:at], gm)
        return gm

    def _run(self, passes: Sequence[Pass], gm: QuantGraphModule) -> None:
        context = PassContext(target=self.target, diagnostics=Diagnostics(silent=True))
        gm.__dict__["recompile"] = (
            _not_yet  # each pass would write the code anew, which nobody runs
        )
        try:
            for item in passes:
                run_pass(item, gm, context, check=False)
        finally:
            del gm.__dict__["recompile"]

    def _calibrate(self) -> None:
        """Watch everything that lowering all layers, or any one alone, needs."""
        nodes = {node.name: node for node in self.graph.graph.nodes}
        values: list[Watched] = []
        means: list[Averaged] = []
        for precision in (INT8, *self.precisions):
            for layer in self.layers if precision != FP32 else ():
                for name in layer.nodes:
                    qconfig = self._qconfig(nodes[name], precision)
                    op = op_of(self.graph, nodes[name])
                    if qconfig is None or op is None:
                        continue
                    inside = set(layer.nodes)
                    near = [s.name for s in op.activations if s.name not in inside]
                    near += [layer.last] if name == layer.last else []
                    values += [watched(value, qconfig) for value in near if value in nodes]
                    if op.name in CHANNEL_AXES:
                        means.append((op.activations[0].name, CHANNEL_AXES[op.name]))
        self.statistics.collect(values, means)


def _not_yet() -> None:
    """Instead of writing a graph's code."""


def _checked(precisions: Mapping[str, Precision]) -> dict[str, Precision]:
    """Every precision but the mapping's, by name."""
    found: dict[str, Precision] = {FP32: None}
    for name, value in precisions.items():
        if name in (FP32, INT8):
            raise ConfigError(
                f"precision {name!r} has its meaning already; call yours another name"
            )
        makes = callable(value) and not isinstance(value, (type, QConfig))
        found[name] = value if makes else as_qconfig(value, f"precision {name!r}")
    return found
