"""Section 6: the reference graph, its steps, its parameters by name, its modules."""

from __future__ import annotations

import copy
import io
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.conformance.harness import (
    OURS,
    THEIRS,
    Build,
    Names,
    Peers,
    assert_same,
    default_mapping,
    equal,
    everywhere,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, CallsTwo, conv, images, linear, lively

pytestmark = pytest.mark.peer

SLOW = pytest.mark.slow
X = images()
ONES, ZEROS = (1, 1), (0, 0)


def weight(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(*shape, generator=generator))


def nested(function: Any, **parts: Any) -> nn.Module:
    """``function`` two modules down, where its path has a dot."""
    return nn.Sequential(Calls(function, **parts))


def parameters(graph: fx.GraphModule) -> dict[str, tuple[list[int], list[float]]]:
    """The scales and zero points that a graph reads: name -> shape and values."""
    found = {}
    for node in graph.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and ("_scale_" in name or "_zero_point_" in name):
            value = getattr(graph, name)
            assert name in dict(graph.named_buffers())
            found[name] = (list(value.shape), value.flatten().tolist())
    return found


# -- names ----------------------------------------------------------------------------------------

NAMED: dict[str, nn.Module] = {
    "linear": Calls(lambda s, x: s.a(x), a=linear()),
    "path": nn.Sequential(conv(), nn.Sequential(conv(), nn.ReLU()), nn.MaxPool2d(2)).eval(),
    "fused-across": Calls(
        lambda s, x: s.r(s.c(x)), c=nn.Sequential(conv()), r=nn.Sequential(nn.ReLU())
    ),
    "folded": nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.BatchNorm2d(3)).eval(),
    "add-and-relu": Calls(
        lambda s, x: s.r(s.a(x) + s.b(x)) * 2 + x.mean(),
        a=conv(padding=1),
        b=conv(padding=1),
        r=nn.Sequential(nn.ReLU()),
    ),
    "cat": Calls(
        lambda s, x: torch.cat([s.a(x), s.b(x), x], 1), a=conv(padding=1), b=conv(3, 3, 1)
    ),
    "twice": Calls(lambda s, x: s.a(F.gelu(s.a(F.gelu(x)))), a=conv()),
    "input-of-an-inner": Calls(lambda s, x: s.d(F.max_pool2d(x, 2)), d=nn.Sequential(conv())),
    "of-a-float-op": Calls(
        lambda s, x: s.d(F.silu(x)), d=nested(lambda s, x: s.a(F.silu(x)), a=conv())
    ),
    "functional": Calls(lambda s, x: F.relu(F.linear(x, s.w, s.b)), w=weight(6, 8), b=weight(6)),
    "functional-inside": Calls(
        lambda s, x: s.d(s.a(x)),
        a=linear(),
        d=nested(lambda s, x: F.linear(F.linear(x, s.w), s.w), w=weight(8, 8)),
    ),
    "linears-speak-first": Calls(
        lambda s, x: (s.c(x), s.d(x)),
        c=nn.Sequential(conv()),
        d=nested(lambda s, x: F.linear(x, s.w), w=weight(6, 8)),
    ),
    "convolutions-do-not": Calls(
        lambda s, x: (s.c(x), s.d(x)),
        c=nn.Sequential(conv()),
        d=nested(lambda s, x: F.conv2d(x, s.w, None, ONES, ONES, ONES, 1), w=weight(6, 3, 3, 3)),
    ),
    "constant": Calls(
        lambda s, x: s.d(s.a(x)),
        a=conv(),
        d=nested(lambda s, x: x + s.q, q=images(1, 3, 1, 1)),
    ),
    "items": Calls(lambda s, x: s.b(s.a(x).chunk(2, 1)[0]), a=conv(3, 6), b=conv()),
    "fixed": Calls(lambda s, x: (torch.sigmoid(x), s.a(x)), a=conv()),
}


def without_floats(names: Names) -> Any:
    """gelu, silu and the inner of one case have no qconfig: their values are inputs then."""
    found = names.QConfigMapping().set_global(names.default_qconfig)
    return found.set_object_type(F.gelu, None).set_object_type(F.silu, None)


def by_type(names: Names) -> Any:
    """Attributes, which are no ops, have no qconfig then."""
    found = names.QConfigMapping()
    for kind in (
        nn.Conv2d,
        nn.Linear,
        F.linear,
        F.conv2d,
        nn.ReLU,
        F.relu,
        torch.cat,
        operator.add,
    ):
        found.set_object_type(kind, names.default_qconfig)
    return found


