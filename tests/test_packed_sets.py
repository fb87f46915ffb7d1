"""Packed weights for each batch, size and number of threads that a model is called with."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from fxquant import calibrate, convert_fx, default_dynamic_qconfig, packed_sets, prepare_fx
from fxquant.errors import ShapeGuardError
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.timing import threads


class Residual(nn.Module):
    """A convolution of ``quantized::`` and one of ``onednn::``, which sums."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 16, 1)
        self.expand = nn.Conv2d(16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.expand(torch.relu(self.reduce(x))) + x)


HOME = (2, 16, 8, 8)


def converted(model: nn.Module, shape: tuple[int, ...] = HOME) -> QuantGraphModule:
    torch.manual_seed(0)
    x = torch.randn(shape)
    return convert_fx(calibrate(prepare_fx(model.eval(), None, (x,)), [x]))


@pytest.fixture
def int8() -> QuantGraphModule:
    return converted(Residual())


def packers(packings: list[PackRecord]) -> list[str]:
    """What packed them, sorted."""
    return sorted(record.packer for record in packings)


def test_the_shape_of_the_examples_has_the_modules_own(
    int8: QuantGraphModule, packings: list[PackRecord]
) -> None:
    for _ in range(3):
        int8(torch.randn(HOME))
    assert packers(packings) == ["conv", "onednn-conv"]
    assert not int8.unpacked


def test_a_shape_that_comes_again_gets_its_own(
    int8: QuantGraphModule, packings: list[PackRecord]
) -> None:
    int8(torch.randn(HOME))
    packings.clear()
    x = torch.randn(1, 16, 12, 20)
    first = int8(x)
    assert packings == [], "what comes once is not worth packing"
    second = int8(x)
    assert packers(packings) == ["conv", "onednn-conv"]
    assert torch.equal(first, second)
    assert torch.equal(int8(x), first)
    assert len(packings) == 2, "packed again"
    with threads(torch.get_num_threads() + 1):
        for _ in range(2):
            assert torch.equal(int8(x), first)
    assert len(packings) == 4, "another number of threads is another set"


def test_packed_for_the_shape_that_is_met(
    int8: QuantGraphModule, packings: list[PackRecord]
) -> None:
    int8(torch.randn(HOME))
    for _ in range(2):
        int8(torch.randn(1, 16, 12, 20))
    shapes = [record.options[-1] for record in packings if record.packer == "onednn-conv"]
    assert shapes == [[2, 16, 8, 8], [1, 16, 12, 20]]


def test_the_modules_own_wait_for_their_shape(
    int8: QuantGraphModule, packings: list[PackRecord]
) -> None:
    """Called with another shape first, they are not prepared for that one."""
    for _ in range(2):
        int8(torch.randn(1, 16, 12, 20))
    assert len(int8.unpacked) == 2
    int8(torch.randn(HOME))
    assert not int8.unpacked


def test_no_call_reorders_a_weight_at_any_size(capfd: pytest.CaptureFixture[str]) -> None:
    """256 to 1024 channels are packed otherwise for 14 x 14 than for 16 x 16."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(1024), Residual(1024))
    int8 = converted(model, (1, 1024, 14, 14))
    for size in (14, 16, 7, 20):
        x = torch.randn(1, 1024, size, size)
        for _ in range(3):
            int8(x)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            int8(x)
        said = capfd.readouterr().out.splitlines()
        assert sum(",convolution," in line for line in said) >= 4
        assert not [line for line in said if ",exec," in line and "reorder" in line], size


def test_there_are_only_so_many(int8: QuantGraphModule, packings: list[PackRecord]) -> None:
    for size in range(5, 15):
        x = torch.randn(1, 16, size, size)
        results = [int8(x) for _ in range(3)]
        assert all(torch.equal(result, results[0]) for result in results)
    assert packers(packings).count("onednn-conv") <= 2 * packed_sets.LARGEST + 1


def test_new_weights_reach_all_of_them(int8: QuantGraphModule) -> None:
    torch.manual_seed(1)
    other = converted(Residual())
    x = torch.randn(1, 16, 12, 20)
    wanted = converted(Residual())
    wanted.load_state_dict(other.state_dict())
    for _ in range(2):
        int8(x)
    int8.load_state_dict(other.state_dict())
    for _ in range(3):
        assert torch.equal(int8(x), other(x))
    with torch.no_grad():
        for buffer in int8.buffers():
            if buffer.dtype == torch.int8:
                buffer.neg_().clamp_(min=-127)
    int8.rebuild_packed()
    for _ in range(3):
        assert not torch.equal(int8(x), other(x))


def test_copies_have_none(int8: QuantGraphModule, packings: list[PackRecord]) -> None:
    x = torch.randn(1, 16, 12, 20)
    wanted = int8(x)
    for made in (copy.deepcopy(int8), copy.copy(int8), pickle.loads(pickle.dumps(int8))):
        packings.clear()
        for _ in range(3):
            assert torch.equal(made(x), wanted)
        assert packers(packings).count("onednn-conv") >= 1


def test_hooks_run_and_errors_are_those_of_the_model(int8: QuantGraphModule) -> None:
    called: list[nn.Module] = []
    handle = int8.register_forward_hook(lambda module, args, result: called.append(module))
    for _ in range(3):
        int8(torch.randn(1, 16, 12, 20))
    assert called == [int8] * 3
    handle.remove()
    int8.__dict__["forward"] = lambda x: "replaced"
    assert [int8(torch.randn(1, 16, 12, 20)) for _ in range(3)] == ["replaced"] * 3
    del int8.__dict__["forward"]
    for _ in range(2):
        with pytest.raises(ShapeGuardError, match="of at least"):
            int8(torch.randn(16))
    x = torch.randn(1, 16, 12, 20)
    with pytest.raises(TypeError, match=r"forward\(\) takes 2 positional arguments but 3"):
        int8(x, x)
    with pytest.raises(TypeError, match=r"forward\(\) missing 1 required"):
        int8()


def test_eight_threads_with_eight_shapes(int8: QuantGraphModule) -> None:
    inputs = [torch.randn(1 + i % 3, 16, 6 + i, 9) for i in range(8)]
    wanted = [copy.deepcopy(int8)(x) for x in inputs]
    wrong: list[int] = []

    def work(start: int) -> None:
        for step in range(24):
            place = (start + step) % 8
            if not torch.equal(int8(inputs[place]), wanted[place]):
                wrong.append(place)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_what_is_packed_for_no_shape_has_no_sets() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    x = torch.randn(4, 16)
    int8 = convert_fx(prepare_fx(model, {"": default_dynamic_qconfig}, (x,)))
    assert packed_sets.sets_of(int8) is None
    int8(x[:1])
    assert not int8.unpacked


def test_tracing_sees_one_graph(int8: QuantGraphModule) -> None:
    x = torch.randn(1, 16, 12, 20)
    wanted = int8(x)
    traced = torch.jit.trace(int8, (x,))
    assert torch.equal(traced(x), wanted)
