"""Section 8: dynamic int8, float16, recurrent modules and embeddings."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.quantization.backend_config.native import get_test_only_legacy_native_backend_config

from fxquant.metadata import record_of
from fxquant.operators import TO_DTYPE
from tests.conformance.harness import (
    OURS,
    THEIRS,
    Names,
    Peers,
    assert_same,
    equal,
    everywhere,
    observers,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, CallsTwo

pytestmark = pytest.mark.peer

RANDOM = torch.Generator().manual_seed(8)
ROWS = torch.randn(4, 5, generator=RANDOM)
SEQUENCE = torch.randn(6, 2, 5, generator=RANDOM)
TOKENS = torch.randint(0, 10, (4, 3), generator=RANDOM)
WORDS = torch.randint(0, 10, (12,), generator=RANDOM)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(8)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def converted(
    peers: Peers,
    model: nn.Module,
    inputs: tuple[Any, ...],
    mapping: Any,
    *,
    calibrated: bool = True,
) -> tuple[tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule], ...]:
    """Prepared, reference and lowered graph: torch.ao's, and ours, which observe the same."""
    sides = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, inputs, mapping)
        if calibrated:
            run(prepared, inputs)
        sides.append((prepared, *peers.convert(names, prepared)))
    equal(placement(sides[1][0]), placement(sides[0][0]), "observers")
    return tuple(sides)


def kinds(prepared: fx.GraphModule) -> list[str]:
    return [type(module).__name__ for _, module in observers(prepared)]


def kernels(lowered: fx.GraphModule) -> list[str]:
    found = (record_of(node).kernel.split(" ")[0] for node in lowered.graph.nodes)
    return [kernel for kernel in found if kernel]


def same_lowered(
    sides: tuple[tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule], ...],
    inputs: tuple[Any, ...],
) -> None:
    theirs, ours = sides
    equal(steps(ours[2]), steps(theirs[2]), "steps of the lowered graph")
    assert_same(run(ours[2], inputs), run(theirs[2], inputs))


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: Calls(lambda m, x: m.fc(x), fc=nn.Linear(5, 6)),
    "module-relu": lambda: Calls(lambda m, x: F.relu(m.fc(x)), fc=nn.Linear(5, 6)),
    "module-bn": lambda: Calls(
        lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(6)
    ),
    "two-of-one-input": lambda: Calls(
        lambda m, x: m.a(x) + m.b(x), a=nn.Linear(5, 6), b=nn.Linear(5, 6)
    ),
    "chain": lambda: Calls(lambda m, x: m.b(m.a(x)), a=nn.Linear(5, 5), b=nn.Linear(5, 2)),
    "called-twice": lambda: Calls(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(5, 5)),
    "function": lambda: Calls(lambda m, x: F.linear(x, m.w, m.v), w=_weight(6, 5), v=_weight(6)),
    "function-no-bias": lambda: Calls(lambda m, x: F.linear(x, m.w), w=_weight(6, 5)),
    "function-relu": lambda: Calls(lambda m, x: F.relu(F.linear(x, m.w)), w=_weight(6, 5)),
    "function-relu-module": lambda: Calls(
        lambda m, x: m.relu(F.linear(x, m.w)), w=_weight(6, 5), relu=nn.ReLU()
    ),
    "one-weight-twice": lambda: Calls(
        lambda m, x: F.linear(F.linear(x, m.w), m.w), w=_weight(5, 5)
    ),
}
INT8 = ("default_dynamic_qconfig", "per_channel_dynamic_qconfig")


@pytest.mark.statement("S8.1a", "S5.11a", "S6.1a")
@pytest.mark.parametrize(
    ("qconfig", "calibrated"), [(INT8[0], True), (INT8[0], False), (INT8[1], True)]
)
@pytest.mark.parametrize("case", LINEARS)
def test_linears_are_quantized_at_run_time(
    peers: Peers, case: str, qconfig: str, calibrated: bool
) -> None:
    model = LINEARS[case]()
    sides = converted(peers, model, (ROWS,), everywhere(qconfig), calibrated=calibrated)
    theirs, ours = sides
    same_lowered(sides, (ROWS,))
    assert steps(ours[2]) == (0, 0, 0)
    equal(steps(ours[1]), steps(theirs[1]), "steps of the reference graph")
    torch.testing.assert_close(run(ours[1], (ROWS,)), run(theirs[1], (ROWS,)), rtol=1e-5, atol=1e-6)
    assert not torch.equal(run(ours[2], (ROWS,)), run(model, (ROWS,)))
    name = "quantized::linear_relu_dynamic" if "relu" in case else "quantized::linear_dynamic"
    assert set(kernels(ours[2])) == {name}
    assert not any("qconfig" in vars(module) for module in ours[2].modules())


