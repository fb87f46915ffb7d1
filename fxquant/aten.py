"""Graphs of ATen overloads, as torch.export and other tools make them, in the words of torch.

``torch.ops.aten.conv2d.default(x, w, b)`` becomes ``F.conv2d(x, w, b)``, which calls it: the same
numbers, and one set of kinds, patterns and rows for all graphs. Overloads without an entry stay as
they are and run in floating point. Nodes keep their names, and the modules that they came from.
"""

from __future__ import annotations

import ast
import functools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.utils._pytree import TreeSpec, tree_unflatten

from fxquant.dataflow import fields_of
from fxquant.errors import CaptureError
from fxquant.shape_guards import shape_guard

_GUARDS: Final = "_guards_fn"
_GRADIENTS: Final = "wrap_with_set_grad_enabled"
_GUARD_TEXT: Final = "Guard failed: "
_Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """What a node becomes.

    Attributes:
        target: a function, or the name of a method.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def is_aten(gm: fx.GraphModule) -> bool:
    """Whether a graph calls ATen overloads."""
    return any(_overload(node) for node in gm.graph.nodes)


def _overload(node: fx.Node) -> str:
    """``conv2d.default`` for ``aten.conv2d.default``; empty for everything else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    return str(target).removeprefix("aten.") if target.namespace == "aten" else ""


def import_aten(gm: nn.Module) -> fx.GraphModule:
    """Rewrite ``gm``, which is a copy, in place.

    Args:
        gm: a graph that calls ATen overloads, with flat or nested inputs and outputs.

    Returns:
        A graph with the inputs and outputs that ``gm.forward`` has.

    Raises:
        CaptureError: its inputs or outputs are nested in a container that graphs have no words for.
    """
    assert isinstance(gm, fx.GraphModule)
    plain = fx.GraphModule(gm, _plain_signature(gm), type(gm).__name__)
    plain.training = gm.training
    _inline_gradient_modes(plain)
    _inline_guards(plain)
    writes = any(_mutates(node) for node in plain.graph.nodes)
    droppable = [node for node in plain.graph.nodes if _only_computes(node)]
    for node in list(plain.graph.nodes):
        _translate(plain, node, writes=writes)
    _name_modules(plain)
    for node in reversed(droppable):
        if node.graph is plain.graph and not node.users and not node._erased:
            plain.graph.erase_node(node)
    plain.graph.lint()
    plain.recompile()
    return plain


def _mutates(node: fx.Node) -> bool:
    target: Any = node.target
    return bool(_overload(node)) and bool(target._schema.is_mutable)


def _only_computes(node: fx.Node) -> bool:
    """Whether ``node`` may be dropped where nobody reads it."""
    name = _overload(node)
    if name:
        return not _mutates(node) and not name.startswith("_assert")
    return node.op == "get_attr" or node.target is operator.getitem


# -- inputs and outputs ---------------------------------------------------------------------------


def _plain_signature(gm: fx.GraphModule) -> fx.Graph:
    """The graph with one input for each argument, and with the outputs as they are nested."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    if info is not None:
        old = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for node, leaf in zip(old, _leaves_of_inputs(graph, info), strict=True):
            leaf.meta.update(node.meta)
            known[node] = leaf
    for node in gm.graph.nodes:
        if node.op == "output":
            value = fx.map_arg(node.args[0], known.__getitem__)
            if info is not None and info.out_spec is not None:
                value = _nested(graph, list(value), info.out_spec)
            graph.output(value)
        elif node not in known:
            known[node] = graph.node_copy(node, known.__getitem__)
    return graph


def _nested(graph: fx.Graph, leaves: list[Any], spec: TreeSpec) -> Any:
    """The outputs as they are nested, which ``graph`` makes."""
    value = tree_unflatten(leaves, spec)
    try:
        value = _made_by(graph, value)
        fx.Graph().create_node("output", "output", (fx.map_arg(value, lambda node: None),))
    except Exception as error:
        raise CaptureError(
            f"the outputs are nested in a {type(value).__name__}: {error}"
        ) from error
    return value


def _made_by(graph: fx.Graph, value: Any) -> Any:
    """``value``, with calls for the dataclasses in it, of which fx would keep the fields alone."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {name: _made_by(graph, item) for name, item in fields_of(value).items()}
        return graph.call_function(type(value), (), kept)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_made_by(graph, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_made_by(graph, item) for item in value)
    if isinstance(value, dict):
        return {key: _made_by(graph, item) for key, item in value.items()}
    return value


