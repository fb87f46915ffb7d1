"""calibrate: run data through a prepared model, so that its observers see what the model sees.

What is fed for each batch, unless ``forward`` says otherwise:

==============================  ===================================================================
batch                           fed to the model
==============================  ===================================================================
a tensor                        as its first input
a dict                          by keyword; a key that is no input is an error
a tuple or a list               by position, as many as the model requires; surplus items at the
                                end (labels) are left out: of ``(image, label)`` a model with one
                                input gets the image
==============================  ===================================================================

An input with a default counts as required where the ``example_inputs`` of ``prepare_fx`` gave a
tensor for it. A batch that fails leaves no trace: its statistics are taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.errors import (
    CalibrationError,
    CalibrationWarning,
    Diagnostics,
    FxQuantError,
    NonFiniteStatisticError,
    NotPreparedError,
    did_you_mean,
)
from fxquant.graph_module import QuantGraphModule, graphs_in
from fxquant.graph_state import Stage
from fxquant.inputs import BoundInterpreter, bind_inputs
from fxquant.metadata import record_of, tensor_records
from fxquant.observed import was_observed
from fxquant.passes.to_reference import is_observer

Forward = Callable[[Any, Any], object]
"""``forward(model, batch)``: runs the model on a batch; what it returns is not used."""

_SECONDS_BEFORE_PROGRESS: Final = 2.0


def calibrate(
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    num_batches: int | None = None,
    progress: bool = True,
) -> QuantGraphModule:
    """Run ``data`` through ``prepared`` without gradients; see the module for what is fed.

    Args:
        prepared: what ``prepare_fx`` returned. Training flags stay as they are.
        data: batches: a list, a ``DataLoader``, a generator (which is used up), ...; batches may
            differ in shape from each other and from the example inputs.
        forward: ``forward(model, batch)`` runs the model on one batch, in place of the rule.
        num_batches: take at most so many batches, and no more out of a generator.
        progress: show a progress bar, on a terminal and after two seconds only.

    Returns:
        ``prepared`` itself. Calibrating again adds to what was seen.

    Raises:
        NotPreparedError: ``prepared`` is not, or no longer, a prepared model.
        CalibrationError: there is no batch, or a batch does not fit the model.
        NonFiniteStatisticError: NaN or Inf reached an observer.
    """
    gm = _prepared(prepared)
    _check_arguments(data, num_batches)
    run = _Run(gm, _feed(gm) if forward is None else forward)
    with torch.no_grad(), run.watching():
        for batch in _progress(data, num_batches, shown=progress):
            run.batch(batch)
    if run.count == 0:
        raise CalibrationError(_no_batches(data))
    _warn_blind(gm, run.count)
    return gm


# -- arguments ------------------------------------------------------------------------------------


def _prepared(model: object) -> QuantGraphModule:
    if isinstance(model, QuantGraphModule) and model.state.stage is Stage.PREPARED:
        return model
    if isinstance(model, QuantGraphModule):
        stage = model.state.stage
        cure = (
            "calibrate the prepared model, then convert it again"
            if stage in (Stage.REFERENCE, Stage.LOWERED)
            else "call prepare_fx(model, qconfig_mapping, example_inputs) first"
        )
        raise NotPreparedError(
            f"calibrate needs a prepared model; this one is {stage.value} and has no observers:"
            f" {cure}"
        )
    raise NotPreparedError(
        f"calibrate needs what prepare_fx returned, got {type(model).__name__}: call"
        " prepare_fx(model, qconfig_mapping, example_inputs) first"
    )


def _check_arguments(data: object, num_batches: object) -> None:
    if num_batches is not None and (type(num_batches) is not int or num_batches <= 0):
        raise CalibrationError(
            f"num_batches must be a whole number > 0 or None, got {num_batches!r}"
        )
    if isinstance(data, (Tensor, np.ndarray, Mapping, str, bytes)):
        raise CalibrationError(
            f"data is {_describe(data)}, not batches of inputs; if it is one batch, pass [batch]"
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise CalibrationError(
            f"data must be an iterable of batches (a list, a DataLoader, a generator), got"
            f" {type(data).__name__}"
        )


def _no_batches(data: object) -> str:
    used_up = isinstance(data, Iterator)
    hint = "a generator can be used once only, make a new one" if used_up else "pass at least one"
    return f"data gave no batch, so nothing was observed: {hint}"


def _progress(data: Iterable[Any], num_batches: int | None, *, shown: bool) -> Iterator[Any]:
    try:
        total: int | None = len(data)  # type: ignore[arg-type]  # asked for, not assumed
    except TypeError:
        total = None
    if num_batches is not None:
        total = num_batches if total is None else min(total, num_batches)
    bar = tqdm(
        total=total,
        desc="calibrate",
        unit="batch",
        delay=_SECONDS_BEFORE_PROGRESS,
        disable=None if shown else True,  # None: only where stderr is a terminal
        leave=False,
    )
    with bar:
        for batch in islice(data, num_batches):
            yield batch
            bar.update()


# -- feeding --------------------------------------------------------------------------------------


def _feed(gm: QuantGraphModule) -> Forward:
    """The rule of the module's docstring, for the inputs of ``gm``."""
    inputs = _Inputs.of(gm)

    def forward(model: nn.Module, batch: object) -> object:
        args, kwargs = inputs.place(batch)
        return nn.Module.__call__(model, *args, **kwargs)  # fx's own prints errors to stderr

    return forward


