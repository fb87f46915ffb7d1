"""Section 5: which values are observed, by what, under which names."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Names,
    Peers,
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
from tests.conformance.models import Calls, CallsTwo, CallsWithOptions, conv, images, linear

pytestmark = pytest.mark.peer

X = images()


def between(function: Any, where: str, width: int = 3) -> nn.Module:
    """``function`` behind a convolution, before one, between two, or alone."""
    return Calls(
        {
            "behind": lambda s, x: s.f(s.a(x)),
            "between": lambda s, x: s.b(s.f(s.a(x))),
            "before": lambda s, x: s.b(s.f(x)),
            "alone": lambda s, x: s.f(x),
        }[where],
        a=conv(padding=1),
        b=conv(width, 3, 1),
        f=function,
    )


def first_of(side: Any) -> list[int]:
    """For each call of an observer, the first call of the same module."""
    return [first for _, _, first, _ in placement(side.prepared)]


def check_all_in_int8(peers: Peers, prepared: Any, model: nn.Module) -> None:
    """Converted, one pair of quantize and dequantize is left, and the result is near."""
    run(prepared, (X,))
    _, lowered = peers.convert(OURS, prepared)
    assert steps(lowered) == (1, 0, 1)
    with torch.no_grad():
        expected = model(X)
    assert float((run(lowered, (X,)) - expected).norm() / expected.norm()) < 0.05


def places(*quick: str) -> list[Any]:
    """Where an op stands; all but the quick ones only where slow tests run."""
    everywhere_else = [
        name for name in ("behind", "between", "before", "alone") if name not in quick
    ]
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in everywhere_else)]


OWN: dict[str, Any] = {
    "matmul": lambda x: torch.matmul(x, x.transpose(2, 3)),
    "add": lambda x: x + x,
    "torch.add": lambda x: torch.add(x, x),
    "mul": lambda x: x * x,
    "torch.mul": lambda x: torch.mul(x, x),
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "instance_norm": F.instance_norm,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh(),
    "hardsigmoid": F.hardsigmoid,
}
OWN_MODULES: dict[str, Any] = {
    "batch_norm": nn.BatchNorm2d(3),
    "elu": nn.ELU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "hardswish": nn.Hardswish(),
    "layer_norm": nn.LayerNorm(8),
    "instance_norm": nn.InstanceNorm2d(3, affine=True),
    "dropout": nn.Dropout(),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
    "tanh": nn.Tanh(),
    "softmax": nn.Softmax(1),
    "conv_transpose": nn.ConvTranspose2d(3, 3, 3, padding=1),
}


@pytest.mark.statement("S5.4a")
@pytest.mark.parametrize("where", places("between", "alone"))
@pytest.mark.parametrize("op", OWN)
def test_functions_with_an_observer_of_their_own(peers: Peers, op: str, where: str) -> None:
    done = peers.compare(between(OWN[op], where), (X,))
    wanted = {"behind": 3, "between": 4, "before": 3, "alone": 2}[where] + (op == "matmul")
    assert len(set(first_of(done.ours))) == wanted - (op == "matmul")


@pytest.mark.statement("S5.4a")
@pytest.mark.parametrize("where", ["between", "alone"])
@pytest.mark.parametrize("op", OWN_MODULES)
def test_modules_with_an_observer_of_their_own(peers: Peers, op: str, where: str) -> None:
    two = {"between": lambda s, x: s.b(s.part(s.a(x))), "alone": lambda s, x: s.part(x)}[where]
    if op == "batch_norm" and where == "between":
        two = lambda s, x: s.b(s.part(F.max_pool2d(s.a(x), 1)))  # noqa: E731  # else it is folded
    model = Calls(two, a=conv(padding=1), b=conv(), part=OWN_MODULES[op])
    mapping = everywhere("default_qconfig") if op == "conv_transpose" else default_mapping
    done = peers.compare(model, (X,), mapping)
    assert len(set(first_of(done.ours))) == (4 if where == "between" else 2)


@pytest.mark.statement("S5.4a")
def test_parametric_relu_and_group_norm(peers: Peers) -> None:
    """Observed as in torch.ao, and computed as they should be: see docs/differences.md."""
    model = Calls(lambda s, x: s.b(s.p(s.a(x))), a=conv(), b=conv(), p=nn.PReLU())
    peers.compare(model, (X,), lowered_alike=False)
    model = between(lambda x: F.group_norm(x, 3), "between")
    done = peers.compare(model, (X,), lowered_alike=False, quantizes=1)
    assert steps(done.theirs.lowered) == (2, 0, 2)


SHARED: dict[str, Any] = {
    "F.relu": F.relu,
    "F.relu-in-place": lambda x: F.relu(x, inplace=True),
    ".relu": lambda x: x.relu(),
    ".relu_": lambda x: x.relu_(),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardtanh_": F.hardtanh_,
    "torch.clamp": lambda x: torch.clamp(x, -0.5, 0.5),
    ".clamp": lambda x: x.clamp(-0.5, 0.5),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "torch.mean": lambda x: torch.mean(x, 1, keepdim=True).repeat(1, 3, 1, 1),
    ".mean": lambda x: x.mean((2, 3), True),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate-bilinear": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
    "torch.flatten": lambda x: torch.flatten(x, 2).unsqueeze(3),
    ".view": lambda x: x.contiguous().view(2, 3, 4, 16),
    ".reshape": lambda x: x.reshape(2, 3, 4, 16),
    ".permute": lambda x: x.permute(0, 1, 3, 2),
    ".contiguous": lambda x: x.contiguous(),
    ".squeeze": lambda x: x.squeeze(0),
    ".squeeze_": lambda x: x.squeeze_(0),
    ".unsqueeze": lambda x: x.unsqueeze(0).squeeze(0),
    ".unsqueeze_": lambda x: x.unsqueeze_(0).squeeze(0),
    ".detach": lambda x: x.detach(),
    ".repeat": lambda x: x.repeat(2, 1, 1, 1),
    ".repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    ".transpose": lambda x: x.transpose(2, 3),
    ".resize_": lambda x: x.resize_(2, 3, 8, 8),
    "torch.transpose": lambda x: torch.transpose(x, 2, 3),
    "torch.squeeze": lambda x: torch.squeeze(x, 0),
    "torch.unsqueeze": lambda x: torch.squeeze(torch.unsqueeze(x, 0), 0),
    "torch.narrow": lambda x: torch.narrow(x, 2, 0, 4),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, 2, 0),
    "pixel_unshuffle": lambda x: torch.narrow(F.pixel_unshuffle(x, 2), 1, 0, 3),
    "identity": nn.Identity(),
    "stack": lambda x: torch.squeeze(torch.narrow(torch.stack([x, x]), 0, 0, 1), 0),
    "cat": lambda x: torch.cat([x, x], 2),
    "add-number": lambda x: x + 1,
    "add-to-number": lambda x: 1 + x,
    "torch.add-number": lambda x: torch.add(x, 0.5),
    "mul-number": lambda x: x * 2,
    "mul-with-number": lambda x: 2 * x,
    "torch.mul-number": lambda x: torch.mul(x, 0.5),
    "iadd-number": lambda x: operator.iadd(x, 2),
}
WRITES_ITS_INPUT = {
    ".relu_",
    "F.relu-in-place",
    "hardtanh_",
    ".squeeze_",
    ".unsqueeze_",
    ".resize_",
}


@pytest.mark.statement("S5.5a")
@pytest.mark.parametrize("where", places("between"))
@pytest.mark.parametrize("op", SHARED)
def test_ops_that_share_the_observer_of_their_input(peers: Peers, op: str, where: str) -> None:
    if op in (*WRITES_ITS_INPUT, ".reshape") and where in ("before", "alone"):
        where = "between"  # a reshape has its input's observer, or none
    fuses = op.startswith("F.relu") and where in ("behind", "between")
    done = peers.compare(between(SHARED[op], where), (X,), quantizes=1)
    firsts = first_of(done.ours)
    assert len(set(firsts)) == {"behind": 2, "between": 3, "before": 2, "alone": 1}[where]
    assert fuses or len(firsts) > len(set(firsts))


@pytest.mark.statement("S5.5a")
@pytest.mark.parametrize(
    "module",
    [
        *(nn.ReLU6(), nn.Hardtanh(), nn.MaxPool2d(2), nn.AvgPool2d(2)),
        *(nn.AdaptiveAvgPool2d(2), nn.Identity(), nn.PixelUnshuffle(1)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_share_the_observer_of_their_input(peers: Peers, module: nn.Module) -> None:
    model = Calls(lambda s, x: s.b(s.part(s.a(x))), a=conv(), b=conv(3, 3, 1), part=module)
    done = peers.compare(model, (X,), quantizes=1)
    assert first_of(done.ours) == [0, 1, 1, 3]


@pytest.mark.statement("S5.5a", "S5.4a")
def test_pools_of_other_dimensions(peers: Peers) -> None:
    lines = Calls(
        lambda s, x: s.b(F.adaptive_avg_pool1d(F.avg_pool1d(F.max_pool1d(s.a(x), 2), 2), 3)),
        a=nn.Conv1d(3, 3, 3),
        b=nn.Conv1d(3, 2, 1),
    )
    peers.compare(lines, (torch.randn(2, 3, 18),), quantizes=1)
    cubes = Calls(
        lambda s, x: s.b(F.adaptive_avg_pool3d(F.avg_pool3d(F.max_pool3d(s.a(x), 2), 1), 2)),
        a=nn.Conv3d(3, 3, 1),
        b=nn.Conv3d(3, 2, 1),
    )
    done = peers.compare(cubes, (torch.randn(2, 3, 6, 6, 6),), quantizes=1)
    assert first_of(done.ours) == [0, 1, 1, 1, 1, 5]


FLOAT: dict[str, Any] = {
    "torch.reshape": lambda x: torch.reshape(x, (2, 3, 4, -1)),
    "torch.permute": lambda x: torch.permute(x, (0, 1, 3, 2)),
    ".flatten": lambda x: x.flatten(3),
    "nn.Flatten": nn.Flatten(3),
    "chunk": lambda x: x.chunk(2, 2)[0],
    "split": lambda x: x.split(2, 2)[1],
    "unbind": lambda x: torch.permute(x.unbind(0)[0], (0, 1, 2))[None],
    "item": lambda x: x[:, :, 1:],
    "expand": lambda x: x.expand(2, 3, -1, -1),
    "pad": lambda x: F.pad(x, (1, 1)),
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "sub": lambda x: x - 1,
    "div": lambda x: x / 2,
    "neg": lambda x: -x,
    "bmm": lambda x: torch.bmm(x[0], x[0])[None],
    "matmul-operator": lambda x: x @ x,
    ".add": lambda x: x.add(1),
    "torch.relu": torch.relu,
    "torch.clip": lambda x: torch.clip(x, -1, 1),
    "sum": lambda x: x.sum(0, keepdim=True),
    "F.softmax": lambda x: F.softmax(x, 1),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "clone": lambda x: x.clone(),
    "prelu": lambda x: torch.prelu(x, torch.ones(1)),
}


@pytest.mark.statement("S5.7a", "S5.7b")
@pytest.mark.parametrize("op", FLOAT)
def test_what_is_not_quantized(peers: Peers, op: str) -> None:
    fuses = op == "torch.relu"
    done = peers.compare(between(FLOAT[op], "behind"), (X,), quantizes=1)
    assert len(placement(done.ours.prepared)) == 2
    done = peers.compare(between(FLOAT[op], "between"), (X,), quantizes=2)
    assert first_of(done.ours) == [0, 1, 2, 3]
    alone, _ = peers.prepare(OURS, between(FLOAT[op], "alone"), (X,))
    assert placement(alone) == []
    assert not fuses or len(placement(done.theirs.prepared)) == 4


@pytest.mark.statement("S5.7c")
def test_channel_shuffle(peers: Peers) -> None:
    """In float between quantized neighbours: see docs/differences.md."""
    shuffle = lambda x: F.channel_shuffle(x, 3)  # noqa: E731
    peers.compare(between(shuffle, "behind"), (X,), quantizes=1)
    done = peers.compare(between(shuffle, "between"), (X,), lowered_alike=False, quantizes=2)
    assert first_of(done.ours) == [0, 1, 2, 3]
    assert steps(done.theirs.lowered) == (1, 0, 1)


@pytest.mark.statement("S5.1a")
def test_names_count_insertions(peers: Peers) -> None:
    model = Calls(
        lambda s, x: torch.cat([F.relu(s.a(x) + s.b(x)), F.max_pool2d(s.c(x), 1)]).mean((2, 3)),
        a=conv(),
        b=conv(),
        c=conv(),
    )
    done = peers.compare(model, (X,), quantizes=1)
    for side in (done.theirs, done.ours):
        names = [name for name, _ in observers(side.prepared)]
        assert sorted(names) == sorted(f"activation_post_process_{n}" for n in range(len(names)))
        assert all(hasattr(side.prepared, name) for name in names)
    assert len(placement(done.ours.prepared)) == 8


def chosen(a: str, b: str) -> Build:
    def mapping(names: Names) -> Any:
        found = names.QConfigMapping().set_module_name("a", getattr(names, a))
        return found.set_module_name("b", getattr(names, b))

    return mapping


@pytest.mark.statement("S5.2a")
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_value_is_observed_once(peers: Peers, kind: str) -> None:
    def function(s: Any, x: Tensor) -> Any:
        y = s.a(x) if kind == "output" else x
        return s.b(y), s.c(y), F.gelu(y), F.max_pool2d(y, 2), y.size(0), y.shape[1], y.ndim

    parts = {name: conv(padding=1) for name in "abc"}
    done = peers.compare(Calls(lambda s, x: function(s, x)[:4], **parts), (X,))
    assert len(placement(done.ours.prepared)) == (5 if kind == "output" else 4)
    whole = Calls(function, **parts)
    made = [peers.prepare(names, whole, (X,))[0] for names in (THEIRS, OURS)]
    for prepared in made:
        (value,) = (n for n in prepared.graph.nodes if n.name == ("a" if kind == "output" else "x"))
        readers = {str(user.target) for user in value.users if "process" not in str(user.target)}
        assert "size" not in readers or kind == "input"
    assert placement(made[1]) == placement(made[0])


@pytest.mark.statement("S5.2b")
def test_the_shape_of_an_input_is_read_from_it(peers: Peers) -> None:
    model = Calls(
        lambda s, x: s.a(x).reshape(x.size(0), -1).reshape(x.shape[0], 1, -1).unsqueeze(x.ndim - 4),
        a=conv(),
    )
    done = peers.compare(model, (X,), quantizes=1)
    for side in (done.theirs, done.ours):
        for node in side.prepared.graph.nodes:
            if node.target == "size" or node.name.startswith("getattr"):
                assert node.args[0].op == "placeholder"


@pytest.mark.statement("S5.3a", "S5.3b")
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_qconfigs_of_one_class_the_first_decides(peers: Peers, order: str) -> None:
    def mapping(names: Names) -> Any:
        found = names.QConfigMapping()
        for name, most in (("a", 127), ("b", 255)):
            activation = names.MinMaxObserver.with_args(quant_min=0, quant_max=most)
            qconfig = names.QConfig(activation=activation, weight=names.default_weight_observer)
            found.set_module_name(name, qconfig)
        return found

    function = {"ab": lambda s, x: (s.a(x), s.b(x)), "ba": lambda s, x: (s.b(x), s.a(x))}[order]
    done = peers.compare(Calls(function, a=conv(), b=conv()), (X,), mapping, quantizes=1)
    assert len(placement(done.ours.prepared)) == 3
    chain = Calls(lambda s, x: s.b(s.a(x)) if order == "ab" else s.a(s.b(x)), a=conv(), b=conv())
    done = peers.compare(chain, (X,), mapping, quantizes=1)
    assert len(placement(done.ours.prepared)) == 3


@pytest.mark.statement("S5.3a")
def test_observers_of_two_classes_stand_side_by_side(peers: Peers) -> None:
    def mapping(names: Names) -> Any:
        found = names.QConfigMapping().set_module_name("a", names.default_qconfig)
        return found.set_module_name("b", names.get_default_qconfig("x86"))

    model = Calls(lambda s, x: (s.a(x), s.b(x)), a=conv(), b=conv())
    done = peers.compare(model, (X,), mapping, quantizes=2)
    assert len(placement(done.ours.prepared)) == 4
    chain = Calls(lambda s, x: s.b(s.a(x)), a=conv(), b=conv())
    done = peers.compare(chain, (X,), mapping, quantizes=1)
    assert len(placement(done.ours.prepared)) == 3


MIXED: dict[str, tuple[Any, int, int]] = {
    "side-by-side": (lambda s, x: (s.a(x), s.b(x)), 3, 1),
    "dynamic-first": (lambda s, x: (s.b(x), s.a(x)), 3, 1),
    "one-behind-the-other": (lambda s, x: s.b(s.a(x)), 3, 1),
    "both-behind": (lambda s, x: (lambda y: (s.b(y), s.a2(y)))(s.a(x)), 4, 1),
}


@pytest.mark.statement("S5.3c")
@pytest.mark.parametrize("case", MIXED)
def test_static_and_dynamic_readers(peers: Peers, case: str) -> None:
    function, count, quantizes = MIXED[case]
    model = Calls(function, a=linear(), b=linear(), a2=linear())
    done = peers.compare(
        model,
        (X,),
        lambda n: (
            n.QConfigMapping()
            .set_module_name_regex("a", n.default_qconfig)
            .set_module_name("b", n.default_dynamic_qconfig)
        ),
        quantizes=quantizes,
    )
    assert len(placement(done.ours.prepared)) == count


@pytest.mark.statement("S5.3c")
def test_static_behind_dynamic(peers: Peers) -> None:
    """The static op is quantized; in torch.ao it stays in float: see docs/differences.md."""
    mapping = chosen("default_dynamic_qconfig", "default_qconfig")
    model = Calls(lambda s, x: s.b(s.a(x)), a=linear(), b=linear())
    theirs, _ = peers.prepare(THEIRS, model, (X,), mapping)
    ours, _ = peers.prepare(OURS, model, (X,), mapping)
    assert [name for _, name, _, _ in placement(theirs)] == [
        "PlaceholderObserver",
        "MinMaxObserver",
    ]
    assert [name for _, name, _, _ in placement(ours)] == [
        "PlaceholderObserver",
        "MinMaxObserver",
        "MinMaxObserver",
    ]
    check_all_in_int8(peers, ours, model)


@pytest.mark.statement("S5.6a")
@pytest.mark.parametrize("keyword", [False, True])
def test_cat(peers: Peers, keyword: bool) -> None:
    model = Calls(
        lambda s, x: (
            torch.cat([s.a(x), s.b(x)], dim=1) if keyword else torch.cat((s.a(x), s.b(x)), 1)
        ),
        a=conv(),
        b=conv(),
    )
    done = peers.compare(model, (X,), quantizes=1)
    assert first_of(done.ours) == [0, 1, 1, 1]
    apart = CallsTwo(lambda s, x, y: torch.cat([s.a(x), s.b(y)], 1), a=conv(), b=conv())
    done = peers.compare(apart, (X, X * 3), quantizes=2)
    assert steps(done.ours.reference) == (5, 0, 5)
    assert steps(done.ours.lowered) == (2, 0, 1)
    seen = {str(parameters) for _, *parameters in observed_with(done.ours.prepared)}
    assert len(seen) == 3
    floats = Calls(lambda s, x: torch.cat([x, s.a(x), x * 2, F.gelu(x)], 1), a=conv(padding=1))
    peers.compare(floats, (X,))


@pytest.mark.statement("S5.8a")
@pytest.mark.parametrize("relu", ["module", "F.relu", "torch.relu"])
@pytest.mark.parametrize("other", ["tensor", "number"])
@pytest.mark.parametrize("op", [operator.add, operator.mul, torch.add, torch.mul])
def test_arithmetic_and_a_relu_are_one(peers: Peers, op: Any, other: str, relu: str) -> None:
    act = {"module": nn.ReLU(), "F.relu": F.relu, "torch.relu": torch.relu}[relu]
    given = (lambda x: op(x, x)) if other == "tensor" else (lambda x: op(x, 0.5))
    function: Any = lambda x: act(given(x))  # noqa: E731
    if relu == "module":
        function = nn.Sequential(Calls(lambda _, x: given(x)), act)
    done = peers.compare(between(function, "between"), (X,), quantizes=1)
    assert len(placement(done.ours.prepared)) == 4
    assert len(set(first_of(done.ours))) == 4 - (other == "number")


def shapes(x: Tensor) -> dict[str, Any]:
    return {"x": x, "a": 2, "b": 1, "c": 0}


class OfADict(nn.Module):
    """A linear and a function of its result and of what else is in the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.a, self.b = function, linear(4, 4), linear(4, 4)

    def forward(self, given: Any) -> Any:
        return self.function(self, given)


