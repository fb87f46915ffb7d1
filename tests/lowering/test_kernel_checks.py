"""Every kernel of the target against 64-bit integers, on this CPU and on emulated older ones."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxquant.engines import engine
from fxquant.kernel_checks import KernelCheck, check_kernels, exact_sums, layers
from fxquant.kernel_checks.tally import Tally
from fxquant.kernel_checks.worst_cases import FORMS
from fxquant.op_catalog import KIND_BY_NAME
from fxquant.pairing import Geometry, Pairing, pairs
from fxquant.targets.table import Role
from fxquant.targets.x86 import X86

_CHILD = """
import json
from dataclasses import asdict
from fxquant.kernel_checks import check_kernels
print(json.dumps([asdict(check) for check in check_kernels()]))
"""
_CPUS: dict[str, dict[str, str]] = {
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2-vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "avx512-vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
_ATEN = {"sse41": "default", "avx2": "avx2", "avx2-vnni": "avx2"}
_DEPTHWISE_FBGEMM = {f"quantized::conv{d}d (depthwise fbgemm)" for d in (2, 3)}


@functools.cache
def _on(cpu: str) -> dict[str, KernelCheck]:
    environment = {**os.environ, **_CPUS[cpu], "OMP_NUM_THREADS": "1"}
    if cpu in _ATEN:
        environment["ATEN_CPU_CAPABILITY"] = _ATEN[cpu]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return {row["kernel"]: KernelCheck(**row) for row in rows}


@functools.cache
def _here() -> dict[str, KernelCheck]:
    return {check.kernel: check for check in check_kernels()}


def test_here_only_depthwise_fbgemm_saturates() -> None:
    """This holds on a CPU with VNNI; without, see the next tests."""
    found = {name for name, check in _here().items() if not check.exact}
    if not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI")
    assert found == _DEPTHWISE_FBGEMM


@pytest.mark.parametrize("cpu", ["avx512-vnni", pytest.param("avx2-vnni", marks=pytest.mark.slow)])
def test_with_vnni_the_same(cpu: str) -> None:
    assert {name for name, check in _on(cpu).items() if not check.exact} == _DEPTHWISE_FBGEMM


@pytest.mark.parametrize(
    "cpu",
    [
        "avx2",
        pytest.param("avx512", marks=pytest.mark.slow),
        pytest.param("sse41", marks=pytest.mark.slow),
    ],
)
def test_without_vnni_what_multiplies_saturates_and_the_rest_is_exact(cpu: str) -> None:
    found = _on(cpu)
    wrong = {name for name, check in found.items() if not check.exact}
    layers = {n for n in found if "conv" in n or ("linear" in n and "upsample" not in n)}
    layers -= {n for n in found if "dynamic" in n}  # they halve their activations
    assert any("linear_dynamic" in n and "0..127" in n for n in found)
    exact = {n for n in layers if "depthwise" in n and "fbgemm" not in n}
    if cpu == "avx512":
        exact -= {n for n in exact if "3d" in n}
    assert wrong == layers - exact
    assert all(found[name].worst > 20 for name in wrong)  # no matter of rounding


def test_no_kernel_rounds_wrongly() -> None:
    """But for ties, which some kernels break before they add the zero point."""
    for check in _here().values():
        if check.exact:
            assert check.worst <= 1
            assert check.ties < 0.4 * check.elements
            assert check.elements >= 300


@pytest.mark.parametrize("name", ["qnnpack", "fbgemm", "onednn"])
def test_the_global_engine_changes_no_kernel(name: str) -> None:
    """``clamp``, ``avg_pool2d`` and ``add`` of PyTorch would (:mod:`fxquant.engine_free`)."""
    with engine(name):
        assert {check.kernel: check for check in check_kernels()} == _here()


_RECURRENT = {"lstm", "gru", "lstm_cell", "gru_cell", "rnn_cell"}  # test_lowering_dynamic


def test_every_kernel_of_the_table_is_checked() -> None:
    """Ops that only move, pick or look up bytes have nothing to compute."""
    checked = " ".join(_here())
    moving = {
        "pad", "cat", "stack", "flatten", "reshape", "view", "permute", "transpose", "squeeze",
        "unsqueeze", "slice", "chunk", "split", "tensor_split", "select", "narrow", "contiguous",
        "detach", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "roll", "flip", "repeat",
        "repeat_interleave", "expand", "unflatten", "max_pool3d", "maximum", "minimum", "amax",
        "amin",
    }  # fmt: skip
    for kind, row in X86.rows.items():
        assert kind in KIND_BY_NAME
        looks_up = row.kernel.endswith("a table of 256 bytes")
        if row.role is Role.FLOAT or kind in moving or kind in _RECURRENT or looks_up:
            continue
        for kernel in filter(None, (row.kernel, row.dynamic, row.weight_only.split("{")[0])):
            assert kernel in checked, kind


# -- the checks themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS.values(), ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_exact_sums_are_convolutions(dimensions: int, form: tuple[int, int, int]) -> None:
    inputs, outputs, groups = form
    geometry = Geometry(
        inputs=inputs // groups,
        outputs=outputs,
        kernel=(3, 2, 1)[:dimensions],
        size=(7, 6, 5)[:dimensions],
        stride=(2, 1, 3)[:dimensions],
        padding=(1, 0, 2)[:dimensions],
        dilation=(2, 1, 1)[:dimensions],
        groups=groups,
    )
    x = torch.randint(-255, 256, (2, inputs, *geometry.size))
    rows = torch.randint(-128, 128, (outputs, geometry.inputs, *geometry.kernel))
    function = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    expected = function(
        x.double(),
        rows.double(),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
    )
    given = exact_sums(geometry, x, rows)
    assert given.dtype == torch.int64
    assert torch.equal(given.double(), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_sums_are_transposed_convolutions(groups: int) -> None:
    geometry = Geometry(
        inputs=6 // groups,
        outputs=4,
        kernel=(3, 2),
        size=(5, 4),
        stride=(2, 3),
        padding=(1, 0),
        dilation=(1, 2),
        output_padding=(1, 0),
        groups=groups,
        transposed=True,
    )
    x = torch.randint(-255, 256, (2, 6, 5, 4))
    weight = torch.randint(-128, 128, (6, 4 // groups, 3, 2))
    assert torch.equal(geometry.layout(geometry.rows(weight)), weight)
    expected = F.conv_transpose2d(
        x.double(), weight.double(), None, (2, 3), (1, 0), (1, 0), groups, (1, 2)
    )
    assert torch.equal(exact_sums(geometry, x, geometry.rows(weight)).double(), expected)


def test_a_kernel_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a tie the neighbour is right too; elsewhere it is wrong."""
    tally = Tally()
    tally.integers(torch.tensor([1, 2, 3, 4]), torch.tensor([1.5, 1.5, 3.4, 3.4]).double())
    assert (tally.elements, tally.ties, tally.wrong, tally.worst) == (4, 1, 1, 1.0)
    ordinary = layers._run_packed

    def shifted(*args: Any) -> torch.Tensor:
        return (ordinary(*args).int() - 1).clamp(0, 255)

    monkeypatch.setattr(layers, "_run_packed", shifted)
    found = {check.kernel: check for check in check_kernels()}
    assert found["quantized::linear (fbgemm)"].verdict == "rounds wrongly"
    assert found["onednn::qlinear_pointwise[none]"].exact


