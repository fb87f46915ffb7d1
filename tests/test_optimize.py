"""Optimized models give the numbers of the models that they are made from, bit by bit."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant import (
    LoweringWarning,
    NativeUnavailableError,
    NotAGraphModuleError,
    QuantGraphModule,
    optimize,
    quantize,
)
from fxquant.native import comparison, library, translate
from fxquant.native.plan import Value
from tests.native_machine import needs_native

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxquant.LoweringWarning", "error:the native plan:fxquant.LoweringWarning"
)


def _int8(model: nn.Module, *shape: int, spread: float = 1.0) -> QuantGraphModule:
    data = [(torch.randn(4, *shape) * spread,) for _ in range(2)]
    return quantize(model.eval(), data)


def _assert_same(model: nn.Module, *shape: int, batches: tuple[int, ...] = (1, 3)) -> None:
    int8 = _int8(model, *shape)
    optimized = optimize(int8)
    for batch in batches:
        for _ in range(2):  # the second call is the plan's
            x = torch.randn(batch, *shape) * 2  # beyond the calibrated range, too
            expected = int8(x)
            found = optimized(x)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride() or expected.dim() == 4
    (program, *_) = optimized.plans()
    left = {getattr(n.target, "__name__", str(n.target)) for n in program.called}
    assert left <= {"checked_input", "in_format_of"}, f"not native: {left}"


class _Residual(nn.Module):
    def __init__(self, channels: int, act: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))) + x
        return F.relu(y) if self.act else y


class _Gated(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.last = nn.Conv2d(channels, 8, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        s = self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.last(x * s)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.left, self.right = nn.Conv2d(24, 40, 1), nn.Conv2d(24, 21, 3, padding=1)
        self.last = nn.Conv2d(61, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))


class _Dense(nn.Module):
    """Every layer sees all results before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(40, 10, 1)
        for norm in self.norms:
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.last(x)


class _Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv2d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.last(F.channel_shuffle(torch.cat([a, self.branch(b)], 1), 2))


class _Pools(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.stem, self.pool, self.last = nn.Conv2d(3, 20, 3), pool, nn.Conv2d(20, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(F.relu(self.stem(x))))


def _residual(act: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), _Residual(16, act), nn.Conv2d(16, 8, 1))


def _classifier(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels, 33), nn.ReLU(), nn.Linear(33, 10),
    )  # fmt: skip


_CONVOLUTIONS = [
    # channels in and out, kernel, stride, padding, dilation, groups
    *((i, o, 1, 1, 0, 1, 1) for i, o in itertools.product((3, 19, 64), (1, 24, 80, 130))),
    *((16, 24, *ksp, 1, 1) for ksp in ((2, 2, 0), (3, 1, 1), (3, 2, 1), (5, 2, 2), (7, 1, 0))),
    (16, 24, 3, 1, 2, 2, 1),
    (16, 24, (3, 1), 1, (1, 0), 1, 1),
    (64, 64, 3, 1, 1, 1, 4),
    (24, 48, 3, 2, 1, 1, 3),
    *((c, c, 3, s, 1, 1, c) for c, s in itertools.product((8, 24, 64, 72, 144), (1, 2))),
    *((32, 32, k, s, k // 2, 1, 32) for k, s in itertools.product((2, 4, 5, 6, 7, 8), (1, 2, 3))),
    (32, 32, 3, 1, 3, 3, 32),
    (32, 32, (1, 5), 1, (0, 2), 1, 32),
]  # fmt: skip


@needs_native
@pytest.mark.parametrize("case", _CONVOLUTIONS, ids=str)
def test_convolutions(case: tuple[int, ...]) -> None:
    inputs, outputs, kernel, stride, padding, dilation, groups = case
    layers = [
        nn.Conv2d(3, inputs, 1),
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups),
        nn.Conv2d(outputs, 8, 1),  # keeps the layer under test from writing floats
    ]
    _assert_same(nn.Sequential(*layers), 3, 13, 11)


@needs_native
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "window", [(3, 2, 1), (5, 1, 2), (7, 2, 3), (7, 1, 0), (11, 4, 2)], ids=str
)
def test_first_layers(channels: int, window: tuple[int, int, int]) -> None:
    """Strings of pixels, of three or four bytes each, and images of odd widths."""
    first = nn.Conv2d(channels, 20, *window)
    _assert_same(nn.Sequential(first, nn.ReLU(), nn.Conv2d(20, 8, 1)), channels, 23, 37)


