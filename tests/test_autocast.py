"""Autocast and GPUs: statistics stay right, and a converted model computes what it always does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import (
    audit,
    bfloat16_static_qconfig,
    calibrate,
    convert_fx,
    convert_to_reference_fx,
    explain,
    fuse_fx,
    get_default_qconfig,
    load,
    optimize,
    prepare_fx,
    quantize,
    save,
)
from fxquant.errors import ShapeGuardError
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


class Net(nn.Module):
    """Convolutions, a linear that stays in FP32, and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.a(x)))
        y = F.relu(self.b(y) + y)
        return self.head(self.plain(y.mean((2, 3)))).softmax(-1)


MAPPING = {"": get_default_qconfig(), "plain": None}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def _converted(x: Tensor, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    prepared = prepare_fx(Net().eval(), MAPPING, (x,), **options)
    calibrate(prepared, [x], progress=False)
    return prepared, convert_fx(prepared)


@HALF
@pytest.mark.parametrize("target", ["x86", "reference"])
def test_a_converted_model_ignores_autocast(x: Tensor, target: str, dtype: torch.dtype) -> None:
    _, gm = _converted(x, target=target)
    expected = gm(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.is_autocast_enabled("cpu")
        given = gm(x)
        assert torch.is_autocast_enabled("cpu")  # the caller's is as it was
        elsewhere = torch.nn.functional.linear(torch.randn(2, 2), torch.randn(2, 2))
    assert torch.equal(given, expected)
    assert given.dtype is torch.float32
    assert elsewhere.dtype is dtype


@HALF
def test_what_autocast_hands_in_is_taken_as_float32(x: Tensor, dtype: torch.dtype) -> None:
    _, gm = _converted(x)
    with pytest.raises(ShapeGuardError, match="float32"):
        gm(x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        given = gm(F.conv2d(x, torch.eye(3).reshape(3, 3, 1, 1)))
    assert torch.equal(given, gm(x.to(dtype).float()))


def test_a_failure_leaves_the_callers_autocast_on(x: Tensor) -> None:
    _, gm = _converted(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ShapeGuardError):
            gm(x[0, 0])
        assert torch.is_autocast_enabled("cpu")


def test_half_precision_regions_of_the_graph_stay(x: Tensor) -> None:
    mapping = {"": get_default_qconfig(), "plain": bfloat16_static_qconfig}
    prepared = prepare_fx(Net().eval(), mapping, (x,))
    gm = convert_fx(calibrate(prepared, [x], progress=False))
    expected = gm(x)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(gm(x), expected)
    assert explain(gm).row("plain").runs.value == "bf16"


def test_every_step_inside_autocast_gives_the_same_model(x: Tensor, tmp_path: Path) -> None:
    """Shapes, folding, rounding and packing are computed as outside."""
    prepared, gm = _converted(x)
    save(gm, tmp_path / "model.fxq")
    torch.manual_seed(1)
    model = Net().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        again = prepare_fx(model, MAPPING, (x,))
        again.load_state_dict(prepared.state_dict())
        inside = convert_fx(again)
        reference = convert_to_reference_fx(again)
        loaded = load(tmp_path / "model.fxq")
        fused = fuse_fx(model, example_inputs=(x,))
        report = audit(inside)
    assert report.confirmed
    expected = gm.state_dict()
    for other in (inside, loaded):
        assert torch.equal(other(x), gm(x))
        assert all(torch.equal(v, expected[n]) for n, v in other.state_dict().items())
    assert torch.equal(reference(x), convert_to_reference_fx(prepared)(x))
    assert torch.equal(fused(x), fuse_fx(model, example_inputs=(x,))(x))


# -- statistics -----------------------------------------------------------------------------------

OBSERVERS = [
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    HistogramObserver,
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
]


@HALF
@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: o.__name__)
def test_observers_keep_float32_statistics_of_half_tensors(
    observer: type[Any], dtype: torch.dtype
) -> None:
    """What they see is rounded by autocast; what they make of it is not."""
    inside, outside = observer(), observer()
    batches = [torch.randn(4, 3, 7) for _ in range(3)]
    with torch.autocast("cpu", dtype=dtype):
        for batch in batches:
            inside(batch.to(dtype))
    for batch in batches:
        outside(batch.to(dtype).float())
    for (name, given), wanted in zip(
        inside.state_dict().items(), outside.state_dict().values(), strict=True
    ):
        assert torch.equal(given, wanted), name
        assert given.dtype is wanted.dtype
        assert given.dtype in (torch.float32, torch.int64)
    assert torch.equal(inside.qparams().scale, outside.qparams().scale)


def test_calibration_under_autocast_is_off_by_a_rounding_of_the_values(x: Tensor) -> None:
    """Ranges differ as the float models do: by roundings to 8 bits, here of up to six ops."""
    prepared = prepare_fx(Net().eval(), {"": get_default_qconfig()}, (x,))
    again = prepare_fx(Net().eval(), {"": get_default_qconfig()}, (x,))
    again.load_state_dict(prepared.state_dict())
    calibrate(prepared, [x], progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate(again, [x], progress=False)
    statistics = prepared.state_dict()
    for name, value in again.state_dict().items():
        if name.endswith(("min_val", "max_val")):
            assert value.dtype is torch.float32
            largest = float(statistics[name].abs().max())
            assert float((value - statistics[name]).abs().max()) <= 6 * 2**-8 * max(largest, 1e-3)
    one, other = convert_fx(prepared), convert_fx(again)
    assert torch.allclose(one(x), other(x), atol=0.02)
    assert other(x).dtype is torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("move", ["before", "after"])
def test_calibrated_on_a_gpu_converted_for_the_cpu(x: Tensor, move: str) -> None:
    model = Net().eval()
    if move == "before":
        prepared = prepare_fx(model.cuda(), MAPPING, (x.cuda(),))
    else:
        prepared = prepare_fx(model, MAPPING, (x,)).cuda()
    calibrate(prepared, [x.cuda()], progress=False)
    gm, reference = convert_fx(prepared), convert_to_reference_fx(prepared)
    assert {b.device.type for b in gm.buffers()} == {"cpu"}
    assert {b.device.type for b in reference.buffers()} == {"cuda"}
    on_cpu = convert_fx(prepared.cpu())
    assert torch.equal(gm(x), on_cpu(x))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert reference(x.cuda()).dtype is torch.float32


@pytest.mark.filterwarnings("ignore:optimize changes nothing")
def test_models_are_quantized_in_inference_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with torch.inference_mode():
        x = torch.randn(2, 3, 9, 9)
        int8 = quantize(model.eval(), [(x,)])
        inside = int8(x)
    assert not any(t.is_inference() for t in int8.state_dict().values())
    y = x.clone()
    assert torch.equal(int8(y), inside)
    assert torch.equal(optimize(int8)(y), inside)