@pytest.mark.statement("S8.1a", "S5.11a")
def test_a_functional_linear_has_an_observer_of_its_input_and_one_of_its_weight(
    peers: Peers,
) -> None:
    for case in ("function", "one-weight-twice"):
        sides = converted(peers, LINEARS[case](), (ROWS,), everywhere("default_dynamic_qconfig"))
        found = kinds(sides[1][0])
        assert found.count("MinMaxObserver") == 1
        assert found.count("PlaceholderObserver") == (2 if case == "one-weight-twice" else 1)
        weight = next(m for _, m in observers(sides[1][0]) if type(m).__name__ == "MinMaxObserver")
        assert float(weight.max_val) > float(weight.min_val)


@pytest.mark.statement("S8.1a", "S8.2a")
@pytest.mark.parametrize("qconfig", [*INT8, "float16_dynamic_qconfig"])
def test_everything_else_stays_as_it_is(peers: Peers, qconfig: str) -> None:
    model = Calls(
        lambda m, x: F.relu(m.conv(x) * 2 + m.conv(x)).flatten(1).sum(1) + m.table(m.index).sum(),
        conv=nn.Conv2d(3, 3, 3),
        table=nn.Embedding(10, 4),
        index=nn.Parameter(TOKENS, requires_grad=False),
    )
    image = torch.randn(2, 3, 8, 8, generator=RANDOM)
    sides = converted(peers, model, (image,), everywhere(qconfig))
    same_lowered(sides, (image,))
    assert kinds(sides[1][0]) == []
    assert steps(sides[1][2]) == (0, 0, 0)
    assert torch.equal(run(sides[1][2], (image,)), run(model, (image,)))


def _casts(graph_module: fx.GraphModule) -> tuple[int, int]:
    """How many values become float16, and how many are read as float32 again, in the graph."""
    to_half = to_whole = 0
    for node in graph_module.graph.nodes:
        if node.target is TO_DTYPE and node.args[1] is torch.float16:
            to_half += 1
        elif node.target is TO_DTYPE:
            to_whole += node.all_input_nodes[0].op != "get_attr"
        elif node.target in ("to", torch.quantize_per_tensor_dynamic):
            to_half += 1
        elif node.op == "call_method" and node.target == "dequantize":
            to_whole += 1
    return to_half, to_whole


@pytest.mark.statement("S8.2a", "S6.1a")
@pytest.mark.parametrize("case", LINEARS)
def test_float16_linears(peers: Peers, case: str) -> None:
    model = LINEARS[case]()
    sides = converted(peers, model, (ROWS,), everywhere("float16_dynamic_qconfig"))
    theirs, ours = sides
    same_lowered(sides, (ROWS,))
    assert steps(ours[2]) == (0, 0, 0)
    equal(_casts(ours[1]), _casts(theirs[1]), "casts of the reference graph")
    relu = "_relu" if "relu" in case else ""
    assert set(kernels(ours[2])) == {f"quantized::linear{relu}_dynamic_fp16"}
    if "function" in case or case == "one-weight-twice":
        assert_same(run(ours[1], (ROWS,)), run(theirs[1], (ROWS,)))
    assert not torch.equal(run(ours[2], (ROWS,)), run(model, (ROWS,)))


