"""Recurrent networks by their definition, on weights and states that may be quantized at run time.

These are the functions that reference graphs call for ``nn.LSTM`` and its like; the kernels of a
target are compared with them. ``levels`` says how activations are quantized before they are
multiplied: ``(quant_min, quant_max)`` of a uint8 tensor whose scale comes from its own values, as
PyTorch's dynamic kernels do it (once for the inputs of all time steps, once for the state of every
step), or ``None`` for not at all. ``rounded`` says that ``input`` was quantized and dequantized
before, so that the first layer takes it as it is.

Sources: Hochreiter and Schmidhuber 1997; Cho et al. 2014; the equations of ``torch.nn.LSTM`` and
``torch.nn.GRU``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.operators import DEQUANTIZE, QUANTIZE_DYNAMIC

Levels = tuple[int, int] | None
State = tuple[Tensor, ...]
Weights = Sequence[Tensor | None]

_TENSORS: Final = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
TENSORS_PER_LAYER: Final = len(_TENSORS)
"""``weight_ih [G * H, I]``, ``weight_hh [G * H, H]``, ``bias_ih``, ``bias_hh [G * H]``, as torch
orders them; ``G`` gates, ``H`` hidden and ``I`` input features; biases may be ``None``."""


def weight_names(module: nn.Module) -> list[str]:
    """Attributes of a recurrent module, :data:`TENSORS_PER_LAYER` a layer; some may be ``None``."""
    if isinstance(module, nn.RNNBase):
        ends = [
            f"l{layer}{end}"
            for layer in range(module.num_layers)
            for end in ("", "_reverse")[: 1 + module.bidirectional]
        ]
        return [f"{name}_{end}" for end in ends for name in _TENSORS]
    return list(_TENSORS)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels) -> Tensor:
    if levels is not None:
        x = DEQUANTIZE(*QUANTIZE_DYNAMIC(x, *levels, torch.uint8))
    return F.linear(x, weight, bias)


def _lstm_step(gates: Tensor, hidden: Callable[[], Tensor], state: State) -> State:
    i, f, g, o = (gates + hidden()).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_step(gates: Tensor, hidden: Callable[[], Tensor], state: State) -> State:
    input_reset, input_update, input_new = gates.chunk(3, -1)
    reset, update, new = hidden().chunk(3, -1)
    z = torch.sigmoid(input_update + update)
    n = torch.tanh(input_new + torch.sigmoid(input_reset + reset) * new)
    return ((state[0] - n) * z + n,)


def _tanh_step(gates: Tensor, hidden: Callable[[], Tensor], state: State) -> State:
    return (torch.tanh(gates + hidden()),)


def _relu_step(gates: Tensor, hidden: Callable[[], Tensor], state: State) -> State:
    return (torch.relu(gates + hidden()),)


_SIMPLE_STEPS: Final = {"tanh": _tanh_step, "relu": _relu_step}

Step = Callable[[Tensor, Callable[[], Tensor], State], State]


def _cell(
    step: Step, x: Tensor, state: State, weights: Weights, levels: Levels, *, rounded: bool
) -> State:
    """One time step: ``x`` ``[N, I]``, states ``[N, H]``."""
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None and w_hh is not None
    gates = _product(x, w_ih, b_ih, None if rounded else levels)
    return step(gates, lambda: _product(state[0], w_hh, b_hh, levels), state)


def _direction(
    step: Step,
    data: Tensor,
    sizes: list[int],
    state: State,
    weights: Weights,
    levels: Levels,
    *,
    rounded: bool,
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction; returns outputs, a row per row of ``data``, and last states."""
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None and w_hh is not None
    gates = _product(data, w_ih, b_ih, None if rounded else levels).split(sizes)
    outputs: list[Tensor] = list(gates)
    current = state
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        rows = sizes[t]
        now = tuple(part[:rows] for part in current)
        hidden = functools.partial(_product, now[0], w_hh, b_hh, levels)
        made = step(gates[t], hidden, now)
        outputs[t] = made[0]
        # Sequences that have ended, or, in reverse, have not begun, keep their state.
        current = tuple(
            torch.cat([new, old[rows:]]) for new, old in zip(made, current, strict=True)
        )
    return torch.cat(outputs), current


Core = Callable[[Tensor, Tensor | None, State], tuple[Tensor, State]]
"""What runs all layers: ``(data, batch_sizes, states) -> (outputs, last states)``; the data are
``[T, N, I]`` without batch sizes and ``[rows, I]`` with them, states ``[layers, N, H]``."""


def _layers(
    step: Step, weights: Weights, directions: int, levels: Levels, *, rounded: bool
) -> Core:
    count = len(weights) // TENSORS_PER_LAYER

    def run(data: Tensor, batch_sizes: Tensor | None, states: State) -> tuple[Tensor, State]:
        steps = data.shape[:-1]
        sizes = [steps[1]] * steps[0] if batch_sizes is None else batch_sizes.tolist()
        rows = data.reshape(-1, data.shape[-1])
        last = []
        for first in range(0, count, directions):
            outputs = []
            for index in range(first, first + directions):
                own = weights[TENSORS_PER_LAYER * index : TENSORS_PER_LAYER * (index + 1)]
                state = tuple(part[index] for part in states)
                output, state = _direction(
                    *(step, rows, sizes, state, own, levels),
                    rounded=rounded and first == 0,
                    reverse=index > first,
                )
                outputs.append(output)
                last.append(state)
            rows = torch.cat(outputs, -1)
        final = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return rows.reshape(*steps, rows.shape[-1]), final

    return run


