"""Section 7: the lowered graph, its kernels, its steps, its packed weights."""

from __future__ import annotations

import copy
import io
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.metadata import record_of
from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Names,
    Peers,
    assert_same,
    assert_same_weights,
    default_mapping,
    equal,
    everywhere,
    observed_with,
    observers,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, CallsTwo, conv, images, linear, lively

pytestmark = pytest.mark.peer

X = images()
LINES, CUBES = images(2, 3, 9), images(2, 3, 5, 5, 5)
PLAIN = everywhere("default_qconfig")
ONES, TWOS, ZEROS = (1, 1), (2, 2), (0, 0)


def weight(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(*shape, generator=generator))


def kernels(lowered: fx.GraphModule) -> list[str]:
    """The kernels of a graph of ours that are no steps: names, in order."""
    found = (record_of(node).kernel.split(" ")[0] for node in lowered.graph.nodes)
    return [k for k in found if k and "quantize" not in k.split("::")[-1]]


def converted(
    peers: Peers, names: Names, model: nn.Module, x: Tensor, mapping: Build = PLAIN
) -> fx.GraphModule:
    """The lowered graph of one side."""
    prepared, _ = peers.prepare(names, model, (x,), mapping)
    run(prepared, (x,))
    return peers.convert(names, prepared)[1]


def off(result: Any, model: nn.Module, *inputs: Tensor) -> float:
    """How far a result is from that of the float model, relative to its norm."""
    with torch.no_grad():
        expected = model(*inputs)
    return float((result - expected).norm() / expected.norm())


# -- S7.1 -----------------------------------------------------------------------------------------

PARTLY: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "read-by-nobody-else": (lambda s, x: F.gelu(s.a(x)), (1, 0, 1)),
    "quantized-again": (lambda s, x: s.b(F.gelu(s.a(x))), (2, 0, 2)),
    "both-readers": (lambda s, x: (lambda y: (s.b(y), F.gelu(y)))(s.a(x)), (1, 0, 2)),
    "returned-and-read": (lambda s, x: (lambda y: (y, s.b(y)))(s.a(x)), (1, 0, 2)),
    "two-float-readers": (lambda s, x: (lambda y: (F.gelu(y), F.silu(y)))(s.a(x)), (1, 0, 1)),
    "chain-of-floats": (lambda s, x: s.b(F.silu(F.gelu(-s.a(x)))), (2, 0, 2)),
    "bmm": (lambda s, x: s.b(torch.bmm(s.a(x)[0], s.a(x)[0])[None]), (2, 0, 2)),
    "chunk": (lambda s, x: s.b(s.a(x).chunk(2, 3)[1]), (2, 0, 2)),
}


@pytest.mark.statement("S7.1b", "S7.8a")
@pytest.mark.parametrize("case", PARTLY)
def test_float_ops_are_between_steps_where_someone_wants_integers(peers: Peers, case: str) -> None:
    function, wanted = PARTLY[case]
    model = Calls(function, a=conv(padding=1), b=conv(padding=1))
    done = peers.compare(model, (X,))
    assert steps(done.ours.lowered)[0] == wanted[0]
    equal(steps(done.ours.lowered), steps(done.theirs.lowered), "steps")
    assert kernels(done.ours.lowered)[0] == "quantized::conv2d"


NONE_BETWEEN: dict[str, Any] = {"pool": lambda x: F.max_pool2d(x, 2), "relu6": F.relu6}


@pytest.mark.statement("S7.1a")
@pytest.mark.parametrize("case", NONE_BETWEEN)
def test_none_means_float_although_steps_are_around(peers: Peers, case: str) -> None:
    """torch.ao lowers whatever stands between two steps: see docs/differences.md."""
    op = NONE_BETWEEN[case]
    model = Calls(lambda s, x: s.b(op(s.a(x))), a=conv(padding=1), b=conv(padding=1))

    def mapping(names: Names) -> Any:
        made = PLAIN(names)
        return made.set_object_type(F.max_pool2d, None).set_object_type(F.relu6, None)

    done = peers.compare(model, (X,), mapping, lowered_alike=False, quantizes=2)
    assert steps(done.theirs.lowered) == (1, 0, 1)
    equal(steps(done.ours.reference), steps(done.theirs.reference), "steps")
    linears = Calls(lambda s, x: s.b(s.l(s.a(x))), a=linear(), b=linear(), l=linear())
    switched: Build = lambda names: PLAIN(names).set_module_name("l", None)  # noqa: E731
    peers.compare(linears, (X,), switched, quantizes=2)


