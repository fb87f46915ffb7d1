"""Every kernel of the ``x86`` target against integer arithmetic, in the worst cases it can meet.

Scales are powers of two, so that the definition is exact in 64-bit integers and float64::

    v = (sum of (x - z_x) * w) * s_x * s_w / s_y + bias / s_y + z_y
    expected = clamp(round_half_even(v), 0, 255)

Sums come from the largest integers in patterns that 16-bit pairs cannot hold (255 with ±127, signs
by pairs of channels), and from every byte with steps so fine that results lie on, and next to, the
boundary between two integers. A kernel may break a tie another way; anything else counts as wrong.

================  =============================================================
module            holds
================  =============================================================
``run``           :func:`check_kernels`, which runs all checks
``tally``         how results are compared, and what is told of a kernel
``definition``    sums of convolutions and linears in 64-bit integers
``worst_cases``   weights and images that overflow 16 bits, or lie on ties
``layers``        convolutions and linears
``every_byte``    kernels of quantized tensors, fed every byte
``elementwise``   kernels with an output scale of their own
``movers``        kernels that keep the scale
``dynamic``       kernels on float activations, and tables
================  =============================================================
"""

from __future__ import annotations

from fxquant.kernel_checks.definition import exact_sums
from fxquant.kernel_checks.run import check_kernels
from fxquant.kernel_checks.tally import KernelCheck

__all__ = ["KernelCheck", "check_kernels", "exact_sums"]
