"""What kernels of a target are emitted with: values, sites and the state of one lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from fxquant.clamps import CLAMP_KINDS
from fxquant.dataflow import reads_only_shape
from fxquant.graph_state import WeightLimit
from fxquant.kernel_table import KernelTable
from fxquant.kernels import as_bytes, as_quantized
from fxquant.metadata import record_of, update_record
from fxquant.op_view import Form, Op, attribute
from fxquant.operators import DEQUANTIZE
from fxquant.packing import PACKERS, scalar
from fxquant.rewriter import GraphRewriter

DEQUANTIZING = (DEQUANTIZE, torch.dequantize)
"""How a reference graph reads the float value of integers, and of a quantized tensor."""


class Representation(Enum):
    """How an int8 value is held between kernels."""

    QUANTIZED = "quantized"
    """A torch quantized tensor, which knows its scale and zero point."""
    BYTES = "bytes"
    """A plain uint8 tensor."""


@dataclass(frozen=True, slots=True)
class Bound:
    """An argument that is the current value of a 0-d buffer, inlined as a number."""

    buffer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IntValue:
    """An int8 value of the lowered graph.

    Attributes:
        node: what computes it.
        representation: how it is held.
        scale: name of the 0-d scale buffer; the node that asks a tensor for it where only that
            knows it.
        zero_point: the same for the zero point.
        root: the node that allocated its memory.
    """

    node: fx.Node
    representation: Representation
    scale: str | fx.Node
    zero_point: str | fx.Node
    root: fx.Node

    @property
    def bound_scale(self) -> Bound | fx.Node:
        """The scale as an argument of a kernel."""
        return Bound(self.scale) if isinstance(self.scale, str) else self.scale

    @property
    def bound_zero_point(self) -> Bound | fx.Node:
        """The zero point as an argument of a kernel."""
        return Bound(self.zero_point) if isinstance(self.zero_point, str) else self.zero_point


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """The nodes of a quantized weight: integers ``[O, ...]``, scale and zero point."""

    integers: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    per_channel: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One op, with the epilogues fused behind it, that is to become a kernel.

    Attributes:
        op: the first op, as a float op on dequantized values.
        epilogues: the further ops of the pattern that are still in the graph.
        quantize: the quantize node that alone reads the result; ``None`` where the result is read
            in floating point.
        lowering: state of the run.
    """

    op: Op
    epilogues: tuple[Op, ...]
    quantize: fx.Node | None
    lowering: Lowering

    @property
    def last(self) -> fx.Node:
        """The node whose value leaves the site."""
        return self.epilogues[-1].node if self.epilogues else self.op.node

    @property
    def members(self) -> tuple[fx.Node, ...]:
        """All nodes of the site."""
        return (self.op.node, *(op.node for op in self.epilogues))

    def integers(self, argument: object) -> IntValue | None:
        """The int8 value behind a dequantized argument, or ``None`` for a float one."""
        if not isinstance(argument, fx.Node) or argument.target not in DEQUANTIZING:
            return None
        return self.lowering.values.get(argument.args[0])

    def inputs(self) -> tuple[IntValue, ...] | None:
        """The int8 values of all activations, or ``None`` where one is in floating point."""
        found = [self.integers(a) for a in self.op.activations]
        known = [value for value in found if value is not None]
        return tuple(known) if len(known) == len(found) else None

    def weight(self) -> Weight | None:
        """The quantized weight, or ``None`` where the weight is in floating point."""
        node = self.op.arguments.get("weight")
        if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
            return None
        integers, scale, zero_point, *axis = node.args
        assert isinstance(integers, fx.Node) and isinstance(scale, fx.Node)
        assert isinstance(zero_point, fx.Node)
        per_channel = bool(axis) and axis[0] is not None
        return Weight(
            integers=integers, scale=scale, zero_point=zero_point, per_channel=per_channel
        )

    @property
    def output_scale(self) -> Bound | float:
        """The output's scale, or 1 for a float result."""
        return 1.0 if self.quantize is None else Bound(_buffer(self.quantize.args[1]))

    @property
    def output_zero_point(self) -> Bound | int:
        """The output's zero point, or 0 for a float result."""
        return 0 if self.quantize is None else Bound(_buffer(self.quantize.args[2]))


