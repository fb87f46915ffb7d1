"""diff: two builds of a quantized model, op by op, and a gate for regressions.

The gate compares B with A: how much accuracy may be lost, how much int8 must be left, and how much
slower and larger B may be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from fxquant._version import __version__
from fxquant.artifact import load
from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.inputs import bind_examples, made_up_inputs
from fxquant.op_rows import checked
from fxquant.run_record import OpRecord, RunRecord, record_run
from fxquant.tables import Column, as_html, as_markdown, as_text, terminal_width
from fxquant.timing import interleaved_latency

Run: TypeAlias = "QuantGraphModule | RunRecord | str | os.PathLike[str]"
"""A model, a record, or the path of a saved one (records end in ``.json``)."""

_COLUMNS: Final = (
    Column(title="op", width=26),
    Column(title="type", width=14, rank=1),
    Column(title="differs", width=12),
    Column(title="how", width=44),
)
_COMPARED: Final = (
    ("runs", "runs"), ("kernel", "kernel"), ("input", "input"), ("output", "output"),
    ("weight", "weight"),
)  # fmt: skip
_ROUNDS: Final = 30
_SAME_SCALE: Final = 1e-6
"""Scales that differ by less are the same statistics added up in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantChange:
    """A constant of an op that differs.

    Attributes:
        name: ``weight``, ``weight_scale``, ``bias``, ...
        differing: how many elements differ; ``None`` where a record holds digests only.
        elements: how many there are; ``None`` likewise.
        largest: the largest difference; ``None`` likewise, or where the shapes differ.
    """

    name: str
    differing: int | None = None
    elements: int | None = None
    largest: float | None = None

    def __str__(self) -> str:
        if self.differing is None:
            return f"{self.name} differs"
        if self.largest is None:
            return f"{self.name} has another shape or dtype"
        return f"{self.differing} of {self.elements} in {self.name} (by up to {self.largest:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpChange:
    """An op that is not the same in both runs.

    Attributes:
        name: of its node in the float graph.
        op: module class, function or method.
        kinds: what differs: ``only in A``, ``only in B``, ``runs``, ``kernel``, ``input``,
            ``output``, ``weight``, ``scale``, ``zero_point``, ``constants``.
        how: the same in words.
        constants: those that differ.
        slower: it ran int8 in A and does not in B.
    """

    name: str
    op: str
    kinds: tuple[str, ...]
    how: tuple[str, ...]
    constants: tuple[ConstantChange, ...] = ()
    slower: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What B may cost. ``None`` does not ask.

    Attributes:
        max_accuracy_drop: how much lower B's accuracy may be, in the unit of the records.
        min_coverage: smallest share of B's multiply-accumulates in int8, 0 to 1.
        max_latency_ratio: B's latency over A's.
        max_size_ratio: B's size over A's.

    Raises:
        ConfigError: a limit makes no sense.
    """

    max_accuracy_drop: float | None = None
    min_coverage: float | None = None
    max_latency_ratio: float | None = None
    max_size_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name} is a number, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name} is finite and not negative, got {value!r}")
        if self.min_coverage is not None and self.min_coverage > 1:
            raise ConfigError(
                f"min_coverage is a share between 0 and 1 (0.95 is 95 %), got {self.min_coverage!r}"
            )
        for name in ("max_latency_ratio", "max_size_ratio"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} is a ratio above 0 (1.05 allows 5 % more), got 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """What :func:`diff` found; print it, or read ``changes``.

    Attributes:
        changes: the ops that differ, in graph order.
        a: the first run.
        b: the second.
        ops: how many ops the two have, together.
        latencies_together: both latencies were measured now, taking turns.
    """

    changes: tuple[OpChange, ...]
    a: RunRecord
    b: RunRecord
    ops: int
    latencies_together: bool = False

    def regressions(self, gate: Gate) -> tuple[str, ...]:
        """What B costs more than ``gate`` allows, a sentence each; empty where all is well.

        Raises:
            ConfigError: the gate asks for a figure that a run does not have.
        """
        found = []
        if gate.max_accuracy_drop is not None:
            a, b = self._both("accuracy", "max_accuracy_drop")
            if a - b > gate.max_accuracy_drop:
                found.append(
                    f"accuracy fell by {a - b:.6g} ({a:.6g} to {b:.6g}), more than"
                    f" {gate.max_accuracy_drop:g}"
                )
        if gate.min_coverage is not None:
            if self.b.coverage is None:
                raise ConfigError(_unknown("coverage", "B", "min_coverage"))
            if self.b.coverage < gate.min_coverage:
                found.append(
                    f"int8 covers {_percent(self.b.coverage)} of the multiply-accumulates, less"
                    f" than {_percent(gate.min_coverage)}"
                )
        for figure, unit, limit in (
            ("latency", "ms", gate.max_latency_ratio),
            ("size", "bytes", gate.max_size_ratio),
        ):
            if limit is None:
                continue
            a, b = self._both(figure, f"max_{figure}_ratio")
            if b > limit * a:
                found.append(
                    f"{figure} is {_ratio(a, b)} times A's ({a:.4g} to {b:.4g} {unit}), more than"
                    f" {limit:g}"
                )
        return tuple(found)

    def _both(self, figure: str, limit: str) -> tuple[float, float]:
        values = []
        for name, run in (("A", self.a), ("B", self.b)):
            value = getattr(run, figure)
            if value is None:
                raise ConfigError(_unknown(figure, name, limit))
            values.append(float(value))
        return values[0], values[1]

    @property
    def summary(self) -> str:
        """The figures of both runs, and how many ops differ, a line each."""
        lines = []
        for name, shown in (
            ("accuracy", "{:.6g}".format),
            ("coverage", _percent),
            ("latency", "{:.4g} ms".format),
            ("size", "{:,} bytes".format),
        ):
            a, b = getattr(self.a, name), getattr(self.b, name)
            if a is None and b is None:
                continue
            both = ["unknown" if v is None else shown(v) for v in (a, b)]
            same = " (the same)" if a == b else ""
            ratio = f" (x {_ratio(a, b)})" if None not in (a, b) and a != b and a else ""
            lines.append(f"{name}: {both[0]} -> {both[1]}{same or ratio}")
        elsewhere = _machines(self.a.made_on, self.b.made_on)
        if elsewhere and None not in (self.a.latency, self.b.latency):
            lines.append(f"latencies are of different machines or settings: {elsewhere}")
        gone = sum(change.slower for change in self.changes)
        lines.append(
            f"{len(self.changes)} of {self.ops} ops differ"
            + (f", {gone} of them no longer int8" if gone else "")
        )
        return "\n".join(lines)

    def to_text(self, width: int | None = None) -> str:
        """The summary, and a table of the ops that differ.

        Args:
            width: the longest line wanted; ``None`` wraps nothing.
        """
        if not self.changes:
            return self.summary
        return f"{self.summary}\n\n{as_text(_COLUMNS, self._cells(), width)[0]}"

    def to_markdown(self) -> str:
        """The summary as a list, and a table in GitHub's Markdown."""
        points = "\n".join(f"- {line}" for line in self.summary.splitlines())
        table = f"\n\n{as_markdown(_COLUMNS, self._cells())}" if self.changes else ""
        return points + table

    def to_json(self) -> str:
        """Figures and changes, as JSON."""
        figures = ("accuracy", "coverage", "op_coverage", "latency", "size")
        return json.dumps(
            {
                "fxquant": __version__,
                "a": {name: getattr(self.a, name) for name in figures},
                "b": {name: getattr(self.b, name) for name in figures},
                "ops": self.ops,
                "changes": [asdict(change) for change in self.changes],
            },
            indent=2,
        )

    def _cells(self) -> list[list[str]]:
        return [[c.name, c.op, ", ".join(c.kinds), "; ".join(c.how)] for c in self.changes]

    def _repr_html_(self) -> str:
        lines = "<br>".join(self.summary.replace("<", "&lt;").replace("->", "&rarr;").splitlines())
        return f"<p>{lines}</p>" + (as_html(_COLUMNS, self._cells()) if self.changes else "")

    def __str__(self) -> str:
        return self.to_text(terminal_width())


