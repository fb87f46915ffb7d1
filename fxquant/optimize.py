"""``optimize``: a lowered model as a plan of native kernels, which runs without Python inside."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import OrderedDict
from typing import Any, Final, NoReturn

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fxquant.errors import LoweringWarning, NativeUnavailableError, NotAGraphModuleError
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.native.library import load
from fxquant.native.program import Program

_KEPT_PROGRAMS: Final = 16
"""Programs of as many combinations of shapes are kept; the one used longest ago goes first."""


_NO_WORK: Final = ("checked_input", "in_format_of")
"""Functions of a lowered graph that look at tensors or lay them out, and compute nothing."""


def optimize(
    model: QuantGraphModule, example_inputs: tuple[Any, ...] | None = None
) -> OptimizedModel:
    """``model`` with its int8 operations in one native plan: the same numbers, in less time.

    Convolutions, linears and what lies between them run in fxquant's own kernels, without a call
    of Python or PyTorch for each; what these do not know stays with PyTorch, and ``print`` names
    it. Results are those of ``model`` bit by bit: each plan is compared with it when it is made,
    and one that differs is not used, with a warning.

    A plan is made for given shapes, so the first call with other ones takes longer (some
    hundredths of a second). Nothing else is fixed: any batch size and resolution that ``model``
    takes is taken. The number of threads is ``torch.get_num_threads()`` at each call, and calls
    may come from several threads at once.

    The kernels are compiled for this machine on first use (about ten seconds, once; kept in
    ``~/.cache/fxquant``, or in ``$FXQUANT_CACHE``). They need a C++ compiler and a processor with
    AVX512 and VNNI; elsewhere a :class:`~fxquant.errors.LoweringWarning` says so, and the result
    runs ``model`` itself.

    Args:
        model: what ``convert_fx`` or ``quantize`` gave.
        example_inputs: inputs to make the first plan for; without them the first call makes it.

    Returns:
        A module that is called like ``model``. It is a snapshot: later changes to the state of
        ``model`` do not reach it.

    Raises:
        NotAGraphModuleError: ``model`` was not converted by fxquant.
    """
    if not isinstance(model, QuantGraphModule) or model.state.stage is not Stage.LOWERED:
        raise NotAGraphModuleError(
            f"optimize takes a model that convert_fx or quantize gave, not"
            f" {type(model).__name__}. Call convert_fx(prepare_fx(...)) first"
        )
    reason = None
    try:
        load()
    except NativeUnavailableError as error:
        reason = str(error)
        warnings.warn(
            f"optimize changes nothing here: {reason}. The model runs as it is.",
            LoweringWarning,
            stacklevel=2,
        )
    optimized = OptimizedModel(model, reason)
    if example_inputs is not None:
        optimized(*example_inputs)
    return optimized


class OptimizedModel(nn.Module):
    """A lowered model that runs in native plans, one for each combination of input shapes.

    Attributes:
        model: the model that it was made from; it runs whatever has no plan.
        unavailable: why there are no native kernels here; ``None`` where there are.
    """

    def __init__(self, model: QuantGraphModule, unavailable: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.unavailable = unavailable
        self.training = False
        self._placeholders = [n for n in model.graph.nodes if n.op == "placeholder"]
        self._signature = inspect.signature(model.forward)
        self._programs: OrderedDict[Any, Program | None] = OrderedDict()
        self._making = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model that this was made from."""
        inputs = args if not kwargs and len(args) == len(self._placeholders) else None
        if inputs is None:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = tuple(bound.arguments.values())
            if len(inputs) != len(self._placeholders):  # *args or **kwargs in the graph
                return self.model(*args, **kwargs)
        key = None if self.unavailable else _key(inputs)
        if key is None:
            return self.model(*inputs)
        try:
            program = self._programs[key]
        except KeyError:
            return self._first_run(key, inputs)
        if program is None:
            return self.model(*inputs)
        with torch.no_grad():
            return program.run(inputs, torch.get_num_threads())

    def _first_run(self, key: Any, inputs: tuple[Any, ...]) -> Any:
        with self._making, torch.no_grad():
            program: Program | None = Program(self.model, inputs)
            assert program is not None
            expected, program.expected = program.expected, None
            found = program.run(inputs, torch.get_num_threads())
            if not _equal(expected, found):
                warnings.warn(
                    f"the native plan for inputs {_described(key)} does not give what the model"
                    " gives, so it is not used, and the model runs as it is. Please report this"
                    " with the model and this machine's `fxquant doctor`",
                    LoweringWarning,
                    stacklevel=3,
                )
                program = None
            self._programs[key] = program
            while len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
            return expected

    def plans(self) -> tuple[Program, ...]:
        """The programs made so far."""
        return tuple(p for p in self._programs.values() if p is not None)

    def profile(self, *inputs: Any, repeats: int = 50) -> str:
        """A table of the steps for these inputs, with the least time of each in microseconds.

        Each step is called by itself, which adds one or two microseconds to it; what torch
        computes between steps is not in the table.

        Args:
            inputs: as for a call.
            repeats: how many calls are timed.

        Returns:
            The table; where there is no plan for these inputs, why not.
        """
        self(*inputs)
        program = self._programs.get(None if self.unavailable else _key(inputs))
        if program is None:
            return str(self)
        times: dict[int, float] = {}
        with torch.no_grad():
            for _ in range(max(repeats, 1)):
                program.run(inputs, torch.get_num_threads(), times)
        rows = []
        for index, step in enumerate(program.plan.steps):
            microseconds = times[index] * 1e6
            rate = f"{step.macs / microseconds / 1e3:.0f}" if step.macs else ""
            size = "x".join(map(str, step.shape))
            rows.append((step.node, step.kind, step.detail, size, f"{microseconds:.1f}", rate))
        total = sum(times.values()) * 1e6
        headers = ("node", "step", "", "result", "us", "GMAC/s")
        return tabulate([*rows, ("all", "", "", "", f"{total:.0f}", "")], headers=headers)

    def __str__(self) -> str:
        if self.unavailable:
            return f"OptimizedModel: not native, since {self.unavailable}"
        rows: list[tuple[object, ...]] = []
        for key, program in self._programs.items():
            if program is None:
                rows.append((_described(key), "none", "", "", "everything: results differed"))
                continue
            left = _counted(program.called)
            rows.append(
                (
                    _described(key),
                    len(program.plan.steps),
                    len(program.called),
                    f"{program.plan.arena / 1e6:.1f} MB",
                    left or "nothing",
                )
            )
        headers = ("inputs", "native steps", "calls of torch", "scratch memory", "torch computes")
        table = tabulate(rows, headers=headers) if rows else "no plan yet: call it once"
        return f"OptimizedModel of {type(self.model).__name__}\n\n{table}"

    def train(self, mode: bool = True) -> OptimizedModel:
        """Only ``train(False)``, which ``eval()`` calls."""
        if mode:
            self._refuse("training")
        return self

    def _apply(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("a move or a cast")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"an optimized model takes no {what}: it is a snapshot of an int8 model for this CPU."
            " Change the float model, convert and optimize again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return optimize, (self.model,)


def _key(inputs: tuple[Any, ...]) -> Any:
    """What a plan is made for; ``None`` where an input is no plain tensor of the CPU."""
    key = []
    for x in inputs:
        if type(x) is not Tensor or x.device.type != "cpu" or x.is_quantized:
            return None
        key.append((x.shape, x.stride(), x.dtype))
    return tuple(key)


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or expected.shape != found.shape:
            return False
        if expected.is_quantized:
            return bool(torch.equal(expected, found))
        both_nan = expected.isnan() & found.isnan() if expected.is_floating_point() else False
        return bool(((expected == found) | both_nan).all())
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(
            _equal(expected[k], found[k]) for k in expected
        )
    if isinstance(expected, (tuple, list)):
        return len(expected) == len(found) and all(map(_equal, expected, found))
    return bool(expected == found)


def _described(key: Any) -> str:
    return ", ".join(str(list(shape)) for shape, _, _ in key)


def _counted(nodes: tuple[fx.Node, ...]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if name not in _NO_WORK:
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
