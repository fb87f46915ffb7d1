"""target_info: what it says, about this machine and about others."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import pytest
import torch

import fxquant
from fxquant import target_info as public
from fxquant.errors import ConfigError
from fxquant.kernel_checks import KernelCheck
from fxquant.machine import SETTINGS
from fxquant.target_info import FORMS, target_info


@pytest.fixture
def module() -> Any:
    """The module, which the function of the same name hides as an attribute of the package."""
    import importlib

    return importlib.import_module("fxquant.target_info")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_it_is_public_and_frozen() -> None:
    info = public(kernels=False)
    assert public is target_info
    assert isinstance(info, fxquant.TargetInfo)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.vnni = True  # type: ignore[misc]  # what is tested


def test_facts() -> None:
    info = target_info("x86")
    assert info.target == "x86"
    assert info.machine == platform.machine().lower()
    assert set(info.engines) == set(torch.backends.quantized.supported_engines)
    assert info.threads == torch.get_num_threads()
    assert dict(info.versions)["torch"] == torch.__version__
    assert dict(info.versions)["fxquant"] == fxquant.__version__
    assert "v" + dict(info.versions)["oneDNN"] in torch.__config__.show()
    assert info.vnni == torch.cpu._is_vnni_supported()
    assert [form.form for form in info.forms] == list(FORMS)
    text = str(info)
    for said in (info.machine, torch.__version__, "VNNI", "64-bit", "fxquant takes"):
        assert said in text
    assert text.rstrip().endswith(info.follows[-1])
    listed = [check.kernel for check in info.kernels if not check.exact]
    assert all(kernel in text for kernel in listed)


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(ConfigError, match="x86"):
        target_info("x68")


def test_the_reference_target_has_no_kernels() -> None:
    info = target_info("reference")
    assert info.kernels == info.forms == ()
    assert info.runs
    assert "any machine" in info.follows[0]


def test_qnnpack() -> None:
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch without QNNPACK")
    info = target_info("qnnpack")
    assert all(form.chosen == "qnnpack" and form.exact for form in info.forms)
    assert info.kernels
    assert all(check.exact for check in info.kernels)


def test_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    info = target_info("x86")
    assert not info.runs
    assert info.kernels == ()
    assert "'arm64'" in info.follows[0]
    assert "target='reference'" in info.follows[0]
    assert "(cannot run here)" in str(info)


@pytest.mark.parametrize(
    ("exact", "said"),
    [
        ({"conv": ("onednn", "fbgemm"), "linear": ("fbgemm",)}, "full range 0..255"),
        ({"linear": ("fbgemm",)}, "conv, grouped, depthwise saturate in every engine"),
        ({"conv": ("fbgemm",), "linear": ("fbgemm",)}, "conv goes to fbgemm"),
    ],
)
def test_what_follows_from_exactness(
    module: Any, monkeypatch: pytest.MonkeyPatch, exact: dict[str, Any], said: str
) -> None:
    if "conv" in exact:
        exact = {**exact, "grouped": exact["conv"], "depthwise": exact["conv"]}

    def is_exact(form: str, engine: str) -> bool:
        return engine in exact.get(form, ())

    def exact_engine(form: str) -> str:
        engines = module.engines_for(form)
        return next((e for e in engines if is_exact(form, e)), engines[0])

    monkeypatch.setattr(module, "is_exact", is_exact)
    monkeypatch.setattr(module, "exact_engine", exact_engine)
    assert said in " ".join(target_info(kernels=False).follows)


def test_what_follows_where_an_engine_lacks(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant import kernel_probe

    monkeypatch.setattr(kernel_probe, "available", lambda name: False)
    info = target_info(kernels=False)
    assert all(form.chosen is None for form in info.forms)
    assert "No engine runs conv, grouped, depthwise, linear" in info.follows[0]
    assert "none" in str(info)


def test_what_follows_from_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    info = target_info(kernels=False)
    follows = " ".join(info.follows)
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX keeps int8 kernels" in follows
    assert "4096 threads" in follows
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX" in str(info)


def test_a_wrong_kernel_is_listed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (
        KernelCheck(kernel="good", elements=10, wrong=0, ties=2, worst=1.0),
        KernelCheck(kernel="bad", elements=10, wrong=3, ties=0, worst=77.0),
        KernelCheck(kernel="gone", elements=0, wrong=0, ties=0, worst=0.0, absent=True),
    )
    monkeypatch.setattr(module, "check_kernels", lambda engines: checks)
    text = str(target_info())
    assert "2 kernels, 20 results" in text
    assert "1 exact (1 of them break ties" in text
    assert "by up to 77 steps" in text
    assert "Not used, since not exact: bad." in text