# -- S7.2 -----------------------------------------------------------------------------------------

CLASSES: dict[str, tuple[list[nn.Module], Tensor, str, str]] = {
    "Linear": ([linear()], X, "Linear", "quantized::linear"),
    "LinearReLU": ([linear(), nn.ReLU()], X, "LinearReLU", "quantized::linear_relu"),
    "Conv1d": ([nn.Conv1d(3, 4, 3)], LINES, "Conv1d", "quantized::conv1d"),
    "Conv2d": ([conv(3, 4, groups=1, dilation=2)], X, "Conv2d", "quantized::conv2d"),
    "Conv3d": ([nn.Conv3d(3, 4, 3)], CUBES, "Conv3d", "quantized::conv3d"),
    "ConvReLU1d": ([nn.Conv1d(3, 4, 3), nn.ReLU()], LINES, "ConvReLU1d", "quantized::conv1d_relu"),
    "ConvReLU2d": (
        [conv(), nn.BatchNorm2d(3), nn.ReLU()],
        X,
        "ConvReLU2d",
        "quantized::conv2d_relu",
    ),
    "ConvReLU3d": ([nn.Conv3d(3, 4, 3), nn.ReLU()], CUBES, "ConvReLU3d", "quantized::conv3d_relu"),
    "ConvTranspose1d": (
        [nn.ConvTranspose1d(3, 3, 3)],
        LINES,
        "ConvTranspose1d",
        "quantized::conv_transpose1d",
    ),
    "ConvTranspose2d": (
        [nn.ConvTranspose2d(3, 3, 3, 2)],
        X,
        "ConvTranspose2d",
        "quantized::conv_transpose2d",
    ),
    "ConvTranspose3d": (
        [nn.ConvTranspose3d(3, 3, 3)],
        CUBES,
        "ConvTranspose3d",
        "quantized::conv_transpose3d",
    ),
    "BatchNorm2d": ([nn.BatchNorm2d(3)], X, "BatchNorm2d", "quantized::batch_norm2d"),
    "BatchNorm3d": ([nn.BatchNorm3d(3)], CUBES, "BatchNorm3d", "quantized::batch_norm3d"),
    "BNReLU2d": ([nn.BatchNorm2d(3), nn.ReLU()], X, "BNReLU2d", "quantized::batch_norm2d_relu"),
    "BNReLU3d": ([nn.BatchNorm3d(3), nn.ReLU()], CUBES, "BNReLU3d", "quantized::batch_norm3d_relu"),
    "LayerNorm": ([nn.LayerNorm(8)], X, "LayerNorm", "quantized::layer_norm"),
    "InstanceNorm1d": (
        [nn.InstanceNorm1d(3, affine=True)],
        LINES,
        "InstanceNorm1d",
        "quantized::instance_norm",
    ),
    "InstanceNorm2d": (
        [nn.InstanceNorm2d(3, affine=True)],
        X,
        "InstanceNorm2d",
        "quantized::instance_norm",
    ),
    "ELU": ([nn.ELU(0.5)], X, "ELU", "quantized::elu"),
    "LeakyReLU": ([nn.LeakyReLU(0.2)], X, "LeakyReLU", "quantized::leaky_relu"),
    "Hardswish": ([nn.Hardswish()], X, "Hardswish", "quantized::hardswish"),
    "Softmax": ([nn.Softmax(1)], X, "Softmax", "quantized::softmax"),
    "Sigmoid": ([nn.Sigmoid()], X, "Sigmoid", "aten::sigmoid"),
    "Tanh": ([nn.Tanh()], X, "Tanh", "aten::tanh"),
    "Hardsigmoid": ([nn.Hardsigmoid()], X, "Hardsigmoid", "aten::hardsigmoid"),
    "ReLU": ([nn.MaxPool2d(1), nn.ReLU()], X, "ReLU", "aten::relu"),
    "MaxPool2d": ([nn.MaxPool2d(2)], X, "MaxPool2d", "aten::max_pool2d"),
    "AvgPool2d": ([nn.AvgPool2d(2)], X, "AvgPool2d", "aten::avg_pool2d"),
    "AdaptiveAvgPool2d": (
        [nn.AdaptiveAvgPool2d(2)],
        X,
        "AdaptiveAvgPool2d",
        "aten::adaptive_avg_pool2d",
    ),
    "PixelShuffle": (
        [conv(3, 4), nn.PixelShuffle(2)],
        X,
        "PixelShuffle",
        "aten::pixel_shuffle",
    ),
}