MAPPINGS: dict[str, Build] = {
    "everywhere": everywhere("default_qconfig"),
    "per-channel": everywhere("default_per_channel_qconfig"),
    "without-floats": without_floats,
    "by-type": by_type,
}


@pytest.mark.statement("S6.2a", "S6.1a")
@pytest.mark.parametrize(
    "mapping",
    ["everywhere", *(pytest.param(name, marks=SLOW) for name in list(MAPPINGS)[1:])],
)
@pytest.mark.parametrize("case", NAMED)
def test_scales_are_named_by_path_and_number(peers: Peers, case: str, mapping: str) -> None:
    made = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, NAMED[case], (X,), MAPPINGS[mapping])
        run(prepared, (X,))
        made.append(peers.convert(names, prepared)[0])
    theirs, ours = made
    equal(parameters(ours), parameters(theirs), "names, shapes and values")
    assert parameters(ours)
    equal(steps(ours), steps(theirs), "steps")


@pytest.mark.statement("S6.2a")
def test_dynamic_steps_have_no_buffers(peers: Peers) -> None:
    model = Calls(lambda s, x: s.a(x), a=linear())
    for mapping in (everywhere("default_dynamic_qconfig"), everywhere("float16_dynamic_qconfig")):
        prepared, _ = peers.prepare(OURS, model, (X,), mapping)
        reference, _ = peers.convert(OURS, prepared)
        assert parameters(reference) == {}
        assert len(placement(prepared)) == 1
    done = peers.compare(model, (X,))
    assert len(parameters(done.ours.reference)) == 4


# -- counts ---------------------------------------------------------------------------------------

COUNTS: dict[str, tuple[Any, tuple[int, int, int], str]] = {
    "linear": (Calls(lambda s, x: s.a(x), a=linear()), (2, 0, 2), "default_qconfig"),
    "convs-and-cat": (
        Calls(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv(), b=conv()),
        (4, 0, 4),
        "default_qconfig",
    ),
    "functional": (
        Calls(lambda s, x: F.linear(x, s.w), w=weight(6, 8)),
        (3, 0, 3),
        "default_per_channel_qconfig",
    ),
    "pool-chain": (
        Calls(lambda s, x: F.max_pool2d(F.relu(s.a(x)), 2).flatten(1), a=conv()),
        (3, 0, 3),
        "default_qconfig",
    ),
    "dynamic": (
        Calls(lambda s, x: s.a(x) + s.b(x), a=linear(), b=linear()),
        (0, 1, 1),
        "default_dynamic_qconfig",
    ),
    "dynamic-function": (
        Calls(lambda s, x: F.linear(x, s.w), w=weight(6, 8)),
        (1, 1, 2),
        "default_dynamic_qconfig",
    ),
}


@pytest.mark.statement("S6.1a")
@pytest.mark.parametrize("case", COUNTS)
def test_one_pair_an_observer(peers: Peers, case: str) -> None:
    model, wanted, qconfig = COUNTS[case]
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (X,), everywhere(qconfig))
        run(prepared, (X,))
        reference, _ = peers.convert(names, prepared)
        assert steps(reference) == wanted
        assert len(placement(prepared)) == wanted[0] + wanted[1]


# -- modules --------------------------------------------------------------------------------------

TOKENS = torch.tensor([[1, 5, 2], [0, 2, 3]])
MODULES: dict[str, tuple[nn.Module, Tensor, str]] = {
    "linear": (linear(), X, "default_qconfig"),
    "linear-per-channel": (linear(), X, "default_per_channel_qconfig"),
    "linear-dynamic": (linear(), X, "default_dynamic_qconfig"),
    "linear-half": (linear(), X, "float16_dynamic_qconfig"),
    "conv1d": (nn.Conv1d(3, 4, 3), images(2, 3, 9), "default_per_channel_qconfig"),
    "conv2d": (conv(3, 6, groups=3, stride=2, padding=1), X, "default_per_channel_qconfig"),
    "conv3d": (nn.Conv3d(3, 4, 2, bias=False), images(2, 3, 4, 4, 4), "default_qconfig"),
    "conv_transpose1d": (nn.ConvTranspose1d(3, 3, 3), images(2, 3, 9), "default_qconfig"),
    "conv_transpose2d": (nn.ConvTranspose2d(3, 3, 3, 2), X, "default_qconfig"),
    "conv_transpose3d": (
        nn.ConvTranspose3d(3, 3, 2),
        images(2, 3, 4, 4, 4),
        "default_qconfig",
    ),
    "embedding": (nn.Embedding(10, 4), TOKENS, "float_qparams_weight_only_qconfig"),
    "embedding-4bit": (nn.Embedding(10, 4), TOKENS, "float_qparams_weight_only_qconfig_4bit"),
    "bag": (nn.EmbeddingBag(10, 4, mode="sum"), TOKENS, "float_qparams_weight_only_qconfig"),
}
HELD = ("weight_scale", "weight_zero_point", "weight_axis")
PLAIN = ("weight_qscheme", "weight_dtype")


