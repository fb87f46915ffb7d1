"""Which of the exact kernels of a target runs an op: the usual one, or the fastest that was timed.

Exactness comes first: a kernel that saturates on this machine is no candidate, and where the usual
one saturates, so that weights were fitted to it, nothing else is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import fx

from fxquant.clamps import CLAMP_KINDS, bounds_of
from fxquant.errors import ConfigWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_probe import engines_for, exact_engine, is_exact
from fxquant.kernel_table import KernelTable, fastest
from fxquant.kernel_tasks import FLOATS, Task
from fxquant.lowering import Site
from fxquant.metadata import add_reason, record_of, shape_of
from fxquant.op_view import Op, attribute, op_of
from fxquant.operators import QUANTIZE
from fxquant.pairing import POINTWISE, KernelChoice, Pairing
from fxquant.targets.emit_common import (
    CONVOLUTION_POST_OPS,
    LINEAR_POST_OPS,
    has_zero_point,
    post_op,
)
from fxquant.targets.guards import is_non_overlapping
from fxquant.targets.saturation import geometry_of, packed_kernel, pairing_here, pointwise_kernel
from fxquant.targets.table import Target

CLAMP: Final = "clamp"
"""What is fused behind a task where oneDNN's own operator has no function for it."""
MEASURED: Final = "measured here"
"""How notes about times begin."""


def shown(kernel: str, task: Task) -> str:
    """A kernel's name as reports have it."""
    if kernel in FLOATS:
        return kernel.upper().replace("CONTIGUOUS", "contiguous")
    if kernel == POINTWISE:
        return "onednn::q" + ("linear" if not task.geometry.kernel else "conv") + "_pointwise"
    name = "linear_dynamic" if task.dynamic else task.form
    return f"quantized::{name} ({kernel})"


def task_of(
    op: Op, epilogues: Sequence[Op], *, integers: bool, shifted: bool, dynamic: bool = False
) -> Task | None:
    """What a kernel computes for ``op``, or ``None`` where nothing can be timed.

    Args:
        op: a convolution, a transposed one or a linear of a reference graph.
        epilogues: the ops that are fused behind it.
        integers: the result of the last of them is quantized.
        shifted: the input has a zero point other than 0.
        dynamic: activations are quantized at run time.
    """
    shape = shape_of(op.activations[0]) if op.activations else None
    geometry = geometry_of(op)
    dimensions = len(geometry.kernel)
    if shape is None or 0 in shape or len(shape) < 2 or is_non_overlapping(op):
        return None  # a transposed one without overlap runs as a 1 x 1 convolution
    if dimensions:
        geometry = replace(geometry, size=tuple(shape[-dimensions:]))
    rows = shape[0] if dimensions else math.prod(shape[:-1])
    task = Task(rows=rows, geometry=geometry, shifted=shifted, dynamic=dynamic)
    clamp = len(epilogues) == 1 and epilogues[0].name in CLAMP_KINDS
    relu = "relu" if clamp and bounds_of(epilogues[0])[0] == 0.0 else ""
    if dynamic:
        return replace(task, after=relu, integers=False, shifted=False)
    if geometry.transposed:
        return task if integers else None
    if any(other.name == "add" for other in epilogues):
        return replace(task, after="sum") if integers else replace(task, integers=False)
    post = post_op(tuple(epilogues), LINEAR_POST_OPS if not dimensions else CONVOLUTION_POST_OPS)
    if integers and (clamp or not epilogues):
        return replace(task, after=relu if post is not None else CLAMP)
    if post is None or (integers and dimensions not in (0, 2)):
        return replace(task, integers=False)
    return replace(task, after=post[0].replace("none", ""), integers=integers)


def candidates_of(task: Task, op: Op) -> tuple[KernelChoice, ...]:
    """The kernels that could run a task, the usual one first; the others are exact here."""
    geometry = geometry_of(op)  # of the size at which kernels are probed
    if task.dynamic:
        usual = exact_engine("linear")
        names = (usual, *(n for n in engines_for("linear") if n != usual))
        found = [
            KernelChoice(kernel=name, geometry=geometry, pairing=_of_dynamic(name))
            for name in names
        ]
    elif geometry.transposed:
        found = [packed_kernel(geometry, ("fbgemm",))]
    elif task.integers and task.after in ("", "relu", CLAMP):
        found = [packed_kernel(geometry, ("fbgemm",) if has_zero_point(op.node) else ())]
        found += [] if has_zero_point(op.node) else _others(task, found[0])
    else:
        found = [pointwise_kernel(geometry)]
    if found[0].pairing is not Pairing.NONE:
        return (found[0],)
    return (found[0], *(c for c in found[1:] if c.pairing is Pairing.NONE))


