"""Every check of a target's kernels, in one run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from torch import Tensor

from fxquant.engines import consume_deprecation_warning
from fxquant.kernel_checks.dynamic import dynamic_checks
from fxquant.kernel_checks.elementwise import elementwise
from fxquant.kernel_checks.layers import layers, layers_of
from fxquant.kernel_checks.movers import movers
from fxquant.kernel_checks.tally import AbsentError, Check, KernelCheck, Tally


def check_kernels(engines: tuple[str, ...] = ()) -> tuple[KernelCheck, ...]:
    """Run every check on this machine; takes a second or two.

    Args:
        engines: of ``quantized::``, as :attr:`fxquant.targets.table.Target.engines`; empty for
            those of x86, and oneDNN's own operators.
    """
    consume_deprecation_warning()
    found = []
    weighted = layers_of(engines) if engines else layers()
    dynamic = () if engines else _dynamic()
    for kernel, run in itertools.chain(weighted, elementwise(), movers(), dynamic):
        tally = Tally()
        absent = False
        try:
            run(tally)
        except (AttributeError, NotImplementedError, AbsentError):
            absent = True
        found.append(
            KernelCheck(
                kernel=kernel,
                elements=tally.elements,
                wrong=tally.wrong,
                ties=tally.ties,
                worst=tally.worst,
                absent=absent,
            )
        )
    return tuple(found)


def _dynamic() -> Iterator[tuple[str, Check]]:
    for kernel, run in dynamic_checks():
        yield kernel, functools.partial(_run_floats, run)


def _run_floats(run: Callable[[Callable[[Tensor, Tensor], None]], None], tally: Tally) -> None:
    run(tally.floats)
