"""verify: every invariant between passes, broken once, is named with pass, node and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.capture import capture
from fxquant.errors import Diagnostics, GraphError
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import TensorRecord, record_of, update_record
from fxquant.operators import DEQUANTIZE, QUANTIZE
from fxquant.rewriter import GraphRewriter
from fxquant.shapes import record_shapes
from fxquant.verify import verify

X = torch.randn(2, 3)


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + x.shape[0]


def quantized(
    *,
    scale: Any = 0.1,
    zero_point: Any = 3,
    low: int = 0,
    high: int = 255,
    dtype: torch.dtype = torch.uint8,
    axis: int | None = None,
) -> QuantGraphModule:
    """``relu`` of an input that is quantized and dequantized."""
    gm = capture(Reads(), Diagnostics(), (X,))
    record_shapes(gm, (X,), Diagnostics())
    rewriter = GraphRewriter(gm, "test")
    relu = next(n for n in gm.graph.nodes if n.name == "relu")
    source = relu.all_input_nodes[0]
    rewriter.new_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
    rewriter.new_buffer("zero", torch.as_tensor(zero_point, dtype=torch.int32))
    made = [rewriter.get_attr(name, before=relu) for name in ("scale", "zero")]
    extra = () if axis is None else (axis,)
    q = rewriter.call(
        QUANTIZE,
        (source, *made, low, high, dtype, *extra),
        before=relu,
        like=source,
        name="q",
        dtype=dtype,
    )
    dq = rewriter.call(DEQUANTIZE, (q, *made, *extra), before=relu, like=source, name="dq")
    rewriter.replace_argument(relu, source, dq)
    rewriter.finish()
    return gm


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def problems(gm: QuantGraphModule) -> str:
    with pytest.raises(GraphError) as caught:
        verify(gm, made_by="some-pass")
    assert isinstance(caught.value, AssertionError)
    text = str(caught.value)
    assert text.startswith("after pass 'some-pass': ")
    return text


def test_a_right_graph_passes() -> None:
    verify(quantized(), made_by="some-pass")
    verify(quantized(scale=[0.1, 0.2], zero_point=[0, 255], axis=0), made_by="some-pass")


PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "zero scale": ({"scale": 0.0}, "'q' has scale 0.0; a scale must be finite and > 0"),
    "negative scale": ({"scale": -1.0}, "'q' has scale -1.0"),
    "infinite scale": ({"scale": float("inf")}, "'q' has scale inf"),
    "scale that is none": ({"scale": float("nan")}, "'q' has scale nan"),
    "one bad scale of many": (
        {"scale": [0.5, 0.0], "zero_point": [0, 0], "axis": 0},
        "'dq' has scale 0.0",
    ),
    "zero point too high": ({"zero_point": 256}, "'q' has zero point 256 outside 0..255"),
    "zero point too low": ({"zero_point": 0, "low": 1}, "'q' has zero point 0 outside 1..255"),
    "axis": (
        {"scale": [0.5], "zero_point": [0], "axis": 2},
        "'q' has axis 2, its shape is (2, 3)",
    ),
    "negative axis": ({"scale": [0.5], "zero_point": [0], "axis": -1}, "'q' has axis -1"),
    "channels": (
        {"scale": [0.5, 0.5, 0.5], "zero_point": [0, 0, 0], "axis": 0},
        "'q' has 3 scales for 2 channels on axis 0",
    ),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters(case: str) -> None:
    arguments, message = PARAMETERS[case]
    assert message in problems(quantized(**arguments))


def lint(gm: QuantGraphModule) -> None:
    relu = node(gm, "relu")
    next(iter(gm.graph.nodes)).prepend(relu)  # before what it reads


def renamed_input(gm: QuantGraphModule) -> None:
    node(gm, "x").target = "image"


def another_input(gm: QuantGraphModule) -> None:
    with gm.graph.inserting_before(node(gm, "relu")):
        gm.graph.placeholder("more")


def dead(gm: QuantGraphModule) -> None:
    relu = node(gm, "relu")
    GraphRewriter(gm, "test").call(torch.neg, (relu,), like=relu, name="unread")


def no_record(gm: QuantGraphModule) -> None:
    update_record(node(gm, "relu"), has_value=False)


def wrong_dtype(gm: QuantGraphModule) -> None:
    value = TensorRecord(shape=(2, 3), dtype=torch.int8)
    update_record(node(gm, "q"), value=value)


def dangling(gm: QuantGraphModule) -> None:
    node(gm, "relu").replace_input_with(node(gm, "dq"), node(gm, "q"))
    gm.graph.erase_node(node(gm, "dq"))


def other_parameters(gm: QuantGraphModule) -> None:
    rewriter = GraphRewriter(gm, "test")
    rewriter.new_buffer("other", torch.tensor(0.7))
    dq = node(gm, "dq")
    dq.update_arg(1, rewriter.get_attr("other", before=dq))


def dequantized_floats(gm: QuantGraphModule) -> None:
    node(gm, "dq").update_arg(0, node(gm, "x"))
    gm.graph.erase_node(node(gm, "q"))


BROKEN: dict[Callable[[QuantGraphModule], None], str] = {
    lint: "lint: ",
    renamed_input: "the inputs were ('x',) and are now ('image',)",
    another_input: "the inputs were ('x',) and are now ('x', 'more')",
    dead: "node 'unread'",
    no_record: "node 'relu' has no value record",
    wrong_dtype: "quantize 'q' gives torch.uint8, its value record says torch.int8",
    dangling: "quantize 'q' dangles: relu read integers without a dequantize",
    other_parameters: "dequantize 'dq' reads 'q' with other parameters",
    dequantized_floats: "dequantize 'dq' reads torch.float32, not integers",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_broken(breaks: Callable[[QuantGraphModule], None]) -> None:
    gm = quantized()
    breaks(gm)
    assert BROKEN[breaks] in problems(gm)


def test_all_problems_are_in_one_message() -> None:
    gm = quantized(scale=0.0, zero_point=300)
    dead(gm)
    text = problems(gm)
    assert "scale 0.0" in text
    assert "zero point 300" in text
    assert "'unread'" in text


def test_what_the_users_code_computes_in_vain_is_allowed() -> None:
    class InVain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.exp()
            return x + 1

    verify(capture(InVain(), Diagnostics()), made_by="capture")


def test_shapes_may_be_read_from_integers() -> None:
    gm = quantized()
    shape = node(gm, "getattr_1")
    shape.replace_input_with(shape.all_input_nodes[0], node(gm, "q"))
    verify(gm, made_by="some-pass")


def test_lowered_graphs_read_integers() -> None:
    gm = quantized()
    dangling(gm)
    gm.update_state(stage=Stage.LOWERED)
    verify(gm, made_by="lower")


def test_equal_parameters_under_two_reads() -> None:
    gm = quantized()
    rewriter = GraphRewriter(gm, "test")
    dq = node(gm, "dq")
    dq.update_arg(1, rewriter.get_attr("scale", before=dq))
    verify(gm, made_by="some-pass")


def test_without_shapes_records_are_not_asked_for() -> None:
    gm = capture(Reads(), Diagnostics())
    assert not any(record_of(n).has_value for n in gm.graph.nodes)
    verify(gm, made_by="capture")
