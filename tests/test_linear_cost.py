"""Prepare and convert do work in proportion to the graph, and no work twice.

Counted, not timed: function calls by the profiler, looks of the matcher, compilations.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant import compat
from fxquant.capture import capture
from fxquant.channel_mean import ChannelMean, channel_sums
from fxquant.errors import CaptureWarning, Diagnostics, GraphError
from fxquant.graph_module import QuantGraphModule
from fxquant.late_code import code_written_once
from fxquant.metadata import FusionRecord, fused_with, record_of, update_record
from fxquant.observers import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    default_per_channel_weight_observer,
)
from fxquant.op_view import submodule
from fxquant.patterns.library import FUSION_PATTERNS
from fxquant.patterns.matcher import MatchReport, match_all
from fxquant.qconfig import QConfig, spec_of
from fxquant.quantize_fx import convert_fx, prepare_fx
from fxquant.shape_rules import given_by_rule
from fxquant.shapes import record_shapes
from fxquant.specs import QuantSpec
from fxquant.weight_fit import KnownWeights

IMAGE = torch.rand(1, 4, 4, 4)
QCONFIG = QConfig(MinMaxObserver, default_per_channel_weight_observer)
SIMPLE = fxquant.QConfigMapping().set_global(QCONFIG)


class Block(nn.Module):
    """Ten operations: batch-norms to fold, a residual add to fuse, a concatenation to share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y = F.relu(y + x)
        return torch.cat([y[:, :2], y[:, 2:]], 1)


