"""Dynamic quantization on a real transformer and a real LSTM, judged by labelled data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.audit import audit
from fxquant.models_zoo.metrics import sqnr_db
from fxquant.models_zoo.sentence_encoder import (
    SentenceEncoder,
    SentencePairs,
    load_sentence_encoder,
    load_sentence_pairs,
)
from fxquant.models_zoo.speaker_encoder import (
    SpeakerEncoder,
    Utterances,
    load_speaker_encoder,
    load_utterances,
)
from fxquant.parity import parity
from fxquant.quantize import quantize_dynamic


@pytest.fixture(scope="module")
def sentences(data_dir: Path) -> tuple[SentenceEncoder, SentencePairs]:
    return load_sentence_encoder(data_dir), load_sentence_pairs(data_dir)


@pytest.fixture(scope="module")
def speech(data_dir: Path) -> tuple[SpeakerEncoder, Utterances]:
    return load_speaker_encoder(data_dir), load_utterances(data_dir)


Sentences = tuple[SentenceEncoder, SentencePairs]
Speech = tuple[SpeakerEncoder, Utterances]


def test_the_sentence_encoder_is_the_one_that_was_measured(sentences: Sentences) -> None:
    assert sentences[1].spearman(sentences[0]) == pytest.approx(0.9079, abs=5e-5)


@pytest.mark.parametrize(
    ("dtype", "spearman", "decibels"),
    [(torch.qint8, 0.9060, 18.0), (torch.float16, 0.9078, 90.0), (torch.quint8, 0.9075, 38.0)],
)
def test_sentence_encoder(
    sentences: Sentences, dtype: torch.dtype, spearman: float, decibels: float
) -> None:
    """torch.ao's dynamic int8, per tensor and of seven bits, gives 0.897 and 9.6 dB."""
    model, pairs = sentences
    example = (pairs.first[0][:2], pairs.first[1][:2])
    made = quantize_dynamic(model, dtype=dtype, example_inputs=example)
    assert pairs.spearman(made) >= spearman
    with torch.no_grad():
        assert sqnr_db(model(*pairs.first), made(*pairs.first)) >= decibels
    report = audit(made, example)
    assert report.confirmed
    if dtype is not torch.quint8:
        left = [row for row in report.fp32 if row.macs]
        assert {row.kind for row in left} == {"matmul"}  # the products inside attention
        rows = report.half if dtype is torch.float16 else report.int8
        macs = sum(row.macs or 0 for row in rows)
        assert macs > 0.98 * (macs + sum(row.macs or 0 for row in left))


def test_every_dynamic_kernel_of_the_sentence_encoder_is_right(sentences: Sentences) -> None:
    from fxquant.qconfig import get_default_dynamic_qconfig
    from fxquant.quantize import DYNAMIC_TYPES  # only here
    from fxquant.quantize_fx import convert_fx, prepare_fx

    model, pairs = sentences
    example = (pairs.first[0][:3], pairs.first[1][:3])
    mapping = dict.fromkeys(DYNAMIC_TYPES[:1], get_default_dynamic_qconfig())
    prepared = prepare_fx(model, mapping, example)
    report = parity(prepared, convert_fx(prepared), example)
    assert len(report.rows) == 36
    assert report.ok, f"\n{report}"


def test_the_speaker_encoder_is_the_one_that_was_measured(speech: Speech) -> None:
    assert speech[1].equal_error_rate(speech[0]) == pytest.approx(3.38, abs=0.01)


def test_speaker_encoder_in_float16(speech: Speech) -> None:
    model, utterances = speech
    made = quantize_dynamic(model, dtype=torch.float16, example_inputs=(utterances.mel[:1],))
    assert utterances.equal_error_rate(made) == pytest.approx(3.38, abs=0.01)


def test_speaker_encoder_with_an_int8_head_only(speech: Speech) -> None:
    """Its mel features span five decades: one scale for all of them costs an int8 LSTM dearly.

    (EER 19 %, torch.ao's 43 %: docs/quantize.md says what to do.)
    """
    model, utterances = speech
    made = quantize_dynamic(model, {"linear"}, example_inputs=(utterances.mel[:1],))
    assert utterances.equal_error_rate(made) == pytest.approx(3.38, abs=0.1)