INDEXED: dict[str, Any] = {
    "view": lambda y, d: y.view(d["a"], -1),
    "reshape": lambda y, d: y.reshape(d["a"], d["a"] * 4),
    "reshape-tuple": lambda y, d: y.reshape((d["a"], -1)),
    "reshape-list": lambda y, d: y.reshape([d["b"], -1]),
    "permute": lambda y, d: y.permute(d["b"], d["c"]),
    "repeat": lambda y, d: y.repeat(d["a"], d["b"]),
    "transpose": lambda y, d: y.transpose(d["c"], d["b"]),
    "unsqueeze": lambda y, d: y.unsqueeze(d["b"]),
}


@pytest.mark.statement("S5.9a")
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("op", INDEXED)
def test_sizes_out_of_dicts_are_not_observed(peers: Peers, op: str, examples: bool) -> None:
    x = torch.randn(4, 4)
    model = OfADict(lambda s, d: INDEXED[op](s.a(d["x"]), d)).eval()
    given = (shapes(x),)
    done = peers.compare(model, given, example_inputs=given if examples else None, quantizes=1)
    assert first_of(done.ours) == [0, 1, 1]


NUMBERS: dict[str, Any] = {
    "ndim": lambda s, x: torch.add(s.a(x), x.ndim - 1 - 1),
    "ndim-in-a-list": lambda s, x: s.a(x).contiguous().view([-1, x.size(1)] + [1] * 1),
    "shape": lambda s, x: s.a(x).reshape(x.shape),
    "size": lambda s, x: s.a(x) * x.size(0),
    "sizes": lambda s, x: s.a(x).reshape(x.size(0) * x.size(1), -1),
    "chain": lambda s, x: s.a(x).reshape(-1, 8).reshape(x.size(0), -1, 8).view(-1, 8),
    "number": lambda s, x: s.a(x) + 3 * 2,
}


