"""Weights whose products cannot overflow the 16-bit sums of a kernel without VNNI.

Such a kernel adds ``255 * a + 255 * b`` for certain pairs of weights in 16 bits. A channel with a
pair of ``a + b > 128`` can overflow (``255 * 129 = 32895 > 32767``); its scale is enlarged until
none can, and nothing else changes: the other channels, the activations and the zero points keep
their full range. Halving all activations, the usual cure, costs 6 dB everywhere; this costs up to
6 dB of the weights of the channels that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.errors import Diagnostics, LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of
from fxquant.observed import weight_qparams
from fxquant.op_view import Op, attribute, op_of
from fxquant.pairing import KernelChoice, Pairing
from fxquant.qconfig import QConfig
from fxquant.slices import quantize_rows
from fxquant.specs import QParams, QuantSpec, choose_qparams, dequantize, quantize
from fxquant.targets.saturation import pairing_here

_HALF = 64
"""Of this magnitude two weights cannot overflow, wherever they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What fitting a weight to a kernel changed.

    Attributes:
        channels: how many output channels have a larger scale.
        outputs: how many there are.
        before: signal to quantization noise of the whole weight with the usual scales, in dB.
        after: the same with the enlarged scales.
        kernel: what overflowed.
        pairing: how it pairs products.
    """

    channels: int
    outputs: int
    before: float
    after: float
    kernel: str
    pairing: Pairing

    def __str__(self) -> str:
        return (
            f"the weight range of {self.channels} of {self.outputs} output channels is reduced, so"
            f" that the 16-bit sums of {self.kernel}'s kernel ({self.pairing.value}) cannot"
            f" overflow: {self.before:.1f} -> {self.after:.1f} dB of the weight"
        )


def fit(
    weight: Tensor, qparams: QParams, choices: Sequence[KernelChoice], high: int = 255
) -> tuple[QParams, Reduction | None]:
    """Parameters with which ``weight`` overflows no kernel of ``choices``.

    Args:
        weight: float values in the op's layout.
        qparams: its usual parameters.
        choices: the kernels that read it.
        high: the largest integer that an activation can be.

    Returns:
        ``qparams`` itself and ``None`` where nothing overflows.
    """
    worst = max(choices, key=lambda c: float(_worst(c, weight, qparams, high)), default=None)
    if worst is None or float(_worst(worst, weight, qparams, high)) <= 1:
        return qparams, None
    fitted, flagged = _enlarged(weight, qparams, choices, high)
    reduction = Reduction(
        channels=int(flagged.sum()),
        outputs=flagged.numel(),
        before=_quality(weight, qparams),
        after=_quality(weight, fitted),
        kernel=worst.kernel,
        pairing=worst.pairing,
    )
    return fitted, reduction


def _worst(choice: KernelChoice, weight: Tensor, qparams: QParams, high: int) -> Tensor:
    return choice.excess(quantize(weight, qparams), high).max()


def _enlarged(
    weight: Tensor, qparams: QParams, choices: Sequence[KernelChoice], high: int
) -> tuple[QParams, Tensor]:
    """Scales that fit, and which output channels they changed."""
    if bool((qparams.zero_point != 0).any()):  # half of the range, around a zero point inside it
        half = replace(qparams.spec, quant_min=-_HALF, quant_max=_HALF - 1)
        chosen = choose_qparams(weight.amin(), weight.amax(), half)
        outputs = choices[0].geometry.outputs
        fitted = QParams(chosen.scale, chosen.zero_point, qparams.spec)
        return fitted, torch.ones(outputs, dtype=torch.bool)
    current = qparams
    while True:
        integers = quantize(weight, current)
        factors = torch.stack([choice.excess(integers, high) for choice in choices]).amax(0)
        if float(factors.max()) <= 1:
            break
        if not qparams.spec.is_per_channel:
            factors = factors.max()
        scale = current.scale * factors.clamp(min=1.0).to(torch.float32)
        current = QParams(scale, current.zero_point, qparams.spec)
    changed = current.scale != qparams.scale
    return current, changed if changed.dim() else changed.expand(choices[0].geometry.outputs)


def _quality(weight: Tensor, qparams: QParams) -> float:
    noise = (dequantize(quantize(weight, qparams), qparams) - weight).double().square().sum()
    return float(10 * torch.log10(weight.double().square().sum() / noise.clamp(min=1e-300)))


class KnownWeights:
    """Parameters and integers of weights, which several passes of a run ask for."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def qparams(
        self, stored: Tensor, spec: QuantSpec, qconfig: QConfig, name: str, weight: Tensor
    ) -> QParams:
        """As :func:`fxquant.observed.weight_qparams`.

        Args:
            stored: the tensor of the module, as long as it is there.
            spec: as there, and so on.
            qconfig: as there.
            name: as there.
            weight: the values of ``stored``.
        """
        known = self._of(stored)
        for wanted, factory, found in known.qparams:
            if wanted == spec and factory is qconfig.weight:
                return found
        made = weight_qparams(weight, spec, qconfig, name)
        known.qparams.append((spec, qconfig.weight, made))
        return made

    def integers(self, stored: Tensor, qparams: QParams, weight: Tensor) -> Tensor:
        """As :func:`fxquant.slices.quantize_rows`; nobody writes the result."""
        known = self._of(stored)
        if known.integers is None or known.integers[0] is not qparams:
            known.integers = qparams, quantize_rows(weight, qparams)
        return known.integers[1]

    def _of(self, stored: Tensor) -> _Known:
        known = self._known.get(stored)
        if known is None or known.version != stored._version:
            known = self._known[stored] = _Known(stored._version)
        return known  # type: ignore[no-any-return]  # torch's dictionary is untyped