@pytest.mark.statement("S7.2a", "S7.8a")
@pytest.mark.parametrize("case", CLASSES)
def test_modules_run_their_kernels(peers: Peers, case: str) -> None:
    layers, x, name, kernel = CLASSES[case]
    model = lively(nn.Sequential(*map(copy.deepcopy, layers))).eval()
    mapping = PLAIN if "Transpose" in case else default_mapping
    done = peers.compare(model, (x,), mapping, quantizes=1)
    assert steps(done.ours.lowered) == (1, 0, 1)
    found = kernels(done.ours.lowered)
    assert found[-1].startswith(kernel.split("(")[0].rsplit("_relu", 1)[0]), found
    assert ("relu" in kernel) <= ("relu" in found[-1])
    classes = [type(m).__name__ for _, m in done.theirs.lowered.named_modules()]
    assert name in classes
    assert not any(n.op == "call_module" for n in done.ours.lowered.graph.nodes)


# -- S7.3 -----------------------------------------------------------------------------------------

PAIR = {"stride": ONES, "padding": ONES, "dilation": ONES, "groups": 1}
W3, W4 = weight(4, 3, 3), weight(4, 3, 3, 3)
FUNCTIONS: dict[str, tuple[Any, Tensor, str]] = {
    "linear": (lambda s, x: F.linear(x, s.w, s.b), X, "quantized::linear"),
    "linear-relu": (lambda s, x: F.relu(F.linear(x, s.w, s.b)), X, "quantized::linear_relu"),
    "conv1d": (
        lambda s, x: F.conv1d(x, s.w3, None, (1,), (1,), (1,), 1),
        LINES,
        "quantized::conv1d",
    ),
    "conv2d": (lambda s, x: F.conv2d(x, s.w4, None, ONES, ONES, ONES, 1), X, "quantized::conv2d"),
    "conv2d-keywords": (lambda s, x: F.conv2d(x, s.w4, bias=None, **PAIR), X, "quantized::conv2d"),
    "conv2d-relu": (
        lambda s, x: F.relu(F.conv2d(x, s.w4, None, TWOS, ONES, ONES, 1)),
        X,
        "quantized::conv2d_relu",
    ),
    "conv3d": (
        lambda s, x: F.conv3d(x, s.w5, None, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1),
        CUBES,
        "quantized::conv3d",
    ),
    "conv_transpose2d": (
        lambda s, x: F.conv_transpose2d(x, s.t4, None, TWOS, ZEROS, ZEROS, 1, ONES),
        X,
        "quantized::conv_transpose2d",
    ),
    "add": (lambda s, x: x + F.max_pool2d(x, 1), X, "quantized::add"),
    "add-relu": (lambda s, x: F.relu(torch.add(x, F.max_pool2d(x, 1))), X, "quantized::add_relu"),
    "mul": (lambda s, x: torch.mul(x, x), X, "quantized::mul"),
    "mul-relu": (lambda s, x: F.relu(x * x), X, "quantized::mul_relu"),
    "iadd": (lambda s, x: operator.iadd(F.hardswish(x), x), X, "quantized::add"),
    "matmul": (lambda s, x: torch.matmul(x, x.transpose(2, 3)), X, "quantized::matmul"),
    "elu": (lambda s, x: F.elu(x, alpha=0.5), X, "quantized::elu"),
    "leaky_relu": (
        lambda s, x: F.leaky_relu(x, negative_slope=0.2),
        X,
        "quantized::leaky_relu",
    ),
    "hardswish": (lambda s, x: F.hardswish(x), X, "quantized::hardswish"),
    "layer_norm": (lambda s, x: F.layer_norm(x, (8,)), X, "quantized::layer_norm"),
    "instance_norm": (lambda s, x: F.instance_norm(x), X, "quantized::instance_norm"),
    "cat": (lambda s, x: torch.cat([x, x], dim=1), X, "aten::cat"),
    "clamp": (lambda s, x: torch.clamp(x, min=-0.5, max=0.5), X, "aten::clamp"),
    "max_pool2d": (
        lambda s, x: F.max_pool2d(x, kernel_size=2, stride=1, padding=1),
        X,
        "aten::max_pool2d",
    ),
    "avg_pool2d": (lambda s, x: F.avg_pool2d(x, kernel_size=2), X, "aten::avg_pool2d"),
    "interpolate": (lambda s, x: F.interpolate(x, scale_factor=2), X, "aten::"),
    "stack": (lambda s, x: torch.stack([x, x], dim=1), X, "aten::stack"),
}


