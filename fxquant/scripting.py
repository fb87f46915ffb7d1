"""TorchScript of quantized graphs: the same nodes, spelt so that ``torch.jit`` compiles them.

A lowered graph calls a few Python functions, and holds packed weights that TorchScript can neither
copy nor save. :func:`scriptable` gives a plain ``GraphModule`` with neither: functions that move
values become the methods they stand for, and oneDNN's weights become modules that pack themselves
when they are loaded. ``torch.jit.script`` and ``torch.jit.trace`` of a :class:`QuantGraphModule`
ask for it by themselves.
"""

# TorchScript reads annotations, so this module does not postpone them.

import functools
import hashlib
import inspect
import linecache
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxquant import kernels, script_kernels
from fxquant import recurrent_kernels as recurrent
from fxquant.errors import LoweringError
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.metadata import record_of
from fxquant.op_view import attribute
from fxquant.packing import PACKERS, scalar
from fxquant.script_kernels import (
    FourBitTable,
    OneDnnConv,
    OneDnnLinear,
    added,
    averaged,
    bag_result,
    clamped,
    scalars,
    scripted_cell,
    scripted_gru,
    scripted_lstm,
    scripted_lstm_cell,
)
from fxquant.targets import emit_movement
from fxquant.targets.guards import expand


@dataclass(frozen=True, slots=True)
class _Copy:
    """One node being copied.

    Attributes:
        graph: the new graph.
        node: the node of the old one.
        args: its positional arguments, in the new graph.
        kwargs: its keyword arguments, in the new graph.
        traced: the tracer will run it, which follows Python code.
    """

    graph: fx.Graph
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: bool

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a function; of one with decisions inside, compiled where it is traced."""
        ours = getattr(function, "__module__", "") == script_kernels.__name__
        if self.traced and ours and function not in _FOLLOWED:
            function = _recorded(function)
        return self.graph.call_function(function, args)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a method."""
        return self.graph.call_method(name, args, kwargs)


class ScriptableGraphModule(fx.GraphModule):
    """A ``GraphModule`` without the annotated attribute that TorchScript warns of."""

    def __init__(self, root: dict[str, Any], graph: fx.Graph) -> None:
        super().__init__(root, graph, class_name="ScriptableGraphModule")


def scriptable(gm: QuantGraphModule, *, traced: bool = False) -> fx.GraphModule:
    """A plain ``GraphModule`` that computes what ``gm`` computes and that TorchScript compiles.

    Args:
        gm: at any stage. Its parameters, buffers and modules are shared, not copied.
        traced: for ``torch.jit.trace``, which can neither hold weights that oneDNN packed (they are
            packed at every call) nor record the calls that take them (they are compiled first).

    Raises:
        LoweringError: the graph calls something that TorchScript cannot express, named with the
            node and its kernel.
    """
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    held: dict[str, Any] = {}
    packs = {pack.name: pack for pack in gm.state.packs if _packs_itself(pack)}
    for record in gm.state.packs:
        _check_loads_again(gm, record)
    made: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        copy = _Copy(
            graph=graph,
            node=node,
            args=fx.map_arg(node.args, made.__getitem__),
            kwargs=fx.map_arg(node.kwargs, made.__getitem__),
            traced=traced,
        )
        pack = packs.get(str(node.target)) if node.op == "get_attr" else None
        if pack is not None:
            made[node] = (_pack_each_time if traced else _pack_once)(gm, held, copy, pack)
            continue
        if traced and node.op == "get_attr" and record_of(node).is_number:
            made[node] = scalar(attribute(gm, str(node.target)))
            continue
        if node.op in ("get_attr", "call_module"):
            held[str(node.target)] = attribute(gm, str(node.target))
        made[node] = _compiled(copy) if traced and _is_unrecordable(node) else _copied(copy)
    result = ScriptableGraphModule(held, graph)
    result.training = gm.training
    return result


