"""Where a quantized graph holds the value of an op of the float graph, and in which form.

The reference graph is the spine: a ``quantize`` node holds the integers of the op that it reads,
and the kernel of a lowered graph says which reference node it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, fx

from fxquant.graph_codec import decode_graph
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.metadata import record_of
from fxquant.op_view import attribute
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.passes.lower import Lower
from fxquant.passes.prepack import Prepack

_MADE_BY_LOWERING: Final = (Lower.name, Prepack.name)
_STARVED: Final = 1 / 16
"""A weight channel is starved where its integers never exceed this share of the largest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The value of one op of the float graph, or of one input, in a quantized graph.

    Attributes:
        name: of the op or input.
        layer: path of the module whose kernel gives it: of ``conv -> bn -> relu``, the conv's.
        label: what the reference graph calls, for ops that no report lists (``getitem``).
        node: the reference node that holds it.
        quantizes: the node only rounds a value that has a site of its own, or an input.
        scale: name of the scale buffer; empty for a float value.
        zero_point: name of the zero-point buffer.
        quant_min: smallest integer.
        quant_max: largest integer.
        dtype: of the integers.
        sources: names of the reference nodes with a site that feed the op.
        starved: weight channels that use few of their integers, of all channels; see
            :func:`_starved_channels`.
    """

    name: str
    node: str
    layer: str = ""
    label: str = ""
    quantizes: bool = False
    scale: str = ""
    zero_point: str = ""
    quant_min: int = 0
    quant_max: int = 0
    dtype: torch.dtype = torch.float32
    sources: tuple[str, ...] = ()
    starved: tuple[int, int] | None = None

    @property
    def holds_integers(self) -> bool:
        """Whether the value is integers with a scale."""
        return bool(self.scale)

    def parameters(self, gm: QuantGraphModule) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the integers, 0-d, from the buffers of ``gm``."""
        scale, zero_point = attribute(gm, self.scale), attribute(gm, self.zero_point)
        assert isinstance(scale, Tensor) and isinstance(zero_point, Tensor)
        return scale, zero_point


def sites_of(gm: QuantGraphModule) -> dict[str, Site]:
    """Node of ``gm`` -> the value that it holds, in graph order.

    Args:
        gm: a reference graph or a lowered one.
    """
    if gm.state.stage is Stage.LOWERED:
        spine = decode_graph(list(gm.state.reference))
        known = _Finder(gm, spine).find()
        holders = {node.name: _stands_for(node, known) for node in gm.graph.nodes}
    else:
        spine = gm.graph
        known = _Finder(gm, spine).find()
        inside = {node.name for node in spine.nodes if _is_inside(node)}
        holders = {name: name for name in known if name not in inside}
    found = {node: known[name] for node, name in holders.items() if name}
    met = {site.node for site in found.values()}
    return {node: _sharpened(site, known, met) for node, site in found.items()}


def _sharpened(site: Site, known: dict[str, Site], met: set[str]) -> Site:
    """``site`` with sources that the graph really holds, and its role in it."""
    sources: list[str] = []
    seen: set[str] = set()
    pending = list(site.sources)
    while pending:
        name = pending.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name in met:
            sources.append(name)
        else:
            pending.extend(known[name].sources)
    own = {name for name in sources if known[name].name == site.name}
    return replace(site, sources=tuple(sources), quantizes=site.quantizes or bool(own))


def _stands_for(node: fx.Node, known: dict[str, Site]) -> str:
    record = record_of(node)
    if record.stands_for in known:
        return record.stands_for
    if node.name in known and record.made_by not in _MADE_BY_LOWERING:
        return node.name  # an op that stayed in floating point
    return ""


def _is_inside(node: fx.Node) -> bool:
    """Whether a reference node's value is only a step on the way to another site's."""
    users = list(node.users)
    if users and all(user.target is QUANTIZE for user in users):
        return True
    fusion = record_of(node).fusion
    return fusion is not None and fusion.last != node.name and len(users) == 1


