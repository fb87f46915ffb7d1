"""Which chains fuse, in every form of the code, and which do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.patterns.library import FUSION_PATTERNS
from fxquant.patterns.matcher import match_all

Trace = Callable[..., fx.GraphModule]
Function = Callable[[Tensor], Tensor]

PRODUCERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(2, 2, 1), (1, 2, 4)),
    "conv2d": (nn.Conv2d(2, 2, 1), (1, 2, 4, 4)),
    "conv3d": (nn.Conv3d(2, 2, 1), (1, 2, 4, 4, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(2, 2, 1), (1, 2, 4)),
    "conv_transpose2d": (nn.ConvTranspose2d(2, 2, 1), (1, 2, 4, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 2, 1), (1, 2, 4, 4, 4)),
    "linear": (nn.Linear(2, 2), (1, 2)),
    "bn": (nn.BatchNorm2d(2), (1, 2, 4, 4)),
}

CLAMPS: dict[str, list[Function]] = {
    "relu": [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        torch.relu_,
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu(),
        lambda x: x.relu_(),
    ],
    "relu6": [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6, lambda x: F.relu6(x, inplace=True)],
    "hardtanh": [nn.Hardtanh(-2, 2), F.hardtanh, lambda x: F.hardtanh(x, 0.0, max_val=4.0)],
    "clamp": [
        lambda x: torch.clamp(x, 0, 6),
        lambda x: torch.clip(x, min=0),
        lambda x: x.clamp(0, max=6),
        lambda x: x.clamp_(max=6.0),
        lambda x: x.clamp_min(0),
        lambda x: torch.clamp_max(x, 6),
    ],
}

SMOOTH: dict[str, list[Function]] = {
    "leaky_relu": [nn.LeakyReLU(0.2), F.leaky_relu, lambda x: F.leaky_relu(x, 0.1, True)],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "silu": [nn.SiLU(), F.silu],
    "gelu": [nn.GELU(), nn.GELU(approximate="tanh"), F.gelu],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [nn.Tanh(), torch.tanh, lambda x: x.tanh()],
}


class Chain(nn.Module):
    def __init__(self, op: nn.Module, act: Function) -> None:
        super().__init__()
        self.op = op
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.op(x))


CHAINS = [
    (f"{producer}-{name}", producer, act)
    for producer in PRODUCERS
    for name, forms in (CLAMPS if producer == "bn" else CLAMPS | SMOOTH).items()
    for act in forms
]


@pytest.mark.parametrize(("name", "producer", "act"), CHAINS)
def test_an_op_with_its_activation(trace: Trace, name: str, producer: str, act: Function) -> None:
    module, shape = PRODUCERS[producer]
    report = match_all(trace(Chain(module, act), torch.ones(shape)), FUSION_PATTERNS)
    (match,) = report.matches
    assert match.pattern.name == name
    assert match.first.name == "op"
    assert match.last.name == list(match.gm.graph.nodes)[-2].name
    assert report.refusals == ()


FUNCTIONAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conv1d-relu": lambda x, w, b: F.relu(F.conv1d(x, w, b)),
    "conv2d-relu6": lambda x, w, b: F.relu6(F.conv2d(x, weight=w, bias=b)),
    "conv3d-silu": lambda x, w, b: F.silu(F.conv3d(x, w)),
    "conv_transpose2d-tanh": lambda x, w, b: F.conv_transpose2d(x, w, b).tanh(),
    "linear-gelu": lambda x, w, b: F.gelu(F.linear(x, w, b)),
    "linear-clamp": lambda x, w, b: F.linear(x, w).clamp(0, 1),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functions_on_attributes(trace: Trace, name: str) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2))
            self.b = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return FUNCTIONAL[name](x, self.w, self.b)

    (match,) = match_all(trace(Functional()), FUSION_PATTERNS).matches
    assert match.pattern.name == name
    assert match.ops[0].constant_path("weight") == "w"


COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv2d": lambda x, w: F.relu(F.conv2d(x, w * 2)),
    "linear": lambda x, w: F.gelu(F.linear(x, w * 2)),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x, w * 2).tanh(),
    "conv2d residual": lambda x, w: x + F.conv2d(x, w * 2),
    "conv2d residual relu": lambda x, w: F.relu(x + F.conv2d(x, w * 2)),
    "batch_norm": lambda x, w: F.relu(F.batch_norm(x, w[0, :, 0, 0], w[0, :, 0, 0])),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_computed_in_the_graph_is_refused(trace: Trace, name: str) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2) if name == "linear" else torch.ones(2, 2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return COMPUTED[name](x, self.w)

    shape = (2, 2) if name == "linear" else (1, 2, 4, 4)
    report = match_all(trace(Computed(), torch.ones(shape)), FUSION_PATTERNS)
    assert report.match_of(name.split()[0]) is None
    miss = report.nearest_miss(name.split()[0])
    assert miss is not None
    assert miss.guard == "constant_weight"


# -- residual additions ---------------------------------------------------------------------------


class Residual(nn.Module):
    """``join(conv(x), other)`` and what follows."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.join = join

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.join(self.conv(x), other)