@pytest.mark.statement("S5.9a")
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_not_observed(peers: Peers, case: str, examples: bool) -> None:
    model = Calls(NUMBERS[case], a=conv(padding=1))
    done = peers.compare(model, (X,), example_inputs=(X,) if examples else None)
    assert len(set(first_of(done.ours))) == 2


@pytest.mark.statement("S5.9a")
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("reshaped", [False, True])
def test_masks_are_not_observed(peers: Peers, reshaped: bool, examples: bool) -> None:
    mask = torch.randn(8, 8) > 0
    function = (
        (lambda s, x, m: s.a(x).masked_fill(m.unsqueeze(0).unsqueeze(1), 0.5))
        if reshaped
        else (lambda s, x, m: s.a(x).masked_fill(m, 0.5))
    )
    given = (X, mask)
    model = CallsTwo(function, a=conv(padding=1))
    done = peers.compare(model, given, example_inputs=given if examples else None, quantizes=1)
    assert len(placement(done.ours.prepared)) == 2


@pytest.mark.statement("S5.9b")
@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_integer_tensors_are_not_observed(peers: Peers, op: Any) -> None:
    """torch.ao observes them, and cannot run what it converts: see docs/differences.md."""
    numbers = torch.randint(0, 5, (2, 3, 8, 8))
    model = CallsTwo(lambda s, x, n: (op(n, n), s.a(x)), a=conv())
    mapping = everywhere("default_qconfig")
    theirs, _ = peers.prepare(THEIRS, model, (X, numbers), mapping)
    assert len(placement(theirs)) == 4
    with quiet():
        theirs(X, numbers)
        broken = THEIRS.convert_fx(theirs)
    with pytest.raises(RuntimeError, match="Quantize only works on Float"):
        run(broken, (X, numbers))
    ours, _ = peers.prepare(OURS, model, (X, numbers), mapping)
    assert len(placement(ours)) == 2
    run(ours, (X, numbers))
    _, lowered = peers.convert(OURS, ours)
    assert torch.equal(run(lowered, (X, numbers))[0], op(numbers, numbers))
    assert steps(lowered) == (1, 0, 1)


