"""Looking at a layer's weight and input: distributions, ranges, where causes are found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.collectors import HistogramCollector
from fxquant.metadata import record_of
from fxquant.observed import weight_qparams
from fxquant.observers import HistogramObserver
from fxquant.op_view import op_of
from fxquant.qconfig import QConfig, spec_of
from fxquant.range_rules import PercentileRule
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.network import CalibratedNetwork
from fxquant.sensitivity.results import Ranges, ValueHistogram
from fxquant.sensitivity.simulator import find_node
from fxquant.slices import quantize_rows
from fxquant.specs import QParams

_BINS = 64
_STARVED = 8  # steps: a channel that uses no more of 127 has lost four bits


def ranges_of(network: CalibratedNetwork, layer: Layer, precision: str) -> Ranges:
    """What the first op of a layer reads, in the ranges that a precision gives it."""
    node = find_node(network.graph, layer.heads[0])
    op = op_of(network.graph, node)
    qconfig = network.qconfig_of(node.name, precision)
    if op is None or qconfig is None:
        return Ranges()
    found: dict[str, Any] = {}
    if layer.weights:
        found |= _weight(network, layer, qconfig)
    source = next((s for s in op.activations if s.op != "get_attr"), None)
    factory = spec_of(qconfig.activation)
    spec = None if factory is None else factory.spec
    if source is not None and spec is not None and not spec.is_float and not spec.is_dynamic:
        found |= _input(network, source.name, qconfig)
    return Ranges(**found)


def _weight(network: CalibratedNetwork, layer: Layer, qconfig: QConfig) -> dict[str, Any]:
    weight = network.float_weight(layer.weights[0]).to(torch.float32)
    factory = spec_of(qconfig.weight)
    spec = None if factory is None else factory.spec
    if spec is None or spec.is_float or weight.dim() < 2:
        return {}
    node = find_node(network.graph, layer.heads[0])
    fitted = _annotated_weight_spec(network, layer) or spec
    qparams = weight_qparams(weight, fitted, qconfig, node.name)
    axis = fitted.ch_axis if fitted.ch_axis is not None else 0
    largest = weight.movedim(axis, 0).flatten(1).abs().amax(1)
    alive = largest[largest > 0]
    integers = quantize_rows(weight, qparams).to(torch.int32)
    zero = qparams.zero_point.to(torch.int32)
    if fitted.ch_axis is not None:
        shape = [1] * weight.dim()
        shape[axis] = -1
        zero = zero.reshape(shape)
    steps = (integers - zero).movedim(axis, 0).flatten(1).abs().amax(1)
    low, high = _represented(qparams)
    return {
        "weight": _histogram_of(weight, low, high),
        "channel_spread": float(alive.max() / alive.min()) if len(alive) else None,
        "starved_channels": int(((steps < _STARVED) & (largest > 0)).sum()),
        "channels": len(largest),
        "per_tensor": not fitted.is_per_channel,
    }


def _annotated_weight_spec(network: CalibratedNetwork, layer: Layer) -> Any:
    """The weight spec that the op table makes of the qconfig's wish."""
    annotation = record_of(find_node(network.annotated, layer.heads[0])).annotation
    return None if annotation is None else annotation.weight


def _input(network: CalibratedNetwork, value: str, qconfig: QConfig) -> dict[str, Any]:
    qparams = network.statistics.qparams(value, qconfig)
    watcher = QConfig(activation=HistogramObserver.with_args(dtype=torch.uint8), weight=None)
    collector = getattr(network.statistics.observer(value, watcher), "collector", None)
    if qparams is None or not isinstance(collector, HistogramCollector):
        return {}
    low, high = _represented(qparams)
    histogram = collector.to_histogram()
    edges, counts = histogram.edges(), histogram.counts
    merged = torch.linspace(histogram.min_val, histogram.max_val, _BINS + 1, dtype=torch.float64)
    middles = ((edges[:-1] + edges[1:]) / 2).clamp(histogram.min_val, histogram.max_val)
    places = torch.bucketize(middles, merged[1:-1])
    sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, places, counts)
    bounds = PercentileRule(0.999).range_of(histogram, qparams.spec)
    usual = max(abs(bounds[0]), abs(bounds[1]))
    largest = max(abs(histogram.min_val), abs(histogram.max_val))
    return {
        "input": ValueHistogram(
            edges=tuple(merged.tolist()), counts=tuple(sums.tolist()), low=low, high=high
        ),
        "outliers": largest / usual if usual > 0 else None,
    }


def _represented(qparams: QParams) -> tuple[float, float]:
    """The smallest and the largest value that integers stand for, of the widest channel."""
    spec, zero = qparams.spec, qparams.zero_point.to(torch.float32)
    low = (spec.quant_min - zero) * qparams.scale
    high = (spec.quant_max - zero) * qparams.scale
    return float(low.min()), float(high.max())


def _histogram_of(values: Tensor, low: float, high: float) -> ValueHistogram:
    flat = values.detach().flatten().to(torch.float32).cpu()
    smallest, largest = float(flat.min()), float(flat.max())
    if smallest == largest:
        smallest, largest = smallest - 0.5, largest + 0.5
    counts = torch.histc(flat, _BINS, smallest, largest)
    edges = torch.linspace(smallest, largest, _BINS + 1)
    return ValueHistogram(
        edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), low=low, high=high
    )