ADDS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "operator": ("conv2d-add", lambda y, o: y + o),
    "operator, second": ("conv2d-add", lambda y, o: o + y),
    "torch.add": ("conv2d-add", torch.add),
    "torch.add, keyword": ("conv2d-add", lambda y, o: torch.add(o, other=y)),
    "torch.add, alpha 1": ("conv2d-add", lambda y, o: torch.add(y, o, alpha=1)),
    "method": ("conv2d-add", lambda y, o: y.add(o)),
    "method, second": ("conv2d-add", lambda y, o: o.add(y)),
    "in-place method": ("conv2d-add", lambda y, o: y.add_(o)),
    "operator, relu": ("conv2d-add-relu", lambda y, o: F.relu(y + o)),
    "operator, second, relu": ("conv2d-add-relu", lambda y, o: (o + y).relu()),
    "torch.add, relu": ("conv2d-add-relu", lambda y, o: torch.relu(torch.add(y, o))),
    "method, in-place relu": ("conv2d-add-relu", lambda y, o: y.add_(o).relu_()),
    "operator, relu6": ("conv2d-add-relu6", lambda y, o: F.relu6(y + o)),
    "operator, hardtanh": ("conv2d-add-hardtanh", lambda y, o: F.hardtanh(o + y, 0.0, 6.0)),
    "operator, clamp": ("conv2d-add-clamp", lambda y, o: (y + o).clamp_min(0)),
    "silu is not among them": ("conv2d-add", lambda y, o: F.silu(y + o)),
}


@pytest.mark.parametrize(("name", "join"), ADDS.values(), ids=ADDS.keys())
def test_a_convolution_with_a_residual(
    trace: Trace, name: str, join: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x = torch.ones(1, 2, 4, 4)
    report = match_all(trace(Residual(join), x, x), FUSION_PATTERNS)
    (match,) = report.matches
    assert match.pattern.name == name
    assert match.other.name == "other"
    assert match.add.name == "add"
    assert report.refusals == ()


def test_a_residual_takes_the_clamp_after_it(trace: Trace) -> None:
    x = torch.ones(1, 2, 4, 4)
    report = match_all(trace(Residual(lambda y, o: F.relu6(y + o)), x, x), FUSION_PATTERNS)
    assert [str(match) for match in report.matches] == ["conv2d-add-relu6(conv, add, relu6)"]
    assert report.refusals == ()


def test_a_residual_without_the_clamp_that_a_guard_refused(trace: Trace) -> None:
    """The match is there, and the report says why it is not longer."""
    x = torch.ones(1, 2, 4, 4)
    gm = trace(Residual(lambda y, o: (y + o).clamp(max=o)), x, x)
    report = match_all(gm, FUSION_PATTERNS)
    assert [str(match) for match in report.matches] == ["conv2d-add(conv, add)"]
    found = [(miss.pattern.name, miss.anchor, miss.guard) for miss in report.refusals]
    assert found == [
        ("conv2d-add-clamp", "conv", "constant_bounds"),
        ("add-clamp", "add", "constant_bounds"),
    ]


REFUSED_ADDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str, str, tuple[str, ...]]] = {
    "alpha": (
        lambda y, o: torch.add(y, o, alpha=2),
        "unit_alpha",
        "'add' multiplies its second operand by alpha=2; only alpha=1 is fused",
        ("add",),
    ),
    "number": (
        lambda y, o: y + 1,
        "not_scalar_operand",
        "'add' combines a tensor with the number 1, not with a tensor",
        ("add",),
    ),
    "number first": (
        lambda y, o: 2.5 + y,
        "not_scalar_operand",
        "'add' combines a tensor with the number 2.5, not with a tensor",
        ("add",),
    ),
    "size": (
        lambda y, o: y + o.size(0),
        "not_scalar_operand",
        "'add' combines a tensor with 'size', which gives no tensor",
        ("size",),
    ),
    "broadcast": (
        lambda y, o: y + o[:, :1],
        "same_shape",
        "'add' broadcasts: 'conv' has the shape (1, 2, 4, 4) and 'getitem' (1, 1, 4, 4)",
        ("add",),
    ),
    "twice": (
        lambda y, o: y + y,
        "single_user",
        "'add' takes the output of 'conv' 2 times, so the two are no chain",
        ("add",),
    ),
    "also returned": (
        lambda y, o: (y + o, y),
        "single_user",
        "the output of 'conv' is also used by 'output', so making one op of 'conv' and 'add' would "
        "change 'output'",
        ("output",),
    ),
    "also read twice": (
        lambda y, o: (y + o) * y * y.abs(),
        "single_user",
        "the output of 'conv' is also used by 'mul' and 'abs_1', so making one op of 'conv' and "
        "'add' would change 'mul' and 'abs_1'",
        ("mul", "abs_1"),
    ),
    "dtype": (
        lambda y, o: y + o.double(),
        "same_dtype",
        "'x' is torch.float32 and 'double' is torch.float64; one chain takes one dtype",
        ("double",),
    ),
    "writes the input": (
        lambda y, o: o.add_(y),
        "no_mutation_between",
        "'add_' writes 'other' in place, which may be the model's input 'other'; use the form that "
        "is not in place",
        ("add_", "other"),
    ),
    "writes a view of the input": (
        lambda y, o: o.view(1, 2, 4, 4).add_(y),
        "no_mutation_between",
        "'add_' writes 'view' in place, which may be the model's input 'other'; use the form that "
        "is not in place",
        ("add_", "other"),
    ),
}


