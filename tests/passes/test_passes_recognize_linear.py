"""recognize-linear: products with a constant in every spelling, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.calibration import calibrate
from fxquant.explain import explain
from fxquant.metadata import record_of
from fxquant.op_rows import Runs
from fxquant.op_view import attribute, op_of
from fxquant.parity import parity
from fxquant.pass_manager import PassResult
from fxquant.passes.recognize_linear import RecognizeLinear
from fxquant.qconfig import default_dynamic_qconfig
from fxquant.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    prepare_fx,
    prepare_qat_fx,
)
from tests.passes.helpers import captured, context, graph_text, node_named, run_alone, run_before

Function = Callable[["Product", Tensor], Tensor]


class Product(nn.Module):
    """``weight`` is ``[in, out]``, ``turned`` its transpose, ``table`` another ``[out, in]``."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))
        self.table = nn.Embedding(4, 6)
        self.register_buffer("basis", torch.randn(6, 4))
        self.cube = nn.Parameter(torch.randn(5, 6, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


SPELLINGS: dict[str, Function] = {
    "@": lambda m, x: x @ m.weight,
    "matmul": lambda m, x: torch.matmul(x, m.weight),
    ".matmul": lambda m, x: x.matmul(m.weight),
    "mm": lambda m, x: torch.mm(x.flatten(0, 1), m.weight),
    "a buffer": lambda m, x: x @ m.basis,
    "@ and +": lambda m, x: x @ m.weight + m.bias,
    "+ before @": lambda m, x: m.bias + torch.matmul(x, m.weight),
    "addmm": lambda m, x: torch.addmm(m.bias, x.view(-1, x.size(-1)), m.weight),
    "linear of t()": lambda m, x: F.linear(x, m.weight.t(), m.bias),
    "linear of T": lambda m, x: F.linear(x, m.weight.T),
    "linear of transpose": lambda m, x: F.linear(x, m.weight.transpose(0, 1)),
    "linear of permute": lambda m, x: F.linear(x, torch.permute(m.weight, (1, 0)), m.bias),
    "transposed thrice": lambda m, x: F.linear(x, m.weight.t().transpose(-1, -2).mT, m.bias),
    "@ t() of a table": lambda m, x: x @ m.table.weight.t(),
    "einsum": lambda m, x: torch.einsum("bld,de->ble", x, m.weight),
    "einsum, transposed": lambda m, x: torch.einsum("... d, e d -> ... e", x, m.table.weight),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_a_linear_in_int8(name: str) -> None:
    torch.manual_seed(0)
    model, x = Product(SPELLINGS[name]).eval(), torch.randn(2, 3, 6)
    expected, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    prepared = prepare_fx(model, None, (x,))
    linears = [
        n for n in prepared.graph.nodes if (op := op_of(prepared, n)) and op.name == "linear"
    ]
    assert len(linears) == 1
    torch.testing.assert_close(prepared(x), expected, rtol=1e-5, atol=1e-5)
    calibrate(prepared, [x], progress=False)
    reference, int8 = convert_to_reference_fx(prepared), convert_fx(prepared)
    rows = [row for row in explain(int8).rows if row.kind != "view"]
    assert all(row.runs is Runs.INT8 for row in rows), rows
    report = parity(reference, int8, (x,))
    assert report.ok, str(report)
    # Half a step of x, and of W where |W| < 4, in each of the 6 products that are summed.
    step = float(x.max() - x.min()) / 255 / 2 * 4 + 4 / 127 / 2 * float(x.abs().max())
    assert float((int8(x) - expected).detach().abs().max()) < 6 * step
    assert int8(torch.randn(5, 7, 6)).shape[-1] == 4
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


OTHERS: dict[str, Function] = {
    "two activations": lambda m, x: x @ x.transpose(1, 2),
    "a constant on the left": lambda m, x: m.table.weight @ x.transpose(1, 2),
    "a batch of matrices": lambda m, x: x.unsqueeze(1) @ m.cube,
    "addmm with a factor": lambda m, x: torch.addmm(m.bias, x[0], m.weight, alpha=2),
    "addmm to an activation": lambda m, x: torch.addmm(x[0, :, :4], x[0], m.weight),
    "a computed weight": lambda m, x: F.linear(x, (m.weight * 2).t()),
    "einsum over two letters": lambda m, x: torch.einsum("bld,de->bl", x, m.weight),
    "a linear with a weight of its own": lambda m, x: F.linear(x, m.table.weight, m.bias),
}


@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    model, x = Product(OTHERS[name]).eval(), torch.randn(2, 3, 6)
    gm = captured(model, x)
    shared = run_before(RecognizeLinear, gm, model)
    assert RecognizeLinear().run(gm, shared) == PassResult(changes=0)
    assert torch.equal(gm(x), model(x))


def test_what_is_added_stays_where_it_is_no_bias() -> None:
    def twice(m: Product, x: Tensor) -> Tensor:
        y = x @ m.weight
        return y + m.bias + y

    model, x = Product(twice).eval(), torch.randn(2, 3, 6)
    gm = captured(model, x)
    run_before(RecognizeLinear, gm, model)
    assert run_alone(RecognizeLinear(), gm).changes > 0
    op = op_of(gm, node_named(gm, "matmul"))
    assert op is not None
    assert op.arguments["bias"] is None
    torch.testing.assert_close(gm(x), model(x))
    assert run_alone(RecognizeLinear(), gm) == PassResult(changes=0)


def test_rules_for_the_product_hold() -> None:
    model, x = Product(lambda m, x: torch.matmul(x, m.weight)).eval(), torch.randn(2, 3, 6)
    floats = prepare_fx(
        model, {"": None, "object_type": [(torch.matmul, None)]}, (x,), strict=False
    )
    assert not any(
        op and op.name == "linear" for op in (op_of(floats, n) for n in floats.graph.nodes)
    )
    dynamic = convert_fx(prepare_fx(model, {"": default_dynamic_qconfig}, (x,)))
    assert explain(dynamic).rows[0].kernel.startswith("quantized::linear_dynamic")


def test_one_weight_for_two_products() -> None:
    model = Product(lambda m, x: (x @ m.weight) * (x.flip(0) @ m.weight)).eval()
    x = torch.randn(2, 3, 6)
    gm = captured(model, x)
    run_before(RecognizeLinear, gm, model)
    run_alone(RecognizeLinear(), gm)
    reads = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    assert reads == {"weight_transposed"}
    assert torch.equal(attribute(gm, "weight_transposed"), model.weight.t())
    torch.testing.assert_close(gm(x), model(x))


def test_in_training_a_shared_weight_stays() -> None:
    x = torch.randn(2, 3, 6)
    tied = Product(lambda m, x: (x @ m.weight) @ m.weight.t()).train()
    prepared = prepare_qat_fx(tied, None, (x,))
    reasons = [reason for n in prepared.graph.nodes for reason in record_of(n).reasons]
    assert any("'weight' is read elsewhere too" in reason for reason in reasons)
    torch.testing.assert_close(prepared(x).shape, tied(x).shape)
    alone = Product(lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight)).train()
    trained = prepare_qat_fx(alone, None, (x,))
    trained(x).sum().backward()
    assert trained.weight_transposed.grad is not None
    int8 = convert_fx(trained.eval())
    assert {row.kind: row.runs for row in explain(int8).rows}["addmm"] is Runs.INT8


def test_golden(golden: Callable[[str, str], None]) -> None:
    model, x = Product(SPELLINGS["@ and +"]).eval(), torch.randn(2, 3, 6)
    gm = captured(model, x)
    run_before(RecognizeLinear, gm, model)
    before = graph_text(gm)
    assert RecognizeLinear().run(gm, context()).changes
    golden("recognize-linear", f"{before}\n\n-- recognize-linear -->\n\n{graph_text(gm)}")