@dataclass
class _Known:
    """What is known of a tensor as long as it has this version."""

    version: int
    qparams: list[tuple[QuantSpec, Any, QParams]] = field(default_factory=list)
    integers: tuple[QParams, Tensor] | None = None


Selector = Callable[..., KernelChoice]
"""``(op, epilogues, *, integers)`` -> the kernel that the target will run."""


@dataclass
class WeightFitter:
    """Parameters of every weight of a prepared graph, fitted to the kernels that will read it.

    A weight that several calls read, or tied layers, is fitted to all of them.

    Attributes:
        gm: the prepared graph.
        select: the target's choice of kernels; ``None`` where it runs none.
        known: what other passes of the run computed.
        reductions: node name -> what was changed for it.
    """

    gm: QuantGraphModule
    select: Selector | None
    known: KnownWeights = field(default_factory=KnownWeights)
    reductions: dict[str, Reduction] = field(default_factory=dict)
    _choices: dict[int, list[KernelChoice]] = field(init=False)

    def __post_init__(self) -> None:
        self._choices = {}
        fused = fused_ops(self.gm) if self.select is not None else {}
        for node, op in weighted_ops(self.gm) if self.select is not None else ():
            path = op.constant_path("weight")
            assert self.select is not None
            if path is None:
                continue  # its observer, in the graph, decides; fit-weights looks again
            choice = chosen(node, op, self.select, fused)
            if choice.pairing not in (Pairing.NONE, Pairing.WRONG):
                self._choices.setdefault(id(attribute(self.gm, path)), []).append(choice)

    def qparams(
        self, node: fx.Node, path: str, weight: Tensor, spec: QuantSpec, qconfig: QConfig
    ) -> QParams:
        """As :func:`fxquant.observed.weight_qparams`, and such that no kernel overflows.

        Args:
            node: the op that reads the weight.
            path: where the weight is.
            weight: its values.
            spec: what the op table made of the observer's wish.
            qconfig: whose ``weight`` makes the observer.

        Raises:
            NonFiniteStatisticError: the weight holds NaN or Inf.
        """
        stored = attribute(self.gm, path)
        usual = self.known.qparams(stored, spec, qconfig, node.name, weight)
        choices = self._choices.get(id(stored), [])
        if not choices:
            return usual
        fitted, reduction = fit(weight.to(torch.float32), usual, choices)
        if reduction is not None:
            self.reductions[node.name] = reduction
        return fitted

    def integers(self, path: str, weight: Tensor, qparams: QParams) -> Tensor:
        """What ``weight``, which is at ``path``, is in integers; not to be written."""
        return self.known.integers(attribute(self.gm, path), qparams, weight)


