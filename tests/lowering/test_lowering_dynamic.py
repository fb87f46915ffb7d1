"""Float activations around integer weights: dynamic linears and recurrent modules, tables."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fxquant import recurrent
from fxquant.artifact import load, save
from fxquant.errors import ConfigWarning
from fxquant.explain import explain
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observers import MinMaxObserver, PlaceholderObserver
from fxquant.operators import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC
from fxquant.parity import parity
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    default_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    per_channel_dynamic_qconfig,
)
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from fxquant.specs import QuantSpec, choose_dynamic_qparams
from fxquant.targets.x86 import X86

DYNAMIC = {
    "int8": default_dynamic_qconfig,
    "int8-per-channel": per_channel_dynamic_qconfig,
    "float16": float16_dynamic_qconfig,
}


def converted(
    model: nn.Module, mapping: Any, *inputs: Any
) -> tuple[QuantGraphModule, QuantGraphModule, QuantGraphModule]:
    """Prepared (equal to the model), reference and int8, without calibration or warnings."""
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        prepared = prepare_fx(model, mapping, inputs)
        assert_equal(prepared(*inputs), model(*inputs), 0)
        return prepared, convert_to_reference_fx(prepared), convert_fx(prepared)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value if item is not None for t in flat(item)]


def assert_equal(given: Any, wanted: Any, tolerance: float) -> None:
    pairs = list(zip(flat(given), flat(wanted), strict=True))
    assert pairs
    for left, right in pairs:
        assert left.shape == right.shape
        assert float((left - right).abs().max()) <= tolerance


def kernels(gm: QuantGraphModule) -> list[str]:
    return [record_of(n).kernel for n in gm.graph.nodes if record_of(n).kernel]


# -- parameters chosen at run time ----------------------------------------------------------------


@pytest.mark.parametrize("quant_max", [255, 127])
def test_run_time_parameters_are_those_of_the_kernels(quant_max: int) -> None:
    """Also for zeros, denormals, ranges on one side of zero, and scales below the smallest."""
    spec = QuantSpec(
        dtype=torch.uint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=quant_max
    )
    for number in range(2000):
        x = torch.randn(7) * 10 ** float(torch.rand(()) * 14 - 10)
        x = [x, x.abs(), -x.abs(), 0 * x, 1e-30 * x, x + 3 * x.abs().max()][number % 6]
        scale, zero_point = torch._choose_qparams_per_tensor(x, quant_max == 127)
        found = choose_dynamic_qparams(x, spec)
        assert float(found.scale) == float(torch.tensor(float(scale)))
        assert int(found.zero_point) == int(zero_point)


def test_an_empty_tensor_has_run_time_parameters_too() -> None:
    integers, scale, zero_point = QUANTIZE_DYNAMIC(torch.empty(0, 3), 0, 255, torch.uint8)
    assert integers.shape == (0, 3)
    assert (float(scale), int(zero_point)) == (pytest.approx(0.1), 0)


# -- linear ---------------------------------------------------------------------------------------


class Linears(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(23, 37, bias=bias)
        self.second = nn.Linear(37, 11)
        self.weight = nn.Parameter(torch.randn(5, 11))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.second(F.relu(self.first(x))))
        return F.linear(y, self.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qconfig", DYNAMIC)
def test_linear(qconfig: str, *, bias: bool) -> None:
    x = torch.randn(4, 3, 23) + 0.3
    prepared, reference, int8 = converted(Linears(bias=bias), {"": DYNAMIC[qconfig]}, x)
    half = "_fp16 -> fp32" if qconfig == "float16" else " (fbgemm) -> fp32"
    names = ["linear_relu_dynamic", "linear_dynamic", "linear_dynamic"]
    assert kernels(int8) == [f"quantized::{name}{half}" for name in names]
    assert not any(n.target in (QUANTIZE, DEQUANTIZE) for n in int8.graph.nodes)
    for given in (x, 7 * torch.randn(2, 23), torch.zeros(1, 23), torch.randn(0, 23)):
        if given.numel():
            report = parity(prepared, int8, (given,))
            assert report.ok, f"\n{report}"
            assert len(report.rows) == 3
            with torch.no_grad():
                wanted = reference(given)
                assert_equal(int8(given), wanted, 1e-5 * float(wanted.abs().max()))
        else:
            assert int8(given).shape == (0, 5)


def test_the_reference_of_a_dynamic_linear_is_its_definition() -> None:
    """Integers computed here from nothing but the weight, the input and the two formulas."""
    model, x = nn.Linear(6, 4).eval(), torch.randn(5, 6)
    prepared = prepare_fx(model, {"": default_dynamic_qconfig}, (x,))
    reference, int8 = convert_to_reference_fx(prepared), convert_fx(prepared)
    scale, zero_point = torch._choose_qparams_per_tensor(x, False)
    q = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
    # default_weight_observer: symmetric over 255 steps, per tensor.
    weight_scale = model.weight.detach().abs().max() / 127.5
    w = torch.clamp(torch.round(model.weight.detach() / weight_scale), -128, 127)
    wanted = ((q - zero_point) @ w.T) * scale * weight_scale + model.bias.detach()
    with torch.no_grad():
        assert_equal(reference(x), wanted, 1e-5)
        assert_equal(int8(x), wanted, 1e-5)


def test_prepared_graphs_have_one_placeholder_for_a_shared_input() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x)

    prepared, *_ = converted(Shared(), {"": default_dynamic_qconfig}, torch.randn(3, 6))
    watched = [m for m in prepared.modules() if isinstance(m, PlaceholderObserver)]
    assert len(watched) == 1


def test_static_and_dynamic_in_one_model() -> None:
    """Each reads what it wants: in parallel at an input, one behind the other at an int8 value."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)  # static
            return self.b(y) + self.c(y) + self.d(x)  # static, dynamic, dynamic

    model, x = Mixed().eval(), torch.randn(16, 8)
    names = [("c", default_dynamic_qconfig), ("d", default_dynamic_qconfig)]
    prepared = prepare_fx(model, {"": default_qconfig, "module_name": names}, (x,))
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
    reference, int8 = convert_to_reference_fx(prepared), convert_fx(prepared)
    assert sum(n.target is QUANTIZE_DYNAMIC for n in reference.graph.nodes) == 2
    found = [k for k in kernels(int8) if k.startswith("quantized::linear")]
    assert sum("dynamic" in k for k in found) == 2
    report = parity(prepared, int8, (x,))
    assert report.ok, f"\n{report}"
    with torch.no_grad():
        assert_equal(int8(x), reference(x), 1e-4)
        assert_equal(int8(x), model(x), 0.1)