ITEMS: dict[str, tuple[Any, int]] = {
    "quantized-reader": (lambda s, d: s.a(d[0]), 2),
    "both": (lambda s, d: s.a(d[0]) + d[1], 4),
    "float-reader": (lambda s, d: (s.a(d[0]), F.gelu(d[1])), 2),
    "returned": (lambda s, d: (s.a(d[0]), d[1]), 2),
    "cat": (lambda s, d: torch.cat([d[0], s.a(d[1])]), 4),
}


@pytest.mark.statement("S5.10a")
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("case", ITEMS)
def test_items_of_a_list(peers: Peers, case: str, examples: bool, kind: type) -> None:
    function, count = ITEMS[case]
    x = torch.randn(4, 4)
    given = (kind([x, x * 2]),)
    model = OfADict(function).eval()
    done = peers.compare(model, given, example_inputs=given if examples else None)
    assert len(placement(done.ours.prepared)) == count


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


ONE, NONE = (1, 1), (0, 0)
FUNCTIONAL: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "linear": (lambda s, x: F.linear(x, s.w, s.b), (6, 8), 3),
    "linear-without-bias": (lambda s, x: F.linear(x, s.w), (6, 8), 3),
    "linear-relu": (lambda s, x: F.relu(F.linear(x, s.w, s.b)), (6, 8), 3),
    "linear-twice": (lambda s, x: (lambda w: F.linear(F.linear(x, w), w))(s.w), (8, 8), 4),
    "conv": (lambda s, x: F.conv2d(x, s.w, s.b, ONE, ONE, ONE, 1), (6, 3, 3, 3), 3),
    "conv-relu": (lambda s, x: F.relu(F.conv2d(x, s.w, None, ONE, NONE, ONE, 1)), (6, 3, 3, 3), 3),
}


