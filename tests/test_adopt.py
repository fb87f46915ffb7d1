"""Models that torch.ao prepared: fxquant.compat converts them as torch.ao converts a copy."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantizable as nnqa
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
import torch.ao.quantization.backend_config as tq_backend
import torch.ao.quantization.fx._equalize as tq_equalize
import torch.ao.quantization.fx.custom_config as tq_custom
import torch.ao.quantization.quantize_fx as tq_fx
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant import compat
from fxquant.errors import ConfigError, NotPreparedError
from fxquant.graph_module import Stage
from fxquant.qat_modules import QatConvBn2d, QatLinear, QatLinearBn1d
from tests.conformance.harness import assert_same, equal, quiet, run, steps, weights
from tests.conformance.models import lively
from tests.conformance.test_nested import Custom, ObservedCustom, QuantizedCustom

pytestmark = pytest.mark.peer


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.b = nn.Parameter(torch.randn(4))
        self.lin = nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b) + self.relu(self.lin(x))


class Net(nn.Module):
    """Folded and fused modules, shared observers, functions in submodules, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.sub = Sub()
        self.other = Sub()
        self.sig = nn.Sigmoid()
        lively(self).eval()

    def forward(self, x):  # fx cannot pickle annotations that are strings
        x = self.relu(self.bn(self.conv(x)))
        x = torch.flatten(self.pool(x), 1)
        x = torch.cat([self.sub(x), self.sub(x), self.other(x)], 1)
        return self.sig(x).chunk(2, 1)[0]