@pytest.mark.statement("S7.3a", "S7.5a")
@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_become_operators(peers: Peers, case: str) -> None:
    function, x, kernel = FUNCTIONS[case]
    w5, t4 = weight(4, 3, 3, 3, 3), weight(3, 3, 3, 3)
    model = Calls(function, w=weight(6, 8), b=weight(6), w3=W3, w4=W4, w5=w5, t4=t4)
    done = peers.compare(model, (x,), PLAIN, quantizes=1)
    assert steps(done.ours.lowered) == (1, 0, 1)
    assert any(k.startswith(kernel) for k in kernels(done.ours.lowered)), kernels(done.ours.lowered)
    equal(targets(done.ours.lowered), targets(done.theirs.lowered), "attributes that are read")


@pytest.mark.statement("S7.3a")
def test_a_transposed_convolution_and_a_relu_stay_two(peers: Peers) -> None:
    model = Calls(
        lambda s, x: F.relu(F.conv_transpose2d(x, s.w, None, TWOS, ZEROS, ZEROS, 1, ONES)),
        w=weight(3, 3, 3, 3),
    )
    done = peers.compare(model, (X,), PLAIN, quantizes=1)
    assert len(kernels(done.ours.lowered)) == 2
    assert len(placement(done.ours.prepared)) == 4


KEYWORDS: dict[str, tuple[Any, Any]] = {
    "linear-input": (
        lambda s, x: F.linear(input=x, weight=s.w, bias=s.b),
        lambda s, x: F.linear(x, s.w, s.b),
    ),
    "linear-weight": (
        lambda s, x: F.linear(x, weight=s.w, bias=s.b),
        lambda s, x: F.linear(x, s.w, s.b),
    ),
    "conv-weight": (
        lambda s, x: F.conv2d(x, weight=s.w4, bias=None, **PAIR),
        lambda s, x: F.conv2d(x, s.w4, None, ONES, ONES, ONES, 1),
    ),
    "conv-numbers": (
        lambda s, x: F.conv2d(x, s.w4, None, 1, 1, 1, 1),
        lambda s, x: F.conv2d(x, s.w4, None, ONES, ONES, ONES, 1),
    ),
    "conv-padding-alone": (
        lambda s, x: F.conv2d(x, s.w4, padding=1),
        lambda s, x: F.conv2d(x, s.w4, None, ONES, ONES, ONES, 1),
    ),
    "conv-same": (
        lambda s, x: F.conv2d(x, s.w4, padding="same"),
        lambda s, x: F.conv2d(x, s.w4, None, ONES, ONES, ONES, 1),
    ),
    "add": (
        lambda s, x: torch.add(input=x, other=F.max_pool2d(x, 1)),
        lambda s, x: torch.add(x, F.max_pool2d(x, 1)),
    ),
    "mul": (
        lambda s, x: torch.mul(x, other=F.max_pool2d(x, 1)),
        lambda s, x: torch.mul(x, F.max_pool2d(x, 1)),
    ),
    "cat": (
        lambda s, x: torch.cat(tensors=[x, F.max_pool2d(x, 1)], dim=1),
        lambda s, x: torch.cat([x, F.max_pool2d(x, 1)], 1),
    ),
}


@pytest.mark.statement("S7.3a", "S7.11a")
@pytest.mark.parametrize("case", KEYWORDS)
def test_calls_that_torch_ao_cannot_lower(peers: Peers, case: str) -> None:
    """They are the positional calls: see docs/differences.md."""
    function, positional = KEYWORDS[case]
    parts = {"w": weight(6, 8), "b": weight(6), "w4": W4}
    expected = run(converted(peers, THEIRS, Calls(positional, **parts), X), (X,))
    ours = converted(peers, OURS, Calls(function, **parts), X)
    assert steps(ours) == (1, 0, 1)
    assert_same(run(ours, (X,)), expected)
    if case == "cat":
        model = Calls(function, **parts)
        made = [peers.prepare(names, model, (X,), PLAIN)[0] for names in (THEIRS, OURS)]
        assert len(placement(made[0])) < len(placement(made[1]))
        return
    with pytest.raises((AssertionError, RuntimeError)):
        run(converted(peers, THEIRS, Calls(function, **parts), X), (X,))


