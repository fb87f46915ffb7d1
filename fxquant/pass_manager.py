"""What a pass is, and the manager that runs a pipeline of them and believes none of them.

A pass declares what it needs and what it gives as facts (:class:`Fact`). The order of a pipeline is
checked when it is built and never changed silently. After every pass the manager verifies the graph
and compares it with the graph before: a pass that says "nothing changed" and changed something is
an error, and so is the opposite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import nn

from fxquant.errors import Diagnostics, PassContractError
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import GraphState
from fxquant.late_code import code_written_once
from fxquant.metadata import record_of
from fxquant.op_view import attribute, submodule
from fxquant.targets.table import Target
from fxquant.verify import verify
from fxquant.weight_fit import KnownWeights


class Fact(Enum):
    """Something that holds for a graph from some pass on."""

    FUNCTIONAL = "no op writes its input in place"
    NO_IDENTITIES = "ops that do nothing in evaluation are gone"
    PIECES_TAKEN = "every piece of a split tensor has an op of its own"
    SHUFFLES_RECOGNIZED = "channel shuffles that are spelt out are one op"
    LINEARS_RECOGNIZED = "products with a constant are linears"
    BATCH_NORM_FOLDED = "batch-norms that can be folded are folded"
    SCALES_FOLDED = "constant factors that can be folded into weights are folded"
    PADDING_SEPARATED = "convolutions pad with zeros only"
    FUSED = "fused patterns are marked"
    QCONFIGS = "every op has its qconfig"
    ANNOTATED = "every op has its specs or a reason"
    HALF_ANNOTATED = "ops that run in half precision are marked"
    SHARED = "tensors with common parameters are grouped"
    OBSERVED = "observers are inserted"
    GROUPS_SPLIT = "values share parameters where that loses less than requantizing them"
    WEIGHTS_TRAIN = "weights that will be integers are rounded while they train"
    WEIGHTS_FROZEN = "weights train no more; what they were rounded to is known"
    MEANS_WATCHED = "channel means of inputs are watched"
    BIAS_CORRECTED = "biases make up for rounded weights, and the channel means are gone"
    REFERENCE = "the graph is quantize, dequantize and float ops"
    ABSORBED = "clamps that the output range expresses are gone"
    CANCELLED = "no redundant quantize and dequantize"
    MODULES_INLINED = "ops that stay in floating point are function calls"
    HALF_CAST = "ops that run in half precision have half constants, and casts around them"
    BOUNDARY_MARKED = "inputs and results that are quantized tensors are marked"
    NESTED = "modules that are quantized on their own are in place"
    NESTED_CONVERTED = "modules that are quantized on their own are converted"
    EXCHANGED = "quantized tensors are handed over where they are taken and given"
    WEIGHTS_FOLDED = "no weight is quantized at run time"
    WEIGHTS_FIT = "no weight overflows the sums of a kernel of this machine"
    LOWERED = "ops are kernels of the target"
    WEIGHTS_LAID_OUT = "convolutions in floating point write channels_last, as int8 kernels do"
    BOUNDARY_GUARDED = "inputs are checked and outputs have the float model's layout"
    PACKED = "packed constants exist"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Something a pass left alone, and why."""

    node: str
    reason: str
    culprits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a pass did.

    Attributes:
        changes: number of changes to the graph, its metadata or its tensors.
        refusals: what it left alone, with reasons.
    """

    changes: int
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What passes of one run share.

    Attributes:
        target: the op table.
        diagnostics: takes warnings.
        weights: what is known of weights that were quantized.
    """

    target: Target
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    weights: KnownWeights = field(default_factory=KnownWeights)