def test_a_static_reader_of_a_dynamic_linear_gets_integers() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).eval(), torch.randn(16, 8)
    mapping = {"": default_qconfig, "module_name": [("0", default_dynamic_qconfig)]}
    prepared = prepare_fx(model, mapping, (x,))
    prepared(x)
    int8 = convert_fx(prepared)
    assert kernels(int8)[:2] == [
        "quantized::linear_dynamic (fbgemm) -> fp32",
        "aten::quantize_per_tensor",
    ]
    assert parity(prepared, int8, (x,)).ok


def test_vectors_stay_in_float() -> None:
    _, _, int8 = converted(nn.Linear(6, 4), {"": default_dynamic_qconfig}, torch.randn(6))
    assert not any("dynamic" in k for k in kernels(int8))
    assert "take no vectors" in explain(int8).to_markdown()


def test_what_has_no_dynamic_kernel_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    with pytest.warns(ConfigWarning, match="'_0' .conv2d. stays in FP32: dynamic activation uint8"):
        prepare_fx(model.eval(), {"": default_dynamic_qconfig}, (torch.randn(1, 3, 4, 4),))


@pytest.mark.parametrize(
    ("activation", "weight", "told"),
    [
        ({"dtype": torch.qint8}, {}, "activation int8 affine -128..127 dynamic"),
        ({"dtype": torch.quint8, "quant_min": 0, "quant_max": 15}, {}, "0..255 and 0..127"),
        ({"dtype": torch.float16}, {}, "float16 dynamic with weight int8"),
        ({"dtype": torch.quint8}, {"dtype": torch.quint8}, "weight uint8"),
    ],
)
def test_dynamic_specs_that_no_kernel_has_are_refused_by_name(
    activation: dict[str, Any], weight: dict[str, Any], told: str
) -> None:
    wish = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric} | weight
    qconfig = QConfig(
        activation=PlaceholderObserver.with_args(is_dynamic=True, **activation),
        weight=MinMaxObserver.with_args(**wish),
    )
    with pytest.warns(ConfigWarning) as caught:
        prepare_fx(nn.Linear(4, 4).eval(), {"": qconfig}, (torch.randn(2, 4),))
    assert told in str(caught[0].message)


