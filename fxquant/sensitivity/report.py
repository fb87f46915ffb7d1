"""What an analysis found: ranked, printed, written, compared, and turned into a configuration."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fxquant._version import __version__
from fxquant.errors import (
    ArtifactError,
    ConfigError,
    MissingDependencyError,
    UnmatchedRuleError,
    did_you_mean,
)
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.sensitivity.configuration import Configuration
from fxquant.sensitivity.metrics import METRICS, Metrics
from fxquant.sensitivity.policy import Decision, Evidence, Policy, decide
from fxquant.sensitivity.rank import spearman
from fxquant.sensitivity.reasons import reason_of
from fxquant.sensitivity.results import (
    LayerResult,
    Measurement,
    from_plain,
    measurement_from,
    to_plain,
)
from fxquant.tables import Column, as_html, as_markdown, terminal_width, text_parts

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

    from fxquant.sensitivity.report_diff import ReportDiff

_FORMAT: Final = 1
_UNITS: Final = {"sqnr": "SQNR", "mse": "MSE", "cosine": "cosine", "kl": "KL", "top1": "top-1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A configuration of the whole network, and what it costs.

    Attributes:
        name: in words.
        measurement: at the model's output; ``None`` for the float network.
        milliseconds: median latency of one batch on this machine; ``None`` where not measured.
        fp32_layers: layers that stay in FP32.
        int8_macs: share of the multiply-accumulates that are lowered; ``None`` where unknown.
    """

    name: str
    measurement: Measurement | None = None
    milliseconds: float | None = None
    fp32_layers: tuple[str, ...] = ()
    int8_macs: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of the cumulative sweep: one more layer is lowered.

    Attributes:
        name: of the layer that was added.
        measurement: with it and all before it lowered.
        int8_macs: share of the multiply-accumulates that are lowered; ``None`` where unknown.
    """

    name: str
    measurement: Measurement
    int8_macs: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityReport:
    """Every layer with what lowering it costs; ``print`` it, write it, or ask it for a mapping.

    Attributes:
        results: in the order of the graph.
        metric: that the ranking goes by: of the model's output, or the name of a user's function,
            or an estimate.
        direction: ``"one"`` or ``"all_but_one"``.
        granularity: ``"layer"``, ``"block"`` or ``"pattern"``.
        precisions: what layers were lowered to; the first one ranks.
        baseline: precision -> all layers lowered.
        float_user: what user functions give for the float network.
        cumulative: the cumulative sweep, where it was asked for.
        choices: configurations of the whole network, with accuracy and latency.
        policy: that the printed verdicts follow.
        configuration: what makes a mapping of decisions.
        inputs: how many inputs were measured on; 0 for none.
        complete: ``False`` where the analysis was interrupted: layers are missing.
        fingerprint: of model, data and options.
        seconds: that it took.
    """

    results: tuple[LayerResult, ...]
    metric: str
    direction: str
    granularity: str
    precisions: tuple[str, ...]
    configuration: Configuration
    baseline: Mapping[str, Measurement] = field(default_factory=dict)
    float_user: Mapping[str, float] = field(default_factory=dict)
    cumulative: tuple[Step, ...] = ()
    choices: tuple[Choice, ...] = ()
    policy: Policy = field(default_factory=Policy)
    inputs: int = 0
    complete: bool = True
    fingerprint: str = ""
    seconds: float = 0.0

    # -- reading ----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> LayerResult:
        """The result of a layer, by its name.

        Raises:
            UnmatchedRuleError: there is none; a ``LookupError``.
        """
        for result in self.results:
            if result.name == name:
                return result
        names = [result.name for result in self.results]
        raise UnmatchedRuleError(f"the report has no layer {name!r}{did_you_mean(name, names)}")

    def damage(self, name: str, metric: str | None = None) -> float:
        """What lowering a layer costs by a metric: larger is worse; see :class:`Evidence`."""
        return self._evidence.damage(self[name], metric)

    def ranking(self, metric: str | None = None) -> tuple[str, ...]:
        """Names of the layers, the one of most damage first; without measurement, graph order.

        Args:
            metric: of the model's output, a user's function, or an estimate; ``None`` is that of
                the report.
        """
        damages = {r.name: self._evidence.damage(r, metric) for r in self.results}
        worst = {name: -math.inf if math.isnan(d) else d for name, d in damages.items()}
        return tuple(sorted(worst, key=lambda name: -worst[name]))

    def rank_correlation(self, estimate: str, metric: str | None = None) -> float:
        """Spearman's correlation of two rankings, from -1 to 1.

        Args:
            estimate: name of an estimate, or of a metric.
            metric: the measured truth; ``None`` is the metric of the report.

        Raises:
            ConfigError: one of the two was not made for all layers.
        """
        pairs = [
            (self._evidence.damage(r, estimate), self._evidence.damage(r, metric))
            for r in self.results
        ]
        if len(pairs) < 2 or any(math.isnan(v) for pair in pairs for v in pair):
            known = ", ".join(sorted({n for r in self.results for n in r.estimates})) or "none"
            raise ConfigError(
                f"a rank correlation of {estimate!r} and {metric or self.metric!r} needs both for"
                f" two layers at least; estimates of this report: {known}"
            )
        return spearman([a for a, _ in pairs], [b for _, b in pairs])

    @property
    def _evidence(self) -> Evidence:
        return Evidence(
            results=self.results,
            precision=self.precisions[0],
            all_but_one=self.direction == "all_but_one",
            baseline=self.baseline.get(self.precisions[0]),
            metric=self.metric,
            float_user=self.float_user,
        )

    # -- deciding ---------------------------------------------------------------------------------

    def decisions(self, policy: Policy | None = None, **options: Any) -> dict[str, Decision]:
        """What becomes of every layer.

        Args:
            policy: how to decide; ``None`` is that of the report.
            options: fields of :class:`Policy` to be changed, such as ``top_k=3`` or
                ``keep_first_last_fp32=True``.
        """
        chosen = self.policy if policy is None else policy
        try:
            chosen = replace(chosen, **options)
        except TypeError as error:
            raise ConfigError(f"no such option of a policy: {error}") from error
        return decide(self._evidence, chosen)

    def qconfig_mapping(self, policy: Policy | None = None, **options: Any) -> QConfigMapping:
        """The mapping for :func:`fxquant.prepare_fx` that follows from the decisions.

        Args:
            policy: see :meth:`decisions`.
            options: see :meth:`decisions`.
        """
        return self.configuration.mapping(self.decisions(policy, **options))

    def qconfig_dict(self, policy: Policy | None = None, **options: Any) -> dict[str, Any]:
        """The same as a plain dict, which ``prepare_fx`` takes too."""
        found = self.qconfig_mapping(policy, **options).to_dict()
        return {key: value for key, value in found.items() if key == "" or value}

    def qconfig_code(self, policy: Policy | None = None, **options: Any) -> str:
        """Python source that makes :meth:`qconfig_dict`, to be pasted: ``qconfig_dict = {...}``."""
        return self.configuration.code(self.qconfig_mapping(policy, **options))

    # -- printing ---------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        """What was done, and what comes out if everything is lowered."""
        what = {"layer": "layer", "block": "block", "pattern": "pattern"}[self.granularity]
        lowered = self.precisions[0]
        how = (
            f"one at a time in {lowered}"
            if self.direction == "one"
            else f"all but one in {lowered}"
        )
        count = f"{len(self.results)} {what}(s)"
        measured = any(r.measurements for r in self.results)
        where = f"ranked by {self.metric}" + (f", {self.inputs} inputs" if self.inputs else "")
        lines = [f"sensitivity: {count}, {how if measured else 'not measured'}, {where}"]
        if not self.complete:
            lines.append("interrupted: layers are missing, and nothing was decided about them")
        for precision, found in self.baseline.items():
            lines.append(f"all layers in {precision}: {_in_words(found)}")
        return "\n".join(lines)

    def to_text(self, width: int | None = None) -> str:
        """A plain table, ranked by damage.

        Args:
            width: the longest line wanted; the least important columns are left out to keep to it,
                and named below the table. ``None`` keeps everything.
        """
        parts = [self.summary, *text_parts(*self._table(), width)]
        for title, columns, cells in self._more_tables():
            parts += [title, *text_parts(columns, cells, width)]
        return "\n\n".join(parts)

    def to_markdown(self) -> str:
        """All tables in GitHub's Markdown, with every column."""
        parts = [self.summary.replace("\n", "\n\n"), as_markdown(*self._table())]
        for title, columns, cells in self._more_tables():
            parts += [title, as_markdown(columns, cells)]
        return "\n\n".join(parts) + "\n"

    def to_html(self, path: str | Path | None = None, *, plan: Any = None) -> str:
        """One self-contained page: sortable table, damage per layer, histograms with clip ranges.

        Args:
            path: where to write it; ``None`` only returns it.
            plan: what ``plan_mixed_precision`` returned; its Pareto front is drawn.

        Raises:
            ConfigError: ``plan`` is no plan.
        """
        from fxquant.sensitivity.html import page

        text = page(self, plan)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        parts = [f"<p>{self.summary}</p>", as_html(*self._table())]
        for title, columns, cells in self._more_tables():
            parts += [f"<p>{title}</p>", as_html(columns, cells)]
        return "".join(parts)

    def __str__(self) -> str:
        return self.to_text(terminal_width())

    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each layer, in the order of the ranking: what CSV and pandas get."""
        decisions = self.decisions()
        found = []
        for rank, name in enumerate(self.ranking(), 1):
            result = self[name]
            layer = result.layer
            record: dict[str, Any] = {
                "rank": rank,
                "layer": name,
                "type": layer.kind,
                "pattern": layer.pattern,
                "position": layer.position,
                "place": result.place,
                "parameters": layer.parameters,
                "macs": layer.macs,
                "damage": self.damage(name),
            }
            for precision, measurement in result.measurements.items():
                prefix = "" if precision == self.precisions[0] else f"{precision}_"
                record |= _flat(measurement, prefix)
            record |= {f"{part}_sqnr": m.sqnr for part, m in result.parts.items()}
            record |= {f"{part}_model_sqnr": m.sqnr for part, m in result.model_parts.items()}
            record |= {f"cure_{cure}_sqnr": m.output.sqnr for cure, m in result.cures.items()}
            record |= {f"estimate_{n}": value for n, value in result.estimates.items()}
            record["verdict"] = decisions[name].verdict
            record["reason"] = reason_of(result, decisions[name], self.precisions[0])
            found.append(record)
        return found

    # -- writing ----------------------------------------------------------------------------------

    def to_csv(self, path: str | Path | None = None) -> str:
        """:meth:`records` as CSV."""
        records = self.records()
        names = list(dict.fromkeys(name for record in records for name in record))
        stream = io.StringIO()
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        if path is not None:
            Path(path).write_text(stream.getvalue(), encoding="utf-8")
        return stream.getvalue()

    def to_dataframe(self) -> pandas.DataFrame:
        """:meth:`records` as a ``pandas.DataFrame``.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingDependencyError(
                "to_dataframe needs pandas: pip install 'fxquant[dataframe]'"
            ) from error
        return pd.DataFrame(self.records())

    def plot(self, *, metric: str | None = None) -> matplotlib.figure.Figure:
        """Damage per layer in graph order, the cumulative sweep, and choices, as a figure.

        Args:
            metric: what is drawn; ``None`` is the metric of the report.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from fxquant.sensitivity.plots import figure

        return figure(self, metric)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything, as JSON; :meth:`from_json` reads it back."""
        plain = {
            "format": _FORMAT,
            "fxquant": __version__,
            "results": [result.to_plain() for result in self.results],
            "baseline": {name: asdict(m) for name, m in self.baseline.items()},
            "cumulative": [asdict(step) for step in self.cumulative],
            "choices": [asdict(choice) for choice in self.choices],
            "policy": asdict(self.policy),
            "configuration": self.configuration.to_plain(),
        }
        for name in _PLAIN_FIELDS:
            plain[name] = getattr(self, name)
        text = json.dumps(to_plain(plain), indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @staticmethod
    def from_json(source: str | Path) -> SensitivityReport:
        """Read what :meth:`to_json` wrote.

        Args:
            source: a path, or the JSON text itself.

        Raises:
            ArtifactError: it is no such report, or of a newer version.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
        try:
            given = json.loads(text)
            if given["format"] != _FORMAT:
                raise ArtifactError(
                    f"the report has format {given['format']}, this version reads {_FORMAT}"
                )
            return _read(given)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"this is no sensitivity report: {error!r}") from error

    def diff(self, other: SensitivityReport) -> ReportDiff:
        """What changed from this report to ``other``, layer by layer."""
        from fxquant.sensitivity.report_diff import compare_reports

        return compare_reports(self, other)

    # -- tables -----------------------------------------------------------------------------------

    def _table(self) -> tuple[list[Column], list[list[str]]]:
        columns = self._columns()
        records = {record["layer"]: record for record in self.records()}
        rows = []
        for name, record in records.items():
            shown = {**record, "layer": _marked(name, self[name].place)}
            rows.append([_cell(shown.get(key), key) for key, _ in columns])
        return [column for _, column in columns], rows

    def _columns(self) -> list[tuple[str, Column]]:
        defined = {
            metric
            for result in self.results
            for m in result.measurements.values()
            for metric in METRICS
            if getattr(m.output, metric) is not None
        }
        found = [
            ("rank", Column(title="rank", width=4)),
            ("layer", Column(title="layer", width=22)),
            ("type", Column(title="type", width=12, rank=3)),
            ("position", Column(title="position", width=8, rank=9)),
            ("parameters", Column(title="parameters", width=10, rank=8)),
            ("macs", Column(title="MACs", width=8, rank=7)),
        ]
        ranks = {"sqnr": 0, "mse": 6, "cosine": 5, "kl": 4, "top1": 2}
        for metric in METRICS:
            if metric in defined:
                column = Column(title=_UNITS[metric], width=8, rank=ranks[metric])
                found.append((metric, column))
        for name in self.float_user:
            found.append((name, Column(title=name, width=8, rank=1)))
        for precision in self.precisions[1:]:
            title = f"{precision} SQNR"
            found.append((f"{precision}_sqnr", Column(title=title, width=8, rank=2)))
        parts = {"layer_sqnr": "own SQNR", "weight_sqnr": "weight", "activation_sqnr": "activation"}
        parts |= {"input_sqnr": "input", "output_sqnr": "output"}
        for i, (key, title) in enumerate(parts.items()):
            found.append((key, Column(title=title, width=8, rank=10 + i)))
        for name in dict.fromkeys(n for r in self.results for n in r.estimates):
            found.append((f"estimate_{name}", Column(title=name, width=10, rank=6)))
        found.append(("verdict", Column(title="verdict", width=14)))
        found.append(("reason", Column(title="reason", width=30, rank=1)))
        return found

    def _more_tables(self) -> list[tuple[str, list[Column], list[list[str]]]]:
        tables = []
        if self.choices:
            columns = [
                Column(title=title, width=width)
                for title, width in (
                    ("configuration", 24),
                    *(("SQNR", 6), ("top-1", 6)),
                    *((name, 8) for name in self.float_user),
                    *(("ms", 8), ("MACs lowered", 8), ("in FP32", 26)),
                )
            ]
            rows = [self._choice_row(choice) for choice in self.choices]
            title = "what each choice costs: noise and agreement of the output, latency of a batch"
            tables.append((title, columns, rows))
        if self.cumulative:
            columns = [
                Column(title=title, width=10)
                for title in ("lowered", "then lowered", "MACs lowered", "SQNR", "top-1")
            ]
            steps = [
                [
                    str(i),
                    step.name,
                    _percent(step.int8_macs),
                    _cell(step.measurement.output.sqnr, "sqnr"),
                    _cell(step.measurement.output.top1, "top1"),
                ]
                for i, step in enumerate(self.cumulative, 1)
            ]
            tables.append(("cumulative: the most robust first", columns, steps))
        return tables

    def _choice_row(self, choice: Choice) -> list[str]:
        found = choice.measurement
        user = self.float_user if found is None else found.user
        return [
            choice.name,
            "" if found is None else _cell(found.output.sqnr, "sqnr"),
            "" if found is None else _cell(found.output.top1, "top1"),
            *(_cell(user.get(name), name) for name in self.float_user),
            "" if choice.milliseconds is None else f"{choice.milliseconds:.2f}",
            _percent(choice.int8_macs),
            _names(choice.fp32_layers),
        ]


_PLAIN_FIELDS: Final = (
    *("metric", "direction", "granularity", "precisions", "float_user", "inputs", "complete"),
    *("fingerprint", "seconds"),
)


def _read(given: Mapping[str, Any]) -> SensitivityReport:
    plain = from_plain({k: v for k, v in given.items() if k not in ("results", "configuration")})
    policy: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in plain["policy"].items()
    }
    return SensitivityReport(
        results=tuple(LayerResult.from_plain(value) for value in given["results"]),
        baseline={name: measurement_from(m) for name, m in plain["baseline"].items()},
        cumulative=tuple(
            Step(**{**step, "measurement": measurement_from(step["measurement"])})
            for step in plain["cumulative"]
        ),
        choices=tuple(_choice_from(choice) for choice in plain["choices"]),
        policy=Policy(**policy),
        configuration=Configuration.from_plain(given["configuration"]),
        precisions=tuple(plain["precisions"]),
        **{name: plain[name] for name in _PLAIN_FIELDS if name != "precisions"},
    )


def _choice_from(plain: Mapping[str, Any]) -> Choice:
    found = plain["measurement"]
    return Choice(
        **{
            **plain,
            "measurement": None if found is None else measurement_from(found),
            "fp32_layers": tuple(plain["fp32_layers"]),
        }
    )


def _flat(measurement: Measurement, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, metrics in (("", measurement.output), ("layer_", measurement.layer)):
        if metrics is not None:
            plain = metrics.to_plain().items()
            found |= {f"{prefix}{name}{key}": value for key, value in plain if value is not None}
    return found | {f"{prefix}{name}": value for name, value in measurement.user.items()}


def _in_words(measurement: Measurement) -> str:
    found: Metrics = measurement.output
    parts = [f"SQNR {_cell(found.sqnr, 'sqnr')} dB"]
    if found.top1 is not None:
        parts.append(f"top-1 agreement {100 * found.top1:.1f} %")
    if found.kl is not None:
        parts.append(f"KL {found.kl:.3g}")
    return ", ".join([*parts, *(f"{n} {v:.4g}" for n, v in measurement.user.items())])


def _marked(name: str, place: str) -> str:
    return f"{name} ({place})" if place else name


def _cell(value: Any, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return _large(value)
    if key.endswith("sqnr"):
        return f"{value:.1f}"
    if key.endswith("top1"):
        return f"{100 * value:.1f} %"
    return f"{value:.6f}" if key.endswith("cosine") else f"{value:.3g}"


def _large(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 10 * size:
            return f"{value / size:.0f} {unit}"
        if value >= size and size > 10**3:
            return f"{value / size:.1f} {unit}"
    return str(value)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
