"""What lowered graphs call for recurrent modules: PyTorch's kernels on packed weights.

The functions take what ``nn.LSTM`` and its like take, with packed weights instead of tensors: one
cell-parameter object a layer and direction for the layered ones, two packed linears and two biases
for a cell. The weights are int8 (with inputs and states quantized at run time) or float16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fxquant.recurrent import Core, State, run_cell, run_sequence


def _layers(kernel: Any, params: list[Any], bidirectional: bool, extra: dict[str, Any]) -> Core:
    """All layers by one of ``torch.quantized_lstm`` and ``torch.quantized_gru``."""
    layers = len(params) // (1 + bidirectional)
    options = (params, True, layers, 0.0, False, bidirectional)

    def run(data: Tensor, batch_sizes: Tensor | None, states: State) -> tuple[Tensor, State]:
        hx: Any = list(states) if extra else states[0]
        if batch_sizes is None:
            output, *last = kernel(data, hx, *options, False, **extra)
        else:
            output, *last = kernel(data, batch_sizes, hx, *options, **extra)
        return output, tuple(last)

    return run


def quantized_lstm(
    input: Tensor | PackedSequence,  # noqa: A002  # as nn.LSTM has it
    hx: State | None,
    params: list[Any],
    hidden_size: int,
    bidirectional: bool,
    batch_first: bool,
    weight_dtype: torch.dtype,
) -> tuple[Any, State]:
    """``nn.LSTM`` on cell parameters, one object a layer and direction."""
    extra = {"dtype": weight_dtype, "use_dynamic": True}
    core = _layers(torch.quantized_lstm, params, bidirectional, extra)
    return run_sequence(core, input, hx, (2, len(params), hidden_size), batch_first)


def quantized_gru(
    input: Tensor | PackedSequence,  # noqa: A002  # as nn.GRU has it
    hx: Tensor | None,
    params: list[Any],
    hidden_size: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, Tensor]:
    """``nn.GRU`` on cell parameters, one object a layer and direction."""
    core = _layers(torch.quantized_gru, params, bidirectional, {})
    states = None if hx is None else (hx,)
    output, last = run_sequence(core, input, states, (1, len(params), hidden_size), batch_first)
    return output, last[0]


def lstm_cell(
    input: Tensor,  # noqa: A002  # as nn.LSTMCell has it
    hx: State | None,
    w_ih: Any,
    w_hh: Any,
    b_ih: Tensor,
    b_hh: Tensor,
    hidden_size: int,
) -> State:
    """``nn.LSTMCell`` on packed weights."""

    def core(x: Tensor, states: State) -> State:
        made = torch.ops.quantized.quantized_lstm_cell_dynamic(
            x, list(states), w_ih, w_hh, b_ih, b_hh
        )
        return tuple(made)

    return run_cell(core, input, hx, (2, hidden_size))


def gru_cell(
    input: Tensor,  # noqa: A002  # as nn.GRUCell has it
    hx: Tensor | None,
    w_ih: Any,
    w_hh: Any,
    b_ih: Tensor,
    b_hh: Tensor,
    hidden_size: int,
) -> Tensor:
    """``nn.GRUCell`` on packed weights."""
    kernel = torch.ops.quantized.quantized_gru_cell_dynamic
    return _one_state(kernel, input, hx, (w_ih, w_hh, b_ih, b_hh), hidden_size)


def rnn_cell(
    input: Tensor,  # noqa: A002  # as nn.RNNCell has it
    hx: Tensor | None,
    w_ih: Any,
    w_hh: Any,
    b_ih: Tensor,
    b_hh: Tensor,
    hidden_size: int,
    nonlinearity: str,
) -> Tensor:
    """``nn.RNNCell`` on packed weights."""
    kernel = getattr(torch.ops.quantized, f"quantized_rnn_{nonlinearity}_cell_dynamic")
    return _one_state(kernel, input, hx, (w_ih, w_hh, b_ih, b_hh), hidden_size)


def _one_state(
    kernel: Any, x: Tensor, hx: Tensor | None, weights: tuple[Any, ...], hidden_size: int
) -> Tensor:
    def core(rows: Tensor, states: State) -> State:
        return (kernel(rows, states[0], *weights),)

    return run_cell(core, x, None if hx is None else (hx,), (1, hidden_size))[0]
