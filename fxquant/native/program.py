"""A lowered graph for inputs of certain shapes: stretches of a plan, and calls of torch between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.native.plan import Plan, PlanBuilder, Store, Value
from fxquant.native.translate import Meta, Translation, contiguous, translate
from fxquant.op_view import attribute


@dataclass(frozen=True, slots=True)
class Native:
    """Steps ``first`` to ``last - 1`` of the plan."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Called:
    """A node that torch computes."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class Imported:
    """A tensor that torch computed becomes an input of the plan, in these strides."""

    node: fx.Node
    slot: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """Memory for a result of the plan, which becomes a tensor."""

    node: fx.Node
    slot: int
    meta: Meta
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """The result of a step.

    Attributes:
        node: whose rule added the step.
        shown: the last node that it is the value of: another view, or what the step absorbed.
        value: where it lies.
    """

    node: fx.Node
    shown: fx.Node
    value: Value


Instruction = Native | Called | Imported | Exported


_SIZE_METHODS: Final = frozenset({"size", "dim", "numel", "ndimension"})
_SIZE_ATTRIBUTES: Final = frozenset({"shape", "ndim"})


class _Recorder(fx.Interpreter):
    """Runs a graph, and keeps what each value was.

    Attributes:
        metas: of tensors.
        sizes: numbers that follow from the shapes of tensors, and so from those of the inputs.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.metas: dict[fx.Node, Meta] = {}
        self.sizes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        meta = Meta.of(result)
        if meta is not None:
            self.metas[n] = meta
        elif self._is_size(n) and _all_numbers(result):
            self.sizes[n] = result
        return result

    def _is_size(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in _SIZE_METHODS
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        if node.target is getattr:
            return node.args[1] in _SIZE_ATTRIBUTES
        return getattr(node.target, "__module__", "") in ("_operator", "math", "builtins") and all(
            source in self.sizes for source in node.all_input_nodes
        )


def _all_numbers(value: Any) -> bool:
    """Whether it is a number, or a tuple of numbers."""
    if isinstance(value, tuple):
        return all(map(_all_numbers, value))
    return isinstance(value, (int, float, slice))


@dataclass
class _Compiler:
    gm: QuantGraphModule
    metas: dict[fx.Node, Meta]
    sizes: dict[fx.Node, Any]
    excluded: frozenset[fx.Node] = frozenset()
    builder: PlanBuilder = field(default_factory=PlanBuilder)
    instructions: list[Instruction] = field(default_factory=list)
    exported: set[fx.Node] = field(default_factory=set)
    done: int = 0

    def __post_init__(self) -> None:
        self.translation = Translation(self.gm, self.builder, self.metas, self.bring, self.place)

    def compile(self) -> None:
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr") or node in self.sizes:
                continue
            known = node.op != "output" and node not in self.excluded
            if known and translate(self.translation, node):
                continue
            for source in node.all_input_nodes:
                self.export(source)
            if node.op != "output":
                self.flush()
                self.instructions.append(Called(node))
        self.flush()

    def computed(self) -> dict[int, Computed]:
        """Index of a step -> what is known of its result."""
        last: dict[int, fx.Node] = {id(v): node for node, v in self.translation.values.items()}
        for node, heads in self.translation.heads.items():
            if node.target is F.scaled_dot_product_attention:
                last[id(heads.value)] = node
        names = {node.name: node for node in self.gm.graph.nodes}
        return {
            index: Computed(names[step.node], last[id(step.out)], step.out)
            for index, step in enumerate(self.builder.steps)
            if id(step.out) in last
        }

    def flush(self) -> None:
        """Steps added since the last flush run here."""
        if len(self.builder.steps) > self.done:
            self.instructions.append(Native(self.done, len(self.builder.steps)))
            self.done = len(self.builder.steps)

    def bring(self, node: fx.Node) -> Value | None:
        """What torch computed as a value of the plan."""
        meta = self.metas.get(node)
        if meta is None or len(meta.shape) not in (2, 3, 4) or 0 in meta.shape:
            return None
        if meta.dtype == torch.float32:
            outside = self.builder.external(meta.shape, torch.float32)
            stride = meta.stride
            made = outside
        elif meta.dtype in (torch.uint8, torch.quint8):
            numbers: dict[str, Any] = {"scale": meta.scale, "zero_point": meta.zero_point}
            outside = self.builder.external(meta.shape, torch.uint8, **numbers)
            stride = _channels_last(meta.shape)
            # Kernels read a little further than they use, which is safe in the arena only.
            made = self.builder.value(meta.shape, torch.uint8, **numbers)
            self.builder.add("copy", {"a": outside}, made, element=1)
            self.translation.values[node] = made
        else:
            return None
        self.instructions.append(Imported(node, outside.buffer.slot, stride))
        return made

    def place(self, node: fx.Node) -> Value:
        """Where torch left a tensor, for kernels that follow its strides themselves."""
        meta = self.metas[node]
        outside = self.builder.external(meta.shape, torch.uint8)
        self.instructions.append(Imported(node, outside.buffer.slot, meta.stride))
        return outside

    def export(self, node: fx.Node) -> None:
        """Make a tensor of a value that torch reads."""
        heads = self.translation.heads.get(node)
        value = self.translation.values.get(node) if heads is None else heads.value
        if value is None or node in self.exported or node.op == "placeholder":
            return
        meta = self.metas[node]
        if value.bytes_of is not None:
            self.translation.floats(node)
        stride = _channels_last(value.shape) if heads is None else heads.stride
        unflushed = len(self.builder.steps) > self.done
        if unflushed and self.builder.hand_over(value):
            self.instructions.append(Exported(node, value.buffer.slot, meta, stride))
        else:
            out = self.builder.external(value.shape, value.dtype)
            self.instructions.append(Exported(node, out.buffer.slot, meta, stride))
            self.builder.add("copy", {"a": value}, out, element=value.element)
        self.exported.add(node)
        self.flush()


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)
    return contiguous(shape)


