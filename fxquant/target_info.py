"""What a target can do on this machine, measured, and what follows from it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from tabulate import tabulate

from fxquant._version import __version__
from fxquant.engines import available
from fxquant.errors import LoweringError
from fxquant.kernel_checks import KernelCheck, check_kernels
from fxquant.kernel_probe import engines_for, exact_engine, is_exact
from fxquant.machine import architecture, instruction_sets, settings
from fxquant.targets.registry import missing_kernels, target_named
from fxquant.targets.table import Target

FORMS: Final = ("conv", "grouped", "depthwise", "linear")
"""What a form of convolution or linear is called, as in :mod:`fxquant.kernel_probe`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormInfo:
    """Which engine runs one form of convolution or linear.

    Attributes:
        form: ``conv``, ``grouped``, ``depthwise`` or ``linear``.
        engines: engine -> ``exact``, ``saturates`` or ``not in this build``, as pairs.
        chosen: the engine that fxquant takes; ``None`` where there is none.
        exact: whether that engine adds the largest integers without saturating.
    """

    form: str
    engines: tuple[tuple[str, str], ...]
    chosen: str | None
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """What :func:`target_info` found; ``print`` it, or read it.

    Attributes:
        target: name of the target.
        runs: whether its kernels run on this machine (for ``reference``: float ops, always).
        machine: architecture, such as ``x86_64``.
        system: operating system.
        cpu: the vector code that torch's own kernels use, such as ``AVX512``.
        isa: instruction sets of the processor that int8 kernels use, as torch finds them.
        vnni: whether torch finds AVX512-VNNI. Kernels may be exact without: ``forms`` tells.
        engines: engines of this build of torch.
        threads: threads of torch.
        cpus: processors of the machine.
        versions: package -> version, as pairs.
        settings: environment variables that are set and change kernels, as pairs.
        forms: which engine runs which form, asked of the kernels.
        kernels: every kernel against 64-bit integers.
        follows: what follows from all this, a sentence each.
    """

    target: str
    runs: bool
    machine: str
    system: str
    cpu: str
    isa: tuple[str, ...]
    vnni: bool
    engines: tuple[str, ...]
    threads: int
    cpus: int
    versions: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    forms: tuple[FormInfo, ...]
    kernels: tuple[KernelCheck, ...]
    follows: tuple[str, ...]

    def __str__(self) -> str:
        facts = [
            ["target", f"{self.target}{'' if self.runs else ' (cannot run here)'}"],
            ["machine", f"{self.machine}, {self.system}"],
            ["CPU", f"{', '.join(self.isa) or 'no vector extension that int8 uses'}"],
            ["VNNI", "yes" if self.vnni else "no"],
            ["torch's kernels", self.cpu],
            ["threads", f"{self.threads} of torch, {self.cpus} CPUs"],
            ["engines", ", ".join(self.engines)],
            ["versions", ", ".join(f"{name} {version}" for name, version in self.versions)],
        ]
        if self.settings:
            facts.append(["set", ", ".join(f"{name}={value}" for name, value in self.settings)])
        parts = [tabulate(facts, tablefmt="plain", disable_numparse=True)]
        if self.forms:
            parts.append(self._forms())
        if self.kernels:
            parts.append(self._kernels())
        parts.append("\n".join(self.follows))
        return "\n\n".join(parts)

    def _forms(self) -> str:
        names = [name for name, _ in self.forms[0].engines]
        rows = [
            [form.form, *(said for _, said in form.engines), form.chosen or "none"]
            for form in self.forms
        ]
        headers = ["form", *names, "fxquant takes"]
        return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)

    def _kernels(self) -> str:
        present = [check for check in self.kernels if not check.absent]
        wrong = [check for check in present if not check.exact]
        ties = sum(bool(check.ties) for check in present if check.exact)
        results = sum(check.elements for check in present)
        text = (
            f"{len(present)} kernels, {results:,} results in the worst cases against 64-bit"
            f" integers: {len(present) - len(wrong)} exact"
            + (f" ({ties} of them break ties another way than half to even)" if ties else "")
        )
        if not wrong:
            return text + "."
        rows = [(c.kernel, c.elements, c.wrong, c.verdict) for c in wrong]
        headers = ("not exact", "results", "wrong", "verdict")
        table = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
        return f"{text}, {len(wrong)} not.\n\n{table}"


