"""A three-layer LSTM that gives an utterance a vector, and how well speakers are told apart.

Wan et al. 2018, "Generalized End-to-End Loss for Speaker Verification", with the weights of
Resemblyzer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.models_zoo.data import data_file, load_npz, load_state
from fxquant.models_zoo.metrics import equal_error_rate

_FOLDER = "resemblyzer_lstm"


class SpeakerEncoder(nn.Module):
    """Mel spectrograms ``[N, T, 40]`` to unit vectors ``[N, 256]``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mel: Tensor) -> Tensor:
        """The last state of the top layer, projected."""
        _, (hidden, _) = self.lstm(mel)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


@dataclass(frozen=True, kw_only=True)
class Utterances:
    """Segments of 1.6 s of ten speakers (LibriSpeech).

    Attributes:
        mel: float32 ``[N, 160, 40]``.
        speaker: ``[N]``.
        utterance: ``[N]``.
    """

    mel: Tensor
    speaker: Tensor
    utterance: Tensor

    def equal_error_rate(self, encoder: nn.Module) -> float:
        """In percent, over all pairs of segments of different utterances."""
        with torch.no_grad():
            vectors = encoder(self.mel)
        scores = vectors @ vectors.T
        pairs = torch.ones_like(scores, dtype=torch.bool).triu(1)
        pairs &= self.utterance[:, None] != self.utterance[None]
        same = self.speaker[:, None] == self.speaker[None]
        return equal_error_rate(scores[pairs], same[pairs])


def load_speaker_encoder(data_dir: Path) -> SpeakerEncoder:
    """The encoder with its weights, in evaluation mode.

    Raises:
        DataNotFoundError: they are not in ``data_dir``.
    """
    model = SpeakerEncoder()
    model.load_state_dict(load_state(data_dir, _FOLDER, "state_dict_fp16.pt"))
    return model.eval()


def load_utterances(data_dir: Path) -> Utterances:
    """185 segments of 100 utterances.

    Raises:
        DataNotFoundError: they are not in ``data_dir``.
    """
    arrays = load_npz(data_file(data_dir, _FOLDER, "librispeech_mel.npz"))
    return Utterances(
        mel=torch.from_numpy(arrays["mel"]).float(),
        speaker=torch.from_numpy(arrays["speaker"]),
        utterance=torch.from_numpy(arrays["utterance"]),
    )