class Trained(nn.Module):
    """What trains fused, and what trains alone."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.r = nn.ReLU()
        self.c2 = nn.Conv2d(3, 3, 1)
        self.c3 = nn.Conv2d(3, 3, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(3)
        self.l = nn.Linear(8, 4)
        self.lb = nn.Linear(4, 4)
        self.b1 = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r(self.bn(self.c(x)))
        x = self.bn3(self.c3(self.c2(x))) + x
        x = F.relu(self.l(x))
        return self.b1(self.lb(x[:, 0, 0]))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.gru = nn.GRU(4, 4)
        self.cell = nn.LSTMCell(4, 4)
        self.out = nn.Linear(4, 4)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.gru(self.lstm(x)[0])
        return self.out(x), self.cell(x[0])[0]


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.bag = nn.EmbeddingBag(10, 4, include_last_offset=True, mode="sum")
        self.out = nn.Linear(4, 4)

    def forward(self, i: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(self.table(i)), self.bag(i, offsets)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bn(self.a(x)))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 3, 1)
        self.part = Part()
        lively(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.c(x))


class Followed(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(3, 3, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(super().forward(x))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
STEPS = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(5))
INDICES = (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4]))
QCONFIG = tq.QConfig(
    tq.MinMaxObserver.with_args(reduce_range=True), tq.default_per_channel_weight_observer
)
"""Finds its range at once, where the default searches a histogram for half a second."""


def mapping() -> tq.QConfigMapping:
    return tq.QConfigMapping().set_global(QCONFIG)


def defaults(backend: str = "x86") -> tq.QConfigMapping:
    """The default rules for types, which fix parameters and share observers."""
    return tq.get_default_qconfig_mapping(backend).set_global(QCONFIG)


def prepared(
    model: nn.Module, inputs: tuple[Any, ...], given: Any, *, trains: int = 0, **options: Any
) -> fx.GraphModule:
    """By torch.ao, calibrated or trained for some steps."""
    with quiet():
        call = tq_fx.prepare_qat_fx if trains else tq_fx.prepare_fx
        made = call(model, given, inputs, **options)
        if not trains:
            made(*inputs)
            return made
        made.train()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        for _ in range(trains):
            result = made(*inputs)
            optimizer.zero_grad()
            (result if isinstance(result, Tensor) else result[0]).square().mean().backward()
            optimizer.step()
        return made.eval()


def integers(model: fx.GraphModule) -> set[tuple[int, ...]]:
    stored = [w for w in model.state_dict().values() if isinstance(w, Tensor) and w.dim() > 1]
    whole = [w for w in stored if not w.dtype.is_floating_point and not w.is_quantized]
    return {tuple(w.to(torch.int64).flatten().tolist()) for w in (*whole, *weights(model))}


def compare(
    model: fx.GraphModule,
    inputs: tuple[Any, ...],
    *,
    reference: bool = True,
    integral: bool = True,
    **options: Any,
) -> None:
    """Convert with both: the same steps, integers and outputs, and ``model`` as it was.

    Args:
        model: by torch.ao.
        inputs: for the outputs.
        reference: also as reference models.
        integral: also the integers of weights, which torch.ao shows of linears and convolutions.
        options: for convert.
    """
    state = copy.deepcopy(model.state_dict())
    with quiet():
        theirs = tq_fx.convert_fx(copy.deepcopy(model), **options)
    ours = compat.convert_fx(model, **options)
    equal(steps(ours), steps(theirs), "steps of the lowered graph")
    if integral:
        assert integers(ours) == integers(theirs)
    assert_same(run(ours, inputs), run(theirs, inputs))
    if reference:
        with quiet():
            expected = tq_fx.convert_to_reference_fx(copy.deepcopy(model), **options)
        found = compat.convert_to_reference_fx(model, **options)
        equal(steps(found), steps(expected), "steps of the reference graph")
        assert_same(run(found, inputs), run(expected, inputs))
    assert_same(dict(model.state_dict()), dict(state))


STATIC: dict[str, Callable[[], Any]] = {
    "x86": lambda: defaults("x86"),
    "per tensor": lambda: defaults("qnnpack").set_global(tq.default_qconfig),
    "names": lambda: mapping().set_module_name("sub", None).set_object_type(nn.Sigmoid, None),
    "dict": lambda: {"": QCONFIG, "module_name": [("sub.lin", None)]},
    "regex": lambda: tq.QConfigMapping().set_module_name_regex("(other|conv).*", QCONFIG),
    "order": lambda: mapping().set_module_name_object_type_order("other", F.linear, 0, None),
    "dynamic": lambda: tq.QConfigMapping().set_global(tq.default_dynamic_qconfig),
    "mixed": lambda: mapping().set_module_name("sub", tq.default_dynamic_qconfig),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", STATIC)
def test_calibrated_models(name: str) -> None:
    model = prepared(Net(), (X,), STATIC[name]())
    compare(model, (X,))
    adopted = compat.adopt_fx(model)
    assert adopted.state.stage is Stage.PREPARED
    assert_same(run(adopted, (X,)), run(model, (X,)))


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_histograms(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    compare(prepared(model, (X,), tq.get_default_qconfig_mapping(backend)), (X,))


@pytest.mark.parametrize("qconfig", ["default_dynamic_qconfig", "float16_dynamic_qconfig"])
def test_recurrent_modules(qconfig: str) -> None:
    """Their reference form is not compared: docs/differences.md."""
    given = tq.QConfigMapping().set_global(getattr(tq, qconfig))
    compare(prepared(Sequences(), (STEPS,), given), (STEPS,), reference=False, integral=False)


def test_tables() -> None:
    given = mapping().set_object_type(nn.Embedding, tq.float_qparams_weight_only_qconfig)
    given.set_object_type(nn.EmbeddingBag, tq.float_qparams_weight_only_qconfig_4bit)
    compare(prepared(Tables().eval(), INDICES, given), INDICES, reference=False, integral=False)


def test_what_was_fused_before() -> None:
    model = nn.Sequential(nni.ConvReLU2d(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1)).eval()
    compare(prepared(model, (X,), defaults()), (X,))


def test_the_observers_of_the_model_are_kept() -> None:
    """Their statistics decide, also where others would have been found."""
    model = prepared(Net(), (X,), mapping())
    model(4 * X)
    model.activation_post_process_1.max_val.fill_(123.0)
    adopted = compat.adopt_fx(model)
    for name, theirs in model.named_children():
        if name.startswith("activation_post_process_"):
            ours = adopted.get_submodule(name)
            assert type(ours) is type(theirs)
            assert ours is not theirs
            assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert adopted.activation_post_process_1 is adopted.activation_post_process_2
    compare(model, (X,))


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_trained_models(version: int, training: bool) -> None:
    given = tq.get_default_qat_qconfig_mapping("x86", version)
    model = prepared(Trained().train(training), (X,), given, trains=3)
    compare(model, (X,))
    adopted = compat.adopt_fx(model)
    kinds = (QatConvBn2d, QatConvBn2d, QatLinearBn1d, QatLinear)
    found = [type(adopted.get_submodule(name)) for name in ("c", "c3", "lb", "l")]
    assert found == list(kinds)
    trained = model.c.weight_fake_quant
    assert_same(dict(adopted.c.weight_fake_quant.state_dict()), dict(trained.state_dict()))


def test_trained_in_part_and_not_at_all() -> None:
    given = tq.get_default_qat_qconfig_mapping("qnnpack")
    given.set_module_name("c", None).set_module_name("lb", None)
    compare(prepared(Trained(), (X,), given, trains=2), (X,))
    compare(prepared(Trained(), (X,), {}, trains=2), (X,))


def test_trained_functions_and_calls_of_one_module() -> None:
    model = Net().train()
    compare(prepared(model, (X,), tq.get_default_qat_qconfig_mapping(), trains=2), (X,))


def test_trained_tables_and_dynamic_linears() -> None:
    given = tq.get_default_qat_qconfig_mapping()
    for kind in (nn.Embedding, nn.EmbeddingBag):
        given.set_object_type(kind, tq.default_embedding_qat_qconfig)
    compare(prepared(Tables(), INDICES, given, trains=2), INDICES, integral=False)
    given = tq.QConfigMapping().set_global(tq.default_dynamic_qat_qconfig)
    linears = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    compare(prepared(linears, (ROWS,), given, trains=2), (ROWS,))


def test_a_frozen_batch_norm_and_a_fixed_weight_stay_so() -> None:
    model = prepared(Trained(), (X,), tq.get_default_qat_qconfig_mapping(), trains=2)
    model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
    model.apply(tq.disable_observer)
    with torch.no_grad():
        model.c2.weight.mul_(3)  # the range of the weight is from before
    assert compat.adopt_fx(model).c.freeze_bn
    compare(model, (X,))


# -- parts and boundaries -------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [0, 2])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("quantized", [(), (0,)])
def test_standalone_modules(quantized: tuple[int, ...], by_name: bool, trains: int) -> None:
    own = tq_custom.PrepareCustomConfig().set_input_quantized_indexes(list(quantized))
    own.set_output_quantized_indexes(list(quantized))
    custom = tq_custom.PrepareCustomConfig()
    if by_name:
        custom.set_standalone_module_name("part", None, (X,), own, None)
    else:
        custom.set_standalone_module_class(Part, None, (X,), own, None)
    given = tq.get_default_qat_qconfig_mapping() if trains else defaults()
    model = Whole().train(trains > 0)
    made = prepared(model, (X,), given, trains=trains, prepare_custom_config=custom)
    compare(made, (X,), integral=False)


@pytest.mark.parametrize(("inputs", "outputs"), [([0], []), ([], [0]), ([0], [0])])
def test_quantized_inputs_and_results(inputs: list[int], outputs: list[int]) -> None:
    custom = tq_custom.PrepareCustomConfig().set_input_quantized_indexes(inputs)
    custom.set_output_quantized_indexes(outputs)
    given = defaults()
    model = prepared(Whole(), (X,), given, prepare_custom_config=custom)
    x = torch.quantize_per_tensor(X, 0.1, 64, torch.quint8) if inputs else X
    with quiet():
        theirs = tq_fx.convert_fx(copy.deepcopy(model))
    ours = compat.convert_fx(model)
    found, expected = ours(x), theirs(x)
    assert found.is_quantized == expected.is_quantized == bool(outputs)
    assert_same(found.dequantize(), expected.dequantize())
    equal(steps(ours), steps(theirs), "steps")


def test_preserved_attributes() -> None:
    float_model: Any = Whole()
    float_model.classes = ["cat", "dog"]
    custom = tq_custom.PrepareCustomConfig().set_preserved_attributes(["classes"])
    given = defaults()
    model = prepared(float_model, (X,), given, prepare_custom_config=custom)
    keep = tq_custom.ConvertCustomConfig().set_preserved_attributes(["classes"])
    assert compat.convert_fx(model, keep).classes == ["cat", "dog"]
    assert not hasattr(compat.convert_fx(model), "classes")
    assert compat.adopt_fx(model).classes == ["cat", "dog"]


def test_custom_modules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Custom(), nn.Conv2d(3, 3, 1)).eval()
    custom = tq_custom.PrepareCustomConfig()
    custom.set_float_to_observed_mapping(Custom, ObservedCustom)
    convert = tq_custom.ConvertCustomConfig()
    convert.set_observed_to_quantized_mapping(ObservedCustom, QuantizedCustom)
    made = prepared(model, (X,), defaults(), prepare_custom_config=custom)
    found = compat.convert_fx(made, convert)
    with quiet():
        expected = tq_fx.convert_fx(copy.deepcopy(made), convert)
    assert_same(run(found, (X,)), run(expected, (X,)))
    equal(steps(found), steps(expected), "steps")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.out = nn.Linear(4, 4)
        self.eval()

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x, (h, c))
        return self.out(y), h, c


def test_an_lstm_as_a_custom_module() -> None:
    inputs = (STEPS, torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    custom = tq_custom.PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, nnqa.LSTM)
    convert = tq_custom.ConvertCustomConfig()
    convert.set_observed_to_quantized_mapping(nnqa.LSTM, nnq.LSTM)
    given = defaults()
    made = prepared(Recurrent(), inputs, given, prepare_custom_config=custom)
    found = compat.convert_fx(made, convert)
    with quiet():
        expected = tq_fx.convert_fx(copy.deepcopy(made), convert)
    assert_same(run(found, inputs), run(expected, inputs))
    equal(steps(found), steps(expected), "steps")


@pytest.mark.parametrize("name", ["qnnpack", "fbgemm", "tensorrt"])
def test_the_backend_config_is_given_again(name: str) -> None:
    """torch.ao does not note it either."""
    backend = getattr(tq_backend, f"get_{name}_backend_config")()
    given = tq.get_default_qconfig_mapping("qnnpack").set_global(tq.default_qconfig)
    with quiet():
        made = prepared(Net(), (X,), given, backend_config=backend)
        theirs = tq_fx.convert_fx(copy.deepcopy(made), backend_config=backend)
        ours = compat.convert_fx(made, backend_config=backend)
    assert_same(run(ours, (X,)), run(theirs, (X,)))
    assert steps(ours)[0] == steps(theirs)[0]


def test_convert_switches_ops_off() -> None:
    made = prepared(Net(), (X,), mapping())
    off = mapping().set_module_name("other", None)
    compare(made, (X,), qconfig_mapping=off)
    assert compat.convert_fx(made, qconfig_mapping=off).code != compat.convert_fx(made).code


@pytest.mark.parametrize("more", ["", "part", "part.a", "a"])
def test_convert_s_mapping_is_not_for_standalone_modules(more: str) -> None:
    """It is for the model around them: what is in them stays quantized, however it is named.

    torch.ao rounds the result of an op that is switched off where what reads it has a qconfig,
    though nothing reads integers.
    """
    custom = tq_custom.PrepareCustomConfig()
    custom.set_standalone_module_name("part", None, (X,), None, None)
    model = Whole()
    made = prepared(model, (X,), mapping(), prepare_custom_config=custom)
    off = mapping().set_object_type(nn.Conv2d, None)
    if more:
        off.set_module_name(more, None)
    with quiet():
        theirs = tq_fx.convert_fx(copy.deepcopy(made), qconfig_mapping=off)
        own = compat.prepare_fx(model, mapping(), (X,), custom)
        run(own, (X,))
    rounded = (0, 0, 0) if more == "part" else (1, 0, 1)
    assert (steps(theirs), steps(theirs.part)) == (rounded, (1, 0, 1))
    for source in (made, own):
        ours = compat.convert_fx(source, qconfig_mapping=off)
        assert_same(run(ours, (X,)), run(theirs, (X,)))
        assert (steps(ours), steps(ours.part)) == ((0, 0, 0), (1, 0, 1))


# -- files ----------------------------------------------------------------------------------------


OURS = compat.QConfigMapping().set_global(
    compat.QConfig(
        compat.MinMaxObserver.with_args(reduce_range=True),
        compat.default_per_channel_weight_observer,
    )
)


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, y):  # fx cannot pickle annotations that are strings
        return torch.clamp(F.relu(F.linear(x, self.w) + y), 0.1, 1.0) * y


def test_a_pickled_model_needs_its_mapping() -> None:
    """torch.ao cannot convert it at all: pickling loses its notes, and renames nodes."""
    given = defaults()
    made = prepared(Functions().eval(), (ROWS, ROWS), given)
    with quiet():
        expected = tq_fx.convert_fx(copy.deepcopy(made))
    loaded = through_a_file(made)
    with pytest.raises(AssertionError, match="must be produced by prepare_fx"):
        tq_fx.convert_fx(copy.deepcopy(loaded))
    with pytest.raises(NotPreparedError, match=r"pickling loses.*qconfig_mapping"):
        compat.convert_fx(loaded)
    for mapping_given in (given, through_a_file(given), OURS):
        ours = compat.convert_fx(loaded, qconfig_mapping=mapping_given)
        assert_same(run(ours, (ROWS, ROWS)), run(expected, (ROWS, ROWS)))
        equal(steps(ours), steps(expected), "steps")


@pytest.mark.parametrize("trains", [0, 2])
def test_a_pickled_model_of_modules(trains: int) -> None:
    """Plain pickle refuses what torch.ao ties to modules; without that it passes."""
    qat = tq.get_default_qat_qconfig_mapping()
    given = qat if trains else defaults()
    made = prepared(Net().train(trains > 0), (X,), given, trains=trains)
    with quiet():
        expected = tq_fx.convert_fx(copy.deepcopy(made))
    for module in made.modules():
        vars(module).pop("qconfig", None)
    made.meta.clear()
    ours = compat.convert_fx(through_a_file(made), qconfig_mapping=given)
    assert_same(run(ours, (X,)), run(expected, (X,)))


def test_what_was_adopted_can_be_saved_and_calibrated() -> None:
    made = prepared(Net(), (X,), defaults())
    adopted = through_a_file(compat.adopt_fx(made))
    with quiet():
        made(3 * X)
        fxquant.calibrate(adopted, [(3 * X,)])
        assert_same(run(compat.convert_fx(adopted), (X,)), run(compat.convert_fx(made), (X,)))


@pytest.mark.parametrize("call", ["prepare_fx", "prepare_qat_fx"])
def test_mappings_that_torch_pickled(call: str) -> None:
    qat = call == "prepare_qat_fx"
    given = tq.get_default_qat_qconfig_mapping() if qat else defaults()
    loaded = through_a_file(given.set_module_name("sub", None))
    with quiet():
        for prepare in (getattr(compat, call), getattr(fxquant, call)):
            one, other = prepare(Net(), given, (X,)), prepare(Net(), loaded, (X,))
            assert one.code == other.code
            assert "activation_post_process_3" in one.code


# -- what is refused ------------------------------------------------------------------------------


def test_fxquant_points_to_compat() -> None:
    made = prepared(Net(), (X,), defaults())
    for name in ("convert_fx", "convert_to_reference_fx"):
        with pytest.raises(NotPreparedError, match=rf"fxquant\.compat\.{name} takes it over"):
            getattr(fxquant, name)(made)


def test_equalization_is_refused() -> None:
    made = prepared(
        Net(),
        (X,),
        defaults(),
        _equalization_config={"": tq_equalize.default_equalization_qconfig},
    )
    with pytest.raises(ConfigError, match=r"_equalization_config.*Prepare the float model"):
        compat.convert_fx(made)


def test_observers_elsewhere_are_named() -> None:
    """A user's own observer, one that is gone, another's mapping."""
    made = prepared(Net(), (X,), defaults())
    gone = copy.deepcopy(made)
    node = next(n for n in gone.graph.nodes if n.target == "activation_post_process_6")
    node.replace_all_uses_with(node.all_input_nodes[0])
    gone.graph.erase_node(node)
    gone.recompile()
    with pytest.raises(NotPreparedError, match=r"would observe 'sub_lin'.*Prepare the float"):
        compat.convert_fx(gone)
    other = copy.deepcopy(made)
    other.activation_post_process_6 = tq.MinMaxObserver(dtype=torch.qint8)
    with pytest.raises(NotPreparedError, match=r"'sub_lin' looks for .*int8"):
        compat.convert_fx(other)
    apart = copy.deepcopy(made)
    apart.activation_post_process_2 = copy.deepcopy(apart.activation_post_process_2)
    with pytest.raises(NotPreparedError, match="'pool' shares its module"):
        compat.convert_fx(apart)
    backend = tq_backend.get_tensorrt_backend_config()
    with quiet():
        foreign = prepared(Net(), (X,), mapping(), backend_config=backend)
    with pytest.raises(NotPreparedError, match="pass it to convert too"):
        compat.convert_fx(foreign)


def test_a_standalone_module_before_a_quantized_op_is_refused() -> None:
    """torch.ao leaves the op behind it in floating point, without an observer between the two."""
    custom = tq_custom.PrepareCustomConfig()
    custom.set_standalone_module_name("part", None, (X,), None, None)
    given = defaults()
    made = prepared(Followed(), (X,), given, prepare_custom_config=custom)
    with pytest.raises(NotPreparedError, match="would observe 'part'"):
        compat.convert_fx(made)


def test_modules_that_train_in_their_own_way_are_refused() -> None:
    made = prepared(nn.Sequential(nn.Linear(4, 4)), (ROWS,), tq.get_default_qat_qconfig_mapping())
    module = type("Odd", (nn.Module,), {"__module__": "torch.ao.nn.odd", "forward": None})()
    module.weight_fake_quant = None
    setattr(made, "0", module)
    with pytest.raises(NotPreparedError, match=r"'0' \(Odd\) trains in a way"):
        compat.convert_fx(made)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("call", ["prepare_fx", "prepare_qat_fx"])
@pytest.mark.parametrize("library", [compat, fxquant])
def test_modules_of_torch_that_train_are_no_float_modules(
    library: Any, call: str, fused: bool
) -> None:
    """torch.ao prepares around them; here one says what to do."""
    made = prepared(Trained(), (X,), tq.get_default_qat_qconfig_mapping(), trains=1)
    module = made.c if fused else made.c2
    with pytest.raises(ConfigError, match=rf"{type(module).__name__}.*to_float\(\)"), quiet():
        getattr(library, call)(nn.Sequential(module).eval(), {"": QCONFIG}, (X,))
    with quiet():
        getattr(library, call)(nn.Sequential(module.to_float()).eval(), {"": QCONFIG}, (X,))


def test_only_what_torch_prepared_is_adopted() -> None:
    with quiet():
        own = compat.prepare_fx(nn.Sequential(nn.Linear(4, 4)).eval(), OURS, (ROWS,))
    for model in (Net(), fx.symbolic_trace(Net()), own):
        with pytest.raises(NotPreparedError, match="was not prepared by torch"):
            compat.adopt_fx(model)


def test_a_model_that_torch_converted_is_no_prepared_one() -> None:
    with quiet():
        made = tq_fx.convert_fx(prepared(Net(), (X,), defaults()))
    with pytest.raises(NotPreparedError, match="can be converted once"):
        compat.convert_fx(made)
    with pytest.raises(NotPreparedError, match=re.escape("was not made by fxquant")):
        fxquant.convert_fx(made)


def test_nothing_is_said_where_nothing_is_amiss() -> None:
    made = prepared(Net(), (X,), defaults())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.convert_fx(made)