# -- recurrent modules ----------------------------------------------------------------------------


class Alone(nn.Module):
    """A module called with whatever is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any, hx: Any = None) -> Any:
        return self.module(x, hx)


LAYERED: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(15, 19, 2),
    "lstm-bidirectional": lambda: nn.LSTM(15, 19, 2, bidirectional=True, batch_first=True),
    "lstm-no-bias": lambda: nn.LSTM(15, 19, bias=False),
    "lstm-dropout": lambda: nn.LSTM(15, 19, 2, dropout=0.5),
    "gru": lambda: nn.GRU(15, 19, 2),
    "gru-bidirectional": lambda: nn.GRU(15, 19, bidirectional=True, batch_first=True),
    "gru-no-bias": lambda: nn.GRU(15, 19, bias=False),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm_cell": lambda: nn.LSTMCell(15, 19),
    "gru_cell": lambda: nn.GRUCell(15, 19),
    "gru_cell-no-bias": lambda: nn.GRUCell(15, 19, bias=False),
    "rnn_cell": lambda: nn.RNNCell(15, 19),
    "rnn_cell-relu": lambda: nn.RNNCell(15, 19, nonlinearity="relu"),
}
TABLES = {"embedding", "embedding_bag"}


def test_every_row_of_float_activations_has_a_case() -> None:
    rows = {kind for kind, row in X86.rows.items() if not row.static}
    tried = {name.split("-")[0] for name in (*LAYERED, *CELLS)}
    assert rows == tried | TABLES


def sequence() -> PackedSequence:
    return pack_sequence(
        [torch.randn(2, 15), torch.randn(6, 15), torch.randn(3, 15)], enforce_sorted=False
    )


@pytest.mark.parametrize("form", ["batch", "single", "packed", "state"])
@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("qconfig", DYNAMIC)
def test_layers(qconfig: str, name: str, form: str) -> None:
    module = LAYERED[name]()
    states = [torch.randn((1 + module.bidirectional) * module.num_layers, 4, 19) for _ in "hc"]  # type: ignore[operator]  # attributes of nn.RNNBase
    inputs: dict[str, tuple[Any, ...]] = {
        "batch": (torch.randn(4, 4, 15),),
        "single": (torch.randn(5, 15),),
        "packed": (sequence(),),
        "state": (torch.randn(4, 4, 15), tuple(states) if "lstm" in name else states[0]),
    }
    prepared, reference, int8 = converted(Alone(module), {"": DYNAMIC[qconfig]}, *inputs[form])
    how = "float16" if qconfig == "float16" else "fbgemm"
    assert kernels(int8) == [f"aten::quantized_{name.split('-')[0]} ({how}) -> fp32"]
    with torch.no_grad():
        assert_equal(int8(*inputs[form]), reference(*inputs[form]), 2e-6)
        assert_equal(int8(*inputs[form]), module(*inputs[form]), 0.05)
    if form != "packed":
        report = parity(prepared, int8, inputs[form])
        assert report.ok, f"\n{report}"
        assert len(report.rows) == 1


@pytest.mark.parametrize("form", ["batch", "single", "state"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("qconfig", DYNAMIC)
def test_cells(qconfig: str, name: str, form: str) -> None:
    module = CELLS[name]()
    states = [torch.randn(4, 19) for _ in "hc"]
    inputs: dict[str, tuple[Any, ...]] = {
        "batch": (torch.randn(4, 15),),
        "single": (torch.randn(15),),
        "state": (torch.randn(4, 15), tuple(states) if "lstm" in name else states[0]),
    }
    prepared, reference, int8 = converted(Alone(module), {"": DYNAMIC[qconfig]}, *inputs[form])
    assert len(kernels(int8)) == 1
    with torch.no_grad():
        assert_equal(int8(*inputs[form]), reference(*inputs[form]), 2e-6)
        assert_equal(int8(*inputs[form]), module(*inputs[form]), 0.1)
    assert parity(prepared, int8, inputs[form]).ok


def weights_of(module: nn.Module) -> list[Any]:
    return [getattr(module, name, None) for name in recurrent.weight_names(module)]


@pytest.mark.parametrize("name", [*LAYERED, *CELLS])
def test_the_definitions_are_those_of_the_float_modules(name: str) -> None:
    """Without quantization, on every form of input, to the last bit or two."""
    module = (LAYERED | CELLS)[name]().eval()
    function = getattr(recurrent, name.split("-")[0])
    given = [torch.randn(15), torch.randn(4, 15)] if name in CELLS else [
        torch.randn(4, 4, 15), torch.randn(5, 15), sequence()
    ]  # fmt: skip
    options: dict[str, Any] = {}
    if name in LAYERED:
        options = {"bidirectional": module.bidirectional, "batch_first": module.batch_first}
    elif name.startswith("rnn"):
        options = {"nonlinearity": module.nonlinearity}
    with torch.no_grad():
        for x in given:
            assert_equal(function(x, None, weights_of(module), **options), module(x), 5e-7)


def test_a_wrong_recurrent_kernel_fails_parity() -> None:
    """Parity of recurrent modules has a bound; swapped gates are far beyond it."""
    module, x = nn.LSTM(15, 19), torch.randn(4, 3, 15)
    prepared, _, int8 = converted(Alone(module), {"": default_dynamic_qconfig}, x)
    wrong = copy.deepcopy(int8)
    name = next(n for n, _ in wrong.named_buffers() if n.endswith("weight_hh_l0"))
    setattr(wrong, name, getattr(wrong, name).roll(19, 0))
    wrong.rebuild_packed()
    setattr(wrong, name, getattr(int8, name))
    assert parity(prepared, int8, (x,)).ok
    assert not parity(prepared, wrong, (x,)).ok


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (nn.LSTM(15, 19, proj_size=7), "has no projections"),
        (nn.RNN(15, 19), "has no int8 kernel for it"),
    ],
)
def test_recurrent_modules_without_kernel_stay_as_they_are(module: nn.Module, told: str) -> None:
    x = torch.randn(4, 3, 15)
    _, _, int8 = converted(Alone(module), {"": default_dynamic_qconfig}, x)
    assert told in str(explain(int8).to_markdown())
    with torch.no_grad():
        assert_equal(int8(x), module(x), 0)


def test_static_qconfigs_leave_recurrent_modules_in_float_with_the_cure() -> None:
    _, _, int8 = converted(Alone(nn.LSTM(15, 19)), {"": default_qconfig}, torch.randn(4, 3, 15))
    assert "takes a dynamic qconfig such as default_dynamic_qconfig" in explain(int8).to_markdown()


# -- tables ---------------------------------------------------------------------------------------

WEIGHT_ONLY = {8: float_qparams_weight_only_qconfig, 4: float_qparams_weight_only_qconfig_4bit}


@pytest.mark.parametrize("features", [8, 7])
@pytest.mark.parametrize("bits", WEIGHT_ONLY)
def test_embedding(bits: int, features: int) -> None:
    model = nn.Embedding(30, features, padding_idx=2)
    tokens = torch.randint(0, 30, (3, 5))
    prepared, reference, int8 = converted(model, {"": WEIGHT_ONLY[bits]}, tokens)
    assert kernels(int8) == [f"quantized::embedding_{'byte' if bits == 8 else '4bit'} -> fp32"]
    rows = model.weight.detach()
    step = float((rows.amax(1) - rows.amin(1)).max()) / (2**bits - 1)
    for given in (tokens, tokens[0], tokens[0, 0], tokens[None], tokens.int(), tokens[:0]):
        with torch.no_grad():
            found = int8(given)
            assert found.shape == (*given.shape, features)
            if given.numel():
                assert_equal(found, reference(given), 1e-6)
                assert_equal(found, model(given), 0.51 * step)
    assert parity(prepared, int8, (tokens,)).ok
    with pytest.raises(RuntimeError, match="out of bounds"):
        int8(torch.tensor([30]))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("bits", WEIGHT_ONLY)
def test_embedding_bag(bits: int, mode: str) -> None:
    """PyTorch's kernel sums whatever the mode is; the mean is taken behind it."""

    class Bag(nn.Module):
        def __init__(self, *, include_last_offset: bool) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(30, 8, mode=mode, include_last_offset=include_last_offset)

        def forward(self, tokens: Tensor, offsets: Tensor | None = None) -> Tensor:
            return self.bag(tokens, offsets)

    tokens = torch.randint(0, 30, (9,))
    cases: list[tuple[bool, tuple[Any, ...]]] = [
        (False, (tokens, torch.tensor([0, 2, 2, 5]))),
        (True, (tokens, torch.tensor([0, 2, 2, 5, 9]))),
        (False, (tokens.reshape(3, 3),)),
    ]
    for last, inputs in cases:
        model = Bag(include_last_offset=last)
        _, reference, int8 = converted(model, {"": WEIGHT_ONLY[bits]}, *inputs)
        name = "embedding_bag_" + ("byte" if bits == 8 else "4bit")
        assert kernels(int8) == [f"quantized::{name} -> fp32"]
        with torch.no_grad():
            assert_equal(int8(*inputs), reference(*inputs), 4e-6)