def target_info(name: str = "x86", *, kernels: bool = True) -> TargetInfo:
    """Say which int8 kernels of a target run on this machine, and whether they can be trusted.

    Args:
        name: of a target: ``"x86"``, ``"x86-compat"``, ``"qnnpack"`` or ``"reference"``.
        kernels: also check every kernel against 64-bit integers, which takes a second or two.

    Returns:
        A printable :class:`TargetInfo`.

    Raises:
        ConfigError: there is no such target.
    """
    target = target_named(name)
    lack = missing_kernels(target)
    forms = tuple(_form(form, target) for form in FORMS) if target.executes else ()
    checks = check_kernels(target.engines) if kernels and target.executes and lack is None else ()
    return TargetInfo(
        target=name,
        runs=lack is None,
        machine=architecture(),
        system=platform.system(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        isa=instruction_sets(),
        vnni="AVX512-VNNI" in instruction_sets(),
        engines=tuple(sorted(torch.backends.quantized.supported_engines)),
        threads=torch.get_num_threads(),
        cpus=os.cpu_count() or 1,
        versions=tuple(_versions()),
        settings=tuple(settings().items()),
        forms=forms,
        kernels=checks,
        follows=tuple(_follows(target, lack, forms, checks)),
    )


def _form(form: str, target: Target) -> FormInfo:
    names = target.engines or ("onednn", "fbgemm")
    said = tuple((name, _verdict(form, name)) for name in names)
    if target.engines:
        chosen = next((name for name in names if available(name)), None)
    else:
        chosen = _chosen(form)
    return FormInfo(
        form=form,
        engines=said,
        chosen=chosen,
        exact=chosen is not None and is_exact(form, chosen),
    )


def _chosen(form: str) -> str | None:
    try:
        engines_for(form)
    except LoweringError:
        return None
    return exact_engine(form)


def _verdict(form: str, engine: str) -> str:
    if not available(engine):
        return "not in this build"
    return "exact" if is_exact(form, engine) else "saturates"


def _versions() -> Iterator[tuple[str, str]]:
    yield "fxquant", __version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    config = torch.__config__.show()
    for name, pattern in (
        ("oneDNN", r"(?:MKL-DNN|oneDNN) v([\d.]+)"),
        ("MKL", r"Math Kernel Library Version ([\d.]+)"),
    ):
        found = re.search(pattern, config)
        if found:
            yield name, found[1]
    for name, flag in (("FBGEMM", "USE_FBGEMM"), ("QNNPACK", "USE_PYTORCH_QNNPACK")):
        if f"-D{flag}" in config:
            yield name, "of torch"


def _follows(
    target: Target,
    lack: str | None,
    forms: tuple[FormInfo, ...],
    checks: tuple[KernelCheck, ...],
) -> Iterator[str]:
    """Advice, most important first."""
    if not target.executes:
        yield (
            "The reference target computes on the integers of int8 in floating point: on any"
            " machine and device, slower than the float model. It is for looking at, for export,"
            " and for machines without int8 kernels."
        )
        return
    if lack is not None:
        other = " or 'qnnpack'" if not target.engines and available("qnnpack") else ""
        yield (
            f"Target {target.name!r} cannot run here: {lack}. prepare_fx takes 'reference' instead,"
            f" with a warning; pass target='reference'{other} to choose."
        )
        return
    yield from _of_exactness(target, forms)
    known_exact = all(form.exact for form in forms)
    avoided = [check.kernel for check in checks if not check.exact and not check.absent]
    if avoided and known_exact:
        yield f"Not used, since not exact: {', '.join(avoided)}."
    yield from _of_settings()


def _of_exactness(target: Target, forms: tuple[FormInfo, ...]) -> Iterator[str]:
    absent = [form.form for form in forms if form.chosen is None]
    inexact = [form.form for form in forms if form.chosen is not None and not form.exact]
    if absent:
        yield (
            f"No engine runs {', '.join(absent)} in int8 in this build of torch: pass"
            " target='reference' to prepare_fx, which computes the same integers in floating point."
        )
    if inexact:
        yield (
            f"{', '.join(inexact)} saturate in every engine here: without VNNI the kernels add"
            " pairs of products in 16 bits. convert_fx therefore reduces the weight range of the"
            " output channels that could overflow, says so in one warning, and what it computes is"
            " exact; it costs up to 6 dB of these channels' weights. There is no need to halve the"
            " range of activations (torch.ao's default for such CPUs)."
        )
    if not absent and not inexact:
        yield (
            "Convolutions and linears are computed exactly: activations keep the full range"
            " 0..255, and halving it (torch.ao's default) would only cost accuracy."
        )
    fallen = [
        f"{form.form} goes to {form.chosen}"
        for form in forms
        if form.exact and not target.engines and form.chosen != engines_for(form.form)[0]
    ]
    if fallen:
        yield f"The fastest engine saturates here, so {', '.join(fallen)}."


def _of_settings() -> Iterator[str]:
    found = settings()
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS"):
        if name in found:
            yield (
                f"{name}={found[name]} keeps int8 kernels from using all of this processor; unset"
                " it unless that is wanted."
            )
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        yield "torch's own kernels run without vector code here, so int8 will hardly be faster."
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    if threads > cpus:
        yield (
            f"torch has {threads} threads for {cpus} CPUs: they get in each other's way. Call"
            f" torch.set_num_threads({cpus}) or set OMP_NUM_THREADS."
        )