@pytest.mark.parametrize(
    ("join", "guard", "reason", "culprits"), REFUSED_ADDS.values(), ids=REFUSED_ADDS.keys()
)
def test_a_residual_that_is_refused(
    trace: Trace,
    join: Callable[[Tensor, Tensor], Tensor],
    guard: str,
    reason: str,
    culprits: tuple[str, ...],
) -> None:
    x = torch.ones(1, 2, 4, 4)
    report = match_all(trace(Residual(join), x, x), FUSION_PATTERNS)
    assert report.matches == ()
    miss = report.nearest_miss("conv")
    assert miss is not None
    assert (miss.pattern.name, miss.guard) == ("conv2d-add", guard)
    assert (miss.reason, miss.culprits) == (reason, culprits)


def test_a_residual_without_shapes_is_refused(trace: Trace) -> None:
    report = match_all(trace(Residual(lambda y, o: y + o)), FUSION_PATTERNS)
    assert report.matches == ()
    miss = report.nearest_miss("conv")
    assert miss is not None
    assert miss.guard == "same_shape"
    assert miss.culprits == ("conv",)
    assert miss.reason == (
        "the shape of 'conv' is not known because example inputs did not run, so 'add' may "
        "broadcast; pass example inputs that the model accepts"
    )


def test_a_constant_is_no_residual(trace: Trace) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.register_buffer("table", torch.ones(1, 2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) + self.table
            return out

    report = match_all(trace(Constant(), torch.ones(1, 2, 4, 4)), FUSION_PATTERNS)
    assert report.matches == ()
    miss = report.nearest_miss("conv")
    assert miss is not None
    assert miss.reason == (
        "'add' combines 'conv' with the constant 'table', not with an activation"
    )
    assert miss.culprits == ("table",)


# -- two tensors, concatenation, matrix products --------------------------------------------------


class Two(nn.Module):
    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = forward

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(x, y)


TWO: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "add": ("add-relu", lambda x, y: F.relu(x + y)),
    "iadd on a fresh value": ("add-relu", lambda x, y: (x * 1).add_(y).relu_()),
    "add relu6": ("add-relu6", lambda x, y: F.relu6(torch.add(x, y))),
    "add hardtanh": ("add-hardtanh", lambda x, y: F.hardtanh(x.add(y))),
    "add clamp": ("add-clamp", lambda x, y: (x + y).clamp_min(0)),
    "mul": ("mul-relu", lambda x, y: torch.relu(x * y)),
    "mul relu6": ("mul-relu6", lambda x, y: F.relu6(torch.mul(x, y))),
    "mul hardtanh": ("mul-hardtanh", lambda x, y: F.hardtanh(x.mul(y))),
    "mul clamp": ("mul-clamp", lambda x, y: torch.multiply(x, y).clamp(0, 6)),
    "cat": ("cat-relu", lambda x, y: F.relu(torch.cat([x, y], 1))),
    "concat": ("cat-relu", lambda x, y: torch.concat((x, y, x), dim=1).relu()),
    "matmul": ("matmul-relu", lambda x, y: F.relu(x @ y)),
    "matmul function": ("matmul-clamp", lambda x, y: torch.matmul(x, y).clamp(0, 6)),
    "bmm": ("bmm-relu6", lambda x, y: F.relu6(torch.bmm(x, y))),
}