def chain(nodes: int) -> nn.Module:
    """About so many nodes in a row."""
    return nn.Sequential(*(Block() for _ in range(nodes // 10))).eval()


def calls_of(action: Callable[[], object]) -> int:
    """How many functions run, those in C included."""
    profile = cProfile.Profile()
    profile.runcall(action)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # typeshed lacks it


def converted(nodes: int, pair: Any = fxquant, mapping: Any = None) -> tuple[QuantGraphModule, int]:
    """The int8 model, and the calls that prepare and convert took; calibration is not counted."""
    model, made = chain(nodes), []
    calls = calls_of(lambda: made.append(pair.prepare_fx(model, mapping, (IMAGE,))))
    made[0](IMAGE)
    calls += calls_of(lambda: made.append(pair.convert_fx(made[0])))
    return made[1], calls


# -- in proportion to the graph -------------------------------------------------------------------


def test_matching_looks_at_ten_thousand_nodes_as_often_as_at_one_ten_times() -> None:
    graphs = {nodes: fx.symbolic_trace(chain(nodes)) for nodes in (1_000, 2_000, 10_000)}
    match_all(graphs[1_000], FUSION_PATTERNS)  # what is cached once is not the graphs'
    found = {}
    for nodes, gm in graphs.items():
        reports: list[MatchReport] = []
        calls = calls_of(lambda g=gm, r=reports: r.append(match_all(g, FUSION_PATTERNS)))
        found[nodes] = calls, reports[0].visits
        assert len(reports[0].matches) == nodes // 10 * 2
    for nodes, (calls, visits) in found.items():
        assert visits == pytest.approx(found[1_000][1] * nodes / 1_000, rel=0.01)
        assert calls == pytest.approx(found[1_000][0] * nodes / 1_000, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*slower in int8 than in FP32")
@pytest.mark.parametrize("pair", [fxquant, compat], ids=["x86", "compat"])
def test_prepare_and_convert_call_twice_as_much_for_twice_the_graph(pair: Any) -> None:
    converted(50, pair, SIMPLE)  # what is cached once is not the graphs'
    calls = {nodes: converted(nodes, pair, SIMPLE)[1] for nodes in (100, 200, 400)}
    assert (calls[400] - calls[200]) / (calls[200] - calls[100]) == pytest.approx(2.0, rel=0.02)


@pytest.mark.slow
def test_ten_thousand_nodes_become_int8() -> None:
    converted(50)
    _, calls = converted(1_000)
    int8, many = converted(10_000)
    assert many == pytest.approx(10 * calls, rel=0.03)
    report = fxquant.audit(int8)
    assert report.coverage == 1.0
    assert int8(IMAGE).shape == IMAGE.shape


# -- nothing twice --------------------------------------------------------------------------------


def _counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    seen: list[Any] = []
    original = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return seen


def test_code_is_written_once_for_each_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(20)
    written = _counted(monkeypatch, fx.GraphModule, "recompile")
    prepared = prepare_fx(model, None, (IMAGE,))
    assert [gm for (gm,) in written if gm is prepared] == [prepared]
    prepared(IMAGE)
    written.clear()
    int8 = convert_fx(prepared)
    assert [gm for (gm,) in written] == [int8]
    assert "conv1" in prepared.code
    assert "packed" in int8.code


def test_code_is_written_before_a_call_and_at_the_end() -> None:
    gm = capture(nn.Sequential(nn.ReLU()).eval(), Diagnostics())
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    with code_written_once():
        node.op, node.target = "call_function", torch.neg
        gm.recompile()
        assert torch.equal(gm(IMAGE), -IMAGE)
        node.target = torch.abs
        gm.recompile()
        with code_written_once():
            gm.recompile()
        assert "torch.abs" in gm.code
        node.target = torch.exp
        gm.recompile()
    assert "torch.exp" in gm.code
    assert torch.equal(gm(IMAGE), IMAGE.exp())


@code_written_once()
def _stop_after_a_change(gm: QuantGraphModule) -> None:
    gm.recompile()
    raise GraphError("stop")


def test_after_an_error_code_is_written_when_it_is_needed() -> None:
    gm = capture(nn.Sequential(nn.ReLU()).eval(), Diagnostics())
    with pytest.raises(GraphError):
        _stop_after_a_change(gm)
    assert gc.isenabled()
    assert torch.equal(gm(-IMAGE), torch.zeros_like(IMAGE))


def test_garbage_is_collected_again_behind_prepare_and_not_where_it_never_was() -> None:
    prepare_fx(chain(10), None, (IMAGE,))
    assert gc.isenabled()
    gc.disable()
    try:
        prepare_fx(chain(10), None, (IMAGE,))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_weight_is_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_fx(chain(20), SIMPLE, (IMAGE,))
    prepared(IMAGE)
    seen = _counted(monkeypatch, PerChannelMinMaxObserver, "forward")
    convert_fx(prepared)
    assert len(seen) == 4


def test_a_weight_that_was_written_is_looked_at_again() -> None:
    weight, known = torch.rand(4, 3), KnownWeights()
    qconfig = QCONFIG
    factory = spec_of(qconfig.weight)
    assert factory is not None
    assert isinstance(factory.spec, QuantSpec)

    def qparams() -> Any:
        return known.qparams(weight, factory.spec, qconfig, "w", weight)

    first = qparams()
    assert qparams() is first
    assert known.integers(weight, first, weight) is known.integers(weight, first, weight)
    weight.mul_(2)
    torch.testing.assert_close(qparams().scale, 2 * first.scale)
    other = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8))
    wanted = spec_of(other.weight)
    assert wanted is not None
    assert wanted.spec is not None
    assert known.qparams(weight, wanted.spec, other, "w", weight).scale.dim() == 0


class Counting(MinMaxObserver):
    """Counts how many there are."""

    made: ClassVar[Counter[str]] = Counter()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.made["observers"] += 1


def test_a_factory_is_read_once_unless_it_may_make_something_else() -> None:
    Counting.made.clear()
    constant = Counting.with_args(quant_min=0, quant_max=127)
    for _ in range(3):
        factory = spec_of(constant)
        assert factory is not None
        assert factory.spec is not None
        assert factory.spec.quant_max == 127
    assert Counting.made["observers"] == 1
    highs = iter((127, 255))
    variable = Counting.with_args(quant_min=0).with_callable_args(quant_max=lambda: next(highs))
    for high in (127, 255):
        factory = spec_of(variable)
        assert factory is not None
        assert factory.spec is not None
        assert factory.spec.quant_max == high
    assert Counting.made["observers"] == 3


# -- shortcuts give what the long way gives -------------------------------------------------------

RULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), (2, 4, 9, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    "linear": (nn.Linear(5, 7), (2, 3, 5)),
    "linear, one row": (nn.Linear(5, 7, bias=False), (5,)),
    "batch_norm1d": (nn.BatchNorm1d(4), (2, 4, 5)),
    "batch_norm2d": (nn.BatchNorm2d(4, affine=False), (2, 4, 5, 6)),
    "batch_norm3d": (nn.BatchNorm3d(4), (2, 4, 5, 6, 7)),
    "layer_norm": (nn.LayerNorm((5, 6)), (2, 5, 6)),
    "relu": (nn.ReLU(inplace=True), (3, 4)),
    "dropout": (nn.Dropout(), (3, 4)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_give_the_shape_of_the_run(name: str) -> None:
    module, shape = RULES[name]
    x = torch.rand(shape)
    made, wanted = given_by_rule(module.eval(), (x,), {}), module(x)
    assert (made.shape, made.dtype, made.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


MISFITS: dict[str, tuple[nn.Module, Tensor]] = {
    "channels": (nn.Conv2d(4, 4, 1), torch.rand(1, 3, 4, 4)),
    "too small": (nn.Conv2d(4, 4, 5), torch.rand(1, 4, 4, 4)),
    "features": (nn.Linear(4, 4), torch.rand(2, 3)),
    "rank": (nn.BatchNorm2d(4), torch.rand(2, 4)),
    "normalized shape": (nn.LayerNorm(4), torch.rand(2, 3)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_run_and_told(name: str) -> None:
    module, x = MISFITS[name]
    assert given_by_rule(module, (x,), {}) is None
    gm = capture(nn.Sequential(module).eval(), Diagnostics())
    with pytest.warns(CaptureWarning, match="do not run on the model at node '_0'"):
        assert not record_shapes(gm, (x,), Diagnostics())


def test_rules_leave_alone_what_may_give_something_else() -> None:
    hooked, patched = nn.ReLU(), nn.ReLU()
    hooked.register_forward_hook(lambda *_: torch.zeros(1))
    patched.forward = lambda x: x[:1]  # type: ignore[method-assign]  # on purpose
    assert given_by_rule(nn.Conv2d(4, 4, 1), (IMAGE.double(),), {}) is None
    for module in (hooked, patched, nn.Conv2d(4, 4, 1, padding="same"), nn.PReLU()):
        assert given_by_rule(module, (IMAGE,), {}) is None
    assert given_by_rule(nn.ReLU(), (IMAGE.to(memory_format=torch.channels_last),), {}) is None


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (4, 5)), ((2, 1, 3, 4), (2, 5, 4, 3))],
    ids=str,
)
def test_products_of_matrices_have_the_shape_of_the_run(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.matmul(x, y)

    gm = capture(Product(), Diagnostics())
    inputs = torch.rand(left), torch.rand(right)
    assert record_shapes(gm, inputs, Diagnostics())
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    value: Any = record_of(node).value
    assert value.shape == tuple(torch.matmul(*inputs).shape)


LAYOUTS: dict[str, tuple[Tensor, int]] = {
    "images": (torch.randn(3, 5, 200, 300), -3),
    "images, channels last": (
        torch.randn(3, 5, 200, 300).to(memory_format=torch.channels_last),
        -3,
    ),
    "one image": (torch.randn(5, 20, 30), -3),
    "every second column": (torch.randn(3, 5, 20, 30)[..., ::2], -3),
    "sequence": (torch.randn(3, 700, 300), -1),
    "signal": (torch.randn(3, 5, 70), -2),
    "rows": (torch.randn(4000, 70), -1),
    "one row": (torch.randn(70), -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_of_channels_are_those_of_float64(name: str) -> None:
    x, axis = LAYOUTS[name]
    values = x.movedim(axis, -1)
    wanted = values.to(torch.float64).reshape(-1, values.shape[-1]).sum(0)
    # Both add up n numbers in float64: they differ by n * 2**-53 of the sum of magnitudes at most.
    count = values.numel() // values.shape[-1]
    bound = values.abs().to(torch.float64).reshape(-1, values.shape[-1]).sum(0) * count * 2.0**-52
    assert bool(((channel_sums(values) - wanted).abs() <= bound).all())
    watcher = ChannelMean(axis)
    watcher(x)
    watcher(x)
    assert watcher.mean is not None
    assert bool(((watcher.mean * count - wanted).abs() <= 4 * bound).all())


def test_members_of_a_pattern_are_found_from_each_of_them() -> None:
    gm = capture(Block().eval(), Diagnostics())
    names = ("conv2", "norm2", "add", "relu_1")
    nodes = {node.name: node for node in gm.graph.nodes}
    for name in names:
        update_record(
            nodes[name],
            fusion=FusionRecord(pattern="p", group=7, role="r", first="conv2", last="relu_1"),
        )
    for name in names:
        assert [node.name for node in fused_with(nodes[name])] == list(names)
    assert fused_with(nodes["conv1"]) == [nodes["conv1"]]


def test_modules_are_found_by_path() -> None:
    model = chain(20)
    assert submodule(model, "1.conv2") is model.get_submodule("1.conv2")
    for path in ("1.conv3", "2", "1.conv2.weight"):
        with pytest.raises(AttributeError):
            submodule(model, path)
