"""What every value of the reference graph was while the lowered graph ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.kernels import as_bytes, as_quantized
from fxquant.metadata import record_of
from fxquant.passes.lower import Lower
from fxquant.passes.prepack import Prepack

_MADE_HERE: Final = (Lower.name, Prepack.name)


class Values(dict[str, Any]):
    """Reference node name -> integers, float tensor or plain value of the lowered graph.

    Attributes:
        parameters: the same -> scale and zero point, of quantized tensors that come from outside,
            and of what kernels only move of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, tuple[Tensor, Tensor]] = {}


class Recorder(fx.Interpreter):
    """Runs the lowered graph and keeps what each reference node's value was there.

    Attributes:
        values: what was seen.
        foreign: lowered node -> the parameters that came with its value from outside.
        kernels: reference node name -> the lowered node that stands for it.
    """

    def __init__(self, lowered: QuantGraphModule, reference: Mapping[str, fx.Node]) -> None:
        super().__init__(lowered)
        self.reference = reference
        self.values = Values()
        self.foreign: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.kernels: dict[str, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``, kept where a reference node stands behind it."""
        value = super().run_node(n)
        name = record_of(n).stands_for
        if name:
            self.kernels[name] = n
        elif n.name in self.reference and record_of(n).made_by not in _MADE_HERE:
            name = n.name  # an op that stayed in floating point, or an input
        self._follow(n, value)
        if name:
            self.values[name] = _detached(value)
            if n in self.foreign:
                self.values.parameters[name] = self.foreign[n]
        return value

    def _follow(self, n: fx.Node, value: Any) -> None:
        """Note the parameters of a value from outside, and of what is only moved of it."""
        if not isinstance(value, Tensor):
            return
        record = record_of(n)
        moves = record.annotation is not None and record.annotation.shares
        known = [self.foreign[source] for source in n.all_input_nodes if source in self.foreign]
        if record.gives_quantized and value.is_quantized:
            self.foreign[n] = _parameters(value)
        elif known and (moves or n.target in (as_bytes, as_quantized)):
            self.foreign[n] = _parameters(value) if value.is_quantized else known[0]


def _detached(value: Any) -> Any:
    """A copy of a tensor, as integers where it is quantized: kernels overwrite their inputs."""
    if isinstance(value, (tuple, list)):
        return fx.node.map_aggregate(value, _detached)
    if not isinstance(value, Tensor):
        return value
    return value.int_repr() if value.is_quantized else value.clone()


def _parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a quantized tensor, which keeps the scale in float64."""
    scale = torch.tensor(x.q_scale(), dtype=torch.float64).to(torch.float32)
    return scale, torch.tensor(x.q_zero_point(), dtype=torch.int32)