@pytest.mark.statement("S5.11a")
@pytest.mark.parametrize("qconfig", ["default_qconfig", "default_per_channel_qconfig"])
@pytest.mark.parametrize("case", FUNCTIONAL)
def test_weights_of_functions(peers: Peers, case: str, qconfig: str) -> None:
    function, shape, count = FUNCTIONAL[case]
    model = Calls(function, w=weight(*shape), b=weight(6))
    done = peers.compare(model, (X,), everywhere(qconfig), quantizes=1)
    assert len(placement(done.ours.prepared)) == count
    weights = [
        node
        for node in done.ours.prepared.graph.nodes
        if "process" in str(node.target) and node.args[0].op == "get_attr"
    ]
    assert [node.args[0].target for node in weights] == ["w"]


CONSTANTS: dict[str, Any] = {
    "add-parameter": lambda s, x: s.a(x) + s.p,
    "mul-parameter": lambda s, x: s.p * s.a(x),
    "mul-buffer": lambda s, x: s.a(x) * s.q,
    "cat-buffer": lambda s, x: torch.cat([s.a(x), s.q]),
    "matmul": lambda s, x: torch.matmul(s.a(x), s.m),
    "tensor-in-forward": lambda s, x: s.a(x) * torch.tensor([2.0]),
    "twice": lambda s, x: (lambda p: s.a(x) + p + p)(s.p),
}


