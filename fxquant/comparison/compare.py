"""compare: where the error of an int8 model is born, and where it grows.

Three runs of each batch: the float graph; the int8 graph as it is; and the int8 graph *shadowed*,
where every op is fed the float model's values, rounded to the parameters that the op reads with.
The first two give the error that has gathered at each op, the first and third what the op itself
adds. Noise is relative: ``SQNR = 10 log10(sum x^2 / sum (x - y)^2)``, over all batches. Where an
error comes from is judged by the median channel.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.autocast import outside_modes
from fxquant.calibration import placing
from fxquant.capture import capture
from fxquant.comparison.measures import Counters, Noise, sqnr_of
from fxquant.comparison.report import (
    CompareReport,
    CompareRow,
    Fault,
    check_threshold,
    fault_of,
    growth_of,
)
from fxquant.comparison.runs import FloatRun, IntRun
from fxquant.comparison.sites import Site, sites_of
from fxquant.errors import CalibrationError, ConfigError, Diagnostics, TrainingModeError
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.inputs import bind_inputs
from fxquant.metadata import record_of
from fxquant.op_rows import OpRow, checked, rows_of
from fxquant.quantize_fx import convert_to_reference_fx


@outside_modes
def compare(
    float_model: nn.Module,
    int8_model: nn.Module,
    data: Iterable[Any],
    *,
    threshold: float = 20.0,
    outlier_factor: float = 8.0,
    num_batches: int | None = None,
) -> CompareReport:
    """Compare an int8 model with its float model, op by op.

    Args:
        float_model: the model that ``int8_model`` was made from, in evaluation mode; it is not
            touched. Also what ``fuse_fx`` made of it.
        int8_model: what ``convert_fx`` or ``convert_to_reference_fx`` returned, or a calibrated
            prepared model, which is compared as ``convert_to_reference_fx`` would make it.
        data: batches, fed as :func:`fxquant.calibrate` feeds them. All activations of one batch
            are held in FP32, so small batches save memory.
        threshold: dB; the report names the first op below it.
        outlier_factor: a channel is an outlier whose largest value is so many times the median
            channel's.
        num_batches: take at most so many batches.

    Returns:
        A printable :class:`CompareReport`.

    Raises:
        NotAGraphModuleError: fxquant did not make ``int8_model``.
        ConfigError: the two models do not belong together, or an option makes no sense.
        TrainingModeError: ``float_model`` is in training mode.
        CalibrationError: there is no batch, or one that does not fit.
    """
    limit = check_threshold(threshold)
    _check_options(outlier_factor, num_batches)
    gm = _comparable(int8_model)
    if any(module.training for module in float_model.modules()):
        raise TrainingModeError("compare runs float_model, which is training: call .eval() first")
    run = _Comparison(float_model, gm)
    with torch.no_grad():
        for number, batch in enumerate(data):
            if num_batches is not None and number >= num_batches:
                break
            run.batch(batch)
    if not run.batches:
        raise CalibrationError("data gave no batch, so nothing was compared: pass at least one")
    return CompareReport(
        rows=run.rows(outlier_factor),
        stage=gm.state.stage.value,
        output_sqnr=run.outputs.sqnr,
        threshold=limit,
        batches=run.batches,
    )


def _check_options(outlier_factor: float, num_batches: int | None) -> None:
    if not outlier_factor > 1:
        raise ConfigError(f"outlier_factor is a multiple above 1, got {outlier_factor!r}")
    if num_batches is not None and (type(num_batches) is not int or num_batches < 1):
        raise ConfigError(f"num_batches is a whole number > 0 or None, got {num_batches!r}")


def _comparable(model: nn.Module) -> QuantGraphModule:
    gm = checked(model, "compare")
    stage = gm.state.stage
    if stage is Stage.PREPARED and gm.state.target != "x86-compat":
        return convert_to_reference_fx(gm)
    if stage is Stage.PREPARED:
        raise ConfigError(
            "compare() got a model that fxquant.compat prepared, which only fxquant.compat converts"
            " as its configs say: pass the result of its convert_to_reference_fx or convert_fx"
        )
    if stage not in (Stage.REFERENCE, Stage.LOWERED):
        raise ConfigError(
            f"compare() takes a converted or prepared model second, this one is {stage.value}:"
            " call prepare_fx, calibrate and convert_fx first"
        )
    return gm


class _Comparison:
    """The state of one comparison.

    Attributes:
        batches: how many were run.
        outputs: noise of the model's outputs.
    """

    def __init__(self, float_model: nn.Module, gm: QuantGraphModule) -> None:
        self.float_model = float_model
        self.gm = gm
        self.sites = sites_of(gm)
        self.wanted = {site.name for site in self.sites.values()}
        self.counters = {node: Counters() for node in self.sites}
        self.place = placing(gm)
        self.float_graph: fx.GraphModule | None = None
        self.outputs = Noise()
        self.batches = 0

    def batch(self, batch: object) -> None:
        """Run one batch three times and count."""
        args, kwargs = self.place(batch)
        graph = self._graph(kwargs or args)
        expected = FloatRun(graph, _bound(graph, args, kwargs), self.wanted)
        wished = expected.run()
        bound = _bound(self.gm, args, kwargs)
        values = expected.values
        given = IntRun(self.gm, bound, self.sites, values, self.counters, shadow=False).run()
        IntRun(self.gm, bound, self.sites, values, self.counters, shadow=True).run()
        self._count_outputs(wished, given)
        self.batches += 1

    def _graph(self, example_inputs: Any) -> fx.GraphModule:
        if self.float_graph is None:
            graph = self.float_model
            if not isinstance(graph, QuantGraphModule):
                graph = capture(graph, Diagnostics(silent=True), example_inputs, share=True)
            _check_pair(graph, self.gm)
            self.float_graph = graph
        return self.float_graph

    def _count_outputs(self, wished: Any, given: Any) -> None:
        ours, theirs = _floats(wished), _floats(given)
        for a, b in zip(ours, theirs, strict=True):
            self.outputs.add(a, b)

    def rows(self, outlier_factor: float) -> tuple[CompareRow, ...]:
        """One row for each site."""
        ops = {row.name: row for row in rows_of(self.gm)}
        by_reference = {site.node: node for node, site in self.sites.items()}
        found = []
        for node, site in self.sites.items():
            counters = self.counters[node]
            sources = [by_reference[name] for name in site.sources if name in by_reference]
            found.append(_row(site, counters, [self.counters[s] for s in sources], ops))
        return tuple(
            _with_channels(row, self.counters[node], outlier_factor)
            for row, node in zip(found, self.sites, strict=True)
        )


def _bound(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    try:
        return bind_inputs(gm, args, kwargs)
    except TypeError as error:
        raise CalibrationError(f"a batch does not fit the model: {error}") from error


def _check_pair(graph: QuantGraphModule, gm: QuantGraphModule) -> None:
    """The two models hold the same ops."""
    if graph.state.stage not in (Stage.FLOAT, Stage.FUSED):
        raise ConfigError(
            f"compare() takes the float model first, this one is {graph.state.stage.value}"
        )
    known = {node.name for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        known.update(record_of(node).origins)
    known.update(name for name, _ in graph.state.fates)
    strangers = [entry.name for entry in gm.state.ledger if entry.name not in known]
    if strangers:
        shown = ", ".join(map(repr, strangers[:4]))
        raise ConfigError(
            f"the two models do not belong together: {len(strangers)} op(s) of the int8 model are"
            f" not in the float model ({shown}). Pass the model that prepare_fx was given"
        )


def _floats(value: Any) -> list[Tensor]:
    leaves: list[Tensor] = []

    def collect(item: Any) -> Any:
        if isinstance(item, Tensor) and (item.is_floating_point() or item.is_quantized):
            leaves.append(item.dequantize() if item.is_quantized else item)
        return item

    fx.node.map_aggregate(value, collect)
    return leaves


def _row(
    site: Site, counters: Counters, sources: list[Counters], ops: dict[str, OpRow]
) -> CompareRow:
    op = ops.get(site.name)
    known = [source for source in sources if not source.skipped]
    inputs = [source.whole.typical for source in known]
    roundings = [source.rounding.typical for source in known]
    whole, own, skipped = counters.whole.typical, counters.own.typical, counters.skipped
    ranges = counters.range
    shown: dict[str, Any] = {}
    if site.holds_integers and not skipped:
        shown = {
            "at_min": ranges.share(ranges.at_min),
            "at_max": ranges.share(ranges.at_max),
            "clipped": ranges.share(ranges.beyond),
            "unused": ranges.unused(site),
        }
    name, kernel, runs = site.label, "", "int8" if site.holds_integers else "fp32"
    if site.quantizes:
        name = kernel = "quantize"
    elif op is not None:
        name, kernel, runs = op.op, op.kernel, op.runs.value
    return CompareRow(
        name=site.name,
        layer=site.layer,
        op=name,
        runs=runs,
        kernel=kernel,
        sqnr=counters.whole.sqnr,
        channel_sqnr=sqnr_of(whole),
        own=counters.own.sqnr,
        rounding=counters.rounding.sqnr,
        growth=growth_of(whole, inputs),
        fault=Fault.SKIPPED if skipped else fault_of(whole, own, inputs, roundings),
        starved=None if site.quantizes else site.starved,
        note=skipped,
        **shown,
    )


def _with_channels(row: CompareRow, counters: Counters, factor: float) -> CompareRow:
    return row if row.note else replace(row, outliers=counters.channels.outliers(factor))