def references(peers: Peers, model: nn.Module, x: Tensor, mapping: Build) -> list[fx.GraphModule]:
    """Both reference graphs of ``model``, which compute the same."""
    made = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (x,), mapping)
        run(prepared, (x,))
        made.append(peers.convert(names, prepared)[0])
    return made


@pytest.mark.statement("S6.3a")
@pytest.mark.parametrize("case", MODULES)
def test_modules_keep_their_float_weight(peers: Peers, case: str) -> None:
    part, x, qconfig = MODULES[case]
    model = nn.Sequential(copy.deepcopy(part)).eval()
    theirs, ours = references(peers, model, x, everywhere(qconfig))
    other, mine = theirs.get_submodule("0"), ours.get_submodule("0")
    assert "Reference" in mine._get_name()
    assert mine._get_name() == other._get_name() or "Bag" in case or case == "bag"
    assert_same(mine.weight.detach(), part.weight.detach())
    for name in HELD:
        if "half" not in case and not ("4bit" in case and name != "weight_axis"):
            held = [getattr(module, name).flatten().tolist() for module in (mine, other)]
            equal(*held, name)
        assert f"0.{name}" in ours.state_dict()
    for name in PLAIN:
        assert getattr(mine, name) == getattr(other, name)
        assert ours.state_dict()[f"0.{name}"] == theirs.state_dict()[f"0.{name}"]
    assert isinstance(mine, type(part))
    if "4bit" not in case and "half" not in case:  # see docs/differences.md
        assert_same(run(ours, (x,)), run(theirs, (x,)))
    assert not torch.equal(run(ours, (x,)), run(model, (x,)))


@pytest.mark.statement("S6.3a")
@pytest.mark.parametrize("case", ["linear", "conv2d", "linear-dynamic", "embedding"])
def test_the_state_of_a_reference_module_loads(peers: Peers, case: str) -> None:
    part, x, qconfig = MODULES[case]
    graphs = references(peers, nn.Sequential(part).eval(), x, everywhere(qconfig))
    assert_same(run(graphs[1], (x,)), run(graphs[0], (x,)))
    equal(steps(graphs[1]), steps(graphs[0]), "steps")
    for names, graph in zip((THEIRS, OURS), graphs, strict=True):
        expected = run(graph, (x,))
        for model in (graph, copy.deepcopy(graph)):
            state = copy.deepcopy(model.state_dict())
            module: Any = model.get_submodule("0")
            scale = module.weight_scale
            module.weight_scale = None
            model.load_state_dict(state)
            assert torch.equal(module.weight_scale, scale)
            assert_same(run(model, (x,)), expected)
        with torch.no_grad():
            fresh = nn.Sequential(copy.deepcopy(part)).eval()
            for parameter in fresh.parameters():
                parameter.mul_(3)
        prepared, _ = peers.prepare(names, fresh, (x,), everywhere(qconfig))
        run(prepared, (x,))
        loaded, _ = peers.convert(names, prepared)
        assert not torch.equal(run(loaded, (x,)), expected)
        file = io.BytesIO()
        torch.save(graph.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=False))
        assert_same(run(loaded, (x,)), expected)


