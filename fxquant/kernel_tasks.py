"""What is timed to choose a kernel: one op with its shapes, on each kernel that could run it.

The operands are random integers. A kernel's time depends on shapes, not on values, but for one: a
zero point other than 0 costs oneDNN a third more in small images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.engines import consume_deprecation_warning
from fxquant.kernels import as_bytes, as_quantized
from fxquant.packing import (
    pack_conv,
    pack_conv_transpose,
    pack_linear,
    pack_onednn_conv,
    pack_onednn_linear,
)
from fxquant.pairing import POINTWISE, Geometry

FLOAT: Final = "fp32"
"""The op in floating point, on what an int8 kernel before it leaves behind."""
FLOAT_CONTIGUOUS: Final = "fp32 (contiguous)"
"""The same on a contiguous tensor, as most float models have them."""
FLOATS: Final = (FLOAT, FLOAT_CONTIGUOUS)

Call = Callable[[], object]

_FORMATS: Final = {4: torch.channels_last, 5: torch.channels_last_3d}
_X_SCALE: Final = 0.02
_Y_SCALE: Final = 0.1
_ZERO_POINT: Final = 100
_FUNCTIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "relu": F.relu,
    "hardtanh": F.relu6,
    "hardswish": F.hardswish,
    "swish": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
}
_SCALARS: Final[Mapping[str, list[float]]] = {"hardtanh": [0.0, 6.0], "leaky_relu": [0.01]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One op as a kernel sees it.

    Attributes:
        rows: images, or rows of a linear.
        geometry: of the layer, with the size of its input.
        after: what is fused behind it: a post-op of oneDNN, ``sum``, or nothing.
        integers: the result is quantized; otherwise the kernel writes float32.
        shifted: the zero point of the input is not 0.
        dynamic: activations are quantized at run time.
    """

    rows: int
    geometry: Geometry
    after: str = ""
    integers: bool = True
    shifted: bool = False
    dynamic: bool = False

    @property
    def form(self) -> str:
        """``conv2d``, ``conv_transpose2d``, ``linear``, ``dynamic linear``, ..."""
        kernel = self.geometry.kernel
        if not kernel:
            return "dynamic linear" if self.dynamic else "linear"
        return f"conv{'_transpose' if self.geometry.transposed else ''}{len(kernel)}d"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``[rows, channels, *size]``."""
        return (self.rows, self.geometry.inputs * self.geometry.groups, *self.geometry.size)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Size of the result along each dimension; ``()`` for a linear."""
        g = self.geometry
        if not g.transposed:
            parts = zip(g.size, g.kernel, g.stride, g.padding, g.dilation, strict=True)
            return tuple((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in parts)
        parts = zip(g.size, g.kernel, g.stride, g.padding, g.dilation, strict=True)
        grown = [(s - 1) * t - 2 * p + d * (k - 1) + 1 for s, k, t, p, d in parts]
        return tuple(s + more for s, more in zip(grown, g.output_padding, strict=True))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``[rows, channels, *size]``."""
        return (self.rows, self.geometry.outputs, *self.output_size)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        g = self.geometry
        positions = math.prod(g.size if g.transposed else self.output_size)
        channels = g.inputs * (g.outputs // g.groups if g.transposed else g.outputs)
        channels *= g.groups if g.transposed else 1
        return self.rows * positions * channels * math.prod(g.kernel)

    @property
    def key(self) -> str:
        """The same for ops that take the same time, as people read it."""
        g = self.geometry
        weight = (g.outputs, g.inputs, *g.kernel)
        options = [("stride", g.stride, 1), ("padding", g.padding, 0), ("dilation", g.dilation, 1)]
        options.append(("output_padding", g.output_padding, 0))
        parts = [f"{self.form} {_times(self.input_shape)} by {_times(weight)}"]
        parts += [f"{n} {_times(v)}" for n, v, usual in options if any(i != usual for i in v)]
        parts += [f"groups {g.groups}"] if g.groups != 1 else []
        parts += [self.after] if self.after else []
        parts += ["shifted"] if self.shifted else []
        parts += [] if self.integers else ["to fp32"]
        return ", ".join(parts)


def _times(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def calls_of(task: Task, kernels: tuple[str, ...]) -> dict[str, Call]:
    """A call of each kernel.

    Args:
        task: what it is to compute.
        kernels: engines, :data:`~fxquant.pairing.POINTWISE` and :data:`FLOATS`.
    """
    consume_deprecation_warning()
    operands = _Operands(task)
    return {name: operands.call(name) for name in kernels}


def conversion_calls(shape: tuple[int, ...]) -> dict[str, Call]:
    """What lies between an int8 kernel and a float op on a tensor of ``shape``, both ways."""
    consume_deprecation_warning()
    floats = _channels_last(torch.randn(shape))
    integers = torch.quantize_per_tensor(floats, _X_SCALE, _ZERO_POINT, torch.quint8)
    return {
        "quantize": lambda: torch.quantize_per_tensor(floats, _X_SCALE, _ZERO_POINT, torch.quint8),
        "dequantize": integers.dequantize,
    }


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_FORMATS.get(x.dim(), torch.contiguous_format))


class _Operands:
    """Inputs and weights of a task, made once for all kernels."""

    def __init__(self, task: Task) -> None:
        g = task.geometry
        generator = torch.Generator().manual_seed(0)
        self.task = task
        self.zero_point = _ZERO_POINT if task.shifted else 0
        bytes_in = torch.randint(0, 256, task.input_shape, generator=generator)
        self.x = _channels_last(bytes_in.to(torch.uint8))
        self.q = torch._make_per_tensor_quantized_tensor(self.x, _X_SCALE, self.zero_point)
        rows = torch.randint(-127, 128, (g.outputs, g.inputs, *g.kernel), generator=generator).to(
            torch.int8
        )
        self.weight = g.layout(rows).contiguous()
        self.scales = torch.full((g.outputs,), 0.005)
        self.zeros = torch.zeros(g.outputs, dtype=torch.int32)
        self.bias = torch.randn(g.outputs, generator=generator)
        other = torch.zeros(task.output_shape if task.after == "sum" else (0,), dtype=torch.uint8)
        self.other = _channels_last(other)
        self.before = (list(g.stride), list(g.padding))
        self.behind = (list(g.dilation), g.groups)

    def call(self, kernel: str) -> Call:
        """A call of one kernel."""
        if kernel in FLOATS:
            return self._float(contiguous=kernel == FLOAT_CONTIGUOUS)
        linear = not self.task.geometry.kernel
        if kernel == POINTWISE:
            return self._pointwise_linear() if linear else self._pointwise_conv()
        return self._packed_linear(kernel) if linear else self._packed_conv(kernel)

    # -- quantized:: --------------------------------------------------------------------------

    def _packed_conv(self, engine: str) -> Call:
        g = self.task.geometry
        dimensions = len(g.kernel)
        relu = "_relu" if self.task.after == "relu" else ""
        if g.transposed:
            packed = pack_conv_transpose(
                self.weight, self.scales[0], self.zeros[0], self.bias, dimensions,
                *self.before, list(g.output_padding), *self.behind, engine,
            )  # fmt: skip
            packet = getattr(torch.ops.quantized, f"conv_transpose{dimensions}d")
        else:
            packed = pack_conv(
                self.weight, self.scales, self.zeros, self.bias, dimensions,
                *self.before, *self.behind, engine,
            )  # fmt: skip
            packet = getattr(torch.ops.quantized, f"conv{dimensions}d{relu}")
        operator = packet.new if "new" in packet.overloads() else packet.default
        return lambda: operator(self.q, packed, _Y_SCALE, 0)

    def _packed_linear(self, engine: str) -> Call:
        packed = pack_linear(self.weight, self.scales, self.zeros, self.bias, engine)
        relu = "_relu" if self.task.after == "relu" else ""
        operators = torch.ops.quantized
        if self.task.dynamic:
            dynamic = getattr(operators, f"linear{relu}_dynamic").default
            floats = self.q.dequantize()
            return lambda: dynamic(floats, packed, False)
        operator = getattr(operators, f"linear{relu}").default
        return lambda: operator(self.q, packed, _Y_SCALE, 0)

    # -- onednn:: -----------------------------------------------------------------------------

    def _ends(self) -> tuple[Any, ...]:
        """The output's parameters and the post-op of ``onednn::q*_pointwise``."""
        task = self.task
        output = (_Y_SCALE, 0, torch.uint8) if task.integers else (1.0, 0, torch.float32)
        algorithm = "none" if task.after == "gelu" else ""
        return (*output, task.after or "none", list(_SCALARS.get(task.after, [])), algorithm)

    def _between_quantized(self, call: Callable[[Tensor], Tensor]) -> Call:
        """Where ``quantized::`` would do, the kernels around are of that family."""
        if self.task.after not in ("", "relu") or not self.task.integers:
            return lambda: call(self.x)
        return lambda: as_quantized(call(as_bytes(self.q)), _Y_SCALE, 0)

    def _pointwise_linear(self) -> Call:
        packed = pack_onednn_linear(self.weight)
        operator, ends = torch.ops.onednn.qlinear_pointwise.default, self._ends()
        return self._between_quantized(
            lambda x: operator(
                x, _X_SCALE, self.zero_point, packed, self.scales, self.zeros, self.bias, *ends
            )
        )

    def _pointwise_conv(self) -> Call:
        packed = pack_onednn_conv(
            self.weight, self.scales, *self.before, *self.behind, self.zero_point,
            list(self.task.input_shape),
        )  # fmt: skip
        quantized = (_X_SCALE, self.zero_point, packed, self.scales, self.zeros)
        if self.task.after == "sum":
            binary = torch.ops.onednn.qconv2d_pointwise.binary
            return lambda: binary(
                self.x, *quantized, self.other, self.bias, *self.before, *self.behind,
                _Y_SCALE, 0, torch.uint8, _Y_SCALE, 0, "sum", 1.0, "relu", [], "",
            )  # fmt: skip
        operator, ends = torch.ops.onednn.qconv_pointwise.default, self._ends()
        return self._between_quantized(
            lambda x: operator(x, *quantized, self.bias, *self.before, *self.behind, *ends)
        )

    # -- floating point -----------------------------------------------------------------------

    def _float(self, *, contiguous: bool) -> Call:
        g, after = self.task.geometry, self.task.after
        x = self.q.dequantize()
        x = x.contiguous() if contiguous else x
        weight = self.weight.to(torch.float32) * 0.005
        other = torch.zeros(self.task.output_shape) if after == "sum" else None
        if other is not None and not contiguous:
            other = _channels_last(other)
        function = _FUNCTIONS.get(after)
        operator = self._float_operator()
        options = {} if not g.kernel else self._float_options()

        def call() -> Tensor:
            y = operator(x, weight, self.bias, **options)
            if other is not None:
                return F.relu(y + other)
            return y if function is None else function(y)

        return call

    def _float_operator(self) -> Callable[..., Tensor]:
        found: Callable[..., Tensor] = getattr(F, self.task.form.removeprefix("dynamic "))
        return found

    def _float_options(self) -> dict[str, Any]:
        g = self.task.geometry
        found: dict[str, Any] = {
            "stride": g.stride,
            "padding": g.padding,
            "dilation": g.dilation,
            "groups": g.groups,
        }
        return found | {"output_padding": g.output_padding} if g.transposed else found
