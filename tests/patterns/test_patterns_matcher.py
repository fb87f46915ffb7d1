"""Structure, preference, claims, nearest misses, determinism, linear work, users' own patterns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant.patterns.matcher
from fxquant.errors import ConfigError
from fxquant.patterns.guards import single_user
from fxquant.patterns.library import FOLD_PATTERNS, FUSION_PATTERNS, pattern_named
from fxquant.patterns.match import Match, Reason, because
from fxquant.patterns.matcher import MatchReport, match_all
from fxquant.patterns.pattern import Pattern, chain, guard, step

Trace = Callable[..., fx.GraphModule]


class Function(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def described(report: MatchReport) -> list[str]:
    return [str(match) for match in report.matches]


# -- which of several candidates ------------------------------------------------------------------


class TwoBranches(nn.Module):
    """Either convolution could take the addition."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.Conv2d(2, 2, 1)
        self.swap = swap

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x), self.b(x)
        return F.relu(second + first if self.swap else first + second)


@pytest.mark.parametrize("swap", [False, True])
def test_the_later_convolution_takes_the_addition(trace: Trace, swap: bool) -> None:
    report = match_all(trace(TwoBranches(swap), torch.ones(1, 2, 2, 2)), FUSION_PATTERNS)
    assert described(report) == ["conv2d-add-relu(b, add, relu)"]
    assert report.matches[0].other.name == "a"
    (miss,) = report.refusals
    assert (miss.anchor, miss.guard, miss.depth) == ("a", "claimed", 3)
    assert miss.bound == ("a", "add", "relu")
    assert miss.culprits == ("add", "relu")
    assert miss.reason == (
        "the match of 'conv2d-add-relu' that begins at 'b' has already taken 'add' and 'relu'"
    )
    assert report.nearest_miss("a") is miss
    assert report.nearest_miss("b") is None


def test_the_loser_takes_what_is_left(trace: Trace) -> None:
    """Both branches have a ReLU of their own: the addition takes none of them."""
    add_relu = pattern_named("conv2d-add-relu")
    short = Pattern("short", chain(step("conv", "conv2d")), source="a test")
    gm = trace(TwoBranches(False), torch.ones(1, 2, 2, 2))
    assert described(match_all(gm, [add_relu, short])) == [
        "short(a)",
        "conv2d-add-relu(b, add, relu)",
    ]


def relu_sigmoid_tanh(x: Tensor) -> Tensor:
    return torch.tanh(torch.sigmoid(torch.relu(x)))


def links(*kinds: str, name: str = "") -> Pattern:
    steps = chain(*(step(kind, kind) for kind in kinds))
    return Pattern(name or "-".join(kinds), steps, (single_user,), "a test")


def test_the_longest_match_wins_whatever_the_order(trace: Trace) -> None:
    gm = trace(Function(relu_sigmoid_tanh))
    short, long = links("relu", "sigmoid"), links("relu", "sigmoid", "tanh")
    for patterns in ([short, long], [long, short]):
        report = match_all(gm, patterns)
        assert described(report) == ["relu-sigmoid-tanh(relu, sigmoid, tanh)"]
        assert report.refusals == ()


def test_among_equals_the_pattern_given_earlier_wins(trace: Trace) -> None:
    gm = trace(Function(relu_sigmoid_tanh))
    first, second = links("relu", "sigmoid"), links("sigmoid", "tanh")
    assert described(match_all(gm, [first, second])) == ["relu-sigmoid(relu, sigmoid)"]
    report = match_all(gm, [second, first])
    assert described(report) == ["sigmoid-tanh(sigmoid, tanh)"]
    (miss,) = report.refusals
    assert (miss.anchor, miss.guard, miss.culprits) == ("relu", "claimed", ("sigmoid",))
    same = links("relu", "sigmoid", name="same")
    assert described(match_all(gm, [same, first])) == ["same(relu, sigmoid)"]


def test_a_chain_that_reaches_out_of_a_match_is_reported(trace: Trace) -> None:
    """sigmoid is inside a match, and still the pattern that begins there has a refusal."""
    gm = trace(Function(relu_sigmoid_tanh))
    report = match_all(gm, [links("relu", "sigmoid"), links("sigmoid", "tanh")])
    (miss,) = report.refusals
    assert (miss.anchor, miss.guard, miss.culprits) == ("sigmoid", "claimed", ("sigmoid",))


def test_a_chain_inside_a_match_is_not_reported(trace: Trace) -> None:
    gm = trace(Function(relu_sigmoid_tanh))
    report = match_all(gm, [links("relu", "sigmoid", "tanh"), links("sigmoid", "tanh")])
    assert described(report) == ["relu-sigmoid-tanh(relu, sigmoid, tanh)"]
    assert report.refusals == ()