# -- S7.4, S7.5 -----------------------------------------------------------------------------------


def targets(graph: fx.GraphModule) -> list[str]:
    """The attributes that a graph reads."""
    return sorted({str(n.target) for n in graph.graph.nodes if n.op == "get_attr"})


def inside(function: Any, **parts: Any) -> nn.Module:
    return nn.Sequential(Calls(function, **parts))


PACKED: dict[str, nn.Module] = {
    "linear": Calls(lambda s, x: F.linear(x, s.w, s.b), w=weight(6, 8), b=weight(6)),
    "linear-relu": Calls(lambda s, x: F.relu(F.linear(x, s.w)), w=weight(6, 8)),
    "conv": Calls(
        lambda s, x: F.conv2d(x, s.w, s.b, ONES, ZEROS, ONES, 1), w=weight(4, 3, 3, 3), b=weight(4)
    ),
    "chain": Calls(
        lambda s, x: F.linear(s.d(s.e(x)), s.w),
        e=inside(lambda s, x: F.linear(x, s.w, s.b), w=weight(8, 8), b=weight(8)),
        d=inside(lambda s, x: F.relu(F.linear(x, s.w)), w=weight(8, 8)),
        w=weight(4, 8),
    ),
    "twice": Calls(lambda s, x: F.linear(F.linear(x, s.w), s.w), w=weight(8, 8)),
    "add": Calls(lambda s, x: F.linear(x, s.w) + F.linear(x, s.v), w=weight(6, 8), v=weight(6, 8)),
}
QCONFIGS = ("default_qconfig", "default_per_channel_qconfig", "default_dynamic_qconfig")


@pytest.mark.statement("S7.4a", "S7.5a")
@pytest.mark.parametrize("qconfig", QCONFIGS)
@pytest.mark.parametrize("case", PACKED)
def test_weights_are_packed_under_names(peers: Peers, case: str, qconfig: str) -> None:
    model, mapping = PACKED[case], everywhere(qconfig)
    if "dynamic" in qconfig and case == "conv":
        mapping = everywhere("default_qconfig")
    done = peers.compare(model, (X,), mapping, lowered_alike="dynamic" not in qconfig)
    theirs, ours = done.theirs.lowered, done.ours.lowered
    equal(targets(ours), targets(theirs), "attributes that are read")
    equal(sorted(ours.state_dict()), sorted(theirs.state_dict()), "keys of the state")
    assert not any("prepack" in str(n.target) for n in ours.graph.nodes)
    packed = [key for key in ours.state_dict() if "_packed_weight_" in key]
    assert packed
    for key in packed:
        mine, other = ours.state_dict()[key], theirs.state_dict()[key]
        assert isinstance(mine, torch.ScriptObject)
        assert getattr(ours, key) is mine
        assert torch.equal(mine.unpack()[0].int_repr(), other.unpack()[0].int_repr())
    with quiet():
        scripted = torch.jit.script(ours)
    assert set(scripted.state_dict()) == set(ours.state_dict()) - set(packed)
    assert_same(run(scripted, (X,)), run(ours, (X,)))


