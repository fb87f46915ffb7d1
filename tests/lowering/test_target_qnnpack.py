"""The ``qnnpack`` target, and what becomes of a target whose kernels are not there."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import machine
from fxquant.artifact import inspect_header, load, save
from fxquant.audit import audit
from fxquant.engines import available, engine
from fxquant.errors import ConfigError, Diagnostics, LoweringWarning, StrictModeError
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import record_of
from fxquant.parity import parity
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from fxquant.targets import registry
from fxquant.targets.qnnpack import QNNPACK
from fxquant.targets.registry import TARGETS, missing_kernels, target_here, target_named
from fxquant.targets.table import Role
from tests.lowering.qconfigs import PER_CHANNEL, PER_TENSOR

needs_qnnpack = pytest.mark.skipif(not available("qnnpack"), reason="torch without QNNPACK")


class Image(nn.Module):
    """Convolutions of every kind, a residual sum, pooling, concatenation and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.project = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(32, 8, 3, stride=2, padding=1)
        self.blocks = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2, 1)
        y = F.relu6(self.depthwise(x))
        y = F.hardtanh(self.grouped(y), -1.0, 0.75)
        y = F.relu(self.project(y) + x)
        y = torch.cat([F.avg_pool2d(y, 3, 1, 1), x * y], 1)
        y = F.leaky_relu(self.up(y), 0.1)
        y = F.hardswish(self.blocks(y))
        return self.head(y.mean((2, 3)))


def _convert(
    model: nn.Module, x: Tensor, qconfig: Any = PER_CHANNEL, target: str = "qnnpack"
) -> tuple[QuantGraphModule, QuantGraphModule]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapping = {"": qconfig} if isinstance(qconfig, QConfig) else qconfig
        prepared = prepare_fx(model.eval(), mapping, (x,), target=target)
        with torch.no_grad():
            prepared(x)
        return convert_to_reference_fx(prepared), convert_fx(prepared)


def _kernels(int8: QuantGraphModule) -> str:
    return "\n".join(record_of(node).kernel for node in int8.graph.nodes)


@needs_qnnpack
@pytest.mark.parametrize("name", ["qnnpack", "x86"])
@pytest.mark.parametrize("qconfig", [PER_CHANNEL, PER_TENSOR], ids=["channel", "tensor"])
def test_a_network_is_what_its_definition_says(qconfig: QConfig, name: str) -> None:
    x = torch.randn(2, 3, 17, 14)
    reference, int8 = _convert(Image(), x, qconfig)
    with engine(name):
        report = parity(reference, int8, (x,))
        assert report.ok, f"\n{report}"
        other = torch.randn(3, 3, 30, 22) * 2
        report = parity(reference, int8, (other,))
        assert report.ok, f"\n{report}"
    kernels = _kernels(int8)
    assert kernels.count("(qnnpack)") == 7
    for absent in ("onednn", "fbgemm"):
        assert absent not in kernels
    assert audit(int8, (x,)).mac_coverage == 1


