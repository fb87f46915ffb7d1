"""Section 4: what becomes one op before anything is observed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantized.reference as nnqr
import torch.nn.functional as F
from torch import nn

from fxquant.errors import ConfigError
from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Names,
    Peers,
    assert_same,
    everywhere,
    observers,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, conv, images, linear, lively

pytestmark = pytest.mark.peer

X = images()
CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, (2, 3, 9)),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, (2, 3, 7, 7)),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, (2, 3, 5, 5, 5)),
}
RELUS: dict[str, Any] = {
    "module": nn.ReLU(),
    "module-in-place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function-in-place": lambda x: F.relu(x, inplace=True),
}
NO_RELUS: dict[str, Any] = {
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(),
    "hardtanh": F.hardtanh,
}


@pytest.mark.statement("S4.1a")
@pytest.mark.parametrize("relu", [None, *RELUS])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", CONVS)
def test_convolutions(peers: Peers, dim: int, norm: bool, relu: str | None) -> None:
    kind, _, batch_norm, shape = CONVS[dim]
    layers = [kind(3, 4, 3), *([batch_norm(4)] if norm else [])]
    if relu is not None and isinstance(RELUS[relu], nn.Module):
        layers.append(RELUS[relu])
    body = lively(nn.Sequential(*layers)).eval()
    function = RELUS[relu] if relu is not None and "function" in relu else (lambda y: y)
    model = Calls(lambda s, x: function(s.body(x)), body=body)
    done = peers.compare(model, (torch.randn(shape),), quantizes=1)
    assert len(placement(done.ours.prepared)) == 2


@pytest.mark.statement("S4.1a")
@pytest.mark.parametrize("relu", [None, *RELUS])
@pytest.mark.parametrize("norm", [False, True])
def test_linears(peers: Peers, norm: bool, relu: str | None) -> None:
    body = nn.Sequential(linear(8, 4), *([nn.BatchNorm1d(4)] if norm else []))
    act = RELUS[relu] if relu is not None else nn.Identity()
    model = Calls(lambda s, x: s.act(s.body(x)) if relu else s.body(x), body=body, act=act)
    done = peers.compare(model, (torch.randn(5, 8),), quantizes=1)
    assert len(placement(done.ours.prepared)) == 2


@pytest.mark.statement("S4.1a")
@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("dim", CONVS)
def test_batch_norms_alone(peers: Peers, dim: int, relu: str) -> None:
    """1-d ones do not fuse with a relu, and are not quantized."""
    _, _, batch_norm, shape = CONVS[dim]
    model = Calls(lambda s, x: s.act(s.norm(x)), norm=batch_norm(3), act=RELUS[relu])
    done = peers.compare(model, (torch.randn(shape),), quantizes=1)
    assert len(placement(done.ours.prepared)) == 2
    peers.compare(Calls(lambda s, x: s.norm(x), norm=batch_norm(3)), (torch.randn(shape),))


@pytest.mark.statement("S4.1a", "S4.1b")
@pytest.mark.parametrize("after", ["nothing", "norm", "relu"])
@pytest.mark.parametrize("dim", CONVS)
def test_transposed_convolutions(peers: Peers, dim: int, after: str) -> None:
    _, kind, batch_norm, shape = CONVS[dim]
    body = nn.Sequential(kind(3, 3, 3), *([batch_norm(3)] if after == "norm" else []))
    model = Calls(lambda s, x: F.relu(s.body(x)) if after == "relu" else s.body(x), body=body)
    done = peers.compare(model, (torch.randn(shape),), everywhere("default_qconfig"), quantizes=1)
    assert len(placement(done.ours.prepared)) == (3 if after == "relu" else 2)


@pytest.mark.statement("S4.1c")
@pytest.mark.parametrize("dim", CONVS)
def test_transposed_convolution_batch_norm_relu(peers: Peers, dim: int) -> None:
    """Folded at any rank; torch.ao fuses the wrong two at two: see docs/differences.md."""
    _, kind, batch_norm, shape = CONVS[dim]
    model = Calls(lambda s, x: F.relu(s.norm(s.conv(x))), conv=kind(3, 3, 3), norm=batch_norm(3))
    x, mapping = torch.randn(shape), everywhere("default_qconfig")
    made = [peers.prepare(names, model, (x,), mapping)[0] for names in (THEIRS, OURS)]
    for prepared in made:
        run(prepared, (x,))
    assert len(placement(made[1])) == len(placement(made[0])) == 3
    assert [first for _, _, first, _ in placement(made[1])] == [0, 1, 1]
    assert [first for _, _, first, _ in placement(made[0])] == (
        [0, 1, 1] if dim == 1 else [0, 1, 2]
    )
    assert not hasattr(made[1], "norm")
    with torch.no_grad():
        expected = model(x)
    _, lowered = peers.convert(OURS, made[1])
    assert steps(lowered) == (1, 0, 1)
    error = (run(lowered, (x,)) - expected).norm() / expected.norm()
    assert float(error) < 0.05


@pytest.mark.statement("S4.1b")
@pytest.mark.parametrize("act", NO_RELUS)
@pytest.mark.parametrize("first", ["conv", "linear", "batch-norm"])
def test_other_activations_do_not_fuse(peers: Peers, first: str, act: str) -> None:
    part = {"conv": conv(), "linear": linear(), "batch-norm": nn.BatchNorm2d(3)}[first]
    model = Calls(lambda s, x: s.act(s.part(x)), part=part, act=NO_RELUS[act])
    done = peers.compare(model, (X,), quantizes=1)
    wanted = 2 if act == "torch.relu" else 3  # torch.relu alone is not quantized
    assert len(placement(done.ours.prepared)) == wanted
    names = [path for path, _ in observers(done.ours.prepared)]
    observed = [n for n in done.ours.prepared.graph.nodes if n.target == names[1]]
    assert [str(n.args[0].target) for n in observed] == ["part"]


@pytest.mark.statement("S4.3a")
def test_a_value_of_several_readers_is_not_fused(peers: Peers) -> None:
    model = Calls(lambda s, x: (lambda y: s.norm(y) + y)(s.a(x)), a=conv(), norm=nn.BatchNorm2d(3))
    done = peers.compare(model, (X,), quantizes=1)
    assert isinstance(done.ours.prepared.norm, nn.BatchNorm2d)
    model = Calls(lambda s, x: (lambda y: s.relu(y) + y)(s.a(x)), a=conv(), relu=nn.ReLU())
    done = peers.compare(model, (X,), quantizes=1)
    assert len(placement(done.ours.prepared)) == 4


@pytest.mark.statement("S4.3a")
def test_one_relu_behind_two_convolutions(peers: Peers) -> None:
    model = Calls(lambda s, x: s.relu(s.b(s.relu(s.a(x)))), a=conv(), b=conv(), relu=nn.ReLU())
    done = peers.compare(model, (X,), quantizes=1)
    assert len(placement(done.ours.prepared)) == 3


@pytest.mark.statement("S4.3b")
def test_a_convolution_called_twice_keeps_its_float_result(peers: Peers) -> None:
    """torch.ao puts the relu behind both calls: see docs/differences.md."""
    model = Calls(lambda s, x: s.a(F.relu(s.a(x))), a=conv())
    with torch.no_grad():
        expected = model(X)
    ours, _ = peers.prepare(OURS, model, (X,))
    assert_same(run(ours, (X,)), expected)
    theirs, _ = peers.prepare(THEIRS, model, (X,))
    assert float((run(theirs, (X,)) - expected).abs().max()) > 0.01
    assert len(placement(ours)) == 3
    _, lowered = peers.convert(OURS, ours)
    assert steps(lowered) == (1, 0, 1)
    assert float((run(lowered, (X,)) - expected).norm() / expected.norm()) < 0.05


@pytest.fixture
def _onednn() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    yield
    torch.backends.quantized.engine = before


ONEDNN: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear-leaky": (
        Calls(lambda s, x: s.act(s.a(x)), a=linear(), act=nn.LeakyReLU()),
        (5, 8),
        2,
    ),
    "linear-bn-leaky": (
        Calls(lambda s, x: s.act(s.n(s.a(x))), a=linear(), n=nn.BatchNorm1d(8), act=nn.LeakyReLU()),
        (5, 8),
        2,
    ),
    "linear-tanh": (Calls(lambda s, x: s.act(s.a(x)), a=linear(), act=nn.Tanh()), (5, 8), 2),
    "conv-add": (
        Calls(lambda s, x: s.a(x) + s.m(x), a=conv(padding=1), m=nn.Hardswish()),
        (2, 3, 7, 7),
        3,
    ),
    "add-conv": (
        Calls(lambda s, x: s.m(x) + s.a(x), a=conv(padding=1), m=nn.Hardswish()),
        (2, 3, 7, 7),
        3,
    ),
    "conv-bn-add-relu": (
        Calls(
            lambda s, x: s.r(s.n(s.a(x)) + s.m(x)),
            a=conv(padding=1),
            n=nn.BatchNorm2d(3),
            m=nn.Hardswish(),
            r=nn.ReLU(),
        ),
        (2, 3, 7, 7),
        3,
    ),
}


@pytest.mark.statement("S4.4a")
@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("case", ONEDNN)
def test_what_onednn_fuses(peers: Peers, case: str) -> None:
    model, shape, count = ONEDNN[case]
    x, backend = torch.randn(shape), THEIRS.get_onednn_backend_config()

    def mapping(names: Names) -> Any:
        return names.QConfigMapping().set_global(names.get_default_qconfig("onednn"))

    done = peers.compare(
        model,
        (x,),
        mapping,
        backend=lambda _: backend,
        convert=lambda _: {"backend_config": backend},
        quantizes=1,
    )
    assert len(placement(done.ours.prepared)) == count
    done = peers.compare(model, (x,), mapping, quantizes=1 if "tanh" not in case else None)
    assert len(placement(done.ours.prepared)) == count + (case != "linear-tanh")


@pytest.mark.statement("S4.5a")
@pytest.mark.parametrize("nested", [False, True])
def test_the_fused_op_has_the_first_name(peers: Peers, nested: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn, self.relu = conv(), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.relu(self.bn(self.first(x)))
            return y

    model = lively(Part()).eval()
    if nested:
        model = nn.Sequential(nn.Sequential(model)).eval()
    path = "0.0." if nested else ""
    done = peers.compare(model, (X,), quantizes=1)
    for names, side in ((THEIRS, done.theirs), (OURS, done.ours)):
        with quiet():
            fused = names.fuse_fx(copy.deepcopy(model))
        for graph in (side.prepared, fused):
            part = graph.get_submodule(path.rstrip("."))
            assert hasattr(part, "first")
            assert not hasattr(part, "bn")
            calls = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
            assert calls[bool("process" in calls[0])] == f"{path}first"


class Fused(nni.ConvReLU2d):
    """A convolution, a batch-norm, an add and a relu as one."""


def _residual(add: Any, *, sequence: bool = False) -> Build:
    """A backend config with ``relu(x + bn(conv))``, which a function of the user's fuses."""

    def fuse(is_qat: bool, relu: Any, add_pattern: Any) -> nn.Module:
        assert not is_qat
        assert isinstance(relu, nn.ReLU)
        function, _, (norm, base) = add_pattern
        assert function is add
        assert isinstance(norm, nn.BatchNorm2d)
        return nni.ConvReLU2d(base, relu) if sequence else Fused(base, relu)

    def backend(names: Names) -> Any:
        dtypes = [names.DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float)]
        pattern = names.BackendPatternConfig()
        pattern._set_pattern_complex_format(
            (nn.ReLU, (add, names.MatchAllNode, (nn.BatchNorm2d, nn.Conv2d)))
        )
        made = nni.ConvReLU2d if sequence else Fused
        pattern.set_dtype_configs(dtypes).set_fuser_method(fuse).set_fused_module(made)
        if not sequence:
            pattern._set_root_node_getter(lambda nodes: nodes[1][2][1])
            pattern._set_extra_inputs_getter(lambda nodes: [nodes[1][1]])
        own = names.ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
        config = names.BackendConfig("mine").set_backend_pattern_config(pattern)
        for chain in (made, nn.Conv2d, (nn.Conv2d, nn.ReLU)):
            single = names.BackendPatternConfig(chain).set_dtype_configs(dtypes)
            single.set_root_module(nn.Conv2d).set_reference_quantized_module(nnqr.Conv2d)
            config.set_backend_pattern_config(single.set_observation_type(own))
        return config

    return backend