def weighted_ops(gm: QuantGraphModule) -> list[tuple[fx.Node, Op]]:
    """The convolutions and linears with calibrated integer activations and an integer weight."""
    found = []
    for node in gm.graph.nodes:
        record = record_of(node)
        annotation, fusion = record.annotation, record.fusion
        if annotation is None or (fusion is not None and fusion.first != node.name):
            continue
        spec, inputs = annotation.weight, annotation.inputs
        if spec is None or spec.is_float or not inputs or inputs[0] is None:
            continue
        op = op_of(gm, node)
        if op is None or not ("conv" in op.name or op.name == "linear") or inputs[0].is_dynamic:
            continue
        found.append((node, op))
    return found


def fused_ops(gm: QuantGraphModule) -> dict[int, list[tuple[fx.Node, str]]]:
    """Number of a fused pattern -> its nodes in graph order, with the kinds of their ops."""
    groups: dict[int, list[tuple[fx.Node, str]]] = {}
    for node in gm.graph.nodes:
        fusion = record_of(node).fusion
        if fusion is not None:
            op = op_of(gm, node)
            groups.setdefault(fusion.group, []).append((node, "" if op is None else op.name))
    return groups


def chosen(
    node: fx.Node, op: Op, select: Selector, fused: Mapping[int, Sequence[tuple[fx.Node, str]]]
) -> KernelChoice:
    """The kernel that will run ``op`` with what is fused behind it.

    Args:
        node: of the op.
        op: convolution or linear.
        select: the target's choice.
        fused: of the graph, from :func:`fused_ops`.
    """
    record = record_of(node)
    members = () if record.fusion is None else fused[record.fusion.group]
    epilogues = [kind for other, kind in members if other is not node]
    integers = record.annotation is not None and record.annotation.output is not None
    return select(op, epilogues, integers=integers)


def overflowing(gm: QuantGraphModule) -> list[str]:
    """Weights of a lowered graph that overflow the kernels that read them here, a sentence each."""
    found = []
    for limit in gm.state.limits:
        pairing = pairing_here(limit.geometry, limit.kernel)
        choice = KernelChoice(kernel=limit.kernel, geometry=limit.geometry, pairing=pairing)
        weight = attribute(gm, limit.weight)
        if pairing in (Pairing.NONE, Pairing.WRONG) or not isinstance(weight, Tensor):
            continue
        channels = int((choice.excess(weight) > 1).sum())
        if channels:
            found.append(
                f"the weight {limit.weight!r} overflows the 16-bit sums of {limit.kernel}'s kernel"
                f" on this CPU in {channels} of {limit.geometry.outputs} output channels: it was"
                " quantized for a CPU with VNNI. Move the model with fxquant.save and fxquant.load,"
                " which fits its weights, or convert it here"
            )
    return found


def tell(
    gm: QuantGraphModule, reductions: dict[str, Reduction], diagnostics: Diagnostics, cause: str
) -> None:
    """One warning for all layers that were fitted, and a reason on each for ``explain``."""
    if not reductions:
        return
    for node in gm.graph.nodes:
        if node.name in reductions:
            add_reason(node, str(reductions[node.name]))
    shown = [
        f"{name!r} ({r.channels} of {r.outputs} channels, {r.before:.1f} -> {r.after:.1f} dB)"
        for name, r in list(reductions.items())[:5]
    ]
    more = f" and {len(reductions) - 5} more" if len(reductions) > 5 else ""
    total = sum(r.channels for r in reductions.values())
    of = sum(r.outputs for r in reductions.values())
    diagnostics.warn(
        f"{cause}: the int8 kernels of this CPU add pairs of products in 16 bits (no VNNI), so the"
        f" weight range of {total} of {of} output channels is reduced until no pair can overflow:"
        f" {', '.join(shown)}{more}. explain() says it for each layer. Convert on a CPU with VNNI"
        " to keep the full range there",
        LoweringWarning,
    )
