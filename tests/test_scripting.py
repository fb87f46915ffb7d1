"""``torch.jit.script`` and ``torch.jit.trace`` of models at every stage, and plain copies by fx.

What is compiled must give the same bits, before and after it went through a file.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from fxquant.engines import engine
from fxquant.errors import LoweringError, ShapeGuardError
from fxquant.fake_quantize import FakeQuantize
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    default_weight_observer,
)
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    default_weight_only_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
)
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx


class Moves(nn.Module):
    """Everything that moves bytes about, and a residual add of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        a, b = y.chunk(2, 1)
        p, q = y.split([3, 5], 1)
        u, v = y.tensor_split(2, 1)
        m, n = y.split(4, 1)
        y = torch.cat([b, a, q, p], 1)[:, ::2] + torch.cat([v, u], 1) + torch.cat([n, m], 1)
        y = F.relu(y + self.gate(x))
        y = y.permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous()
        y = y.unsqueeze(1).squeeze(1).transpose(2, 3)
        y = F.interpolate(y, scale_factor=2, mode="nearest")
        y = F.avg_pool2d(F.max_pool2d(F.pad(y, (1, 1, 1, 1)), 2), 2, padding=1)
        y = y.reshape(y.shape[0], 8, -1).view(y.shape)
        y = torch.stack([y, y], 0)[0][:, :, 1:, ...]
        return torch.flatten(F.relu6(self.d(torch.clamp(y, -0.5, 0.5))), 1)