@pytest.mark.statement("S5.11a")
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("case", CONSTANTS)
def test_attributes_as_operands(peers: Peers, case: str, examples: bool) -> None:
    model = Calls(
        CONSTANTS[case],
        a=conv(padding=1),
        p=weight(3, 1, 1),
        q=torch.randn(2, 3, 8, 8),
        m=weight(8, 8),
    )
    done = peers.compare(model, (X,), example_inputs=(X,) if examples else None, quantizes=2)
    observed = [
        node.args[0].op for node in done.ours.prepared.graph.nodes if "process" in str(node.target)
    ]
    assert observed.count("get_attr") == 1


@pytest.mark.statement("S5.12a")
@pytest.mark.parametrize("qconfig", ["default_qconfig", "default_dynamic_qconfig"])
def test_weights_of_modules_are_observed_when_they_are_final(peers: Peers, qconfig: str) -> None:
    for names in (THEIRS, OURS):
        seen: list[Tensor] = []
        configs = peers.configs(names)
        base = configs.MinMaxObserver

        class Watching(base):  # type: ignore[valid-type,misc]
            def forward(self, x: Tensor, seen: list[Tensor] = seen) -> Any:
                seen.append(x.detach().clone())
                return super().forward(x)

        def mapping(_: Names, configs: Names = configs, kind: type = Watching) -> Any:
            made = configs.QConfig(
                activation=getattr(configs, qconfig).activation,
                weight=kind.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),  # type: ignore[attr-defined]
            )
            return configs.QConfigMapping().set_global(made)

        body = nn.Sequential(linear(8, 4), nn.BatchNorm1d(4))
        model = Calls(lambda s, x: s.body(x), body=body)
        x = torch.randn(5, 8)
        prepared, _ = peers.prepare(names, model, (x,), mapping)
        assert seen == []
        run(prepared, (x,))
        assert seen == []
        with quiet():
            names.convert_fx(prepared)
        factor = body[1].weight / torch.sqrt(body[1].running_var + body[1].eps)
        final = (body[0].weight * factor[:, None]).detach()
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], final, rtol=1e-6, atol=1e-6)
    peers.compare(nn.Sequential(linear()).eval(), (X,), everywhere(qconfig))


