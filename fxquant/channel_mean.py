"""The mean of every channel of an activation: what correcting a bias needs to know.

TorchScript reads the annotations, so they are not postponed.
"""

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch._subclasses.fake_tensor import FakeTensor


def channel_sums(values: Tensor) -> Tensor:
    """Sums over all axes but the last, float64 ``[C]``, of values in any memory order.

    In float64, so that the number of threads does not show in the result; a few rows at a time,
    for ``sum(dtype=torch.float64)`` writes a copy of all values first (thirteen times slower).
    """
    channels = values.shape[-1]
    first = values.movedim(-1, 1) if values.dim() > 2 else values
    if values.dim() > 2 and first.is_contiguous():  # [N, C, ...] in memory
        rows = first.reshape(first.shape[0] * channels, -1)
        sums = [part.to(torch.float64).sum(1) for part in _split(rows)]
        return torch.cat(sums).view(-1, channels).sum(0)
    total = torch.zeros(channels, dtype=torch.float64, device=values.device)
    for part in _split(values.reshape(-1, channels)):
        total += part.to(torch.float64).sum(0)
    return total


def _split(rows: Tensor) -> list[Tensor]:
    """Some rows at a time: in float64 they take 1 MiB, which stays in the cache."""
    return list(torch.split(rows, max(1, (1 << 17) // max(1, rows.shape[1]))))


class ChannelMean(nn.Module):
    """Gives its input back and adds up its channels, in float64, in constant memory.

    Buffers: ``total`` (float64, ``[C]``, empty before the first input) and ``count`` (int64): the
    mean is ``total / count``.

    Args:
        axis: the channel axis, from the end, so that it holds with and without a batch axis.
    """

    total: Tensor
    count: Tensor

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("total", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Add ``x`` to the sums."""
        if not is_scripting():  # noqa: SIM102  # TorchScript knows no FakeTensor
            if isinstance(x, FakeTensor) or x.is_meta:
                return x
        if x.numel() == 0:
            return x
        self.observe_channels(x.detach().movedim(self.axis, -1))
        return x

    def observe_channels(self, values: Tensor) -> None:
        """Add values whose channels are the last axis, ``[..., C]``."""
        total = channel_sums(values)
        if self.total.numel() == 0:
            self.total = torch.zeros_like(total)
        self.total += total
        self.count += values.numel() // values.shape[-1]

    @property
    def mean(self) -> Tensor | None:
        """Float64 ``[C]``, or ``None`` before the first input."""
        return self.total / self.count if int(self.count) else None

    def extra_repr(self) -> str:
        """The axis."""
        return f"axis={self.axis}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *rest: object
    ) -> None:
        stored = state_dict.get(f"{prefix}total")
        if stored is not None and stored.shape != self.total.shape:
            self.total = torch.zeros_like(stored)
        super()._load_from_state_dict(state_dict, prefix, *rest)
