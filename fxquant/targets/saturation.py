"""Which kernel of the ``x86`` target runs a convolution or linear here, and what it can overflow.

With VNNI (or AMX) all of them add in 32 bits. Without, the kernels pair products in 16 bits
(:mod:`fxquant.pairing`), and the weights of a layer must be such that no pair overflows:
:mod:`fxquant.weight_fit` sees to it before, and the emitters refuse what does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from torch import Tensor

from fxquant.clamps import CLAMP_KINDS
from fxquant.kernel_probe import engines_for, is_exact
from fxquant.metadata import shape_of
from fxquant.op_view import Op
from fxquant.pairing import POINTWISE, Geometry, KernelChoice, Pairing, pairing_of
from fxquant.targets.guards import expand, resolve_padding, weight_shape

_LARGEST_SIZE: Final = 64
"""Images are probed up to this size: it costs less, and no kernel was seen to change above it."""


def kernel_for(
    op: Op, epilogues: Sequence[str], *, integers: bool, engines: tuple[str, ...] = ()
) -> KernelChoice:
    """The kernel that runs ``op`` on this machine.

    Args:
        op: a convolution, a transposed one or a linear, in a float or reference graph.
        epilogues: kinds of the ops that are fused behind it.
        integers: its result is quantized.
        engines: of the target, as :attr:`fxquant.targets.table.Target.engines`.
    """
    geometry = geometry_of(op)
    if geometry.transposed:
        return transposed_kernel(op, engines)
    if engines:
        return packed_kernel(geometry, engines)
    plain = not epilogues or (len(epilogues) == 1 and epilogues[0] in CLAMP_KINDS)
    shape = shape_of(op.node)
    vector = op.name == "linear" and shape is not None and len(shape) < 2
    if integers and plain and not vector:
        return packed_kernel(geometry)
    return pointwise_kernel(geometry)


def packed_kernel(geometry: Geometry, engines: tuple[str, ...] = ()) -> KernelChoice:
    """The engine for ``quantized::*``: the fastest that is exact, else the fastest that is known.

    Args:
        geometry: of the layer.
        engines: the engines to choose from, fastest first; empty for those of x86 for the form.

    Raises:
        LoweringError: this build of torch has none of them.
    """
    names = engines or engines_for(geometry.form)
    choices = []
    for name in names:
        choices.append(_choice(geometry, name))
        if choices[-1].pairing is Pairing.NONE:
            return choices[-1]
    known = [c for c in choices if c.pairing not in (Pairing.ANY, Pairing.WRONG)]
    return (known or sorted(choices, key=lambda c: c.pairing is Pairing.WRONG))[0]


def transposed_kernel(op: Op, engines: tuple[str, ...] = ()) -> KernelChoice:
    """The kernel of a transposed convolution: a 1 x 1 convolution where one will do, or fbgemm's.

    oneDNN's kernel for transposed convolutions is plainly wrong.

    Args:
        op: the transposed convolution.
        engines: of the target, where it has its own.
    """
    geometry = geometry_of(op)
    blocks = _as_blocks(geometry)
    if blocks is None:
        return packed_kernel(geometry, engines or ("fbgemm",))
    return _choice(geometry, packed_kernel(blocks, engines).kernel)


def _as_blocks(geometry: Geometry) -> Geometry | None:
    """The 1 x 1 convolution that a transposed one without overlap is run as, or ``None``."""
    ones, zeros = (1,) * len(geometry.kernel), (0,) * len(geometry.kernel)
    others = (geometry.padding, geometry.output_padding)
    if (
        not geometry.transposed
        or len(ones) != 2
        or geometry.groups != 1
        or geometry.stride != geometry.kernel
        or geometry.dilation != ones
        or others != (zeros, zeros)
    ):
        return None
    return Geometry(
        inputs=geometry.inputs,
        outputs=geometry.outputs * math.prod(geometry.kernel),
        kernel=ones,
        size=geometry.size,
        stride=ones,
        padding=zeros,
        dilation=ones,
    )


def pointwise_kernel(geometry: Geometry) -> KernelChoice:
    """``onednn::q*_pointwise``: float results and fused functions."""
    return _choice(geometry, POINTWISE)


def refusal(choice: KernelChoice, weight: Tensor) -> str | None:
    """Why a kernel must not run with the integers ``weight``, or ``None``: int8 would be wrong."""
    if choice.pairing is Pairing.WRONG:
        return (
            f"the {choice.kernel} kernel for this {choice.geometry.form} gives wrong sums on this"
            " CPU, as a probe shows"
        )
    if choice.pairing is not Pairing.NONE and bool((choice.excess(weight) > 1).any()):
        return (
            f"the {choice.kernel} kernel adds pairs of products in 16 bits on this CPU (no VNNI),"
            f" and these weights overflow them ({choice.geometry.form})"
        )
    return None


def geometry_of(op: Op) -> Geometry:
    """The geometry of a convolution, a transposed one (as the kernel sees it) or a linear."""
    shape = weight_shape(op)
    if op.name == "linear":
        return Geometry(inputs=shape[1], outputs=shape[0])
    dimensions = int(op.name[-2])
    transposed = "transpose" in op.name
    groups = int(op.arguments["groups"])
    geometry = Geometry(
        inputs=shape[0] // groups if transposed else shape[1],
        outputs=shape[1] * groups if transposed else shape[0],
        kernel=tuple(shape[2:]),
        size=_size(op, dimensions),
        stride=tuple(expand(op.arguments["stride"], dimensions)),
        padding=tuple(expand(resolve_padding(op), dimensions)),
        dilation=tuple(expand(op.arguments["dilation"], dimensions)),
        groups=groups,
        transposed=transposed,
    )
    if not transposed:
        return geometry
    padding = tuple(expand(op.arguments["output_padding"], dimensions))
    return replace(geometry, output_padding=padding)


def _size(op: Op, dimensions: int) -> tuple[int, ...]:
    """The input size with the example inputs; 16 along each dimension where that is unknown."""
    shape = shape_of(op.activations[0]) if op.activations else None
    if shape is None or len(shape) < dimensions:
        return (16,) * dimensions
    return tuple(min(size, _LARGEST_SIZE) for size in shape[-dimensions:])


def _choice(geometry: Geometry, kernel: str) -> KernelChoice:
    return KernelChoice(kernel=kernel, geometry=geometry, pairing=pairing_here(geometry, kernel))


def pairing_here(geometry: Geometry, kernel: str) -> Pairing:
    """How ``kernel`` pairs products; each geometry is asked only where its engine saturates at all.

    A transposed convolution without overlap is asked as the convolution that it is run as.

    Args:
        geometry: of the layer.
        kernel: an engine, or :data:`fxquant.pairing.POINTWISE`.
    """
    blocks = _as_blocks(geometry)
    if blocks is not None:
        pairing = pairing_here(blocks, kernel)
        same = pairing in (Pairing.NONE, Pairing.ANY, Pairing.WRONG)
        return pairing if same else Pairing.CHANNELS  # what all are for one tap
    engine = "onednn" if kernel == POINTWISE else kernel
    form = "linear" if not geometry.kernel else "conv"
    separate_code = engine == "fbgemm" and geometry.inputs == 1 and geometry.groups > 1
    if geometry.transposed or separate_code or not is_exact(form, engine):
        return pairing_of(geometry, kernel)
    return Pairing.NONE
