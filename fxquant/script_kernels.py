"""What scripted graphs call: functions and modules that TorchScript compiles."""

# TorchScript reads annotations, so this module does not postpone them.

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    CellParams = Any
    PackedLinear = Any
    PackedTable = Any
else:
    CellParams = torch.classes.rnn.CellParamsBase
    PackedLinear = torch.classes.quantized.LinearPackedParamsBase
    PackedTable = torch.classes.quantized.EmbeddingPackedParamsBase


def expected_shape(zero_point: int, input_shape: list[int]) -> list[int]:
    """The input shape to pack a convolution weight for, in which the batch is not the real one.

    torch remembers the order of a weight by shapes and not by zero point, though a zero point
    other than 0 asks for another order: what is packed first for a shape decides for both. So they
    get batches of different parity. The order does not depend on the batch.
    """
    if len(input_shape) == 0:
        return input_shape
    batch = 2 * input_shape[0] + (1 if zero_point != 0 else 0)
    return [batch] + input_shape[1:]  # noqa: RUF005  # TorchScript unpacks no list


class OneDnnConv(nn.Module):
    """A convolution weight packed for ``onednn::qconv_pointwise``; saved as it is, not packed.

    Args:
        weight: int8 ``[O, I / groups, ...]``.
        scale: of each output channel, or one.
        stride: of the convolution; as are the following.
        zero_point: of its input.
        input_shape: of its input, as it is expected; empty where nobody knows.
    """

    packed: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        zero_point: int,
        input_shape: list[int],
    ) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.stride = list(stride)
        self.padding = list(padding)
        self.dilation = list(dilation)
        self.groups = groups
        self.zero_point = zero_point
        self.input_shape = list(input_shape)
        self.packed = self._pack()

    def _pack(self) -> Tensor:
        shape = expected_shape(self.zero_point, self.input_shape)
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            self.weight,
            self.scale.reshape(-1),
            1.0,
            self.zero_point,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            shape if len(shape) > 0 else None,
        )
        return packed

    def forward(self) -> Tensor:
        """The packed weight."""
        return self.packed

    @torch.jit.export
    def __getstate__(
        self,
    ) -> tuple[Tensor, Tensor, list[int], list[int], list[int], int, int, list[int], bool]:
        return (
            self.weight,
            self.scale,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.zero_point,
            self.input_shape,
            self.training,
        )

    @torch.jit.export
    def __setstate__(
        self,
        state: tuple[Tensor, Tensor, list[int], list[int], list[int], int, int, list[int], bool],
    ) -> None:
        self.weight = state[0]
        self.scale = state[1]
        self.stride = state[2]
        self.padding = state[3]
        self.dilation = state[4]
        self.groups = state[5]
        self.zero_point = state[6]
        self.input_shape = state[7]
        self.training = state[8]
        self.packed = self._pack()


class OneDnnLinear(nn.Module):
    """A weight packed for ``onednn::qlinear_pointwise``; saved as it is, not packed.

    Args:
        weight: int8 ``[O, I]``.
    """

    packed: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.packed = self._pack()

    def _pack(self) -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(self.weight, None)
        return packed

    def forward(self) -> Tensor:
        """The packed weight."""
        return self.packed

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        self.packed = self._pack()


class FourBitTable(nn.Module):
    """A table of 4-bit integers packed for ``quantized::embedding_*``; saved as it is, not packed.

    Args:
        weight: uint8 ``[rows, features]`` of 0..15.
        scale: of each row.
        zero_point: of each row.
        bits: 4.
    """

    packed: PackedTable

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.zero_point = zero_point
        self.bits = bits
        self.packed = pack_table(weight, scale, zero_point, bits)

    def forward(self) -> PackedTable:
        """The packed table."""
        return self.packed

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor, int, bool]:
        return self.weight, self.scale, self.zero_point, self.bits, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor, Tensor, int, bool]) -> None:
        self.weight = state[0]
        self.scale = state[1]
        self.zero_point = state[2]
        self.bits = state[3]
        self.training = state[4]
        self.packed = pack_table(self.weight, self.scale, self.zero_point, self.bits)


