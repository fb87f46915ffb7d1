"""The simulator against models that were prepared, calibrated and converted one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Gates, SmallResNet, batches, made
from torch import nn

from fxquant import (
    HistogramObserver,
    MinMaxObserver,
    PercentileRule,
    QConfig,
    bfloat16_static_qconfig,
    calibrate,
    convert_to_reference_fx,
    default_dynamic_qconfig,
    default_per_channel_weight_observer,
    default_weight_observer,
    get_default_qconfig,
    prepare_fx,
)
from fxquant.errors import CalibrationError, ConfigError
from fxquant.sensitivity.network import FP32, INT8, Assignment, CalibratedNetwork
from fxquant.sensitivity.simulator import Simulator

PRECISIONS = {
    "per-tensor": QConfig(
        activation=HistogramObserver.with_args(dtype=torch.uint8),
        weight=default_weight_observer,
    ),
    "percentile": QConfig(
        activation=HistogramObserver.with_args(dtype=torch.uint8, rule=PercentileRule(0.999)),
        weight=default_per_channel_weight_observer,
    ),
    "min-max": QConfig(
        activation=MinMaxObserver.with_args(dtype=torch.uint8),
        weight=default_per_channel_weight_observer,
    ),
    "bf16": bfloat16_static_qconfig,
    "dynamic": default_dynamic_qconfig,
}


def network(kind: type[nn.Module]) -> CalibratedNetwork:
    return CalibratedNetwork(
        made(kind), batches(kind), get_default_qconfig("x86"), precisions=PRECISIONS
    )


def prepared_one_by_one(
    kind: type[nn.Module], found: CalibratedNetwork, assignment: Assignment
) -> list[torch.Tensor]:
    """What the reference model computes that the user gets with the mapping."""
    data = batches(kind)
    prepared = prepare_fx(made(kind), found.mapping(assignment), (data[0],))
    calibrate(prepared, data)
    reference = convert_to_reference_fx(prepared)
    with torch.no_grad():
        return [reference(batch) for batch in data]


def assignments(found: CalibratedNetwork) -> list[Assignment]:
    names = [layer.name for layer in found.layers]
    made_up = [Assignment({}, INT8), Assignment({}, FP32)]
    made_up += [Assignment({name: INT8}, FP32) for name in names]
    made_up += [Assignment({name: FP32}, INT8) for name in names]
    made_up += [Assignment(dict.fromkeys(names[::2], FP32), INT8)]
    kinds = list(PRECISIONS)
    mixed = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    return [*made_up, Assignment(mixed, INT8), Assignment(mixed, FP32)]


@pytest.mark.parametrize("kind", [SmallResNet, Gates])
@pytest.mark.filterwarnings("ignore::fxquant.FxQuantWarning")  # of mixtures that add nothing
def test_the_same_numbers_as_models_prepared_with_the_mapping(kind: type[nn.Module]) -> None:
    found = network(kind)
    simulator = Simulator(found)
    simulator.anchor(simulator.program(Assignment(rest=FP32)))
    simulator.anchor(simulator.program(Assignment(rest=INT8)))
    for assignment in assignments(found):
        program = simulator.program(assignment)
        expected = prepared_one_by_one(kind, found, assignment)
        for mine, whole, theirs in zip(
            simulator.outputs(program),
            simulator.outputs(program, reuse=False),
            expected,
            strict=True,
        ):
            assert torch.equal(mine, theirs), assignment
            assert torch.equal(whole, theirs), assignment
    assert simulator.counts.hits > 0


def test_lowering_everything_changes_the_numbers() -> None:
    found = network(SmallResNet)
    simulator = Simulator(found)
    floats = simulator.outputs(simulator.program(Assignment(rest=FP32)))
    model = made(SmallResNet)
    for name in [*(layer.name for layer in found.layers), None]:
        assignment = Assignment(rest=INT8) if name is None else Assignment({name: INT8}, FP32)
        lowered = simulator.outputs(simulator.program(assignment))
        assert not torch.equal(lowered[0], floats[0]), name
    with torch.no_grad():
        assert torch.allclose(floats[0], model(batches(SmallResNet)[0]), atol=1e-5)


def test_layers_hold_what_runs_in_their_kernels() -> None:
    found = network(SmallResNet)
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == [
        *("stem.0", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2"),
        *("tail.0", "tail.2", "fc"),
    ]
    assert layers["block1.conv2"].pattern == "conv2d-add-relu"
    assert layers["block1.conv2"].nodes == ("block1_conv2", "add", "block1_relu_1")
    assert layers["block1.conv2"].last == "block1_relu_1"
    assert layers["tail.0"].kind == "depthwise conv2d"
    assert layers["tail.2"].kind == "pointwise conv2d"
    assert layers["block2.conv1"].block == "block2"
    assert layers["stem.0"].block == "stem.0"
    # of one example input of four pictures: 4 * 8 * 16 * 16 outputs of 3 * 9 products each
    assert layers["stem.0"].macs == 4 * 8 * 16 * 16 * 27
    assert layers["stem.0"].parameters == 8 * 3 * 9 + 8
    assert layers["fc"].position == len(layers) - 1


def test_prefixes_are_computed_once() -> None:
    found = network(SmallResNet)
    simulator = Simulator(found)
    floats = simulator.program(Assignment(rest=FP32))
    simulator.anchor(floats)
    nodes = len([n for n in floats.module.graph.nodes if n.op.startswith("call")])
    simulator.outputs(floats)
    assert simulator.computed == nodes * 3
    last = simulator.program(Assignment({"fc": INT8}, FP32))
    simulator.outputs(last)
    before = simulator.computed
    # again: only the linear and its conversions are left to be computed
    simulator.outputs(simulator.program(Assignment({"fc": INT8}, FP32)))
    fc = [n for n in last.module.graph.nodes if n.op.startswith("call") and "fc" in n.name]
    conversions = [n for n in last.module.graph.nodes if "quantize" in n.name]
    assert simulator.computed - before <= 3 * len({*fc, *conversions})
    before = simulator.computed
    simulator.outputs(floats)  # its outputs are kept
    assert simulator.computed == before


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("budget", [0, 10_000, 60_000])
def test_the_memory_budget_holds_and_changes_no_number(
    budget: int, spill: bool, tmp_path: Path
) -> None:
    found = network(SmallResNet)
    roomy = Simulator(found)
    tight = Simulator(found, memory_budget=budget, spill_directory=tmp_path if spill else None)
    for simulator in (roomy, tight):
        simulator.anchor(simulator.program(Assignment(rest=FP32)))
    for layer in found.layers:
        program = roomy.program(Assignment({layer.name: INT8}, FP32))
        same = tight.program(Assignment({layer.name: INT8}, FP32))
        for mine, theirs in zip(tight.outputs(same), roomy.outputs(program), strict=True):
            assert torch.equal(mine, theirs)
        assert tight.counts.peak_bytes <= budget
    assert roomy.counts.refused == roomy.counts.spilled == 0
    assert roomy.counts.peak_bytes > 60_000
    if spill:
        assert tight.counts.spilled > 0
        assert tight.counts.refused == 0
        assert tight.computed <= roomy.computed
        assert list(tmp_path.iterdir())
        tight.close()
    else:
        assert tight.counts.refused > 0
        assert tight.computed > roomy.computed  # what was forgotten is computed again
    assert not list(tmp_path.iterdir())


def test_parts_of_a_layer_add_up_to_the_layer() -> None:
    found = network(SmallResNet)
    simulator = Simulator(found)
    for name in ("stem.0", "block1.conv2", "tail.0", "fc"):
        alone = Assignment({name: INT8}, FP32)
        whole = simulator.outputs(simulator.program(alone))
        floats = simulator.outputs(simulator.program(Assignment(rest=FP32)))
        both = simulator.program(alone, parts=("weight", "input"))
        assert torch.equal(simulator.outputs(both)[0], whole[0])  # its output nobody reads as int8
        nothing = simulator.program(alone, parts=())
        assert torch.equal(simulator.outputs(nothing)[0], floats[0])
        seen = [whole[0], floats[0]]
        for part in ("weight", "input", "output"):
            found_part = simulator.outputs(simulator.program(alone, parts=(part,)))[0]
            assert not any(torch.equal(found_part, other) for other in seen), (name, part)
            seen.append(found_part)


def test_the_output_part_rounds_to_the_range_of_the_layers_observer() -> None:
    found = network(SmallResNet)
    simulator = Simulator(found)
    layer = found.layer("block1.conv1")
    program = simulator.program(Assignment({layer.name: INT8}, FP32), parts=("output",))
    floats = simulator.program(Assignment(rest=FP32))
    qconfig = found.qconfig_of(layer.heads[0], INT8)
    assert qconfig is not None
    observer = qconfig.activation()
    values = [v[layer.last] for v in simulator.values(floats, [layer.last])]
    for value in values:
        observer(value)
    parameters = observer.qparams()
    scale, zero_point = float(parameters.scale), int(parameters.zero_point)
    reader = next(n for n in program.module.graph.nodes if n.name == "block1_conv2")
    rounded = simulator.values(program, [reader.args[0].name])[0][reader.args[0].name]
    expected = torch.quantize_per_tensor(values[0], scale, zero_point, torch.quint8).dequantize()
    assert torch.equal(rounded, expected)


def test_what_does_not_exist_is_refused() -> None:
    found = network(Gates)
    simulator = Simulator(found)
    with pytest.raises(ConfigError, match="no layer 'outt'; did you mean 'out'"):
        simulator.program(Assignment({"outt": INT8}, FP32))
    with pytest.raises(ConfigError, match="no precision 'int3'"):
        simulator.program(Assignment({"out": "int3"}, FP32))
    with pytest.raises(ConfigError, match="parts of a layer"):
        simulator.program(Assignment({"out": INT8}, FP32), parts=("bias",))
    with pytest.raises(ConfigError, match="memory_budget"):
        Simulator(found, memory_budget=-1)
    with pytest.raises(ConfigError, match="has its meaning"):
        CalibratedNetwork(made(Gates), batches(Gates), precisions={FP32: None})
    with pytest.raises(CalibrationError, match="no batch"):
        CalibratedNetwork(made(Gates), [])


def test_batches_are_fed_as_calibrate_feeds_them() -> None:
    data = batches(Gates)
    plain = CalibratedNetwork(made(Gates), data)
    labelled = CalibratedNetwork(made(Gates), [(x, torch.zeros(4)) for x in data])
    called = CalibratedNetwork(
        made(Gates),
        [{"picture": x} for x in data],
        forward=lambda model, batch: model(batch["picture"]),
    )
    outputs = [
        Simulator(n).outputs(Simulator(n).program(Assignment())) for n in (plain, labelled, called)
    ]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    with pytest.raises(CalibrationError, match="did not call the model"):
        CalibratedNetwork(made(Gates), data, forward=lambda model, batch: None)
