"""Models of transformers, small and with random weights: all of their linears run in int8."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.brought import tokens, transformer
from benchmarks.models import WEIGHTED, first, share
from fxquant.artifact import load, save
from fxquant.audit import audit
from fxquant.calibration import calibrate
from fxquant.errors import CaptureWarning
from fxquant.explain import explain
from fxquant.models_zoo.metrics import sqnr_db
from fxquant.op_rows import Runs
from fxquant.parity import parity
from fxquant.quantize import quantize
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None
    or importlib.util.find_spec("torchvision") is None,
    reason="transformers or torchvision is not installed",
)


@dataclass(frozen=True)
class Case:
    """``linears`` is how many there are, with those that are spelt ``addmm``, and convolutions."""

    name: str
    sizes: Mapping[str, Any]
    linears: int

    def inputs(self, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
        if self.name == "ViTForImageClassification":
            return {"pixel_values": torch.randn(batch, 3, 32, 32)}
        if self.name == "WhisperEncoder":
            return {"input_features": torch.randn(batch, 80, 100)}
        found = {name: x.repeat(batch, 1) for name, x in tokens(length, 99).items()}
        if self.name == "BertModel":
            found["attention_mask"] = torch.ones_like(found["input_ids"])
            found["attention_mask"][0, -3:] = 0
        return found


_PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
CASES = {
    case.name: case
    for case in (
        Case("BertModel", {**_PLAIN, "vocab_size": 99}, 13),
        Case(
            "DistilBertModel",
            {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
            12,
        ),
        Case("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, 9),
        Case(
            "ViTForImageClassification",
            {**_PLAIN, "image_size": 32, "patch_size": 8, "num_labels": 30},
            14,
        ),
        Case(
            "WhisperEncoder",
            {
                **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
                **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
                **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
                "d_model": 32,
                "max_source_positions": 50,
                "vocab_size": 99,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
            14,
        ),
    )
}
EXPORTED = r"torch\.export captured the model instead"


def _check(case: Case, model: nn.Module, int8: nn.Module, least: float) -> None:
    """Every linear and convolution in int8, the same kind of result, as good, at other sizes."""
    weighted = [row for row in explain(int8).rows if row.kind in WEIGHTED]
    assert len(weighted) == case.linears
    assert share(weighted) == 100.0
    for row in explain(int8).rows:
        assert row.runs is not Runs.FP32 or row.reason, row
    for inputs in (case.inputs(), case.inputs(3, 7)):
        wanted, found = model(**inputs), int8(**inputs)
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        assert sqnr_db(first(wanted), first(found)) > least
    report = audit(int8, case.inputs())
    assert report.confirmed
    assert sum(report.int8_calls.values()) >= case.linears


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_from_prepare_to_convert(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = transformer(name, **case.sizes).eval()
    fixed = {"use_cache": False} if name == "GPT2LMHeadModel" else {}
    with pytest.warns(CaptureWarning, match=EXPORTED) as told:
        prepared = prepare_fx(model, None, case.inputs(), concrete_args=fixed)
    assert len(told) == 1, [str(w.message) for w in told]
    inputs = case.inputs(3, 9)
    wanted, found = model(**inputs, **fixed), prepared(**inputs)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    calibrate(prepared, [case.inputs() for _ in range(3)], progress=False)
    reference, int8 = convert_to_reference_fx(prepared), convert_fx(prepared)
    result = parity(reference, int8, case.inputs())
    assert result.ok, str(result)
    _check(case, _Fixed(model, fixed), int8, 25.0)
    save(int8, tmp_path / "model.fxq")
    again = load(tmp_path / "model.fxq", classes=[type(wanted)])
    assert torch.equal(first(again(**inputs)), first(int8(**inputs)))


class _Fixed(nn.Module):
    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, **self.fixed)


@pytest.mark.filterwarnings("ignore:2 op.*scaled_dot:fxquant.errors.LoweringWarning")
@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel"])
@torch.no_grad()
def test_in_one_call(name: str) -> None:
    """GPT-2 as it is, with the cache that it returns: an island, every linear of which is int8."""
    case = CASES[name]
    model = transformer(name, **case.sizes).eval()
    with pytest.warns(CaptureWarning):
        int8 = quantize(model, [case.inputs() for _ in range(3)], progress=False)
    if name == "BertModel":
        _check(case, model, int8, 25.0)
        return
    inputs = case.inputs()
    wanted, found = model(**inputs), int8(**inputs)
    assert sqnr_db(wanted.logits, found.logits) > 25.0
    weighted = [row for row in explain(int8).rows if row.kind in WEIGHTED]
    assert (len(weighted), share(weighted)) == (case.linears, 100.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training(name: str) -> None:
    """What is exported does not train, so models that train are islands."""
    case = CASES[name]
    model = transformer(name, **case.sizes).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)  # one for each island
        prepared = prepare_qat_fx(model, None, case.inputs())
    first(prepared(**case.inputs())).pow(2).mean().backward()
    trained = [n for n, p in prepared.named_parameters() if p.dim() > 1 and p.grad is not None]
    assert sum("weight" in name for name in trained) >= case.linears
    with torch.no_grad():
        int8 = convert_fx(prepared.eval())
        weighted = [row for row in explain(int8).rows if row.kind in WEIGHTED]
        assert share(weighted) == 100.0
        assert audit(int8, case.inputs()).confirmed
