"""parity: every int8 kernel against the definition of its op, fed the same integers.

The lowered graph runs once, and each kernel's inputs and output are kept. For every result, the
region of the reference graph that it stands for (``dequantize - op - epilogues - quantize``) is
then evaluated *in float64 on the integers that the kernel was given*, so differences do not
accumulate and each belongs to one kernel::

    v = f(dequantize(q1), dequantize(q2), ...) / scale + zero_point        the definition, float64
    expected = clamp(round_half_even(v), quant_min, quant_max)

PyTorch's kernels sum integers exactly and then requantize in float32: one rounding each for
``s_x * s_w``, the product with the sum, the float bias, ``1 / s_y`` and the zero point. They can
differ from ``expected`` only where ``v`` is so close to a rounding boundary that these roundings
decide (``region.ROUNDINGS``), or where it is exactly halfway and a kernel breaks the tie another
way (``aten::avg_pool2d`` rounds before it adds the zero point on channels_last inputs). Such
elements are counted as *ties*: both integers are half a step from the truth. Everything else is an
error.

=============  ======================================================
module         holds
=============  ======================================================
``run``        :func:`parity`, and which two graphs it takes
``recording``  what every value was in the lowered graph
``region``     the definition in float64, and how far float32 may err
``rows``       one kernel's result beside the definition's
``report``     what is told
=============  ======================================================
"""

from __future__ import annotations

from fxquant.parity.report import ParityReport, ParityRow
from fxquant.parity.run import parity

__all__ = ["ParityReport", "ParityRow", "parity"]
