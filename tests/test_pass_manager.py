"""pass_manager: no pass is believed; those here lie or break the graph, and are caught by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.capture import capture
from fxquant.errors import Diagnostics, FxQuantError, GraphError, PassContractError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.pass_manager import (
    Fact,
    Pass,
    PassContext,
    PassResult,
    Pipeline,
    Refusal,
    fingerprint,
    run_pass,
)
from fxquant.passes.annotate import Annotate
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.fuse_patterns import FusePatterns
from fxquant.passes.insert_observers import InsertObservers
from fxquant.pipelines import fuse_pipeline, lowering_pipeline, prepare_pipeline, reference_pipeline
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from fxquant.rewriter import GraphRewriter
from fxquant.shapes import record_shapes
from fxquant.targets.registry import target_named

X = torch.randn(2, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.fc(x)))


@pytest.fixture
def gm() -> QuantGraphModule:
    made = capture(Net().eval(), Diagnostics(), (X,))
    record_shapes(made, (X,), Diagnostics())
    return made


CONTEXT = PassContext(target=target_named("x86"))


@dataclass(frozen=True)
class Does(Pass):
    """Does something, and claims something."""

    action: Callable[[QuantGraphModule], Any]
    claims: int = 1

    name: ClassVar[str] = "does"

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        self.action(gm)
        return PassResult(changes=self.claims)


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


# -- passes that lie ------------------------------------------------------------------------------


def nothing(gm: QuantGraphModule) -> None: ...


def test_claiming_changes_that_are_none(gm: QuantGraphModule) -> None:
    with pytest.raises(
        PassContractError, match=r"pass 'does' says that it made 3 change\(s\), but"
    ):
        run_pass(Does(nothing, 3), gm, CONTEXT)


def renames_node(gm: QuantGraphModule) -> None:
    node(gm, "fc")._rename("other")


def retargets(gm: QuantGraphModule) -> None:
    node(gm, "relu").op = "call_function"
    node(gm, "relu").target = torch.relu


def rewires(gm: QuantGraphModule) -> None:
    node(gm, "relu").args = (node(gm, "fc"),)


def adds_keyword(gm: QuantGraphModule) -> None:
    node(gm, "relu").kwargs = {"unused": None}


def adds_reason(gm: QuantGraphModule) -> None:
    add_reason(node(gm, "fc"), "because")


def sets_qconfig(gm: QuantGraphModule) -> None:
    update_record(node(gm, "fc"), qconfig=QConfig(None, None))


def writes_parameter(gm: QuantGraphModule) -> None:
    with torch.no_grad():
        gm.get_parameter("fc.weight").mul_(2)


def replaces_parameter(gm: QuantGraphModule) -> None:
    gm.get_submodule("fc").weight = nn.Parameter(torch.zeros(3, 3))


def writes_buffer(gm: QuantGraphModule) -> None:
    gm.get_buffer("norm.running_mean").add_(1)


def clears_flag(gm: QuantGraphModule) -> None:
    gm.get_submodule("relu").inplace = True


def trains(gm: QuantGraphModule) -> None:
    gm.get_submodule("norm").train()


def tells_fate(gm: QuantGraphModule) -> None:
    gm.add_fates({"fc": "gone"})


SILENT = [
    renames_node,
    retargets,
    rewires,
    adds_keyword,
    adds_reason,
    sets_qconfig,
    writes_parameter,
    replaces_parameter,
    writes_buffer,
    clears_flag,
    trains,
    tells_fate,
]


@pytest.mark.parametrize("action", SILENT, ids=lambda f: f.__name__)
def test_changing_in_silence(
    gm: QuantGraphModule, action: Callable[[QuantGraphModule], None]
) -> None:
    with pytest.raises(PassContractError, match="pass 'does' says that it changed nothing, but"):
        run_pass(Does(action, 0), gm, CONTEXT)


def test_a_contract_error_is_a_graph_error_and_an_assertion() -> None:
    assert issubclass(PassContractError, GraphError)
    assert issubclass(GraphError, AssertionError)
    assert issubclass(GraphError, FxQuantError)


def test_an_honest_pass(gm: QuantGraphModule) -> None:
    assert run_pass(Does(adds_reason, 1), gm, CONTEXT) == PassResult(changes=1)
    assert run_pass(Does(nothing, 0), gm, CONTEXT) == PassResult(changes=0)


def test_without_checks_liars_go_free(gm: QuantGraphModule) -> None:
    assert run_pass(Does(adds_reason, 0), gm, CONTEXT, check=False).changes == 0


def test_the_fingerprint_sees_no_difference_where_there_is_none(gm: QuantGraphModule) -> None:
    before = fingerprint(gm)
    gm(X)
    gm.recompile()
    gm.graph.lint()
    assert fingerprint(gm) == before


# -- passes that break the graph ------------------------------------------------------------------


def _quantize(gm: QuantGraphModule, scale: float, *, dequantize: bool) -> None:
    rewriter = GraphRewriter(gm, "does")
    relu = node(gm, "relu")
    value = relu.all_input_nodes[0]
    rewriter.new_buffer("scale", torch.tensor(scale))
    rewriter.new_buffer("zero", torch.tensor(0, dtype=torch.int32))
    made = [rewriter.get_attr(name, before=relu) for name in ("scale", "zero")]
    last = rewriter.call(
        QUANTIZE, (value, *made, 0, 255, torch.uint8), before=relu, like=value, dtype=torch.uint8
    )
    if dequantize:
        last = rewriter.call(DEQUANTIZE, (last, *made), before=relu, like=value)
    rewriter.replace_argument(relu, value, last)
    rewriter.finish()


def dangles(gm: QuantGraphModule) -> None:
    _quantize(gm, 0.1, dequantize=False)


def zero_scale(gm: QuantGraphModule) -> None:
    _quantize(gm, 0.0, dequantize=True)


def dead_node(gm: QuantGraphModule) -> None:
    fc = node(gm, "fc")
    GraphRewriter(gm, "does").call(torch.neg, (fc,), like=fc, name="unread")


def renames_input(gm: QuantGraphModule) -> None:
    node(gm, "x").target = "image"


BREAKERS: dict[Callable[[QuantGraphModule], None], str] = {
    dangles: "dangles: relu read integers without a dequantize",
    zero_scale: "has scale 0.0; a scale must be finite and > 0",
    dead_node: "node 'unread' .* is dead: nobody reads it",
    renames_input: r"the inputs were \('x',\) and are now \('image',\)",
}


@pytest.mark.parametrize("action", BREAKERS, ids=lambda f: f.__name__)
def test_breaking_the_graph(
    gm: QuantGraphModule, action: Callable[[QuantGraphModule], None]
) -> None:
    with pytest.raises(GraphError, match=f"^after pass 'does': .*{BREAKERS[action]}"):
        run_pass(Does(action), gm, CONTEXT)


def test_a_pipeline_names_the_pass_that_broke_it(gm: QuantGraphModule) -> None:
    pipeline = Pipeline("p", (Does(adds_reason), Breaks(), Does(nothing, 0)))
    with pytest.raises(GraphError, match=r"^after pass 'breaks': "):
        pipeline.run(gm, CONTEXT)


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "breaks"

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        zero_scale(gm)
        return PassResult(changes=1)


# -- order ----------------------------------------------------------------------------------------


def test_a_pass_out_of_order() -> None:
    with pytest.raises(PassContractError) as caught:
        Pipeline("mine", (Annotate(), FoldBatchNorm(), FusePatterns(), InsertObservers()))
    assert str(caught.value) == (
        "pipeline 'mine' is out of order: "
        "annotate needs FUSED (fused patterns are marked); "
        "annotate needs QCONFIGS (every op has its qconfig); "
        "fold-batch-norm needs FUNCTIONAL (no op writes its input in place); "
        "fold-batch-norm needs NO_IDENTITIES (ops that do nothing in evaluation are gone); "
        "fuse-patterns needs QCONFIGS (every op has its qconfig); "
        "insert-observers needs SHARED (tensors with common parameters are grouped)"
    )


def test_what_is_given_need_not_be_established() -> None:
    given = frozenset({Fact.FUNCTIONAL, Fact.NO_IDENTITIES})
    assert Pipeline("p", (FoldBatchNorm(),), given).passes == (FoldBatchNorm(),)


def test_the_pipelines_are_in_order_and_their_passes_have_unique_names() -> None:
    mapping = get_default_qconfig_mapping("x86")
    made = (
        fuse_pipeline(),
        prepare_pipeline(mapping, ()),
        reference_pipeline(),
        lowering_pipeline(),
    )
    for pipeline in made:
        names = [item.name for item in pipeline.passes]
        assert len(set(names)) == len(names)
        for item in pipeline.passes:
            assert item.name == item.name.lower()
            module = type(item).__module__.rpartition(".")[2]
            assert module.replace("_", "-") == item.name
            assert type(item).__name__.lower() == module.replace("_", "")


def test_results_by_name(gm: QuantGraphModule) -> None:
    results = fuse_pipeline().run(gm, CONTEXT)
    assert list(results) == ["fuse-listed", "functionalize", "remove-identities", "fold-batch-norm"]
    assert results["fold-batch-norm"].changes > 0
    assert results["functionalize"] == PassResult(changes=0)


@dataclass(frozen=True)
class Refuses(Pass):
    name: ClassVar[str] = "refuses"
    seen: list[Any] = field(default_factory=list)

    def run(self, gm: QuantGraphModule, context: PassContext) -> PassResult:
        self.seen.append(context)
        return PassResult(changes=0, refusals=(Refusal(node="fc", reason="so", culprits=("x",)),))


def test_the_context_and_the_refusals_go_through(gm: QuantGraphModule) -> None:
    refuses = Refuses()
    results = Pipeline("p", (refuses,)).run(gm, CONTEXT)
    assert results["refuses"].refusals == (Refusal(node="fc", reason="so", culprits=("x",)),)
    assert refuses.seen == [CONTEXT]


def test_an_error_of_a_pass_is_passed_on(gm: QuantGraphModule) -> None:
    def fails(gm: QuantGraphModule) -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        Pipeline("p", (Does(fails),)).run(gm, CONTEXT)
    assert record_of(node(gm, "fc")).reasons == ()