class Joined(nn.Module):
    """A residual sum that both libraries' users fuse."""

    def __init__(self, add: Any = operator.add) -> None:
        super().__init__()
        self.a, self.bn, self.relu = conv(padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.pool, self.add = nn.MaxPool2d(3, 1, 1), add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.relu(self.add(self.pool(x), self.bn(self.a(x))))
        return y


@pytest.mark.statement("S4.6a")
@pytest.mark.parametrize("add", [operator.add, torch.add], ids=["operator", "torch"])
def test_functions_of_the_user_fuse(peers: Peers, add: Any) -> None:
    """The conv is called with both operands, as its own ``forward`` would need."""
    model = lively(Joined(add)).eval()
    made = {}
    for names in (THEIRS, OURS):
        with quiet():
            config = _residual(add)(peers.configs(names))
            made[names] = names.fuse_fx(copy.deepcopy(model), backend_config=config)
        assert type(made[names].a) is Fused
        assert not hasattr(made[names], "bn")
        assert not hasattr(made[names], "relu")
        (call,) = (n for n in made[names].graph.nodes if n.target == "a")
        assert [argument.name for argument in call.args] == ["x", "pool"]
    assert made[OURS].a[0].weight is not model.a.weight
    theirs, _ = peers.prepare(
        THEIRS, model, (X,), everywhere("default_qconfig"), backend=_residual(add)
    )
    ours, _ = peers.prepare(
        OURS, model, (X,), everywhere("default_qconfig"), backend=_residual(add)
    )
    assert placement(ours) == placement(theirs)
    assert len(placement(ours)) == 3
    peers.compare(nn.Sequential(conv()).eval(), (X,), everywhere("default_qconfig"))


@pytest.mark.statement("S4.6a")
def test_what_the_user_fuses_is_quantized_and_lowered(peers: Peers) -> None:
    """Without a getter of inputs the other operand is dropped: that is what the function says."""
    done = peers.compare(
        lively(Joined()).eval(),
        (X,),
        everywhere("default_qconfig"),
        backend=_residual(operator.add, sequence=True),
        convert=lambda names: {"backend_config": _residual(operator.add, sequence=True)(names)},
        quantizes=1,
    )
    assert len(placement(done.ours.prepared)) == 2


@pytest.mark.statement("S4.6a")
def test_an_operand_that_may_be_anything_is_fused_with_what_is_before_it(peers: Peers) -> None:
    def residual(is_qat: bool, relu: nn.Module, add_pattern: Any) -> nn.Module:
        _, base, _ = add_pattern
        return base  # type: ignore[no-any-return]  # a tuple of anything

    def backend(names: Names) -> Any:
        chain = names.BackendPatternConfig((nn.Conv2d, nn.ReLU))
        chain.set_fuser_method(lambda is_qat, base, relu: base)
        tree = names.BackendPatternConfig().set_fuser_method(residual)
        tree._set_pattern_complex_format((nn.ReLU, (torch.add, nn.Conv2d, names.MatchAllNode)))
        tree._set_root_node_getter(lambda nodes: nodes[1][1])
        tree._set_extra_inputs_getter(lambda nodes: [nodes[1][2]])
        config = names.BackendConfig().set_backend_pattern_config(chain)
        return config.set_backend_pattern_config(tree)

    model = Calls(
        lambda s, x: s.r2(torch.add(s.b(x), s.r1(s.a(x)))),
        a=conv(),
        b=conv(),
        r1=nn.ReLU(),
        r2=nn.ReLU(),
    ).eval()
    for names in (THEIRS, OURS):
        with quiet():
            fused = names.fuse_fx(
                copy.deepcopy(model), backend_config=backend(peers.configs(names))
            )
        calls = [(n.target, len(n.args)) for n in fused.graph.nodes if n.op == "call_module"]
        assert calls == [("a", 1), ("b", 2)]
        assert not hasattr(fused, "r1")
        assert not hasattr(fused, "r2")
    peers.compare(model, (X,))


WRONG: dict[str, Any] = {
    "no-module": (lambda is_qat, *modules: 3, None, None, "returned 3"),
    "no-root": (lambda is_qat, base, relu: base, lambda nodes: nodes[0], None, "no module of"),
    "no-node": (lambda is_qat, base, relu: base, None, lambda nodes: [1], "returned 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_function_that_returns_something_else(peers: Peers, case: str) -> None:
    method, root, extra, message = WRONG[case]
    pattern = OURS.BackendPatternConfig((nn.Conv2d, F.relu)).set_fuser_method(method)
    if root is not None:
        pattern._set_root_node_getter(root)
    if extra is not None:
        pattern._set_extra_inputs_getter(extra)
    backend = OURS.BackendConfig().set_backend_pattern_config(pattern)
    model = Calls(lambda s, x: F.relu(s.a(x)), a=conv()).eval()
    with pytest.raises(ConfigError, match=message):
        OURS.fuse_fx(model, backend_config=backend)
    peers.compare(model, (X,))
