"""What became of every op of the float graph: one row each, read off the graph as it is now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor, fx

from fxquant.errors import NotAGraphModuleError
from fxquant.graph_module import QuantGraphModule, parts_below
from fxquant.graph_state import OpEntry, Stage
from fxquant.half import NORMALIZATIONS
from fxquant.kernels import as_quantized, checked_input
from fxquant.metadata import FusionRecord, NodeRecord, record_of
from fxquant.op_catalog import OpKind
from fxquant.op_view import attribute, kind_of
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.packing import PACKERS
from fxquant.specs import QuantSpec
from fxquant.targets.registry import target_named
from fxquant.targets.table import Epilogue

_FLOAT: Final = "fp32"
_TO_FLOAT: Final = "-> fp32"  # how kernels that write floating point end their names
_SCALES: Final = ("output_scale", "Y_scale_i", "scale")  # PyTorch's schemas do not agree on one
_ZERO_POINTS: Final = ("output_zero_point", "Y_zero_point_i", "zero_point")


class Runs(Enum):
    """In which arithmetic an op runs."""

    INT8 = "int8"
    PLANNED = "planned"
    """The model is prepared; convert_fx will make it integers, of the specs in the row."""
    EMULATED = "emulated"
    """In a reference graph: float arithmetic on the integers of the specs in the row."""
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    NOTHING = "-"
    """No node of the graph carries it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One op of the float graph.

    Attributes:
        name: the node's name in the float graph.
        op: module class, function or method, as written.
        kind: kind of the op catalogue, or ``op`` where it has none.
        path: the module's path for modules, else of the module that makes the call.
        runs: in which arithmetic.
        carried_by: the op whose node carries this one out too; empty where it has its own.
        fate: how that came about (``folded into 'conv1'``); empty where it has its own node.
        pattern: the pattern it is fused in.
        rule: the config rule that won.
        input: spec of the activation input, ``fp32``, or empty where the carrier has it.
        weight: spec of the weight, ``fp32``, or empty where there is none.
        output: spec of the output, ``fp32``, or empty where the carrier has it.
        scale: of the output, once converted.
        zero_point: of the output, once converted.
        weight_scale: smallest and largest scale of the weight, once converted.
        kernel: what runs it: planned before, and as emitted after, lowering.
        reason: why it is not int8; never empty where it runs in floating point.
        notes: further decisions about it.
        macs: multiply-accumulates with the example inputs; ``None`` where unknown.
    """

    name: str
    op: str
    kind: str
    path: str
    runs: Runs
    carried_by: str = ""
    fate: str = ""
    pattern: str = ""
    rule: str = ""
    input: str = ""
    weight: str = ""
    output: str = ""
    scale: float | None = None
    zero_point: int | None = None
    weight_scale: tuple[float, float] | None = None
    kernel: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    macs: int | None = None


def checked(model: object, caller: str) -> QuantGraphModule:
    """``model``, if fxquant made it.

    Raises:
        NotAGraphModuleError: it did not.
    """
    if isinstance(model, QuantGraphModule):
        return model
    raise NotAGraphModuleError(
        f"{caller} takes a model that fxquant made (by prepare_fx, convert_fx,"
        f" convert_to_reference_fx or fuse_fx), got {type(model).__name__}"
    )


def rows_of(gm: QuantGraphModule) -> tuple[OpRow, ...]:
    """One row for every op of the float graph, in its order; an island before what is in it.

    What is in a standalone module has the module's path before its names.
    """
    reader = _Reader(gm)
    rows: list[OpRow] = []
    listed: set[int] = set()
    for entry in gm.state.ledger:
        rows.append(reader.row(entry))
        for prefix, part in reader.parts(entry):
            if id(part) not in listed:  # once, however often the island is called
                listed.add(id(part))
                rows += [_below(prefix, row) for row in rows_of(part)] if prefix else rows_of(part)
    return tuple(rows)


def _below(path: str, row: OpRow) -> OpRow:
    """``row`` of a graph of its own, as one of the graph that calls it at ``path``."""
    return replace(
        row,
        name=f"{path}.{row.name}",
        path=f"{path}.{row.path}" if row.path else path,
        carried_by=f"{path}.{row.carried_by}" if row.carried_by else "",
    )


class _Reader:
    """Reads rows off one graph."""

    def __init__(self, gm: QuantGraphModule) -> None:
        self.gm = gm
        self.state = gm.state
        self.target = target_named(gm.state.target) if gm.state.target else None
        self.entries = {entry.name: entry for entry in gm.state.ledger}
        self.nodes: dict[str, fx.Node] = {node.name: node for node in gm.graph.nodes}
        self.fates = dict(gm.state.fates)
        self.carriers: dict[str, fx.Node] = {}
        self.patterns: dict[int, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            record = record_of(node)
            for origin in record.origins:
                self.carriers.setdefault(origin, node)
            if record.fusion is not None and record.origins:
                self.patterns.setdefault(record.fusion.group, []).append(node)

    def row(self, entry: OpEntry) -> OpRow:
        """The row of one op."""
        known: dict[str, Any] = {
            "name": entry.name,
            "op": entry.type_name,
            "kind": entry.kind,
            "path": entry.path,
            "macs": entry.macs,
        }
        carrier = self.carriers.get(entry.name)
        if carrier is None:
            fate = self.fates.get(entry.name, "")
            return OpRow(**known, runs=Runs.NOTHING, fate=fate, reason="" if fate else _ASTRAY)
        record = record_of(carrier)
        known |= {
            "rule": record.rule or "none",
            "pattern": record.fusion.pattern if record.fusion else "",
        }
        head = self._head(carrier)
        if head != entry.name:
            return self._carried(known, entry, carrier, head)
        runs, reason = self._runs(carrier, entry)
        if runs is Runs.FP32:
            weight = _FLOAT if entry.parameters else ""
            return OpRow(
                **known, runs=runs, reason=reason, input=_FLOAT, weight=weight, output=_FLOAT
            )
        if record.runs_in is not None:
            return self._half(known | {"pattern": ""}, runs, reason, carrier, entry)
        first = record.fusion.first if record.fusion else carrier.name
        if first != carrier.name and first in self.nodes:
            known |= {"carried_by": first, "fate": f"in the kernel of {first!r}"}
            return OpRow(**known, runs=runs)
        return OpRow(
            **known,
            runs=runs,
            kernel=self._kernel(carrier, entry),
            notes=record.reasons,
            **self._specs(carrier, record),
        )

    def _half(
        self, known: dict[str, Any], runs: Runs, reason: str, carrier: fx.Node, entry: OpEntry
    ) -> OpRow:
        record = record_of(carrier)
        shown = _dtype(record.runs_in)
        return OpRow(
            **known,
            runs=runs,
            reason=reason,
            input=shown,
            weight=_FLOAT if entry.kind in NORMALIZATIONS else shown if entry.parameters else "",
            output=shown,
            kernel=f"aten::{entry.kind} in {shown}",
            notes=record.reasons,
        )

    def parts(self, entry: OpEntry) -> tuple[tuple[str, QuantGraphModule], ...]:
        """The graphs in what an op calls as it is, with what goes before the names in them.

        Names in the parts of an island are known in the whole model; a standalone module has a
        graph of its own.
        """
        node = self.carriers.get(entry.name)
        if node is None or node.op != "call_module":
            return ()
        module = self.gm.get_submodule(str(node.target))
        if isinstance(module, QuantGraphModule):
            return ((str(node.target), module),)
        return tuple(("", part) for part in parts_below(module))

    # -- who carries what -------------------------------------------------------------------------

    def _head(self, carrier: fx.Node) -> str:
        """The op that gives ``carrier`` its name in reports; an input stands for itself."""
        return str(carrier.target) if carrier.op == "placeholder" else record_of(carrier).origins[0]

    def _carried(self, known: dict[str, Any], entry: OpEntry, carrier: fx.Node, head: str) -> OpRow:
        fate = self._fate(entry, carrier, head)
        carrying = self.entries.get(head, entry)
        runs, why = self._runs(carrier, carrying)
        reason = f"{fate}; carried by {head!r}, which is in FP32: {why}"
        return OpRow(
            **known,
            runs=runs,
            carried_by=head,
            fate=fate,
            reason=reason if runs is Runs.FP32 else "",
        )

    def _fate(self, entry: OpEntry, carrier: fx.Node, head: str) -> str:
        if entry.name in self.fates:
            return self.fates[entry.name]
        who = f"the input {head!r}" if carrier.op == "placeholder" else repr(head)
        if entry.kind == "batch_norm":
            return f"folded into {who}"
        if any(reason.startswith(f"{entry.kind} is free") for reason in record_of(carrier).reasons):
            return f"free: saturation of {who}"
        clamps = [u for u in carrier.users if u.target is torch.clamp and not record_of(u).origins]
        return f"in the kernel of {who}" + (", with an integer clamp" if clamps else "")

    # -- in which arithmetic ----------------------------------------------------------------------

    def _runs(self, carrier: fx.Node, entry: OpEntry) -> tuple[Runs, str]:
        """The arithmetic of a node, and for FP32 why."""
        record = record_of(carrier)
        stage = self.state.stage
        if stage in (Stage.FLOAT, Stage.FUSED):
            return Runs.FP32, "nothing is quantized yet: that is what prepare_fx and convert_fx do"
        if carrier.op == "placeholder":
            if any(self._quantizes(user) for user in carrier.users):
                return _QUANTIZED_BY_STAGE[stage], ""
            return Runs.FP32, f"the input {carrier.name!r} is read in floating point"
        if record.runs_in is not None:
            wish = f"its qconfig asks for {_dtype(record.runs_in)} ({record.rule or 'none'})"
            planned = stage is Stage.PREPARED
            return (Runs.PLANNED if planned else _HALF[record.runs_in]), wish
        if _half_weight(record) and (record.kernel or stage is not Stage.LOWERED):
            wish = f"its weight is float16, its sums are float32 ({record.rule or 'none'})"
            return (Runs.PLANNED if stage is Stage.PREPARED else Runs.FP16), wish
        if stage is Stage.LOWERED and record.kernel:
            return Runs.INT8, ""
        if stage is Stage.LOWERED or record.annotation is None:
            return Runs.FP32, self._reason(carrier)
        if record.fusion is not None and self._float_epilogue(carrier):
            return Runs.FP32, (
                f"the kernel of {record.fusion.first!r} gives its float result, on which this runs"
                " in FP32"
            )
        return _QUANTIZED_BY_STAGE[stage], ""

    def _quantizes(self, user: fx.Node) -> bool:
        if self.state.stage is Stage.PREPARED:
            return user.op == "call_module" and not record_of(user).origins
        if user.target is checked_input:
            return any(self._quantizes(behind) for behind in user.users)
        return user.target in (QUANTIZE, torch.quantize_per_tensor)

    def _reason(self, node: fx.Node) -> str:
        """Why ``node`` stays in floating point."""
        record = record_of(node)
        if record.reasons:
            return "; ".join(record.reasons)
        first = self.nodes.get(record.fusion.first) if record.fusion else None
        if record.fusion is not None and first is not None and first is not node:
            return (
                f"in pattern {record.fusion.pattern!r} with {first.name!r}, which is in FP32:"
                f" {self._reason(first)}"
            )
        source = next(iter(node.all_input_nodes), None)
        if not self.entries.keys() & set(record.origins[:1]) and source is not None:
            why = "an input of the model" if source.op == "placeholder" else self._reason(source)
            return f"it hands on what {source.name!r} gives in FP32: {why}"
        return NO_REASON.format(name=node.name)

    def _float_epilogue(self, node: fx.Node) -> bool:
        """Whether the target computes this later member of a pattern in floating point.

        It has no kernel with the function inside, or the pattern adds a residual and its sum is
        read in floating point.
        """
        record = record_of(node)
        if record.fusion is None or record.fusion.first == node.name or self.target is None:
            return False
        kinds = [kind.name for kind in map(self._kind, self._members(record.fusion)) if kind]
        row = self.target.row(kinds[0]) if kinds else None
        kind = self._kind(node)
        if row is None or kind is None or record.annotation is None:
            return False
        float_sum = record.annotation.output is None and "add" in kinds[1:]
        return row.epilogues.get(kind.name) is Epilogue.FLOAT or float_sum

    def _kind(self, node: fx.Node) -> OpKind | None:
        return kind_of(self.gm, node)

    def _members(self, fusion: FusionRecord) -> list[fx.Node]:
        """The nodes of a pattern, in order."""
        return self.patterns[fusion.group]

    # -- specs and parameters ---------------------------------------------------------------------

    def _kernel(self, carrier: fx.Node, entry: OpEntry) -> str:
        if self.state.stage is Stage.LOWERED:
            return record_of(carrier).kernel
        if self.state.stage is Stage.REFERENCE:
            return "float, between dequantize and quantize"
        row = self.target.row(entry.kind) if self.target is not None else None
        return row.kernel if row is not None else ""

    def _specs(self, carrier: fx.Node, record: NodeRecord) -> dict[str, Any]:
        annotation = record.annotation
        if annotation is None:
            return {}
        found: dict[str, Any] = {
            "input": ", ".join(dict.fromkeys(map(_short, annotation.inputs))),
            "weight": annotation.weight.short() if annotation.weight is not None else "",
            "output": _short(annotation.output),
            "weight_scale": self._weight_scale(carrier),
        }
        if self._writes_float(carrier, record):
            return found | {"output": _FLOAT}
        scale, zero_point = self._output_parameters(carrier)
        if scale is not None and zero_point is not None:
            found |= {"scale": float(scale), "zero_point": int(zero_point)}
        return found

    def _writes_float(self, carrier: fx.Node, record: NodeRecord) -> bool:
        if self.state.stage is Stage.LOWERED:
            return record.kernel.endswith(_TO_FLOAT)
        if record.fusion is None:
            return False
        return any(map(self._float_epilogue, self._members(record.fusion)))

    def _output_parameters(self, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
        if self.state.stage is Stage.LOWERED:
            return self._lowered_parameters(node)
        fusion = record_of(node).fusion
        last = node if fusion is None else self._members(fusion)[-1]
        for user in last.users:
            if user.target is QUANTIZE:
                return self._tensor(user.args[1]), self._tensor(user.args[2])
        return None, None

    def _lowered_parameters(self, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point that a kernel writes with, or those of what it only moves."""
        bound = dict(record_of(node).bound)
        positions = _output_positions(node)
        if positions is not None and positions[0] in bound and positions[1] in bound:
            scale, zero_point = (attribute(self.gm, bound[p]) for p in positions)
            return scale, zero_point
        sources = [a for a in node.all_input_nodes if a.op not in ("get_attr", "placeholder")]
        if any(record_of(source).gives_quantized for source in sources):
            return None, None  # only the tensor knows, when it comes
        return self._lowered_parameters(sources[0]) if sources else (None, None)

    def _weight_scale(self, node: fx.Node) -> tuple[float, float] | None:
        names = _argument_names(node)
        if "w_scale" in names:
            scale = self._tensor(node.args[names.index("w_scale")])
        else:
            found = map(self._scale_behind, node.all_input_nodes)
            scale = next((scale for scale in found if scale is not None), None)
        return None if scale is None else (float(scale.min()), float(scale.max()))

    def _scale_behind(self, argument: fx.Node) -> Tensor | None:
        """The scale of the quantized weight that ``argument`` holds, packed or dequantized."""
        if argument.target is DEQUANTIZE:
            integers = argument.all_input_nodes[0]
            return self._tensor(argument.args[1]) if integers.op == "get_attr" else None
        pack = next((p for p in self.state.packs if p.name == argument.target), None)
        if argument.op != "get_attr" or pack is None:
            return None
        position = PACKERS[pack.packer].scale
        if position is None:
            return None
        value = attribute(self.gm, pack.tensors[position])
        return value if isinstance(value, Tensor) else None

    def _tensor(self, argument: object) -> Tensor | None:
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        value = attribute(self.gm, str(argument.target))
        return value if isinstance(value, Tensor) else None