def diff(
    a: Run, b: Run, *, measure_latency: bool = False, example_inputs: Any = None
) -> DiffReport:
    """Compare two builds of a model, op by op.

    Args:
        a: the build before: a converted model, a :class:`RunRecord`, or the path of a saved one
            (``save(model, path)``; records end in ``.json``).
        b: the build after.
        measure_latency: time both models now, taking turns, on ``example_inputs``. Both must be
            models or files of models.
        example_inputs: for that, and for the profiled call behind the coverage. ``None`` makes
            them up from the recorded shapes.

    Returns:
        A printable :class:`DiffReport`; ``.regressions(Gate(...))`` judges it.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: a file holds neither a model nor a record.
        ConfigError: a model is not converted, or latencies of records were asked for.
    """
    models = [_model(run) for run in (a, b)]
    records = [
        _record(run, model, example_inputs) for run, model in zip((a, b), models, strict=True)
    ]
    if measure_latency:
        records = _timed(records, models, example_inputs)
    first, second = records
    return DiffReport(
        changes=_changes(first, second),
        a=first,
        b=second,
        ops=len({op.name for op in (*first.ops, *second.ops)}),
        latencies_together=measure_latency,
    )


def _model(run: Run) -> QuantGraphModule | None:
    if isinstance(run, RunRecord):
        return None
    if isinstance(run, (str, os.PathLike)):
        path = Path(run)
        return None if path.suffix == ".json" else load(path)
    return checked(run, "diff")


def _record(run: Run, model: QuantGraphModule | None, example_inputs: Any) -> RunRecord:
    if isinstance(run, RunRecord):
        return run
    if model is None:
        assert isinstance(run, (str, os.PathLike))
        return RunRecord.load(run)
    return record_run(model, example_inputs=example_inputs)