class UnlikeError(Exception):
    """A call for which the program was not made: other sizes inside, or numbers that are none."""


class Program:
    """What runs in the place of a graph, for inputs like those that it was made from.

    Attributes:
        plan: the native part.
        called: the nodes that torch computes.
    """

    def __init__(
        self,
        gm: QuantGraphModule,
        inputs: tuple[Any, ...],
        excluded: frozenset[fx.Node] = frozenset(),
        store: Store | None = None,
    ) -> None:
        recorder = _Recorder(gm)
        self.expected = recorder.run(*inputs)
        compiler = _Compiler(gm, recorder.metas, recorder.sizes, excluded)
        compiler.compile()
        self.plan: Plan = compiler.builder.build(store)
        self.called = tuple(i.node for i in compiler.instructions if isinstance(i, Called))
        self.native = (*compiler.translation.values, *compiler.translation.heads)
        self._computed = compiler.computed()
        self._gm = gm
        self._metas = recorder.metas
        self._instructions = tuple(compiler.instructions)
        self._placeholders = tuple(n for n in gm.graph.nodes if n.op == "placeholder")
        self._output = next(n.args[0] for n in gm.graph.nodes if n.op == "output")
        self._constants: dict[fx.Node, Any] = dict(recorder.sizes)
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self._constants[node] = attribute(gm, str(node.target))
        self._last_uses = _last_uses(compiler, self._output)
        self._arenas: list[Tensor] = []

    def run(
        self,
        inputs: tuple[Any, ...],
        threads: int,
        timed: dict[int, float] | None = None,
        watch: Callable[[Computed, Any], None] | None = None,
    ) -> Any:
        """The result for inputs of the shapes, strides and types that it was made for.

        Raises:
            UnlikeError: sizes that depend on the data are not those it was made for, or a number
                is NaN; the model has to be run.

        Args:
            inputs: as the graph's placeholders, in order.
            threads: how many threads the native part may use.
            timed: where to note the seconds of each step, least of all calls so far; steps then
                run one by one.
            watch: is told of each value of the plan as soon as it is there, with the slots.
        """
        try:
            arena = self._arenas.pop()  # each concurrent call has its own
        except IndexError:
            arena = torch.empty(self.plan.arena + 64, dtype=torch.uint8)
        slots = (ctypes.c_void_p * self.plan.slots)()
        start = arena.data_ptr()
        slots[0] = start + (-start) % 64
        env: dict[fx.Node, Any] = dict(zip(self._placeholders, inputs, strict=True))
        held: dict[int, Tensor] = {}  # memory that slots point to

        def argument(node: fx.Node) -> Any:
            return env[node] if node in env else self._constants[node]

        for step, unused in zip(self._instructions, self._last_uses, strict=True):
            if isinstance(step, Native):
                self._run_native(slots, step, threads, timed, watch)
            elif isinstance(step, Imported):
                tensor = _with_stride(argument(step.node), step.stride)
                held[step.slot] = tensor
                slots[step.slot] = tensor.data_ptr()
            elif isinstance(step, Exported):
                made = _empty(step.meta, step.stride)
                env[step.node] = held[step.slot] = made
                slots[step.slot] = made.data_ptr()
            else:
                node = step.node
                args = fx.map_arg(node.args, argument)
                kwargs = fx.map_arg(node.kwargs, argument)
                env[node] = _call(self._gm, node, args, kwargs)
                if not _is_like(self._metas.get(node), env[node]):
                    raise UnlikeError(node.name)
            for name in unused:  # so that the allocator can hand the memory out again while warm
                if isinstance(name, int):
                    del held[name]
                else:
                    env.pop(name, None)
        self._arenas.append(arena)
        return _plain(self._output, argument)

    def _run_native(
        self,
        slots: Any,
        stretch: Native,
        threads: int,
        timed: dict[int, float] | None,
        watch: Callable[[Computed, Any], None] | None,
    ) -> None:
        if timed is None and watch is None:
            if not self.plan.run(slots, stretch.first, stretch.last, threads):
                raise UnlikeError("NaN")
            return
        for index in range(stretch.first, stretch.last):
            start = perf_counter()
            self.plan.run(slots, index, index + 1, threads)
            seconds = perf_counter() - start
            if timed is not None:
                timed[index] = min(timed.get(index, seconds), seconds)
            if watch is not None and index in self._computed:
                watch(self._computed[index], slots)