HIDDEN = torch.randn(4, 7, generator=RANDOM)
LAYERS = torch.randn(4, 2, 7, generator=RANDOM)
RECURRENT: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "lstm": (lambda: Calls(lambda m, x: m.rnn(x), rnn=nn.LSTM(5, 7)), (SEQUENCE,)),
    "lstm-state": (
        lambda: CallsTwo(
            lambda m, x, h: m.rnn(x, (h, h)), rnn=nn.LSTM(5, 7, 2, bidirectional=True)
        ),
        (SEQUENCE, LAYERS),
    ),
    "gru": (lambda: Calls(lambda m, x: m.rnn(x), rnn=nn.GRU(5, 7)), (SEQUENCE,)),
    "gru-state": (
        lambda: CallsTwo(lambda m, x, h: m.rnn(x, h), rnn=nn.GRU(5, 7, 4, batch_first=True)),
        (SEQUENCE.transpose(0, 1), LAYERS),
    ),
    "lstm-cell": (lambda: Calls(lambda m, x: m.rnn(x), rnn=nn.LSTMCell(5, 7)), (ROWS,)),
    "lstm-cell-state": (
        lambda: CallsTwo(lambda m, x, h: m.rnn(x, (h, h)), rnn=nn.LSTMCell(5, 7)),
        (ROWS, HIDDEN),
    ),
    "gru-cell": (lambda: Calls(lambda m, x: m.rnn(x), rnn=nn.GRUCell(5, 7)), (ROWS,)),
    "rnn-cell-tanh": (lambda: Calls(lambda m, x: m.rnn(x), rnn=nn.RNNCell(5, 7)), (ROWS,)),
    "rnn-cell-relu": (
        lambda: CallsTwo(lambda m, x, h: m.rnn(x, h), rnn=nn.RNNCell(5, 7, nonlinearity="relu")),
        (ROWS, HIDDEN),
    ),
}
DYNAMIC = (*INT8, "float16_dynamic_qconfig")


def _eager(model: nn.Module, qconfig: str) -> nn.Module:
    kinds = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    spec = dict.fromkeys(kinds, getattr(tq, qconfig))
    with quiet():
        return tq.quantize_dynamic(model, spec)


@pytest.mark.statement("S8.3a")
@pytest.mark.parametrize("qconfig", DYNAMIC)
@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_modules_equal_eager_dynamic_quantization(
    peers: Peers, case: str, qconfig: str
) -> None:
    make, inputs = RECURRENT[case]
    model = make()
    sides = converted(peers, model, inputs, everywhere(qconfig))
    theirs, ours = sides
    assert kinds(ours[0]) == ["PlaceholderObserver"]
    same_lowered(sides, inputs)
    assert steps(ours[2]) == (0, 0, 0)
    assert_same(run(ours[2], inputs), run(_eager(model, qconfig), inputs))
    assert len(kernels(ours[2])) == 1
    if qconfig != "float16_dynamic_qconfig":
        equal(steps(ours[1]), steps(theirs[1]), "steps of the reference graph")
        return
    equal(_casts(ours[1])[0], _casts(theirs[1])[0], "casts of the reference graph")


@pytest.mark.statement("S8.3a")
@pytest.mark.parametrize("qconfig", DYNAMIC)
@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_models_script_and_load_again(case: str, qconfig: str) -> None:
    make, inputs = RECURRENT[case]
    peers = Peers(OURS)
    first, second = (
        peers.convert(OURS, peers.prepare(OURS, make(), inputs, everywhere(qconfig))[0])[1]
        for _ in range(2)
    )
    expected = run(first, inputs)
    with quiet():
        scripted = torch.jit.script(first)
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        assert_same(run(torch.jit.load(file), inputs), expected)
    different = run(second, inputs)
    assert str(different) != str(expected)
    second.load_state_dict(first.state_dict())
    assert_same(run(second, inputs), expected)


@pytest.mark.statement("S8.3a")
@pytest.mark.parametrize("qconfig", DYNAMIC)
def test_rnn_stays(peers: Peers, qconfig: str) -> None:
    model = Calls(lambda m, x: m.rnn(x), rnn=nn.RNN(5, 7))
    sides = converted(peers, model, (SEQUENCE,), everywhere(qconfig))
    assert kinds(sides[1][0]) == []
    assert_same(run(sides[1][2], (SEQUENCE,)), run(model, (SEQUENCE,)))
    followed = Calls(lambda m, x: m.fc(m.rnn(x)[0]), rnn=nn.RNN(5, 7), fc=nn.Linear(7, 3))
    sides = converted(peers, followed, (SEQUENCE,), everywhere(qconfig))
    assert kinds(sides[1][0]) == ["PlaceholderObserver"]
    same_lowered(sides, (SEQUENCE,))
    assert len(kernels(sides[1][2])) == 1