@needs_native
@pytest.mark.parametrize("channels", [4, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("width", [2, 15, 16, 33])
def test_inputs_of_many_channels_in_planes(channels: int, width: int) -> None:
    _assert_same(nn.Sequential(nn.Conv2d(channels, 8, 1), nn.Conv2d(8, 8, 1)), channels, 5, width)


@needs_native
def test_windows_that_disagree_about_an_image() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 16, 7, 2, 3), nn.Conv2d(3, 16, 3, 2, 1)
            self.last = nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.wide(x) + self.narrow(x))

    _assert_same(Two(), 3, 23, 37)


@needs_native
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU(), nn.Hardtanh(-0.5, 1.5)],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_activations(activation: nn.Module, groups: int, last: bool, spread: float) -> None:
    layers = [nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=groups), activation]
    model = nn.Sequential(*layers, *([] if last else [nn.Conv2d(24, 8, 1)]))
    int8, x = _int8(model, 3, 14, 15, spread=spread), torch.randn(2, 3, 14, 15) * spread
    optimized = optimize(int8)
    for _ in range(2):
        assert torch.equal(optimized(x), int8(x))
        x = x * 10  # what lies beyond saturates


@needs_native
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda act=act: _residual(act), id=f"residual-{act}") for act in (True, False)
    ] + [
        pytest.param(lambda: _Gated(40, F.hardsigmoid), id="hardsigmoid"),
        pytest.param(lambda: _Gated(40, torch.sigmoid), id="sigmoid"),
        pytest.param(_Branches, id="cat"),
        pytest.param(_Dense, id="dense"),
        pytest.param(_Shuffled, id="shuffle"),
        pytest.param(lambda: _classifier(70), id="classifier"),
        pytest.param(lambda: _classifier(32), id="classifier-32"),
        *(
            pytest.param(lambda pool=pool: _Pools(pool), id=str(pool))
            for pool in (
                nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 0, 2),
                nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 2, ceil_mode=True),
            )
        ),
    ],
)  # fmt: skip
def test_networks(model: Callable[[], nn.Module]) -> None:
    _assert_same(model(), 3, 17, 16)


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (5, 40), (2, 7, 40)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 300.0])
def test_dynamic_linears(bias: bool, shape: tuple[int, ...], scale: float) -> None:
    layers = [nn.Linear(40, 64, bias=bias), nn.ReLU(), nn.Linear(64, 19, bias=bias)]
    int8 = fxquant.quantize_dynamic(nn.Sequential(*layers).eval())
    optimized = optimize(int8)
    for offset in (-3.0, 0.0, 3.0):  # ranges on one side of zero, too
        for _ in range(2):
            x = (torch.randn(shape) + offset) * scale
            assert torch.equal(optimized(x), int8(x))
    (program,) = optimized.plans()
    assert program.called == ()


@needs_native
def test_an_input_of_several_dynamic_linears_is_quantized_once() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(x, (32,))
            return F.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)

    int8, x = fxquant.quantize_dynamic(Heads().eval()), torch.randn(2, 9, 32)
    optimized = optimize(int8, (x,))
    assert torch.equal(optimized(x), int8(x))
    (program,) = optimized.plans()
    assert [s.kind for s in program.plan.steps].count("quantize") == 1
    assert "softmax" in str(optimized)


@needs_native
def test_the_profile_names_every_step() -> None:
    int8, x = _int8(_classifier(32), 3, 20, 20), torch.randn(1, 3, 20, 20)
    table = optimize(int8, (x,)).profile(x, repeats=2)
    for word in ("convolution", "quantize", "global_mean", "3x3/1 from 3", "GMAC/s"):
        assert word in table


