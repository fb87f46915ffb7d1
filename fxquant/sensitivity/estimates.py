"""Fast modes: what lowering a layer would cost, from gradients, without running the rest of it.

``first-order``: the error ``e`` that lowering a layer makes at its own output, carried to the
model's output by the Jacobian: ``mean |J e|^2``, the MSE that a linear network would have.
``|J e|^2`` is the mean of ``(v . J e)^2`` over random ``v``, and ``J^T v`` for all layers is one
backward pass; each input and probe is one sample of it.

``hessian``: HAWQ-V2 (Dong et al. 2019, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of
Neural Networks", section 3), ``trace(H_w) / n_w |Q(w) - w|^2`` for the weight and
``trace(H_a) / n_a |Q(a) - a|^2`` for the input, added up. ``H`` is that of half the squared
distance of the outputs from those of the float network, per input; no labels are needed. At the
float network's weights that distance is 0, so ``H`` is ``J^T J`` exactly, and Hutchinson's
estimator can be run on ``J J^T``, which has the same trace: ``|J^T u|^2`` for random signs ``u`` at
the output, one backward pass instead of two and, with few outputs, far less variance than signs at
the weights.

Both modes estimate an MSE of the output, up to a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.inputs import BoundInterpreter
from fxquant.metadata import record_of
from fxquant.observed import weight_qparams
from fxquant.op_view import attribute, op_of
from fxquant.own_copy import own_copy
from fxquant.sensitivity.activations import tensors_in
from fxquant.sensitivity.feeding import BoundBatch, count_inputs
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.network import FP32, Assignment, CalibratedNetwork
from fxquant.sensitivity.simulator import Program, Simulator, find_node, leaving
from fxquant.slices import quantize_rows
from fxquant.specs import dequantize, quantize

FIRST_ORDER: Final = "first-order"
HESSIAN: Final = "hessian"
ESTIMATES: Final = (FIRST_ORDER, HESSIAN)


class Estimator:
    """Estimates for all layers of a network at once.

    Args:
        network: the network.
        simulator: gives the error of each layer at its own output.
        groups: layers, or groups of them, whose estimates add up.
        precision: what layers are lowered to.
        probes: random vectors for each batch.
        seed: of them.
        tick: called after each step, for a progress bar.
    """

    def __init__(
        self,
        network: CalibratedNetwork,
        simulator: Simulator,
        groups: Sequence[Layer],
        precision: str,
        *,
        probes: int = 8,
        seed: int = 0,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.network = network
        self.simulator = simulator
        self.groups = groups
        self.precision = precision
        self.probes = probes
        self.generator = torch.Generator().manual_seed(seed)
        self.tick = tick
        copied = own_copy(network.graph)
        assert isinstance(copied, QuantGraphModule)
        self.graph = copied.requires_grad_(False)
        self.heads = {head: layer for layer in network.layers for head in layer.heads}

    @property
    def steps(self) -> int:
        """How often :attr:`tick` is called for one estimate, at most."""
        return len(self.network.batches) * self.probes

    def run(self, name: str) -> dict[str, float]:
        """Group -> estimate, by the name of a mode."""
        by_layer = self.first_order() if name == FIRST_ORDER else self.hessian()
        return {
            group.name: sum(by_layer[member] for member in group.members or (group.name,))
            for group in self.groups
        }

    # -- first order ------------------------------------------------------------------------------

    def first_order(self) -> dict[str, float]:
        """Layer -> the MSE of the model's output, if the network were linear."""
        sums = dict.fromkeys((layer.name for layer in self.network.layers), 0.0)
        total = 0
        sites = self._sites()
        owners = {site.node: site.layer for site in sites}
        for batch, errors in zip(self.network.batches, self._errors(sites), strict=True):
            for _ in range(self.probes):
                run = _Perturbed(self.graph, batch, owners, at_output=True)
                outputs = _floats(run.run())
                total += sum(o.numel() for o in outputs)
                names = [name for name in run.added if name in errors]
                probe = [torch.randn(o.shape, generator=self.generator).to(o) for o in outputs]
                value = torch.stack([(o * v).sum() for o, v in zip(outputs, probe, strict=True)])
                gradients = torch.autograd.grad(
                    value.sum(), [run.added[name] for name in names], allow_unused=True
                )
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        squares = _squares(gradient, errors[name], count_inputs(batch))
                        sums[owners[name].name] += squares
                self.tick()
        return {name: value / total for name, value in sums.items()}

    def _sites(self) -> list[_Site]:
        """Where the error of each layer is seen, when it alone is lowered."""
        sites = []
        for layer in self.network.layers:
            program = self.simulator.alone((layer.name,), self.precision)
            end = leaving(program, layer)
            if end != layer.last and end not in layer.nodes:  # its result is rounded, not its op's
                sites.append(_Site(layer=layer, node=layer.last, seen=end, program=program))
                continue
            for head in layer.heads:
                if head in program.numbers:
                    sites.append(_Site(layer=layer, node=head, seen=head, program=program))
        return sites

    def _errors(self, sites: Sequence[_Site]) -> Iterator[dict[str, Tensor]]:
        """For each batch: node -> the error of its value when its layer alone is lowered."""
        floats = self.simulator.program(Assignment(rest=FP32))
        self.simulator.anchor(floats)
        self.simulator.store.start_round()
        for batch in range(len(self.network.batches)):
            found: dict[str, Tensor] = {}
            for site in sites:
                lowered = self.simulator.run(site.program, batch, [site.seen])[site.seen]
                exact = self.simulator.run(floats, batch, [site.node])[site.node]
                site.program.constants.clear()
                if isinstance(exact, Tensor):
                    found[site.node] = lowered - exact
            yield found

    # -- Hessian ----------------------------------------------------------------------------------

    def hessian(self) -> dict[str, float]:
        """Layer -> HAWQ-V2's weighted trace, of weight and input."""
        inputs = sum(count_inputs(batch) for batch in self.network.batches)
        paths = {layer.name: self._weights(layer) for layer in self.network.layers}
        errors = {p: e for found in paths.values() for p, e in found.items()}
        traces = dict.fromkeys(errors, 0.0)
        inside = dict.fromkeys((layer.name for layer in self.network.layers), 0.0)
        for batch in self.network.batches:
            rounded = self._input_errors(batch)
            for _ in range(self.probes):
                for key, trace in self._trace(batch, list(errors)).items():
                    if key in traces:
                        traces[key] += trace / self.probes
                    elif key in rounded:
                        inside[self.heads[key].name] += trace / self.probes * rounded[key]
                self.tick()
        found = {}
        for layer in self.network.layers:
            weights = sum(
                traces[p] / e.numel() * float(e.double().square().sum())
                for p, e in paths[layer.name].items()
            )
            found[layer.name] = (weights + inside[layer.name]) / inputs
        return found

    def _trace(self, batch: BoundBatch, paths: Sequence[str]) -> dict[str, float]:
        """One sample of Hutchinson's trace: for each weight by path, each input by its head."""
        weights = {path: attribute(self.graph, path) for path in paths}
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            run = _Perturbed(self.graph, batch, self.heads, at_output=False)
            outputs = _floats(run.run())
            variables = {**weights, **run.added}
            value = torch.stack([(o * self._signs(o)).sum() for o in outputs]).sum()
            gradients = torch.autograd.grad(value, list(variables.values()), allow_unused=True)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        return {
            name: float(gradient.double().square().sum())
            for name, gradient in zip(variables, gradients, strict=True)
            if gradient is not None
        }

    def _signs(self, like: Tensor) -> Tensor:
        bits = torch.randint(0, 2, like.shape, generator=self.generator)
        return (2 * bits - 1).to(like)

    def _weights(self, layer: Layer) -> dict[str, Tensor]:
        """Path of each weight of a layer -> what rounding changes of it."""
        found = {}
        node = find_node(self.network.graph, layer.heads[0])
        qconfig = self.network.qconfig_of(node.name, self.precision)
        annotation = record_of(find_node(self.network.annotated, layer.heads[0])).annotation
        spec = None if annotation is None else annotation.weight
        for path in layer.weights:
            weight = self.network.float_weight(path)
            if qconfig is None or spec is None or spec.is_float:
                continue
            qparams = weight_qparams(weight, spec, qconfig, node.name)
            found[path] = dequantize(quantize_rows(weight, qparams), qparams) - weight
        return found

    def _input_errors(self, batch: BoundBatch) -> dict[str, float]:
        """Head -> mean squared error of rounding what it reads."""
        run = _Perturbed(self.graph, batch, self.heads, at_output=False)
        with torch.no_grad():
            run.run()
        found = {}
        for head, value in run.seen.items():
            qconfig = self.network.qconfig_of(head, self.precision)
            source = run.sources[head]
            if qconfig is None or source.op == "get_attr":
                continue
            qparams = self.network.statistics.qparams(source.name, qconfig)
            if qparams is not None:
                error = dequantize(quantize(value, qparams), qparams) - value
                found[head] = float(error.double().square().mean())
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A value at which a layer's error is seen.

    Attributes:
        layer: whose error it is.
        node: of the float graph.
        seen: node of the program that has its value there.
        program: lowers the layer alone.
    """

    layer: Layer
    node: str
    seen: str
    program: Program


class _Perturbed(BoundInterpreter):
    """Runs the float graph with zeros, which have gradients, added at every layer.

    Attributes:
        added: head -> the zeros.
        seen: head -> what they were added to.
        sources: head -> the node whose value it reads first.
    """

    def __init__(
        self,
        gm: QuantGraphModule,
        bound: BoundBatch,
        heads: dict[str, Layer],
        *,
        at_output: bool,
    ) -> None:
        super().__init__(gm, bound)
        self.gm = gm
        self.heads = heads
        self.at_output = at_output
        self.added: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.sources: dict[str, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``; heads of layers with zeros added to what they read, or give."""
        if n.name not in self.heads:
            return super().run_node(n)
        if self.at_output:
            value = super().run_node(n)
            return self._plus(n.name, value) if isinstance(value, Tensor) else value
        op = op_of(self.gm, n)
        source = None if op is None or not op.activations else op.activations[0]
        if source is None or not isinstance(self.env.get(source), Tensor):
            return super().run_node(n)
        kept = self.env[source]
        self.sources[n.name] = source
        self.env[source] = self._plus(n.name, kept)
        try:
            return super().run_node(n)
        finally:
            self.env[source] = kept

    def _plus(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        self.seen[name] = value.detach()
        self.added[name] = torch.zeros_like(value, requires_grad=True)
        return value + self.added[name]


def _floats(value: Any) -> list[Tensor]:
    return [t for t in tensors_in(value) if t.is_floating_point()]


def _squares(gradient: Tensor, error: Tensor, inputs: int) -> float:
    """Sum over inputs of ``(gradient . error)^2``."""
    product = gradient.double() * error.double()
    if product.dim() and product.shape[0] == inputs:
        return (
            float(product.flatten(1).sum(1).square().sum())
            if product.dim() > 1
            else float(product.square().sum())
        )
    return float(product.sum().square())