@needs_qnnpack
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)), (2, 6, 19)),
        (nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)), (2, 3, 6, 7, 5)),
        (nn.Sequential(nn.ConvTranspose1d(6, 8, 3, 2), nn.Conv1d(8, 4, 1)), (2, 6, 19)),
        (nn.Sequential(nn.Linear(12, 7), nn.ReLU6(), nn.Linear(7, 3)), (5, 12)),
        (nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3)), (2, 4, 12)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Hardswish()), (2, 4, 9, 9)),
    ],
    ids=["conv1d", "conv3d", "conv_transpose1d", "linear", "linear 3-d", "float function"],
)
def test_small_models(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    reference, int8 = _convert(model, x)
    assert parity(reference, int8, (x,)).ok
    assert parity(reference, int8, (torch.randn(3, *shape[1:]) * 3,)).ok
    assert "(qnnpack)" in _kernels(int8)


@needs_qnnpack
def test_worst_case_integers_do_not_saturate() -> None:
    layer = nn.Conv2d(32, 16, 3)
    nn.init.ones_(layer.weight)
    x = torch.ones(2, 32, 9, 9)
    reference, int8 = _convert(nn.Sequential(layer, nn.Conv2d(16, 4, 1)), x)
    assert parity(reference, int8, (x,)).ok


@needs_qnnpack
def test_the_default_mappings_are_served() -> None:
    x = torch.randn(2, 3, 17, 14)
    for mapping in (None, get_default_qconfig_mapping("qnnpack")):
        reference, int8 = _convert(Image(), x, mapping)
        assert parity(reference, int8, (x,)).ok
        assert audit(int8, (x,)).mac_coverage == 1


@needs_qnnpack
def test_what_the_engine_cannot_do_says_so() -> None:
    x = torch.randn(2, 4, 5, 5, 5)
    model = nn.Sequential(nn.ConvTranspose3d(4, 4, 3), nn.Conv3d(4, 4, 1))
    reference, int8 = _convert(model, x)
    assert "QNNPACK's kernel for it gives wrong sums" in "".join(
        reason for node in int8.graph.nodes for reason in record_of(node).reasons
    )
    assert parity(reference, int8, (x,)).ok


@needs_qnnpack
def test_its_transposed_convolution_in_3d_is_wrong() -> None:
    """If this fails, torch has mended it: the row in ``qnnpack.py`` can go."""
    from fxquant.pairing import Geometry, Pairing, pairing_of

    each = (1, 1, 1)
    geometry = Geometry(
        inputs=6, outputs=8, kernel=(3, 3, 3), size=(4, 4, 4), stride=(2, 2, 2), padding=each,
        dilation=each, output_padding=(0, 0, 0), transposed=True,
    )  # fmt: skip
    assert pairing_of(geometry, "qnnpack") is Pairing.WRONG


@needs_qnnpack
def test_save_and_load(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 17, 14)
    _, int8 = _convert(Image(), x)
    save(int8, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", strict=True)
    assert loaded.state.target == "qnnpack"
    assert torch.equal(loaded(x), int8(x))


def test_rows_are_those_of_x86_but_for_what_the_engine_lacks() -> None:
    x86 = target_named("x86")
    for kind, row in QNNPACK.rows.items():
        assert kind in x86.rows
        assert set(row.epilogues) <= set(x86.rows[kind].epilogues)
        assert not row.float_output
        assert not row.dynamic
    for kind in ("conv2d", "linear", "add", "cat", "max_pool2d", "avg_pool2d"):
        assert QNNPACK.rows[kind].role is x86.rows[kind].role
    assert QNNPACK.rows["conv_transpose3d"].role is Role.FLOAT


# -- other machines -------------------------------------------------------------------------------


@pytest.fixture
def on_arm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``on_arm(engines...)``: the machine is an ARM with these engines."""

    def become(*engines: str) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        monkeypatch.setattr(registry, "available", lambda name: name in engines)

    return become


def _small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(
        2, 3, 9, 9
    )


@pytest.mark.parametrize("target", ["x86", "x86-compat"])
def test_off_x86_the_reference_target_with_a_warning(on_arm: Any, target: str) -> None:
    on_arm("qnnpack", "none")
    model, x = _small()
    message = rf"target '{target}' cannot run here: .*'aarch64'.*target='qnnpack'"
    with pytest.warns(LoweringWarning, match=message) as caught:
        prepared = prepare_fx(model, None, (x,), target=target)
    assert len(caught) == 1
    assert prepared.state.target == "reference"
    prepared(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert_fx(prepared)
    assert converted.state.stage is Stage.REFERENCE
    assert torch.equal(converted(x), convert_to_reference_fx(prepared)(x))
    with pytest.raises(StrictModeError, match="aarch64"):
        prepare_fx(model, None, (x,), target=target, strict=True)


def test_without_qnnpack_the_cure_is_not_offered(on_arm: Any) -> None:
    on_arm("none")
    model, x = _small()
    with pytest.warns(LoweringWarning, match="aarch64") as caught:
        prepare_fx(model, None, (x,))
    assert "qnnpack" not in str(caught[0].message)
    with pytest.warns(LoweringWarning, match="this build of torch has no engine 'qnnpack'"):
        prepared = prepare_fx(model, None, (x,), target="qnnpack")
    assert prepared.state.target == "reference"


def test_wanting_the_reference_is_no_reason_to_warn(on_arm: Any) -> None:
    on_arm()
    model, x = _small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare_fx(model, None, (x,), target="reference")
        prepared(x)
        convert_fx(prepared)


@needs_qnnpack
def test_qnnpack_runs_on_arm(on_arm: Any) -> None:
    on_arm("qnnpack")
    model, x = _small()
    reference, int8 = _convert(model, x)
    assert int8.state.stage is Stage.LOWERED
    assert parity(reference, int8, (x,)).ok


def test_prepared_on_x86_converted_elsewhere(on_arm: Any) -> None:
    model, x = _small()
    prepared = prepare_fx(model, None, (x,))
    prepared(x)
    on_arm("qnnpack")
    with pytest.warns(LoweringWarning, match="aarch64"):
        converted = convert_fx(prepared)
    assert converted.state.stage is Stage.REFERENCE
    assert converted.state.target == "reference"


def test_saved_on_x86_loaded_elsewhere(on_arm: Any, tmp_path: Path) -> None:
    model, x = _small()
    prepared = prepare_fx(model, None, (x,))
    prepared(x)
    int8, reference = convert_fx(prepared), convert_to_reference_fx(prepared)
    save(int8, tmp_path / "model.safetensors")
    assert inspect_header(tmp_path / "model.safetensors")["made_on"]["machine"] == (
        machine.architecture()
    )
    on_arm("qnnpack")
    with pytest.warns(LoweringWarning, match="target 'x86' cannot run here"):
        loaded = load(tmp_path / "model.safetensors")
    assert loaded.state.stage is Stage.REFERENCE
    assert torch.equal(loaded(x), reference(x))
    save(loaded, tmp_path / "again.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load(tmp_path / "again.safetensors")(x), reference(x))


def test_a_build_without_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(registry, "available", lambda name: False)
    assert "neither engine" in str(missing_kernels(target_named("x86")))
    with pytest.warns(LoweringWarning, match="neither engine"):
        assert target_here("x86", Diagnostics()).name == "reference"


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'qnnpack'"):
        target_here("qnnpak", Diagnostics())
    assert missing_kernels(TARGETS["reference"]) is None