@pytest.mark.statement("S5.13a", "S5.13b")
def test_a_sigmoid_that_comes_first(peers: Peers) -> None:
    """Its input is clipped to the range of its output, as in torch.ao."""
    model = Calls(lambda s, x: torch.sigmoid(x))
    done = peers.compare(model, (X,), quantizes=1)
    assert [kind for _, kind, _, _ in placement(done.ours.prepared)] == ["FixedQParamsObserver"] * 2
    clipped = run(done.ours.reference, (X,))
    assert float(clipped.min()) >= 0.49
    both = Calls(lambda s, x: (s.a(x), torch.sigmoid(x), torch.tanh(torch.sigmoid(x))), a=conv())
    done = peers.compare(both, (X,))
    assert len(placement(done.ours.prepared)) == 6


@pytest.mark.statement("S5.14a")
def test_reuse_input_qconfigs(peers: Peers) -> None:
    chain = Calls(
        lambda s, x: s.a(x).reshape(-1, 8).reshape(x.size(0), -1).reshape(-1, 4), a=conv(padding=1)
    )
    done = peers.compare(chain, (X,), quantizes=1)
    assert first_of(done.ours) == [0, 1, 1, 1, 1]
    peers.compare(Calls(lambda s, x: (s.a(x), x.reshape(-1, 8)), a=conv()), (X,), quantizes=1)
    alone = Calls(lambda s, x: (s.a(x), F.gelu(x).reshape(-1, 8)), a=conv())
    done = peers.compare(alone, (X,), quantizes=1)
    assert len(placement(done.ours.prepared)) == 2

    def mapping(names: Names) -> Any:
        found = names.QConfigMapping().set_global(names.default_qconfig)
        return found.set_object_type(F.max_pool2d, names.default_reuse_input_qconfig)

    behind = Calls(lambda s, x: F.max_pool2d(s.a(x), 2), a=conv())
    done = peers.compare(behind, (X,), mapping, quantizes=1)
    assert first_of(done.ours) == [0, 1, 1]


