"""oneDNN's weights are packed once, in the order that its code wants, and not in every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant import calibrate, convert_fx, get_default_qconfig_mapping, prepare_fx
from fxquant.graph_module import QuantGraphModule


class Residual(nn.Module):
    """Two convolutions and a sum; the second reads what may be shifted, or begins at zero."""

    def __init__(self, *, rectified: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(256, 64, 1)
        self.act = nn.ReLU() if rectified else nn.Identity()
        self.expand = nn.Conv2d(64, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.act(self.reduce(x))) + x


class Gated(nn.Module):
    """A convolution with a fused function, in the same two cases."""

    def __init__(self, *, rectified: bool) -> None:
        super().__init__()
        self.before = nn.Conv2d(96, 160, 1, stride=2)
        self.act = nn.ReLU() if rectified else nn.Identity()
        self.body = nn.Conv2d(160, 480, 1)
        self.last = nn.Conv2d(480, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.nn.functional.hardswish(self.body(self.act(self.before(x)))))


def _lowered(model: nn.Module, x: Tensor) -> QuantGraphModule:
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (x,))
    return convert_fx(calibrate(prepared, [x]))


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize(("made", "channels"), [(Residual, 256), (Gated, 96)])
def test_no_call_reorders_a_weight(
    made: type[nn.Module], channels: int, rectified: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, channels, 14, 14)
    int8 = _lowered(made(rectified=rectified), x)
    int8(x)  # quantized::conv2d orders its weight now, for good
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        int8(x)
    said = capfd.readouterr().out.splitlines()
    assert sum(",exec," in line and ",convolution," in line for line in said) >= 2, said
    reordered = [line for line in said if ",exec," in line and "reorder" in line]
    assert not reordered, reordered


@pytest.mark.parametrize("rectified", [True, False])
def test_other_sizes_give_the_same_integers(rectified: bool) -> None:
    """A weight that was packed for one size and batch serves all of them."""
    torch.manual_seed(0)
    model = Residual(rectified=rectified)
    large = torch.randn(3, 256, 20, 24)
    small = large[:1, :, :14, :14].contiguous()
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (small,))
    int8 = convert_fx(calibrate(prepared, [large]))
    assert torch.equal(int8(large)[:1, :, :14, :14], int8(small))


def test_other_parameters_give_the_same_integers() -> None:
    """A state with another zero point is computed right with the weight as it was packed."""
    torch.manual_seed(0)
    x = torch.randn(1, 256, 14, 14)
    model = Residual(rectified=False)
    other = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (x,))
    shifted = convert_fx(calibrate(other, [x.abs() * 3]))
    int8 = _lowered(model, x)
    wanted = shifted(x)
    assert not torch.equal(int8(x), wanted)
    int8.load_state_dict(shifted.state_dict())
    assert torch.equal(int8(x), wanted)
