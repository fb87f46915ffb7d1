"""The two graphs side by side: the lowered one runs, the reference one defines."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxquant.autocast import outside_modes
from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule, parts_below
from fxquant.graph_state import Stage
from fxquant.metadata import record_of
from fxquant.parity.recording import Recorder
from fxquant.parity.report import ParityReport, ParityRow
from fxquant.parity.rows import compare
from fxquant.passes.inline_references import inlined
from fxquant.passes.shift_signed import shifted
from fxquant.quantize_fx import convert_to_reference_fx
from fxquant.shapes import as_arguments


@outside_modes
def parity(
    prepared_or_reference: QuantGraphModule, int8_model: QuantGraphModule, inputs: Any
) -> ParityReport:
    """Compare every kernel of ``int8_model`` with the definition of its op.

    Args:
        prepared_or_reference: the prepared model that ``int8_model`` was converted from, or the
            result of :func:`fxquant.convert_to_reference_fx` on it.
        int8_model: the result of :func:`fxquant.convert_fx`.
        inputs: as ``example_inputs`` of :func:`fxquant.prepare_fx`.

    Returns:
        One row per kernel, in the order in which they ran; those in an island behind the others.

    Raises:
        ConfigError: the two models are not what they should be, or do not belong together.
    """
    args, kwargs = as_arguments(inputs)
    with torch.no_grad():
        rows = tuple(_rows(_reference(prepared_or_reference), int8_model, args, kwargs))
    return ParityReport(rows=rows)


def _rows(
    whole: QuantGraphModule,
    lowered: QuantGraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Iterator[ParityRow]:
    """The kernels of a graph, then those of the graphs in its islands, each at its first call."""
    reference = shifted(inlined(whole))
    _check_lowered(reference, lowered)
    nodes = {node.name: node for node in reference.graph.nodes}
    recorder = Recorder(lowered, nodes)
    parts = list(parts_below(lowered))
    with _first_calls(parts) as calls:
        recorder.run(*_in_order(lowered, args, kwargs))
    for name, node in recorder.kernels.items():
        yield compare(reference, nodes[name], node, recorder.values)
    for theirs, part in zip(parts_below(whole), parts, strict=True):
        if id(part) in calls:
            yield from _rows(theirs, part, *calls[id(part)])


@contextmanager
def _first_calls(
    parts: Iterable[nn.Module],
) -> Iterator[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Notes the arguments of the first call of each module, by its id."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in found:
            found[id(module)] = copy.deepcopy((args, kwargs))

    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _in_order(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments as an interpreter takes them, by position."""
    inputs = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
    values = list(args)
    for name in list(inputs)[len(args) :]:
        if name in kwargs:
            values.append(kwargs[name])
        elif inputs[name].args:
            values.append(inputs[name].args[0])
    return values


def _reference(model: QuantGraphModule) -> QuantGraphModule:
    stage = model.state.stage if isinstance(model, QuantGraphModule) else None
    if stage is Stage.PREPARED and model.state.target != "x86-compat":
        return convert_to_reference_fx(model)
    if stage is Stage.REFERENCE:
        return model
    if stage is Stage.PREPARED:
        raise ConfigError(
            "parity() got a model that fxquant.compat prepared, which only fxquant.compat converts"
            " as its configs say: pass the result of its convert_to_reference_fx"
        )
    raise ConfigError(
        "parity() takes a prepared or a reference model first, got"
        f" {type(model).__name__ if stage is None else f'a model that is {stage.value}'}"
    )


def _check_lowered(reference: QuantGraphModule, lowered: QuantGraphModule) -> None:
    if not isinstance(lowered, QuantGraphModule) or lowered.state.stage is not Stage.LOWERED:
        raise ConfigError(
            f"parity() takes the result of convert_fx second, got {type(lowered).__name__}"
        )
    names = {node.name for node in reference.graph.nodes}
    strangers = [
        record_of(node).stands_for
        for node in lowered.graph.nodes
        if record_of(node).stands_for not in ("", *names)
    ]
    theirs = dict(reference.named_buffers())
    different = [
        name
        for name, value in lowered.named_buffers()
        if name in theirs and not torch.equal(value, theirs[name])
    ]
    if strangers or different:
        shown = ", ".join(repr(name) for name in (*strangers, *different)[:4])
        raise ConfigError(
            "the two models do not belong together: they differ in"
            f" {len(strangers) + len(different)} op(s) or buffer(s) ({shown}). Convert both from"
            " the same prepared model, without calibrating in between"
        )
