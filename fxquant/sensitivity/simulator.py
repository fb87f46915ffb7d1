"""Simulated int8: a network with any layer in any precision, prefixes computed once.

::

    network = CalibratedNetwork(model, data, qconfig_mapping)     # one calibration for everything
    simulator = Simulator(network, memory_budget=1 << 30)
    floats = simulator.program(Assignment(rest="fp32"))
    simulator.anchor(floats)                                      # prefixes of this one are kept

    one = simulator.program(Assignment({"layer1.0.conv1": "int8"}, rest="fp32"))
    outputs = simulator.outputs(one)                              # one value for each batch
    module = one.module                                           # the same as a GraphModule

*Programs.* An :class:`~fxquant.sensitivity.network.Assignment` says which layer is computed in
which precision (``"fp32"``, ``"int8"``, and what the network was given: bf16, another observer,
dynamic, ...). Its program is the reference graph that preparing the model with
``network.mapping(assignment)`` and converting it would give, to the last bit: the same passes make
it, from one calibration, without tracing, folding or calibrating again (some tens of milliseconds).
``parts`` lowers parts of layers only, for attribution: the weight, the inputs, the output.

*Reuse.* Every value of a program has a number that stands for how it is computed: the op, its
options, the content of its constants, the numbers of its inputs. Two programs that give a value the
same number compute the same value, so what is upstream of all differences is shared, in either
direction and between any two candidates. What is worth keeping is where a program leaves an
*anchor*: a value that an anchored program has too and whose reader it has not. A sweep in graph
order thus computes each anchored value about once, and keeps one cut through the network.

*Memory.* Kept values take at most ``memory_budget`` bytes, for all batches together. What does not
fit is written to ``spill_directory`` where one is given, else computed again from what is there.
The values of the batch at hand, and float weights while they are in use, come on top, as in any run
of the network.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fxquant.autocast import no_autocast
from fxquant.dataflow import is_float_tensor
from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_view import attribute, op_of
from fxquant.operators import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC
from fxquant.own_copy import own_copy
from fxquant.passes.absorb_clamps import AbsorbClamps
from fxquant.passes.cancel_quantize import CancelQuantize
from fxquant.rewriter import GraphRewriter
from fxquant.sensitivity.activations import ActivationStore, StoreCounts
from fxquant.sensitivity.feeding import placeholder_value
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.network import FP32, Assignment, CalibratedNetwork

PARTS: Final = ("weight", "input", "output")
"""What of a layer can be lowered alone."""


@dataclass(eq=False, slots=True)
class Program:
    """A graph to be run, with a number for every value.

    Attributes:
        assignment: which layer in which precision.
        module: the graph as a module, which can be called.
        numbers: node name -> number of its value.
        constants: values that depend on no input, by node, once they were needed.
    """

    assignment: Assignment
    module: QuantGraphModule
    numbers: dict[str, int]
    fixed: frozenset[str]
    constants: dict[str, Any] = field(default_factory=dict)

    def node(self, name: str) -> fx.Node:
        """The node called ``name``."""
        return find_node(self.module, name)

    @property
    def output(self) -> fx.Node:
        """The node that returns."""
        found = [node for node in self.module.graph.nodes if node.op == "output"]
        assert isinstance(found[0], fx.Node)
        return found[0]


class Simulator:
    """Runs programs of one network on its batches, sharing what they have in common.

    Args:
        network: the network, calibrated.
        memory_budget: the most bytes that kept activations may take, all batches together.
        spill_directory: where activations that do not fit are written; ``None`` computes them
            again. Written files are deleted as they go out of use, and by :meth:`close`.

    Attributes:
        computed: nodes that were run so far, for tests and reports.
    """

    def __init__(
        self,
        network: CalibratedNetwork,
        *,
        memory_budget: int = 1 << 30,
        spill_directory: str | Path | None = None,
    ) -> None:
        if memory_budget < 0:
            raise ConfigError(f"memory_budget must be a number of bytes >= 0, got {memory_budget}")
        directory = None if spill_directory is None else Path(spill_directory)
        self.network = network
        self.store = ActivationStore(memory_budget, directory)
        self.computed = 0
        self._numbers: dict[Any, int] = {}
        self._anchored: set[int] = set()
        self._digests = _Digests(network.graph)
        self._floats: QuantGraphModule | None = None
        self._float_result: int | None = None
        self._last_apart: tuple[Any, QuantGraphModule] | None = None

    @property
    def counts(self) -> StoreCounts:
        """What was kept, spilled and refused so far."""
        return self.store.counts

    def close(self) -> None:
        """Forget kept activations and delete spilled ones."""
        self.store.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- programs ---------------------------------------------------------------------------------

    def program(self, assignment: Assignment, *, parts: Collection[str] | None = None) -> Program:
        """The program of an assignment.

        Args:
            assignment: which layer in which precision.
            parts: lower only these parts of the layers that the assignment names; of
                :data:`PARTS`. The rest must be ``"fp32"``. ``None`` lowers layers as convert does:
                weights and inputs, and outputs where a reader wants integers.

        Raises:
            ConfigError: a layer, precision or part that does not exist.
        """
        if parts is None:
            return self.program_of(assignment, self.network.reference(assignment))
        unknown = [part for part in parts if part not in PARTS]
        if unknown or assignment.rest != FP32:
            raise ConfigError(
                f"parts of a layer are {', '.join(PARTS)}, and everything else is in"
                f" {FP32!r} then; got parts={list(parts)} and rest={assignment.rest!r}"
            )
        gm = own_copy(self._apart(assignment), share=True)
        assert isinstance(gm, QuantGraphModule)
        _lower_parts(gm, self.network, assignment, parts, self._float_graph())
        return self.program_of(assignment, gm)

    def alone(self, layers: Collection[str], precision: str) -> Program:
        """The program in which these layers alone are lowered.

        An op that has no kernel which writes floats (a matrix product, a sum) is lowered only where
        its readers take integers, which none does here: its inputs and its output are rounded.
        """
        assignment = Assignment(dict.fromkeys(layers, precision), FP32)
        program = self.program(assignment)
        if self._float_result is None:
            floats = self.program_of(Assignment(rest=FP32), self._float_graph())
            self._float_result = floats.numbers[floats.output.name]
        same = program.numbers[program.output.name] == self._float_result
        if same and any(self.network.lowers(name, precision) for name in layers):
            return self.program(assignment, parts=("input", "output"))
        return program

    def _apart(self, assignment: Assignment) -> QuantGraphModule:
        """The graph of an assignment with every conversion in its place, nothing absorbed."""
        if self._last_apart is None or self._last_apart[0] != assignment.key:
            gm = self.network.reference(assignment, without=(AbsorbClamps, CancelQuantize))
            self._last_apart = (assignment.key, gm)
        return self._last_apart[1]

    def _float_graph(self) -> QuantGraphModule:
        if self._floats is None:
            self._floats = self.network.reference(Assignment(rest=FP32))
        return self._floats

    def program_of(self, assignment: Assignment, module: QuantGraphModule) -> Program:
        """A program of a reference graph that was made, or changed, elsewhere.

        Args:
            assignment: what it says it is.
            module: with the inputs of the network, and names of the network's nodes where they
                compute the same.
        """
        numbers: dict[str, int] = {}
        fixed: set[str] = set()
        for node in module.graph.nodes:
            numbers[node.name] = self._number(module, node, numbers)
            sources = node.all_input_nodes
            if node.op == "get_attr" or (sources and all(s.name in fixed for s in sources)):
                fixed.add(node.name)
        return Program(
            assignment=assignment, module=module, numbers=numbers, fixed=frozenset(fixed)
        )

    def anchor(self, program: Program) -> None:
        """Keep values of ``program`` where other programs leave it."""
        self._anchored.update(
            number for name, number in program.numbers.items() if name not in program.fixed
        )

    def _number(self, gm: QuantGraphModule, node: fx.Node, numbers: Mapping[str, int]) -> int:
        """Equal for values that are computed in the same way from the same constants."""
        if node.op == "placeholder":
            key: Any = ("input", node.target)
        elif node.op == "get_attr":
            key = ("constant", self._digests.of(attribute(gm, str(node.target))))
        else:
            target = node.target
            if node.op == "call_module":
                target = self._digests.of_module(str(target), gm.get_submodule(str(target)))
            arguments = (_frozen(node.args, numbers), _frozen(node.kwargs, numbers))
            key = (node.op, target, *arguments)
        try:
            return self._numbers.setdefault(key, len(self._numbers))
        except TypeError:  # an argument that cannot be hashed is like no other
            return self._numbers.setdefault((id(node), object()), len(self._numbers))

    # -- running ----------------------------------------------------------------------------------

    def outputs(self, program: Program, *, reuse: bool = True) -> list[Any]:
        """What the network returns for each batch.

        Args:
            program: of :meth:`program`.
            reuse: share values with other programs; ``False`` runs the whole network.
        """
        name = program.output.name
        return [found[name] for found in self.values(program, [name], reuse=reuse)]

    def values(
        self, program: Program, names: Sequence[str], *, reuse: bool = True
    ) -> list[dict[str, Any]]:
        """Values of a program, by the names of its nodes, for each batch.

        Memory grows with what is asked for: :meth:`batches` gives one batch after the other.
        """
        return list(self.batches(program, names, reuse=reuse))

    def batches(
        self, program: Program, names: Sequence[str], *, reuse: bool = True
    ) -> Iterable[dict[str, Any]]:
        """As :meth:`values`, one batch after the other."""
        if reuse:
            self.store.start_round()
        for batch in range(len(self.network.batches)):
            yield self.run(program, batch, names, reuse=reuse)

    @torch.no_grad()
    def run(
        self, program: Program, batch: int, names: Sequence[str], *, reuse: bool = True
    ) -> dict[str, Any]:
        """Values of a program for one batch; see :meth:`values`.

        Args:
            program: of :meth:`program`.
            batch: index of the batch.
            names: of nodes of the program.
            reuse: share values with other programs.
        """
        nodes = {node.name: node for node in program.module.graph.nodes}
        wanted = [nodes[name] for name in names]
        needed = self._needed(program, batch, wanted, reuse=reuse)
        readers = dict.fromkeys(needed, 0)
        for node in needed:
            for source in node.all_input_nodes if needed[node] else ():
                readers[source] += 1
        values: dict[fx.Node, Any] = {}
        with no_autocast():
            for node in program.module.graph.nodes:
                if node not in needed:
                    continue
                values[node] = self._value(program, batch, node, values, needed, reuse=reuse)
                for source in node.all_input_nodes if needed[node] else ():
                    readers[source] -= 1
                    if not readers[source] and source not in wanted:
                        values.pop(source, None)
                if reuse and needed[node] and self._is_cut(program, node, wanted):
                    self.store.put((batch, program.numbers[node.name]), values[node])
        return {node.name: values[node] for node in wanted}

    def _needed(
        self, program: Program, batch: int, wanted: Sequence[fx.Node], *, reuse: bool
    ) -> dict[fx.Node, bool]:
        """The nodes that give ``wanted`` -> whether they have to be computed."""
        needed: dict[fx.Node, bool] = {}
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            known = node.name in program.constants or (
                reuse and (batch, program.numbers[node.name]) in self.store
            )
            needed[node] = not known
            if not known:
                pending.extend(node.all_input_nodes)
        return needed

    def _value(
        self,
        program: Program,
        batch: int,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        needed: Mapping[fx.Node, bool],
        *,
        reuse: bool,
    ) -> Any:
        if node.name in program.constants:
            return program.constants[node.name]
        if not needed[node]:
            return self.store.get((batch, program.numbers[node.name]))
        value = self._compute(program.module, batch, node, values)
        if node.name in program.fixed and reuse:
            program.constants[node.name] = value
        return value

    def _compute(
        self, gm: QuantGraphModule, batch: int, node: fx.Node, values: Mapping[fx.Node, Any]
    ) -> Any:
        if node.op == "placeholder":
            return placeholder_value(self.network.batches[batch], node)
        if node.op == "get_attr":
            return attribute(gm, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        self.computed += 1
        if node.op == "call_module":
            return gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _is_cut(self, program: Program, node: fx.Node, wanted: Sequence[fx.Node]) -> bool:
        """Whether a value is of an anchored program, and a reader of it, or the caller, is not."""
        numbers = program.numbers
        if numbers[node.name] not in self._anchored:
            return False
        return node in wanted or any(numbers[u.name] not in self._anchored for u in node.users)


def find_node(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node called ``name``, which is there."""
    for node in gm.graph.nodes:
        if node.name == name:
            assert isinstance(node, fx.Node)
            return node
    raise ConfigError(f"the graph has no node {name!r}")