@pytest.mark.statement("S8.4a")
def test_static_float16_does_nothing_by_default(peers: Peers) -> None:
    models = [make() for make in LINEARS.values()] + [make() for make, _ in RECURRENT.values()]
    inputs = [(ROWS,)] * len(LINEARS) + [given for _, given in RECURRENT.values()]
    for model, given in zip(models, inputs, strict=True):
        sides = converted(peers, model, given, everywhere("float16_static_qconfig"))
        assert kinds(sides[1][0]) == []
        for graph_module in sides[1][1:]:
            assert_same(run(graph_module, given), run(sides[1][0], given))


def _legacy_backend(names: Names) -> Any:
    """torch.ao's own, which has float16 throughout; fxquant.compat reads it as it is."""
    return get_test_only_legacy_native_backend_config()


THROUGHOUT: dict[str, Callable[[], nn.Module]] = {
    **{name: LINEARS[name] for name in ("module", "module-relu", "function", "function-no-bias")},
    **{name: LINEARS[name] for name in ("function-relu", "function-relu-module")},
    "add": lambda: Calls(lambda m, x: x + m.fc(x), fc=nn.Linear(5, 5)),
    "add-number": lambda: Calls(lambda m, x: x + 2),
    "mul-relu": lambda: Calls(lambda m, x: F.relu(x * x)),
    "matmul": lambda: Calls(lambda m, x: torch.matmul(x, x.t())),
    "sigmoid": lambda: Calls(lambda m, x: torch.sigmoid(x)),
    "softmax": lambda: Calls(lambda m, x: m.soft(x), soft=nn.Softmax(1)),
}
FLOAT_THERE = ("gelu", "silu", "mish", "hardswish")


@pytest.mark.statement("S8.4a", "S5.11a", "S6.1a")
@pytest.mark.parametrize("case", THROUGHOUT)
def test_float16_throughout_by_the_legacy_backend(peers: Peers, case: str) -> None:
    model = THROUGHOUT[case]()
    mapping = everywhere("float16_static_qconfig")
    graphs = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (ROWS,), mapping, backend=_legacy_backend)
        options = {"backend_config": _legacy_backend(names)}
        graphs.append((prepared, *peers.convert(names, prepared, lambda _, o=options: o)))
    theirs, ours = graphs
    equal(placement(ours[0]), placement(theirs[0]), "observers")
    assert set(kinds(ours[0])) == {"PlaceholderObserver"}
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        equal(_casts(mine), _casts(other), "casts")
        result, expected = run(mine, (ROWS,)), run(other, (ROWS,))
        assert torch.equal(result, result.to(torch.float16).to(torch.float32))
        if "module" in case or case == "add":  # torch.ao leaves the weights of modules unrounded
            assert float((result - expected).abs().max()) < 2e-3
        else:
            assert_same(result, expected)


@pytest.mark.statement("S8.4a")
@pytest.mark.parametrize("name", FLOAT_THERE)
def test_what_the_legacy_backend_does_not_have_stays_float(peers: Peers, name: str) -> None:
    model = Calls(lambda m, x: getattr(F, name)(x))
    mapping = everywhere("float16_static_qconfig")
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (ROWS,), mapping, backend=_legacy_backend)
        assert kinds(prepared) == []
        behind = Calls(lambda m, x: m.fc(getattr(F, name)(x)), fc=nn.Linear(5, 3))
        prepared, _ = peers.prepare(names, behind, (ROWS,), mapping, backend=_legacy_backend)
        assert kinds(prepared) == ["PlaceholderObserver"] * 2


# -- tables ---------------------------------------------------------------------------------------

