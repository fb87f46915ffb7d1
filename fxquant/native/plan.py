"""Plans: values in one arena, steps in order, and the C++ objects made of them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.native.library import ARGUMENTS, TensorArgument, load

_ALIGNMENT: Final = 64
_SLACK: Final = 256
"""Bytes behind each buffer that kernels may read, and do not use."""


@dataclass(eq=False)
class Buffer:
    """Memory of one or more values.

    Attributes:
        size: bytes.
        slot: 0 for the arena; else which input or output of the plan it is.
        first: the step that writes it first.
        last: the step that reads it last.
        offset: in the arena, once the plan is laid out.
    """

    size: int
    slot: int = 0
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass(eq=False)
class Value:
    """A tensor of a plan: four dimensions with the channels last in memory, or fewer, contiguous.

    Attributes:
        shape: as PyTorch sees it (``[N, C, H, W]``, ``[N, C]``).
        dtype: uint8 or float32.
        scale: of uint8.
        zero_point: of uint8.
        buffer: where it lies.
        offset: bytes from the start of the buffer.
        pixel: elements from one pixel to the next; more than the channels for a slice of them.
        margin: pixels of padding on both sides of each line, in memory only.
        bytes_of: the integers that this float value is, where nobody has computed it yet.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float = 1.0
    zero_point: int = 0
    buffer: Buffer = field(default_factory=lambda: Buffer(0))
    offset: int = 0
    pixel: int = 0
    margin: int = 0
    bytes_of: Value | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``n, h, w, c``."""
        if len(self.shape) == 4:
            n, c, h, w = self.shape
            return n, h, w, c
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows, 1, 1, self.shape[-1]

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == torch.float32 else 1

    def argument(self) -> TensorArgument:
        """For C++, once the buffers are laid out."""
        n, h, w, c = self.sizes
        start = self.buffer.offset + self.offset + self.margin * self.pixel * self.element
        row = (w + 2 * self.margin) * self.pixel
        return TensorArgument(self.buffer.slot, start, n, h, w, c, self.pixel, row)


@dataclass
class Step:
    """One step: its kind, the values it reads and writes, other fields, and whose work it does."""

    kind: str
    reads: Mapping[str, Value]
    out: Value
    fields: dict[str, Any]
    keep: tuple[Tensor, ...] = ()
    node: str = ""


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What a step is, for reports.

    Attributes:
        kind: of the step.
        node: the node of the lowered graph that it carries out.
        shape: of the result.
        macs: multiply-accumulates.
        detail: window, stride and groups of a convolution.
    """

    kind: str
    node: str
    shape: tuple[int, ...]
    macs: int
    detail: str

    @staticmethod
    def of(step: Step) -> StepInfo:
        """Of a step that is being built."""
        if step.kind != "convolution":
            return StepInfo(step.kind, step.node, step.out.shape, 0, "")
        f, inputs = step.fields, step.reads["in_"].sizes[3]
        each = inputs // f["groups"] * f["kernel_h"] * f["kernel_w"]
        n, h, w, c = step.out.sizes
        detail = f"{f['kernel_h']}x{f['kernel_w']}/{f['stride_h']} from {inputs}"
        if f["groups"] > 1:
            detail += ", depthwise" if f["depthwise"] else f", {f['groups']} groups"
        if "other" in step.reads:
            detail += " + sum"
        return StepInfo("convolution", step.node, step.out.shape, n * h * w * c * each, detail)


