"""audit: how much of a converted model runs int8, by its graph and by PyTorch's profiler.

Coverage is counted over every op of the *float* graph that a float tensor enters. An op that was
folded, absorbed or removed counts as int8 when the node that carries it runs int8. What the graph
claims is checked against a profile of a real call: an op whose node does not run the kernel that it
names counts as FP32, and is named.
"""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import fx, nn

from fxquant._version import __version__
from fxquant.autocast import outside_modes
from fxquant.errors import CaptureError, ConfigError, CoverageError
from fxquant.graph_module import QuantGraphModule, graphs_in
from fxquant.graph_state import Stage
from fxquant.inputs import bind_examples, made_up_inputs
from fxquant.kernel_trace import (
    Kernels,
    Trace,
    kernels_by_node,
    kernels_of_call,
    labelled,
    macs_by_node,
)
from fxquant.kernels import as_bytes, as_quantized
from fxquant.metadata import record_of
from fxquant.op_rows import HALF, OpRow, Runs, checked, rows_of
from fxquant.operators import TO_DTYPE
from fxquant.tables import Column, as_html, terminal_width, text_parts

_INT8_DTYPES: Final = (torch.uint8, torch.int8, torch.quint8, torch.qint8)
_INT8_OPERATORS: Final = ("quantized::", "onednn::", "aten::quantized_lstm", "aten::quantized_gru")
_LISTED: Final = 8

