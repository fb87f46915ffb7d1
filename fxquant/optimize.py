"""``optimize``: a lowered model as a plan of native kernels, which runs without Python inside."""

from __future__ import annotations

import inspect
import threading
from typing import Any, Final, NoReturn

import torch
from tabulate import tabulate
from torch import fx, nn

from fxquant.autocast import is_autocast, no_autocast, widened
from fxquant.errors import (
    Diagnostics,
    LoweringWarning,
    NativeUnavailableError,
    NotAGraphModuleError,
)
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.native.calls import (
    Key,
    NoPlanError,
    NotComparableError,
    described,
    key_of,
    same_results,
)
from fxquant.native.comparison import checked_program
from fxquant.native.library import load
from fxquant.native.plan import Store
from fxquant.native.plan_table import PlanTable
from fxquant.native.program import Program, UnlikeError
from fxquant.native.snapshot import Snapshot
from fxquant.shapes import as_arguments

_NO_WORK: Final = ("checked_input", "in_format_of")
"""Functions of a lowered graph that look at tensors or lay them out, and compute nothing."""

_REASONS: Final = 8
"""So many different reasons of calls without a plan are kept to be told."""


def optimize(model: QuantGraphModule, example_inputs: Any = None) -> OptimizedModel:
    """``model`` with its int8 operations in one native plan: the same numbers, in less time.

    Convolutions, linears and what lies between them run in fxquant's own kernels, without a call
    of Python or PyTorch for each; what these do not know stays with PyTorch, and ``print`` names
    it. Results are those of ``model`` bit by bit: each plan is compared with it when it is made,
    on these inputs and on random ones. A node that differs is left to PyTorch, and a plan that
    differs as a whole is not used, both with a warning.

    A plan is made for given shapes, so the first call with other ones takes longer (some
    hundredths of a second). Nothing else is fixed: any batch size and resolution that ``model``
    takes is taken; once there are plans for many, others run ``model`` itself until they come
    often. The number of threads is ``torch.get_num_threads()`` at each call, at most the
    processors that the caller may run on, and calls may come from several threads at once.

    The kernels are compiled for this machine on first use (about ten seconds, once; kept in
    ``~/.cache/fxquant``, or in ``$FXQUANT_CACHE``). They need a C++ compiler and a processor with
    AVX512 and VNNI; elsewhere a :class:`~fxquant.errors.LoweringWarning` says so, and the result
    runs ``model`` itself.

    Args:
        model: what ``convert_fx`` or ``quantize`` gave.
        example_inputs: inputs to make the first plan for, as ``prepare_fx`` takes them; without
            them the first call makes it.

    Returns:
        A module that is called like ``model``. It is a snapshot: where the state of ``model`` is
        changed later, calls that would need the new state, too, raise a ``RuntimeError``.

    Raises:
        NotAGraphModuleError: ``model`` was not converted by fxquant, or is optimized already.
    """
    _check(model)
    reason = None
    try:
        load()
    except NativeUnavailableError as error:
        reason = str(error)
        Diagnostics().warn(
            f"optimize changes nothing here: {reason}. The model runs as it is.",
            LoweringWarning,
        )
    optimized = OptimizedModel(model, reason)
    if example_inputs is not None:
        args, kwargs = as_arguments(example_inputs)
        optimized(*args, **kwargs)
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
        self._inputs = sum(node.op == "placeholder" for node in model.graph.nodes)
        self._signature = inspect.signature(model.forward)
        self._programs = PlanTable()
        self._making = threading.RLock()
        self._store: Store | None = None  # of packed weights, for all plans
        self._snapshot = Snapshot(model)
        self._reasons: dict[str, None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model that this was made from, which runs in full precision under autocast."""
        if is_autocast():
            with no_autocast():
                return self._run(widened(args), widened(kwargs))
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call(args, kwargs)
        if isinstance(call, str):
            return self._run_model(call, *args, **kwargs)
        inputs, key = call
        program = self._programs.find(key)
        if program is None:
            if not self._programs.has_room_for(key):
                return self._run_model("there are plans for many others", *inputs)
            with self._making:
                program = self._programs.find(key)  # another thread may have made it
                if program is None:
                    return self._first_call(key, inputs)
        reason = None
        if isinstance(program, Program):
            try:
                with torch.no_grad():
                    return program.run(inputs, torch.get_num_threads())
            except UnlikeError as error:
                reason = f"its numbers were unlike those that its plan is for ({error})"
        return self._run_model(reason, *inputs)

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Key] | str:
        """Values of all placeholders and what a plan for them is made for, or why there is none."""
        if self.unavailable:
            return self.unavailable
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return "a compiler or a tracer looked on"
        inputs = args
        if kwargs or len(args) != self._inputs:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = tuple(bound.arguments.values())
        if len(inputs) != self._inputs:
            return "its graph has *args or **kwargs"
        try:
            return inputs, key_of(inputs)
        except NoPlanError as error:
            return str(error)

    def _run_model(self, reason: str | None, *args: Any, **kwargs: Any) -> Any:
        """The result of the model itself, in a call for which there is no plan."""
        if len(self._programs):
            self._refuse_changes()
        if reason is not None and len(self._reasons) < _REASONS:
            self._reasons[reason] = None
        return self.model(*args, **kwargs)

    def _first_call(self, key: Key, inputs: tuple[Any, ...]) -> Any:
        self._refuse_changes()
        try:
            return self._first_run(key, inputs)
        except NotComparableError as error:
            self._programs[key] = f"the result holds a {error}"
            Diagnostics().warn(
                f"the native plan for inputs {described(key)} is not used, since the result holds"
                f" a {error}, which cannot be compared with the model's: return tensors in tuples,"
                " dicts or dataclasses, or register the class with torch.utils._pytree. The model"
                " runs as it is",
                LoweringWarning,
            )
            return self.model(*inputs)
        finally:
            self._snapshot.after_a_call()

    def _refuse_changes(self) -> None:
        change = self._snapshot.change()
        if change is not None:
            raise RuntimeError(
                f"the int8 model was changed after optimize ({change}), and this call would mix"
                " its old state with the new one. Call optimize again"
            )

    def _first_run(self, key: Any, inputs: tuple[Any, ...]) -> Any:
        with self._making, torch.no_grad():
            threads = torch.get_num_threads()
            store = self._store = self._store or Store()
            program, left, expected = checked_program(
                self.model, inputs, threads, same_results, store
            )
            if program is None:
                Diagnostics().warn(
                    f"the native plan for inputs {described(key)} does not give what the model"
                    " gives, so it is not used, and the model runs as it is. Please report this"
                    " with the model and this machine's `fxquant doctor`",
                    LoweringWarning,
                )
            elif left:
                names = ", ".join(map(str, left))
                Diagnostics().warn(
                    f"the native plan for inputs {described(key)} leaves {names}"
                    " to torch, since its kernels give other numbers there. Please report this with"
                    " the model and this machine's `fxquant doctor`",
                    LoweringWarning,
                )
            self._programs[key] = program or "results differed"
            return expected

    def plans(self) -> tuple[Program, ...]:
        """The programs made so far."""
        return tuple(p for _, p in self._programs.items() if isinstance(p, Program))

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
        try:
            program = self._programs.find(key_of(inputs))
        except NoPlanError:
            program = None
        if not isinstance(program, Program):
            return str(self)
        times: dict[int, float] = {}
        with torch.no_grad(), no_autocast():
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
            if isinstance(program, str):
                rows.append((described(key), "none", "", "", f"everything: {program}"))
                continue
            left = _counted(program.called)
            rows.append(
                (
                    described(key),
                    len(program.plan.steps),
                    len(program.called),
                    f"{program.plan.arena / 1e6:.1f} MB",
                    left or "nothing",
                )
            )
        headers = ("inputs", "native steps", "calls of torch", "scratch memory", "torch computes")
        table = tabulate(rows, headers=headers) if rows else "no plan yet: call it once"
        lines = [f"OptimizedModel of {type(self.model).__name__}", "", table]
        if self._store is not None:
            lines += ["", f"Packed weights, for all of them: {self._store.size / 1e6:.1f} MB"]
        if self._reasons:
            reasons = "; ".join(list(self._reasons))
            lines += ["", f"Some calls ran the model as it is: {reasons}"]
        return "\n".join(lines)

    def train(self, mode: bool = True) -> OptimizedModel:
        """Only ``train(False)``, which ``eval()`` calls."""
        if mode:
            self._refuse("training")
        return self

    def _apply(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("a move or a cast")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("new state")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"an optimized model takes no {what}: it is a snapshot of an int8 model for this CPU."
            " Change the float model, convert and optimize again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return optimize, (self.model,)


def _check(model: nn.Module) -> None:
    if isinstance(model, OptimizedModel):
        raise NotAGraphModuleError(
            "optimize got a model that is optimized already. The int8 model that it was made from"
            " is its attribute `model`"
        )
    if not isinstance(model, QuantGraphModule) or model.state.stage is not Stage.LOWERED:
        raise NotAGraphModuleError(
            f"optimize takes a model that convert_fx or quantize gave, not"
            f" {type(model).__name__}. Call convert_fx(prepare_fx(...)) first"
        )


def _counted(nodes: tuple[fx.Node, ...]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if name not in _NO_WORK:
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