@needs_native
def test_what_has_no_rule_is_left_to_torch_and_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16, 8, 1), nn.GELU(),
        nn.Conv2d(8, 8, 1),
    )  # fmt: skip
    int8, x = _int8(model, 3, 12, 12), torch.randn(2, 3, 12, 12)
    optimized = optimize(int8, (x,))
    assert torch.equal(optimized(x), int8(x))
    (program,) = optimized.plans()
    left = [n for n in program.called if getattr(n.target, "__name__", "") != "checked_input"]
    assert left
    name = getattr(left[0].target, "__name__", str(left[0].target))
    assert name in str(optimized)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_threads_change_nothing(threads: int, batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU6(),
        _Residual(32, True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 100),
    )  # fmt: skip
    int8, x = _int8(model, 3, 33, 33), torch.randn(batch, 3, 33, 33)
    expected, optimized = int8(x), optimize(int8, (x,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(optimized(x), expected)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_calls_from_several_threads_at_once() -> None:
    int8 = _int8(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)), 3, 24, 24)
    optimized = optimize(int8)
    inputs = [torch.randn(2, 3, 24, 24) for _ in range(4)]
    expected = [int8(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(optimized(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    (program,) = optimized.plans()
    assert len(program._arenas) <= 4


@needs_native
def test_sizes_and_memory_formats() -> None:
    int8 = _int8(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), 3, 20, 20)
    optimized = optimize(int8)
    for shape in ((1, 3, 20, 20), (4, 3, 20, 20), (1, 3, 31, 9), (2, 3, 5, 5)):
        x = torch.randn(shape)
        for y in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            for _ in range(2):
                assert torch.equal(optimized(y), int8(y))
    with pytest.raises(fxquant.ShapeGuardError, match="float32"):
        optimized(torch.zeros(1, 3, 20, 20, dtype=torch.float64))


@needs_native
def test_plans_of_many_shapes_do_not_pile_up() -> None:
    optimized = optimize(_int8(nn.Conv2d(3, 8, 3), 3, 20, 20))
    for size in range(10, 40):
        optimized(torch.randn(1, 3, size, size))
    assert len(optimized.plans()) == 16


@needs_native
def test_plans_share_their_weights() -> None:
    layers = (nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 512, 3))
    optimized = optimize(_int8(nn.Sequential(*layers), 3, 12, 12), (torch.randn(1, 3, 12, 12),))
    before = str(optimized).splitlines()[-1]
    assert re.fullmatch("Packed weights, for all of them: [0-9.]+ MB", before)
    for batch in range(2, 6):
        optimized(torch.randn(batch, 3, 12, 12))
    assert len(optimized.plans()) == 5
    assert str(optimized).splitlines()[-1] == before


@needs_native
@pytest.mark.parametrize("groups", [1, 16])
def test_results_beyond_int32_are_clamped_as_torch_clamps_them(groups: int) -> None:
    layers = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=groups), nn.Conv2d(16, 8, 1)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[1].weight *= 1e-4  # its result is calibrated to a tiny range
        model[1].bias.zero_()
    data = torch.randn(4, 3, 12, 12)
    int8 = quantize(model.eval(), [(data,)], bias_correction=False)
    state = int8.state_dict()
    scales = [n for n in state if "weight_scale" in n and n.startswith("_1")]
    assert scales
    for name in scales:
        state[name] *= 1e13  # and its weights are large after all
    int8.load_state_dict(state)
    optimized = optimize(int8)
    for _ in range(2):
        assert torch.equal(optimized(data), int8(data))


@needs_native
def test_an_image_with_margins_that_torch_reads_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1))
    int8, x = _int8(model, 3, 17, 15), torch.randn(2, 3, 17, 15)
    convolution = torch.ops.quantized.conv2d.new
    monkeypatch.setitem(translate.RULES, convolution, lambda *_: None)
    optimized = optimize(int8)
    for _ in range(2):
        assert torch.equal(optimized(x), int8(x))
    (program,) = optimized.plans()
    assert convolution in {node.target for node in program.called}


@needs_native
def test_several_inputs_keywords_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            a, b = self.a(x), self.b(y)
            return {"sum": a + b, "first": F.relu(a)}

    x, y = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9)
    int8 = quantize(Two().eval(), [(x, y)])
    optimized = optimize(int8, (x, y))
    for found in (optimized(x, y), optimized(x, y=y), optimized(y=y, x=x)):
        assert found.keys() == {"sum", "first"}
        assert all(torch.equal(found[k], v) for k, v in int8(x, y).items())
    with pytest.raises(TypeError, match="missing"):
        optimized(x)