@pytest.mark.statement("S6.3a")
@pytest.mark.parametrize("relu", ["module", "function"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
def test_fused_modules_hold_a_reference_module_first(peers: Peers, kind: str, relu: str) -> None:
    part, x, _ = MODULES[kind]
    act = nn.ReLU() if relu == "module" else F.relu
    model = Calls(lambda s, x: s.act(s.part(x)), part=part, act=act)
    theirs, ours = references(peers, model, x, everywhere("default_qconfig"))
    for graph in (theirs, ours):
        module: Any = graph.get_submodule("part")
        assert "Reference" in module[0]._get_name()
        assert isinstance(module[1], nn.ReLU)
        assert {"part.0.weight", "part.0.weight_scale", "part.0.weight_qscheme"} <= set(
            graph.state_dict()
        )
        assert not hasattr(graph, "act")
    assert steps(ours) == (2, 0, 2)
    assert_same(run(ours, (x,)), run(theirs, (x,)))


@pytest.mark.statement("S6.3a")
def test_a_module_called_twice_is_one_reference_module(peers: Peers) -> None:
    model = Calls(lambda s, x: s.a(s.a(x)), a=conv())
    done = peers.compare(model, (X,), everywhere("default_qconfig"), lowered_alike=False)
    for side in (done.theirs, done.ours):
        calls = [str(n.target) for n in side.reference.graph.nodes if n.op == "call_module"]
        assert calls == ["a", "a"]


@pytest.mark.statement("S6.3a", "S4.2a")
@pytest.mark.parametrize("relu", [False, True])
def test_what_trained_with_a_batch_norm_is_a_folded_convolution(peers: Peers, relu: bool) -> None:
    layers = [conv(), nn.BatchNorm2d(3), *([nn.ReLU()] if relu else [])]
    model = lively(nn.Sequential(*layers)).train()
    mapping = everywhere("default_qat_qconfig")  # not fused: see docs/differences.md
    found = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (X,), mapping, call="prepare_qat_fx")
        run(prepared, (X,))
        reference, _ = peers.convert(names, prepared.eval())
        module: Any = reference.get_submodule("0")
        module = module[0] if relu else module
        assert "Reference" in module._get_name()
        assert isinstance(module, nn.Conv2d)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in reference.modules())
        assert steps(reference) == (2, 0, 2)
        found.append(module)
    torch.testing.assert_close(found[1].weight, found[0].weight, rtol=1e-6, atol=1e-7)


# -- reference and lowered ------------------------------------------------------------------------

EXACT: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Sequential(linear()), X),
    "linear-relu": (nn.Sequential(linear(), nn.ReLU()), X),
    "linear-F.relu": (Calls(lambda s, x: F.relu(s.a(x)), a=linear()), X),
    "linear-bn": (nn.Sequential(linear(), nn.BatchNorm1d(8)), images(5, 8)),
    "F.linear": (Calls(lambda s, x: F.linear(x, s.w, s.b), w=weight(6, 8), b=weight(6)), X),
    "F.linear-relu": (Calls(lambda s, x: F.relu(F.linear(x, s.w)), w=weight(6, 8)), X),
    "F.conv1d": (Calls(lambda s, x: F.conv1d(x, s.w, s.b), w=weight(4, 3, 3), b=weight(4)), X[0]),
    "F.conv2d": (
        Calls(lambda s, x: F.conv2d(x, s.w, s.b), w=weight(4, 3, 3, 3), b=weight(4)),
        X,
    ),
    "F.conv2d-relu": (Calls(lambda s, x: F.relu(F.conv2d(x, s.w)), w=weight(4, 3, 3, 3)), X),
    "F.conv3d": (
        Calls(lambda s, x: F.conv3d(x, s.w, s.b), w=weight(4, 3, 2, 2, 2), b=weight(4)),
        images(2, 3, 4, 4, 4),
    ),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3)), images(2, 3, 9)),
    "conv1d-relu": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), images(2, 3, 9)),
    "conv2d": (nn.Sequential(conv()), X),
    "conv2d-relu": (nn.Sequential(conv(), nn.ReLU()), X),
    "conv2d-bn-relu": (nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU()), X),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 4, 2)), images(2, 3, 4, 4, 4)),
    "conv3d-relu": (nn.Sequential(nn.Conv3d(3, 4, 2), nn.ReLU()), images(2, 3, 4, 4, 4)),
}


@pytest.mark.statement("S6.4a", "S7.1a")
@pytest.mark.parametrize("engine", ["x86", pytest.param("fbgemm", marks=SLOW)])
@pytest.mark.parametrize("case", EXACT)
def test_reference_and_lowered_are_equal(peers: Peers, case: str, engine: str) -> None:
    """Where torch.ao's functional convolutions lack arguments, ours alone: docs/differences.md."""
    model, x = EXACT[case]
    if x.dim() == 3 and "F." in case:
        x = images(2, 3, 9)
    mapping: Build = lambda n: n.get_default_qconfig_mapping(engine)  # noqa: E731
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        if "F.conv" in case:
            prepared, _ = peers.prepare(OURS, model.eval(), (x,), mapping)
            run(prepared, (x,))
            reference, lowered = peers.convert(OURS, prepared)
            assert steps(lowered) == (1, 0, 1)
            assert steps(reference) == (3, 0, 3)
        else:
            done = peers.compare(lively(model).eval(), (x,), mapping, quantizes=1)
            reference, lowered = done.ours.reference, done.ours.lowered
            assert_same(run(done.theirs.lowered, (x,)), run(done.theirs.reference, (x,)))
        assert_same(run(lowered, (x,)), run(reference, (x,)))
    finally:
        torch.backends.quantized.engine = before


