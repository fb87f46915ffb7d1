"""What activations look like without data: batch-norm statistics and what the ops imply.

Every value is described by seeded samples per channel, ``[S, C]``. An input is taken as normal with
a stated mean and deviation; a convolution's output is normal with the mean and variance that its
weight gives; a batch-norm's output is normal with mean ``beta`` and deviation ``|gamma|``, whatever
came before; element-wise functions are applied to the samples themselves. Source: Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.2.1, 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.channel_mean import ChannelMean
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, record_of, shape_of
from fxquant.op_view import Op, op_of
from fxquant.passes.to_reference import is_observer

_ELEMENTWISE = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "leaky_relu",
        "elu",
        "hardswish",
        "hardsigmoid",
        "silu",
        "mish",
        "gelu",
        "sigmoid",
        "tanh",
    ]
)
_UNCHANGED = frozenset(
    [
        "dropout",
        "identity",
        "detach",
        "contiguous",
        "interpolate",
        "slice",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "channel_shuffle",
    ]
)
_MOST_POOLED = 64  # averaging more independent values than this changes the deviation little


@dataclass
class SampleFlow:
    """Samples of every value of a float graph, computed in graph order.

    Attributes:
        gm: the float graph, batch-norms still in it.
        mean: of the inputs.
        deviation: of the inputs.
        samples: number of samples per channel.
        seed: of the generator.
    """

    gm: QuantGraphModule
    mean: float = 0.0
    deviation: float = 1.0
    samples: int = 512
    seed: int = 0
    values: dict[str, Tensor] = field(default_factory=dict, init=False)
    unknown: list[str] = field(default_factory=list, init=False)

    def run(self) -> dict[str, Tensor]:
        """Node name -> samples ``[S, C]``; values that could only be guessed are in ``unknown``."""
        self.generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for node in self.gm.graph.nodes:
                made = self._of(node)
                if made is not None:
                    self.values[node.name] = made.to(torch.float32)
        return self.values

    def _of(self, node: fx.Node) -> Tensor | None:
        shape = shape_of(node)
        if node.op == "placeholder":
            channels = 1 if shape is None or len(shape) < 2 else shape[1 if len(shape) > 2 else -1]
            return self.mean + self.deviation * self._normal(channels)
        if node.op not in ("call_module", "call_function", "call_method"):
            return None
        if not isinstance(record_of(node).value, TensorRecord):
            return None
        op = op_of(self.gm, node)
        sources = [self.values[s.name] for s in node.all_input_nodes if s.name in self.values]
        if not sources:
            return None
        if op is not None:
            made = self._known(op, sources)
            if made is not None:
                return made
        self.unknown.append(node.name)
        return sources[0]

    def _known(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        if op.name in _ELEMENTWISE:
            arguments = {n: v for n, v in op.arguments.items() if n not in ("input", "inplace")}
            return _apply(op, sources[0], arguments)
        if op.name in _UNCHANGED:
            return sources[0]
        rule = _RULES.get(op.name)
        return None if rule is None else rule(self, op, sources)

    def _normal(self, channels: int) -> Tensor:
        return torch.randn(self.samples, channels, generator=self.generator)

    def _shuffled(self, x: Tensor) -> Tensor:
        """The same samples in another order: an independent draw."""
        order = torch.argsort(torch.rand(x.shape, generator=self.generator), dim=0)
        return x.gather(0, order)

    def weighted(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Convolution and linear: normal, with the mean and variance of independent inputs."""
        weight, bias = op.constant("weight"), op.constant("bias")
        if weight is None:
            return None
        wide = weight.detach().to(torch.float64)
        groups = int(op.arguments.get("groups", 1))
        if op.name.startswith("conv_transpose"):
            wide = wide.reshape(groups, -1, *wide.shape[1:]).transpose(1, 2).flatten(0, 1)
        mean, variance = sources[0].double().mean(0), sources[0].double().var(0)
        if mean.numel() != wide.shape[1] * groups:  # a flattened image: channels repeat
            mean, variance = (_repeat(m, wide.shape[1] * groups) for m in (mean, variance))
        split = wide.flatten(2) if wide.dim() > 2 else wide.unsqueeze(2)
        split = split.reshape(groups, -1, *split.shape[1:])
        out_mean = torch.einsum("goik,gi->go", split, mean.reshape(groups, -1)).reshape(-1)
        out_variance = torch.einsum("goik,gi->go", split**2, variance.reshape(groups, -1))
        if bias is not None:
            out_mean = out_mean + bias.detach().double()
        deviation = out_variance.reshape(-1).sqrt()
        return out_mean + deviation * self._normal(len(out_mean)).double()

    def normalized(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Batch-norm: normal with mean ``beta`` and deviation ``|gamma|``."""
        channels = sources[0].shape[1]
        gamma, beta = op.constant("weight"), op.constant("bias")
        scale = torch.ones(channels) if gamma is None else gamma.detach().abs()
        shift = torch.zeros(channels) if beta is None else beta.detach()
        if len(scale) != channels:
            return None
        return shift + scale * self._normal(channels)

    def standardized(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Layer and group norm: mean 0 and deviation 1 over what they norm, then affine."""
        x = sources[0]
        x = (x - x.mean()) / x.std().clamp_min(1e-6)
        gamma, beta = op.constant("weight"), op.constant("bias")
        if gamma is not None and gamma.numel() == x.shape[1]:
            x = x * gamma.detach()
        return x + beta.detach() if beta is not None and beta.numel() == x.shape[1] else x

    def combined(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Sum, difference, product and quotient of independent values, or with a number."""
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "div": torch.div,
        }
        left, right = (
            self.values.get(a.name) if isinstance(a, fx.Node) else a
            for a in (op.arguments["input"], op.arguments["other"])
        )
        if left is None or right is None:
            return None
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            right = self._shuffled(right)
            if left.shape != right.shape and 1 not in (left.shape[1], right.shape[1]):
                return None
        made = functions[op.name](torch.as_tensor(left), torch.as_tensor(right))
        return torch.nan_to_num(made, posinf=0.0, neginf=0.0)

    def joined(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Concatenation along the channels; along another axis the channels stay."""
        return torch.cat(sources, 1) if op.arguments.get("dim") in (1, -3) else sources[0]

    def maximum(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """The largest of as many draws as the window has elements."""
        made = sources[0]
        for _ in range(min(_window(op), 9) - 1):
            made = torch.maximum(made, self._shuffled(sources[0]))
        return made

    def averaged(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """The mean of as many independent draws as the op averages."""
        shape_in, shape_out = shape_of(op.activations[0]), shape_of(op.node)
        count = 49 if not shape_in or not shape_out else math.prod(shape_in) // math.prod(shape_out)
        x, count = sources[0].double(), max(1, min(count, _MOST_POOLED))
        return x.mean(0) + (x - x.mean(0)) / math.sqrt(count)

    def padded(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Padding adds zeros; padded channels are all zero."""
        shape = shape_of(op.node)
        channels = sources[0].shape[1]
        if shape is None or len(shape) < 3 or shape[1] == channels:
            return sources[0]
        zeros = torch.zeros(self.samples, max(shape[1] - channels, 0))
        return torch.cat([sources[0], zeros], 1)[:, : shape[1]]

    def flattened(self, op: Op, sources: list[Tensor]) -> Tensor | None:
        """Flattening an image repeats each channel for its pixels."""
        shape = shape_of(op.node)
        channels = sources[0].shape[1]
        if shape is None or not shape or shape[-1] % channels:
            return sources[0]
        return sources[0].repeat_interleave(shape[-1] // channels, 1)


def _apply(op: Op, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    made = op.kind.functions[0](x, **arguments)
    assert isinstance(made, Tensor)
    return made


def _window(op: Op) -> int:
    kernel = op.arguments.get("kernel_size", 2)
    return math.prod(kernel) if isinstance(kernel, (tuple, list)) else int(kernel) ** 2


def _repeat(values: Tensor, length: int) -> Tensor:
    if length % values.numel():
        return values.mean().expand(length)
    return values.repeat_interleave(length // values.numel())


_CONVOLUTIONS = [f"conv{d}d" for d in (1, 2, 3)] + [f"conv_transpose{d}d" for d in (1, 2, 3)]
_RULES: dict[str, Callable[[SampleFlow, Op, list[Tensor]], Tensor | None]] = {
    **dict.fromkeys((*_CONVOLUTIONS, "linear"), SampleFlow.weighted),
    "batch_norm": SampleFlow.normalized,
    **dict.fromkeys(("layer_norm", "group_norm"), SampleFlow.standardized),
    **dict.fromkeys(("add", "sub", "mul", "div"), SampleFlow.combined),
    "cat": SampleFlow.joined,
    **dict.fromkeys((f"max_pool{d}d" for d in (1, 2, 3)), SampleFlow.maximum),
    **dict.fromkeys((f"avg_pool{d}d" for d in (1, 2, 3)), SampleFlow.averaged),
    **dict.fromkeys((f"adaptive_avg_pool{d}d" for d in (1, 2, 3)), SampleFlow.averaged),
    "mean": SampleFlow.averaged,
    "pad": SampleFlow.padded,
    **dict.fromkeys(("flatten", "reshape", "view"), SampleFlow.flattened),
}


def fill_statistics(prepared: QuantGraphModule, samples: dict[str, Tensor]) -> list[str]:
    """Feed observers and channel means of ``prepared`` with samples instead of data.

    Args:
        prepared: what ``prepare_fx`` made of the graph that the samples belong to.
        samples: node name -> ``[S, C]``.

    Returns:
        Names of the values for which there were no samples; their observers stay blind.
    """
    blind = []
    for node in prepared.graph.nodes:
        if node.op != "call_module":
            continue
        watcher = prepared.get_submodule(str(node.target))
        if not (is_observer(node) or isinstance(watcher, ChannelMean)):
            continue
        source = _source(node)
        found = next(
            (
                samples[name]
                for name in reversed((source.name, *record_of(source).origins))
                if name in samples
            ),
            None,
        )
        if found is None:
            blind.append(source.name)
        elif not isinstance(watcher, ChannelMean):
            watcher(found)
        elif _fits(watcher, found, node):
            watcher.observe_channels(found)
    return blind


def _source(node: fx.Node) -> fx.Node:
    """The value that a watcher watches, through other watchers."""
    source = node.all_input_nodes[0]
    while source.op == "call_module" and not record_of(source).origins:
        source = source.all_input_nodes[0]
    return source


def _fits(watcher: object, samples: Tensor, node: fx.Node) -> bool:
    """Whether the samples have as many channels as what the op behind the watcher reads."""
    shape = shape_of(node)
    axis = int(getattr(watcher, "axis", 1))
    return shape is not None and samples.shape[1] == shape[axis]