class Kernels(nn.Module):
    """Kernels with epilogues of every way: saturation, inside the kernel, float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.res = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up3 = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 16)
        self.other = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.hardswish(self.conv(x))
        y = F.relu(self.res(y) + y)
        y = self.up3(F.relu(self.up(y))).mean((2, 3))
        y = self.norm(y)
        z = F.leaky_relu(self.hidden(y), 0.1) * torch.sigmoid(self.other(y))
        return self.head(F.gelu(z)), torch.matmul(z, z.transpose(0, 1))


class Embedded(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(10, features)

    def forward(self, i: Tensor) -> Tensor:
        return self.table(i)


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(10, 6, mode=mode)

    def forward(self, i: Tensor, offsets: Tensor) -> Tensor:
        return self.table(i, offsets)


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 5, **options)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5)
        self.gru = nn.GRU(5, 5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, (last, cell) = self.lstm(x, (h, c))
        z, hidden = self.gru(y, last)
        return z, hidden, cell


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTMCell(4, 5)
        self.b = nn.GRUCell(5, 5)
        self.c = nn.RNNCell(5, 5)
        self.d = nn.RNNCell(5, 5, nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, c = self.a(x)
        h, c = self.a(x, (h, c))
        g = self.b(h, self.b(h))
        return self.d(self.c(g)), c


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


BYTE_TABLE = {"": None, nn.Embedding: float_qparams_weight_only_qconfig}
NIBBLE_TABLE = {"": None, nn.Embedding: float_qparams_weight_only_qconfig_4bit}
BYTE_BAG = {"": None, nn.EmbeddingBag: float_qparams_weight_only_qconfig}
NIBBLE_BAG = {"": None, nn.EmbeddingBag: float_qparams_weight_only_qconfig_4bit}
INDICES = torch.tensor([[0, 3, 9], [1, 1, 5]])
FLAT, OFFSETS = torch.arange(6), torch.tensor([0, 2, 2])
IMAGE, ROWS, STEPS = torch.randn(2, 3, 8, 8), torch.randn(3, 4), torch.randn(3, 2, 4)
STATES = (torch.randn(1, 2, 5), torch.randn(1, 2, 5))

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[Tensor, ...]]] = {
    "moves": (Moves, None, (IMAGE,)),
    "kernels": (Kernels, None, (IMAGE,)),
    "dynamic": (_mlp, default_dynamic_qconfig, (ROWS,)),
    "float16": (_mlp, float16_dynamic_qconfig, (ROWS,)),
    "embedding": (lambda: Embedded(6), BYTE_TABLE, (INDICES,)),
    "embedding-4": (lambda: Embedded(5), NIBBLE_TABLE, (INDICES,)),
    "bag": (lambda: Bag("sum"), BYTE_BAG, (FLAT, OFFSETS)),
    "bag-mean-4": (lambda: Bag("mean"), NIBBLE_BAG, (FLAT, OFFSETS)),
    "lstm": (
        lambda: Sequence(nn.LSTM, num_layers=2, bidirectional=True),
        default_dynamic_qconfig,
        (STEPS,),
    ),
    "lstm-single": (lambda: Sequence(nn.LSTM), default_dynamic_qconfig, (ROWS,)),
    "lstm-float16": (
        lambda: Sequence(nn.LSTM, batch_first=True),
        float16_dynamic_qconfig,
        (STEPS,),
    ),
    "gru": (
        lambda: Sequence(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
        default_dynamic_qconfig,
        (STEPS,),
    ),
    "gru-single": (lambda: Sequence(nn.GRU), default_dynamic_qconfig, (ROWS,)),
    "states": (Stateful, default_dynamic_qconfig, (STEPS, *STATES)),
    "cells": (Cells, default_dynamic_qconfig, (ROWS,)),
    "cell-single": (Cells, default_dynamic_qconfig, (ROWS[0],)),
    "cells-float16": (Cells, float16_dynamic_qconfig, (ROWS,)),
}
RECURRENT = [name for name in MODELS if name.startswith(("lstm", "gru", "states", "cell"))]
FOUR_BITS = ["embedding-4", "bag-mean-4"]


@pytest.fixture(scope="module")
def prepared_models() -> dict[str, QuantGraphModule]:
    made = {}
    for name, (make, qconfig, inputs) in MODELS.items():
        torch.manual_seed(0)
        prepared = prepare_fx(make().eval(), qconfig, inputs)
        with torch.no_grad():
            prepared(*inputs)
        made[name] = prepared
    return made


def _at(prepared: QuantGraphModule, stage: str) -> QuantGraphModule:
    if stage == "prepared":
        return copy.deepcopy(prepared)
    return {"reference": convert_to_reference_fx, "lowered": convert_fx}[stage](prepared)


def _run(model: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return tree_flatten(model(*inputs))[0]


def _equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def _through_a_file(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


STAGES = ("prepared", "reference", "lowered")


# -- script and trace -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MODELS)
def test_scripted(prepared_models: dict[str, QuantGraphModule], name: str, stage: str) -> None:
    inputs = MODELS[name][2]
    model = _at(prepared_models[name], stage)
    wanted = _run(model, inputs)
    if stage == "reference" and name in RECURRENT:
        with pytest.raises(LoweringError, match=r"recurrent\..*TorchScript|torch.jit.script does"):
            torch.jit.script(model)
        return
    scripted = torch.jit.script(model)
    assert _equal(_run(scripted, inputs), wanted)
    assert _equal(_run(_through_a_file(scripted), inputs), wanted)
    assert _equal(_run(model, inputs), wanted)  # the model itself is as it was


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MODELS)
def test_traced(prepared_models: dict[str, QuantGraphModule], name: str, stage: str) -> None:
    inputs = MODELS[name][2]
    model = _at(prepared_models[name], stage)
    wanted = _run(model, inputs)
    if stage == "lowered" and name in FOUR_BITS:
        with pytest.raises(LoweringError, match=r"4-bit table 'table_packed' cannot be traced"):
            torch.jit.trace(model, inputs)
        return
    with warnings.catch_warnings():
        if stage == "prepared":  # observers ask whether what they see is finite
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, inputs)
    assert _equal(_run(traced, inputs), wanted)
    assert _equal(_run(_through_a_file(traced), inputs), wanted)
    assert _equal(_run(model, inputs), wanted)


def test_a_scripted_model_takes_other_sizes(prepared_models: dict[str, QuantGraphModule]) -> None:
    int8 = convert_fx(prepared_models["lstm"])
    scripted = torch.jit.script(int8)
    steps = torch.randn(7, 3, 4)
    assert _equal(_run(scripted, (steps,)), _run(int8, (steps,)))
    int8 = convert_fx(prepared_models["embedding"])
    indices = torch.tensor([4, 2])
    assert _equal(_run(torch.jit.script(int8), (indices,)), _run(int8, (indices,)))


def test_a_scripted_model_refuses_what_the_model_refuses(
    prepared_models: dict[str, QuantGraphModule],
) -> None:
    int8 = convert_fx(prepared_models["kernels"])
    scripted = torch.jit.script(int8)
    for wrong in (IMAGE[0], IMAGE.double()):
        with pytest.raises(ShapeGuardError):
            int8(wrong)
        with pytest.raises(torch.jit.Error, match=r"input x is no float32 tensor of at least 4"):
            scripted(wrong)


def test_packed_weights_are_not_in_the_scripted_state(
    prepared_models: dict[str, QuantGraphModule],
) -> None:
    scripted = torch.jit.script(convert_fx(prepared_models["kernels"]))
    assert [key for key in scripted.state_dict() if "packed" in key] == []
    assert not any(value.is_mkldnn for value in scripted.state_dict().values())


def test_observers_of_a_scripted_model_watch() -> None:
    qconfig = QConfig(MinMaxObserver, default_weight_observer)
    model = prepare_fx(_mlp().eval(), qconfig, (ROWS,), bias_correction=False)
    scripted = torch.jit.script(copy.deepcopy(model))
    _run(model, (ROWS * 3,))
    _run(scripted, (ROWS * 3,))
    mine, theirs = model.state_dict(), scripted.state_dict()
    assert set(mine) == set(theirs)
    watched = [key for key in mine if key.endswith("max_val")]
    assert len(watched) == 2
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(torch.isfinite(theirs[key]).all() for key in watched)


def test_channel_means_of_a_scripted_model_add_up() -> None:
    model = prepare_fx(_mlp().eval(), None, (ROWS,))
    scripted = torch.jit.script(copy.deepcopy(model))
    for batch in (ROWS, ROWS * 2):
        _run(model, (batch,))
        _run(scripted, (batch,))
    mine, theirs = model.state_dict(), scripted.state_dict()
    totals = [key for key in mine if key.endswith((".total", ".count"))]
    assert len(totals) == 4
    assert all(torch.equal(mine[key], theirs[key]) for key in totals)
    assert int(theirs["channel_mean_0.count"]) == 2 * len(ROWS)


def test_fake_quantizers_of_a_scripted_model_are_switched() -> None:
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    model = nn.Sequential(nn.Linear(4, 4), fake())
    scripted = torch.jit.script(model)
    _run(scripted, (ROWS,))
    quantized = _run(scripted, (ROWS,))
    scripted.apply(lambda m: m.disable_fake_quant() if hasattr(m, "disable_fake_quant") else None)
    assert not _equal(_run(scripted, (ROWS,)), quantized)
    assert _equal(_run(scripted, (ROWS,)), [model[0](ROWS).detach()])


def test_what_cannot_be_scripted_is_named(prepared_models: dict[str, QuantGraphModule]) -> None:
    reference = convert_to_reference_fx(prepared_models["lstm"])
    with pytest.raises(LoweringError, match=r"'rnn' runs .*fxquant.recurrent.*torch.jit.trace"):
        torch.jit.script(reference)


def test_a_transposed_convolution_that_would_load_wrongly_is_refused() -> None:
    x = torch.randn(1, 8, 5, 5)
    model = prepare_fx(nn.Sequential(nn.ConvTranspose2d(8, 6, 3)).eval(), None, (x,))
    _run(model, (x,))
    int8 = convert_fx(model)
    wanted = _run(int8, (x,))
    for compile_it in (torch.jit.script, lambda m: torch.jit.trace(m, (x,))):
        with pytest.raises(LoweringError, match=r"from 8 to 6 channels.*= 'fbgemm'"):
            compile_it(int8)
        with engine("fbgemm"):
            loaded = _through_a_file(compile_it(int8))
        assert _equal(_run(loaded, (x,)), wanted)


# -- plain copies by fx ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fused", *STAGES])
@pytest.mark.parametrize("name", ["moves", "kernels", "cells", "embedding-4"])
def test_a_transformer_gives_a_model_that_runs(
    prepared_models: dict[str, QuantGraphModule], name: str, stage: str
) -> None:
    make, _, inputs = MODELS[name]
    model = fuse_fx(make().eval()) if stage == "fused" else _at(prepared_models[name], stage)
    made = fx.Transformer(model).transform()
    assert isinstance(made, fx.GraphModule)
    assert _equal(_run(made, inputs), _run(model, inputs))


@pytest.mark.parametrize("stage", STAGES)
def test_attributes_that_the_user_keeps_are_copied(
    prepared_models: dict[str, QuantGraphModule], stage: str
) -> None:
    model = _at(prepared_models["kernels"], stage)
    kept = {"classes": ["cat", "dog"], "mean": torch.tensor([0.5])}
    model.meta["_user_preserved_attributes"] = kept
    for made in (copy.copy(model), copy.deepcopy(model), _pickled(model)):
        assert made.classes == ["cat", "dog"]
        assert torch.equal(made.mean, kept["mean"])
        assert made.state.stage is Stage(stage)
        assert set(made.meta["_user_preserved_attributes"]) == set(kept)
    deep = copy.deepcopy(model)
    deep.meta["other"] = 1
    assert "other" not in model.meta
    assert deep.classes is not kept["classes"]


def _pickled(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_weight_only_embeddings_need_their_own_qconfig() -> None:
    """Keep the table above honest: an ordinary weight-only qconfig leaves them in float."""
    model = prepare_fx(Embedded(6).eval(), {"": default_weight_only_qconfig}, (INDICES,))
    assert "table_packed" not in convert_fx(model).code