@pytest.mark.statement("S7.4a", "S10.2a")
@pytest.mark.parametrize(
    ("case", "qconfig"),
    [
        *(("linear", qconfig) for qconfig in (*QCONFIGS, "float16_dynamic_qconfig")),
        *(("chain", qconfig) for qconfig in ("default_qconfig", "default_dynamic_qconfig")),
        *(("conv", qconfig) for qconfig in QCONFIGS[:2]),
        *((f"conv{n}d", QCONFIGS[n // 2]) for n in (1, 3)),
    ],
)
def test_packed_weights_load(peers: Peers, case: str, qconfig: str) -> None:
    mapping = everywhere(qconfig)
    x = {"conv1d": LINES, "conv3d": CUBES}.get(case, X)

    def model(factor: float) -> nn.Module:
        if case in ("conv1d", "conv3d"):
            n = int(case[4])
            function = lambda s, x: getattr(F, case)(  # noqa: E731
                x, s.w, s.b, (1,) * n, (0,) * n, (1,) * n, 1
            )
            made: nn.Module = Calls(function, w=weight(4, 3, *[3] * n), b=weight(4))
        else:
            made = copy.deepcopy(PACKED[case])
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(factor)
        return made

    results = []
    for names in (THEIRS, OURS):
        first, second = (converted(peers, names, model(f), x, mapping) for f in (1.0, -2.0))
        expected = run(first, (x,))
        results.append(expected)
        assert not torch.equal(run(second, (x,)), expected)
        assert any("_packed_weight_" in key for key in first.state_dict())
        if case == "chain" and names is THEIRS:
            continue  # it does not load several: see docs/differences.md
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        with quiet():
            second.load_state_dict(torch.load(file, weights_only=False))
        assert_same(run(second, (x,)), expected)
        if "float16" not in qconfig:
            assert_same_weights(second, first)
    assert_same(*results)


@pytest.mark.statement("S7.5a")
def test_modules_read_no_scale_of_their_own(peers: Peers) -> None:
    model = Calls(lambda s, x: s.h(s.a(x)) + s.b(x), a=conv(), b=conv(), h=nn.Hardswish())
    done = peers.compare(model, (X,), PLAIN, quantizes=1)
    found = [
        [t for t in targets(side.lowered) if "scale" in t or "zero" in t]
        for side in (done.ours, done.theirs)
    ]
    assert found[0] == found[1]
    assert found[0] == ["_scale_0", "_zero_point_0", "a_input_scale_0", "a_input_zero_point_0"]


# -- S7.6 to S7.9 ---------------------------------------------------------------------------------

SCALARS: dict[str, tuple[Any, str]] = {
    "add": (lambda s, x: s.a(x) + 2, "quantized::add.Scalar"),
    "radd": (lambda s, x: 2 + s.a(x), "quantized::add.Scalar"),
    "torch.add": (lambda s, x: torch.add(s.a(x), 0.3), "quantized::add.Scalar"),
    "mul": (lambda s, x: s.a(x) * 0.5, "quantized::mul.Scalar"),
    "negative": (lambda s, x: s.a(x) * -0.5, "quantized::mul.Scalar"),
    "add-relu": (lambda s, x: F.relu(s.a(x) + 2), "quantized::add_relu.Scalar"),
    "mul-relu": (lambda s, x: F.relu(s.a(x) * 2), "quantized::mul_relu.Scalar"),
    "input": (lambda s, x: F.relu(x + 2), "quantized::add_relu.Scalar"),
}


@pytest.mark.statement("S7.6a")
@pytest.mark.parametrize("case", SCALARS)
def test_numbers_need_no_scale(peers: Peers, case: str) -> None:
    function, kernel = SCALARS[case]
    done = peers.compare(Calls(function, a=conv()), (X,), PLAIN, quantizes=1)
    (node,) = (n for n in done.ours.lowered.graph.nodes if record_of(n).kernel == kernel)
    assert len(node.args) == 2
    assert record_of(node).bound == ()


@pytest.mark.statement("S7.6b")
@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_a_number_of_the_graph_is_added_in_float(peers: Peers, op: Any) -> None:
    model = Calls(lambda s, x: s.b(op(s.a(x), x.size(0))), a=conv(), b=conv())
    done = peers.compare(model, (X,), PLAIN, quantizes=2)
    assert kernels(done.ours.lowered) == ["quantized::conv2d"] * 2
    assert off(run(done.ours.lowered, (X,)), model, X) < 0.05


FIXED: dict[str, tuple[Any, float, int]] = {
    "softmax": (nn.Softmax(1), 1 / 256, 0),
    "sigmoid": (torch.sigmoid, 1 / 256, 0),
    "sigmoid-module": (nn.Sigmoid(), 1 / 256, 0),
    "hardsigmoid": (F.hardsigmoid, 1 / 256, 0),
    "tanh": (torch.tanh, 2 / 256, 128),
    "tanh-module": (nn.Tanh(), 2 / 256, 128),
}


@pytest.mark.statement("S7.7a")
@pytest.mark.parametrize("case", FIXED)
def test_kernels_of_fixed_parameters(peers: Peers, case: str) -> None:
    act, scale, zero_point = FIXED[case]
    model = Calls(lambda s, x: s.act(s.a(x)), a=conv(), act=act)
    custom: Build = lambda n: n.PrepareCustomConfig().set_output_quantized_indexes([0])  # noqa: E731
    results = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (X,), custom=custom)
        run(prepared, (X,))
        _, lowered = peers.convert(names, prepared)
        result = run(lowered, (X,))
        assert (result.q_scale(), result.q_zero_point()) == (scale, zero_point)
        results.append(result.int_repr())
    assert torch.equal(*results)
    done = peers.compare(model, (X,), quantizes=1)
    assert len(observers(done.ours.prepared)) == 3


ONE_STEP: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "shared-input": (lambda s, x: s.a(x) + s.b(x), (1, 0, 1)),
    "diamond": (lambda s, x: (lambda y: s.a(y) + y)(s.b(x)), (1, 0, 1)),
    "two-results": (lambda s, x: (s.a(x), s.b(x)), (1, 0, 2)),
    "one-result-twice": (lambda s, x: (lambda y: [y, {"y": y}])(s.a(x)), (1, 0, 1)),
    "long": (lambda s, x: F.relu(s.c(F.hardtanh(s.a(x) + s.b(x)))) * 2, (1, 0, 1)),
    "float-adds": (lambda s, x: s.a(x) + x.size(0) + (s.b(x) + x.size(1)), (3, 0, 3)),
}


@pytest.mark.statement("S7.8a")
@pytest.mark.parametrize("case", ONE_STEP)
def test_one_step_a_value(peers: Peers, case: str) -> None:
    function, wanted = ONE_STEP[case]
    model = Calls(function, a=conv(padding=1), b=conv(padding=1), c=conv(padding=1))
    done = peers.compare(model, (X,), PLAIN)
    assert steps(done.ours.lowered) == wanted
    equal(steps(done.ours.lowered), steps(done.theirs.lowered), "steps")


@pytest.mark.statement("S7.9a")
def test_shapes_are_read_from_the_quantized_tensor(peers: Peers) -> None:
    model = Calls(
        lambda s, x: (lambda y: s.b(y.reshape(y.size(0), y.shape[1], -1, 1)))(s.a(x)),
        a=conv(padding=1),
        b=conv(3, 3, 1),
    )
    done = peers.compare(model, (X,), PLAIN, quantizes=1)
    lowered = done.ours.lowered
    assert steps(lowered) == (1, 0, 1)
    readers = [n for n in lowered.graph.nodes if n.target == "size" or n.target is getattr]
    assert len(readers) == 2
    for node in readers:
        assert record_of(node.args[0]).kernel.startswith("quantized::conv2d")


# -- where torch.ao is wrong ----------------------------------------------------------------------


@pytest.mark.statement("S7.10b")
@pytest.mark.parametrize("kind", ["linear", "conv", "hardswish"])
def test_each_call_of_a_module_has_its_own_output_parameters(peers: Peers, kind: str) -> None:
    """torch.ao's lowered module has those of the last call: see docs/differences.md."""
    model = {
        "linear": Calls(lambda s, x: s.a(s.a(x)), a=linear()),
        "conv": Calls(lambda s, x: s.a(s.a(x)), a=conv(padding=1)),
        "hardswish": Calls(
            lambda s, x: s.h(s.b(s.h(s.a(x)))), a=conv(), b=conv(), h=nn.Hardswish()
        ),
    }[kind]
    done = peers.compare(model, (X,), PLAIN, lowered_alike=False, quantizes=1)
    ours, theirs = (off(run(s.lowered, (X,)), model, X) for s in (done.ours, done.theirs))
    assert ours < 0.05
    assert theirs > 2 * ours
    assert steps(done.theirs.lowered) == (1, 0, 1)


NEIGHBOURS: dict[str, Any] = {
    "sigmoid": lambda s, x: s.b(torch.sigmoid(s.a(x))),
    "tanh": lambda s, x: s.b(s.a(x).tanh()),
    "softmax": lambda s, x: s.b(s.m(s.a(x))),
    "channel_shuffle": lambda s, x: s.b(F.channel_shuffle(s.a(x), 3)),
}


@pytest.mark.statement("S7.11a")
@pytest.mark.parametrize("case", NEIGHBOURS)
def test_what_has_no_observer_of_its_kind_stays_in_float(peers: Peers, case: str) -> None:
    """torch.ao lowers it with its neighbours' parameters: see docs/differences.md."""
    model = Calls(NEIGHBOURS[case], a=conv(), b=conv(), m=nn.Softmax(1))
    done = peers.compare(model, (X,), PLAIN, lowered_alike=False, quantizes=2)
    assert steps(done.theirs.lowered) == (1, 0, 1)
    assert kernels(done.ours.lowered) == ["quantized::conv2d"] * 2
    assert off(run(done.ours.lowered, (X,)), model, X) < 0.05


@pytest.mark.statement("S7.11a")
def test_alpha_counts(peers: Peers) -> None:
    """torch.ao drops it: see docs/differences.md."""
    model = Calls(lambda s, x: torch.add(s.a(x), s.b(x), alpha=2), a=conv(), b=conv())
    done = peers.compare(model, (X,), PLAIN, lowered_alike=False)
    assert off(run(done.ours.lowered, (X,)), model, X) < 0.05
    assert off(run(done.theirs.lowered, (X,)), model, X) > 0.2
    scaled = Calls(lambda s, x: torch.add(s.a(x), 3, alpha=2), a=conv())
    ours = converted(peers, OURS, scaled, X)
    assert off(run(ours, (X,)), scaled, X) < 0.05


# -- S7.12 to S7.14 -------------------------------------------------------------------------------

UNSEEN = r"must run observer before calling calculate_qparams\. *Returning default values\."


@pytest.mark.statement("S7.12a")
@pytest.mark.parametrize("qconfig", ["default_qconfig", "default_per_channel_qconfig"])
def test_an_uncalibrated_model_converts_with_a_warning(peers: Peers, qconfig: str) -> None:
    model = Calls(lambda s, x: F.relu(s.a(x)) + s.b(x), a=conv(), b=conv())
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (X,), everywhere(qconfig))
        for convert in (names.convert_to_reference_fx, names.convert_fx):
            with pytest.warns(UserWarning, match=UNSEEN.replace(r"\. *", r"\.? *")):
                convert(copy.deepcopy(prepared))
    done = peers.compare(model, (X,), everywhere(qconfig), calibrated=False)
    lowered: Any = done.ours.lowered
    assert (float(lowered.a_input_scale_0), int(lowered.a_input_zero_point_0)) == (1.0, 0)
    assert observed_with(done.ours.prepared) == []