@pytest.mark.statement("S5.14a")
def test_a_convolution_behind_a_reshape_of_the_input(peers: Peers) -> None:
    """Is quantized; torch.ao leaves its input in float: see docs/differences.md."""
    model = Calls(lambda s, x: s.a(x.reshape(2, 3, 4, 16)), a=conv())
    theirs, _ = peers.prepare(THEIRS, model, (X,))
    ours, _ = peers.prepare(OURS, model, (X,))
    assert (len(placement(theirs)), len(placement(ours))) == (1, 2)
    check_all_in_int8(peers, ours, model)


@pytest.mark.statement("S5.15a")
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_transposed_convolutions_take_no_weights_per_channel(peers: Peers, dim: int) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    shape = (2, 3, *[5] * dim)
    text = "Per channel weight observer is not supported yet for ConvTranspose"
    model = nn.Sequential(kind(3, 3, 3)).eval()
    for names in (THEIRS, OURS):
        with quiet(), pytest.raises(AssertionError, match=text):
            peers.prepare(
                names, model, (torch.randn(shape),), everywhere("default_per_channel_qconfig")
            )
    peers.compare(model, (torch.randn(shape),), quantizes=1)


@pytest.mark.statement("S5.17a")
def test_observers_are_where_the_model_is(peers: Peers) -> None:
    """On the one device of a CPU build: in its dtype's company, through moves and loads."""
    model = nn.Sequential(conv(), nn.ReLU(), conv()).eval()
    done = peers.compare(model, (X,))
    for side in (done.theirs, done.ours):
        for _, module in observers(side.prepared):
            assert {b.device.type for b in module.buffers()} <= {"cpu"}
        moved = side.prepared.to("cpu")
        equal(observed_with(moved), observed_with(side.prepared), "parameters")
    fresh, _ = peers.prepare(OURS, model, (X,))
    with quiet():
        fresh.load_state_dict(done.ours.prepared.state_dict())
    equal(observed_with(fresh), observed_with(done.theirs.prepared), "parameters")


REUSED: dict[str, Any] = {
    "pool": lambda s, x: s.p(s.b(s.p(s.a(x)))),
    "relu": lambda s, x: s.r(s.b(s.r(s.a(x)))),
    "hardswish": lambda s, x: s.h(s.b(s.h(s.a(x)))),
}


@pytest.mark.statement("S5.1a", "S4.3a")
@pytest.mark.parametrize("case", REUSED)
def test_modules_that_are_called_twice(peers: Peers, case: str) -> None:
    parts = {"a": conv(padding=1), "b": conv(padding=1), "p": nn.MaxPool2d(2)}
    model = Calls(REUSED[case], **parts, r=nn.ReLU(), h=nn.Hardswish())
    peers.compare(model, (X,), quantizes=1, lowered_alike=case != "hardswish")


@pytest.mark.statement("S5.10a", "S2.3b")
def test_nested_inputs_and_options(peers: Peers) -> None:
    model = OfADict(lambda s, d: {"y": s.a(d["a"]["b"][0]) + d["a"]["c"], "z": None}).eval()
    x = torch.randn(4, 4)
    peers.compare(model, ({"a": {"b": [x], "c": x * 3}},), quantizes=2)
    optional = CallsWithOptions(lambda s, x, y, z: s.a(x), a=conv())
    peers.compare(optional, (X,), quantizes=1)