def leaving(program: Program, group: Layer) -> str:
    """The node of ``program`` whose value leaves a group of layers, rounded where it is."""
    nodes: dict[str, fx.Node] = {node.name: node for node in program.module.graph.nodes}
    name = next(n for n in reversed(group.nodes) if n in nodes)  # an absorbed clamp is gone
    readers = list(nodes[name].users)
    if len(readers) == 1 and readers[0].target is QUANTIZE:
        rounded = [user for user in readers[0].users if user.target is DEQUANTIZE]
        if rounded:
            return rounded[0].name
    return name


class _Digests:
    """Stand-ins for tensors and modules that are equal where contents are.

    Attributes:
        shared: memory that lives as long as the network: its address stands for its content.
    """

    def __init__(self, gm: QuantGraphModule) -> None:
        tensors = [*gm.parameters(), *gm.buffers()]
        self.shared = {t.data_ptr(): t for t in tensors if t.numel()}

    def of(self, value: Any) -> Any:
        """A key for the content of a constant."""
        if not isinstance(value, Tensor):
            return ("object", id(value))
        form = (str(value.dtype), tuple(value.shape), tuple(value.stride()))
        if value.data_ptr() in self.shared and value.numel():
            return (value.data_ptr(), *form)
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return (hashlib.blake2b(raw.tobytes(), digest_size=16).digest(), *form)

    def of_module(self, path: str, module: nn.Module) -> Any:
        """A key for a submodule: its path, and the content of its tensors."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return (path, tuple((name, self.of(tensor)) for name, tensor in tensors))


def _frozen(value: Any, numbers: Mapping[str, int]) -> Any:
    """Arguments of a node in a form that compares by content, nodes by their numbers."""
    if isinstance(value, fx.Node):
        return ("node", numbers[value.name])
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_frozen(item, numbers) for item in value))
    if isinstance(value, dict):
        return ("dict", *((k, _frozen(v, numbers)) for k, v in value.items()))
    if isinstance(value, slice):
        ends = (value.start, value.stop, value.step)
        return ("slice", *(_frozen(end, numbers) for end in ends))
    return (type(value).__name__, value)  # 1, 1.0 and True are equal, and not the same


# -- parts of layers ------------------------------------------------------------------------------


def _lower_parts(
    gm: QuantGraphModule,
    network: CalibratedNetwork,
    assignment: Assignment,
    parts: Collection[str],
    floats: QuantGraphModule,
) -> None:
    """Leave only parts of the named layers lowered in ``gm``."""
    rewriter = GraphRewriter(gm, "parts")
    if "weight" not in parts:
        _restore_weights(rewriter, floats)
    # Whatever pair is left at an activation is bypassed, unless inputs are wanted.
    if "input" not in parts:
        for node in list(gm.graph.nodes):
            source = _rounded_activation(node)
            if source is not None:
                rewriter.replace_uses(node, source)
    for name, precision in assignment.layers.items():
        if "input" in parts:
            _round_inputs(rewriter, network, name, precision)
        if "output" in parts:
            _round_output(rewriter, network, name, precision)
    gm.graph.eliminate_dead_code()
    rewriter.finish()


def _rounded_activation(node: fx.Node) -> fx.Node | None:
    """What ``node`` rounds, where it is the dequantize of an activation."""
    if node.target is not DEQUANTIZE:
        return None
    quantized = node.all_input_nodes[0]
    if quantized.target is operator.getitem:
        quantized = quantized.all_input_nodes[0]
    if quantized.target in (QUANTIZE, QUANTIZE_DYNAMIC):
        return quantized.all_input_nodes[0]
    return None


def _restore_weights(rewriter: GraphRewriter, floats: QuantGraphModule) -> None:
    """Give every op the constants that it has in the float graph."""
    gm = rewriter.gm
    theirs = {node.name: node for node in floats.graph.nodes}
    for node in list(gm.graph.nodes):
        other = theirs.get(node.name)
        if node.op != "call_function" or other is None or not record_of(node).annotation:
            continue
        op, model = op_of(gm, node), op_of(floats, other)
        if op is None or model is None or op.name != model.name:
            continue
        for name in op.kind.constants:
            mine, wanted = op.arguments.get(name), model.constant(name)
            if isinstance(mine, fx.Node):
                if wanted is None:  # a bias that only corrects
                    wanted = torch.zeros_like(attribute(gm, str(mine.target)))
                path = rewriter.new_buffer(f"{node.name}_{name}_float", wanted.detach())
                made = rewriter.get_attr(path, before=node, like=node)
                rewriter.replace_argument(node, mine, made)


def _round_output(
    rewriter: GraphRewriter, network: CalibratedNetwork, name: str, precision: str
) -> None:
    """Round the value that leaves a layer, as a reader of integers would."""
    nodes = {node.name: node for node in rewriter.gm.graph.nodes}
    layer = network.layer(name)
    last, head = nodes[layer.last], nodes[layer.heads[-1]]
    _round_value(rewriter, network, (last, head.name, precision), list(last.users))


def _round_inputs(
    rewriter: GraphRewriter, network: CalibratedNetwork, name: str, precision: str
) -> None:
    """Round what the heads of a layer read that convert would not lower alone.

    Such an op has no kernel that writes floats, so it is int8 only where readers take integers.
    """
    nodes = {node.name: node for node in rewriter.gm.graph.nodes}
    for head in network.layer(name).heads:
        op = op_of(rewriter.gm, nodes[head])
        record = record_of(nodes[head])
        if op is None or record.annotation is not None or record.runs_in is not None:
            continue
        for source in dict.fromkeys(op.activations):
            if source.op != "get_attr":
                _round_value(rewriter, network, (source, head, precision), [nodes[head]])


def _round_value(
    rewriter: GraphRewriter,
    network: CalibratedNetwork,
    what: tuple[fx.Node, str, str],
    readers: Sequence[fx.Node],
) -> None:
    """Let readers of a value read it rounded, by the qconfig of a node in a precision."""
    value, node, precision = what
    qconfig = network.qconfig_of(node, precision)
    if qconfig is None or not is_float_tensor(rewriter.gm, value):
        return
    qparams = network.statistics.qparams(value.name, qconfig)
    if qparams is None:
        return
    spec = qparams.spec
    low, high = network.target.saturation(spec)
    after = value.next
    names = [
        rewriter.new_buffer(f"{value.name}_rounded_{name}", tensor.clone())
        for name, tensor in (("scale", qparams.scale), ("zero_point", qparams.zero_point))
    ]
    parameters = [rewriter.get_attr(path, before=after, like=value) for path in names]
    quantized = rewriter.call(
        QUANTIZE, (value, *parameters, low, high, spec.dtype), before=after, like=value
    )
    rounded = rewriter.call(DEQUANTIZE, (quantized, *parameters), before=after, like=value)
    for reader in readers:
        rewriter.replace_argument(reader, value, rounded)