def _timed(
    records: list[RunRecord], models: list[QuantGraphModule | None], example_inputs: Any
) -> list[RunRecord]:
    known = [model for model in models if model is not None]
    if len(known) < len(models):
        raise ConfigError(
            "latencies can be measured of two models only, and a record is none: record them with"
            " record_run(model, latency=...), or pass the models"
        )
    calls = {}
    for name, model in zip("AB", known, strict=True):
        bound = (
            made_up_inputs(model)
            if example_inputs is None
            else bind_examples(model, example_inputs)
        )
        calls[name] = lambda m=model, i=bound: m(*i.args, **i.kwargs)
    measured = interleaved_latency(calls, _ROUNDS)
    return [
        replace(record, latency=1e3 * measured[name].median)
        for record, name in zip(records, "AB", strict=True)
    ]


# -- ops ------------------------------------------------------------------------------------------


def _changes(a: RunRecord, b: RunRecord) -> tuple[OpChange, ...]:
    theirs = {op.name: op for op in b.ops}
    found = []
    for op in a.ops:
        other = theirs.get(op.name)
        if other is None:
            found.append(_alone(op, "A"))
            continue
        change = _change(op, other, a.constants.get(op.name), b.constants.get(op.name))
        if change is not None:
            found.append(change)
    ours = {op.name for op in a.ops}
    found += [_alone(op, "B") for op in b.ops if op.name not in ours]
    return tuple(found)


def _alone(op: OpRecord, side: str) -> OpChange:
    runs = f"runs {op.runs}"
    return OpChange(
        name=op.name,
        op=op.op,
        kinds=(f"only in {side}",),
        how=(runs,),
        slower=side == "A" and op.runs == "int8",
    )


def _change(
    a: OpRecord,
    b: OpRecord,
    ours: Mapping[str, Tensor] | None,
    theirs: Mapping[str, Tensor] | None,
) -> OpChange | None:
    kinds, how = [], []
    for name, word in _COMPARED:
        before, after = getattr(a, name), getattr(b, name)
        if before != after:
            kinds.append(name)
            why = f" ({b.reason})" if name == "runs" and b.reason else ""
            how.append(f"{word} {before or 'none'} -> {after or 'none'}{why}")
    if not _same_number(a.scale, b.scale):
        kinds.append("scale")
        ratio = f" (x {_ratio(a.scale, b.scale)})" if a.scale and b.scale else ""
        how.append(f"scale {_short(a.scale)} -> {_short(b.scale)}{ratio}")
    if a.zero_point != b.zero_point:
        kinds.append("zero_point")
        how.append(f"zero point {_short(a.zero_point)} -> {_short(b.zero_point)}")
    constants = _constant_changes(a, b, ours, theirs) if a.weight == b.weight else ()
    if constants:
        kinds.append("constants")
        how += map(str, constants)
    if not kinds:
        return None
    return OpChange(
        name=a.name,
        op=b.op,
        kinds=tuple(kinds),
        how=tuple(how),
        constants=constants,
        slower=a.runs == "int8" != b.runs,
    )


def _constant_changes(
    a: OpRecord,
    b: OpRecord,
    ours: Mapping[str, Tensor] | None,
    theirs: Mapping[str, Tensor] | None,
) -> tuple[ConstantChange, ...]:
    found = []
    for name in dict.fromkeys((*a.digests, *b.digests)):
        if a.digests.get(name) == b.digests.get(name):
            continue
        if ours is None or theirs is None or name not in ours or name not in theirs:
            found.append(ConstantChange(name=name))
        else:
            found.append(_counted(name, ours[name], theirs[name]))
    return tuple(found)


def _counted(name: str, a: Tensor, b: Tensor) -> ConstantChange:
    if a.shape != b.shape or a.dtype != b.dtype:
        return ConstantChange(name=name, differing=b.numel(), elements=b.numel())
    distance = (a.to(torch.float64) - b.to(torch.float64)).abs()
    return ConstantChange(
        name=name,
        differing=int((distance != 0).sum()),
        elements=a.numel(),
        largest=float(distance.max()),
    )


# -- words ----------------------------------------------------------------------------------------


def _same_number(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=_SAME_SCALE, abs_tol=0.0)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def _ratio(a: float, b: float) -> str:
    return f"{b / a:.3g}" if a else "inf"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _unknown(figure: str, side: str, limit: str) -> str:
    cures = {
        "accuracy": "record it with record_run(model, accuracy=...) and compare the records",
        "latency": "measure both models now with measure_latency=True, or record it with"
        " record_run(model, latency=...)",
        "coverage": "prepare the model with example inputs",
        "size": "record it with record_run(model)",
    }
    return f"{limit} needs the {figure} of {side}, which is not known: {cures[figure]}"


def _machines(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    names = [name for name in (*a, *(n for n in b if n not in a)) if a.get(name) != b.get(name)]
    return ", ".join(f"{name} {a.get(name)!r} and {b.get(name)!r}" for name in names)
