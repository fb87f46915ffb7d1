"""round-joined: one range for what is joined of several rounded values."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.fake_quantize import disable_observer
from fxquant.passes.round_joined import RoundJoined
from fxquant.qconfig import default_qconfig
from fxquant.quantize_fx import convert_to_reference_fx, prepare_qat_fx
from tests.passes.helpers import graph_text, observers, run_alone

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Joined(nn.Module):
    """Two branches of ranges that differ by a factor of 20, joined and read as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 4, 3)
        self.large = nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.large.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(torch.cat([self.small(x), self.large(x)], 1), 2))


def test_training_sees_the_range_that_int8_will_have() -> None:
    torch.manual_seed(0)
    prepared = prepare_qat_fx(Joined(), None, (IMAGES,))
    assert observers(prepared) == {
        "activation_post_process_0": "x",
        "activation_post_process_1": "small",
        "activation_post_process_2": "large",
        "activation_post_process_3": "cat",
    }
    prepared(IMAGES)
    prepared.apply(disable_observer)
    small, large, joined = (
        float(prepared.get_submodule(f"activation_post_process_{n}").get_buffer("scale"))
        for n in (1, 2, 3)
    )
    assert large > 10 * small
    reference = convert_to_reference_fx(prepared)
    scales = [
        float(reference.get_buffer(str(node.args[1].target)))
        for node in reference.graph.nodes
        if str(node.target) == "fxquant.quantize.default"
    ]
    assert len(set(scales[1:])) == 1  # all but the input's
    # What is joined was rounded: its ends are within half a step of the branches' ends.
    assert abs(joined - scales[1]) <= scales[1] / 255
    x = reference(IMAGES)
    torch.testing.assert_close(prepared(IMAGES), x, rtol=0, atol=float(x.abs().max()) / 100)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("round-joined", graph_text(prepare_qat_fx(Joined(), None, (IMAGES,))))


def test_twice_changes_nothing_and_observers_are_left_alone() -> None:
    assert run_alone(RoundJoined(), prepare_qat_fx(Joined(), None, (IMAGES,))).changes == 0

    class OneSource(Joined):
        def forward(self, x: Tensor) -> Tensor:
            y = self.small(x)
            return self.head(torch.cat([y, y], 1))

    assert len(observers(prepare_qat_fx(OneSource(), None, (IMAGES,)))) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a qconfig that only observes is told, elsewhere
        watched = prepare_qat_fx(Joined(), {"": default_qconfig}, (IMAGES,))
    assert len(observers(watched)) == 3