class PlanBuilder:
    """Collects values and steps; :meth:`build` lays them out."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.slots = 1
        self.node = ""  # whose steps are being added

    def value(
        self,
        shape: Iterable[int],
        dtype: torch.dtype,
        *,
        scale: float = 1.0,
        zero_point: int = 0,
        pixel: int | None = None,
        margin: int = 0,
    ) -> Value:
        """A new value in the arena."""
        made = Value(tuple(shape), dtype, scale, zero_point, margin=margin)
        n, h, w, c = made.sizes
        made.pixel = c if pixel is None else pixel
        made.buffer = Buffer(n * h * (w + 2 * margin) * made.pixel * made.element)
        return made

    def external(
        self, shape: Iterable[int], dtype: torch.dtype, *, scale: float = 1.0, zero_point: int = 0
    ) -> Value:
        """A value in memory that the caller brings."""
        made = self.value(shape, dtype, scale=scale, zero_point=zero_point)
        made.buffer.slot = self.slots
        self.slots += 1
        return made

    def like(self, value: Value, **changes: Any) -> Value:
        """Another view of the memory of ``value``."""
        given: dict[str, Any] = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return Value(**(given | changes))

    def hand_over(self, value: Value) -> bool:
        """Let the last step write ``value`` where the caller can have it, if that is all it is.

        Floats only: kernels that read bytes read a little further than they use. Nothing else may
        have touched its memory: the caller brings it just in front of that step.
        """
        if not self.steps or self.steps[-1].out is not value or value.buffer.slot:
            return False
        if any(step.out.buffer is value.buffer for step in self.steps[:-1]):
            return False
        if value.dtype != torch.float32 or value.offset or value.pixel != value.sizes[3]:
            return False
        value.buffer.slot = self.slots
        self.slots += 1
        return True

    def add(
        self,
        kind: str,
        reads: Mapping[str, Value],
        out: Value,
        keep: tuple[Tensor, ...] = (),
        **fields: Any,
    ) -> Value:
        """Append a step; its result."""
        self.steps.append(Step(kind, reads, out, fields, keep, self.node))
        return out

    def build(self, store: Store | None = None) -> Plan:
        """The plan, with its arena laid out and its weights packed, in ``store`` if given."""
        arena = _lay_out(self.steps)
        return Plan(self.steps, arena, self.slots, store or Store())


def _lay_out(steps: list[Step]) -> int:
    """Give every buffer a place that no other one has at the same time; the size of the arena."""
    buffers: dict[int, Buffer] = {}
    for index, step in enumerate(steps):
        for value in (*step.reads.values(), step.out):
            buffer = value.buffer
            if buffer.slot:
                continue
            buffers[id(buffer)] = buffer
            if buffer.first < 0:
                buffer.first = index
            buffer.last = index
    placed: list[Buffer] = []
    end = 0
    for buffer in sorted(buffers.values(), key=lambda b: -b.size):
        size = _padded(buffer.size)
        neighbours = sorted(
            (b for b in placed if b.first <= buffer.last and buffer.first <= b.last),
            key=lambda b: b.offset,
        )
        offset = 0
        for other in neighbours:
            if offset + size <= other.offset:
                break
            offset = max(offset, other.offset + _padded(other.size))
        buffer.offset = offset
        placed.append(buffer)
        end = max(end, offset + size)
    return end


def _padded(size: int) -> int:
    return -(-(size + _SLACK) // _ALIGNMENT) * _ALIGNMENT


class Store:
    """Packed weights, which the plans of one model share."""

    def __init__(self) -> None:
        library = load()
        self._bytes = library.fxq_store_bytes
        self.handle = ctypes.c_void_p(library.fxq_store_create())
        self._identities: dict[str, int] = {}
        weakref.finalize(self, library.fxq_store_destroy, self.handle)

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self._bytes(self.handle))

    def identity(self, node: str) -> int:
        """The number of a node of the model."""
        return self._identities.setdefault(node, len(self._identities))


class Plan:
    """A laid-out plan. Immutable, so that any number of threads may run it at once.

    Attributes:
        steps: what is run, in order.
        arena: bytes of scratch memory that a call needs.
        slots: number of pointers that a call takes, the arena's first.
    """

    def __init__(self, steps: list[Step], arena: int, slots: int, store: Store) -> None:
        library = load()
        self.arena, self.slots = arena, slots
        self.steps = tuple(map(StepInfo.of, steps))
        self._run = library.fxq_plan_run
        self._plan = ctypes.c_void_p(library.fxq_plan_create(store.handle))
        weakref.finalize(self, library.fxq_plan_destroy, self._plan)
        for step in steps:
            structure: Any = ARGUMENTS[step.kind]
            arguments = structure(out=step.out.argument())
            if step.kind == "convolution":
                arguments.identity = store.identity(step.node)
            for name, value in step.reads.items():
                setattr(arguments, name, value.argument())
            for name, value in step.fields.items():
                if not hasattr(arguments, name):
                    raise AttributeError(f"{structure.__name__} has no field {name!r}")
                setattr(arguments, name, value)
            getattr(library, f"fxq_add_{step.kind}")(self._plan, ctypes.byref(arguments))

    def run(self, slots: Any, first: int, last: int, threads: int) -> bool:
        """Run steps ``first`` to ``last - 1``.

        Args:
            slots: array of ``c_void_p``.
            first: index of a step.
            last: one behind the last step.
            threads: how many threads share each step.

        Returns:
            ``False`` where a number was NaN or a range infinite: the results are of no use.
        """
        return bool(self._run(self._plan, slots, first, last, threads))
