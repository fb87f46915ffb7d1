"""``analyze_sensitivity``: measure what int8 costs layer by layer, and say what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn
from tqdm import tqdm

from fxquant.autocast import outside_modes
from fxquant.calibration import Forward
from fxquant.errors import (
    CalibrationWarning,
    ConfigError,
    Diagnostics,
    MissingExampleInputsError,
    did_you_mean,
)
from fxquant.qconfig import QConfig, bfloat16_static_qconfig, float16_static_qconfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.sensitivity.configuration import Configuration
from fxquant.sensitivity.costs import costs_of_choices, lowered_share
from fxquant.sensitivity.cures import CURES
from fxquant.sensitivity.equalized import equalized_choices
from fxquant.sensitivity.estimates import ESTIMATES, Estimator
from fxquant.sensitivity.feeding import count_inputs
from fxquant.sensitivity.layers import GRANULARITIES, Layer, group_layers
from fxquant.sensitivity.metrics import METRICS, UserMetric
from fxquant.sensitivity.network import FP32, INT8, CalibratedNetwork, Precision
from fxquant.sensitivity.policy import Policy
from fxquant.sensitivity.progress_file import ProgressFile, fingerprint
from fxquant.sensitivity.report import SensitivityReport, Step
from fxquant.sensitivity.results import LayerResult
from fxquant.sensitivity.simulator import Simulator
from fxquant.sensitivity.sweep import DIRECTIONS, ONE, Sweep, SweepOptions
from fxquant.sensitivity.workers import Team, team

MEASURED: Final = "measured"
_DTYPES: Final[Mapping[str, QConfig]] = {
    "bf16": bfloat16_static_qconfig,
    "fp16": float16_static_qconfig,
}
_SECONDS_BEFORE_PROGRESS: Final = 2.0


@outside_modes
def analyze_sensitivity(
    model: nn.Module,
    data: Iterable[Any] | None,
    *,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any] | None = None,
    metric: str | UserMetric = "sqnr",
    direction: str = "one",
    granularity: str = "layer",
    dtypes: Sequence[str] = ("int8",),
    candidates: Mapping[str, QConfig] | None = None,
    metrics: Mapping[str, UserMetric] | None = None,
    mode: str = MEASURED,
    estimates: Sequence[str] = (),
    attribution: str | None = "layer",
    cures: bool = True,
    cumulative: bool = False,
    costs: bool = True,
    policy: Policy | None = None,
    example_inputs: Any = None,
    forward: Forward | None = None,
    num_batches: int | None = None,
    calibration_data: Iterable[Any] | None = None,
    target: str = "x86",
    bias_correction: bool = True,
    memory_budget: int = 1 << 30,
    spill_directory: str | Path | None = None,
    resume: str | Path | None = None,
    probes: int = 8,
    seed: int = 0,
    distributed: bool | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Measure what quantizing each layer costs, and find out why.

    Layers are lowered in simulated int8 (the numbers of :func:`fxquant.convert_to_reference_fx`),
    from one calibration; what is upstream of a layer is computed once
    (:mod:`fxquant.sensitivity.simulator`).

    Args:
        model: a float module in evaluation mode. It is not touched.
        data: batches to measure on, fed as :func:`fxquant.calibrate` says; they are kept while
            this runs. ``None`` measures nothing: the first and the last layer then stay in FP32.
        qconfig_mapping: what int8 means, see :func:`fxquant.prepare_fx`.
        metric: ranks the layers: one of ``sqnr``, ``mse``, ``cosine``, ``kl``, ``top1`` at the
            model's output (all of them are measured), a name of ``metrics``, or a function
            ``f(model, data) -> float``, larger is better.
        direction: ``"one"`` lowers one layer at a time, ``"all_but_one"`` all others.
        granularity: ``"layer"``, ``"block"`` or ``"pattern"``, see
            :func:`fxquant.sensitivity.layers.group_layers`.
        dtypes: what layers are lowered to: ``"int8"``, ``"bf16"``, ``"fp16"``, and names of
            ``candidates``. The first one ranks.
        candidates: more qconfigs to lower layers with, by name: other observers, dynamic, ...
        metrics: more functions ``f(model, data) -> float``, by name: task accuracy, say. They run
            the whole network.
        mode: ``"measured"``, or the name of an estimate, which is then all that is computed.
        estimates: estimates beside the measurement: ``"first-order"``, ``"hessian"``; see
            :mod:`fxquant.sensitivity.estimates` and :meth:`SensitivityReport.rank_correlation`.
        attribution: ``"layer"`` also lowers weight, input, output and activations of each layer
            alone, and measures at its output; ``"model"`` at the model's output too; ``None`` not.
        cures: try on each fragile layer what could save it from FP32.
        cumulative: also lower more and more layers, the most robust first.
        costs: measure accuracy and latency of what could be chosen: everything in int8, the first
            and last layer in FP32, what the verdicts say.
        policy: what is fragile and what becomes of it; see :class:`Policy`.
        example_inputs: see :func:`fxquant.prepare_fx`; where ``None``, the first batch serves.
        forward: ``forward(model, batch)`` calls the model once.
        num_batches: take at most so many batches.
        calibration_data: where ranges come from; where ``None``, from ``data``.
        target: see :func:`fxquant.prepare_fx`.
        bias_correction: see :func:`fxquant.prepare_fx`.
        memory_budget: the most bytes that kept activations may take.
        spill_directory: where activations beyond that are written; ``None`` computes them again.
        resume: a file that results are written to after each layer, and read from at the start. It
            is deleted by nobody; one of another model, other data or options is refused.
        probes: random vectors for each batch, for estimates.
        seed: of them.
        distributed: share the layers among processes: ``True`` joins those that ``torchrun``
            started, ``None`` those of a group that is set up already, ``False`` works alone. All
            of them get the whole report.
        progress: show a progress bar with the time left, on a terminal and after two seconds.

    Returns:
        A printable report. Where ``KeyboardInterrupt`` came, it has ``complete=False`` and the
        layers that were finished.

    Raises:
        ConfigError: an option that makes no sense, named in the message.
        CalibrationError: the data hold no batch, or one that does not fit.
        MissingExampleInputsError: neither data nor example inputs show what the model takes.
        ArtifactError: ``resume`` is a file of something else.
    """
    started = time.perf_counter()
    functions, metric_name = _functions(metric, metrics or {})
    given = _Given(
        metric=mode if mode != MEASURED and not functions else metric_name,
        direction=direction,
        granularity=granularity,
        dtypes=tuple(dtypes),
        mode=mode,
        estimates=tuple(dict.fromkeys((*estimates, *([mode] if mode != MEASURED else [])))),
        attribution=attribution or "",
        functions=functions,
        candidates=dict(candidates or {}),
    )
    given.check()
    batches, known = _batches(data, example_inputs, num_batches)
    network = CalibratedNetwork(
        model,
        batches,
        qconfig_mapping,
        precisions=given.precisions(cures=cures),
        example_inputs=example_inputs,
        forward=forward,
        target=target,
        bias_correction=bias_correction,
        calibration_data=calibration_data,
    )
    run = _Analysis(
        model=model,
        network=network,
        data=batches,
        groups=group_layers(network.layers, granularity),
        given=given,
        policy=policy or Policy(),
        progress=progress,
    )
    if not known:
        return run.unmeasured(time.perf_counter() - started)
    with (
        team(distributed) as processes,
        Simulator(
            network, memory_budget=memory_budget, spill_directory=spill_directory
        ) as simulator,
    ):
        report = run.measured(processes, simulator, resume, probes, seed)
        if report.complete:
            report = run.completed(
                report, simulator, processes, cures=cures, cumulative=cumulative, costs=costs
            )
    return replace(report, seconds=time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What the caller asked for.

    Attributes: see :func:`analyze_sensitivity`.
    """

    metric: str
    direction: str
    granularity: str
    dtypes: tuple[str, ...]
    mode: str
    estimates: tuple[str, ...]
    attribution: str
    functions: Mapping[str, UserMetric]
    candidates: Mapping[str, QConfig]

    def check(self) -> None:
        """Refuse what is not there."""
        _one_of("direction", self.direction, DIRECTIONS)
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("mode", self.mode, (MEASURED, *ESTIMATES))
        _one_of("attribution", self.attribution, ("", "layer", "model"))
        _one_of("metric", self.metric, (*METRICS, *self.functions, *self.estimates))
        for name in self.estimates:
            _one_of("estimates", name, ESTIMATES)
        if not self.dtypes:
            raise ConfigError("dtypes is empty: name what layers are to be lowered to")
        cure_names = [cure.name for cure in CURES]
        for name in self.candidates:
            if name in (INT8, FP32, *_DTYPES, *cure_names):
                raise ConfigError(f"candidate {name!r} has its meaning already; call it otherwise")
        for name in self.dtypes:
            _one_of("dtypes", name, (INT8, *_DTYPES, *self.candidates))
        if self.mode != MEASURED and self.direction != ONE:
            raise ConfigError(f"mode={self.mode!r} estimates one layer at a time, direction='one'")

    def precisions(self, *, cures: bool) -> dict[str, Precision]:
        """What layers can be lowered to, but int8 itself."""
        found: dict[str, Precision] = {n: _DTYPES[n] for n in self.dtypes if n in _DTYPES}
        found |= self.candidates
        if cures and self.mode == MEASURED:
            found |= {cure.name: cure for cure in CURES}
        return found


def _one_of(what: str, value: str, known: Iterable[str]) -> None:
    names = tuple(known)
    if value not in names:
        shown = ", ".join(repr(name) for name in names if name)
        raise ConfigError(f"{what}={value!r}{did_you_mean(value, names)}; known are {shown}")


def _functions(
    metric: str | UserMetric, metrics: Mapping[str, UserMetric]
) -> tuple[dict[str, UserMetric], str]:
    """The user's functions by name, and the name of the metric that ranks."""
    taken = [name for name in metrics if name in (*METRICS, *ESTIMATES)]
    if taken:
        raise ConfigError(f"metrics[{taken[0]!r}] has the name of a metric that is always there")
    if isinstance(metric, str):
        return dict(metrics), metric
    name = getattr(metric, "__name__", type(metric).__name__)
    name = "metric" if name in (*METRICS, *ESTIMATES, "<lambda>") else name
    return {name: metric, **metrics}, name


def _batches(data: Any, example_inputs: Any, num_batches: int | None) -> tuple[list[Any], bool]:
    """The batches, or one made up of the example inputs; and whether they are data."""
    if data is not None:
        found: list[Any] = []
        for batch in data:
            if num_batches is not None and len(found) >= num_batches:
                break
            found.append(batch)
        return found, True
    if example_inputs is None:
        raise MissingExampleInputsError(
            "analyze_sensitivity(model, None) measures nothing, but needs example_inputs to know"
            " what the model takes: pass example_inputs=(torch.randn(1, 3, 224, 224),) or the like"
        )
    single = isinstance(example_inputs, Tensor)
    return [(example_inputs,) if single else example_inputs], False


@dataclass(kw_only=True)
class _Analysis:
    """One call: its steps in order.

    Attributes:
        model: the user's.
        network: what it became.
        data: the user's batches.
        groups: what is lowered together.
        given: what was asked for.
        policy: of the report.
        progress: show a bar.
    """

    model: nn.Module
    network: CalibratedNetwork
    data: list[Any]
    groups: tuple[Layer, ...]
    given: _Given
    policy: Policy
    progress: bool

    def unmeasured(self, seconds: float) -> SensitivityReport:
        """The layers, and what holds of them without data."""
        Diagnostics().warn(
            "no data: nothing was measured; the report has the layers, and keeps the first and the"
            " last of them in FP32 as a prior. Pass data to find out what is fragile",
            CalibrationWarning,
        )
        places = Sweep.places(self.network, self.groups)
        results = tuple(LayerResult(layer=g, place=places[g.name]) for g in self.groups)
        return replace(self._report(results, ""), seconds=seconds)

    def measured(
        self,
        processes: Team,
        simulator: Simulator,
        resume: str | Path | None,
        probes: int,
        seed: int,
    ) -> SensitivityReport:
        """The sweep, and the estimates."""
        given = self.given
        mark = self._fingerprint(probes, seed)
        processes.check_same(mark)
        file = ProgressFile(resume, mark)
        known = file.read()
        sweep = self._sweep(simulator)
        order = [group.name for group in self.groups]
        complete = True
        if given.mode == MEASURED:
            todo = [group for group in self.groups if group.name not in known]
            with self._bar("sensitivity", "layer", len(order), len(known)) as tick:

                def done(result: LayerResult) -> None:
                    known[result.name] = result
                    if processes.rank == 0:
                        file.write([known[name] for name in order if name in known])
                    tick()

                complete = processes.share(todo, sweep.measure, done)
        else:
            known = {g.name: sweep.described(g) for g in self.groups}
        found = {name: known[name] for name in order if name in known}
        if complete and given.estimates:
            complete = self._estimate(found, simulator, probes, seed)
        report = self._report(tuple(found.values()), mark)
        if given.mode == MEASURED and found:
            baseline = {name: sweep.baseline(name) for name in given.dtypes}
            report = replace(report, baseline=baseline, float_user=sweep.float_metrics())
        return replace(report, complete=complete)

    def _estimate(
        self, found: dict[str, LayerResult], simulator: Simulator, probes: int, seed: int
    ) -> bool:
        """Add estimates to results; whether there was time for them."""
        for name in self.given.estimates:
            steps = probes * len(self.network.batches)
            with self._bar(name, "probe", steps, 0) as tick:
                estimator = Estimator(
                    self.network,
                    simulator,
                    self.groups,
                    self.given.dtypes[0],
                    probes=probes,
                    seed=seed,
                    tick=tick,
                )
                try:
                    values = estimator.run(name)
                except KeyboardInterrupt:
                    return False
            for key, result in found.items():
                found[key] = replace(result, estimates={**result.estimates, name: values[key]})
        return True

    def completed(
        self,
        report: SensitivityReport,
        simulator: Simulator,
        processes: Team,
        *,
        cures: bool,
        cumulative: bool,
        costs: bool,
    ) -> SensitivityReport:
        """Cures, the cumulative sweep and the costs of choices: what needs the ranking."""
        if self.given.mode != MEASURED:
            return report
        sweep = self._sweep(simulator)
        try:
            if cures and self.given.dtypes[0] == INT8:
                report = self._cured(report, sweep, processes)
            if cumulative:
                order = list(reversed(report.ranking()))
                report = replace(report, cumulative=self._cumulative(sweep, order))
            if costs and self.given.dtypes[0] == INT8:
                choices = costs_of_choices(report, self.model, sweep)
                if cures:
                    choices += equalized_choices(report, self.model, sweep)
                report = replace(report, choices=choices)
        except KeyboardInterrupt:
            return replace(report, complete=False)
        return report

    def _cured(self, report: SensitivityReport, sweep: Sweep, processes: Team) -> SensitivityReport:
        decisions = report.decisions()
        fragile = [r for r in report.results if decisions[r.name].fragile]
        found = {r.name: r for r in report.results}
        with self._bar("cures", "layer", len(fragile), 0) as tick:

            def done(result: LayerResult) -> None:
                found[result.name] = result
                tick()

            if not processes.share(fragile, sweep.cure, done):
                raise KeyboardInterrupt
        return replace(report, results=tuple(found.values()))

    def _cumulative(self, sweep: Sweep, order: Sequence[str]) -> tuple[Step, ...]:
        by_name = {group.name: group for group in self.groups}
        steps = []
        lowered: list[str] = []
        with self._bar("cumulative", "layer", len(order), 0) as tick:
            for name, measurement in sweep.cumulative(order):
                lowered += by_name[name].members or (name,)
                share = lowered_share(self.network, lowered)
                steps.append(Step(name=name, measurement=measurement, int8_macs=share))
                tick()
        return tuple(steps)

    def _sweep(self, simulator: Simulator) -> Sweep:
        options = SweepOptions(
            direction=self.given.direction,
            precisions=self.given.dtypes,
            attribution=self.given.attribution,
            user=self.given.functions,
        )
        return Sweep(self.network, simulator, self.groups, options, self.data)

    def _report(self, results: tuple[LayerResult, ...], mark: str) -> SensitivityReport:
        first = self.given.dtypes[0]
        return SensitivityReport(
            results=results,
            metric=self.given.metric,
            direction=self.given.direction,
            granularity=self.given.granularity,
            precisions=self.given.dtypes,
            configuration=Configuration.of(self.network, self.groups, first),
            policy=self.policy,
            inputs=sum(map(count_inputs, self.network.batches)) if mark else 0,
            fingerprint=mark,
        )

    def _fingerprint(self, probes: int, seed: int) -> str:
        given = self.given
        return fingerprint(
            self.network,
            {
                "mapping": self.network.mapping_of_int8,
                "candidates": given.candidates,
                "functions": tuple(given.functions),
                "direction": given.direction,
                "granularity": given.granularity,
                "dtypes": given.dtypes,
                "attribution": given.attribution,
                "mode": given.mode,
                "random": (probes, seed) if given.estimates else None,
            },
        )

    @contextmanager
    def _bar(
        self, what: str, unit: str, total: int, initial: int
    ) -> Iterator[Callable[[], object]]:
        """A progress bar; gives the function that advances it."""
        bar = tqdm(
            total=total,
            initial=initial,
            desc=what,
            unit=unit,
            delay=_SECONDS_BEFORE_PROGRESS,
            disable=None if self.progress else True,
            leave=False,
        )
        with bar:
            yield bar.update