TABLES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "embedding": (lambda: Calls(lambda m, x: m.table(x), table=nn.Embedding(10, 4)), (TOKENS,)),
    "bag": (
        lambda: CallsTwo(lambda m, x, o: m.table(x, o), table=nn.EmbeddingBag(10, 4, mode="sum")),
        (WORDS, torch.tensor([0, 3, 5])),
    ),
    "bag-of-rows": (
        lambda: Calls(lambda m, x: m.table(x), table=nn.EmbeddingBag(10, 4, mode="sum")),
        (TOKENS,),
    ),
    "bag-with-end": (
        lambda: CallsTwo(
            lambda m, x, o: m.table(x, o),
            table=nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True),
        ),
        (WORDS, torch.tensor([0, 3, 5, 12])),
    ),
}
FLOAT_QPARAMS = ("float_qparams_weight_only_qconfig", "float_qparams_weight_only_qconfig_4bit")


@pytest.mark.statement("S8.5a")
@pytest.mark.parametrize("qconfig", FLOAT_QPARAMS)
@pytest.mark.parametrize("case", TABLES)
def test_tables_are_quantized_by_float_qparams_alone(peers: Peers, case: str, qconfig: str) -> None:
    make, inputs = TABLES[case]
    model = make()
    sides = converted(peers, model, inputs, everywhere(qconfig))
    assert kinds(sides[1][0]) == []
    same_lowered(sides, inputs)
    bits = "4bit" if "4bit" in qconfig else "byte"
    assert [kernel.rsplit("_", 1)[1] for kernel in kernels(sides[1][2])] == [bits]
    assert not torch.equal(run(sides[1][2], inputs), run(model, inputs))
    # Scale and offset of a 4-bit row are float16 in the kernel, and in our reference graph only:
    # 2**-11 of up to 4 in each of up to 7 rows of a bag.
    error = 2**-11 * 4 * 7 if bits == "4bit" else 1e-5
    references = [run(side[1], inputs) for side in sides]
    torch.testing.assert_close(*references, rtol=0, atol=error)


@pytest.mark.statement("S8.5a")
@pytest.mark.parametrize(
    "qconfig",
    ["default_qconfig", "float16_static_qconfig", *DYNAMIC, "default_per_channel_qconfig"],
)
@pytest.mark.parametrize("case", TABLES)
def test_other_qconfigs_leave_tables_in_float(peers: Peers, case: str, qconfig: str) -> None:
    make, inputs = TABLES[case]
    model = make()
    sides = converted(peers, model, inputs, everywhere(qconfig))
    assert kinds(sides[1][0]) == []
    for graph_module in sides[1][1:]:
        assert_same(run(graph_module, inputs), run(model, inputs))
    sides = converted(peers, model, inputs, everywhere(FLOAT_QPARAMS[0]))
    same_lowered(sides, inputs)
    assert len(kernels(sides[1][2])) == 1


@pytest.mark.statement("S8.5a", "S5.4a")
def test_a_float_table_before_a_static_op_is_observed(peers: Peers) -> None:
    model = Calls(lambda m, x: m.fc(m.table(x)), table=nn.Embedding(10, 5), fc=nn.Linear(5, 3))

    def mapping(names: Names) -> Any:
        made = names.QConfigMapping().set_global(names.default_qconfig)
        return made.set_object_type(nn.Embedding, names.float_qparams_weight_only_qconfig)

    peers.compare(model, (TOKENS,), mapping)
    done = peers.compare(model, (TOKENS,), everywhere("default_qconfig"))
    assert kinds(done.ours.prepared) == ["MinMaxObserver"] * 2


@pytest.mark.statement("S8.5a", "S8.5b")
def test_tables_in_training(peers: Peers) -> None:
    model = Calls(
        lambda m, x: m.fc(m.table(x)), table=nn.Embedding(10, 4), fc=nn.Linear(4, 3)
    ).train()

    def mapping(names: Names) -> Any:
        made = names.QConfigMapping().set_global(names.get_default_qat_qconfig("x86"))
        return made.set_object_type(nn.Embedding, names.default_embedding_qat_qconfig)

    sides = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (TOKENS,), mapping, call="prepare_qat_fx")
        sides.append(prepared)
        assert hasattr(prepared.table, "weight_fake_quant")
    equal(len(observers(sides[1])), len(observers(sides[0])), "observers")
    for names in (THEIRS, OURS):
        with pytest.raises(
            AssertionError, match=r"requires a qscheme of torch\.per_channel_affine_float_qparams"
        ):
            peers.prepare(
                names,
                model,
                (TOKENS,),
                lambda n: n.QConfigMapping().set_global(n.get_default_qat_qconfig("x86")),
                call="prepare_qat_fx",
            )