@pytest.mark.statement("S7.13a")
def test_convert_says_what_it_needs(peers: Peers) -> None:
    model = nn.Sequential(conv()).eval()
    done = peers.compare(model, (X,))
    for names, side in ((THEIRS, done.theirs), (OURS, done.ours)):
        for convert in (names.convert_fx, names.convert_to_reference_fx):
            with (
                quiet(),
                pytest.raises(
                    ValueError,
                    match=r"input model must be a GraphModule, Got type:.* Please make sure to"
                    r" follow the tutorials\.",
                ),
            ):
                convert(model)
            for wrong in (fx.symbolic_trace(model), side.lowered):
                with (
                    quiet(),
                    pytest.raises(
                        AssertionError, match="incoming model must be produced by prepare_fx"
                    ),
                ):
                    convert(wrong)


@pytest.mark.statement("S7.14a")
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
def test_default_mappings(peers: Peers, backend: str) -> None:
    model = Calls(lambda s, x: s.m(s.a(x)), a=conv(3, 4), m=nn.Sigmoid())
    mapping: Build = lambda n: n.get_default_qconfig_mapping(backend)  # noqa: E731
    done = peers.compare(model, (X,), mapping, lowered_alike=backend != "qnnpack", quantizes=1)
    (_, _, _, spec), *_ = placement(done.ours.prepared)
    assert spec[2:4] == ((0, 127) if backend in ("x86", "fbgemm") else (0, 255))
    module: Any = done.ours.reference.get_submodule("a")
    assert module.weight_scale.numel() == (1 if backend == "qnnpack" else 4)
    for names in (THEIRS, OURS):
        for get in (names.get_default_qconfig_mapping, names.get_default_qat_qconfig_mapping):
            with pytest.raises(AssertionError, match="not supported"):
                get("no such")


@pytest.mark.statement("S7.5a", "S7.8a")
def test_a_constant_is_quantized_at_every_call(peers: Peers) -> None:
    model = CallsTwo(lambda s, x, y: s.a(x) + s.p + y, a=conv(padding=1), p=weight(3, 1, 1))
    done = peers.compare(model, (X, X), PLAIN, quantizes=3)
    equal(
        [t for t in targets(done.ours.lowered) if "packed" not in t],
        targets(done.theirs.lowered),
        "attributes that are read",
    )
