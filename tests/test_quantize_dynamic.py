"""quantize_dynamic: which weights become integers, from every form of spec."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import (
    ConfigError,
    ConfigWarning,
    LoweringWarning,
    StrictModeError,
    UnmatchedRuleError,
)
from fxquant.explain import explain
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.op_rows import Runs
from fxquant.qconfig import (
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    get_default_dynamic_qconfig,
    get_default_qconfig,
    per_channel_dynamic_qconfig,
)
from fxquant.quantize import DYNAMIC_TYPES, TABLE_TYPES, quantize_dynamic


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.bag = nn.EmbeddingBag(30, 8, mode="sum")
        self.lstm = nn.LSTM(8, 12)
        self.gru = nn.GRU(12, 12)
        self.cells = nn.ModuleList([nn.LSTMCell(12, 12), nn.GRUCell(12, 12), nn.RNNCell(12, 12)])
        self.head = nn.Linear(12, 6)
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.lstm(self.table(tokens) + self.bag(tokens))
        y, h = self.gru(y)
        h, _ = self.cells[0](h[0])
        h = self.cells[2](self.cells[1](h))
        return F.linear(self.head(h), self.weight)


TOKENS = torch.randint(0, 30, (5, 5), generator=torch.Generator().manual_seed(0))
INT8 = ["lstm", "gru", "cells_0", "cells_1", "cells_2", "head", "linear"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tagger().eval()


def quantized(gm: QuantGraphModule) -> list[str]:
    return [row.name for row in explain(gm).rows if row.runs is Runs.INT8]


def quiet(model: nn.Module, *args: Any, **options: Any) -> QuantGraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantize_dynamic(model, *args, **options)


@pytest.mark.parametrize("examples", [(TOKENS,), None])
def test_all_linears_and_recurrent_modules_by_default(model: nn.Module, examples: Any) -> None:
    made = quiet(model, example_inputs=examples)
    assert quantized(made) == INT8
    with torch.no_grad():
        wanted = model(TOKENS)
        assert float((made(TOKENS) - wanted).norm() / wanted.norm()) < 0.05
    weights = {n: b for n, b in made.named_buffers() if b.dtype is torch.int8}
    assert len(weights) == 5 * 2 + 2
    assert all(int(w.min()) >= -127 for w in weights.values())


def test_float16(model: nn.Module) -> None:
    made = quiet(model, dtype=torch.float16)
    kernels = [record_of(n).kernel for n in made.graph.nodes if record_of(n).kernel]
    assert len(kernels) == len(INT8)
    assert [row.name for row in explain(made).rows if row.runs is Runs.FP16] == INT8
    assert sum(b.dtype is torch.float16 for b in made.buffers()) == 12
    with torch.no_grad():
        assert float((made(TOKENS) - model(TOKENS)).abs().max()) < 1e-3


@pytest.mark.parametrize(("dtype", "bits"), [(torch.quint8, "byte"), (torch.quint4x2, "4bit")])
def test_tables(model: nn.Module, dtype: torch.dtype, bits: str) -> None:
    made = quiet(model, dtype=dtype)
    kernels = [record_of(n).kernel for n in made.graph.nodes if record_of(n).kernel]
    assert kernels == [
        f"quantized::{name}_{bits} -> fp32" for name in ("embedding", "embedding_bag")
    ]


def test_a_set_of_types_functions_and_paths(model: nn.Module) -> None:
    assert quantized(quiet(model, {nn.Linear, "cells.1", nn.LSTM})) == ["lstm", "cells_1", "head"]
    assert quantized(quiet(model, [F.linear])) == ["linear"]


def test_a_dict_of_qconfigs_where_none_is_float_and_names_beat_types(model: nn.Module) -> None:
    spec = {
        nn.Linear: per_channel_dynamic_qconfig,
        nn.Embedding: float_qparams_weight_only_qconfig,
        nn.LSTMCell: default_dynamic_qconfig,
        nn.GRU: float16_dynamic_qconfig,
        "head": None,
    }
    made = quiet(model, spec)
    kernels = [record_of(n).kernel for n in made.graph.nodes if record_of(n).kernel]
    assert kernels == [
        "quantized::embedding_byte -> fp32",
        "aten::quantized_gru (float16) -> fp32",
        "quantized::quantized_lstm_cell_dynamic -> fp32",
    ]


def test_what_is_not_there_is_told(model: nn.Module) -> None:
    with pytest.raises(UnmatchedRuleError, match=r"'heads'.*did you mean 'head'"):
        quantize_dynamic(model, {"heads"})
    with pytest.warns(ConfigWarning, match="object_type rule 'Conv2d' matches no op"):
        quantize_dynamic(model, {nn.Conv2d, nn.Linear})


def test_a_static_qconfig_is_no_dynamic_one(model: nn.Module) -> None:
    with pytest.warns(LoweringWarning, match="quantized nothing"):
        quantize_dynamic(model, {nn.LSTM: get_default_qconfig()})


def test_nothing_to_quantize_is_told() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    with pytest.warns(LoweringWarning, match="the model calls none of GRU, GRUCell, LSTM"):
        quantize_dynamic(plain)
    with pytest.raises(StrictModeError):
        quantize_dynamic(plain, strict=True)


@pytest.mark.parametrize("spec", ["head", 3, nn.Linear])
def test_a_spec_of_another_kind_is_refused(model: nn.Module, spec: Any) -> None:
    with pytest.raises(ConfigError, match="qconfig_spec takes a dict"):
        quantize_dynamic(model, spec)


def test_an_unknown_dtype_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"no default for dtype torch.int32; it takes torch.qint8"
    ):
        quantize_dynamic(model, dtype=torch.int32)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    quantize_dynamic(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_reference_target_emulates(model: nn.Module) -> None:
    made = quiet(model, target="reference")
    lowered = quiet(model)
    rows = {row.name: row.runs for row in explain(made).rows}
    assert all(rows[name] is Runs.EMULATED for name in INT8)
    with torch.no_grad():
        assert float((made(TOKENS) - lowered(TOKENS)).abs().max()) < 1e-5


def test_the_defaults_are_exported_data() -> None:
    assert nn.LSTM in DYNAMIC_TYPES
    assert nn.EmbeddingBag in TABLE_TYPES
    assert get_default_dynamic_qconfig("x86-compat") == default_dynamic_qconfig


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_torch_ao_gives_the_same_numbers_for_the_same_qconfig(
    model: nn.Module, dtype: torch.dtype
) -> None:
    """Its eager quantize_dynamic halves the range of activations; ours does where told to."""
    import torch.ao.quantization as peer  # only here

    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peer.quantize_dynamic(model, dtype=dtype)
            wanted = theirs(TOKENS)
    finally:
        torch.backends.quantized.engine = kept
    from fxquant.observers import PlaceholderObserver, default_weight_observer
    from fxquant.qconfig import QConfig

    halved = PlaceholderObserver.with_args(
        dtype=torch.quint8, quant_min=0, quant_max=127, is_dynamic=True
    )
    qconfig = QConfig(activation=halved, weight=default_weight_observer)
    if dtype is torch.float16:
        qconfig = float16_dynamic_qconfig
    types = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ours = quiet(model, dict.fromkeys(types, qconfig))
    with torch.no_grad():
        assert float((ours(TOKENS) - wanted).abs().max()) < 2e-6