@pytest.mark.statement("S8.1a", "S5.3c")
@pytest.mark.parametrize("order", list(itertools.permutations(("a", "b"))))
def test_static_and_dynamic_side_by_side(peers: Peers, order: tuple[str, str]) -> None:
    model = Calls(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(5, 4), b=nn.Linear(5, 4))

    def mapping(names: Names) -> Any:
        made = names.QConfigMapping().set_module_name(order[0], names.default_qconfig)
        return made.set_module_name(order[1], names.default_dynamic_qconfig)

    sides = converted(peers, model, (ROWS,), mapping)
    assert sorted(kinds(sides[1][0])) == ["MinMaxObserver"] * 2 + ["PlaceholderObserver"]
    same_lowered(sides, (ROWS,))


@pytest.mark.statement("S8.1a")
def test_the_global_engine_is_not_asked() -> None:
    """torch.ao's functional kernels use the whole range where it is onednn, others half of it."""
    ours = Peers(OURS)
    model = LINEARS["function"]()
    before = torch.backends.quantized.engine
    results = []
    try:
        for engine in ("x86", "onednn"):
            torch.backends.quantized.engine = engine
            prepared, _ = ours.prepare(OURS, model, (ROWS,), everywhere("default_dynamic_qconfig"))
            _, lowered = ours.convert(OURS, prepared)
            assert kernels(lowered) == ["quantized::linear_dynamic"]
            results.append(run(lowered, (ROWS,)))
    finally:
        torch.backends.quantized.engine = before
    assert_same(results[1], results[0])


@pytest.mark.statement("S8.1a")
@pytest.mark.parametrize("case", ["module", "function"])
def test_a_qconfig_without_an_activation_observer_quantizes_no_linear(case: str) -> None:
    """torch.ao fails: ``'Identity' object has no attribute 'dtype'``."""
    ours, model = Peers(OURS), LINEARS[case]()
    mapping = everywhere("default_weight_only_qconfig")
    prepared, _ = ours.prepare(OURS, model, (ROWS,), mapping)
    assert kinds(prepared) == []
    assert_same(run(ours.convert(OURS, prepared)[1], (ROWS,)), run(model, (ROWS,)))


@pytest.mark.statement("S8.1a", "S8.2a")
@pytest.mark.parametrize("qconfig", DYNAMIC)
def test_keyword_weights_and_recurrent_modules_without_biases(qconfig: str) -> None:
    """torch.ao fails on both."""
    ours = Peers(OURS)
    plain = LINEARS["function"]()
    named = Calls(lambda m, x: F.linear(x, weight=m.w, bias=m.v), w=plain.w, v=plain.v)
    made = [
        run(ours.convert(OURS, ours.prepare(OURS, m, (ROWS,), everywhere(qconfig))[0])[1], (ROWS,))
        for m in (plain, named)
    ]
    assert_same(made[1], made[0])
    model = Calls(lambda m, x: m.rnn(x), rnn=nn.LSTM(5, 7, bias=False))
    prepared, _ = ours.prepare(OURS, model, (SEQUENCE,), everywhere(qconfig))
    lowered = ours.convert(OURS, prepared)[1]
    assert len(kernels(lowered)) == 1
    (found, _), (expected, _) = run(lowered, (SEQUENCE,)), run(model, (SEQUENCE,))
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.statement("S8.5a")
@pytest.mark.parametrize("qconfig", FLOAT_QPARAMS)
def test_tables_of_an_odd_number_of_features(qconfig: str) -> None:
    """torch.ao's 4-bit tables give one feature too many."""
    ours = Peers(OURS)
    model = Calls(lambda m, x: m.table(x), table=nn.Embedding(10, 5))
    prepared, _ = ours.prepare(OURS, model, (TOKENS,), everywhere(qconfig))
    lowered = ours.convert(OURS, prepared)[1]
    found, expected = run(lowered, (TOKENS,)), run(model, (TOKENS,))
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < (0.2 if "4bit" in qconfig else 0.02)
    assert any("embedding" in record_of(node).kernel for node in lowered.graph.nodes)
