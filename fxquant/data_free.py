"""Ranges without data: the float model runs on made-up inputs, normalized at every batch-norm.

A batch-norm was trained to give every channel the mean ``beta`` and the deviation ``|gamma|``.
Normalizing by the made-up batch instead of the running statistics gives it exactly those, whatever
the inputs lack of real data: an error before it is forgotten there. Everything else (residual sums,
pooling, gates, concatenations) computes what it computes. Where batch-norms were folded away, the
inputs must do; see :mod:`fxquant.synthetic`.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2.1, for what batch-norms know.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxquant.attribute_paths import set_attribute
from fxquant.channel_mean import ChannelMean
from fxquant.errors import CalibrationError
from fxquant.graph_module import QuantGraphModule
from fxquant.inputs import BoundInterpreter, bind_examples
from fxquant.metadata import record_of
from fxquant.op_view import Op, op_of
from fxquant.passes.to_reference import is_observer
from fxquant.synthetic import synthetic_like

_SEED = 0
_PIXELS = 1 << 20  # of a batch: 20 pictures of 224 x 224
_FEWEST, _MOST = 4, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What could not be estimated as it should.

    Attributes:
        blind: values whose observers saw nothing.
        unnormalized: batch-norms that had one value per channel, so that their running statistics
            were used.
    """

    blind: tuple[str, ...]
    unnormalized: tuple[str, ...]


def estimate(
    prepared: QuantGraphModule,
    graph: QuantGraphModule,
    example_inputs: object,
    *,
    mean: float,
    deviation: float,
) -> Estimate:
    """Fill the observers and channel means of ``prepared`` without data.

    Args:
        prepared: what ``prepare_fx`` made of the model.
        graph: the model, captured, batch-norms in place; in evaluation mode.
        example_inputs: as for ``prepare_fx``. Float tensors ``[N, ...]`` are made up anew;
            integers, flags and floats without a batch axis are taken as they are.
        mean: of the made-up inputs.
        deviation: of the made-up inputs.

    Raises:
        CalibrationError: the model does not run on them.
    """
    watchers, blind = _watchers(prepared, {node.name for node in graph.graph.nodes})
    paths = {path: prepared.get_submodule(path) for found in watchers.values() for path in found}
    paths |= {path: prepared.get_submodule(path) for path, _ in prepared.state.islands}
    bound = bind_examples(graph, example_inputs)
    examples = dict(bound.arguments)
    batch, count = _batch_sizes(examples)
    failure: Exception | None = None
    for size in dict.fromkeys((count, batch)):  # some models take the batch of the example only
        bound.arguments.update(_made_up(examples, batch, size, mean, deviation))
        fed = copy.deepcopy(paths)  # a run that fails half-way leaves nothing behind
        run = _NormalizingRun(
            graph,
            bound,
            {name: [fed[p] for p in found] for name, found in watchers.items()},
            {path: fed[path] for path, _ in prepared.state.islands},
        )
        try:
            with torch.no_grad():
                run.run()
        except Exception as error:  # noqa: BLE001  # whatever a user's model raises is reported
            failure = error
            continue
        for path, watcher in fed.items():
            set_attribute(prepared, path, watcher)
        return Estimate(blind=tuple(blind), unnormalized=tuple(run.unnormalized))
    cause = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    raise CalibrationError(
        f"the model does not run on inputs made up like the example inputs: {cause}. Pass"
        " calibration data instead of None"
    ) from failure


class _NormalizingRun(BoundInterpreter):
    """Runs a float graph with batch-norms that normalize, and shows values to their watchers."""

    def __init__(
        self,
        gm: QuantGraphModule,
        bound: inspect.BoundArguments,
        watchers: Mapping[str, list[nn.Module]],
        islands: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(gm, bound)
        self.gm = gm
        self.watchers = watchers
        self.islands = islands  # those of the prepared model, which watch what is in them
        self.unnormalized: list[str] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module at ``target``."""
        island = self.islands.get(str(target))
        if island is not None:
            return island(*args, **kwargs)
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``, and feed those who watch it."""
        op = op_of(self.gm, n) if n.op.startswith("call") else None
        if op is not None and op.name == "batch_norm":
            value = self._normalized(n, op)
        else:
            value = super().run_node(n)
        if isinstance(value, Tensor):
            for watcher in self.watchers.get(n.name, ()):
                watcher(value)
        return value

    def _normalized(self, n: fx.Node, op: Op) -> Any:
        x = self.env[op.activations[0]]
        if x.numel() <= x.shape[1]:  # one value per channel has no deviation
            self.unnormalized.append(n.name)
            return super().run_node(n)
        gamma, beta = op.constant("weight"), op.constant("bias")
        return F.batch_norm(x, None, None, gamma, beta, True, 0.0, float(op.arguments["eps"]))


def _watchers(
    prepared: QuantGraphModule, known: set[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Value of the float graph -> paths of who watches it; and values that it does not have."""
    found: dict[str, list[str]] = {}
    blind = []
    for node in prepared.graph.nodes:
        if node.op != "call_module":
            continue
        watcher = prepared.get_submodule(str(node.target))
        if not (is_observer(node) or isinstance(watcher, ChannelMean)):
            continue
        source = _source(node)
        names = (source.name, *record_of(source).origins)
        name = next((name for name in reversed(names) if name in known), None)
        if name is None:
            blind.append(source.name)
        else:
            found.setdefault(name, []).append(str(node.target))
    return found, blind


def _source(node: fx.Node) -> fx.Node:
    """The value that a watcher watches, through other watchers."""
    source = node.all_input_nodes[0]
    while source.op == "call_module" and not record_of(source).origins:
        source = source.all_input_nodes[0]
    return source


def _batch_sizes(examples: Mapping[str, Any]) -> tuple[int, int]:
    """The batch of the example inputs, and the one that is made up."""
    floats: list[Tensor] = []
    tree_map_only(Tensor, floats.append, dict(examples))
    floats = [t for t in floats if _has_batch(t)]
    if not floats:
        return 1, 1
    pixels = max(int(t.shape[-2:].numel()) if t.dim() >= 4 else 1 for t in floats)
    return floats[0].shape[0], min(max(_PIXELS // max(pixels, 1), _FEWEST), _MOST)


def _has_batch(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel() > 0


def _made_up(
    examples: Mapping[str, Any], batch: int, size: int, mean: float, deviation: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(_SEED)

    def make(tensor: Tensor) -> Tensor:
        if _has_batch(tensor) and tensor.shape[0] == batch:
            return synthetic_like(tensor, size, mean=mean, deviation=deviation, generator=generator)
        if tensor.dim() and tensor.shape[0] == batch:
            return tensor[torch.arange(size) % batch]
        return tensor.clone()  # a forward may write into its inputs

    made: dict[str, Any] = tree_map_only(Tensor, make, dict(examples))
    return made