# -- structure ------------------------------------------------------------------------------------


def test_the_first_complete_chain_among_several_users(trace: Trace) -> None:
    """Without the single-user guard a dead end does not hide the way beside it."""

    def run(x: Tensor) -> Tensor:
        y = torch.relu(x)
        dead, way, late = torch.sigmoid(y), torch.sigmoid(y), torch.sigmoid(y)
        return dead + torch.tanh(way) + torch.tanh(late)

    pattern = Pattern("own", links("relu", "sigmoid", "tanh").steps, source="a test")
    report = match_all(trace(Function(run)), [pattern])
    assert described(report) == ["own(relu, sigmoid_1, tanh)"]


def test_users_are_followed_in_graph_order_not_in_order_of_use() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.relu, (x,))
    late = graph.call_function(torch.sigmoid, (relu,))
    with graph.inserting_before(late):
        early = graph.call_function(torch.sigmoid, (relu,))
    graph.output((late, early))
    pattern = Pattern("own", links("relu", "sigmoid").steps, source="a test")
    (match,) = match_all(fx.GraphModule(nn.Module(), graph), [pattern]).matches
    assert match.last is early


def test_a_step_takes_only_activations(trace: Trace) -> None:
    class Weight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.relu(x))

    (miss,) = match_all(trace(Weight()), [links("relu", "linear")]).refusals
    assert miss.depth == 1
    assert miss.culprits == ("linear",)
    assert "something other than activations" in miss.reason


def test_arguments_that_do_not_bind_are_said() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.relu, (graph.placeholder("x"),), {"what": 1}))
    (miss,) = match_all(fx.GraphModule(nn.Module(), graph), [links("relu", "tanh")]).refusals
    assert (miss.depth, miss.bound, miss.culprits) == (0, (), ("relu",))
    assert miss.reason.endswith("or has arguments that fxquant does not know")


def test_an_op_without_users_is_said() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.relu, (x,))
    graph.output(x)
    (miss,) = match_all(fx.GraphModule(nn.Module(), graph), [links("relu", "tanh")]).refusals
    assert miss.reason == "nothing uses the output of 'relu'; what may follow is tanh"
    assert miss.culprits == ()


def test_a_step_may_be_one_of_several_kinds(trace: Trace) -> None:
    pattern = Pattern("any", chain(step("a", "relu", "tanh"), step("b", "sigmoid")), source="test")
    gm = trace(Function(lambda x: torch.sigmoid(torch.tanh(x)) + torch.sigmoid(torch.relu(x))))
    assert described(match_all(gm, [pattern])) == ["any(tanh, sigmoid)", "any(relu, sigmoid_1)"]


def test_two_patterns_of_one_name_are_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="two patterns are named 'x'"):
        match_all(trace(Function(torch.relu)), [links("relu", name="x"), links("tanh", name="x")])


def test_no_pattern_no_match(trace: Trace) -> None:
    report = match_all(trace(Function(torch.relu)), [])
    assert report.matches == ()
    assert report.refusals == ()


def test_the_graph_is_not_changed(trace: Trace) -> None:
    gm = trace(TwoBranches(False), torch.ones(1, 2, 2, 2))
    before = str(gm.graph), [dict(node.meta) for node in gm.graph.nodes]
    match_all(gm, (*FOLD_PATTERNS, *FUSION_PATTERNS))
    assert (str(gm.graph), [dict(node.meta) for node in gm.graph.nodes]) == before


# -- users' own patterns --------------------------------------------------------------------------


def test_a_pattern_and_a_guard_of_a_user(trace: Trace) -> None:
    @guard
    def same_channels(match: Match) -> Reason | None:
        weight = match.op("conv").constant("weight")
        if weight is not None and weight.shape[0] == weight.shape[1]:
            return None
        return because("{node!r} changes the channels", match.first.name, node=match.first.name)

    own = Pattern(
        "conv2d-mul-add",
        chain(
            step("conv", "conv2d"),
            step("mul", "mul", other="gate"),
            step("add", "add", other="skip"),
        ),
        guards=(single_user, same_channels),
        source="a user",
    )

    class Gated(nn.Module):
        def __init__(self, out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, out, 1)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            out: Tensor = x + gate * self.conv(x)
            return out

    (match,) = match_all(trace(Gated(2)), [own]).matches
    assert (match.gate.name, match.skip.name) == ("gate", "x")
    (miss,) = match_all(trace(Gated(3)), [own]).refusals
    assert (miss.guard, miss.reason) == ("same_channels", "'conv' changes the channels")