class _SliceOfFloats(nn.Module):
    """Half of the channels of floats that are bytes until somebody asks for them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        _, b = y.chunk(2, 1)
        return torch.sin(self.function(b)), y, self.last(y)


class _Glu(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2 * channels, 3, padding=1)
        self.last, self.gate = nn.Conv2d(channels, 4, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(a * self.gate(b))


@needs_native
@pytest.mark.parametrize("function", [F.hardsigmoid, torch.sigmoid, F.relu, torch.exp])
def test_slices_of_floats(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 8, 8)
    for model in (_SliceOfFloats(function), _Glu(function, 16), _Glu(function, 7)):
        int8 = _int8(model, 3, 8, 8)
        optimized = optimize(int8, (torch.zeros(2, 3, 8, 8),))
        for _ in range(2):
            expected, found = int8(x), optimized(x)
            pairs = (
                zip(expected, found, strict=True)
                if isinstance(expected, tuple)
                else ((expected, found),)
            )
            assert all(torch.equal(a, b) for a, b in pairs)


@needs_native
@pytest.mark.parametrize("channels", [1, 5, 16, 17, 33, 71, 100])
@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d((2, 3), 1), nn.AvgPool2d(7),
     nn.AvgPool2d(5, 2, 2, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3)],
    ids=str,
)  # fmt: skip
def test_average_pools_of_every_integer(channels: int, pool: nn.Module) -> None:
    """Many sums lie between two integers; how they are rounded depends on the channel."""
    model = nn.Sequential(nn.Conv2d(3, channels, 1), pool, nn.Conv2d(channels, 4, 1))
    int8 = _int8(model, 3, 16, 16)
    optimized = optimize(int8, (torch.zeros(2, 3, 16, 16),))
    for _ in range(5):
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(optimized(x), int8(x))
    (program,) = optimized.plans()
    assert "average_pool" in [s.kind for s in program.plan.steps]


@needs_native
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 7, 16, 33, 100])
@pytest.mark.parametrize("size", [(7, 9), (30, 31), (1, 1)])
@pytest.mark.parametrize("pooled", [True, False])
def test_means_over_pixels(channels: int, size: tuple[int, int], pooled: bool) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, channels, 1), nn.Linear(channels, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1) if pooled else x.mean([2, 3]))

    int8 = _int8(Mean(), 3, *size)
    optimized = optimize(int8, (torch.zeros(2, 3, *size),))
    for _ in range(3):
        x = torch.randn(2, 3, *size)
        assert torch.equal(optimized(x), int8(x))


@needs_native
def test_a_mean_over_channels_is_no_mean_over_pixels() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.first(x)).mean(1, keepdim=True)

    int8 = _int8(Mean(), 3, 1, 1)
    optimized = optimize(int8, (torch.zeros(2, 3, 1, 1),))
    for _ in range(3):
        x = torch.randn(2, 3, 1, 1)
        assert torch.equal(optimized(x), int8(x))


@needs_native
def test_large_sigmoids_at_any_number_of_threads() -> None:
    model = nn.Sequential(nn.Linear(64, 95), nn.Sigmoid(), nn.Linear(95, 8))
    int8, x = fxquant.quantize_dynamic(model.eval()), torch.randn(1001, 64)
    optimized, before = optimize(int8, (x,)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert torch.equal(optimized(x), int8(x))
    finally:
        torch.set_num_threads(before)


@needs_native
def test_a_window_that_is_too_large_stays_with_torch() -> None:
    int8, x = _int8(nn.Conv2d(3, 4, (60, 60)), 3, 64, 64), torch.randn(1, 3, 64, 64)
    optimized = optimize(int8, (x,))
    assert torch.equal(optimized(x), int8(x))
    (program,) = optimized.plans()
    assert "convolution" not in [s.kind for s in program.plan.steps]


@needs_native
def test_copies_and_pickles() -> None:
    int8, x = _int8(nn.Conv2d(3, 8, 3), 3, 9, 9), torch.randn(1, 3, 9, 9)
    optimized = optimize(int8, (x,))
    for other in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        for _ in range(2):
            assert torch.equal(other(x), int8(x))


@needs_native
def test_kernels_that_differ_are_left_to_torch_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(t: translate.Translation, node: fx.Node) -> Value | None:
        value, meta = t.value(node.args[0]), t.metas[node]
        assert value is not None
        return t.builder.add(
            "average_pool", {"a": value}, t.builder.value(meta.shape, torch.uint8),
            kernel_h=2, kernel_w=2, window_stride_h=2, window_stride_w=2,
            count_padding=True, a_zero_point=value.zero_point,
        )  # fmt: skip

    rules = {
        target: wrong for target, rule in translate.RULES.items() if rule is translate._max_pool
    }
    monkeypatch.setattr(translate, "RULES", {**translate.RULES, **rules})
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    int8, x = _int8(model, 3, 12, 12), torch.randn(1, 3, 12, 12)
    with pytest.warns(LoweringWarning, match="leaves _1_int8 to torch"):
        optimized = optimize(int8, (torch.zeros(1, 3, 12, 12),))  # made inputs find it, too
    for _ in range(3):
        assert torch.equal(optimized(x), int8(x))
        x = x * 2
    (program,) = optimized.plans()
    assert [s.kind for s in program.plan.steps].count("convolution") == 2
    assert "max_pool" in str(optimized)


@needs_native
def test_a_plan_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "onednn_scale", lambda scale: scale * 1.1)
    monkeypatch.setattr(comparison, "first_difference", lambda *_: None)
    int8, x = (
        _int8(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), 3, 9, 9),
        torch.randn(1, 3, 9, 9),
    )
    with pytest.warns(LoweringWarning, match="does not give what the model gives"):
        optimized = optimize(int8, (x,))
    assert torch.equal(optimized(x), int8(x))
    assert optimized.plans() == ()
    assert "results differed" in str(optimized)


@needs_native
def test_sizes_that_depend_on_the_data() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y = torch.tanh(self.a(x[:, : lengths.max()]))
            return self.b(y.reshape(y.shape[0] * y.shape[1], -1))

    x, long = torch.randn(2, 20, 16), torch.tensor([20, 7])
    int8 = fxquant.quantize_dynamic(Cut().eval(), example_inputs=(x, long))
    optimized = optimize(int8, (x, torch.tensor([5, 3])))
    for lengths in ([5, 2], [20, 3], [1, 1], [5, 4]):
        assert torch.equal(optimized(x, torch.tensor(lengths)), int8(x, torch.tensor(lengths)))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_numbers_that_are_none(value: float, first: bool) -> None:
    """Torch decides what becomes of them, an error too; other calls keep their plan."""
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    linears = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 8))
    dynamic, x = fxquant.quantize_dynamic(linears.eval()), torch.randn(1, 3, 9, 9)
    images, tokens = (_int8(convolutions, 3, 9, 9), x), (dynamic, x[0])
    for int8, fine in (images, tokens):
        strange = fine.clone()
        strange[..., 2, 3] = value
        optimized = optimize(int8, None if first else (fine,))
        for given in (strange, fine, fine, strange, torch.full_like(fine, value)):
            try:
                expected = int8(given)
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=str(error)[:20]):
                    optimized(given)
            else:
                torch.testing.assert_close(
                    optimized(given), expected, rtol=0, atol=0, equal_nan=True
                )
        (program,) = optimized.plans()
        assert "convolution" in [s.kind for s in program.plan.steps]


def test_it_takes_lowered_models_only() -> None:
    with pytest.raises(NotAGraphModuleError, match="not Conv2d"):
        optimize(nn.Conv2d(3, 8, 3))  # type: ignore[arg-type]  # the error is what is tested
    mapping = fxquant.get_default_qconfig_mapping("x86")
    prepared = fxquant.prepare_fx(nn.Conv2d(3, 8, 3).eval(), mapping, (torch.randn(1, 3, 9, 9),))
    with pytest.raises(NotAGraphModuleError, match="convert_fx"):
        optimize(prepared)


@needs_native
def test_a_snapshot_takes_no_moves_and_no_training() -> None:
    optimized = optimize(_int8(nn.Conv2d(3, 8, 3), 3, 9, 9))
    assert optimized.eval() is optimized
    with pytest.raises(RuntimeError, match="training"):
        optimized.train()
    with pytest.raises(RuntimeError, match="snapshot"):
        optimized.double()


class TestWithoutNativeKernels:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        library.load.cache_clear()
        monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
        yield
        library.load.cache_clear()

    def test_another_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "cpu_suits", lambda: False)
        int8, x = _int8(nn.Conv2d(3, 8, 3), 3, 9, 9), torch.randn(1, 3, 9, 9)
        with pytest.warns(LoweringWarning, match="AVX512 and VNNI"):
            optimized = optimize(int8, (x,))
        assert torch.equal(optimized(x), int8(x))
        assert "AVX512" in str(optimized)
        assert "AVX512" in optimized.profile(x)

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "cpu_suits", lambda: True)
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(NativeUnavailableError, match=r"no-such-compiler.*CXX"):
            library.load()

    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(library, "cpu_suits", lambda: True)
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(NativeUnavailableError, match="out of order"):
            library.load()
        assert not list((tmp_path / "cache").glob("*"))

    def test_no_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(library, "cpu_suits", lambda: True)
        monkeypatch.setattr(library, "_compiler", lambda: "true")
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "file" / "below"))
        with pytest.raises(NativeUnavailableError, match="FXQUANT_CACHE"):
            library.load()


@needs_native
@pytest.mark.slow
def test_the_sources_compile_without_warnings(tmp_path: Path) -> None:
    sources = Path(library.__file__).parent / "src"
    command = [
        library._compiler(), *library._FLAGS, "-Wall", "-Wextra", "-Werror",
        "-Wno-maybe-uninitialized", "-Wno-uninitialized",  # GCC 12's own headers
        *map(str, sorted(sources.glob("*.cpp"))),
        "-o", str(tmp_path / "native.so"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_warnings_of_optimize_name_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimize(_int8(nn.Conv2d(3, 8, 3), 3, 9, 9))
    assert all(w.filename == __file__ for w in caught if "optimize" in str(w.message))
