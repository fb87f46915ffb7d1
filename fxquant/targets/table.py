"""The vocabulary of op tables: rows, epilogues and targets.

A target is data. Passes read rows; they hold no list of ops and no mode flag of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxquant.dataflow import is_float_tensor, is_number
from fxquant.op_view import Op
from fxquant.pairing import KernelChoice
from fxquant.qconfig import QConfig
from fxquant.specs import QuantSpec, default_range

if TYPE_CHECKING:
    from fxquant.targets.allow_list import AllowList


class Role(Enum):
    """What an op does to quantized values."""

    COMPUTE = "compute"
    """It has quantization parameters of its own at its output."""
    SHARES = "shares"
    """Its output has the parameters of its inputs."""
    FLOAT = "float"
    """It runs in floating point by design; the row says why."""


class Epilogue(Enum):
    """How a target runs an activation function that follows an op in one pattern."""

    SATURATION = "saturation"
    """A clamp: free where the final output range expresses it, else an integer clamp."""
    KERNEL = "kernel"
    """The kernel computes it on its float accumulator."""
    FLOAT = "float"
    """The kernel writes float, the function runs in float, its result is quantized."""


class OutputPolicy(Enum):
    """When the output of an op is quantized."""

    ALWAYS = "always"
    DEMANDED = "demanded"
    """Only where some reader wants integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One op of a target.

    Attributes:
        kind: kind of the op catalogue.
        role: what the op does to quantized values.
        kernel: what serves it, as printed by ``explain`` before lowering.
        input_dtypes: storage dtypes that its activations may have.
        weight_dtypes: storage dtypes that its weight may have; empty where it has none.
        weight_axis: channel axis of a per-channel weight; ``None`` allows per-tensor only.
        symmetric_weight: the kernels ignore the zero point of a weight, so it must be 0.
        float_output: the kernel can write float32 without quantizing.
        dynamic: the kernel for activations that are quantized at run time; empty where there is
            none. It reads and writes float32, with an int8 or float16 weight.
        dynamic_quant_max: the largest integer that activations are quantized to there.
        weight_only: the kernel for an integer weight and float activations, likewise.
        static: the op takes activations that were quantized by calibrated parameters.
        output: when the output is quantized.
        looked_up: the kernel looks results up among 256 integers: an element-wise function of one
            tensor and of numbers.
        worth_alone: a sharing op that pays in int8 even where nobody reads integers after it.
        epilogues: activation kind -> how it is run when fused behind this op.
        guards: each gives a reason to leave this call in FP32, or ``None``.
        kernel_guards: each gives a reason why the kernel does not serve this call, or ``None``: it
            is quantized all the same, and runs between dequantize and quantize.
        qconfig_guards: each gives a reason why a qconfig is not served for a call, or ``None``.
        reason: for ``Role.FLOAT``: why, with the measurement.
    """

    kind: str
    role: Role
    kernel: str = ""
    input_dtypes: tuple[torch.dtype, ...] = (torch.uint8,)
    weight_dtypes: tuple[torch.dtype, ...] = ()
    weight_axis: int | None = None
    symmetric_weight: bool = True
    float_output: bool = False
    dynamic: str = ""
    dynamic_quant_max: int = 255
    weight_only: str = ""
    static: bool = True
    output: OutputPolicy = OutputPolicy.DEMANDED
    looked_up: bool = False
    worth_alone: bool = False
    epilogues: Mapping[str, Epilogue] = field(default_factory=dict)
    guards: tuple[Callable[[Op], str | None], ...] = ()
    kernel_guards: tuple[Callable[[Op], str | None], ...] = ()
    qconfig_guards: tuple[Callable[[Op, QConfig], str | None], ...] = ()
    reason: str = ""

    def refusal(self, op: Op) -> str | None:
        """The first reason why this row does not serve ``op``, or ``None``."""
        return _first(guard(op) for guard in self.guards)

    def kernel_refusal(self, op: Op) -> str | None:
        """The first reason why its kernel does not serve ``op``, or ``None``."""
        return _first(guard(op) for guard in self.kernel_guards)

    def misfit(self, op: Op, qconfig: QConfig) -> str | None:
        """The first reason why ``qconfig`` is not served for ``op``, or ``None``."""
        return _first(guard(op, qconfig) for guard in self.qconfig_guards)


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An op table under a name.

    Attributes:
        name: what users write.
        rows: kind -> row.
        half_kinds: what it runs in float16 or bfloat16 where a qconfig asks for it.
        executes: the graph is lowered to kernels; otherwise it stays a float graph with
            quantize and dequantize.
        engines: the engines whose kernels it may use, fastest first; empty for the fastest exact
            one of x86 for each form, and oneDNN's own operators.
        integer_biases: its kernels add the bias to the integer sum, so that it is rounded.
        rounds_half_inputs: reference graphs round the inputs of ops with float16 weights to float16
            too, as torch.ao's do; kernels read float32. Ops that a backend config has in float16
            throughout are float ops between such casts.
        is_float: ``(gm, node)`` -> whether a value is taken for a float tensor; it decides where
            there are no example inputs.
        select_kernel: ``(op, epilogues, *, integers)`` -> the kernel that will run a convolution or
            linear on this machine, whose sums the weights must not overflow.
        allow: the list of a backend config that the rows were narrowed to, if they were.
        saturates_at_storage: a narrower range of an observer decides the scale only, as in
            torch.ao; values beyond it keep their integers.
    """

    name: str
    rows: Mapping[str, Row]
    executes: bool = True
    half_kinds: frozenset[str] = frozenset()
    engines: tuple[str, ...] = ()
    integer_biases: bool = False
    rounds_half_inputs: bool = False
    is_float: Callable[[fx.GraphModule, fx.Node], bool] = is_float_tensor
    select_kernel: Callable[..., KernelChoice] | None = None
    allow: AllowList | None = None
    saturates_at_storage: bool = False

    def saturation(self, spec: QuantSpec) -> tuple[int, int]:
        """The integers at which a value of ``spec`` saturates: those of its range.

        Half the levels of the storage (``reduce_range``: ``0..127``) are no bit width but a guard
        of accumulators: kernels saturate at the ends of the storage, and the range decides the
        scale only.
        """
        low, high = default_range(spec.dtype)
        if self.saturates_at_storage or (self.executes and 2 * spec.levels == high - low + 1):
            return low, high
        return spec.quant_min, spec.quant_max

    def row(self, kind: str) -> Row | None:
        """The row of a kind, or ``None``."""
        return self.rows.get(kind)

    def row_of(self, op: Op) -> Row | None:
        """The row of a call: that of ``add_scalar`` for ``x + 2`` where there is one."""
        tensors = [value for value in op.activations if not is_number(value)]
        if len(op.kind.activations) == 2 and len(tensors) == 1:
            scalar = self.rows.get(f"{op.name}_scalar")
            if scalar is not None:
                return scalar
        return self.rows.get(op.name)
