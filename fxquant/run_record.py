"""What one run of a build made: ops, kernels, parameters, weights and the figures a gate reads.

A record of a model is complete; one read from JSON holds digests in place of weights, so that two
records tell whether weights differ, and two models also how much.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fxquant._version import __version__
from fxquant.audit import audit
from fxquant.errors import ArtifactError, ConfigError
from fxquant.graph_codec import decode_graph
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.machine import made_on
from fxquant.metadata import record_of
from fxquant.op_rows import OpRow, Runs, checked
from fxquant.op_view import attribute

_FORMAT: Final = 1
_PLAIN: Final = ("op", "runs", "kernel", "input", "output", "scale", "zero_point", "weight", "macs")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRecord:
    """One op of the float graph in one run.

    Attributes:
        name: of its node in the float graph.
        op: module class, function or method.
        runs: in which arithmetic: ``int8``, ``fp32``, ...
        kernel: what runs it; empty where another op's kernel does.
        input: spec of the activation input.
        output: spec of the output.
        scale: of the output, where it is quantized.
        zero_point: of the output.
        weight: spec of the weight.
        macs: multiply-accumulates with the example inputs; ``None`` where unknown.
        digests: name of a constant of the op (``weight``, ``weight_scale``, ``bias``) -> digest.
        reason: why it is not int8.
    """

    name: str
    op: str
    runs: str
    kernel: str = ""
    input: str = ""
    output: str = ""
    scale: float | None = None
    zero_point: int | None = None
    weight: str = ""
    macs: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What :func:`record_run` found; ``save`` it beside a build and ``diff`` it with the next.

    Attributes:
        ops: every op of the float graph, in its order.
        coverage: share of the multiply-accumulates that run int8, 0 to 1; ``None`` where unknown.
        op_coverage: share of the ops that run int8, 0 to 1; ``None`` for a model without ops.
        size: bytes of the model's tensors.
        accuracy: as it was given, in its own unit; larger is better.
        latency: milliseconds of one call, as it was given.
        made_on: machine and versions.
        constants: name of an op -> name of a constant -> tensor; empty in a record that was read.
    """

    ops: tuple[OpRecord, ...]
    coverage: float | None
    op_coverage: float | None
    size: int | None
    accuracy: float | None = None
    latency: float | None = None
    made_on: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        """Everything but the tensors, as JSON."""
        plain = {
            "fxquant": __version__,
            "format": _FORMAT,
            "made_on": dict(self.made_on),
            "accuracy": self.accuracy,
            "latency_ms": self.latency,
            "coverage": self.coverage,
            "op_coverage": self.op_coverage,
            "size": self.size,
            "ops": [asdict(op) for op in self.ops],
        }
        return json.dumps(plain, indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as a JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RunRecord:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: it is no such file.
            FileNotFoundError: there is none.
        """
        return RunRecord.load_text(Path(path).read_text(encoding="utf-8"), str(path))

    @staticmethod
    def load_text(text: str, where: str = "the text") -> RunRecord:
        """Read what :meth:`to_json` gave.

        Args:
            text: the JSON.
            where: it comes from, for messages.

        Raises:
            ArtifactError: it is no run record.
        """
        try:
            plain = json.loads(text)
            if plain["format"] > _FORMAT:
                raise ArtifactError(
                    f"{where} is a run record of format {plain['format']}; this fxquant"
                    f" {__version__} reads up to {_FORMAT}. Upgrade fxquant"
                )
            return RunRecord(
                ops=tuple(OpRecord(**op) for op in plain["ops"]),
                coverage=plain["coverage"],
                op_coverage=plain["op_coverage"],
                size=plain["size"],
                accuracy=plain["accuracy"],
                latency=plain["latency_ms"],
                made_on=plain["made_on"],
            )
        except ArtifactError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{where} is no run record, which record_run(model).save(path) writes: {error!r}"
            ) from error


def record_run(
    model: nn.Module,
    *,
    accuracy: float | None = None,
    latency: float | None = None,
    example_inputs: Any = None,
) -> RunRecord:
    """Record what a converted model is, with the figures that were measured of it.

    Args:
        model: what ``convert_fx`` or ``load`` returned.
        accuracy: any figure for which larger is better, such as top-1 in percent.
        latency: milliseconds of one call, such as a median of ``interleaved_latency``.
        example_inputs: for the call in which the profiler confirms the coverage; see
            :func:`fxquant.audit`.

    Raises:
        NotAGraphModuleError: fxquant did not make the model.
        ConfigError: it is not converted, or a figure is no number.
    """
    gm = checked(model, "record_run")
    for name, value in (("accuracy", accuracy), ("latency", latency)):
        if value is not None and not _is_number(value):
            raise ConfigError(f"{name} is a finite number or None, got {value!r}")
    report = audit(gm, example_inputs)
    constants = constants_of(gm)
    return RunRecord(
        ops=tuple(_op(row, constants.get(row.name, {})) for row in report.rows),
        coverage=_known(report.mac_coverage),
        op_coverage=_known(report.op_coverage),
        size=size_of(gm),
        accuracy=None if accuracy is None else float(accuracy),
        latency=None if latency is None else float(latency),
        made_on=made_on(),
        constants=constants,
    )


def size_of(model: nn.Module) -> int:
    """Bytes of the tensors of a model, each counted once; packed copies of weights do not count."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]  # a number, see above


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _op(row: OpRow, constants: Mapping[str, Tensor]) -> OpRecord:
    plain: dict[str, Any] = {name: getattr(row, name) for name in _PLAIN}
    plain["runs"] = Runs(row.runs).value
    reason = row.reason if row.runs is not Runs.INT8 else ""
    digests = {name: _digest(value) for name, value in constants.items()}
    return OpRecord(name=row.name, digests=digests, reason=reason, **plain)


def _digest(value: Tensor) -> str:
    plain = value.detach().cpu().contiguous()
    header = f"{plain.dtype}{list(plain.shape)}".encode()
    data = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.sha256(header + data).hexdigest()[:16]


def constants_of(gm: QuantGraphModule) -> dict[str, dict[str, Tensor]]:
    """Op -> its constants; a constant belongs to the first op that reads it."""
    lowered = gm.state.stage is Stage.LOWERED
    graph = decode_graph(list(gm.state.reference)) if lowered else gm.graph
    found: dict[str, dict[str, Tensor]] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        owner = _owner(node)
        value = attribute(gm, str(node.target))
        if owner and isinstance(value, Tensor):
            name = str(node.target).rpartition(".")[2]
            found.setdefault(owner, {})[name.removeprefix(f"{owner}_")] = value.detach()
    return found


def _owner(node: fx.Node) -> str:
    """The float op that the constant ``node`` is for; empty for parameters of activations."""
    current = node
    while True:
        users = list(current.users)
        if not users:
            return ""
        current = users[0]
        origins = record_of(current).origins
        if origins:
            return origins[0]
        weight = [a for a in current.all_input_nodes if a.op == "get_attr"]
        if len(weight) != len(current.all_input_nodes):
            return ""  # a quantize or dequantize of an activation, shown as scale and zero point
