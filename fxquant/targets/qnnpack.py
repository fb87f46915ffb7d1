"""The ``qnnpack`` target: ARM's int8 kernels in PyTorch, derived from the rows of ``x86``.

QNNPACK's convolutions and linears write integers only, know no fused function but the clamp, and
add the bias to the integer sum.
They are exact, also for depthwise convolutions; its three-dimensional transposed convolution is
not. Everything else is PyTorch's own code, which is the same on every processor.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from fxquant.targets.guards import no_wrong_fast_path
from fxquant.targets.saturation import kernel_for
from fxquant.targets.table import Epilogue, OutputPolicy, Role, Row, Target
from fxquant.targets.x86 import X86

_ENGINES: Final = ("qnnpack",)
_WRONG: Final = {"conv_transpose3d": "QNNPACK's kernel for it gives wrong sums"}


def _row(row: Row) -> Row | None:
    """What becomes of a row of ``x86``; ``None`` where it needs another engine."""
    if row.kind in _WRONG:
        return Row(kind=row.kind, role=Role.FLOAT, reason=_WRONG[row.kind])
    if not row.static:
        return None
    clamps = {k: how for k, how in row.epilogues.items() if how is Epilogue.SATURATION}
    if not row.weight_dtypes:
        return replace(row, epilogues=clamps)
    return replace(
        row,
        epilogues=clamps,
        float_output=False,
        dynamic="",
        output=OutputPolicy.ALWAYS,
        guards=tuple(guard for guard in row.guards if guard is not no_wrong_fast_path),
    )


QNNPACK = Target(
    name="qnnpack",
    rows={row.kind: row for row in map(_row, X86.rows.values()) if row is not None},
    engines=_ENGINES,
    integer_biases=True,
    select_kernel=partial(kernel_for, engines=_ENGINES),
)