def _leaves_of_inputs(graph: fx.Graph, info: Any) -> list[fx.Node]:
    positional, keywords = info.in_spec.children()
    leaves: list[fx.Node] = []
    specs = [*positional.children(), *keywords.children()]
    names = list(info.orig_args)
    if len(names) != len(specs):
        names = [f"input_{i}" for i in range(len(positional.children()))] + list(keywords.context)
    arguments = [graph.placeholder(str(name)) for name in names]
    for argument, spec in zip(arguments, specs, strict=True):
        _take_apart(graph, argument, spec, leaves)
    return leaves


def _take_apart(graph: fx.Graph, value: fx.Node, spec: TreeSpec, leaves: list[fx.Node]) -> None:
    if spec.is_leaf():
        leaves.append(value)
        return
    if spec.type not in (tuple, list, dict):
        kind = getattr(spec.type, "__name__", spec.type)
        raise CaptureError(
            f"the input {value.name!r} is a {kind}, which the graph cannot take apart; export the"
            " model with tensors, tuples, lists and dicts for inputs"
        )
    keys = spec.context if spec.type is dict else range(spec.num_children)
    for key, child in zip(keys, spec.children(), strict=True):
        item = graph.call_function(operator.getitem, (value, key))
        _take_apart(graph, item, child, leaves)


def _inline_guards(gm: fx.GraphModule) -> None:
    """Keep what the export assumed of sizes: other inputs raise, as they do in the program."""
    for node in list(gm.graph.nodes):
        if node.op != "call_module" or node.target != _GUARDS:
            continue
        forward = _inner(gm.get_submodule(_GUARDS).forward)
        texts = [c for c in forward.__code__.co_consts if str(c).startswith(_GUARD_TEXT)]
        tracer = fx.proxy.GraphAppendingTracer(gm.graph)
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        names: dict[str, Any] = {str(n.target): fx.Proxy(n, tracer) for n in inputs}
        names |= {f.__name__: _recorded(f, tracer) for f in (max, min)}
        with gm.graph.inserting_before(node):
            for text in texts:
                _guard(tracer, text.removeprefix(_GUARD_TEXT), forward.__globals__ | names)
        gm.graph.erase_node(node)
        delattr(gm, _GUARDS)


