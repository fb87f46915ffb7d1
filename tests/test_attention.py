"""Attention and transformer layers: taken apart, equal to PyTorch's, their linears in int8."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.attention import merged_mask, spell_out
from fxquant.calibration import calibrate
from fxquant.explain import explain
from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.op_rows import Runs
from fxquant.parity import parity
from fxquant.qconfig import default_dynamic_qconfig
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx

E, H, F = 16, 4, 32
CAUSAL = torch.full((5, 5), -math.inf).triu(1)
HIDDEN = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def _attention(**options: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(E, H, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


class Self(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, **given: Any) -> None:
        super().__init__()
        self.attention, self.given = attention, given

    def forward(self, x: Tensor) -> Any:
        made, weights = self.attention(x, x, x, **self.given)
        return made if weights is None else (made, weights)


class Cross(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, width: int = E) -> None:
        super().__init__()
        self.attention, self.width = attention, width

    def forward(self, x: Tensor) -> Any:
        memory = (2 * x)[..., : self.width]
        return self.attention(x, memory, memory + 1)[0]


BATCHED, SINGLE = (2, 5, E), (5, E)
ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch first": (lambda: Self(_attention(batch_first=True), need_weights=False), BATCHED),
    "sequence first": (lambda: Self(_attention(), need_weights=False), BATCHED),
    "one sequence": (lambda: Self(_attention(), need_weights=False), SINGLE),
    "one sequence, batch first": (lambda: Self(_attention(batch_first=True)), SINGLE),
    "with weights": (lambda: Self(_attention(batch_first=True)), BATCHED),
    "weights of all heads": (lambda: Self(_attention(), average_attn_weights=False), BATCHED),
    "no bias": (lambda: Self(_attention(bias=False, batch_first=True)), BATCHED),
    "causal": (lambda: Self(_attention(batch_first=True), attn_mask=CAUSAL), BATCHED),
    "boolean mask": (lambda: Self(_attention(batch_first=True), attn_mask=CAUSAL < 0), BATCHED),
    "a mask per head": (
        lambda: Self(_attention(batch_first=True), attn_mask=torch.randn(2 * H, 5, 5)),
        BATCHED,
    ),
    "padding": (lambda: Self(_attention(batch_first=True), key_padding_mask=HIDDEN), BATCHED),
    "both masks": (
        lambda: Self(_attention(batch_first=True), attn_mask=CAUSAL < 0, key_padding_mask=HIDDEN),
        BATCHED,
    ),
    "others": (lambda: Cross(_attention(batch_first=True)), BATCHED),
    "others of another width": (
        lambda: Cross(_attention(batch_first=True, kdim=8, vdim=8), 8),
        BATCHED,
    ),
}


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _close(given: Any, wanted: Any) -> None:
    for a, b in zip(_tensors(given), _tensors(wanted), strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    make, shape = ATTENTIONS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    before = copy.deepcopy(model)
    with torch.no_grad():
        prepared = prepare_fx(model, None, (x,))
        _close(prepared(x), before(x))
        calibrate(prepared, [torch.randn(shape) for _ in range(4)])
        int8 = convert_fx(prepared)
        report = parity(convert_to_reference_fx(prepared), int8, (x,))
        given, wanted = _tensors(int8(x))[0], _tensors(before(x))[0]
    assert report.ok, f"\n{report}"
    linears = [row for row in explain(int8).rows if row.kind == "linear"]
    assert [row.runs.value for row in linears] == ["int8"] * len(linears)
    assert len(linears) == (4 if "others" in name else 2)
    assert linears[-1].path == "attention.out_proj"
    assert sum(row.macs or 0 for row in linears) > 0
    noise = (given - wanted).square().mean() / wanted.square().mean()
    assert 10 * math.log10(1 / float(noise)) > 25  # dB
    assert type(model.attention) is nn.MultiheadAttention  # the caller's is as it was


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(E, H, F, batch_first=True),
    "sequence first": lambda: nn.TransformerEncoderLayer(E, H, F),
    "norm first": lambda: nn.TransformerEncoderLayer(
        E, H, F, batch_first=True, norm_first=True, activation="gelu"
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, F, batch_first=True), 2, nn.LayerNorm(E)
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_encoders_bypass_the_fast_path(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(LAYERS[name]()).eval(), torch.randn(BATCHED)
    with torch.no_grad():
        prepared = calibrate(prepare_fx(model, None, (x,)), [x])
        _close(prepared(x), model(x))
        int8 = convert_fx(prepared)
        assert parity(convert_to_reference_fx(prepared), int8, (x,)).ok
    layers = 2 if name == "encoder" else 1
    runs = [row.runs.value for row in explain(int8).rows if row.kind == "linear"]
    assert runs == ["int8"] * (4 * layers)


class Translation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(E, H, 1, 1, F, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, hidden: Tensor) -> Any:
        return self.model(x, y, tgt_mask=mask, src_key_padding_mask=hidden)


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*mismatched")
def test_a_whole_transformer_with_masks() -> None:
    torch.manual_seed(0)
    model = Translation().eval()
    inputs = (torch.randn(BATCHED), torch.randn(BATCHED), CAUSAL, torch.zeros_like(HIDDEN))
    with torch.no_grad():
        prepared = calibrate(prepare_fx(model, None, inputs), [inputs])
        _close(prepared(*inputs), model(*inputs))
        int8 = convert_fx(prepared)
        assert int8(*inputs).shape == BATCHED
        other = (torch.randn(3, 5, E), torch.randn(3, 5, E), CAUSAL, torch.zeros(3, 5) > 0)
        assert int8(*other).shape == (3, 5, E)
    runs = [row.runs.value for row in explain(int8).rows if row.kind == "linear"]
    assert runs == ["int8"] * (4 + 2 + 4 + 2)


def test_dynamic() -> None:
    model, x = nn.Sequential(LAYERS["encoder layer"]()).eval(), torch.randn(BATCHED)
    int8 = convert_fx(prepare_fx(model, {"": default_dynamic_qconfig}, (x,)))
    linears = [row for row in explain(int8).rows if row.kind == "linear"]
    assert ["dynamic" in row.kernel for row in linears] == [True] * 4


def test_rules_name_what_is_inside() -> None:
    model, x = nn.Sequential(LAYERS["encoder layer"]()).eval(), torch.randn(BATCHED)
    prepared = prepare_fx(model, {"": default_dynamic_qconfig, "0.self_attn.out_proj": None}, (x,))
    runs = {row.path: row.runs.value for row in explain(prepared).rows if row.kind == "linear"}
    assert runs == {
        "0.self_attn": "planned",
        "0.self_attn.out_proj": "fp32",
        "0.linear1": "planned",
        "0.linear2": "planned",
    }


def test_listed_modules_stay_whole() -> None:
    model, x = Self(_attention(batch_first=True), need_weights=False).eval(), torch.randn(BATCHED)
    prepared = prepare_fx(model, None, (x,), leaf_modules=["attention"])
    assert type(prepared.get_submodule("attention")) is nn.MultiheadAttention
    assert torch.equal(prepared(x)[0], model(x))


class Twice(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made, weights = super().forward(*args, **kwargs)
        return 2 * made, weights


@pytest.mark.parametrize(
    "make",
    [
        lambda: _attention(add_bias_kv=True),
        lambda: _attention(add_zero_attn=True),
        lambda: Twice(E, H),
        lambda: _attention(dropout=0.5).train(),
    ],
)
def test_others_stay_whole(make: Callable[[], nn.Module]) -> None:
    holder = nn.Sequential(make())
    kind = type(holder[0])
    spell_out(holder)
    assert type(holder[0]) is kind


def test_hooks_keep_a_module_whole() -> None:
    holder = nn.Sequential(_attention())
    holder[0].register_forward_hook(lambda *_: None)
    spell_out(holder)
    assert type(holder[0]) is nn.MultiheadAttention


def test_what_trains_stays_whole_and_says_so() -> None:
    model, x = nn.Sequential(LAYERS["encoder layer"]()), torch.randn(BATCHED)
    rows = explain(prepare_qat_fx(model.eval(), None, (x,))).rows
    assert "taken apart" in rows[0].reason


def test_masks() -> None:
    query = torch.randn(2, H, 5, 4)
    assert merged_mask(None, None, H, query) is None
    padded = merged_mask(None, HIDDEN, H, query)
    assert padded is not None
    assert padded.shape == (2, 1, 1, 5)
    assert torch.equal(padded[:, 0, 0] == -math.inf, HIDDEN)
    both = merged_mask(CAUSAL < 0, HIDDEN, H, query)
    assert both is not None
    assert torch.equal(both[1, 0] == -math.inf, (CAUSAL < 0) | HIDDEN[1])
    alone = merged_mask(None, HIDDEN[1], H, query[0])
    assert alone is not None
    assert alone.shape == (1, 1, 5)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(E, E)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(E, H, F, batch_first=True), 1
        )
        self.attention = _attention(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.first(x))
        return self.attention(y, y, y)[0]


INSIDE: dict[type[nn.Module], set[str]] = {
    nn.MultiheadAttention: {"attention", "encoder.layers.0.self_attn"},
    nn.TransformerEncoderLayer: {"encoder.layers.0"},
    nn.TransformerEncoder: {"encoder"},
}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_rule_for_the_module_governs_what_is_in_it(kind: type[nn.Module]) -> None:
    model, x = Stack().eval(), torch.randn(5, 2, E)
    mapping = get_default_qconfig_mapping("x86").set_object_type(kind, None)
    prepared = calibrate(prepare_fx(model, mapping, (x,)), [x])  # a rule without effect warns
    for row in explain(convert_fx(prepared)).rows:
        inside = any(row.path == p or row.path.startswith(f"{p}.") for p in INSIDE[kind])
        assert not inside or row.runs is Runs.FP32, row
        assert inside or row.kind != "linear" or row.runs is Runs.INT8, row
    nearer = mapping.set_object_type(nn.MultiheadAttention, default_dynamic_qconfig)
    int8 = convert_fx(calibrate(prepare_fx(model, nearer, (x,)), [x]))
    runs = {row.path: row for row in explain(int8).rows}
    assert "dynamic" in runs["encoder.layers.0.self_attn.out_proj"].kernel


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize(
    ("size", "shift"), [((8, 8), 0), ((8, 12), 2), ((7, 10), 2), ((4, 4), 2), ((3, 9), 1)]
)
def test_windows_of_swin(size: tuple[int, int], shift: int) -> None:
    """Padded, shifted, or one window as large as the image."""
    swin = import_torchvision().models.swin_transformer
    torch.manual_seed(0)
    model = nn.Sequential(swin.ShiftedWindowAttention(E, [4, 4], [shift, shift], H)).eval()
    nn.init.normal_(model[0].qkv.bias)
    x = torch.randn(2, *size, E)
    with torch.no_grad():
        prepared = calibrate(prepare_fx(model, None, (x,)), [x])
        _close(prepared(x), model(x))
        int8 = convert_fx(prepared)
        assert int8(x).shape == x.shape
    runs = {row.path: row.runs.value for row in explain(int8).rows if row.kind == "linear"}
    assert runs == {"0.qkv": "int8", "0.proj": "int8"}
    # Each pixel of the padded image is multiplied with the 16 of its window, twice.
    pixels = 2 * (-size[0] // 4 * -4) * (-size[1] // 4 * -4)
    counted = {row.kind: row.macs for row in explain(int8).rows}
    assert counted["window_attention"] == pixels * 16 * E * 2
