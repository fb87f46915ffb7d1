"""Plans beside the model: on the caller's inputs and on made ones, then node by node."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph_module import QuantGraphModule
from fxquant.native.plan import Store, Value
from fxquant.native.program import Computed, Program, UnlikeError

_ATTEMPTS = 8
"""So many nodes are left to torch one after the other before a plan is given up."""


def same_tensors(expected: Tensor, found: Tensor) -> bool:
    """Whether shapes, types and numbers agree; NaN is like NaN."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if expected.is_quantized:
        return bool(torch.equal(expected, found))
    same = expected == found
    if expected.is_floating_point():
        same = same | (expected.isnan() & found.isnan())
    return bool(same.all())


def checked_program(
    gm: QuantGraphModule,
    inputs: tuple[Any, ...],
    threads: int,
    same: Callable[[Any, Any], bool],
    store: Store,
) -> tuple[Program | None, tuple[fx.Node, ...], Any]:
    """A program for these inputs that gives what the model gives.

    Args:
        gm: the lowered model.
        inputs: as a call has them.
        threads: of a native step.
        same: compares two results of the model.
        store: of packed weights, for all programs of the model.

    Returns:
        The program, or ``None`` where none agrees with the model; the nodes that were left to
        torch since their kernels differ; the model's result.
    """
    excluded: list[fx.Node] = []
    expected: Any = None
    for _ in range(_ATTEMPTS):
        program = Program(gm, inputs, frozenset(excluded), store)
        expected, program.expected = program.expected, None
        culprit = _culprit(gm, program, inputs, expected, threads, same)
        if culprit is None:
            return program, tuple(excluded), expected
        if not isinstance(culprit, fx.Node):
            break
        excluded.append(culprit)
    return None, (), expected


def _culprit(
    gm: QuantGraphModule,
    program: Program,
    inputs: tuple[Any, ...],
    expected: Any,
    threads: int,
    same: Callable[[Any, Any], bool],
) -> fx.Node | bool | None:
    """The first node that differs; ``True`` where only the result does, ``None`` if nothing."""
    made = ((inputs, None) for inputs in _made_inputs(gm, inputs))
    for trial, wanted in ((inputs, expected), *made):
        try:
            if wanted is None:
                wanted = _result(gm, trial)
            if same(wanted, program.run(trial, threads)):
                continue
            return first_difference(gm, program, trial) or True
        except UnlikeError:
            continue  # what the program does not take, the model runs
    return None


def _result(gm: QuantGraphModule, inputs: tuple[Any, ...]) -> Any:
    try:
        return fx.Interpreter(gm).run(*inputs)
    except Exception as error:  # whatever a model says to inputs that it was not made for
        raise UnlikeError(str(error)) from error


def _made_inputs(gm: QuantGraphModule, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The inputs with random floats for theirs, within the calibrated range and beyond."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    ranges = [_range(node) for node in placeholders]
    generator = torch.Generator().manual_seed(0)
    for factor in (0.5, 2.0):
        made = []
        for x, known in zip(inputs, ranges, strict=True):
            if isinstance(x, Tensor) and x.dtype == torch.float32 and x.numel():
                size = known or float(x.abs().where(x.isfinite(), 0).max()) or 1.0
                like = torch.empty_strided(x.shape, x.stride())
                made.append(like.normal_(0, factor * size, generator=generator))
            else:
                made.append(x)
        if all(a is b for a, b in zip(made, inputs, strict=True)):
            return
        yield tuple(made)


def _range(node: fx.Node) -> float:
    """Half of the range that an input is quantized with; 0 where it is not."""
    for user in node.users:
        if user.target is torch.quantize_per_tensor and isinstance(user.args[1], float):
            return 127 * user.args[1]
        if getattr(user.target, "__name__", "") == "checked_input":
            return _range(user)
    return 0.0


class _Watcher(fx.Interpreter):
    """Runs a graph and keeps what each value was."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = result.clone() if isinstance(result, Tensor) else result
        return result

    def integers_or_floats(self, node: fx.Node) -> Tensor | None:
        """A node's numbers, if it has some."""
        found = self.found.get(node)
        if not isinstance(found, Tensor):
            return None
        return found.int_repr() if found.is_quantized else found


def first_difference(
    gm: QuantGraphModule, program: Program, inputs: tuple[Any, ...]
) -> fx.Node | None:
    """The first node whose value in the plan is not the model's; ``None`` where all agree."""
    watcher = _Watcher(gm)
    watcher.run(*inputs)
    differing: list[fx.Node] = []

    def look(step: Computed, slots: Any) -> None:
        expected = watcher.integers_or_floats(step.shown)
        if differing or expected is None:
            return
        if not same_tensors(expected, _in_memory(step.value, slots).reshape(expected.shape)):
            own = watcher.integers_or_floats(step.node)
            absorbed = own is None or not same_tensors(own.reshape(expected.shape), expected)
            differing.append(step.shown if absorbed else step.node)

    program.run(inputs, 1, watch=look)
    return differing[0] if differing else None


def _in_memory(value: Value, slots: Any) -> Tensor:
    """A copy of a value of a plan that is being run."""
    a = value.argument()
    size = ((a.n * a.h) * a.row + a.pixel) * value.element
    start = slots[a.slot] + a.offset
    raw = (ctypes.c_uint8 * size).from_address(start)
    flat = torch.frombuffer(raw, dtype=value.dtype)
    strides = (a.h * a.row, a.row, a.pixel, 1)
    pixels = flat.as_strided((a.n, a.h, a.w, a.c), strides).clone()
    return pixels.permute(0, 3, 1, 2) if len(value.shape) == 4 else pixels