_HALF: Final = {torch.bfloat16: Runs.BF16, torch.float16: Runs.FP16}
HALF: Final = (Runs.BF16, Runs.FP16)
"""In half precision, neither int8 nor FP32."""
_QUANTIZED_BY_STAGE: Final = {
    Stage.PREPARED: Runs.PLANNED,
    Stage.REFERENCE: Runs.EMULATED,
    Stage.LOWERED: Runs.INT8,
}
_ASTRAY: Final = "no node of the graph carries it out: the graph was changed by hand"
NO_REASON: Final = (
    "nothing was recorded about {name!r}; please report this with the model: every op in FP32 has"
    " a reason"
)
"""Should never be read; the tests look for it."""


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _half_weight(record: NodeRecord) -> bool:
    """Whether an op keeps its weight in half precision and its activations in FP32."""
    annotation = record.annotation
    return annotation is not None and annotation.weight is not None and annotation.weight.is_float


def _short(spec: QuantSpec | None) -> str:
    return _FLOAT if spec is None else spec.short()


def _output_positions(node: fx.Node) -> tuple[int, int] | None:
    """Argument positions of the scale and zero point that a kernel writes with."""
    if node.target in (torch.quantize_per_tensor, as_quantized):
        return 1, 2
    names = _argument_names(node)
    scale = next((names.index(name) for name in _SCALES if name in names), None)
    zero_point = next((names.index(name) for name in _ZERO_POINTS if name in names), None)
    return None if scale is None or zero_point is None else (scale, zero_point)


def _argument_names(node: fx.Node) -> list[str]:
    """Parameter names of an operator with a schema; none for other nodes."""
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]
