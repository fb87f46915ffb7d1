"""From measurements to a configuration: what stays in FP32, what is cured, what is lowered.

A layer is *fragile* when

* a threshold is given and its metric is worse than that;
* else, with ``top_k``, when it is among the ``top_k`` of most damage;
* else, one layer lowered at a time: when it alone adds noise of 1 % of the output's power (20 dB),
  or of 0.1 % (30 dB) and ten times that of the median layer. For the metrics other than SQNR,
  which are noises themselves, ten times the median decides alone;
* else, all but one lowered: when the network loses a quarter of its noise with the layer in FP32,
  and, of SQNR, 0.1 % of the output's power.

A fragile layer gets the cure that leaves the least damage (the plainest of those within a factor of
two), where one was tried that leaves at most a quarter and makes it not fragile; else it stays in
FP32. The first and the last layer are not
cured: they stay in FP32 when they are fragile or nearly so (a third of the noise that makes a layer
fragile), and where nothing was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fxquant.errors import ConfigError, UnmatchedRuleError, did_you_mean
from fxquant.sensitivity.cures import CURE_BY_NAME
from fxquant.sensitivity.metrics import METRICS, Metrics
from fxquant.sensitivity.network import FP32
from fxquant.sensitivity.results import LayerResult, Measurement

UNCURED: Final = "as it is"
"""Key of :attr:`LayerResult.cures` for the layer alone, lowered as it is."""
_NOISE, _SMALL_NOISE = 1e-2, 1e-3
_OUTLIER = 10.0
_NEARLY = 1 / 3
_SHARE_REMOVED = 0.25
_CURED = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How decisions are made; see the module.

    Attributes:
        metric: of :data:`~fxquant.sensitivity.metrics.METRICS`, at the model's output; ``None`` is
            that of the report.
        threshold: worse than this is fragile: an SQNR in dB, an MSE, ...
        top_k: that many layers of most damage are fragile.
        keep_fp32: these stay in FP32, whatever was measured.
        keep_int8: these are lowered, whatever was measured.
        keep_first_last_fp32: ``True`` keeps the first and the last layer in FP32, ``False`` treats
            them like others, ``None`` keeps them where they are fragile or nearly so.
        cures: let cures save layers from FP32.

    Raises:
        ConfigError: options that contradict each other.
    """

    metric: str | None = None
    threshold: float | None = None
    top_k: int | None = None
    keep_fp32: tuple[str, ...] = ()
    keep_int8: tuple[str, ...] = ()
    keep_first_last_fp32: bool | None = None
    cures: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.threshold is not None and self.top_k is not None:
            raise ConfigError("give a threshold or top_k, not both: each says what is fragile")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, got {self.top_k}")
        for name in ("keep_fp32", "keep_int8"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} takes a tuple of layer names, got one string")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        both = sorted(set(self.keep_fp32) & set(self.keep_int8))
        if both:
            raise ConfigError(f"{both[0]!r} is in keep_fp32 and in keep_int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of one layer.

    Attributes:
        precision: ``"fp32"``, or the precision that was analysed.
        cure: name of the cure that it gets, or empty.
        fragile: whether the measurement says so.
        why: the rule that decided.
    """

    precision: str
    cure: str = ""
    fragile: bool = False
    why: str = ""

    @property
    def verdict(self) -> str:
        """As the report prints it."""
        if self.precision == FP32:
            return "keep FP32"
        return (
            f"{self.precision} with {CURE_BY_NAME[self.cure].words}"
            if self.cure
            else self.precision
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a policy looks at.

    Attributes:
        results: every layer.
        precision: what was analysed.
        all_but_one: the direction.
        baseline: everything lowered; needed for all-but-one.
        metric: of the report.
        float_user: what user functions give for the float network.
    """

    results: Sequence[LayerResult]
    precision: str
    all_but_one: bool
    baseline: Measurement | None
    metric: str
    float_user: Mapping[str, float]

    def damage(self, result: LayerResult, metric: str | None = None) -> float:
        """What lowering a layer costs, by a metric or an estimate: larger is worse.

        One at a time: the metric's :meth:`~Metrics.damage`. All but one: by how much it shrinks
        when this layer stays in FP32. Of a user's function: by how much it falls. NaN where nothing
        was measured.
        """
        metric = self.metric if metric is None else metric
        if metric in result.estimates:
            return result.estimates[metric]
        if self.precision not in result.measurements:
            return math.nan
        found = result.measurements[self.precision]
        if not self.all_but_one:
            return self._of(found, metric)
        assert self.baseline is not None
        return self._of(self.baseline, metric) - self._of(found, metric)

    def _of(self, measurement: Measurement, metric: str) -> float:
        if metric in measurement.user:
            return self.float_user.get(metric, 0.0) - measurement.user[metric]
        return measurement.output.damage(metric)

    def noise(self, measurement: Measurement, metric: str) -> float:
        """A damage that adds up over layers, 0 for none."""
        if metric == "sqnr":
            return measurement.output.noise
        return max(self._of(measurement, metric), 0.0)


def decide(evidence: Evidence, policy: Policy) -> dict[str, Decision]:
    """What becomes of every layer.

    Raises:
        UnmatchedRuleError: a list of the policy names a layer that the report does not have.
        ConfigError: the policy asks for a metric that was not measured.
    """
    _check_names(evidence, policy)
    metric = evidence.metric if policy.metric is None else policy.metric
    fragile, nearly = _fragile(evidence, policy, metric)
    return {
        r.name: _decision(evidence, policy, r, metric, fragile, nearly) for r in evidence.results
    }


def _check_names(evidence: Evidence, policy: Policy) -> None:
    names = [result.name for result in evidence.results]
    for name in (*policy.keep_fp32, *policy.keep_int8):
        if name not in names:
            raise UnmatchedRuleError(f"the report has no layer {name!r}{did_you_mean(name, names)}")


def _decision(
    evidence: Evidence,
    policy: Policy,
    result: LayerResult,
    metric: str,
    fragile: Mapping[str, bool],
    nearly: Mapping[str, bool],
) -> Decision:
    name, lowered = result.name, evidence.precision
    is_fragile = fragile[name]
    if name in policy.keep_fp32:
        return Decision(precision=FP32, fragile=is_fragile, why="the policy names it")
    if name in policy.keep_int8:
        return Decision(precision=lowered, fragile=is_fragile, why="the policy names it")
    if result.place and policy.keep_first_last_fp32 is not False:
        where = f"the {result.place} layer"
        if policy.keep_first_last_fp32:
            return Decision(precision=FP32, fragile=is_fragile, why=f"{where}, as the policy says")
        if not result.measurements and not result.estimates:
            return Decision(precision=FP32, why=f"{where}, and nothing was measured")
        if nearly[name]:
            return Decision(precision=FP32, fragile=is_fragile, why=f"{where}, and fragile")
    if not is_fragile:
        return Decision(precision=lowered)
    cure = _best_cure(evidence, policy, result, metric) if policy.cures else ""
    if cure:
        return Decision(precision=lowered, cure=cure, fragile=True, why="fragile, and cured")
    return Decision(precision=FP32, fragile=True, why="fragile")


def _fragile(
    evidence: Evidence, policy: Policy, metric: str
) -> tuple[dict[str, bool], dict[str, bool]]:
    """Layer -> whether it is fragile, and whether it is nearly so."""
    results = evidence.results
    damages = {r.name: evidence.damage(r, metric) for r in results}
    known = {name: value for name, value in damages.items() if not math.isnan(value)}
    if policy.threshold is not None:
        limit = _limit(evidence, metric, policy.threshold)
        fragile = {r.name: damages[r.name] > limit for r in results}
        return fragile, fragile
    if policy.top_k is not None:
        worst = sorted(known, key=lambda name: -known[name])[: policy.top_k]
        fragile = {r.name: r.name in worst for r in results}
        return fragile, fragile
    strengths = _strengths(evidence, metric)
    return (
        {r.name: strengths.get(r.name, 0.0) >= 1.0 for r in results},
        {r.name: strengths.get(r.name, 0.0) >= _NEARLY for r in results},
    )


def _limit(evidence: Evidence, metric: str, threshold: float) -> float:
    """A threshold of a metric as a damage."""
    if metric in evidence.float_user:
        return evidence.float_user[metric] - threshold
    if metric not in METRICS:
        return threshold  # of an estimate, which is a damage itself
    values = {"sqnr": threshold, "mse": 0.0, "cosine": 1.0, metric: threshold}
    return Metrics(**values).damage(metric)


def _strengths(evidence: Evidence, metric: str) -> dict[str, float]:
    """Layer -> its noise over what makes a layer fragile."""
    if metric in {name for r in evidence.results for name in r.estimates}:
        return _of_estimates(evidence, metric)
    noises = {
        r.name: evidence.noise(r.measurements[evidence.precision], metric)
        for r in evidence.results
        if evidence.precision in r.measurements
    }
    if not noises:
        return {}
    if evidence.all_but_one:
        assert evidence.baseline is not None
        whole = evidence.noise(evidence.baseline, metric)
        saved = {name: max(whole - v, 0.0) for name, v in noises.items()}
        shares = {n: v / whole / _SHARE_REMOVED if whole else 0.0 for n, v in saved.items()}
        if metric != "sqnr":
            return shares
        return {name: min(share, saved[name] / _SMALL_NOISE) for name, share in shares.items()}
    median = statistics.median(noises.values())
    return {name: _strength(value, median, metric) for name, value in noises.items()}


def _strength(noise: float, median: float, metric: str) -> float:
    outlier = noise / (_OUTLIER * median) if median else (math.inf if noise else 0.0)
    if metric != "sqnr":
        return outlier
    return max(noise / _NOISE, min(outlier, noise / _SMALL_NOISE))


def _of_estimates(evidence: Evidence, metric: str) -> dict[str, float]:
    found = {r.name: evidence.damage(r, metric) for r in evidence.results}
    median = statistics.median(found.values())
    return {n: v / (_OUTLIER * median) if median > 0 else 0.0 for n, v in found.items()}


def _best_cure(evidence: Evidence, policy: Policy, result: LayerResult, metric: str) -> str:
    """The cure that leaves the least damage, if it leaves little; else nothing."""
    uncured = result.cures.get(UNCURED, result.measurements.get(evidence.precision))
    tried = {name: m for name, m in result.cures.items() if name != UNCURED}
    if uncured is None or not tried:
        return ""
    before = evidence.noise(uncured, metric)
    noises = {name: evidence.noise(found, metric) for name, found in tried.items()}
    # They are listed plainest first: a stranger one has to be twice as good.
    best = next(name for name in noises if noises[name] <= 2 * min(noises.values()))
    left = noises[best]
    if left > _CURED * before:
        return ""
    if policy.threshold is not None and not evidence.all_but_one:
        is_good = evidence._of(tried[best], metric) <= _limit(evidence, metric, policy.threshold)
        return best if is_good else ""
    return best if metric != "sqnr" or left < _NOISE else ""