def test_a_missing_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "available", lambda name: name != "fbgemm")
    found = {check.kernel: check for check in check_kernels()}
    assert found["quantized::linear (fbgemm)"].verdict == "not in this build"
    assert not found["quantized::linear (fbgemm)"].exact
    assert found["quantized::linear (onednn)"].exact


# -- which products are paired, measured pair by pair ---------------------------------------------

_PAIRS = """
import itertools, json, sys
import torch
from fxquant.pairing import POINTWISE, Geometry, Pairing, pairing_of, pairs, _exact, _pointwise
from fxquant.pairing import _packed
def bad(geometry, kernel):
    positions = geometry.inputs * torch.Size(geometry.kernel).numel()
    combinations = list(itertools.combinations(range(positions), 2))
    found = []
    for start in range(0, len(combinations), geometry.outputs):
        some = combinations[start : start + geometry.outputs]
        rows = torch.zeros(geometry.outputs, positions, dtype=torch.int8)
        for row, pair in zip(rows, some):
            row[list(pair)] = 127
        rows = rows.reshape(geometry.outputs, geometry.inputs, *geometry.kernel)
        x = torch.full((1, geometry.inputs * geometry.groups, *geometry.size), 255).to(torch.uint8)
        if kernel == POINTWISE:
            given = _pointwise(geometry, x, rows)
        else:
            bias = torch.full((geometry.outputs,), -64770.0)
            given = (_packed(geometry, kernel, x, rows, bias).double() - 128) * 4000 + 64770
        sums = given.flatten(2).amin((0, 2)) if geometry.kernel else given.amin(0)
        found += [pair for pair, total in zip(some, sums) if float(total) < 60000]
    return found
each = (1, 1)
plane = dict(kernel=(3, 3), size=(6, 6), stride=each, padding=(0, 0), dilation=each)
cases = {
    "linear": Geometry(inputs=21, outputs=16),
    "even": Geometry(inputs=4, outputs=16, **plane),
    "odd": Geometry(inputs=3, outputs=16, **plane),
    "groups": Geometry(inputs=4, outputs=16, groups=2, **plane),
    "grey": Geometry(inputs=1, outputs=16, **plane),
    "twice": Geometry(inputs=1, outputs=32, groups=16, **plane),
}
result = {}
for name, geometry in cases.items():
    for kernel in ("onednn", POINTWISE, "fbgemm"):
        pairing = pairing_of(geometry, kernel)
        expected = []
        if pairing is not Pairing.NONE:
            first, second = pairs(geometry.inputs, geometry.kernel, pairing)
            expected = sorted(sorted(p) for p in zip(first.tolist(), second.tolist()))
        right = expected == sorted(map(list, bad(geometry, kernel)))
        result[f"{name} {kernel}"] = [pairing.name, right]
print(json.dumps(result))
"""