def test_a_number_is_bound_as_the_other_operand(trace: Trace) -> None:
    own = Pattern(
        "relu-mul", chain(step("relu", "relu"), step("mul", "mul", other="factor")), source="test"
    )
    (match,) = match_all(trace(Function(lambda x: 3 * torch.relu(x))), [own]).matches
    assert match.factor == 3


# -- nearest misses -------------------------------------------------------------------------------


def nearest(trace: Trace, run: Callable[[Tensor], Tensor], *patterns: Pattern) -> str:
    miss = match_all(trace(Function(run)), patterns).nearest_miss("relu")
    assert miss is not None
    return miss.pattern.name


def test_the_deeper_of_two_structures_is_nearest(trace: Trace) -> None:
    deep, shallow = links("relu", "sigmoid", "silu"), links("relu", "silu")
    for patterns in ((deep, shallow), (shallow, deep)):
        assert nearest(trace, relu_sigmoid_tanh, *patterns) == "relu-sigmoid-silu"


def test_a_guard_is_nearer_than_structure(trace: Trace) -> None:
    @guard
    def never(match: Match) -> Reason | None:
        return because("no")

    guarded = Pattern("guarded", chain(step("relu", "relu")), (never,), "a test")
    deep = links("relu", "sigmoid", "silu")
    for patterns in ((guarded, deep), (deep, guarded)):
        assert nearest(trace, relu_sigmoid_tanh, *patterns) == "guarded"


def test_the_earlier_of_equal_misses_is_nearest(trace: Trace) -> None:
    one, two = links("relu", "silu"), links("relu", "mul")
    assert nearest(trace, relu_sigmoid_tanh, one, two) == "relu-silu"
    assert nearest(trace, relu_sigmoid_tanh, two, one) == "relu-mul"


def test_a_structure_miss_names_all_that_may_follow(trace: Trace) -> None:
    patterns = [links("relu", "silu"), links("relu", "mul"), links("relu", "sigmoid", "mul")]
    report = match_all(trace(Function(lambda x: torch.relu(x).abs())), patterns)
    assert report.refusals[0].reason == (
        "the output of 'relu' goes to 'abs_1'; what may follow is mul, sigmoid, silu"
    )


def test_what_may_follow_depends_on_the_whole_chain_before(trace: Trace) -> None:
    patterns = [links("relu", "sigmoid", "mul"), links("relu", "tanh", "silu")]
    report = match_all(trace(Function(lambda x: torch.sigmoid(torch.relu(x)).abs())), patterns)
    assert report.refusals[0].reason == (
        "the output of 'sigmoid' goes to 'abs_1'; what may follow is mul"
    )


def test_a_later_node_of_a_refused_chain_has_the_answer_too(trace: Trace) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.bn(y) + y
            return out

    gm = trace(Model())
    nodes = {node.name: node for node in gm.graph.nodes}
    report = match_all(gm, FOLD_PATTERNS)
    assert report.nearest_miss(nodes["bn"]) is report.nearest_miss("conv") is report.refusals[0]
    assert report.nearest_miss("add") is None
    assert report.match_of("conv") is None


def test_match_of_every_node_of_a_match(trace: Trace) -> None:
    gm = trace(TwoBranches(False), torch.ones(1, 2, 2, 2))
    report = match_all(gm, FUSION_PATTERNS)
    (match,) = report.matches
    assert all(report.match_of(node) is match for node in match.nodes)
    assert report.match_of("a") is None


def test_a_longer_chain_that_a_guard_refused_is_told_beside_the_match(trace: Trace) -> None:
    @guard
    def never(match: Match) -> Reason | None:
        return because("no, {last!r}", last=match.last.name)

    long = Pattern("long", links("relu", "sigmoid", "tanh").steps, (never,), "a test")
    patterns = [long, links("relu", "sigmoid"), links("relu")]
    report = match_all(trace(Function(relu_sigmoid_tanh)), patterns)
    assert described(report) == ["relu-sigmoid(relu, sigmoid)"]
    (miss,) = report.refusals
    assert miss.reason == "no, 'tanh'"
    assert report.nearest_miss("relu") is miss


def branches(x: Tensor) -> Tensor:
    y = torch.relu(x)
    return torch.sigmoid(y) + torch.tanh(y)


def test_a_second_branch_from_one_anchor_is_refused(trace: Trace) -> None:
    """Without the single-user guard both would match, and they have the anchor in common."""
    patterns = [
        Pattern(f"to-{k}", links("relu", k).steps, (), "a test") for k in ("sigmoid", "tanh")
    ]
    report = match_all(trace(Function(branches)), patterns)
    assert described(report) == ["to-sigmoid(relu, sigmoid)"]
    (miss,) = report.refusals
    assert (miss.pattern.name, miss.guard, miss.culprits) == ("to-tanh", "claimed", ("relu",))