def run_traced(gm: QuantGraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``gm`` gives, by calls that ``torch.jit.trace`` records.

    Interpreted: generated code has another file name each time, which the tracer, that runs twice
    and compares, takes for a difference.
    """
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    state = torch._C._get_tracing_state()
    # What is asked while the graph is made is no part of the trace.
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # its stubs lack it
    try:
        graph = scriptable(gm, traced=True)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]  # its stubs lack it
    return fx.Interpreter(graph).run(*bound.args)


_FOLLOWED: Final = (scripted_lstm, scripted_gru)
"""Functions that the tracer follows: they decide by the rank alone, and it records no call with a
list of packed weights."""


@functools.cache
def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as the tracer records it with its decisions, not with what was decided once."""
    compiled = torch.jit.script(function)

    def call(*args: Any) -> Any:  # fx calls what has a name
        return compiled(*args)

    return call


def _copied(copy: _Copy) -> fx.Node:
    node = copy.node
    if node.op == "call_function":
        return _function(copy)
    new = copy.graph.create_node(node.op, node.target, copy.args, copy.kwargs, name=node.name)
    new.type = _annotation(node.type)
    return new


def _annotation(annotation: Any) -> Any:
    """A type as TorchScript reads it: one left as text is that of a tensor, or unknown."""
    if isinstance(annotation, str):
        return Tensor if annotation.rpartition(".")[2] == "Tensor" else None
    return annotation


def _function(copy: _Copy) -> fx.Node:
    target = copy.node.target
    if target in _FORMS:
        return _FORMS[target](copy)
    home = str(getattr(target, "__module__", "") or "")
    if home == "fxquant.engine_free":
        return _ENGINE_FREE[str(getattr(target, "__name__", ""))](copy)
    is_ours = home.partition(".")[0] == "fxquant"
    if is_ours and not copy.traced and not _compiles(target):
        kernel = record_of(copy.node).kernel or getattr(target, "__name__", str(target))
        raise LoweringError(
            f"node {copy.node.name!r} runs {kernel}, whose Python code"
            f" ({home}.{getattr(target, '__name__', target)}) torch.jit.script does not compile."
            " torch.jit.trace records it, for the sizes of its example"
        )
    args = copy.args
    if isinstance(target, OpOverload):
        for position in _scalar_lists(target):
            if args[position]:
                values = copy.call(scalars, [float(value) for value in args[position]])
                args = (*args[:position], values, *args[position + 1 :])
        target = target.overloadpacket  # TorchScript chooses the overload by the arguments
    return copy.graph.create_node("call_function", target, args, copy.kwargs, name=copy.node.name)


def _scalar_lists(target: OpOverload) -> list[int]:
    """Which arguments are lists of numbers of any type."""
    arguments = enumerate(target._schema.arguments)
    return [i for i, argument in arguments if str(argument.type) == "List[Optional[number]]"]


# -- packed weights that cannot be saved ----------------------------------------------------------


def _check_loads_again(gm: QuantGraphModule, pack: PackRecord) -> None:
    """Refuse the packed weights that torch loads wrongly.

    It packs them again for the engine of the moment, and oneDNN's transposed convolution is wrong
    where the numbers of channels differ.
    """
    if pack.packer != "conv-transpose" or torch.backends.quantized.engine == "fbgemm":
        return
    weight, groups = attribute(gm, pack.tensors[0]), int(pack.options[-2])
    if weight.shape[0] != weight.shape[1] * groups:
        raise LoweringError(
            f"TorchScript packs {pack.name!r}, the weight of a transposed convolution from"
            f" {weight.shape[0]} to {weight.shape[1] * groups} channels, again when it loads it:"
            f" for engine {torch.backends.quantized.engine!r}, whose kernel is wrong there. Script"
            " (or trace) and load under torch.backends.quantized.engine = 'fbgemm'"
        )


def _pack_once(
    gm: QuantGraphModule, held: dict[str, Any], copy: _Copy, pack: PackRecord
) -> fx.Node:
    """A module that holds the packed weight, and packs it again when it is loaded."""
    tensors = [attribute(gm, name).detach() for name in pack.tensors]
    held[pack.name] = _SELF_PACKING[pack.packer](*tensors, *pack.options)
    return copy.graph.call_module(pack.name)


def _pack_each_time(
    gm: QuantGraphModule, held: dict[str, Any], copy: _Copy, pack: PackRecord
) -> fx.Node:
    """The call that packs the weight, in the graph."""
    if pack.packer == "table":
        raise LoweringError(
            f"the 4-bit table {pack.name!r} cannot be traced: a trace would hold it in the packed"
            " form, which torch saves and cannot load. Use torch.jit.script, which holds its bytes"
        )
    nodes = []
    for name in pack.tensors:
        held[name] = attribute(gm, name)
        nodes.append(copy.graph.get_attr(name))
    return copy.call(PACKERS[pack.packer].function, *nodes, *pack.options)


def _is_unrecordable(node: fx.Node) -> bool:
    """Whether the tracer knows no way to record the call."""
    return isinstance(node.target, OpOverload) and bool(_scalar_lists(node.target))


def _compiled(copy: _Copy) -> fx.Node:
    """The call of a compiled function that has the constants of the node in its text."""
    names: dict[fx.Node, str] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names.setdefault(value, f"x{len(names)}")
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(text, value))}]"
        return repr(value)

    target: Any = copy.node.target
    shown = [text(value) for value in copy.args]
    for position in _scalar_lists(target):
        shown[position] = f"scalars({[float(v) for v in copy.args[position]]})"
    parameters = ", ".join(f"{name}: Tensor" for name in names.values())
    name = target.overloadpacket._qualified_op_name.replace("::", ".")
    source = f"def call({parameters}) -> Tensor:\n    return torch.ops.{name}({', '.join(shown)})\n"
    return copy.call(_recorded_text(source), *names)


