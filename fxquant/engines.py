"""PyTorch's quantized engines: chosen while packing only, and never left changed.

The engine is a process-global setting seen by all threads, and kernels dispatch on the object that
was packed. So it is set under a lock, around packing, and restored.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Pack for the engine ``name``; the caller's engine is restored on the way out."""
    with _LOCK:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


def available(name: str) -> bool:
    """Whether this build of torch has the engine ``name``."""
    return name in torch.backends.quantized.supported_engines


def consume_deprecation_warning() -> None:
    """Take torch's warn-once about quantized dtypes where fxquant, not the user, causes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8).dequantize()