class _Finder:
    """Finds the sites of a reference graph."""

    def __init__(self, gm: QuantGraphModule, spine: fx.Graph) -> None:
        self.gm = gm
        self.spine = spine
        self.order = {entry.name: number for number, entry in enumerate(gm.state.ledger)}
        self.paths = {entry.name: entry.path for entry in gm.state.ledger}
        self.nodes = {node.name: node for node in spine.nodes}
        self.sites: dict[str, Site] = {}

    def find(self) -> dict[str, Site]:
        """Reference node -> its site, in graph order."""
        for node in self.spine.nodes:
            site = self._site(node)
            if site is not None:
                self.sites[node.name] = site
        return self.sites

    def _site(self, node: fx.Node) -> Site | None:
        if node.target is QUANTIZE:
            return self._integers(node)
        if node.op in ("placeholder", "output", "get_attr"):
            return None
        name = self._origin(node)
        if not name:
            return None
        return Site(
            name=name,
            node=node.name,
            layer=self._layer(node),
            label=str(getattr(node.target, "__name__", node.target)),
            sources=self._sources(node),
            starved=self._starved_of_pattern(node),
        )

    def _integers(self, node: fx.Node) -> Site | None:
        source, scale, zero_point, low, high, dtype = node.args[:6]
        assert isinstance(source, fx.Node)
        if source.op == "get_attr" or (len(node.args) > 6 and node.args[6] is not None):
            return None  # a weight
        if not (isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)):
            return None
        name, rounds = self._quantized_value(source)
        if not name or scale.op != "get_attr" or zero_point.op != "get_attr":
            return None
        assert isinstance(low, int) and isinstance(high, int) and isinstance(dtype, torch.dtype)
        inner = self.sites.get(source.name)
        return Site(
            name=name,
            node=node.name,
            layer=inner.layer if inner is not None else "",
            label=inner.label if inner is not None else "",
            quantizes=rounds,
            scale=str(scale.target),
            zero_point=str(zero_point.target),
            quant_min=low,
            quant_max=high,
            dtype=dtype,
            sources=(source.name,) if inner is not None else self._sources(node),
            starved=inner.starved if inner is not None else None,
        )

    def _quantized_value(self, source: fx.Node) -> tuple[str, bool]:
        """The op whose value ``source`` is, and whether it was rounded or read before."""
        rounded = False
        node = source
        while not self._origin(node):
            if node.op == "placeholder":
                return str(node.target).lstrip("*"), True
            inputs = [a for a in node.all_input_nodes if a.op != "get_attr"]
            if len(inputs) != 1:
                return "", False
            rounded = rounded or node.target in (QUANTIZE, DEQUANTIZE)
            node = inputs[0]
        return self._origin(node), rounded

    def _origin(self, node: fx.Node) -> str:
        """The last op of the float graph that ``node`` carries out; empty for none."""
        origins = record_of(node).origins
        return origins[-1] if origins else ""

    def _layer(self, node: fx.Node) -> str:
        """Path of the module that begins the pattern of ``node``."""
        fusion = record_of(node).fusion
        first = self.nodes.get(fusion.first, node) if fusion is not None else node
        known = [o for o in record_of(first).origins if o in self.order]
        return self.paths.get(min(known, key=self.order.__getitem__, default=""), "")

    def _starved_of_pattern(self, node: fx.Node) -> tuple[int, int] | None:
        """Of the weight of the pattern that ends in ``node``."""
        fusion = record_of(node).fusion
        first = self.nodes.get(fusion.first, node) if fusion is not None else node
        return self._starved(first)

    def _sources(self, node: fx.Node) -> tuple[str, ...]:
        found: list[str] = []
        pending = [a for a in node.all_input_nodes if a.op != "get_attr"]
        while pending:
            source = pending.pop(0)
            if source.name in self.sites:
                found.append(source.name)
            else:
                pending.extend(a for a in source.all_input_nodes if a.op != "get_attr")
        return tuple(dict.fromkeys(found))

    def _starved(self, node: fx.Node) -> tuple[int, int] | None:
        for argument in node.all_input_nodes:
            if argument.target is not DEQUANTIZE:
                continue
            integers = argument.args[0]
            if isinstance(integers, fx.Node) and integers.op == "get_attr":
                axis = argument.args[3] if len(argument.args) > 3 else None
                value = attribute(self.gm, str(integers.target))
                return _starved_channels(value, axis if isinstance(axis, int) else 0)
        return None


def _starved_channels(integers: Tensor, axis: int) -> tuple[int, int] | None:
    """Channels whose integers stay within a sixteenth of the largest one, and all channels."""
    if integers.dim() < 2 or integers.dtype is not torch.int8:
        return None
    reach = integers.to(torch.int32).abs().transpose(0, axis).flatten(1).amax(1)
    return int((reach < _STARVED * reach.max()).sum()), len(reach)
