"""What was measured about one layer, and the same as plain data and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.metrics import Metrics

FIRST, LAST = "first", "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What lowering did.

    Attributes:
        output: at the model's output.
        layer: at the layer's own output; ``None`` where it was not asked for.
        user: what user functions gave, by name; larger is better.
    """

    output: Metrics
    layer: Metrics | None = None
    user: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHistogram:
    """How the values of a tensor are distributed, and which range of them integers hold.

    Attributes:
        edges: of the bins, one more than there are.
        counts: values in each bin.
        low: smallest value that is represented, of the widest channel.
        high: largest value that is represented.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """What a layer's tensors look like, where causes are found.

    Attributes:
        weight: distribution of the weight.
        input: distribution of the first input.
        channel_spread: largest over smallest range of an output channel's weights, channels of
            zeros left out; 1 where all are alike.
        starved_channels: output channels whose largest weight is less than eight steps.
        channels: output channels.
        per_tensor: one scale serves all channels.
        outliers: how many times the largest input is the 99.9 % quantile of their magnitudes.
    """

    weight: ValueHistogram | None = None
    input: ValueHistogram | None = None
    channel_spread: float | None = None
    starved_channels: int | None = None
    channels: int | None = None
    per_tensor: bool = False
    outliers: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One layer, block or pattern of the report.

    Attributes:
        layer: what it is.
        place: ``"first"``, ``"last"`` or ``""``.
        measurements: precision -> what lowering did; empty where nothing was measured.
        parts: part (``weight``, ``input``, ``output``, ``activation``) -> the error that lowering
            it alone makes at the layer's output.
        model_parts: the same at the model's output, where asked for.
        cures: name of a cure -> what lowering with it did.
        estimates: name of a fast mode -> its estimate of the damage; larger is worse.
        ranges: of its weight and input.
    """

    layer: Layer
    place: str = ""
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    parts: Mapping[str, Metrics] = field(default_factory=dict)
    model_parts: Mapping[str, Metrics] = field(default_factory=dict)
    cures: Mapping[str, Measurement] = field(default_factory=dict)
    estimates: Mapping[str, float] = field(default_factory=dict)
    ranges: Ranges = field(default_factory=Ranges)

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.layer.name

    def to_plain(self) -> dict[str, Any]:
        """As JSON data."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> LayerResult:
        """What :meth:`to_plain` wrote."""
        given = from_plain(plain)
        return LayerResult(
            layer=Layer(**_with_tuples(given["layer"])),
            place=given["place"],
            measurements=_measurements(given["measurements"]),
            parts={name: Metrics(**value) for name, value in given["parts"].items()},
            model_parts={name: Metrics(**value) for name, value in given["model_parts"].items()},
            cures=_measurements(given["cures"]),
            estimates=given["estimates"],
            ranges=_ranges(given["ranges"]),
        )


def measurement_from(plain: Mapping[str, Any]) -> Measurement:
    """A measurement as :func:`dataclasses.asdict` gives it."""
    layer = plain["layer"]
    return Measurement(
        output=Metrics(**plain["output"]),
        layer=None if layer is None else Metrics(**layer),
        user=dict(plain["user"]),
    )


def _measurements(plain: Mapping[str, Any]) -> dict[str, Measurement]:
    return {name: measurement_from(value) for name, value in plain.items()}


def _ranges(plain: Mapping[str, Any]) -> Ranges:
    given = dict(plain)
    for name in ("weight", "input"):
        if given[name] is not None:
            given[name] = ValueHistogram(**_with_tuples(given[name]))
    return Ranges(**given)


def _with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}


def to_plain(value: Any) -> Any:
    """``value`` as JSON data: infinities and NaN, which JSON has not, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


_NUMBERS = frozenset({"inf", "-inf", "nan"})


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given, tuples as lists."""
    if isinstance(value, str) and value in _NUMBERS:
        return float(value)
    if isinstance(value, Mapping):
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value


def metric_names() -> tuple[str, ...]:
    """The names of the metrics, in the order of their columns."""
    return tuple(f.name for f in fields(Metrics))