def placing(
    gm: QuantGraphModule,
) -> Callable[[object], tuple[tuple[Any, ...], dict[str, Any]]]:
    """How batches are fed to ``gm`` by the rule of the module's docstring.

    Args:
        gm: a graph of any stage.

    Returns:
        A function from a batch to positional and keyword arguments; it raises
        :class:`CalibrationError` where the batch does not fit.
    """
    inputs = _Inputs.of(gm)

    def place(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            return inputs.place(batch)
        except _Misfit as error:
            raise CalibrationError(
                f"a batch ({_describe(batch)}) does not fit the model: {error}"
            ) from error

    return place


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """The inputs of a model.

    Attributes:
        names: of all inputs, in order.
        required: those without a default.
        wanted: how many a tuple fills.
        any_number: the model takes ``*args``.
        any_name: the model takes ``**kwargs``.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    wanted: int
    any_number: bool
    any_name: bool

    @staticmethod
    def of(gm: QuantGraphModule) -> _Inputs:
        """Read off the placeholders of ``gm``."""
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        named = [node for node in nodes if not str(node.target).startswith("*")]
        required = tuple(str(node.target) for node in named if not node.args)
        wanted = len(required)
        for node in named[wanted:]:
            if next(tensor_records(record_of(node).value), None) is None:
                break
            wanted += 1
        targets = {str(node.target) for node in nodes}
        return _Inputs(
            names=tuple(str(node.target) for node in named),
            required=required,
            wanted=wanted or min(1, len(named)),
            any_number=any(t.startswith("*") and not t.startswith("**") for t in targets),
            any_name=any(t.startswith("**") for t in targets),
        )

    def place(self, batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for one batch."""
        if isinstance(batch, Mapping):
            return (), self._keywords(batch)
        if isinstance(batch, (tuple, list)):
            return self._positions(batch), {}
        if isinstance(batch, np.ndarray):
            raise _Misfit(_numpy("the batch"))
        if not isinstance(batch, Tensor):
            raise _Misfit(
                "a batch is a tensor, a tuple, a list or a dict; for anything else pass"
                " forward=lambda model, batch: model(...)"
            )
        if len(self.required) > 1:
            raise _Misfit(f"it is one tensor, the model needs {_quoted(self.required)}")
        return (batch,), {}

    def _positions(self, batch: tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
        fed = tuple(batch) if self.any_number else tuple(batch[: self.wanted])
        _refuse_arrays({f"item {i}": item for i, item in enumerate(fed)})
        if len(fed) < len(self.required):
            raise _Misfit(
                f"it has {len(fed)} item(s), the model needs {_quoted(self.required)}:"
                f" {_quoted(self.required[len(fed) :])} missing"
            )
        return fed

    def _keywords(self, batch: Mapping[Any, Any]) -> dict[str, Any]:
        given = {str(key): value for key, value in batch.items()}
        unknown = [key for key in given if key not in self.names]
        if unknown and not self.any_name:
            raise _Misfit(
                f"{_quoted(unknown)} is no input of the model, which takes {_quoted(self.names)}"
                f"{did_you_mean(unknown[0], self.names)}. Take it out of the batch, or pass"
                " forward=lambda model, batch: model(...)"
            )
        missing = [name for name in self.required if name not in given]
        if missing:
            raise _Misfit(f"the model needs {_quoted(self.required)}: {_quoted(missing)} missing")
        _refuse_arrays({repr(key): value for key, value in given.items()})
        return given


class _Misfit(Exception):
    """A batch does not fit the model's inputs."""


def _refuse_arrays(items: Mapping[str, object]) -> None:
    for name, item in items.items():
        if isinstance(item, (np.ndarray, np.generic)):
            raise _Misfit(_numpy(name))


def _numpy(what: str) -> str:
    return (
        f"{what} is a numpy array and the model takes tensors: convert it with"
        " torch.from_numpy(array), or read the data through a torch DataLoader, which converts"
    )


# -- running --------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One calibration.

    Attributes:
        gm: the prepared model.
        forward: runs one batch.
        count: batches that went through.
    """

    gm: QuantGraphModule
    forward: Forward
    count: int = 0
    _arguments: tuple[tuple[Any, ...], dict[str, Any]] = field(default=((), {}), init=False)

    def __post_init__(self) -> None:
        self.statistics = _Statistics(self.gm)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remember what the model was last called with, so that a failure can be located."""

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._arguments = args, kwargs

        handle = self.gm.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def batch(self, batch: object) -> None:
        """Run one batch; where it fails, the observers are as before it."""
        self.statistics.save()
        self._arguments = (), {}
        try:
            self.forward(self.gm, batch)
        except BaseException as error:
            self.statistics.restore()
            if not isinstance(error, Exception):
                raise
            explained = self._explained(error, batch)
            self.statistics.restore()  # looking for the place has run the parts of islands
            raise explained from error
        self.count += 1

    def _explained(self, error: Exception, batch: object) -> FxQuantError:
        where = f"calibration batch {self.count + 1} ({_describe(batch)})"
        kept = f"The statistics are as they were before it ({self.count} batch(es) seen)"
        if isinstance(error, NonFiniteStatisticError):
            origin = (
                "the batch itself holds NaN or Inf: clean the data"
                if _has_nonfinite(batch)
                else "the batch is finite, so the model makes them: check its weights and the"
                " preprocessing"
            )
            seen = str(error).partition(" in batch ")[0]  # an observer counts all calibrations
            return NonFiniteStatisticError(
                f"{where}: {seen}; {origin}. {kept}: drop the batch and calibrate with the others"
            )
        if isinstance(error, _Misfit):
            return CalibrationError(f"{where} does not fit the model: {error}. {kept}")
        failure = self._located() or _first_line(error)
        return CalibrationError(f"{where} does not run on the model: {failure}. {kept}")

    def _located(self) -> str:
        """The node that fails, and how: found by running the graph without its observers."""
        args, kwargs = self._arguments
        try:
            locator = _Locator(self.gm, bind_inputs(self.gm, args, kwargs))
        except TypeError:
            return ""
        try:
            locator.run()
        except Exception as error:  # noqa: BLE001  # the same failure; its place is wanted
            node = locator.current
            return f"at node {node.name!r} ({node.op} {_target(node)}): {_first_line(error)}"
        return ""


class _Locator(BoundInterpreter):
    """Runs a prepared graph without its observers and remembers the node it is at."""

    current: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``; an observer gives what it gets."""
        self.current = n
        return self.env[n.all_input_nodes[0]] if _is_watcher(n) else super().run_node(n)


class _Statistics:
    """What the observers of a model know, so that a batch can be taken back."""

    def __init__(self, gm: QuantGraphModule) -> None:
        watchers = dict.fromkeys(
            graph.get_submodule(str(n.target))
            for graph in graphs_in(gm)
            for n in graph.graph.nodes
            if _is_watcher(n)
        )
        modules = [module for watcher in watchers for module in watcher.modules()]
        self.modules = [m for m in modules if m._buffers or _lists(m)]
        self._saved: list[tuple[dict[str, Tensor | None], dict[str, list[Any]]]] = []

    def save(self) -> None:
        """Remember everything: buffers, and what observers keep in lists."""
        self._saved = [
            ({k: None if b is None else b.clone() for k, b in m._buffers.items()}, _lists(m))
            for m in self.modules
        ]

    def restore(self) -> None:
        """Put back what was saved last."""
        for module, (buffers, lists) in zip(self.modules, self._saved, strict=True):
            copies = {k: None if b is None else b.clone() for k, b in buffers.items()}
            module._buffers.update(copies)
            module.__dict__.update({name: list(value) for name, value in lists.items()})


def _lists(module: nn.Module) -> dict[str, list[Any]]:
    return {name: list(value) for name, value in vars(module).items() if isinstance(value, list)}


def _is_watcher(node: fx.Node) -> bool:
    """Whether ``node`` calls a module that a pass put in to look on, such as an observer."""
    return node.op == "call_module" and not record_of(node).origins


def _warn_blind(gm: QuantGraphModule, count: int) -> None:
    blind = [
        node.all_input_nodes[0].name
        for graph in graphs_in(gm)
        for node in graph.graph.nodes
        if is_observer(node) and _is_blind(graph.get_submodule(str(node.target)))
    ]
    if not blind:
        return
    shown = ", ".join(repr(name) for name in blind[:5])
    more = f" and {len(blind) - 5} more" if len(blind) > 5 else ""
    Diagnostics().warn(
        f"after {count} batch(es) the observers of {shown}{more} have seen no data; their scales"
        " would be arbitrary. Feed batches that reach these ops, and with forward= see that it"
        " calls the model it is given",
        CalibrationWarning,
    )


def _is_blind(observer: nn.Module) -> bool:
    """Whether an observer that needs statistics has none; dynamic ones never need any."""
    return not was_observed(observer) and not bool(getattr(observer, "is_dynamic", False))


# -- words ----------------------------------------------------------------------------------------


def _describe(value: object) -> str:
    """Shapes and dtypes: ``(float32[8, 3, 32, 32], int64[8])``."""
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{place}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        left, right = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        more = ", ..." if len(value) > 8 else ""
        return f"{left}{', '.join(map(_describe, value[:8]))}{more}{right}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in list(value.items())[:8]) + "}"
    return type(value).__name__


def _has_nonfinite(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return any(map(_has_nonfinite, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_has_nonfinite, value))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _target(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
