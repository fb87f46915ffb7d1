"""Targets by name."""

from __future__ import annotations

from fxquant.engines import available
from fxquant.errors import ConfigError, Diagnostics, LoweringWarning, did_you_mean
from fxquant.machine import architecture, is_x86
from fxquant.targets.compat import X86_COMPAT
from fxquant.targets.qnnpack import QNNPACK
from fxquant.targets.reference import REFERENCE
from fxquant.targets.table import Target
from fxquant.targets.x86 import X86

TARGETS: dict[str, Target] = {
    target.name: target for target in (X86, X86_COMPAT, QNNPACK, REFERENCE)
}


def target_named(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ConfigError: there is none.
    """
    found = TARGETS.get(name)
    if found is None:
        raise ConfigError(
            f"target {name!r} is not supported; known are {', '.join(sorted(TARGETS))}"
            + did_you_mean(name, TARGETS)
        )
    return found


def target_here(name: str, diagnostics: Diagnostics) -> Target:
    """The target called ``name``, or ``reference`` with a warning where its kernels are not.

    Args:
        name: of a target.
        diagnostics: takes the warning.

    Raises:
        ConfigError: there is no such target.
        StrictModeError: under ``strict``, where its kernels are not.
    """
    target = target_named(name)
    lack = missing_kernels(target)
    if lack is None:
        return target
    other = (
        ". This build of torch has the engine of target='qnnpack', which runs int8 here"
        if target is not QNNPACK and available("qnnpack")
        else ""
    )
    diagnostics.warn(
        f"target {name!r} cannot run here: {lack}. The model is quantized for target 'reference',"
        " which computes on the same integers in floating point and is slower than the float model"
        f"{other}. Pass target='reference' to say that this is wanted",
        LoweringWarning,
    )
    return REFERENCE


def missing_kernels(target: Target) -> str | None:
    """Why the kernels of a target cannot run on this machine, or ``None``."""
    if not target.executes:
        return None
    if target.engines:
        found = any(available(engine) for engine in target.engines)
        lack = f"this build of torch has no engine {' or '.join(map(repr, target.engines))}"
        return None if found else lack
    if not is_x86():
        return f"its kernels are for x86 processors, and this machine is {architecture()!r}"
    if not (available("onednn") or available("fbgemm")):
        return "this build of torch has neither engine of x86 ('onednn', 'fbgemm')"
    return None
