"""Weights fitted to kernels that add pairs of products in 16 bits, on emulated CPUs without VNNI.

Each CPU is a subprocess with ``ONEDNN_MAX_CPU_ISA`` and ``FBGEMM_ENABLE_INSTRUCTIONS`` lowered.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fxquant.errors import LoweringWarning, StrictModeError
from fxquant.pairing import Geometry, KernelChoice, Pairing, excess
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.specs import QParams, QuantSpec, choose_qparams, quantize
from fxquant.weight_fit import fit

CHILD = Path(__file__).with_name("cpu_without_vnni.py")
CPUS = {
    "sse41": ("SSE41", "AVX2"),
    "avx2": ("AVX2", "AVX2"),
    "avx512": ("AVX512_CORE", "AVX512"),
    "avx2-vnni": ("AVX2_VNNI", "AVX512_E1"),
    "avx512-vnni": ("AVX512_CORE_VNNI", "AVX512_E1"),
}
OLD = (
    "avx2",
    pytest.param("avx512", marks=pytest.mark.slow),
    pytest.param("sse41", marks=pytest.mark.slow),
)
NEW = ("avx512-vnni", pytest.param("avx2-vnni", marks=pytest.mark.slow))


@functools.cache
def layers_on(cpu: str) -> Any:
    """Every layer on an emulated CPU, computed once for all tests."""
    return on(cpu, "layers")


def on(cpu: str, task: str, *arguments: str) -> Any:
    """What ``task`` of the child script prints on an emulated CPU."""
    onednn, fbgemm = CPUS[cpu]
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "FBGEMM_ENABLE_INSTRUCTIONS": fbgemm,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(CHILD), task, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("cpu", OLD)
def test_every_layer_is_exact_after_fitting(cpu: str) -> None:
    """Random and worst-case weights and inputs, every form of every op, as against the definition.

    The child also checks that the same kernels are wrong with the usual weights: what is exact
    here is so because of the fit.
    """
    found = layers_on(cpu)
    assert {row["case"] for row in found if row["unexplained"]} == set()
    fitted = {row["case"] for row in found if row["channels"]}
    assert {"conv2d wide worst", "linear worst", "conv2d groups worst", "residual worst"} <= fitted
    assert all(row["channels"] == row["outputs"] for row in found if row["case"].endswith("worst"))
    wrong = {row["case"] for row in found if row["wrong_without"]}
    assert {"conv2d wide worst", "linear worst", "conv2d groups worst"} <= wrong
    assert {row["case"] for row in found if row["channels"] and row["refused"]} == set()


@pytest.mark.parametrize("cpu", NEW)
def test_nothing_is_fitted_with_vnni(cpu: str) -> None:
    found = layers_on(cpu)
    assert all(row["channels"] == 0 and row["unexplained"] == 0 for row in found)
    assert not any(row["wrong_without"] for row in found)


def test_only_the_flagged_channels_change() -> None:
    """Against a count of pairs written out by hand, and not more than needed."""
    found = on("avx2", "channels")
    assert found["flagged"] == found["expected"]
    assert 0 < len(found["expected"]) < found["outputs"]
    assert found["unchanged_scales"]
    assert found["unchanged_integers"]
    assert found["largest_pair"] == 128
    assert found["smallest_pair_of_flagged"] >= 125
    assert found["reference_equals_lowered"]


def test_one_warning_names_layers_channels_and_cost() -> None:
    found = on("avx2", "warning")
    assert len(found["warnings"]) == 1
    text = found["warnings"][0]
    for part in ("'first' (16 of 16 channels", "'second'", "dB", "no VNNI", "explain()"):
        assert part in text
    assert "16-bit sums of onednn's kernel" in found["explained"]
    assert found["strict"] == "StrictModeError"


@pytest.mark.parametrize("cpu", OLD)
def test_an_artifact_of_a_cpu_with_vnni_is_fitted_where_it_is_loaded(
    cpu: str, tmp_path: Path
) -> None:
    from fxquant.artifact import save

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.SiLU(), nn.Flatten(),
        nn.Linear(16 * 36, 10),
    ).eval()  # fmt: skip
    x = torch.rand(2, 8, 10, 10)
    prepared = prepare_fx(model, None, (x,))
    prepared(x)
    int8 = convert_fx(prepared)
    save(int8, tmp_path / "model.safetensors")
    torch.save(x, tmp_path / "x.pt")
    found = on(cpu, "artifact", str(tmp_path))
    assert len(found["warnings"]) == 1
    assert "was quantized" in found["warnings"][0]
    assert found["changed"]  # of the buffers
    assert found["reference_equals_lowered"]
    given = torch.tensor(found["output"])
    assert float((given - int8(x)).abs().max()) < 0.1 * float(int8(x).abs().max())
    assert found["saved_again_equal"]


def test_an_artifact_of_a_cpu_without_vnni_loads_here_unchanged(tmp_path: Path) -> None:
    from fxquant.artifact import load

    found = on("avx2", "save", str(tmp_path))
    loaded = load(tmp_path / "model.safetensors", strict=True)
    x = torch.load(tmp_path / "x.pt")
    saved = load_file(tmp_path / "model.safetensors")
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[name], tensor) for name, tensor in saved.items())
    given = loaded(x)  # float32, in which kernels round where they like
    torch.testing.assert_close(given, torch.tensor(found["output"]), rtol=1e-6, atol=1e-5)


def test_a_pickle_of_a_cpu_with_vnni_is_refused_where_it_would_overflow(tmp_path: Path) -> None:
    """It cannot be lowered again: it has no calibrated weights, and neither has a state dict."""
    torch.manual_seed(0)
    worst = nn.Sequential(nn.Conv2d(32, 24, 3), nn.ConvTranspose2d(24, 8, 2, 2), nn.Conv2d(8, 4, 1))
    tame = nn.Sequential(nn.Conv2d(32, 24, 3), nn.Conv2d(24, 4, 1))
    x = torch.rand(2, 32, 8, 8)
    for layer in worst:
        nn.init.constant_(layer.weight, 0.1)
    for layer in tame:
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.weight[:, 0] = 1.0  # in no pair that overflows
    for name, model in (("worst", worst), ("tame", tame)):
        prepared = prepare_fx(model.eval(), None, (x,), bias_correction=False)
        prepared(x)
        int8 = convert_fx(prepared)
        torch.save(int8, tmp_path / f"{name}.pt")
        torch.save(int8.state_dict(), tmp_path / f"{name}.state.pt")
    found = on("avx2", "pickles", str(tmp_path))
    assert "overflows the 16-bit sums" in found["worst"]
    assert "fxquant.save" in found["worst"]
    assert found["tame"] == ""
    assert "_0_weight" in found["worst state"]
    assert "_1_weight" in found["worst state"]
    assert "_2_weight" in found["worst state"]


# -- the arithmetic of fitting --------------------------------------------------------------------

SYMMETRIC = QuantSpec(
    dtype=torch.int8, qscheme=torch.per_channel_symmetric, quant_min=-128, quant_max=127, ch_axis=0
)


def _choice(inputs: int, outputs: int, kernel: tuple[int, ...], pairing: Pairing) -> KernelChoice:
    geometry = Geometry(inputs=inputs, outputs=outputs, kernel=kernel)
    return KernelChoice(kernel="onednn", geometry=geometry, pairing=pairing)


def _brute_force(rows: Tensor, pairing: Pairing) -> Tensor:
    """The factor of :func:`excess`, by loops over the pairs as they are described."""
    _, inputs, height, width = rows.shape
    places = [(c, y, x) for y in range(height) for x in range(width) for c in range(inputs)]
    if pairing is Pairing.COLUMNS:
        places = [(c, y, x) for x in range(width) for y in range(height) for c in range(inputs)]
    found = []
    for row in rows.tolist():
        worst = 0.0
        for i, (c1, y1, x1) in enumerate(places):
            for j, (c2, y2, x2) in enumerate(places):
                together = {
                    Pairing.CHANNELS: (y1, x1, c1 // 2) == (y2, x2, c2 // 2),
                    Pairing.ANY: True,
                }.get(pairing, i // 2 == j // 2)
                if i == j or not together:
                    continue
                a, b = row[c1][y1][x1], row[c2][y2][x2]
                worst = max(worst, 255 * (max(a, 0) + max(b, 0)) / 32767)
                worst = max(worst, 255 * (min(a, 0) + min(b, 0)) / -32768)
        found.append(worst)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    "pairing", [Pairing.CHANNELS, Pairing.FLAT, Pairing.COLUMNS, Pairing.ANY], ids=lambda p: p.name
)
def test_excess_is_what_the_pairs_add_up_to(pairing: Pairing) -> None:
    torch.manual_seed(0)
    for inputs in (2, 3, 4):
        rows = torch.randint(-128, 128, (5, inputs, 2, 3), dtype=torch.int8)
        given, wanted = excess(rows, pairing, 255), _brute_force(rows, pairing)
        single = rows.flatten(1).double().abs().amax(1) * 255 / 32768  # cannot overflow alone
        over = wanted > 1
        assert torch.equal(given[over], wanted[over])
        assert bool(
            (given[~over] <= torch.maximum(wanted, single.clamp(max=1))[~over] + 1e-2).all()
        )


@pytest.mark.parametrize(
    "pairing", [Pairing.CHANNELS, Pairing.FLAT, Pairing.COLUMNS, Pairing.ANY], ids=lambda p: p.name
)
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_fitted_weight_overflows_nothing_and_no_more_than_needed_is_lost(
    pairing: Pairing, per_channel: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 6, 3, 3)
    weight[3] = torch.rand(6, 3, 3) * 0.2 + 0.8
    weight[5] = 0.0
    weight[5, 0, 0, 0] = -1.0  # alone: nothing to add to
    spec = SYMMETRIC
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    if not per_channel:
        spec = QuantSpec(
            dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127
        )
        low, high = low.min(), high.max()
    usual = choose_qparams(low, high, spec)
    choice = _choice(6, 16, (3, 3), pairing)
    fitted, reduction = fit(weight, usual, [choice])
    assert reduction is not None
    factors = _brute_force(quantize(weight, fitted), pairing)
    assert float(factors.max()) <= 1
    flagged = _brute_force(quantize(weight, usual), pairing) > 1
    if per_channel:
        assert torch.equal(fitted.scale != usual.scale, flagged)
        assert reduction.channels == int(flagged.sum())
        assert not flagged[5]
        assert float(factors[flagged].min()) > 0.97  # 125 of 128
    else:
        assert reduction.channels == 16
        assert float(factors.max()) > 0.97
    assert reduction.after < reduction.before


def test_a_weight_with_a_zero_point_keeps_to_half_of_the_range() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(
        dtype=torch.int8, qscheme=torch.per_tensor_affine, quant_min=-128, quant_max=127
    )
    weight = torch.rand(4, 8, 3, 3)
    usual = choose_qparams(weight.min(), weight.max(), spec)
    assert int(usual.zero_point) != 0
    fitted, reduction = fit(weight, usual, [_choice(8, 4, (3, 3), Pairing.CHANNELS)])
    fitted.validate()
    integers = quantize(weight, fitted)
    assert int(integers.min()) >= -64
    assert int(integers.max()) <= 63
    assert reduction is not None
    assert reduction.channels == 4
    assert float(((integers - fitted.zero_point) * fitted.scale - weight).abs().max()) <= float(
        fitted.scale
    )


def test_a_weight_that_fits_is_left_as_it_is() -> None:
    weight = torch.ones(4, 8, 1, 1)
    usual = QParams(torch.full((4,), 1 / 64), torch.zeros(4, dtype=torch.int32), SYMMETRIC)
    fitted, reduction = fit(weight, usual, [_choice(8, 4, (1, 1), Pairing.ANY)])
    assert fitted is usual
    assert reduction is None


def test_strict_makes_an_error_of_a_fitted_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on this CPU, were its kernels to pair."""
    from fxquant.targets import saturation

    monkeypatch.setattr(saturation, "pairing_here", lambda geometry, kernel: Pairing.ANY)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(4, 16)
    prepared = prepare_fx(model, None, (x,))
    prepared(x)
    with pytest.warns(LoweringWarning, match="'_0'"):
        convert_fx(prepared)
    with pytest.raises(StrictModeError, match="8 of 8 output channels"):
        convert_fx(prepared, strict=True)
