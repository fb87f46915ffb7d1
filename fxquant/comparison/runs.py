"""The runs behind a comparison: the float graph, the int8 graph, and the int8 graph shadowed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.comparison.measures import Counters
from fxquant.comparison.sites import Site
from fxquant.graph_module import QuantGraphModule
from fxquant.inputs import BoundInterpreter
from fxquant.kernels import as_quantized
from fxquant.metadata import record_of
from fxquant.specs import QParams, QuantSpec, dequantize, quantize


class FloatRun(BoundInterpreter):
    """Runs the float graph and keeps the wanted values, each as it was when it was made.

    Attributes:
        values: name of an op or input -> its value.
    """

    def __init__(
        self, gm: fx.GraphModule, bound: inspect.BoundArguments, wanted: Collection[str]
    ) -> None:
        super().__init__(gm, bound)
        self.wanted = wanted
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``; copy its value, which an in-place op may overwrite."""
        value = super().run_node(n)
        names = {n.name, str(n.target).lstrip("*")} if n.op == "placeholder" else {n.name}
        for name in names.union(record_of(n).origins) & set(self.wanted):
            self.values[name] = fx.node.map_aggregate(value, _copied)
        return value


class IntRun(BoundInterpreter):
    """Runs a reference or lowered graph and counts what its sites differ from the float values.

    Args:
        gm: the graph.
        bound: its inputs.
        sites: node -> site.
        floats: name of an op -> its float value.
        counters: node -> what is counted, filled here.
        shadow: every site hands on the float value, rounded as the graph rounds it, so that the
            next op is fed what the float model gives.
    """

    def __init__(
        self,
        gm: QuantGraphModule,
        bound: inspect.BoundArguments,
        sites: Mapping[str, Site],
        floats: Mapping[str, Any],
        counters: Mapping[str, Counters],
        *,
        shadow: bool,
    ) -> None:
        super().__init__(gm, bound)
        self.gm = gm
        self.sites = sites
        self.floats = floats
        self.counters = counters
        self.shadow = shadow

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``, and compare where it is a site."""
        value = super().run_node(n)
        site = self.sites.get(n.name)
        if site is None:
            return value
        if site.name not in self.floats:
            self.counters[n.name].skipped = "the float graph has no such value"
            return value
        exact = self.floats[site.name]
        counters = self.counters[n.name]
        pairs = _pairs(exact, value)
        if pairs is None:
            counters.skipped = f"float value is {_shape(exact)}, this one {_shape(value)}"
            return value
        if not self.shadow:
            self._count(site, counters, pairs)
            return value
        return self._shadowed(site, counters, exact, value)

    def _count(self, site: Site, counters: Counters, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for exact, value in pairs:
            counters.whole.add(exact, self._decoded(site, value))
            counters.channels.add(exact)
            if site.holds_integers:
                integers = value.int_repr() if value.is_quantized else value
                scale, zero_point = self._parameters(site, value)
                counters.range.add(integers, exact, float(scale), int(zero_point), site)

    def _shadowed(self, site: Site, counters: Counters, exact: Any, value: Any) -> Any:
        pairs = _pairs(exact, value)
        assert pairs is not None
        replaced = []
        for wanted, given in pairs:
            counters.own.add(wanted, self._decoded(site, given))
            held = self._encoded(site, wanted, given)
            counters.rounding.add(wanted, self._decoded(site, held))
            replaced.append(held)
        pieces = iter(replaced)
        return fx.node.map_aggregate(value, lambda v: next(pieces) if _is_float_like(v) else v)

    def _decoded(self, site: Site, value: Tensor) -> Tensor:
        """What a value of the graph stands for, as floats."""
        if not site.holds_integers:
            return value.dequantize() if value.is_quantized else value
        if value.is_quantized:
            return value.dequantize()
        scale, zero_point = self._parameters(site, value)
        return dequantize(value, QParams(scale, zero_point, _spec(site)))

    def _encoded(self, site: Site, exact: Tensor, like: Tensor) -> Tensor:
        """``exact`` as the graph holds it: in the form and memory format of ``like``."""
        if not site.holds_integers:
            if like.is_quantized:
                held = torch.quantize_per_tensor(
                    exact.float(), like.q_scale(), like.q_zero_point(), like.dtype
                )
                return held.contiguous(memory_format=_format(like))
            return torch.empty_like(like).copy_(exact)
        scale, zero_point = self._parameters(site, like)
        integers = quantize(exact.float(), QParams(scale, zero_point, _spec(site)))
        if not like.is_quantized:
            return torch.empty_like(like).copy_(integers)
        held = torch.empty_like(like.int_repr()).copy_(integers)
        return as_quantized(held, like.q_scale(), like.q_zero_point())

    def _parameters(self, site: Site, value: Tensor) -> tuple[Tensor, Tensor]:
        if value.is_quantized:
            scale = torch.tensor(value.q_scale(), dtype=torch.float32)
            return scale, torch.tensor(value.q_zero_point(), dtype=torch.int32)
        return site.parameters(self.gm)


def _spec(site: Site) -> QuantSpec:
    return QuantSpec(
        dtype=site.dtype,
        qscheme=torch.per_tensor_affine,
        quant_min=site.quant_min,
        quant_max=site.quant_max,
    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_float_like(value: object) -> bool:
    """A tensor that stands for floats: floating point, or small integers."""
    return isinstance(value, Tensor) and (
        value.is_floating_point() or value.is_quantized or value.dtype in (torch.uint8, torch.int8)
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _pairs(exact: Any, value: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Float tensors beside those that stand for them; ``None`` where they do not fit."""
    ours, theirs = _leaves(exact), _leaves(value)
    if len(ours) != len(theirs):
        return None
    found = []
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            if not _is_float_like(b) or a.shape != b.shape:
                return None
            found.append((a, b))
        elif _is_float_like(b):
            return None
    return found or None


def _format(value: Tensor) -> torch.memory_format:
    last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