def test_per_sample_weights_of_a_bag() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(30, 8, mode="sum")

        def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
            return self.bag(tokens, per_sample_weights=weights)

    inputs = torch.randint(0, 30, (3, 4)), torch.rand(3, 4)
    _, reference, int8 = converted(Bag(), {"": float_qparams_weight_only_qconfig}, *inputs)
    assert len(kernels(int8)) == 1
    with torch.no_grad():
        assert_equal(int8(*inputs), reference(*inputs), 4e-6)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (nn.EmbeddingBag(30, 8, mode="max"), "gives sums of bags only"),
        (nn.EmbeddingBag(30, 8, mode="sum", padding_idx=1), "counts rows at padding_idx"),
        (nn.Embedding(30, 8, max_norm=1.0), "max_norm writes the table"),
    ],
)
def test_look_ups_that_the_kernels_do_not_do_stay_in_float(module: nn.Module, told: str) -> None:
    prepared = prepare_fx(
        copy.deepcopy(module).eval(),
        {"": float_qparams_weight_only_qconfig},
        (torch.randint(0, 30, (3, 4)),),
    )
    assert told in explain(convert_fx(prepared)).to_markdown()


def test_a_table_under_another_qconfig_stays_in_float_with_the_cure() -> None:
    _, _, int8 = converted(nn.Embedding(9, 4), {"": default_qconfig}, torch.randint(0, 9, (3,)))
    assert "float_qparams_weight_only_qconfig" in explain(int8).to_markdown()


