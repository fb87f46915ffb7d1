"""What holds for a whole graph, beside its nodes: how far it has come, its ops, its packed weights.

Plain frozen data, which pickles and saved artefacts hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from fxquant.graph_codec import EncodedNode

if TYPE_CHECKING:
    from fxquant.pairing import Geometry


class Stage(Enum):
    """How far a graph has come."""

    FLOAT = "float"
    FUSED = "fused"
    PREPARED = "prepared"
    REFERENCE = "reference"
    LOWERED = "lowered"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpEntry:
    """One operation of the float graph, before anything was folded: a row of every report.

    Attributes:
        name: the node's name in the float graph.
        kind: kind of the op catalogue, or the type's name where the catalogue has none.
        type_name: module class, function or method name as written.
        path: the module's path for modules, else the scope of the call.
        macs: multiply-accumulates with the example inputs; ``None`` where unknown.
        parameters: number of parameter elements.
        float_input: the op has a floating-point tensor input.
    """

    name: str
    kind: str
    type_name: str
    path: str
    macs: int | None
    parameters: int
    float_input: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PackRecord:
    """How to make one packed constant from plain tensors of the module.

    Attributes:
        name: attribute of the module that holds the packed object.
        packer: key in the packer table of the target.
        tensors: names of the buffers that are packed, in the packer's order ("" for none).
        options: further arguments of the packer.
        saved: state dicts hold the packed object, and not the tensors that it alone is made from.
    """

    name: str
    packer: str
    tensors: tuple[str, ...]
    options: tuple[Any, ...] = ()
    saved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedClamp:
    """A bound of a clamp that is not in the graph, because an output range expresses it.

    Attributes:
        name: the clamp's node in the float graph.
        low: lower bound that was absorbed, or ``None``.
        high: upper bound that was absorbed, or ``None``.
        scale: name of the scale buffer of the range.
        zero_point: name of its zero-point buffer.
        quant_min: smallest integer of the range.
        quant_max: largest integer of the range.
    """

    name: str
    low: float | None
    high: float | None
    scale: str
    zero_point: str
    quant_min: int
    quant_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLimit:
    """A kernel that reads an integer weight, whose products it may have to add in 16 bits.

    Attributes:
        weight: name of the weight's buffer.
        kernel: as :attr:`fxquant.pairing.KernelChoice.kernel`.
        geometry: of the layer.
    """

    weight: str
    kernel: str
    geometry: Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphState:
    """What holds for a whole graph, beside its nodes.

    Attributes:
        stage: how far it has come.
        target: name of the target it was prepared for.
        ledger: the ops of the float graph, in order.
        fates: what became of ops that no node carries out any more: (name, sentence).
        packs: the packed constants.
        absorbed: the clamps that hold only as long as the ranges are what they were.
        shapes_known: example inputs ran, so that tensor nodes have value records.
        signature: names of the inputs.
        reference: of a lowered graph: the reference graph it was made from, to be saved and
            lowered again on another machine.
        limits: of a lowered graph: which kernel reads which integer weight, for a machine whose
            kernels it might overflow.
        islands: paths of the called modules that could not be traced, with the line that refused.
    """

    stage: Stage = Stage.FLOAT
    target: str = ""
    ledger: tuple[OpEntry, ...] = ()
    fates: tuple[tuple[str, str], ...] = ()
    packs: tuple[PackRecord, ...] = ()
    absorbed: tuple[AbsorbedClamp, ...] = ()
    shapes_known: bool = False
    signature: tuple[str, ...] = ()
    reference: tuple[EncodedNode, ...] = ()
    limits: tuple[WeightLimit, ...] = ()
    islands: tuple[tuple[str, str], ...] = ()