@functools.cache
def _recorded_text(source: str) -> Callable[..., Any]:
    """Compile a function once: the tracer runs twice, and wants the same functions both times.

    From a Python function with its text, because one compiled from text alone cannot be saved.
    """
    place = f"<fxquant.scripting {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    namespace: dict[str, Any] = {
        "torch": torch,
        "Tensor": Tensor,
        "scalars": scalars,
        "__name__": __name__,
    }
    exec(compile(source, place, "exec", dont_inherit=True), namespace)
    return _recorded(namespace["call"])


_SELF_PACKING: Final[dict[str, Callable[..., nn.Module]]] = {
    "onednn-conv": OneDnnConv,
    "onednn-linear": OneDnnLinear,
    "table": FourBitTable,
}


def _packs_itself(pack: PackRecord) -> bool:
    """Whether TorchScript cannot save what is packed: oneDNN's weights, and 4-bit tables."""
    return pack.packer in _SELF_PACKING and (pack.packer != "table" or pack.options == (4,))


# -- functions by the methods and operators they stand for ----------------------------------------


def _piece_of(method: str) -> Callable[[_Copy], fx.Node]:
    """``split(x, sizes, dim, index) -> x.split(sizes, dim)[index]``."""

    def form(copy: _Copy) -> fx.Node:
        x, sizes, dim, index = copy.args
        return copy.call(operator.getitem, copy.method(method, x, sizes, dim), index)

    return form


def _shaped(method: str) -> Callable[[_Copy], fx.Node]:
    """``view_of(x, (a, b)) -> x.reshape(a, b)``."""
    return lambda copy: copy.method(method, copy.args[0], *copy.args[1])


def _squeeze(copy: _Copy) -> fx.Node:
    x, dim = copy.args
    return copy.method("squeeze", x) if dim is None else copy.method("squeeze", x, dim)


def _interpolate(copy: _Copy) -> fx.Node:
    """TorchScript takes a scale factor as float only."""
    padding: list[Any] = [None] * (3 - len(copy.args))
    x, size, factor, *rest = (*copy.args, *padding)
    kwargs = dict(copy.kwargs)
    size, factor = kwargs.pop("size", size), kwargs.pop("scale_factor", factor)
    if isinstance(factor, int):
        factor = float(factor)
    elif isinstance(factor, tuple | list):
        factor = [float(f) for f in factor]
    return copy.graph.call_function(F.interpolate, (x, size, factor, *rest), kwargs)


