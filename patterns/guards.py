"""The conditions under which a chain of ops may be rewritten as one, each written once.

A guard takes a :class:`~fxquant.patterns.match.Match` whose structure fits and gives ``None``, or
the reason to refuse it with the names of the culprits. Guards that concern particular steps are
made by functions that take the names the steps are bound to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import fx

from fxquant.metadata import TensorRecord, record_of, shape_of
from fxquant.op_view import Form, Op
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.ownership import ParameterUse
from fxquant.patterns.pattern import Guard, guard

_CLAMP_BOUNDS = ("min", "max", "min_val", "max_val", "negative_slope")
_EFFECT_ON_OWNER = "so rewriting it for {pattern} would change {use!r}"
_BINARY = frozenset({"add", "sub", "mul", "div"})


# -- users and memory -----------------------------------------------------------------------------


@guard
def single_user(match: Match) -> Reason | None:
    """The value of every op but the last is used by the next op alone, and once."""
    for op, following in _pairs(match):
        users = match.facts.users(op.node)
        if len(users) > 1:
            others = tuple(user.name for user in users if user is not following.node)
            return because(
                f"the output of {{node!r}} is also used by {{others}}, so {_effect(op, following)}"
                " would change {others}",
                *others,
                node=op.node.name,
                following=following.node.name,
                others=others,
            )
        times = _count(following.node, op.node)
        if times > 1:
            return because(
                "{following!r} takes the output of {node!r} {times} times, so the two are no chain",
                following.node.name,
                node=op.node.name,
                following=following.node.name,
                times=times,
            )
    return None


@guard
def no_mutation_between(match: Match) -> Reason | None:
    """No in-place op changes what the chain reads before its last op, or is seen outside it."""
    aliasing = match.facts.aliasing
    for op in match.ops[:-1]:
        for value in (*op.node.all_input_nodes, op.node):
            writer = aliasing.writer_between(value, op.node, match.last, match.nodes)
            if writer is not None:
                return because(
                    "{writer!r} writes in place, between {node!r} and {last!r}, what may be the "
                    "memory of {value!r}",
                    writer.name,
                    writer=writer.name,
                    value=value.name,
                    node=op.node.name,
                    last=match.last.name,
                )
    for node in match.nodes:
        why = _visible_write(match, node)
        if why is not None:
            return why
    return None


def _visible_write(match: Match, node: fx.Node) -> Reason | None:
    """Why the in-place op ``node`` cannot lose its side effect, or ``None``."""
    aliasing = match.facts.aliasing
    value = aliasing.written_by(node)
    if value is None:
        return None
    external = aliasing.external(value)
    if external is not None:
        what = "the model's input" if external.op == "placeholder" else "the attribute"
        return because(
            f"{{node!r}} writes {{value!r}} in place, which may be {what} {{external!r}}; "
            "use the form that is not in place",
            node.name,
            external.name,
            node=node.name,
            value=value.name,
            external=external.name,
        )
    reader = aliasing.reader_after(value, node)
    if reader is not None:
        return because(
            "{node!r} writes {value!r} in place, and {reader!r} reads afterwards what may be its "
            "memory; use the form that is not in place",
            node.name,
            reader.name,
            node=node.name,
            value=value.name,
            reader=reader.name,
        )
    return None


# -- parameters -----------------------------------------------------------------------------------


def sole_owner_of_parameter(*binds: str) -> Guard:
    """The weights, biases and statistics of these steps are read by no other node.

    Not by another call of the same module, nor through a tied module, another attribute or a
    tensor that shares the memory.

    Args:
        binds: the steps whose parameters would be rewritten.
    """
    return Guard("sole_owner_of_parameter", partial(_sole_owner, binds=binds))


def _sole_owner(match: Match, binds: tuple[str, ...]) -> Reason | None:
    for bind in binds:
        op = match.op(bind)
        for name in op.kind.constants:
            tensor = op.constant(name)
            if tensor is None:
                continue
            for use in match.facts.owners.uses(tensor):
                if use.node is not op.node:
                    return _shared(match, op, name, use)
    return None


def _shared(match: Match, op: Op, name: str, use: ParameterUse) -> Reason:
    path = op.constant_path(name)
    if op.form is Form.MODULE and use.node.target == op.node.target:
        template = "module {module!r} is called by {node!r} and also by {use!r}, {effect}"
        advice = "give each call a module of its own"
    elif use.path == path:
        template = "the {name} of {node!r}, {path!r}, is also used by {use!r}, {effect}"
        advice = "give each use a parameter of its own"
    else:
        template = (
            "the {name} of {node!r}, {path!r}, shares its memory with {other!r}, "
            "which {use!r} uses, {effect}"
        )
        advice = "untie the two"
    return because(
        f"{template.replace('{effect}', _EFFECT_ON_OWNER)}; {advice}",
        use.node.name,
        name=name,
        node=op.node.name,
        module=str(op.node.target),
        path=path,
        other=use.path,
        use=use.node.name,
        pattern=match.pattern.name,
    )


@guard
def constant_weight(match: Match) -> Reason | None:
    """Weights, biases and statistics are parameters, not computed in the graph."""
    for op in match.ops:
        for name in op.kind.constants:
            source = op.arguments.get(name)
            if op.computes(name) and isinstance(source, fx.Node):
                return because(
                    f"the {name} of {{node!r}} is computed in the graph by {{source!r}}, "
                    "it is no parameter whose value is known beforehand",
                    source.name,
                    node=op.node.name,
                    source=source.name,
                )
    return None


@guard
def no_hooks(match: Match) -> Reason | None:
    """No module of the chain has forward hooks, which the rewritten op would not run."""
    for op in match.ops:
        if op.form is not Form.MODULE:
            continue
        module = op.owner.get_submodule(str(op.node.target))
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if hooks:
            return because(
                "module {path!r} has the forward hook(s) {hooks}, which would no longer run; "
                "remove them before, or keep the module out of quantization",
                op.node.name,
                path=str(op.node.target),
                hooks=tuple(getattr(hook, "__name__", type(hook).__name__) for hook in hooks),
            )
    return None


# -- batch normalisation --------------------------------------------------------------------------


@guard
def evaluation_mode(match: Match) -> Reason | None:
    """Every batch-norm normalises with its running statistics."""
    for op in _batch_norms(match):
        training = op.arguments["training"]
        if isinstance(training, fx.Node):
            return because(
                "whether {node!r} trains is computed in the graph by {source!r}; pass a constant",
                training.name,
                node=op.node.name,
                source=training.name,
            )
        if training:
            advice = "call model.eval() first"
            if op.form is Form.FUNCTION:
                advice = "it is called with training=True"
            return because(
                "{node!r} is in training mode and normalises with the statistics of each batch; "
                f"{advice}",
                op.node.name,
                node=op.node.name,
            )
    return None


@guard
def same_training_mode(match: Match) -> Reason | None:
    """All modules of the chain train, or none does."""
    modes = {
        op.node.name: bool(op.owner.get_submodule(str(op.node.target)).training)
        for op in match.ops
        if op.form is Form.MODULE
    }
    if len(set(modes.values())) < 2:
        return None
    training = tuple(name for name, mode in modes.items() if mode)
    others = tuple(name for name, mode in modes.items() if not mode)
    return because(
        "{training} is in training mode and {others} is not; set one mode for both",
        *training,
        training=training,
        others=others,
    )


@guard
def has_running_statistics(match: Match) -> Reason | None:
    """Every batch-norm has a running mean and variance."""
    for op in _batch_norms(match):
        for name in ("running_mean", "running_var"):
            if op.constant(name) is None:
                return because(
                    f"{{node!r}} has no {name} (track_running_stats=False), so it normalises "
                    "with the statistics of each batch even in evaluation mode",
                    op.node.name,
                    node=op.node.name,
                )
    return None


def channel_match(producer: str, bn: str) -> Guard:
    """The batch-norm normalises the output channels of the op before it.

    The number of features equals that of output channels, and the channels are dimension 1 of the
    output: ``Linear -> BatchNorm1d`` on ``(N, L, F)`` normalises L. Where example inputs did not
    run the rank is unknown and the usual, batched, one is taken for granted.

    Args:
        producer: the step of the convolution or linear.
        bn: the step of the batch-norm.
    """
    return Guard("channel_match", partial(_channel_match, producer=producer, bn=bn))


def _channel_match(match: Match, producer: str, bn: str) -> Reason | None:
    op, norm = match.op(producer), match.op(bn)
    weight, mean = op.constant("weight"), norm.constant("running_mean")
    if weight is None or mean is None:
        return because(
            "the weight of {node!r} or the running mean of {norm!r} is no tensor of the model",
            op.node.name,
            norm.node.name,
            node=op.node.name,
            norm=norm.node.name,
        )
    channels = weight.shape[0]
    if op.name.startswith("conv_transpose"):
        channels = weight.shape[1] * int(op.arguments["groups"])
    if mean.numel() != channels:
        return because(
            "{norm!r} has {features} features and {node!r} has {channels} output channels",
            norm.node.name,
            node=op.node.name,
            norm=norm.node.name,
            features=mean.numel(),
            channels=channels,
        )
    shape = shape_of(op.node)
    rank = 2 if op.name == "linear" else weight.dim()
    if shape is not None and len(shape) != rank:
        return because(
            "the output of {node!r} has the shape {shape}, whose dimension 1, which {norm!r} "
            "normalises, is not that of the output channels",
            norm.node.name,
            node=op.node.name,
            norm=norm.node.name,
            shape=shape,
        )
    return None


# -- operands and their values --------------------------------------------------------------------


@guard
def same_shape(match: Match) -> Reason | None:
    """Both operands of an addition to the chain are activations of one shape: no broadcasting."""
    for bind, other in match.operands.items():
        node, step = _meeting(match, bind)
        if isinstance(other, fx.Node) and other.op == "get_attr":
            return because(
                "{step!r} combines {node!r} with the constant {other!r}, not with an activation",
                other.name,
                step=step.name,
                node=node.name,
                other=str(other.target),
            )
        shape = shape_of(node)
        other_shape = shape_of(other) if isinstance(other, fx.Node) else ()
        if shape is None or other_shape is None:
            unknown = node.name if shape is None else str(other)
            return because(
                "the shape of {unknown!r} is not known because example inputs did not run, so "
                "{step!r} may broadcast; pass example inputs that the model accepts",
                unknown,
                unknown=unknown,
                step=step.name,
            )
        if shape != other_shape:
            return because(
                "{step!r} broadcasts: {node!r} has the shape {shape} and {other!r} {other_shape}",
                step.name,
                step=step.name,
                node=node.name,
                shape=shape,
                other=str(other),
                other_shape=other_shape,
            )
    return None


@guard
def not_scalar_operand(match: Match) -> Reason | None:
    """Both operands of every add, sub, mul and div of the chain are tensors."""
    for op in match.ops:
        if op.name not in _BINARY:
            continue
        for name in op.kind.activations:
            value = op.arguments[name]
            if not isinstance(value, fx.Node):
                return because(
                    "{node!r} combines a tensor with the number {value}, not with a tensor",
                    op.node.name,
                    node=op.node.name,
                    value=value,
                )
            record = record_of(value)
            if record.has_value and not isinstance(record.value, TensorRecord):
                return because(
                    "{node!r} combines a tensor with {value!r}, which gives no tensor",
                    value.name,
                    node=op.node.name,
                    value=value.name,
                )
    return None


@guard
def unit_alpha(match: Match) -> Reason | None:
    """``torch.add(a, b, alpha=...)`` scales nothing."""
    for op in match.ops:
        alpha = op.arguments.get("alpha", 1) if op.name in ("add", "sub") else 1
        if isinstance(alpha, fx.Node) or alpha != 1:
            return because(
                "{node!r} multiplies its second operand by alpha={alpha}; only alpha=1 is fused",
                op.node.name,
                node=op.node.name,
                alpha=alpha,
            )
    return None


@guard
def constant_bounds(match: Match) -> Reason | None:
    """The bounds of clamps and the slopes of leaky ReLUs are numbers."""
    for op in match.ops:
        for name in _CLAMP_BOUNDS:
            value = op.arguments.get(name)
            if isinstance(value, fx.Node):
                return because(
                    f"the argument {name} of {{node!r}} is the tensor or value of {{value!r}}, "
                    "not a number",
                    value.name,
                    node=op.node.name,
                    value=value.name,
                )
            if isinstance(value, float) and math.isnan(value):
                return because(
                    f"the argument {name} of {{node!r}} is not a number (NaN)",
                    op.node.name,
                    node=op.node.name,
                )
    return None


@guard
def same_dtype(match: Match) -> Reason | None:
    """All tensors that enter the chain, as far as their dtypes are known, are one float dtype."""
    first: tuple[str, torch.dtype] | None = None
    for node, name, dtype in _dtypes(match):
        if not dtype.is_floating_point:
            return because(
                "{name!r} is {dtype}; only tensors of floating point are quantized",
                node.name,
                name=name,
                dtype=dtype,
            )
        if first is None:
            first = (name, dtype)
        elif dtype != first[1]:
            return because(
                "{one!r} is {one_dtype} and {two!r} is {two_dtype}; one chain takes one dtype",
                node.name,
                one=first[0],
                one_dtype=first[1],
                two=name,
                two_dtype=dtype,
            )
    return None


# -- helpers --------------------------------------------------------------------------------------


def _pairs(match: Match) -> Iterator[tuple[Op, Op]]:
    return zip(match.ops, match.ops[1:], strict=False)


def _batch_norms(match: Match) -> Iterator[Op]:
    return (op for op in match.ops if op.name == "batch_norm")


def _effect(op: Op, following: Op) -> str:
    """What the rewrite does to ``op``, as a clause with ``{node!r}`` and ``{following!r}``."""
    if following.name == "batch_norm" and "weight" in op.kind.constants:
        return "folding {following!r} into its weight"
    return "making one op of {node!r} and {following!r}"


def _count(user: fx.Node, value: fx.Node) -> int:
    """How many times ``user`` takes ``value``."""
    times = 0

    def see(node: fx.Node) -> fx.Node:
        nonlocal times
        times += node is value
        return node

    fx.map_arg((user.args, user.kwargs), see)
    return times


def _meeting(match: Match, other: str) -> tuple[fx.Node, fx.Node]:
    """The node whose value meets the operand ``other``, and the binary node where they meet."""
    index = next(i for i, one in enumerate(match.pattern.steps) if one.other == other)
    return match.nodes[index - 1], match.nodes[index]


def _dtypes(match: Match) -> Iterator[tuple[fx.Node, str, torch.dtype]]:
    """Node to blame, what it is called, and the dtype, of all that the chain reads."""
    for op in match.ops:
        for node in op.activations:
            value = record_of(node).value
            if isinstance(value, TensorRecord):
                yield node, node.name, value.dtype
        for name in op.kind.constants:
            tensor = op.constant(name)
            if tensor is not None:
                yield op.node, op.constant_path(name) or name, tensor.dtype