def test_a_longer_structure_that_does_not_fit_is_not_told_beside_a_match(trace: Trace) -> None:
    fitting = Pattern("fits", links("relu", "sigmoid").steps, (), "a test")
    report = match_all(trace(Function(branches)), [links("relu", "tanh", "silu"), fitting])
    assert described(report) == ["fits(relu, sigmoid)"]
    assert report.refusals == ()


def test_what_another_match_took_is_nearer_than_a_longer_chain_a_guard_refused(
    trace: Trace,
) -> None:
    @guard
    def never(match: Match) -> Reason | None:
        return because("no")

    long = Pattern("long", links("relu", "sigmoid", "tanh").steps, (never,), "a test")
    patterns = [links("sigmoid", "tanh"), long, links("relu", "sigmoid")]
    miss = match_all(trace(Function(relu_sigmoid_tanh)), patterns).nearest_miss("relu")
    assert miss is not None
    assert (miss.pattern.name, miss.guard) == ("relu-sigmoid", "claimed")


def test_a_chain_between_two_matches_is_refused(trace: Trace) -> None:
    """All its nodes are taken, by two."""
    gm = trace(Function(lambda x: torch.abs(F.silu(relu_sigmoid_tanh(x)))))
    patterns = [links("relu", "sigmoid"), links("tanh", "silu"), links("sigmoid", "tanh")]
    report = match_all(gm, patterns)
    assert len(report.matches) == 2
    (miss,) = report.refusals
    assert miss.culprits == ("sigmoid", "tanh")


# -- determinism and work -------------------------------------------------------------------------


def test_two_runs_say_the_same(trace: Trace) -> None:
    gm = trace(TwoBranches(True), torch.ones(1, 2, 2, 2))
    reports = [match_all(gm, FUSION_PATTERNS) for _ in range(2)]
    texts = [(described(r), [str(miss) for miss in r.refusals], r.visits) for r in reports]
    assert texts[0] == texts[1]


def blocks(size: int) -> fx.GraphModule:
    """``relu(bn(conv(x)))`` again and again, each block with modules of its own."""
    layers: list[nn.Module] = []
    while len(layers) < size:
        layers += [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()]
    return fx.symbolic_trace(nn.Sequential(*layers).eval())


def one_module(size: int) -> fx.GraphModule:
    """One convolution called again and again, each call with a batch-norm."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)
            self.bn = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(size // 2):
                x = self.bn(self.conv(x))
            return x

    return fx.symbolic_trace(Shared().eval())


def accumulation(size: int) -> fx.GraphModule:
    """``x += conv(x)``: one memory written from end to end."""

    class Accumulation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            for _ in range(size // 3):
                x += self.conv(x)
                x = torch.relu_(x)
            return x

    return fx.symbolic_trace(Accumulation().eval())


def fan_out(size: int) -> fx.GraphModule:
    """One convolution with very many users."""

    class FanOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.conv(x)
            return [torch.relu(y) for _ in range(size)]

    return fx.symbolic_trace(FanOut().eval())


def fan_in(size: int) -> fx.GraphModule:
    """Very many convolutions that meet in one concatenation."""

    class FanIn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.cat([self.conv(x) for _ in range(size)]))

    return fx.symbolic_trace(FanIn().eval())


def work(gm: fx.GraphModule) -> tuple[int, int]:
    """Node visits, and calls made by code of fxquant.patterns (of Python and of C)."""
    calls = 0
    folder = str(Path(fxquant.patterns.matcher.__file__).resolve().parent)
    known: dict[str, bool] = {}

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            name = frame.f_code.co_filename
            if name not in known:
                known[name] = str(Path(name).resolve()).startswith(folder)
            calls += known[name]

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        report = match_all(gm, (*FOLD_PATTERNS, *FUSION_PATTERNS))
    finally:
        sys.setprofile(before)
    return report.visits, calls


@pytest.mark.parametrize("family", [blocks, one_module, accumulation, fan_out, fan_in])
def test_work_is_linear_in_the_size_of_the_graph(family: Callable[[int], fx.GraphModule]) -> None:
    """Ten times the nodes cost ten times the visits and calls, up to the constant part."""
    visits, calls = work(family(1_000))
    more_visits, more_calls = work(family(10_000))
    assert visits >= 1_000
    assert more_visits <= 10.1 * visits
    assert more_calls <= 10.5 * calls