# -- other dtypes ---------------------------------------------------------------------------------


def of_dtypes(*dtypes: torch.dtype) -> Build:
    """A backend that has linear and add with activations of these dtypes."""

    def backend(names: Names) -> Any:
        import torch.ao.nn.quantized.reference as nnqr

        own = names.ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
        config = names.BackendConfig("mine")
        for kind in (nn.Linear, torch.add):
            pattern = names.BackendPatternConfig(kind).set_observation_type(own)
            for dtype in dtypes:
                weights = (torch.qint8, torch.float) if kind is nn.Linear else ()
                pattern.add_dtype_config(names.DTypeConfig(dtype, dtype, *weights))
            if kind is nn.Linear and hasattr(pattern, "set_root_module"):
                pattern.set_root_module(nn.Linear).set_reference_quantized_module(nnqr.Linear)
            config.set_backend_pattern_config(pattern)
        return config

    return backend


def per_layer(**dtypes: torch.dtype) -> Build:
    def mapping(names: Names) -> Any:
        found = names.QConfigMapping()
        for name, dtype in dtypes.items():
            limits = {torch.qint32: (-(2**15), 2**15 - 1)}.get(dtype)
            ends = {} if limits is None else {"quant_min": limits[0], "quant_max": limits[1]}
            qconfig = names.QConfig(
                activation=names.MinMaxObserver.with_args(dtype=dtype, **ends),
                weight=names.default_weight_observer,
            )
            found.set_module_name(name, qconfig)
        return found

    return mapping


MIXED: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "int8": (torch.qint8, torch.qint8),
    "int32": (torch.qint32, torch.qint32),
    "int8-then-uint8": (torch.qint8, torch.quint8),
    "uint8-then-int32": (torch.quint8, torch.qint32),
    "int32-then-int8": (torch.qint32, torch.qint8),
}


@pytest.mark.statement("S6.5a", "S6.1a")
@pytest.mark.parametrize("case", MIXED)
def test_layers_of_other_dtypes(peers: Peers, case: str) -> None:
    first, second = MIXED[case]
    backend = of_dtypes(torch.quint8, torch.qint8, torch.qint32)
    model = Calls(lambda s, x: s.b(F.gelu(s.a(x))), a=linear(), b=linear())
    graphs = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(
            names, model, (X,), per_layer(a=first, b=second), backend=backend
        )
        assert len(placement(prepared)) == 4
        run(prepared, (X,))
        config = backend(peers.configs(names))
        with quiet():
            graphs.append(names.convert_to_reference_fx(prepared, backend_config=config))
    theirs, ours = graphs
    equal(steps(ours), steps(theirs), "steps")
    assert steps(ours) == (4, 0, 4)
    assert_same(run(ours, (X,)), run(theirs, (X,)))


@pytest.mark.statement("S6.5a")
def test_each_layer_quantizes_to_its_own_dtype(peers: Peers) -> None:
    backend = of_dtypes(torch.quint8, torch.qint8)
    model = CallsTwo(lambda s, x, y: (s.a(x), s.b(y)), a=linear(), b=linear())
    graphs = []
    for names in (THEIRS, OURS):
        mapping = per_layer(a=torch.quint8, b=torch.qint8)
        prepared, _ = peers.prepare(names, model, (X, X), mapping, backend=backend)
        run(prepared, (X, X))
        config = backend(peers.configs(names))
        with quiet():
            graphs.append(names.convert_to_reference_fx(prepared, backend_config=config))
    for graph in graphs:
        dtypes = {a for n in graph.graph.nodes for a in n.args if isinstance(a, torch.dtype)}
        assert {str(d).replace("torch.q", "torch.") for d in dtypes} == {
            "torch.uint8",
            "torch.int8",
        }
    assert_same(run(graphs[1], (X, X)), run(graphs[0], (X, X)))
    peers.compare(model, (X, X), default_mapping)