class _Values(dict[object, IntValue]):
    """Quantize node -> its value, and what allocated a value -> the quantize nodes that hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[fx.Node | None, list[fx.Node]] = {}

    def __setitem__(self, key: object, value: IntValue) -> None:
        super().__setitem__(key, value)
        if isinstance(key, fx.Node):
            self.holders.setdefault(value.root, []).append(key)


@dataclass
class Lowering:
    """State of one lowering: what integers exist, and how to make more.

    Attributes:
        rewriter: of the graph.
        values: quantize node of the reference graph -> its value in the lowered graph.
        order: when each reference node's kernel runs, as a position in the graph.
        engines: of the target; empty where it chooses by form.
        limits: the kernels that were chosen, with the weights that they read.
        kernels: measured times to choose by; ``None`` for the usual kernels.
    """

    rewriter: GraphRewriter
    values: _Values = field(default_factory=_Values)
    order: Mapping[fx.Node, int] = field(default_factory=dict)
    engines: tuple[str, ...] = ()
    limits: list[WeightLimit] = field(default_factory=list)
    kernels: KernelTable | None = None
    _converted: dict[tuple[fx.Node, Representation], fx.Node] = field(default_factory=dict)

    @property
    def gm(self) -> Any:
        """The module that is lowered."""
        return self.rewriter.gm

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        at: fx.Node,
        like: fx.Node | None = None,
        kernel: str = "",
        dtype: torch.dtype | None = None,
        name: str | None = None,
        origins: tuple[str, ...] = (),
    ) -> fx.Node:
        """Insert a call before ``at``; :class:`Bound` arguments are inlined and remembered."""
        bound = tuple((i, a.buffer) for i, a in enumerate(args) if isinstance(a, Bound))
        plain = tuple(
            scalar(attribute(self.gm, a.buffer)) if isinstance(a, Bound) else a for a in args
        )
        return self.rewriter.call(
            target,
            plain,
            before=at,
            like=like or at,
            name=name,
            dtype=dtype,
            bound=bound,
            kernel=kernel,
            origins=origins,
        )

    def pack(self, packer: str, args: tuple[Any, ...], *, at: fx.Node) -> fx.Node:
        """Insert the packing of a weight; the prepack pass makes a constant of it."""
        return self.call(PACKERS[packer].function, args, at=at, name=f"{at.name}_packed")

    def emit(
        self, site: Site, target: Callable[..., Any], args: tuple[Any, ...], kernel: str
    ) -> fx.Node:
        """Insert the kernel of a site: it carries the site's records and origins."""
        record = record_of(site.op.node)
        origins = tuple(o for node in site.members for o in record_of(node).origins)
        reasons = tuple(dict.fromkeys(r for n in site.members for r in record_of(n).reasons))
        node = self.call(
            target,
            args,
            at=site.last,
            like=site.last,
            kernel=kernel,
            dtype=torch.uint8 if site.quantize is not None else torch.float32,
            name=f"{site.op.node.name}_int8",
            origins=origins,
        )
        update_record(
            node,
            rule=record.rule,
            qconfig=record.qconfig,
            annotation=record.annotation,
            fusion=record.fusion,
            share_group=record.share_group,
            reasons=reasons,
            scope=record.scope,
            module=str(site.op.node.target) if site.op.form is Form.MODULE else record.module,
        )
        return node

    def result(
        self, site: Site, node: fx.Node, held: Representation, root: fx.Node | None = None
    ) -> None:
        """Register ``node`` as the site's int8 result."""
        assert site.quantize is not None
        record = record_of(site.op.node)
        moved = record.annotation is not None and record.annotation.shares
        if not moved or site.op.name in CLAMP_KINDS:  # what only moves stays inside the range
            node, held, root = self.within(site.quantize, node, held, root, at=site.last)
        update_record(node, stands_for=site.quantize.name)
        inputs = site.inputs() if moved else None
        # Those of the input are the same numbers, unless a kernel before chose its own.
        scale, zero_point = (
            (inputs[0].scale, inputs[0].zero_point)
            if inputs
            else (_buffer(site.quantize.args[1]), _buffer(site.quantize.args[2]))
        )
        self.values[site.quantize] = IntValue(
            node=node,
            representation=held,
            scale=scale,
            zero_point=zero_point,
            root=root or node,
        )

    def describing_itself(self, node: fx.Node) -> IntValue:
        """``node`` as a value whose parameters only the tensor itself knows, when it runs."""
        ask = (torch.q_scale, torch.q_zero_point)
        scale, zero_point = (
            self.rewriter.call(question, (node,), after=node, like=node, value=None, has_value=True)
            for question in ask
        )
        return IntValue(
            node=node,
            representation=Representation.QUANTIZED,
            scale=scale,
            zero_point=zero_point,
            root=node,
        )

    def within(
        self,
        quantize: fx.Node,
        node: fx.Node,
        held: Representation,
        root: fx.Node | None,
        *,
        at: fx.Node,
    ) -> tuple[fx.Node, Representation, fx.Node | None]:
        """``node`` cut to the range of ``quantize``: kernels saturate at 0 and 255 only.

        Returns:
            The value, how it is held and what allocated it: as given where the range is 0..255.
        """
        low, high = quantize.args[3:5]
        if (low, high) == (0, 255):
            return node, held, root
        if held is Representation.QUANTIZED:
            node = self.call(as_bytes, (node,), at=at, like=node, dtype=torch.uint8)
        cut = self.call(
            torch.clamp,
            (node, low, high),
            at=at,
            like=node,
            dtype=torch.uint8,
            kernel="aten::clamp on bytes",
        )
        return cut, Representation.BYTES, cut

    def result_float(self, site: Site, node: fx.Node) -> None:
        """Let the readers of the site's float value read ``node``."""
        update_record(node, stands_for=site.last.name)
        self.rewriter.replace_uses(site.last, node)

    def held_as(self, value: IntValue, wanted: Representation, *, at: fx.Node) -> fx.Node:
        """``value`` in the wanted representation, converted once, right after it is made."""
        if value.representation is wanted:
            return value.node
        key = (value.node, wanted)
        if key not in self._converted:
            following = value.node.next
            if wanted is Representation.BYTES:
                made = self.call(
                    as_bytes, (value.node,), at=following, like=value.node, dtype=torch.uint8
                )
            else:
                made = self.call(
                    as_quantized,
                    (value.node, value.bound_scale, value.bound_zero_point),
                    at=following,
                    like=value.node,
                    dtype=torch.uint8,
                )
            self._converted[key] = made
        return self._converted[key]

    def last_reader(self, value: IntValue) -> tuple[int, str]:
        """When the memory of ``value`` is read last, and by which reference node."""
        last, name = -1, ""
        for quantize in self.values.holders.get(value.root, []):
            for user in quantize.users:
                readers = user.users if user.target in DEQUANTIZING else [user]
                for reader in readers:
                    if reads_only_shape(reader):
                        continue
                    position = self.order.get(reader, 1 << 60)
                    if position > last:
                        last, name = position, reader.name
        return last, name


def _buffer(argument: object) -> str:
    assert isinstance(argument, fx.Node) and argument.op == "get_attr"
    return str(argument.target)