def run_sequence(
    core: Core,
    x: Tensor | PackedSequence,
    states: State | None,
    shape: tuple[int, int, int],
    batch_first: bool,
) -> tuple[Any, State]:
    """Run ``core`` on what ``nn.LSTM`` and ``nn.GRU`` take, and give what they give.

    Args:
        core: all layers and directions.
        x: ``[T, N, I]``, ``[N, T, I]`` with ``batch_first``, ``[T, I]``, or a packed sequence.
        states: each ``[layers, N, H]`` (``[layers, H]`` for one sequence); ``None`` for zeros.
        shape: how many states, of how many layers (times directions), with ``H`` features each.
        batch_first: the order of the axes of ``x`` and of the outputs.
    """
    if isinstance(x, PackedSequence):
        return _run_packed(core, x, states, shape)
    single = x.dim() == 2
    data = x.unsqueeze(1) if single else x.transpose(0, 1) if batch_first else x
    if states is not None and single:
        states = tuple(part.unsqueeze(1) for part in states)
    output, last = core(data, None, states or _zeros(x, shape, data.shape[1]))
    if single:
        return output.squeeze(1), tuple(part.squeeze(1) for part in last)
    return output.transpose(0, 1) if batch_first else output, last


def _run_packed(
    core: Core, x: PackedSequence, states: State | None, shape: tuple[int, int, int]
) -> tuple[PackedSequence, State]:
    data, sizes, order, back = x
    if states is None:
        states = _zeros(data, shape, int(sizes[0]))
    elif order is not None:
        states = tuple(part.index_select(1, order) for part in states)
    output, last = core(data, sizes, states)
    if back is not None:
        last = tuple(part.index_select(1, back) for part in last)
    return PackedSequence(output, sizes, order, back), last


def _zeros(x: Tensor, shape: tuple[int, int, int], batch: int) -> State:
    states, layers, features = shape
    return tuple(x.new_zeros(layers, batch, features) for _ in range(states))


def run_cell(
    core: Callable[[Tensor, State], State],
    x: Tensor,
    states: State | None,
    shape: tuple[int, int],
) -> State:
    """Run one time step on what ``nn.LSTMCell`` and its like take.

    Args:
        core: takes ``[N, I]`` and states ``[N, H]``.
        x: ``[N, I]`` or ``[I]``.
        states: of the same rank; ``None`` for zeros.
        shape: how many states, with ``H`` features each.
    """
    single = x.dim() == 1
    rows = x.unsqueeze(0) if single else x
    if states is None:
        states = tuple(x.new_zeros(rows.shape[0], shape[1]) for _ in range(shape[0]))
    elif single:
        states = tuple(part.unsqueeze(0) for part in states)
    made = core(rows, states)
    return tuple(part.squeeze(0) for part in made) if single else made


def _features(weights: Weights) -> int:
    hidden = weights[1]
    assert hidden is not None
    return hidden.shape[1]


def lstm(
    input: Tensor | PackedSequence,  # noqa: A002  # as nn.LSTM has it
    hx: State | None,
    weights: Weights,
    bidirectional: bool = False,
    batch_first: bool = False,
    levels: Levels = None,
    rounded: bool = False,
) -> tuple[Any, State]:
    """``nn.LSTM`` in evaluation; ``weights`` has :data:`TENSORS_PER_LAYER` for every layer."""
    core = _layers(_lstm_step, weights, 1 + bidirectional, levels, rounded=rounded)
    shape = (2, len(weights) // TENSORS_PER_LAYER, _features(weights))
    return run_sequence(core, input, hx, shape, batch_first)


def gru(
    input: Tensor | PackedSequence,  # noqa: A002  # as nn.GRU has it
    hx: Tensor | None,
    weights: Weights,
    bidirectional: bool = False,
    batch_first: bool = False,
    levels: Levels = None,
    rounded: bool = False,
) -> tuple[Any, Tensor]:
    """``nn.GRU`` in evaluation; ``weights`` has :data:`TENSORS_PER_LAYER` for every layer."""
    core = _layers(_gru_step, weights, 1 + bidirectional, levels, rounded=rounded)
    shape = (1, len(weights) // TENSORS_PER_LAYER, _features(weights))
    output, last = run_sequence(core, input, None if hx is None else (hx,), shape, batch_first)
    return output, last[0]


def lstm_cell(
    input: Tensor,  # noqa: A002  # as nn.LSTMCell has it
    hx: State | None,
    weights: Weights,
    levels: Levels = None,
    rounded: bool = False,
) -> State:
    """``nn.LSTMCell``."""

    def core(x: Tensor, states: State) -> State:
        return _cell(_lstm_step, x, states, weights, levels, rounded=rounded)

    return run_cell(core, input, hx, (2, _features(weights)))


def _simple_cell(
    step: Step, x: Tensor, hx: Tensor | None, weights: Weights, levels: Levels, *, rounded: bool
) -> Tensor:
    def core(rows: Tensor, states: State) -> State:
        return _cell(step, rows, states, weights, levels, rounded=rounded)

    return run_cell(core, x, None if hx is None else (hx,), (1, _features(weights)))[0]


def gru_cell(
    input: Tensor,  # noqa: A002  # as nn.GRUCell has it
    hx: Tensor | None,
    weights: Weights,
    levels: Levels = None,
    rounded: bool = False,
) -> Tensor:
    """``nn.GRUCell``."""
    return _simple_cell(_gru_step, input, hx, weights, levels, rounded=rounded)


def rnn_cell(
    input: Tensor,  # noqa: A002  # as nn.RNNCell has it
    hx: Tensor | None,
    weights: Weights,
    nonlinearity: str,
    levels: Levels = None,
    rounded: bool = False,
) -> Tensor:
    """``nn.RNNCell``; ``nonlinearity`` is ``"tanh"`` or ``"relu"``."""
    step = _SIMPLE_STEPS[nonlinearity]
    return _simple_cell(step, input, hx, weights, levels, rounded=rounded)