def _inline_gradient_modes(gm: fx.GraphModule) -> None:
    """Put in line what is computed under ``torch.no_grad()``: exported graphs do not train."""
    pending = [node for node in gm.graph.nodes if _sets_gradients(node)]
    while pending:
        node = pending.pop()
        _, reading, *operands = node.args
        assert isinstance(reading, fx.Node)
        path = str(reading.target)
        inner: Any = gm.get_submodule(path)
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        known: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
        with gm.graph.inserting_before(node):
            for old in inner.graph.nodes:
                if old.op in ("placeholder", "output"):
                    continue
                known[old] = made = gm.graph.node_copy(old, known.__getitem__)
                if old.op == "get_attr":
                    made.target = f"{path}.{old.target}"
                elif _sets_gradients(made):
                    pending.append(made)
        results = fx.map_arg(inner.graph.output_node().args[0], known.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # export takes each result by number
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not reading.users:
            gm.graph.erase_node(reading)
    gm.recompile()


def _sets_gradients(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, HigherOrderOperator) and target.name() == _GRADIENTS


def _inner(function: Any) -> Any:
    """The function with the guards, which torch wraps.

    Raises:
        CaptureError: it is not found.
    """
    pending = [function]
    while pending:
        found = pending.pop()
        if getattr(found, "__name__", "") == "_":  # torch's name for it
            return found
        cells = getattr(found, "__closure__", None) or ()
        pending += [c.cell_contents for c in cells if callable(c.cell_contents)]
    raise CaptureError(
        "torch.export's guards of sizes are not where this torch should have them; pass"
        " program.module(check_guards=False) to go without guards, at your own risk"
    )


def _recorded(function: Callable[..., Any], tracer: fx.proxy.TracerBase) -> Callable[..., Any]:
    return lambda *args: tracer.create_proxy("call_function", function, args, {})


def _guard(tracer: fx.proxy.TracerBase, text: str, names: dict[str, Any]) -> None:
    """Record one condition, such as ``x.size()[0] > 2 and x.size()[1] == 3``."""
    tree = ast.fix_missing_locations(_WithoutBranches().visit(ast.parse(text, mode="eval")))
    try:
        condition = eval(compile(tree, "<guard>", "eval"), names)  # what torch made to be run
    except Exception as error:
        raise CaptureError(
            f"torch.export's guard {text!r} cannot be kept ({error}); pass"
            " program.module(check_guards=False) to go without guards, at your own risk"
        ) from error
    if isinstance(condition, fx.Proxy):
        args = (condition, True, f"torch.export's guard {text!r}")
        tracer.create_proxy("call_function", shape_guard, args, {})


class _WithoutBranches(ast.NodeTransformer):
    """``a and b`` becomes ``a & b``, and so on: the former ask a value whether it is true."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:  # ast's name
        self.generic_visit(node)
        return _joined(node.values, ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr())

    def visit_Compare(self, node: ast.Compare) -> ast.AST:  # ast's name
        self.generic_visit(node)
        lefts = [node.left, *node.comparators[:-1]]
        pairs = zip(lefts, node.ops, node.comparators, strict=True)
        return _joined([ast.Compare(a, [op], [b]) for a, op, b in pairs], ast.BitAnd())

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:  # ast's name
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.Compare(node.operand, [ast.Eq()], [ast.Constant(False)])


def _joined(values: Sequence[ast.expr], operation: ast.operator) -> ast.expr:
    return functools.reduce(lambda a, b: ast.BinOp(a, operation, b), values)


# -- names of modules -----------------------------------------------------------------------------


def _name_modules(gm: fx.GraphModule) -> None:
    """Give the stacks of modules classes for the names of classes that torch.export writes."""
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            continue
        found = {}
        for key, (path, kind) in stack.items():
            if path:  # the root is no scope
                found[key] = (path, _class(kind) if isinstance(kind, str) else kind)
        node.meta["nn_module_stack"] = found


def _class(name: str) -> Any:
    """The class with a qualified name, where its module is imported; else the name."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, name)


# -- the words ------------------------------------------------------------------------------------


def _translate(gm: fx.GraphModule, node: fx.Node, *, writes: bool) -> None:
    name = _overload(node)
    if not name:
        return
    made: _Call | None = None
    if name in _SAME:
        made = _Call(_SAME[name], tuple(node.args), dict(node.kwargs))
    elif name in _FIRST_RESULT:
        _take_first(gm, node, name)
        return
    elif name in _OTHERWISE:
        made = _OTHERWISE[name](_bound(node))
    elif name == "clone.default" and not writes:
        made = _Call("contiguous", (node.args[0],), {})
    if made is None:
        return
    node.op = "call_method" if isinstance(made.target, str) else "call_function"
    node.target = made.target
    node.args, node.kwargs = made.args, dict(made.kwargs)


def _bound(node: fx.Node) -> dict[str, Any]:
    """Schema name -> argument, defaults filled in; ``self`` is ``input``."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]  # an overload
    bound = {a.name: a.default_value for a in arguments if a.has_default_value()}
    bound |= {a.name: value for a, value in zip(arguments, node.args, strict=False)}
    bound |= node.kwargs
    if "self" in bound:
        bound["input"] = bound.pop("self")
    return bound


def _take_first(gm: fx.GraphModule, node: fx.Node, name: str) -> None:
    """Let who reads the first of several results read a function that gives it alone."""
    items = [user for user in node.users if user.target is operator.getitem]
    read = [item for item in items if item.users]
    if len(items) != len(node.users) or any(item.args[1] != 0 for item in read):
        return
    made = _FIRST_RESULT[name](_bound(node))
    if made is None:
        return
    for item in items:
        item.replace_all_uses_with(node)
        gm.graph.erase_node(item)
    node.target = made.target
    node.args, node.kwargs = made.args, dict(made.kwargs)


def _call(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> _Call:
    return _Call(target, args, kwargs)


def _convolution(a: _Arguments) -> _Call | None:
    dimensions = len(a["stride"])
    if dimensions not in (1, 2, 3):
        return None
    head = (a["input"], a["weight"], a["bias"], a["stride"], a["padding"])
    if a["transposed"]:
        transposing = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        rest = (a["output_padding"], a["groups"], a["dilation"])
        return _call(transposing[dimensions - 1], *head, *rest)
    target = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    return _call(target, *head, a["dilation"], a["groups"])


def _batch_norm(a: _Arguments) -> _Call:
    return _call(
        F.batch_norm,
        *(a["input"], a["running_mean"], a["running_var"], a["weight"], a["bias"]),
        *(a.get("training", False), a["momentum"], a["eps"]),
    )


def _layer_norm(a: _Arguments) -> _Call:
    return _call(F.layer_norm, a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"])


def _transposed_weight(node: Any) -> fx.Node | None:
    """The weight behind ``w.t()``, as decompositions write linears."""
    if not isinstance(node, fx.Node) or node.target not in ("t", torch.permute, torch.transpose):
        return None
    order = _flat(node.args[1:])
    if order != [1, 0] and not (node.target is torch.transpose and order == [0, 1]) and order:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _addmm(a: _Arguments) -> _Call:
    weight, bias = _transposed_weight(a["mat2"]), a["input"]
    factors = {name: a[name] for name in ("beta", "alpha") if a[name] != 1}
    constant = isinstance(bias, fx.Node) and bias.op == "get_attr"
    if weight is None or not constant or factors:
        return _call(torch.addmm, bias, a["mat1"], a["mat2"], **factors)
    return _call(F.linear, a["mat1"], weight, bias)


def _mm(a: _Arguments) -> _Call:
    weight = _transposed_weight(a["mat2"])
    if weight is not None:
        return _call(F.linear, a["input"], weight)
    return _call(torch.mm, a["input"], a["mat2"])


def _upsample(mode: str) -> Callable[[_Arguments], _Call]:
    def made(a: _Arguments) -> _Call:
        corners = {} if mode == "nearest" else {"align_corners": a["align_corners"]}
        return _call(
            F.interpolate, a["input"], a["output_size"], a["scale_factors"], mode=mode, **corners
        )

    return made


def _inplace(target: Callable[..., Any], *names: str) -> Callable[[_Arguments], _Call]:
    return lambda a: _call(target, a["input"], *(a[name] for name in names), inplace=True)


def _slice(a: _Arguments) -> _Call | None:
    dim, end = a["dim"], a["end"]
    if not isinstance(dim, int) or dim < 0:
        return None
    if end == sys.maxsize:
        end = None
    piece = slice(a["start"], end, a["step"])
    index = (*(slice(None, None, None) for _ in range(dim)), piece)
    return _call(operator.getitem, a["input"], index)


def _elu(a: _Arguments) -> _Call | None:
    if (a["scale"], a["input_scale"]) != (1, 1):
        return None
    return _call(F.elu, a["input"], a["alpha"])


def _softmax(a: _Arguments) -> _Call | None:
    if a.get("dtype") is not None or a.get("half_to_float"):
        return None
    return _call(torch.softmax, a["input"], a["dim"])


def _pooled(target: Callable[..., Any]) -> Callable[[_Arguments], _Call]:
    return lambda a: _call(
        target,
        *(a["input"], a["kernel_size"], a["stride"] or None, a["padding"], a["dilation"]),
        a["ceil_mode"],
    )


def _averaged(target: Callable[..., Any]) -> Callable[[_Arguments], _Call]:
    def made(a: _Arguments) -> _Call:
        rest = (a["divisor_override"],) if "divisor_override" in a else ()
        return _call(
            target,
            *(a["input"], a["kernel_size"], a["stride"] or None, a["padding"], a["ceil_mode"]),
            *(a["count_include_pad"], *rest),
        )

    return made


_SAME: Final[dict[str, Callable[..., Any] | str]] = {
    "conv1d.default": F.conv1d,
    "conv2d.default": F.conv2d,
    "conv3d.default": F.conv3d,
    "conv1d.padding": F.conv1d,
    "conv2d.padding": F.conv2d,
    "conv3d.padding": F.conv3d,
    "conv_transpose1d.default": F.conv_transpose1d,
    "conv_transpose2d.input": F.conv_transpose2d,
    "conv_transpose3d.input": F.conv_transpose3d,
    "linear.default": F.linear,
    "matmul.default": torch.matmul,
    "bmm.default": torch.bmm,
    "add.Tensor": torch.add,
    "add.Scalar": torch.add,
    "add_.Tensor": "add_",
    "add_.Scalar": "add_",
    "sub.Tensor": torch.sub,
    "sub.Scalar": torch.sub,
    "sub_.Tensor": "sub_",
    "sub_.Scalar": "sub_",
    "mul.Tensor": torch.mul,
    "mul.Scalar": torch.mul,
    "mul_.Tensor": "mul_",
    "mul_.Scalar": "mul_",
    "div.Tensor": torch.div,
    "div.Scalar": torch.div,
    "div.Tensor_mode": torch.div,
    "div_.Tensor": "div_",
    "div_.Scalar": "div_",
    "cat.default": torch.cat,
    "concat.default": torch.cat,
    "stack.default": torch.stack,
    "relu.default": torch.relu,
    "relu_.default": torch.relu_,
    "relu6.default": F.relu6,
    "hardtanh.default": F.hardtanh,
    "hardtanh_.default": F.hardtanh_,
    "clamp.default": torch.clamp,
    "clamp_.default": torch.clamp_,
    "clamp_min.default": torch.clamp_min,
    "clamp_min_.default": torch.clamp_min_,
    "clamp_max.default": torch.clamp_max,
    "clamp_max_.default": torch.clamp_max_,
    "leaky_relu.default": F.leaky_relu,
    "leaky_relu_.default": F.leaky_relu_,
    "hardswish.default": F.hardswish,
    "hardsigmoid.default": F.hardsigmoid,
    "silu.default": F.silu,
    "mish.default": F.mish,
    "gelu.default": F.gelu,
    "prelu.default": F.prelu,
    "sigmoid.default": torch.sigmoid,
    "sigmoid_.default": torch.sigmoid_,
    "tanh.default": torch.tanh,
    "tanh_.default": torch.tanh_,
    "adaptive_avg_pool1d.default": F.adaptive_avg_pool1d,
    "adaptive_avg_pool2d.default": F.adaptive_avg_pool2d,
    "_adaptive_avg_pool2d.default": F.adaptive_avg_pool2d,
    "adaptive_avg_pool3d.default": F.adaptive_avg_pool3d,
    "_adaptive_avg_pool3d.default": F.adaptive_avg_pool3d,
    "mean.dim": torch.mean,
    "mean.default": torch.mean,
    "pad.default": F.pad,
    "flatten.using_ints": torch.flatten,
    "reshape.default": torch.reshape,
    "_unsafe_view.default": torch.reshape,
    "view.default": "view",
    "permute.default": torch.permute,
    "transpose.int": torch.transpose,
    "t.default": "t",
    "squeeze.default": torch.squeeze,
    "squeeze.dim": torch.squeeze,
    "unsqueeze.default": torch.unsqueeze,
    "chunk.default": torch.chunk,
    "split.Tensor": torch.split,
    "split_with_sizes.default": torch.split,
    "split.sizes": torch.split,
    "unbind.int": torch.unbind,
    "select.int": torch.select,
    "narrow.default": torch.narrow,
    "expand.default": "expand",
    "contiguous.default": "contiguous",
    "detach.default": torch.detach,
    "repeat.default": "repeat",
    "dropout.default": F.dropout,
    "pixel_shuffle.default": F.pixel_shuffle,
    "pixel_unshuffle.default": F.pixel_unshuffle,
    "channel_shuffle.default": F.channel_shuffle,
    "scaled_dot_product_attention.default": F.scaled_dot_product_attention,
    "sym_size.int": "size",
}
"""Overload -> what takes the same arguments in the same order."""

_OTHERWISE: Final[dict[str, Callable[[_Arguments], _Call | None]]] = {
    "convolution.default": _convolution,
    "batch_norm.default": _batch_norm,
    "layer_norm.default": _layer_norm,
    "group_norm.default": lambda a: _call(
        F.group_norm, a["input"], a["num_groups"], a["weight"], a["bias"], a["eps"]
    ),
    "instance_norm.default": lambda a: _call(
        F.instance_norm,
        *(a["input"], a["running_mean"], a["running_var"], a["weight"], a["bias"]),
        *(a["use_input_stats"], a["momentum"], a["eps"]),
    ),
    "embedding.default": lambda a: _call(
        F.embedding,
        *(a["indices"], a["weight"], None if a["padding_idx"] < 0 else a["padding_idx"]),
    ),
    "addmm.default": _addmm,
    "mm.default": _mm,
    "elu.default": _elu,
    "softmax.int": _softmax,
    "_softmax.default": _softmax,
    "relu6_.default": _inplace(F.relu6),
    "hardswish_.default": _inplace(F.hardswish),
    "hardsigmoid_.default": _inplace(F.hardsigmoid),
    "silu_.default": _inplace(F.silu),
    "mish_.default": _inplace(F.mish),
    "dropout_.default": _inplace(F.dropout, "p", "train"),
    "max_pool1d.default": _pooled(F.max_pool1d),
    "max_pool2d.default": _pooled(F.max_pool2d),
    "max_pool3d.default": _pooled(F.max_pool3d),
    "avg_pool1d.default": _averaged(F.avg_pool1d),
    "avg_pool2d.default": _averaged(F.avg_pool2d),
    "avg_pool3d.default": _averaged(F.avg_pool3d),
    "upsample_nearest1d.vec": _upsample("nearest"),
    "upsample_nearest2d.vec": _upsample("nearest"),
    "upsample_nearest3d.vec": _upsample("nearest"),
    "upsample_linear1d.vec": _upsample("linear"),
    "upsample_bilinear2d.vec": _upsample("bilinear"),
    "upsample_trilinear3d.vec": _upsample("trilinear"),
    "upsample_bicubic2d.vec": _upsample("bicubic"),
    "constant_pad_nd.default": lambda a: _call(F.pad, a["input"], a["pad"], "constant", a["value"]),
    "slice.Tensor": _slice,
}
"""Overload -> the call, from its bound arguments; ``None`` leaves it as it is."""

_FIRST_RESULT: Final[dict[str, Callable[[_Arguments], _Call | None]]] = {
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "native_batch_norm.default": lambda a: None if a["training"] else _batch_norm(a),
    "native_layer_norm.default": _layer_norm,
    "max_pool2d_with_indices.default": _pooled(F.max_pool2d),
    "max_pool3d_with_indices.default": _pooled(F.max_pool3d),
}
"""Overloads with several results, of which the first is what a function of torch gives."""