def _others(task: Task, usual: KernelChoice) -> list[KernelChoice]:
    geometry = usual.geometry
    names = engines_for(geometry.form)
    found = [
        replace(usual, kernel=name, pairing=pairing_here(geometry, name))
        for name in names
        if name != usual.kernel
    ]
    if task.after != CLAMP and len(geometry.kernel) in (0, 2) and "onednn" in names:
        found.append(pointwise_kernel(geometry))
    return found


def _of_dynamic(engine: str) -> Pairing:
    return Pairing.NONE if is_exact("linear", engine) else Pairing.CHANNELS


def tasks_of(gm: QuantGraphModule) -> Iterator[tuple[Op, tuple[Op, ...], Task]]:
    """The convolutions and linears of a reference graph that will be integers, and their tasks."""
    groups: dict[int, list[Op]] = {}
    for node in gm.graph.nodes:
        fusion, op = record_of(node).fusion, op_of(gm, node)
        if fusion is not None and op is not None:
            groups.setdefault(fusion.group, []).append(op)
    for node in gm.graph.nodes:
        annotation, fusion = record_of(node).annotation, record_of(node).fusion
        if annotation is None or (fusion is not None and fusion.first != node.name):
            continue
        op = op_of(gm, node)
        if op is None or not ("conv" in op.name or op.name == "linear"):
            continue
        weight, activation = annotation.weight, next(iter(annotation.inputs), None)
        if weight is None or weight.is_float or activation is None:
            continue
        behind = tuple(groups[fusion.group][1:]) if fusion is not None else ()
        last = behind[-1].node if behind else node
        integers = any(user.target is QUANTIZE for user in last.users) and len(last.users) == 1
        dynamic = activation.is_dynamic
        task = task_of(op, behind, integers=integers, shifted=_is_shifted(op), dynamic=dynamic)
        if task is not None:
            yield op, behind, task


def _is_shifted(op: Op) -> bool:
    """Whether the zero point of the integers behind the op's input is not 0."""
    source = op.activations[0]
    zero_point = source.args[2] if len(source.args) > 2 else None
    if not isinstance(zero_point, fx.Node) or zero_point.op != "get_attr":
        return False
    value = attribute(op.owner, str(zero_point.target))
    return isinstance(value, torch.Tensor) and value.dim() == 0 and int(value) != 0


def measure(
    gm: QuantGraphModule, target: Target, table: KernelTable, diagnostics: Diagnostics
) -> None:
    """Time everything that :func:`faster` will ask of a reference graph, all ops taking turns.

    The times go to the notes of the ops.

    Args:
        gm: the reference graph.
        target: what it will be lowered to.
        table: keeps the times.
        diagnostics: told where there is nothing to choose.
    """
    if target.engines or not gm.state.shapes_known:
        why = (
            f"target {target.name!r} has one engine"
            if target.engines
            else "the model was prepared without example inputs, so that no shapes are known"
        )
        diagnostics.warn(f"tune: no kernel was chosen by measurement: {why}", ConfigWarning)
        return
    work = [(op, t, tuple(c.kernel for c in candidates_of(t, op))) for op, _, t in tasks_of(gm)]
    table.measure((task, names) for _, task, names in work)
    for op, task, names in work:
        times = table.task(task, names)
        if times:
            add_reason(op.node, described(task, times, fastest(times, names[0], names)))


def faster(site: Site, usual: KernelChoice) -> KernelChoice:
    """The kernel of a site: ``usual``, or a faster exact one where a table says so.

    Args:
        site: a convolution or linear whose result is quantized.
        usual: its engine.
    """
    name = _faster(site, usual.kernel, dynamic=False)
    return usual if name == usual.kernel else replace(usual, kernel=name, pairing=Pairing.NONE)


def faster_dynamic(site: Site, usual: str) -> str:
    """The same for a linear whose activations are quantized at run time: its engine."""
    return _faster(site, usual, dynamic=True)


def _faster(site: Site, usual: str, *, dynamic: bool) -> str:
    table = site.lowering.kernels
    if table is None or site.lowering.engines:
        return usual
    integers, shifted = site.quantize is not None, _is_shifted(site.op)
    task = task_of(site.op, site.epilogues, integers=integers, shifted=shifted, dynamic=dynamic)
    if task is None:
        return usual
    names = tuple(choice.kernel for choice in candidates_of(task, site.op))
    times = table.task(task, names)
    return fastest(times, usual, names) if names[0] == usual else usual


def described(task: Task, times: dict[str, float], taken: str) -> str:
    """The times of a task in a line: what was taken first, then the others, fastest first."""
    order = sorted(times, key=lambda name: (name != taken, times[name]))
    parts = [f"{shown(name, task)} {_duration(times[name])}" for name in order]
    threads = torch.get_num_threads()
    return (
        f"{MEASURED} ({threads} thread{'s' if threads > 1 else ''}, {task.key}): {parts[0]}, taken;"
        f" {', '.join(parts[1:])}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
