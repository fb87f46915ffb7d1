"""Qconfigs that are quick to compute; inputs beyond the calibration's make kernels saturate."""

from __future__ import annotations

import torch

from fxquant.observers import MinMaxObserver, PerChannelMinMaxObserver
from fxquant.qconfig import QConfig

PER_CHANNEL = QConfig(
    activation=MinMaxObserver.with_args(dtype=torch.quint8),
    weight=PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    ),
)
PER_TENSOR = QConfig(
    activation=PER_CHANNEL.activation,
    weight=MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
)
