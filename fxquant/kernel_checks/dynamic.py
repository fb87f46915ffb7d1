"""Kernels on float activations against the definition: dynamic linears and embedding tables.

Part of :func:`fxquant.kernel_checks.check_kernels`. Recurrent layers multiply by the same linears;
``parity`` compares them with :mod:`fxquant.recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from fxquant.kernel_probe import dynamic_quant_max, engines_for
from fxquant.kernels import embedding, embedding_bag
from fxquant.packing import pack_float16_linear, pack_linear
from fxquant.script_kernels import pack_table
from fxquant.specs import QuantSpec

_INPUTS: Final = 64
_OUTPUTS: Final = 16
_DYNAMIC: Final = QuantSpec(
    dtype=torch.uint8,
    qscheme=torch.per_tensor_affine,
    quant_min=0,
    quant_max=255,
    is_dynamic=True,
)

#: Takes the results of a kernel and the same in float64.
Compare = Callable[[Tensor, Tensor], None]


def dynamic_checks() -> Iterator[tuple[str, Callable[[Compare], None]]]:
    """Names, and checks that hand results to a comparison; ranges as this machine needs them."""
    for relu in (False, True):
        name = f"quantized::linear{'_relu' if relu else ''}_dynamic"
        for engine in engines_for("linear"):
            largest = dynamic_quant_max(_DYNAMIC, engine)
            check = _int8_linear(engine, largest, relu=relu)
            yield f"{name} ({engine}, 0..{largest})", check
        yield f"{name}_fp16", _float16_linear(relu=relu)
    for bits, ending in ((8, "byte"), (4, "4bit")):
        yield f"quantized::embedding_{ending}", _table(bits, bags=False)
        yield f"quantized::embedding_bag_{ending}", _table(bits, bags=True)


def _rows(generator: torch.Generator) -> Iterator[Tensor]:
    """Weights that overflow 16-bit pairs, whichever neighbours are paired, and random ones."""
    shape = (_OUTPUTS, _INPUTS)
    signs = torch.where(torch.arange(_OUTPUTS) % 2 == 0, 127, -127)[:, None]
    pairs = torch.where((torch.arange(_INPUTS) // 2) % 2 == 0, 1, -1)
    yield (signs * torch.ones(shape)).to(torch.int8)
    yield (signs * pairs).to(torch.int8)
    yield torch.randint(-127, 128, shape, generator=generator).to(torch.int8)


def _int8_linear(engine: str, largest: int, *, relu: bool) -> Callable[[Compare], None]:
    """Activations are whole numbers up to ``largest``, so their scale is 1: exact."""

    def run(compare: Compare) -> None:
        generator = torch.Generator().manual_seed(0)
        bias = torch.linspace(-8, 8, _OUTPUTS).round()
        operators = torch.ops.quantized
        kernel = operators.linear_relu_dynamic if relu else operators.linear_dynamic
        full = torch.full((4, _INPUTS), float(largest))
        noise = torch.randint(0, largest + 1, (4, _INPUTS), generator=generator).float()
        noise[0, 0] = largest
        for rows in _rows(generator):
            scale = torch.full((_OUTPUTS,), 2.0**-8)
            zeros = torch.zeros(_OUTPUTS, dtype=torch.int32)
            packed = pack_linear(rows, scale, zeros, bias, engine)
            for x in (full, noise):
                exact = x.double() @ rows.double().T * 2.0**-8 + bias.double()
                given = kernel(x, packed, largest <= 127)
                compare(given, exact.clamp(min=0) if relu else exact)

    return run


def _float16_linear(*, relu: bool) -> Callable[[Compare], None]:
    def run(compare: Compare) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator).half()
        bias = torch.randn(_OUTPUTS, generator=generator)
        x = torch.randn(32, _INPUTS, generator=generator)
        operators = torch.ops.quantized
        kernel = operators.linear_relu_dynamic_fp16 if relu else operators.linear_dynamic_fp16
        exact = x.double() @ weight.double().T + bias.double()
        compare(kernel(x, pack_float16_linear(weight, bias)), exact.clamp(min=0) if relu else exact)

    return run


def _table(bits: int, *, bags: bool) -> Callable[[Compare], None]:
    """Scales and offsets that float16 holds, as the rows of 4-bit tables keep them."""

    def run(compare: Compare) -> None:
        generator = torch.Generator().manual_seed(0)
        for features in (16, 7):
            table = torch.randint(0, 2**bits, (20, features), generator=generator).to(torch.uint8)
            scale = 2.0 ** torch.randint(-6, 0, (20,), generator=generator)
            zero = torch.randint(0, 8, (20,), generator=generator).float()
            packed: Any = pack_table(table, scale, zero, bits)
            values = (table.double() - zero[:, None]) * scale[:, None]
            indices = torch.randint(0, 20, (25, 3), generator=generator)
            if bags:
                given = embedding_bag(packed, indices, None, None, False, "sum", bits, features)
                compare(given, values[indices].sum(1))
            else:
                compare(embedding(packed, indices, bits, features), values[indices])

    return run
