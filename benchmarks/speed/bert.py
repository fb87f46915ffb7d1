"""A transformer encoder of BERT-base's shape, out of plain torch modules.

Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", section 3 and appendix A.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, LAYERS, TOKENS, LENGTH = 768, 12, 3072, 12, 30522, 128
LABELS = 9  # of a token: what CoNLL-2003 has
_DEVIATION = 0.02  # of fresh weights, as BERT's are


class Attention(nn.Module):
    """Self-attention of ``HEADS`` heads, with its projections apart."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, L, WIDTH]`` to the same."""
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)
        made: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return made

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual add and a layer norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, L, WIDTH]`` to the same."""
        x = self.norm1(x + self.attention(x))
        made: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return made


class Bert(nn.Module):
    """Tokens to a label for each: 12 layers of 768, 109 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(512, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, LABELS)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_DEVIATION)
        self.register_buffer("places", torch.arange(LENGTH), persistent=False)
        self.places: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, LENGTH]`` to ``[N, LENGTH, LABELS]``."""
        x = self.norm(self.tokens(tokens) + self.positions(self.places))
        made: Tensor = self.head(self.layers(x))
        return made
