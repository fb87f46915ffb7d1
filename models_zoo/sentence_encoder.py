"""MiniLM: a six-layer BERT that gives a sentence a vector, and how well the vectors compare.

Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
Pre-Trained Transformers"; Reimers and Gurevych 2019, "Sentence-BERT".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.models_zoo.data import data_file, load_npz, load_state
from fxquant.models_zoo.metrics import spearman

_FOLDER = "minilm_l6_stsb"
_WIDTH, _HEADS, _LAYERS, _INNER, _EPS = 384, 12, 6, 1536, 1e-12


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each with a residual and a layer norm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(_WIDTH, _WIDTH) for _ in "qkvo")
        self.ln1 = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.f1 = nn.Linear(_WIDTH, _INNER)
        self.f2 = nn.Linear(_INNER, _WIDTH)
        self.ln2 = nn.LayerNorm(_WIDTH, eps=_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` ``[N, T, 384]``; ``mask`` ``[N, 1, 1, T]`` is added to the scores."""
        heads = (x.shape[0], x.shape[1], _HEADS, _WIDTH // _HEADS)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(_WIDTH // _HEADS) + mask
        mixed = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(x.shape)
        x = self.ln1(x + self.o(mixed))
        return self.ln2(x + self.f2(F.gelu(self.f1(x))))  # type: ignore[no-any-return]  # modules have no types


class SentenceEncoder(nn.Module):
    """Tokens to unit vectors: the mean over the tokens that are no padding.

    Args:
        words: rows of the word table.
        positions: rows of the position table.
    """

    def __init__(self, words: int = 1622, positions: int = 64) -> None:
        super().__init__()
        self.word = nn.Embedding(words, _WIDTH)
        self.pos = nn.Embedding(positions, _WIDTH)
        self.typ = nn.Embedding(2, _WIDTH)
        self.ln = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(_LAYERS))

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """``tokens`` int64 and ``padding`` bool (true where padded), ``[N, T]`` -> ``[N, 384]``."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        first = torch.zeros_like(tokens)
        x = self.ln(self.word(tokens) + self.pos(steps) + self.typ(first))
        mask = padding[:, None, None, :].to(x.dtype) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        keep = (~padding).to(x.dtype).unsqueeze(2)
        return F.normalize((x * keep).sum(1) / keep.sum(1), dim=1)


@dataclass(frozen=True, kw_only=True)
class SentencePairs:
    """Pairs of sentences that people scored for similarity (STS Benchmark), padded.

    Attributes:
        first: tokens and padding of the first sentences, each ``[N, T]``.
        second: likewise of the second ones.
        scores: float32 ``[N]``, 0 (unrelated) to 5 (the same).
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scores: Tensor

    def spearman(self, encoder: nn.Module) -> float:
        """Rank correlation of the scores with the products of the sentences' vectors."""
        with torch.no_grad():
            similarity = (encoder(*self.first) * encoder(*self.second)).sum(1)
        return spearman(similarity, self.scores)


def load_sentence_encoder(data_dir: Path) -> SentenceEncoder:
    """The encoder with the weights of all-MiniLM-L6-v2, in evaluation mode.

    Raises:
        DataNotFoundError: they are not in ``data_dir``.
    """
    model = SentenceEncoder()
    model.load_state_dict(load_state(data_dir, _FOLDER, "state_dict_fp16.pt"))
    return model.eval()


def load_sentence_pairs(data_dir: Path, part: str = "test") -> SentencePairs:
    """375 pairs to judge on (``test``), or 375 others (``dev``).

    Raises:
        DataNotFoundError: they are not in ``data_dir``.
    """
    arrays = load_npz(data_file(data_dir, _FOLDER, f"stsb_{part}.npz"))
    sides = [_padded(arrays[f"ids_{side}"], arrays[f"off_{side}"]) for side in "ab"]
    return SentencePairs(first=sides[0], second=sides[1], scores=torch.from_numpy(arrays["score"]))


def _padded(tokens: object, offsets: object) -> tuple[Tensor, Tensor]:
    flat, ends = torch.as_tensor(tokens).long(), torch.as_tensor(offsets).long()
    rows = [flat[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1])[None] >= lengths[:, None]