def test_a_static_op_behind_a_table_observes_its_float_output() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 4)).eval()
    tokens = torch.randint(0, 30, (6, 5))
    mapping = {"": default_qconfig, "module_name": [("0", float_qparams_weight_only_qconfig)]}
    prepared = prepare_fx(model, mapping, (tokens,))
    prepared(tokens)
    int8 = convert_fx(prepared)
    assert kernels(int8)[0] == "quantized::embedding_byte -> fp32"
    assert any(k.startswith("onednn::qlinear_pointwise") for k in kernels(int8))
    assert parity(prepared, int8, (tokens,)).ok


# -- the result lives -----------------------------------------------------------------------------


def test_copies_files_and_loaded_states_of_all_kernels(tmp_path: Any) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 8)
            self.lstm = nn.LSTM(8, 12, bidirectional=True)
            self.gru = nn.GRU(24, 8)
            self.cell = nn.LSTMCell(8, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            y, _ = self.lstm(self.table(tokens))
            y, h = self.gru(y)
            return self.head(self.cell(h[0])[0])

    tokens = torch.randint(0, 30, (5, 4))
    for qconfig in DYNAMIC.values():
        types = [(nn.Embedding, float_qparams_weight_only_qconfig)]
        mapping = {"": qconfig, "object_type": types}
        _, _, int8 = converted(Tagger(), mapping, tokens)
        _, _, other = converted(Tagger(), mapping, tokens)
        expected = int8(tokens)
        assert not torch.equal(other(tokens), expected)
        other.load_state_dict(int8.state_dict())
        save(int8, tmp_path / "tagger.fxq")
        for made in (copy.deepcopy(int8), load(tmp_path / "tagger.fxq"), other):
            assert torch.equal(made(tokens), expected)
