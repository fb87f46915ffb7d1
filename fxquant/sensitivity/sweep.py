"""The measured truth: lower one layer, or all but one, or more and more of them, and look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from fxquant.sensitivity.cures import CURES
from fxquant.sensitivity.layers import Layer
from fxquant.sensitivity.metrics import Metrics, MetricSums, UserMetric
from fxquant.sensitivity.network import FP32, INT8, Assignment, CalibratedNetwork
from fxquant.sensitivity.policy import UNCURED
from fxquant.sensitivity.probes import ranges_of
from fxquant.sensitivity.results import FIRST, LAST, LayerResult, Measurement
from fxquant.sensitivity.simulator import PARTS, Program, Simulator, leaving

ONE, ALL_BUT_ONE = "one", "all_but_one"
DIRECTIONS: Final = (ONE, ALL_BUT_ONE)
ACTIVATION: Final = "activation"
"""The part that is a layer's inputs and output together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """What is measured.

    Attributes:
        direction: ``"one"`` lowers one layer and leaves all others in FP32; ``"all_but_one"``
            lowers all and leaves one in FP32.
        precisions: what layers are lowered to; causes and parts are looked for in the first.
        attribution: ``""`` for none; ``"layer"`` measures parts of each layer at its own output;
            ``"model"`` at the model's output as well.
        layer_metrics: also measure at each layer's output.
        user: functions of the caller, by name.
    """

    direction: str = ONE
    precisions: tuple[str, ...] = (INT8,)
    attribution: str = "layer"
    layer_metrics: bool = True
    user: Mapping[str, UserMetric]


class Sweep:
    """Measures layers of a network, one after the other, in the order of the graph.

    Args:
        network: the network.
        simulator: runs it.
        groups: the layers, or groups of them, in graph order.
        options: what is measured.
        data: what user functions get.
    """

    def __init__(
        self,
        network: CalibratedNetwork,
        simulator: Simulator,
        groups: Sequence[Layer],
        options: SweepOptions,
        data: Sequence[Any],
    ) -> None:
        self.network = network
        self.simulator = simulator
        self.groups = groups
        self.options = options
        self.data = data
        self.floats = simulator.program(Assignment(rest=FP32))
        simulator.anchor(self.floats)
        self.expected = simulator.outputs(self.floats)
        self._lowered: dict[str, Program] = {}
        self._places = self.places(network, groups)

    # -- assignments ------------------------------------------------------------------------------

    def assignment(self, group: Layer, precision: str, direction: str | None = None) -> Assignment:
        """What is run for a group of layers."""
        direction = self.options.direction if direction is None else direction
        members = group.members or (group.name,)
        if direction == ONE:
            return Assignment(dict.fromkeys(members, precision), FP32)
        return Assignment(dict.fromkeys(members, FP32), precision)

    def baseline(self, precision: str) -> Measurement:
        """All layers lowered: what all-but-one starts from, and what a report compares with."""
        return self._measured(self._anchored(precision), None)

    def float_metrics(self) -> dict[str, float]:
        """What user functions give for the float network."""
        return self._user(self.floats)

    @torch.no_grad()
    def _user(self, program: Program) -> dict[str, float]:
        return {n: float(f(program.module, self.data)) for n, f in self.options.user.items()}

    def _anchored(self, precision: str) -> Program:
        if precision not in self._lowered:
            program = self.simulator.program(Assignment(rest=precision))
            self.simulator.anchor(program)
            self._lowered[precision] = program
        return self._lowered[precision]

    # -- measuring --------------------------------------------------------------------------------

    def measure(self, group: Layer) -> LayerResult:
        """Everything that the options ask for about one group of layers."""
        measurements = {}
        for precision in self.options.precisions:
            if self.options.direction == ALL_BUT_ONE:
                self._anchored(precision)
            measurements[precision] = self._measured(self._program(group, precision), group)
        parts, model_parts = self._parts(group)
        return replace(
            self.described(group),
            measurements=measurements,
            parts=parts,
            model_parts=model_parts,
        )

    def _program(self, group: Layer, precision: str) -> Program:
        """What is run for a group of layers."""
        if self.options.direction == ONE:
            return self.simulator.alone(group.members or (group.name,), precision)
        return self.simulator.program(self.assignment(group, precision))

    def described(self, group: Layer) -> LayerResult:
        """A group of layers, nothing measured but its ranges."""
        ranges = ranges_of(self.network, self._first(group), self.options.precisions[0])
        return LayerResult(layer=group, place=self._places[group.name], ranges=ranges)

    def cure(self, result: LayerResult) -> LayerResult:
        """Try every cure on a layer, which alone is lowered: what each leaves of the damage."""
        members = result.layer.members or (result.layer.name,)
        known = {tuple(self._qconfigs(members, INT8))}
        found = {}
        if self.options.direction == ALL_BUT_ONE:
            alone = self.assignment(result.layer, INT8, ONE)
            found[UNCURED] = self.of_assignment(alone)
        for cure in CURES:
            qconfigs = tuple(self._qconfigs(members, cure.name))
            if qconfigs in known:
                continue  # it changes nothing here, or what another one has changed
            known.add(qconfigs)
            assignment = Assignment(dict.fromkeys(members, cure.name), FP32)
            found[cure.name] = self._measured(self.simulator.program(assignment), None)
        return replace(result, cures=found)

    def of_assignment(self, assignment: Assignment) -> Measurement:
        """The metrics of any assignment, at the model's output."""
        return self._measured(self.simulator.program(assignment), None)

    def cumulative(self, order: Iterable[str]) -> list[tuple[str, Measurement]]:
        """Lower more and more layers: the metrics after each.

        Args:
            order: names of groups, most robust first.
        """
        by_name = {group.name: group for group in self.groups}
        lowered: dict[str, str] = {}
        found = []
        for name in order:
            members = by_name[name].members or (name,)
            lowered.update(dict.fromkeys(members, self.options.precisions[0]))
            found.append((name, self.of_assignment(Assignment(dict(lowered), FP32))))
        return found

    def _qconfigs(self, members: Iterable[str], precision: str) -> list[Any]:
        return [
            self.network.qconfig_of(head, precision)
            for name in members
            for head in self.network.layer(name).heads
        ]

    def _measured(self, program: Program, group: Layer | None) -> Measurement:
        at_layer = group is not None and self.options.layer_metrics
        output = program.output.name
        layer_names = ["", ""]
        if at_layer and group is not None:
            layer_names = [leaving(program, group), leaving(self.floats, group)]
        whole, local = MetricSums(), MetricSums(classes=False)
        names = [output, *(name for name in layer_names[:1] if name)]
        self.simulator.store.start_round()
        for batch, expected in enumerate(self.expected):
            found = self.simulator.run(program, batch, names)
            whole.add(expected, found[output])
            if at_layer:
                theirs = self.simulator.run(self.floats, batch, layer_names[1:])
                local.add(theirs[layer_names[1]], found[layer_names[0]])
        program.constants.clear()
        return Measurement(
            output=whole.result(),
            layer=local.result() if at_layer else None,
            user=self._user(program),
        )

    def _parts(self, group: Layer) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
        lowered = self.network.lowers(self._first(group).name, self.options.precisions[0])
        if not self.options.attribution or group.members or not lowered:
            return {}, {}
        local, whole = {}, {}
        assignment = self.assignment(group, self.options.precisions[0], ONE)
        for name, parts in [*((p, (p,)) for p in PARTS), (ACTIVATION, ("input", "output"))]:
            if name == "weight" and not group.has_weight:
                continue
            program = self.simulator.program(assignment, parts=parts)
            local[name] = self._at_layer(program, group)
            if self.options.attribution == "model":
                whole[name] = self._measured(program, None).output
        return local, whole

    def _at_layer(self, program: Program, group: Layer) -> Metrics:
        mine, theirs = leaving(program, group), leaving(self.floats, group)
        sums = MetricSums(classes=False)
        self.simulator.store.start_round()
        for batch in range(len(self.expected)):
            found = self.simulator.run(program, batch, [mine])[mine]
            sums.add(self.simulator.run(self.floats, batch, [theirs])[theirs], found)
        program.constants.clear()
        return sums.result()

    def _first(self, group: Layer) -> Layer:
        return self.network.layer(group.members[0]) if group.members else group

    @staticmethod
    def places(network: CalibratedNetwork, groups: Sequence[Layer]) -> dict[str, str]:
        """Group -> whether the first, or the last, layer with a weight is in it."""
        weighted = [layer.name for layer in network.layers if layer.has_weight]
        found = {}
        for group in groups:
            names = group.members or (group.name,)
            first, last = weighted[:1], weighted[-1:]
            place = FIRST if set(first) & set(names) else ""
            found[group.name] = place or (LAST if set(last) & set(names) else "")
        return found
