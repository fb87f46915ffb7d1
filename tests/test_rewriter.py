"""rewriter: metadata goes along with every change, and what nobody reads any more goes away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.capture import capture
from fxquant.errors import Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import TensorRecord, add_reason, record_of, update_record
from fxquant.rewriter import GraphRewriter
from fxquant.shapes import record_shapes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) * self.scale
        return F.relu(y) + y


X = torch.randn(2, 3)


@pytest.fixture
def gm() -> QuantGraphModule:
    made = capture(Net().eval(), Diagnostics(), (X,))
    record_shapes(made, (X,), Diagnostics())
    return made


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def scaled(gm: QuantGraphModule) -> Tensor:
    """``y`` of :class:`Net`."""
    linear = gm.get_submodule("block.0")
    return torch.relu(linear(X)) * gm.scale


def test_a_call_inherits_trace_scope_and_value(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "a-pass")
    like = node(gm, "relu")
    update_record(like, scope="block", scope_types=(Net,))
    made = rewriter.call(
        torch.neg, (like,), after=like, like=like, name="negated", kernel="some::kernel"
    )
    record = record_of(made)
    assert made.name == "negated"
    assert made.prev is like
    assert made.stack_trace == like.stack_trace is not None
    assert (record.scope, record.scope_types) == ("block", (Net,))
    assert record.value == TensorRecord(shape=(2, 3), dtype=torch.float32)
    assert record.has_value
    assert (record.made_by, record.kernel) == ("a-pass", "some::kernel")
    assert record.origins == ()
    assert rewriter.changes == 1


def test_a_call_of_another_dtype(gm: QuantGraphModule) -> None:
    like = node(gm, "relu")
    made = GraphRewriter(gm, "p").call(torch.neg, (like,), before=like, like=like, dtype=torch.int8)
    assert record_of(made).value == TensorRecord(shape=(2, 3), dtype=torch.int8)
    assert made.next is like


def test_without_a_place_a_call_goes_behind_its_model(gm: QuantGraphModule) -> None:
    like = node(gm, "relu")
    assert GraphRewriter(gm, "p").call(torch.neg, (like,), like=like).prev is like


def test_module_call(gm: QuantGraphModule) -> None:
    gm.add_module("inner", nn.Sequential(nn.Tanh()))
    like = node(gm, "relu")
    rewriter = GraphRewriter(gm, "p")
    made = rewriter.module_call("inner.0", (like,), like=like)
    rewriter.replace_uses(like, made)
    assert made.args == (like,)  # the new reader itself is left out
    rewriter.finish()
    assert made.name == "inner_0"
    y = scaled(gm)
    assert torch.equal(gm(X), torch.tanh(torch.relu(y)) + y)


def test_get_attr_knows_its_value(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    path = rewriter.new_buffer("new.buffer", torch.ones(4, dtype=torch.int32))
    assert path == "new_buffer"
    made = rewriter.get_attr(path, before=node(gm, "relu"), like=node(gm, "relu"))
    record = record_of(made)
    assert record.value == TensorRecord(shape=(4,), dtype=torch.int32)
    assert record.has_value
    assert made.stack_trace is not None
    gm.update_state(shapes_known=False)
    assert not record_of(rewriter.get_attr(path, before=made)).has_value


def test_fresh_names(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    assert rewriter.fresh_name("block") == "block_1"
    assert rewriter.fresh_name("block.0") == "block_0"
    gm.register_buffer("block_1", torch.ones(1))
    assert rewriter.fresh_name("block") == "block_2"
    assert rewriter.fresh_path("block.0.weight") == "block.0.weight_1"
    assert rewriter.fresh_path("block.0.other") == "block.0.other"
    gm.get_submodule("block.0").bias = None
    assert rewriter.fresh_path("block.0.bias") == "block.0.bias"


def test_set_tensor(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    rewriter.set_tensor("block.0.weight", nn.Parameter(torch.zeros(3, 3)))
    rewriter.set_tensor("scale", torch.full((3,), 2.0))
    assert rewriter.finish() == 2
    assert "scale" in dict(gm.named_buffers())
    assert "scale" not in dict(gm.named_parameters())
    y = scaled(gm)
    torch.testing.assert_close(y, torch.relu(gm.get_parameter("block.0.bias")).expand(2, 3) * 2)
    torch.testing.assert_close(gm(X), torch.relu(y) + y)


def test_retarget_keeps_name_users_and_metadata_and_drops_the_module(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    wanted = gm(X)
    old = node(gm, "block_1")
    before, users = record_of(old), list(old.users)
    rewriter.retarget(old, torch.relu, old.args)
    assert (old.op, old.target) == ("call_function", torch.relu)
    assert (record_of(old), list(old.users)) == (replace(before, module="block.1"), users)
    assert rewriter.finish() == 1
    assert not hasattr(gm.block, "1")
    assert torch.equal(gm(X), wanted)


def test_of_a_module_that_is_read_in_parts_the_rest_goes() -> None:
    norm = nn.BatchNorm2d(3).eval()
    gm = capture(nn.Sequential(norm), Diagnostics(), (torch.zeros(2, 3, 4, 4),))
    x = torch.randn(2, 3, 4, 4)
    wanted = gm(x)
    rewriter = GraphRewriter(gm, "p")
    call = node(gm, "_0")
    parts = [
        rewriter.get_attr(f"0.{name}", before=call)
        for name in ("running_mean", "running_var", "weight", "bias")
    ]
    rewriter.retarget(call, nn.functional.batch_norm, (call.args[0], *parts))
    rewriter.finish()
    assert set(gm.state_dict()) == {"0.running_mean", "0.running_var", "0.weight", "0.bias"}
    assert torch.equal(gm(x), wanted)


def test_replace_argument(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    add, relu, mul = (node(gm, name) for name in ("add", "relu", "mul"))
    rewriter.replace_argument(add, mul, relu)
    assert add.args == (relu, relu)
    assert rewriter.changes == 1


def test_replace_uses_but_for_some(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    add, relu, mul, linear = (node(gm, name) for name in ("add", "relu", "mul", "block_1"))
    rewriter.replace_uses(mul, linear, keep=(relu,))
    assert relu.args == (mul,)
    assert add.args == (relu, linear)


def test_absorb_carries_origins_and_reasons(gm: QuantGraphModule) -> None:
    linear, relu = node(gm, "block_0"), node(gm, "block_1")
    add_reason(linear, "one")
    add_reason(relu, "one")
    add_reason(relu, "two")
    rewriter = GraphRewriter(gm, "p")
    rewriter.absorb(linear, relu)
    record = record_of(linear)
    assert record.origins == ("block_0", "block_1")
    assert record.reasons == ("one", "two")
    assert rewriter.finish() == 2
    assert "block_1" not in {n.name for n in gm.graph.nodes}
    assert "block.1" not in dict(gm.named_modules())


def test_erase_dead_follows_arguments(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    output = next(n for n in gm.graph.nodes if n.op == "output")
    rewriter.replace_argument(output, node(gm, "add"), node(gm, "x"))
    rewriter.erase_dead([node(gm, "add"), node(gm, "relu")])
    rewriter.finish()
    assert [n.name for n in gm.graph.nodes] == ["x", "output"]
    assert not gm.state_dict()
    assert gm(X) is X


def test_erase_dead_keeps_what_is_read(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "p")
    rewriter.erase_dead([node(gm, "relu"), node(gm, "x")])
    assert rewriter.finish() == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.holder = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.holder(x), self.holder.weight) + self.holder(x)


def test_a_module_or_tensor_that_is_still_read_is_kept() -> None:
    gm = capture(Tied(), Diagnostics(), (X,))
    rewriter = GraphRewriter(gm, "p")
    first = node(gm, "holder")
    rewriter.replace_uses(first, first.all_input_nodes[0])
    rewriter.erase(first)
    rewriter.finish()
    assert "holder.weight" in gm.state_dict()
    gm(X)
    read, linear = node(gm, "holder_weight"), node(gm, "linear")
    rewriter.replace_uses(linear, linear.all_input_nodes[0])
    rewriter.erase_dead([linear])
    rewriter.finish()
    assert read.name not in {n.name for n in gm.graph.nodes}
    assert "holder.weight" in gm.state_dict()  # the module is still called
    gm(X)


def test_nothing_done_is_no_recompilation(gm: QuantGraphModule) -> None:
    code = gm.forward
    assert GraphRewriter(gm, "p").finish() == 0
    assert gm.forward == code