def pack_table(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> PackedTable:
    """Pack a table ``[rows, features]`` of 8- or 4-bit integers for ``quantized::embedding_*``."""
    values = (weight.to(torch.float32) - zero_point[:, None]) * scale[:, None]
    dtype = torch.quint8
    if bits == 4:
        dtype = torch.quint4x2
        if values.shape[1] % 2 == 1:  # the packing runs odd rows into each other
            values = torch.nn.functional.pad(values, [0, 1])
    # There is no way to a 4-bit tensor from integers; quantizing their values gives them back.
    table = torch.quantize_per_channel(values, scale, zero_point, 0, dtype)
    return torch.ops.quantized.embedding_bag_prepack(table)


def scalars(values: list[float]) -> list[int | float | complex | None]:
    """Numbers as the type that oneDNN's operators want, which TorchScript does not convert to."""
    made: list[int | float | complex | None] = []
    for value in values:
        made.append(value)
    return made


def bag_result(
    sums: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    mode: str,
    features: int,
) -> Tensor:
    """The sums of a bag kernel, or their means, without the columns that packing added.

    Args:
        sums: ``[bags, at least features]``, of the rows of each bag.
        indices: of the rows: ``[bags, n]``, or ``[n]`` with offsets.
        offsets: where each bag begins.
        include_last_offset: ``offsets`` has the end of the last bag too.
        mode: ``sum`` or ``mean``.
        features: of a row.
    """
    sums = sums[:, :features]
    if mode == "sum":
        return sums
    if offsets is None:
        return sums / max(indices.shape[1], 1)
    ends = offsets
    if not include_last_offset:
        ends = torch.cat([offsets, torch.full_like(offsets[:1], indices.numel())])
    return sums / ends.diff().clamp(min=1).unsqueeze(1)


def scripted_lstm(
    input: Tensor,  # noqa: A002  # as nn.LSTM has it
    hx: tuple[Tensor, Tensor] | None,
    params: list[CellParams],
    hidden_size: int,
    bidirectional: bool,
    batch_first: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``quantized_lstm`` on tensors; a packed sequence is not among them."""
    single = input.dim() == 2
    data = input.unsqueeze(1) if single else input.transpose(0, 1) if batch_first else input
    if hx is None:
        zeros = torch.zeros(
            len(params), data.shape[1], hidden_size, dtype=input.dtype, device=input.device
        )
        states = [zeros, zeros]
    elif single:
        states = [hx[0].unsqueeze(1), hx[1].unsqueeze(1)]
    else:
        states = [hx[0], hx[1]]
    layers = len(params) // (2 if bidirectional else 1)
    output, h, c = torch.quantized_lstm(
        data,
        states,
        params,
        True,
        layers,
        0.0,
        False,
        bidirectional,
        False,
        dtype=weight_dtype,
        use_dynamic=True,
    )
    if single:
        return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
    return output.transpose(0, 1) if batch_first else output, (h, c)


def scripted_gru(
    input: Tensor,  # noqa: A002  # as nn.GRU has it
    hx: Tensor | None,
    params: list[CellParams],
    hidden_size: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """``quantized_gru`` on tensors; a packed sequence is not among them."""
    single = input.dim() == 2
    data = input.unsqueeze(1) if single else input.transpose(0, 1) if batch_first else input
    if hx is None:
        state = torch.zeros(
            len(params), data.shape[1], hidden_size, dtype=input.dtype, device=input.device
        )
    else:
        state = hx.unsqueeze(1) if single else hx
    layers = len(params) // (2 if bidirectional else 1)
    output, last = torch.quantized_gru(
        data, state, params, True, layers, 0.0, False, bidirectional, False
    )
    if single:
        return output.squeeze(1), last.squeeze(1)
    return output.transpose(0, 1) if batch_first else output, last


def scripted_lstm_cell(
    input: Tensor,  # noqa: A002  # as nn.LSTMCell has it
    hx: tuple[Tensor, Tensor] | None,
    w_ih: PackedLinear,
    w_hh: PackedLinear,
    b_ih: Tensor,
    b_hh: Tensor,
    hidden_size: int,
) -> tuple[Tensor, Tensor]:
    """``lstm_cell`` as TorchScript compiles it."""
    single = input.dim() == 1
    rows = input.unsqueeze(0) if single else input
    if hx is None:
        zeros = torch.zeros(rows.shape[0], hidden_size, dtype=input.dtype, device=input.device)
        states = [zeros, zeros]
    elif single:
        states = [hx[0].unsqueeze(0), hx[1].unsqueeze(0)]
    else:
        states = [hx[0], hx[1]]
    h, c = torch.ops.quantized.quantized_lstm_cell_dynamic(rows, states, w_ih, w_hh, b_ih, b_hh)
    return (h.squeeze(0), c.squeeze(0)) if single else (h, c)


def scripted_cell(
    input: Tensor,  # noqa: A002  # as nn.GRUCell has it
    hx: Tensor | None,
    w_ih: PackedLinear,
    w_hh: PackedLinear,
    b_ih: Tensor,
    b_hh: Tensor,
    hidden_size: int,
    kind: str,
) -> Tensor:
    """``gru_cell``, and ``rnn_cell`` of the nonlinearity ``kind``, as TorchScript compiles them."""
    single = input.dim() == 1
    rows = input.unsqueeze(0) if single else input
    if hx is None:
        state = torch.zeros(rows.shape[0], hidden_size, dtype=input.dtype, device=input.device)
    else:
        state = hx.unsqueeze(0) if single else hx
    if kind == "gru":
        last: Tensor = torch.ops.quantized.quantized_gru_cell_dynamic(
            rows, state, w_ih, w_hh, b_ih, b_hh
        )
    elif kind == "tanh":
        last = torch.ops.quantized.quantized_rnn_tanh_cell_dynamic(
            rows, state, w_ih, w_hh, b_ih, b_hh
        )
    else:
        last = torch.ops.quantized.quantized_rnn_relu_cell_dynamic(
            rows, state, w_ih, w_hh, b_ih, b_hh
        )
    return last.squeeze(0) if single else last


def added(a: Tensor, b: Tensor, scale: float, zero_point: int, relu: bool) -> Tensor:
    """``quantized::add`` that does not ask for the engine, in the memory format of ``a``."""
    shape = a.shape
    if a.shape != b.shape:
        shape = torch.empty(a.shape, device="meta").add(torch.empty(b.shape, device="meta")).shape
    memory_format = torch.contiguous_format
    if not a.is_contiguous():
        if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
            memory_format = torch.channels_last
        elif a.dim() == 5 and a.is_contiguous(memory_format=torch.channels_last_3d):
            memory_format = torch.channels_last_3d
    out = torch._empty_affine_quantized(
        shape, scale=scale, zero_point=zero_point, dtype=torch.quint8, memory_format=memory_format
    )
    if relu:
        made: Tensor = torch.ops.quantized.add_relu(a, b, out)
    else:
        made = torch.ops.quantized.add(a, b, out)
    return made


def clamped(
    x: Tensor, low: float | None, high: float | None, scale: float, zero_point: int
) -> Tensor:
    """``fxquant.engine_free.clamp``, by parameters that are known when it runs."""
    bottom, top = 0, 255
    if low is not None:
        bottom = min(max(int(round(low / scale + zero_point)), 0), 255)  # noqa: RUF046  # a float
    if high is not None:
        top = min(max(int(round(high / scale + zero_point)), 0), 255)  # noqa: RUF046  # in script
    return torch.clamp(x, bottom, top)


def averaged(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """``avg_pool2d`` of a quantized tensor by the 3-d kernel, which does not ask for the engine."""
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    pooled = torch.nn.functional.avg_pool3d(
        batched.unsqueeze(2),
        [1] + kernel_size,  # noqa: RUF005  # TorchScript unpacks no lists
        [1] + stride,  # noqa: RUF005
        [0] + padding,  # noqa: RUF005
        ceil_mode,
        count_include_pad,
        divisor_override,
    ).squeeze(2)
    return pooled if x.dim() == 4 else pooled.squeeze(0)