_FP32_COLUMNS: Final = (
    Column(title="op in FP32", width=26),
    Column(title="type", width=17, rank=1),
    Column(title="share of MACs", width=13),
    Column(title="reason", width=34),
)
_KERNEL_COLUMNS: Final = (
    Column(title="int8 kernel", width=40),
    Column(title="calls", width=5),
    Column(title="share of MACs", width=13),
)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What :func:`audit` found; print it, or read its numbers.

    Attributes:
        rows: one for every op of the float graph; what the profiler disproved is FP32.
        confirmed: the profiler saw what the graph claims. ``None`` where no call could be made.
        discrepancies: what it saw otherwise, or why no call could be made.
        int8_calls: int8 operator -> calls of it that were profiled.
        float_calls: float operator that multiplies and accumulates -> calls.
        conversions: quantize, dequantize, casts, changes of representation -> nodes of the graph.
    """

    rows: tuple[OpRow, ...]
    confirmed: bool | None = None
    discrepancies: tuple[str, ...] = ()
    int8_calls: Mapping[str, int] = field(default_factory=dict)
    float_calls: Mapping[str, int] = field(default_factory=dict)
    conversions: Mapping[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[OpRow, ...]:
        """The rows that count: all but ops that are gone and that nothing carries."""
        return tuple(r for r in self.rows if r.runs is not Runs.NOTHING or r.reason)

    @property
    def int8(self) -> tuple[OpRow, ...]:
        """The ops that run int8."""
        return tuple(row for row in self.counted if row.runs is Runs.INT8)

    @property
    def fp32(self) -> tuple[OpRow, ...]:
        """The ops that run neither int8 nor in half precision, each with its reason."""
        return tuple(r for r in self.counted if r.runs not in (Runs.INT8, *HALF))

    @property
    def half(self) -> tuple[OpRow, ...]:
        """The ops that run in float16 or bfloat16, as their qconfig asks."""
        return tuple(row for row in self.counted if row.runs in HALF)

    @property
    def op_coverage(self) -> float:
        """Share of the ops that run int8, 0 to 1; NaN for a model without ops."""
        return _ratio(len(self.int8), len(self.counted))

    @property
    def mac_coverage(self) -> float:
        """Share of the known multiply-accumulates that run int8, 0 to 1; NaN where none is known.

        Multiply-accumulates of convolutions, linears, matrix products and recurrent modules, with
        the example inputs of ``prepare_fx``. See :attr:`unknown_macs`.
        """
        return _ratio(_macs(self.int8), _macs(self.counted))

    @property
    def unknown_macs(self) -> tuple[str, ...]:
        """Ops whose multiply-accumulates are not known: they are in no share."""
        return tuple(row.name for row in self.counted if row.macs is None)

    @property
    def summary(self) -> str:
        """The coverage, whether it is confirmed, and the conversions, a line each."""
        macs, total = _macs(self.int8), _macs(self.counted)
        lines = [
            f"int8 coverage: {_percent(self.mac_coverage)} of multiply-accumulates"
            f" ({_count(macs)} of {_count(total)}), {_percent(self.op_coverage)} of ops"
            f" ({len(self.int8)} of {len(self.counted)})"
        ]
        for runs in HALF:
            rows = tuple(row for row in self.half if row.runs is runs)
            if rows:
                share = _percent(_ratio(_macs(rows), total))
                lines.append(f"{runs.value}: {share} of multiply-accumulates ({len(rows)} ops)")
        if self.unknown_macs:
            lines.append(f"multiply-accumulates unknown: {_names(self.unknown_macs)}")
        calls = (
            f"{sum(self.int8_calls.values())} quantized kernel calls and"
            f" {sum(self.float_calls.values())} float ones"
        )
        if self.confirmed is None:
            lines.append("not confirmed by the profiler:")
        elif self.confirmed:
            lines.append(f"confirmed by the profiler: {calls}, as the graph says")
        else:
            lines.append(f"NOT confirmed by the profiler, which saw {calls}:")
        lines += [f"  - {text}" for text in self.discrepancies]
        if self.conversions:
            parts = ", ".join(f"{count} {what}" for what, count in self.conversions.items())
            lines.append(f"conversions in each call: {parts}")
        return "\n".join(lines)

    def to_text(self, width: int | None = None) -> str:
        """The summary and two tables.

        Args:
            width: the longest line wanted; ``None`` wraps nothing.
        """
        parts = [self.summary]
        for columns, rows in self._tables():
            if rows:
                parts += text_parts(columns, rows, width, all_in=".to_text()")
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """The figures and the ops in FP32, as JSON; a figure that is not known is null."""
        return json.dumps(
            {
                "fxquant": __version__,
                "mac_coverage": _finite(self.mac_coverage),
                "op_coverage": _finite(self.op_coverage),
                "half": [{"name": row.name, "runs": row.runs.value} for row in self.half],
                "macs": _macs(self.counted),
                "unknown_macs": self.unknown_macs,
                "confirmed": self.confirmed,
                "discrepancies": self.discrepancies,
                "int8_calls": dict(self.int8_calls),
                "float_calls": dict(self.float_calls),
                "conversions": dict(self.conversions),
                "fp32": [
                    {
                        "name": row.name,
                        "op": row.op,
                        "macs": row.macs,
                        "carried_by": row.carried_by,
                        "reason": row.reason,
                    }
                    for row in self.fp32
                ],
            },
            indent=2,
        )

    def _tables(self) -> list[tuple[tuple[Column, ...], list[list[str]]]]:
        total = _macs(self.counted)
        alone = [row for row in self.fp32 if not row.carried_by]
        floats = [
            [row.name, row.op, _share(row.macs, total), _why(row)]
            for row in sorted(alone, key=lambda row: -(row.macs or 0))
        ]
        kernels: dict[str, list[OpRow]] = {}
        for row in self.int8:
            if not row.carried_by:
                kernels.setdefault(row.kernel, []).append(row)
        work = {kernel: _macs(tuple(rows)) for kernel, rows in kernels.items()}
        counts = [
            [kernel, str(len(kernels[kernel])), _share(work[kernel], total)]
            for kernel in sorted(kernels, key=lambda k: -work[k])
        ]
        return [(_KERNEL_COLUMNS, counts), (_FP32_COLUMNS, floats)]

    def _repr_html_(self) -> str:
        tables = "".join(as_html(columns, rows) for columns, rows in self._tables() if rows)
        lines = "<br>".join(self.summary.replace("<", "&lt;").splitlines())
        return f"<p>{lines}</p>{tables}"

    def __str__(self) -> str:
        return self.to_text(terminal_width())


@outside_modes
def audit(int8_model: nn.Module, example_inputs: Any = None) -> AuditReport:
    """Count what runs int8, and have the profiler confirm it.

    Args:
        int8_model: what ``convert_fx`` returned. (A reference graph only emulates int8: it has a
            coverage of 0.)
        example_inputs: inputs for the profiled call, as ``prepare_fx`` takes them. ``None`` makes
            them up from the shapes and dtypes that ``prepare_fx`` saw: random normal floats, zeros
            for integers.

    Returns:
        A printable :class:`AuditReport`.

    Raises:
        NotAGraphModuleError: fxquant did not make the model.
        ConfigError: the model is not converted yet.
        TypeError: ``example_inputs`` do not fit the model.
    """
    gm = checked(int8_model, "audit")
    if gm.state.stage not in (Stage.LOWERED, Stage.REFERENCE):
        raise ConfigError(
            f"audit takes a converted model, this one is {gm.state.stage.value}: call convert_fx"
            " first (explain says what is planned)"
        )
    rows = tuple(map(_emulated, rows_of(gm)))
    report = AuditReport(rows, conversions=_conversions(gm))
    try:
        bound = made_up_inputs(gm) if example_inputs is None else bind_examples(gm, example_inputs)
    except CaptureError as error:
        return replace(report, discrepancies=(str(error),))
    return _Confirmation(gm, bound).of(report)


def assert_int8(
    model: nn.Module,
    min_coverage: float | None = 0.95,
    *,
    min_op_coverage: float | None = None,
    example_inputs: Any = None,
) -> AuditReport:
    """Fail where a model runs less int8 than it should: for a build, or for a test.

    Args:
        model: what ``convert_fx`` returned.
        min_coverage: smallest share of the multiply-accumulates, 0 to 1: that is where the time
            goes. A model without any is judged by its ops. ``None`` asks for none.
        min_op_coverage: smallest share of the ops, 0 to 1; ``None`` asks for none.
        example_inputs: for the profiled call; see :func:`audit`.

    Returns:
        The report, when all is well.

    Raises:
        CoverageError: a share is too small, or cannot be shown to be large enough because an op
            in FP32 has unknown multiply-accumulates, or the profiler does not confirm the graph.
            The message names the ops and reasons. An ``AssertionError``.
        ConfigError: a share is not between 0 and 1, or the model is not converted.
    """
    for name, share in (("min_coverage", min_coverage), ("min_op_coverage", min_op_coverage)):
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"{name} is a share between 0 and 1 (0.95 is 95 %), got {share!r}")
    report = audit(model, example_inputs)
    problems = _shortfalls(report, min_coverage, min_op_coverage)
    if not report.confirmed:
        problems += [f"the profiler does not confirm it: {text}" for text in report.discrepancies]
    if not problems:
        return report
    floats = [f"{row.name!r} ({row.op}): {_why(row)}" for row in report.fp32 if not row.carried_by]
    more = [f"and {len(floats) - _LISTED} more"] if len(floats) > _LISTED else []
    listed = "".join(f"\n  - {text}" for text in [*floats[:_LISTED], *more])
    raise CoverageError(
        "; ".join(problems)
        + (f". In FP32:{listed}" if listed else "")
        + "\nprint(audit(model)) shows everything"
    )


def _shortfalls(
    report: AuditReport, min_coverage: float | None, min_op_coverage: float | None
) -> list[str]:
    problems = []
    by_macs = _macs(report.counted) > 0 or bool(report.unknown_macs)
    if min_coverage is not None and by_macs:
        unknown = [row.name for row in report.counted if row.macs is None]
        floats = [row.name for row in report.fp32 if row.macs is None]
        if floats or (unknown and math.isnan(report.mac_coverage)):
            problems.append(
                f"coverage by multiply-accumulates cannot be shown, as those of"
                f" {_names(tuple(floats or unknown))} are unknown (give prepare_fx example inputs,"
                " or judge by ops with min_coverage=None, min_op_coverage=...)"
            )
        elif not report.mac_coverage >= min_coverage:
            problems.append(
                f"int8 covers {_percent(report.mac_coverage)} of the multiply-accumulates, less"
                f" than {_percent(min_coverage)}"
            )
    demanded = min_op_coverage
    if demanded is None and not by_macs:
        demanded = min_coverage
    if demanded is not None and not report.op_coverage >= demanded:
        problems.append(
            f"int8 covers {_percent(report.op_coverage)} of the ops, less than {_percent(demanded)}"
        )
    return problems


# -- confirmation ---------------------------------------------------------------------------------


class _Confirmation:
    """Compares what the nodes of a graph claim with what the profiler sees."""

    def __init__(self, gm: QuantGraphModule, bound: inspect.BoundArguments) -> None:
        self.gm = gm
        self.bound = bound
        self.problems: list[str] = []
        self.disproved: dict[str, str] = {}  # op of the float graph -> what was seen instead

    def of(self, report: AuditReport) -> AuditReport:
        """``report`` with what the profiler says."""
        self.problems += [f"{row.name!r}: {row.reason}" for row in report.rows if _astray(row)]
        graphs = labelled(self.gm)
        try:
            with self.gm.packed_apart():
                for graph in graphs.values():
                    graph.pack()  # packing is no part of a call, though the first one may do it
                seen = kernels_of_call(self.gm, self.bound)
                trace = kernels_by_node(self.gm, self.bound)
        except Exception as error:  # noqa: BLE001  # whatever the user's inputs make the model raise
            text = f"the profiled call failed: {_first_line(error)}. Pass example_inputs that run"
            return replace(report, discrepancies=(*self.problems, text))
        for label, graph in graphs.items():
            for node in graph.graph.nodes if trace.runs[label] else ():
                self._check(node, f"{label}{node.name}", trace, trace.runs[label])
        by_node = trace.by_node
        self._compare_totals(seen, by_node)
        rows = tuple(map(self._corrected, self._with_macs(report.rows, by_node)))
        return replace(
            report,
            rows=rows,
            confirmed=not self.problems,
            discrepancies=tuple(self.problems),
            int8_calls=dict(seen.int8),
            float_calls=dict(seen.floats),
        )

    def _check(self, node: fx.Node, name: str, trace: Trace, runs: int) -> None:
        """One node: does it run what its record says?"""
        record, seen = record_of(node), trace.by_node.get(name, Kernels())
        dtype = trace.dtypes.get(name)
        if record.origins and not record.kernel:
            return  # in FP32, and says so
        found = [*seen.int8.elements(), *seen.floats.elements()]
        claimed = _operator(record.kernel) if record.origins else ""
        problem = ""
        if claimed.startswith(_INT8_OPERATORS):
            if found != [claimed] * runs:
                problem = f"claims {claimed} and runs {' and '.join(found) or 'no kernel'}"
        elif found:
            problem = f"runs {' and '.join(found)}, which the graph does not account for"
        if not problem and _claims_integers(node) and dtype not in _INT8_DTYPES:
            problem = f"claims {record.kernel!r} and gives {dtype}"
        if problem:
            self.problems.append(f"node {node.name!r} {problem}")
            self.disproved.update(dict.fromkeys(record.origins, problem))

    def _compare_totals(self, seen: Kernels, by_node: Mapping[str, Kernels]) -> None:
        int8: Counter[str] = Counter()
        floats: Counter[str] = Counter()
        for kernels in by_node.values():
            int8 += kernels.int8
            floats += kernels.floats
        if (int8, floats) != (seen.int8, seen.floats):
            self.problems.append(
                f"a call runs {_listing(seen)}, its graph {_listing(Kernels(int8, floats))}: call"
                " recompile() after changing the graph"
            )

    def _with_macs(
        self, rows: tuple[OpRow, ...], by_node: Mapping[str, Kernels]
    ) -> tuple[OpRow, ...]:
        """Let PyTorch count what the ledger could not: opaque modules, einsum, ..."""
        wanted = {row.name for row in rows if row.macs is None and row.runs is Runs.FP32}
        nodes = {
            origin: f"{label}{node.name}"
            for label, graph in labelled(self.gm).items()
            for node in graph.graph.nodes
            for origin in record_of(node).origins
            if origin in wanted and not record_of(node).kernel
        }
        if not nodes or not self.gm.state.shapes_known:
            return rows
        counted = macs_by_node(self.gm, self.bound, frozenset(nodes.values()))
        known = {}
        for origin, name in nodes.items():
            macs = counted.get(name, 0)
            if macs or not by_node.get(name, Kernels()).floats:
                known[origin] = macs  # kernels that multiply and are not counted stay unknown
        return tuple(replace(r, macs=known[r.name]) if r.name in known else r for r in rows)

    def _corrected(self, row: OpRow) -> OpRow:
        problem = self.disproved.get(row.name)
        if problem is None:
            return row
        return replace(row, runs=Runs.FP32, reason=f"the profiler disproves it: its node {problem}")


def _claims_integers(node: fx.Node) -> bool:
    record = record_of(node)
    annotation = record.annotation
    if not record.origins or not record.kernel or annotation is None or annotation.output is None:
        return False
    return not record.kernel.endswith("fp32")


def _operator(kernel: str) -> str:
    """``onednn::qconv2d_pointwise.binary[sum] -> fp32`` is ``onednn::qconv2d_pointwise``."""
    return kernel.split(" ")[0].split("[")[0].split(".")[0]


def _emulated(row: OpRow) -> OpRow:
    if row.runs is not Runs.EMULATED:
        return row
    reason = "emulated in floating point: this is a reference graph, convert_fx gives int8 kernels"
    return replace(row, reason=reason)


def _astray(row: OpRow) -> bool:
    return row.runs is Runs.NOTHING and bool(row.reason)


def _conversions(gm: QuantGraphModule) -> dict[str, int]:
    names = {
        torch.quantize_per_tensor: "quantize",
        torch.dequantize: "dequantize",
        "dequantize": "dequantize",
        as_bytes: "tensor to bytes",
        as_quantized: "bytes to tensor",
    }
    nodes = [node for graph in graphs_in(gm) for node in graph.graph.nodes]
    counts = Counter(names[n.target] for n in nodes if n.target in names)
    casts = Counter(
        f"to {str(n.args[1]).removeprefix('torch.')}"
        for n in nodes
        if n.target is TO_DTYPE and n.args[0].op != "get_attr"
    )
    return {name: counts[name] for name in names.values() if counts[name]} | casts


# -- figures --------------------------------------------------------------------------------------


def _macs(rows: tuple[OpRow, ...]) -> int:
    return sum(row.macs or 0 for row in rows)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(share: float) -> str:
    if math.isnan(share):
        return "unknown share"
    hundredths = math.floor(10_000 * share + 1e-9)  # 100 % is said of nothing less
    return f"{hundredths / 100:.2f} %"


def _share(macs: int | None, total: int) -> str:
    if macs is None:
        return "unknown"
    return "0 %" if not macs else _percent(_ratio(macs, total))


def _count(number: int) -> str:
    """``41.2 M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def _listing(kernels: Kernels) -> str:
    counts = {**kernels.int8, **kernels.floats}
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


def _why(row: OpRow) -> str:
    return row.reason or row.fate


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