def _embedding(copy: _Copy) -> fx.Node:
    packed, indices, bits, features = copy.args
    operators = torch.ops.quantized
    kernel = operators.embedding_4bit if bits == 4 else operators.embedding_byte
    rows = copy.call(kernel, packed, copy.method("reshape", indices, -1))
    kept = copy.call(operator.getitem, rows, (slice(None), slice(None, features)))
    return copy.method("unflatten", kept, 0, copy.call(getattr, indices, "shape"))


def _embedding_bag(copy: _Copy) -> fx.Node:
    packed, indices, offsets, weights, include_last_offset, mode, bits, features = copy.args
    operators = torch.ops.quantized
    kernel = operators.embedding_bag_4bit if bits == 4 else operators.embedding_bag_byte
    options = (False, 0, False, weights, None, include_last_offset)
    sums = copy.call(kernel, packed, indices, offsets, *options)
    return copy.call(bag_result, sums, indices, offsets, include_last_offset, mode, features)


def _single_state_cell(copy: _Copy) -> fx.Node:
    """``gru_cell`` and ``rnn_cell``: the kernel by its name."""
    x, hx, w_ih, w_hh, b_ih, b_hh, hidden, *nonlinearity = copy.args
    kind = nonlinearity[0] if nonlinearity else "gru"
    return copy.call(scripted_cell, x, hx, w_ih, w_hh, b_ih, b_hh, hidden, kind)


def _renamed(function: Callable[..., Any]) -> Callable[[_Copy], fx.Node]:
    """The same arguments, to a function that TorchScript compiles."""
    return lambda copy: copy.call(function, *copy.args)


_FORMS: Final[dict[Any, Callable[[_Copy], fx.Node]]] = {
    kernels.as_bytes: lambda copy: copy.method("int_repr", *copy.args),
    kernels.as_quantized: _renamed(torch._make_per_tensor_quantized_tensor),
    kernels.chunk: _piece_of("chunk"),
    kernels.split: _piece_of("split"),
    kernels.tensor_split: _piece_of("tensor_split"),
    kernels.embedding: _embedding,
    kernels.embedding_bag: _embedding_bag,
    emit_movement.view_of: _shaped("reshape"),
    emit_movement.permuted: _shaped("permute"),
    emit_movement.item: _renamed(operator.getitem),
    emit_movement.squeeze: _squeeze,
    emit_movement.contiguous: lambda copy: copy.method(
        "contiguous", copy.args[0], memory_format=copy.args[1]
    ),
    F.interpolate: _interpolate,
    recurrent.quantized_lstm: _renamed(scripted_lstm),
    recurrent.quantized_gru: _renamed(scripted_gru),
    recurrent.lstm_cell: _renamed(scripted_lstm_cell),
    recurrent.gru_cell: _single_state_cell,
    recurrent.rnn_cell: _single_state_cell,
}
"""What stands for a function that TorchScript does not compile."""

# -- functions that do not ask for the engine -----------------------------------------------------


def _clamp(copy: _Copy) -> fx.Node:
    """The bounds as integers: what becomes of the smallest byte, and of the largest."""
    x, *bounds = copy.args
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return copy.call(clamped, *copy.args)
    function: Any = copy.node.target
    low, high = function(torch.tensor([0, 255], dtype=torch.uint8), *bounds).tolist()
    return copy.call(torch.clamp, x, low, high)


def _add(relu: bool) -> Callable[[_Copy], fx.Node]:
    return lambda copy: copy.call(added, *copy.args, relu)


def _avg_pool2d(copy: _Copy) -> fx.Node:
    x, *sizes = copy.args
    pairs = [list(expand(size, 2)) for size in sizes[:3]]
    return copy.call(averaged, x, *pairs, *sizes[3:])


_ENGINE_FREE: Final[dict[str, Callable[[_Copy], fx.Node]]] = {
    "clamp": _clamp,
    "add": _add(relu=False),
    "add_relu": _add(relu=True),
    "avg_pool2d": _avg_pool2d,
}
"""By name in fxquant.engine_free."""


@functools.cache
def _compiles(function: Callable[..., Any]) -> bool:
    """Whether TorchScript compiles a function of fxquant as it is."""
    try:
        torch.jit.script(function)
    except Exception:  # noqa: BLE001  # it has no error of its own
        return False
    return True
