"""guard-boundary: what callers of the float model may do, they may do with the int8 model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.calibration import calibrate
from fxquant.errors import ShapeGuardError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.pass_manager import PassContext
from fxquant.passes.guard_boundary import GuardBoundary
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.targets.x86 import X86

IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def _int8(model: nn.Module, x: Tensor) -> QuantGraphModule:
    prepared = prepare_fx(model.eval(), None, (x,))
    return convert_fx(calibrate(prepared, [x], progress=False))


@pytest.fixture
def int8() -> QuantGraphModule:
    return _int8(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), IMAGES)


def test_images_come_out_as_they_went_in(int8: QuantGraphModule) -> None:
    assert int8(IMAGES).is_contiguous()
    assert int8(IMAGES).view(2, -1).shape == (2, 100)
    channels_last = IMAGES.contiguous(memory_format=torch.channels_last)
    assert int8(channels_last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(int8(channels_last), int8(IMAGES))


@pytest.mark.parametrize("x", [IMAGES[0], IMAGES.double(), IMAGES.half()])
def test_other_ranks_and_dtypes_are_named(int8: QuantGraphModule, x: Tensor) -> None:
    with pytest.raises(ShapeGuardError, match=r"'input' is float.*float32 of at least 4"):
        int8(x)


def test_vectors_for_a_model_of_matrices() -> None:
    int8 = _int8(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
    with pytest.raises(ShapeGuardError, match=r"float32\[8\].*unsqueeze"):
        int8(torch.randn(8))


def test_a_second_run_changes_nothing_more(int8: QuantGraphModule) -> None:
    inserted = [n for n in int8.graph.nodes if record_of(n).made_by == "guard-boundary"]
    assert len(inserted) == 2
    assert GuardBoundary().run(int8, PassContext(target=X86)).changes == 0
