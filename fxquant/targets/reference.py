"""The ``reference`` target: the ops of ``x86``, executed as float ops between Q and DQ.

No kernel limits what a tensor may be quantized to, so the rows take every integer dtype, and
weights with a zero point.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fxquant.targets.table import Role, Row
from fxquant.targets.x86 import X86

_INTEGERS: Final = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)


def _without_limits(row: Row) -> Row:
    """A row of ``x86`` for any integers."""
    if row.role is Role.FLOAT:
        return row
    if not row.weight_dtypes:
        return replace(row, input_dtypes=_INTEGERS)
    return replace(row, input_dtypes=_INTEGERS, weight_dtypes=_INTEGERS, symmetric_weight=False)


REFERENCE = replace(
    X86,
    name="reference",
    rows={kind: _without_limits(row) for kind, row in X86.rows.items()},
    executes=False,
    select_kernel=None,
)