@pytest.mark.parametrize(
    "cpu",
    [
        "avx512",
        pytest.param("avx2", marks=pytest.mark.slow),
        pytest.param("sse41", marks=pytest.mark.slow),
        pytest.param("avx512-vnni", marks=pytest.mark.slow),
    ],
)
def test_pairing_is_what_single_pairs_show(cpu: str) -> None:
    """One weight of 127 at each of two positions, for every two positions of a row."""
    environment = {**os.environ, **_CPUS[cpu], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PAIRS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name for name, (_, right) in found.items() if not right} == set()
    if "vnni" in cpu:
        assert {pairing for pairing, _ in found.values()} == {"NONE"}
        return
    assert found["linear onednn"][0] == found["linear fbgemm"][0] == "CHANNELS"
    assert found["odd onednn"][0] == found["odd pointwise"][0] == "CHANNELS"
    assert found["odd fbgemm"][0] == found["grey fbgemm"][0] == "FLAT"
    assert found["grey pointwise"][0] == ("ROWS" if cpu == "avx512" else "NONE")


def test_pairs_are_disjoint() -> None:
    whole = (Pairing.FLAT, Pairing.ROWS, Pairing.COLUMNS)
    for pairing, count in {Pairing.CHANNELS: 24, **dict.fromkeys(whole, 30)}.items():
        first, second = pairs(5, (3, 2), pairing)
        positions = torch.cat([first, second]).tolist()
        assert len(set(positions)) == len(positions)
        assert len(positions) == count