class Pass(ABC):
    """One rewrite or analysis of a graph; options of a pass are dataclass fields."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()

    @abstractmethod
    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        """Change ``gm`` in place and say what was changed and what was refused."""


@dataclass(frozen=True)
class Pipeline:
    """A named, ordered tuple of passes, validated when built.

    Args:
        name: for messages.
        passes: in the order in which they run.
        given: facts that hold before the first pass.

    Raises:
        PassContractError: a pass needs a fact that no pass before it gives; all such passes are
            named in one message.
    """

    name: str
    passes: tuple[Pass, ...]
    given: frozenset[Fact] = frozenset()

    def __post_init__(self) -> None:
        facts = set(self.given)
        problems = []
        for item in self.passes:
            for missing in sorted(item.requires - facts, key=lambda fact: fact.name):
                problems.append(f"{item.name} needs {missing.name} ({missing.value})")
            facts |= item.establishes
        if problems:
            raise PassContractError(
                f"pipeline {self.name!r} is out of order: {'; '.join(problems)}"
            )

    def run(
        self, gm: QuantGraphModule, context: PassContext, *, check: bool = True
    ) -> dict[str, PassResult]:
        """Run every pass on ``gm``, verifying after each.

        Args:
            gm: changed in place.
            context: target and diagnostics.
            check: verify and compare after every pass; on unless profiling.

        Returns:
            pass name -> result.

        Raises:
            PassContractError: a pass lied about its changes.
            GraphError: a pass left the graph in a state that is not allowed, named with the pass.
        """
        with code_written_once():
            if not check:
                return {item.name: item.run(gm, context) for item in self.passes}
            results: dict[str, PassResult] = {}
            seen = fingerprint(gm)
            verified: GraphState | None = None
            for item in self.passes:
                results[item.name], after = _run_checked(item, gm, context, seen)
                # A graph that is what it was when it was verified needs no second look.
                if after is not seen or gm.state is not verified:
                    verify(gm, made_by=item.name)
                seen, verified = after, gm.state
        return results


def run_pass(
    item: Pass, gm: QuantGraphModule, context: PassContext, *, check: bool = True
) -> PassResult:
    """Run one pass and hold it to its word; see :meth:`Pipeline.run`."""
    if not check:
        return item.run(gm, context)
    result, _ = _run_checked(item, gm, context, fingerprint(gm))
    verify(gm, made_by=item.name)
    return result


def _run_checked(
    item: Pass, gm: QuantGraphModule, context: PassContext, before: Fingerprint
) -> tuple[PassResult, Fingerprint]:
    """The result of a pass, and ``before`` where it changed nothing, else the new fingerprint."""
    result = item.run(gm, context)
    after = fingerprint(gm)
    changed = after != before
    if changed and not result.changes:
        raise PassContractError(
            f"pass {item.name!r} says that it changed nothing, but the graph is different"
        )
    if result.changes and not changed:
        raise PassContractError(
            f"pass {item.name!r} says that it made {result.changes} change(s), but the graph is the"
            " same"
        )
    return result, after if changed else before


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What a graph was: its nodes, their records, and which tensors in which version they read.

    Attributes:
        nodes: of every node op, name, target, arguments, keyword arguments and record. All are
            immutable, so most of them are the same objects as long as nothing changes.
        parts: of every node that reads something of the module, what that was.
        state: what of the state of the graph counts.
    """

    nodes: tuple[tuple[Any, ...], ...]
    parts: tuple[tuple[Any, ...], ...]
    state: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return (
            len(self.nodes) == len(other.nodes)
            and self.parts == other.parts
            and self.state == other.state
            and all(map(_same_node, self.nodes, other.nodes))
        )

    __hash__ = None  # type: ignore[assignment]  # records are compared, not hashed


def fingerprint(gm: QuantGraphModule) -> Fingerprint:
    """What the graph is now, to be compared with what it was or will be."""
    nodes: list[tuple[Any, ...]] = []
    parts: list[tuple[Any, ...]] = []
    packed = {record.name for record in gm.state.packs}
    for node in gm.graph.nodes:
        nodes.append((node.op, node.name, node.target, node.args, node.kwargs, record_of(node)))
        if node.op == "get_attr" and str(node.target) not in packed:
            value = attribute(gm, str(node.target))
            parts.append((id(value), getattr(value, "_version", 0)))
        elif node.op == "call_module":
            parts.append(_module_now(submodule(gm, str(node.target))))
    state = gm.state
    return Fingerprint(tuple(nodes), tuple(parts), (state.fates, state.stage, repr(state.packs)))


def _module_now(module: nn.Module) -> tuple[Any, ...]:
    """Flags of a module, and the names, identities and versions of its tensors."""
    found: list[Any] = [getattr(module, "inplace", None), module.training]
    for holder in module.modules() if module._modules else (module,):
        for tensors in (holder._parameters, holder._buffers):
            found += [(k, id(t), t._version) for k, t in tensors.items() if t is not None]
    return tuple(found)


def _same_node(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    *call, record = one
    *other_call, other_record = other
    return all(map(_same, call, other_call)) and (
        record is other_record or hash_of_record(record) == hash_of_record(other_record)
    )


def _same(one: object, other: object) -> bool:
    """As written: ``1`` is not ``1.0``; a node that is renamed is itself another one."""
    return one is other or str(one) == str(other)


def hash_of_record(record: object) -> int:
    """A hash that sees every field, also those that hold unhashable qconfigs."""
    return hash(repr(record)) if not _hashable(record) else hash(record)


def _hashable(record: object) -> bool:
    try:
        hash(record)
    except TypeError:
        return False
    return True
