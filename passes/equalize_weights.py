"""equalize-weights: ``W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1)`` for a positive diagonal S.

``s_c = sqrt(r1_c / r2_c)``, with ``r1_c`` and ``r2_c`` the largest weights that write and read
channel ``c``, makes both ranges equal, so that one scale for a whole weight serves every channel.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
sections 4.1 and 4.1.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.clamps import CLAMP_KINDS, bounds_of
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of, shape_of
from fxquant.op_view import Form, Op, op_of
from fxquant.parameters import store_parameter
from fxquant.pass_manager import Fact, Pass, PassContext, PassResult, Refusal
from fxquant.passes.fold_batch_norm import spread_over_outputs
from fxquant.patterns.ownership import ParameterOwners
from fxquant.rewriter import GraphRewriter

_BASES: Final = frozenset(
    {"linear", *(f"{kind}{dim}d" for kind in ("conv", "conv_transpose") for dim in (1, 2, 3))}
)
_POOLS: Final = frozenset(
    f"{kind}_pool{dim}d"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
    for dim in (1, 2, 3)
)
_HOMOGENEOUS: Final = _POOLS | {"relu", "leaky_relu", "prelu", "identity", "dropout"}
"""``f(s x) = s f(x)`` for positive ``s``, channel by channel."""
_ROUNDS: Final = 20
_SETTLED: Final = 1e-3


@dataclass(frozen=True)
class EqualizeWeights(Pass):
    """Equalize the channel ranges of layers that follow each other.

    Between them may be what is positively homogeneous (relu, leaky_relu, prelu, pooling, padding
    with zeros, flatten). Chains are equalized again and again until nothing changes. The float
    function stays, up to rounding. Refuses, with the reason, where the value is read by others,
    where a weight belongs to more than one call, and where an activation saturates (relu6).

    Attributes:
        open_clamps: turn clamps to ``[0, high]`` between two layers into relu, which is
            homogeneous: the function changes where values exceed ``high``.
    """

    open_clamps: bool = False

    name: ClassVar[str] = "equalize-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.BATCH_NORM_FOLDED})

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Find the pairs, let their factors settle, then write every weight once."""
        search = _Search(gm, open_clamps=self.open_clamps)
        pairs = list(search.pairs())
        rewriter = GraphRewriter(gm, self.name)
        settling = _Settling(pairs)
        spreads = {pair: _spread(settling.layers[pair.first.node].written()) for pair in pairs}
        settling.run()
        for layer in settling.layers.values():
            layer.store(rewriter)
        for pair, before in spreads.items():
            for clamp in pair.clamps:
                rewriter.retarget(clamp, F.relu, (clamp.args[0],))
                add_reason(clamp, "it was a clamp, across which weights cannot be equalized")
            after = _spread(settling.layers[pair.first.node].written())
            add_reason(
                pair.first.node,
                f"equalized with {pair.second.node.name!r}: channel ranges differ by a factor of"
                f" {after:.3g} instead of {before:.3g}",
            )
        changes = rewriter.finish() + search.noted
        return PassResult(changes=changes, refusals=tuple(search.refusals))


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two layers, the second of which alone reads what the first writes.

    Attributes:
        first: writes the channels.
        second: reads them.
        clamps: what is to become a relu between them.
        repeats: how many features of ``second`` come from each channel, behind a flatten.
    """

    first: Op
    second: Op
    clamps: tuple[fx.Node, ...] = ()
    repeats: int = 1


@dataclass
class _Search:
    """Looks for pairs, and keeps why near misses are none.

    Attributes:
        gm: a graph with folded batch-norms.
        open_clamps: see :class:`EqualizeWeights`.
    """

    gm: QuantGraphModule
    open_clamps: bool
    refusals: list[Refusal] = field(default_factory=list)
    noted: int = 0

    def __post_init__(self) -> None:
        self.owners = ParameterOwners(self.gm)

    def pairs(self) -> Iterator[_Pair]:
        """In graph order."""
        for node in self.gm.graph.nodes:
            op = op_of(self.gm, node)
            if op is None or op.name not in _BASES:
                continue
            found = self._follow(op)
            if isinstance(found, _Pair):
                yield found
            elif found:
                self.refusals.append(Refusal(node=node.name, reason=found, culprits=()))
                before = record_of(node)
                add_reason(node, f"not equalized: {found}")
                self.noted += record_of(node) != before

    def _follow(self, first: Op) -> _Pair | str:
        """The pair that begins with ``first``; why there is none; or nothing to say."""
        clamps: list[fx.Node] = []
        repeats, node = 1, first.node
        while True:
            users = list(node.users)
            if len(users) != 1:
                return f"{node.name!r} is read by {len(users)} ops" if users else ""
            op = op_of(self.gm, users[0])
            if op is None or op.activations != (node,):
                return ""
            if op.name in _BASES:
                return self._unusable(first) or self._pair(first, op, clamps, repeats)
            problem = self._between(op, clamps)
            if problem is not None:
                return problem
            if op.name == "flatten":
                repeats = _features_of_a_channel(op)
                if repeats == 0:
                    return f"{op.node.name!r} joins more than the positions of a channel"
            node = op.node

    def _between(self, op: Op, clamps: list[fx.Node]) -> str | None:
        """Why an op cannot stand between two layers, or ``None``."""
        if op.name in _HOMOGENEOUS or op.name == "flatten":
            return None
        if op.name == "pad":
            plain = op.arguments.get("mode") == "constant" and not op.arguments.get("value")
            return None if plain else f"{op.node.name!r} does not pad with zeros"
        if op.name not in CLAMP_KINDS:
            return ""
        low, high = bounds_of(op)
        if low == 0 and high is None:
            return None
        if low == 0 and self.open_clamps:
            clamps.append(op.node)
            return None
        cure = "; equalize with relu6='relu' makes it a relu" if low == 0 else ""
        return f"{op.node.name!r} saturates{cure}"

    def _unusable(self, op: Op) -> str | None:
        """Why the weight of a layer cannot be changed, or ``None``."""
        for name in ("weight", "bias"):
            tensor = op.constant(name)
            if tensor is None:
                if name == "weight" or op.computes(name):
                    return f"the {name} of {op.node.name!r} is computed in the graph"
                continue
            others = [u.node.name for u in self.owners.uses(tensor) if u.node is not op.node]
            if others:
                return f"{op.node.name!r} shares its {name} with {others[0]!r}"
            if not bool(torch.isfinite(tensor).all()):
                return f"the {name} of {op.node.name!r} is not finite"
        if op.form is Form.MODULE:
            module = self.gm.get_submodule(str(op.node.target))
            if module._forward_pre_hooks or module._forward_hooks:
                return f"module {str(op.node.target)!r} has forward hooks"
        return None

    def _pair(self, first: Op, second: Op, clamps: list[fx.Node], repeats: int) -> _Pair | str:
        problem = self._unusable(second)
        if problem is not None:
            return problem
        if len(_Layer(first).written()) * repeats != len(_Layer(second).read()):
            return f"{second.node.name!r} reads other channels than {first.node.name!r} writes"
        return _Pair(first=first, second=second, clamps=tuple(clamps), repeats=repeats)


def _features_of_a_channel(flatten: Op) -> int:
    """How many features each channel becomes, or 0 where others are joined too."""
    start = flatten.arguments.get("start_dim", 0)
    end = flatten.arguments.get("end_dim", -1)
    shape = shape_of(flatten.activations[0])
    if shape is None or start != 1 or end not in (-1, len(shape) - 1):
        return 0
    return int(torch.Size(shape[2:]).numel())


class _Layer:
    """The weight of an op while factors settle; the op itself is not touched.

    Args:
        op: a convolution or linear.

    Attributes:
        outputs: what each output channel is multiplied by so far, float64.
        inputs: what each input channel is multiplied by so far, float64.
    """

    def __init__(self, op: Op) -> None:
        weight = op.constant("weight")
        assert weight is not None
        self.op, self.weight = op, weight.detach()
        self._groups = 1 if op.name == "linear" else int(op.arguments["groups"])
        self._transposed = op.name.startswith("conv_transpose")
        # [groups, outputs of a group, inputs of a group], each the largest of its positions.
        sizes = (self._groups, weight.shape[0] // self._groups, weight.shape[1])
        largest = self.weight.abs().flatten(2).amax(2) if weight.dim() > 2 else self.weight.abs()
        table = largest.reshape(sizes).to(torch.float64)
        self._table = table.transpose(1, 2) if self._transposed else table
        self.outputs = torch.ones_like(self.written())
        self.inputs = torch.ones_like(self.read())

    def written(self) -> Tensor:
        """The largest weight of each output channel."""
        return self._table.amax(2).flatten()

    def read(self) -> Tensor:
        """The largest weight of each input channel."""
        return self._table.amax(1).flatten()

    def scale_outputs(self, factors: Tensor) -> None:
        """Multiply the weights of every output channel."""
        self.outputs = self.outputs * factors
        self._table = self._table * factors.reshape(self._groups, -1, 1)

    def scale_inputs(self, factors: Tensor) -> None:
        """Multiply the weights of every input channel."""
        self.inputs = self.inputs * factors
        self._table = self._table * factors.reshape(self._groups, 1, -1)

    def store(self, rewriter: GraphRewriter) -> None:
        """Write weight and bias, each rounded once."""
        bias = self.op.constant("bias")
        by_output = spread_over_outputs(self.op, self.weight, self.outputs)
        factors = by_output * self._over_inputs()
        new = (self.weight.to(torch.float64) * factors).to(self.weight.dtype)
        store_parameter(rewriter, self.op, "weight", new, self.weight)
        if bias is not None:
            shifted = (bias.detach().to(torch.float64) * self.outputs).to(bias.dtype)
            store_parameter(rewriter, self.op, "bias", shifted, bias)

    def _over_inputs(self) -> Tensor:
        """The factors of the inputs, shaped to multiply the weight."""
        rest = (1,) * (self.weight.dim() - 2)
        if self._transposed:
            return self.inputs.reshape(-1, 1, *rest)
        by_group = self.inputs.reshape(self._groups, 1, -1)
        spread = by_group.expand(-1, self.weight.shape[0] // self._groups, -1)
        return spread.reshape(self.weight.shape[0], -1, *rest)


@dataclass
class _Settling:
    """All pairs of a graph, whose factors are chosen together.

    Attributes:
        pairs: in graph order; a layer may be the second of one and the first of the next.
        layers: by node.
    """

    pairs: list[_Pair]
    layers: dict[fx.Node, _Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pair in self.pairs:
            for op in (pair.first, pair.second):
                if op.node not in self.layers:
                    self.layers[op.node] = _Layer(op)

    def run(self) -> None:
        """Equalize every pair in turn until no factor changes."""
        for _ in range(_ROUNDS):
            if max((self._equalize(pair) for pair in self.pairs), default=0.0) < _SETTLED:
                return

    def _equalize(self, pair: _Pair) -> float:
        """Equalize one pair; the largest change, as a logarithm."""
        first, second = self.layers[pair.first.node], self.layers[pair.second.node]
        written, read = first.written(), second.read().reshape(-1, pair.repeats).amax(1)
        alive = (written > 0) & (read > 0)
        factors = torch.where(alive, (read / torch.where(alive, written, 1.0)).sqrt(), 1.0)
        first.scale_outputs(factors)
        second.scale_inputs((1 / factors).repeat_interleave(pair.repeats))
        return float(factors.log().abs().max())


def _spread(ranges: Tensor) -> float:
    """Largest by smallest range, of the channels that have any."""
    alive = ranges[ranges > 0]
    return float(alive.max() / alive.min()) if alive.numel() else 1.0