@pytest.mark.parametrize(("name", "forward"), TWO.values(), ids=TWO.keys())
def test_two_tensors(trace: Trace, name: str, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.ones(1, 4, 4)
    report = match_all(trace(Two(forward), x, x), FUSION_PATTERNS)
    assert [match.pattern.name for match in report.matches] == [name]


REFUSED_TWO: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "number": (
        lambda x, y: F.relu(x + 1),
        "not_scalar_operand",
        "'add' combines a tensor with the number 1, not with a tensor",
    ),
    "product with a number": (
        lambda x, y: F.relu(2 * x),
        "not_scalar_operand",
        "'mul' combines a tensor with the number 2, not with a tensor",
    ),
    "alpha": (
        lambda x, y: F.relu(torch.add(x, y, alpha=0.5)),
        "unit_alpha",
        "'add' multiplies its second operand by alpha=0.5; only alpha=1 is fused",
    ),
    "tensor bounds": (
        lambda x, y: (x + y).clamp(y, None),
        "constant_bounds",
        "the argument min of 'clamp' is the tensor or value of 'y', not a number",
    ),
    "tensor bound of clamp_max": (
        lambda x, y: (x + y).clamp_max(y),
        "constant_bounds",
        "the argument max of 'clamp_max' is the tensor or value of 'y', not a number",
    ),
    "computed bound of hardtanh": (
        lambda x, y: F.hardtanh(x + y, 0.0, y.size(1)),
        "constant_bounds",
        "the argument max_val of 'hardtanh' is the tensor or value of 'size', not a number",
    ),
    "NaN bound": (
        lambda x, y: (x + y).clamp(float("nan"), 6),
        "constant_bounds",
        "the argument min of 'clamp' is not a number (NaN)",
    ),
    "integers": (
        lambda x, y: F.relu(x.int() + y.int()),
        "same_dtype",
        "'int_1' is torch.int32; only tensors of floating point are quantized",
    ),
    "shared": (
        lambda x, y: F.relu(s := torch.cat([x, y])) + s,
        "single_user",
        "the output of 'cat' is also used by 'add', so making one op of 'cat' and 'relu' would "
        "change 'add'",
    ),
    "writes the input": (
        lambda x, y: F.relu(x.add_(y)),
        "no_mutation_between",
        "'add_' writes 'x' in place, which may be the model's input 'x'; use the form that is not "
        "in place",
    ),
    "written value read later": (
        lambda x, y: F.relu((t := x * y).add_(y)) + t,
        "no_mutation_between",
        "'add_' writes 'mul' in place, and 'add' reads afterwards what may be its memory; use the "
        "form that is not in place",
    ),
    "addend written before the ReLU": (
        lambda x, y: (lambda t, s: (t.neg_(), F.relu(s))[1])(t := y * 2, x + t),
        "no_mutation_between",
        "'neg_' writes in place, between 'add' and 'relu', what may be the memory of 'mul'",
    ),
}


@pytest.mark.parametrize(
    ("forward", "guard", "reason"), REFUSED_TWO.values(), ids=REFUSED_TWO.keys()
)
def test_two_tensors_refused(
    trace: Trace, forward: Callable[[Tensor, Tensor], Tensor], guard: str, reason: str
) -> None:
    x = torch.ones(4, 4)
    report = match_all(trace(Two(forward), x, x), FUSION_PATTERNS)
    assert report.matches == ()
    assert (guard, reason) in [(miss.guard, miss.reason) for miss in report.refusals]


def test_a_computed_slope_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    linear = graph.call_module("linear", (x,))
    graph.output(graph.call_function(F.leaky_relu, (linear, x)))
    root = nn.Module()
    root.linear = nn.Linear(2, 2)
    (refusal,) = match_all(fx.GraphModule(root, graph), FUSION_PATTERNS).refusals
    assert refusal.reason == (
        "the argument negative_slope of 'leaky_relu' is the tensor or value of 'x', not a number"
    )


REFUSED_NORMS: dict[str, tuple[nn.Module, bool, str]] = {
    "training": (nn.BatchNorm2d(2), True, "evaluation_mode"),
    "no statistics": (
        nn.BatchNorm2d(2, track_running_stats=False),
        False,
        "has_running_statistics",
    ),
}


@pytest.mark.parametrize(
    ("norm", "training", "guard"), REFUSED_NORMS.values(), ids=REFUSED_NORMS.keys()
)
def test_a_batch_norm_with_batch_statistics_is_no_op_to_fuse(
    trace: Trace, norm: nn.Module, training: bool, guard: str
) -> None:
    gm = trace(Chain(norm, F.relu), torch.ones(2, 2, 4, 4), training=training)
    (refusal,) = match_all(gm, FUSION_PATTERNS).refusals
    assert refusal.guard == guard


def test_without_shapes_all_but_residuals_fuse(trace: Trace) -> None:
    gm = trace(Two(lambda x, y: F.relu(torch.cat([F.relu(x + y), F.relu6(x * y)]))))
    found = [match.pattern.name for match in match_all(gm, FUSION_PATTERNS).matches]
    assert found == ["add-relu", "mul-relu6", "cat-relu"]