def _last_uses(compiler: _Compiler, output: Any) -> tuple[tuple[fx.Node | int, ...], ...]:
    """For each instruction, what nobody needs behind it: nodes, and slots of the plan."""
    last: dict[fx.Node | int, int] = {}
    for index, step in enumerate(compiler.instructions):
        if isinstance(step, Native):
            for inner in compiler.builder.steps[step.first : step.last]:
                for value in (*inner.reads.values(), inner.out):
                    if value.buffer.slot:
                        last[value.buffer.slot] = index
        elif isinstance(step, Called):
            last.update(dict.fromkeys(step.node.all_input_nodes, index))
        else:
            last[step.node] = last[step.slot] = index
    needed: list[fx.Node] = []
    fx.map_arg(output, needed.append)
    for node in needed:
        last.pop(node, None)
    found: list[list[fx.Node | int]] = [[] for _ in compiler.instructions]
    for name, index in last.items():
        if isinstance(name, int) or (name.op != "get_attr" and name not in compiler.sizes):
            found[index].append(name)
    return tuple(map(tuple, found))


def _plain(output: Any, value: Callable[[fx.Node], Any]) -> Any:
    """What a graph returns, with its nodes' values, in containers that are not fx's own."""
    if isinstance(output, fx.Node):
        return value(output)
    if isinstance(output, tuple):
        parts = [_plain(part, value) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, list):
        return [_plain(part, value) for part in output]
    if isinstance(output, dict):
        return {key: _plain(part, value) for key, part in output.items()}
    return output


def _is_like(meta: Meta | None, value: Any) -> bool:
    """Whether a tensor is as it was when the program was made, but for its numbers and strides."""
    if meta is None:
        return not isinstance(value, Tensor) or Meta.of(value) is None
    if not isinstance(value, Tensor) or value.shape != meta.shape or value.dtype != meta.dtype:
        return False
    return not value.is_quantized or (
        value.q_scale() == meta.scale and value.q_zero_point() == meta.zero_point
    )


def _call(gm: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a function, by its op
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return gm.get_submodule(str(node.target))(*args, **kwargs)


def _with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The integers or floats of ``tensor``, in these strides."""
    if tuple(tensor.stride()) == stride:
        return tensor
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    return made.copy_(tensor)


def _empty(meta: Meta, stride: tuple[int, ...]) -> Tensor:
    if meta.dtype != torch.quint8:
        return torch.empty_strided(meta.shape, stride, dtype=meta.dtype)
    layout = torch.channels_last if len(meta.shape) == 4 else torch.contiguous_format
    return torch._empty_affine_quantized(
        meta.shape, scale=meta.scale, zero_point=meta.zero_point, dtype=meta.dtype,
        memory_format=layout,
    )  # fmt: skip
