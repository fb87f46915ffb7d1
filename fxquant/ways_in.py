"""From whatever a user brings to a float graph: a trace, else an export, else the layers alone."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from fxquant.aten import is_aten
from fxquant.capture import capture
from fxquant.errors import (
    CaptureError,
    CaptureWarning,
    ConfigError,
    Diagnostics,
    UntraceableError,
    did_you_mean,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.islands import SWAPPED, CaptureOptions, Island, find_islands, holder_of
from fxquant.ledger import build_ledger
from fxquant.own_copy import Copying
from fxquant.shapes import as_arguments, record_shapes
from fxquant.traced_names import give_defaults

_RECURRENT: Final = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
"""Modules that a graph must call: traced through, they are functions without int8 kernels."""
_SHORT: Final = 300
"""Characters of a message of torch.export's, which may list symbols by the hundred."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What a user says about the capture of a model.

    Attributes:
        concrete_args: inputs that are fixed to a value, by name.
        leaf_modules: paths and classes of modules that are left as they are.
        strict: what cannot be traced is an error.
    """

    concrete_args: Mapping[str, Any] = field(default_factory=dict)
    leaf_modules: tuple[str | type[nn.Module], ...] = ()
    strict: bool = False

    def leaves(self, model: nn.Module) -> dict[str, str]:
        """Paths of the modules of ``model`` that are left as they are, with the reason.

        Raises:
            ConfigError: ``leaf_modules`` names something that ``model`` does not have.
        """
        found: dict[str, str] = {}
        paths = dict(model.named_modules(remove_duplicate=False))
        for wanted in self.leaf_modules:
            if isinstance(wanted, str):
                matching = [wanted] if wanted in paths and wanted else []
            elif isinstance(wanted, type):
                matching = [p for p, module in paths.items() if p and type(module) is wanted]
            else:
                raise ConfigError(f"leaf_modules takes paths and module classes, got {wanted!r}")
            if not matching:
                known = [*paths, *(type(module).__name__ for module in paths.values())]
                name = wanted if isinstance(wanted, str) else wanted.__name__
                raise ConfigError(
                    f"leaf_modules names {name!r}, which is no submodule of"
                    f" {type(model).__name__}{did_you_mean(name, known)}"
                )
            found |= dict.fromkeys(matching, "listed in leaf_modules, so it stays as it is")
        return found


@dataclass(frozen=True, slots=True)
class Captured:
    """A float graph with shapes and ledger, and what is in the modules that it calls as they are.

    Attributes:
        graph: float.
        islands: in it.
    """

    graph: QuantGraphModule
    islands: tuple[Island, ...]


def as_module(model: Any, caller: str, *, trains: bool = False) -> nn.Module:
    """``model``, or the module of an exported program.

    Args:
        model: what the user gave.
        caller: for the message.
        trains: it is to train, which exported programs do not.

    Raises:
        CaptureError: it is neither, or cannot train.
    """
    program = model if isinstance(model, torch.export.ExportedProgram) else None
    if trains and (program or (isinstance(model, fx.GraphModule) and is_aten(model))):
        raise CaptureError(
            f"{caller} trains the model, and what torch.export gives does not train: its"
            " batch-norms and dropouts stay as they were exported. Pass the module it was made from"
        )
    if program is not None:
        return program.module()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{caller} needs a torch.nn.Module, got {type(model).__name__}")
    return model


def capture_any(
    model: nn.Module,
    diagnostics: Diagnostics,
    example_inputs: object,
    steering: Steering,
    *,
    trains: bool,
) -> Captured:
    """Capture ``model`` in the first way that works.

    Args:
        model: any module. It is not touched.
        diagnostics: takes a warning where it is not the trace.
        example_inputs: as for ``prepare_fx``.
        steering: of the capture.
        trains: the result is to train: its parameters are its own, and it is not exported.

    Raises:
        CaptureError: no way works.
        UntraceableError: under ``steering.strict``, the model or a part of it cannot be traced.
    """
    leaves = steering.leaves(model)
    if type(model) in _RECURRENT:
        model = _held(model, example_inputs)
    swapped, untraceable = "", None
    try:
        gm = capture(
            model,
            diagnostics,
            example_inputs,
            share=not trains,
            trains=trains,
            leaves=leaves,
            concrete_args=steering.concrete_args,
            strict_capture=steering.strict,
        )
    except UntraceableError as error:
        if steering.strict:
            raise
        untraceable = error
        fixed = steering.concrete_args
        exported = "" if trains or leaves else _exported(model, example_inputs, fixed)
        if isinstance(exported, nn.Module):
            diagnostics.warn(
                f"{error}. Until then torch.export captured the model instead: its graph has"
                " torch's functions in the place of modules, and raises where an input does not fit"
                " what the export fixed",
                CaptureWarning,
            )
            gm = capture(exported, diagnostics, example_inputs, share=True)
            give_defaults(gm.graph, fixed)
            gm.recompile()
        elif fixed:
            raise
        else:
            gm = _calling(model, example_inputs, f"{error.line}{exported}", share=not trains)
            swapped = SWAPPED
    record_shapes(gm, example_inputs, diagnostics)
    gm.update_state(ledger=build_ledger(gm))
    options = CaptureOptions(share=not trains, leaves=leaves, diagnostics=diagnostics)
    islands = find_islands(gm, example_inputs, options, swapped)
    if swapped and not any(island.parts for island in islands):
        assert untraceable is not None
        raise untraceable
    return Captured(gm, islands)


def _exported(
    model: nn.Module, example_inputs: object, fixed: Mapping[str, Any]
) -> nn.Module | str:
    """The model as torch.export captures it, with free sizes; else why it does not."""
    if example_inputs is None:
        return " (torch.export, the other way in, needs example inputs)"
    args, kwargs = as_arguments(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **{**fixed, **kwargs})
        copied = Copying(share=True, keep=False).of(model)
        with _quiet_torch():
            program = torch.export.export(
                copied,
                bound.args,
                bound.kwargs,
                dynamic_shapes=tree_map(_free_sizes, bound.arguments),
                strict=False,
            )
        return program.module()
    except Exception as error:  # noqa: BLE001  # torch.export raises many kinds
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f" (torch.export, the other way in: {shorten(text[0], _SHORT, placeholder=' ...')})"


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch.export from logging and printing what it finds wrong: our warning has a line."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _free_sizes(value: object) -> Any:
    if isinstance(value, torch.Tensor):
        return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)
    return None


def _held(model: nn.Module, example_inputs: object) -> nn.Module:
    """A module that only calls ``model``, at the path ``SWAPPED``."""
    arguments = None if example_inputs is None else as_arguments(example_inputs)
    return holder_of(SWAPPED, model, arguments)


def _calling(
    model: nn.Module, example_inputs: object, line: str, *, share: bool
) -> QuantGraphModule:
    """A graph that only calls ``model``, an island in it."""
    holder = _held(model, example_inputs)
    quiet = Diagnostics(silent=True)
    gm = capture(holder, quiet, example_inputs, share=share, leaves={SWAPPED: line})
    gm.update_state(islands=((SWAPPED, line),))
    return gm
