"""op_view: one view of an op whatever its form; every form of the catalogue binds to it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.op_catalog import KIND_BY_FUNCTION, KIND_BY_METHOD, KIND_BY_MODULE, KINDS
from fxquant.op_view import Form, Op, attribute, is_inplace, kind_of, op_of, type_name, type_of
from fxquant.qat_modules import FLOAT_BY_QAT, QatBatchNormed, training_form
from fxquant.reference_modules import REFERENCE_BY_FLOAT

Function = Callable[..., Any]


class Calls(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y) if not isinstance(self.function, nn.Module) else self.function(x)


def last_op(function: Function) -> tuple[fx.GraphModule, fx.Node]:
    gm = fx.symbolic_trace(Calls(function))
    return gm, [node for node in gm.graph.nodes if node.op.startswith("call_")][-1]


def view(function: Function) -> Op:
    gm, node = last_op(function)
    op = op_of(gm, node)
    assert op is not None
    return op


# -- one kind, many forms -------------------------------------------------------------------------

SAME: dict[str, list[tuple[Function, dict[str, Any]]]] = {
    "relu": [
        (nn.ReLU(), {}),
        (lambda x, y: F.relu(x), {}),
        (lambda x, y: torch.relu(x), {}),
        (lambda x, y: F.relu(input=x), {}),
        (lambda x, y: x.relu(), {}),
    ],
    "hardtanh": [
        (nn.Hardtanh(-2.0, 3.0), {"min_val": -2.0, "max_val": 3.0}),
        (lambda x, y: F.hardtanh(x, -2.0, 3.0), {"min_val": -2.0, "max_val": 3.0}),
        (lambda x, y: F.hardtanh(x, max_val=3.0), {"min_val": -1.0, "max_val": 3.0}),
    ],
    "clamp": [
        (lambda x, y: torch.clamp(x, 0, 6), {"min": 0, "max": 6}),
        (lambda x, y: x.clamp(max=6), {"min": None, "max": 6}),
        (lambda x, y: torch.clip(x, min=1), {"min": 1, "max": None}),
    ],
    "max_pool2d": [
        (nn.MaxPool2d(3, 2, 1), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": False}),
        (lambda x, y: F.max_pool2d(x, 3, 2, 1), {"kernel_size": 3, "stride": 2, "padding": 1}),
        (lambda x, y: F.max_pool2d(x, kernel_size=3, stride=2, padding=1), {"stride": 2}),
    ],
    "flatten": [
        (nn.Flatten(), {"start_dim": 1, "end_dim": -1}),
        (lambda x, y: torch.flatten(x, 1), {"start_dim": 1, "end_dim": -1}),
        (lambda x, y: x.flatten(2, 3), {"start_dim": 2, "end_dim": 3}),
    ],
    "view": [
        (lambda x, y: x.view(2, -1), {"shape": (2, -1)}),
        (lambda x, y: x.view((2, -1)), {"shape": (2, -1)}),
    ],
    "permute": [
        (lambda x, y: x.permute(0, 2, 3, 1), {"dims": (0, 2, 3, 1)}),
        (lambda x, y: torch.permute(x, (0, 2, 3, 1)), {"dims": (0, 2, 3, 1)}),
    ],
    "softmax": [
        (nn.Softmax(1), {"dim": 1}),
        (lambda x, y: F.softmax(x, dim=1), {"dim": 1}),
        (lambda x, y: x.softmax(1), {"dim": 1}),
        (lambda x, y: torch.softmax(x, 1), {"dim": 1}),
    ],
    "mean": [
        (lambda x, y: x.mean((2, 3), True), {"dim": (2, 3), "keepdim": True}),
        (lambda x, y: torch.mean(x, axis=1), {"dim": 1, "keepdim": False}),
    ],
    "dropout": [
        (nn.Dropout(0.3), {"p": 0.3, "training": True}),
        (nn.Dropout2d(0.3).eval(), {"p": 0.3, "training": False}),
        (lambda x, y: F.dropout(x, 0.3, False), {"p": 0.3, "training": False}),
    ],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, forms in SAME.items() for i in range(len(forms))]
)
def test_forms_of_one_kind(name: str, index: int) -> None:
    function, wanted = SAME[name][index]
    op = view(function)
    assert op.name == name
    assert {key: op.arguments[key] for key in wanted} == wanted
    assert [node.name for node in op.activations] == ["x"]
    assert {parameter for parameter, _ in op.kind.signature} - set(op.kind.constants) <= set(
        op.arguments
    )


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_of_a_module(flag: bool) -> None:
    for module in (nn.ReLU(flag), nn.Hardtanh(inplace=flag), nn.Dropout(inplace=flag)):
        assert view(module).arguments["inplace"] is flag


def test_form() -> None:
    assert view(nn.ReLU()).form is Form.MODULE
    assert view(lambda x, y: F.relu(x)).form is Form.FUNCTION
    assert view(lambda x, y: x.relu()).form is Form.METHOD


BINARY: dict[str, list[Function]] = {
    "add": [
        lambda x, y: x + y,
        torch.add,
        lambda x, y: x.add(y),
        lambda x, y: torch.add(input=x, other=y),
        operator.iadd,
    ],
    "matmul": [torch.matmul, lambda x, y: x @ y, lambda x, y: x.matmul(y)],
    "mul": [lambda x, y: x * y, torch.mul, lambda x, y: x.mul(y)],
    "div": [lambda x, y: x / y, torch.div],
    "sub": [lambda x, y: x - y, torch.sub],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, forms in BINARY.items() for i in range(len(forms))]
)
def test_both_operands(name: str, index: int) -> None:
    op = view(BINARY[name][index])
    assert op.name == name
    assert [node.name for node in op.activations] == ["x", "y"]


def test_operands_that_are_numbers_are_no_activations() -> None:
    op = view(lambda x, y: 2 - x)
    assert [node.name for node in op.activations] == ["x"]
    assert op.arguments["input"] == 2


def test_cat_is_flat() -> None:
    for function in (
        lambda x, y: torch.cat([x, y, x], 1),
        lambda x, y: torch.cat(tensors=(x, y, x)),
    ):
        op = view(function)
        assert [node.name for node in op.activations] == ["x", "y", "x"]


# -- constants ------------------------------------------------------------------------------------


def test_constants_of_a_module() -> None:
    op = view(nn.Conv2d(4, 4, 1, bias=False))
    assert op.constant_path("weight") == "function.weight"
    assert op.constant("weight") is attribute(op.owner, "function.weight")
    assert op.constant_path("bias") is None
    assert op.constant("bias") is None
    assert not op.computes("weight")
    assert "weight" not in op.arguments
    assert op.arguments["padding_mode"] == "zeros"


class FunctionalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor, computed: bool) -> Tensor:
        return F.conv2d(x, weight=self.weight) + F.conv2d(x, self.weight * 2, padding=1)


def test_constants_of_a_function() -> None:
    gm = fx.symbolic_trace(FunctionalConvolution())
    plain, computed = (op_of(gm, n) for n in gm.graph.nodes if n.target is F.conv2d)
    assert plain is not None
    assert computed is not None
    assert plain.constant_path("weight") == "weight"
    assert plain.constant("weight") is gm.weight
    assert not plain.computes("weight")
    assert plain.arguments["bias"] is None
    assert not plain.computes("bias")
    assert computed.computes("weight")
    assert computed.constant_path("weight") is None
    assert computed.arguments["padding"] == 1


# -- what does not bind ---------------------------------------------------------------------------

UNBOUND: dict[str, Function] = {
    "out": lambda x, y: torch.add(x, y, out=x),
    "dtype": lambda x, y: F.softmax(x, 1, dtype=torch.float64),
    "too many": lambda x, y: x.transpose(0, 1, 2),
    "too few": lambda x, y: x.transpose(0),
}


@pytest.mark.parametrize("name", UNBOUND)
def test_arguments_that_are_not_understood(name: str) -> None:
    gm, node = last_op(UNBOUND[name])
    assert kind_of(gm, node) is not None
    assert op_of(gm, node) is None


def test_an_argument_that_asks_for_nothing_binds() -> None:
    assert view(lambda x, y: torch.add(x, y, out=None)).name == "add"


@pytest.mark.parametrize(
    "function",
    [lambda x, y: torch.exp(x), lambda x, y: x.cos(), nn.Softsign(), lambda x, y: x.shape],
)
def test_what_the_catalogue_does_not_know(function: Function) -> None:
    gm, node = last_op(function)
    assert kind_of(gm, node) is None
    assert op_of(gm, node) is None


def test_other_nodes_are_no_ops() -> None:
    gm = fx.symbolic_trace(FunctionalConvolution())
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            assert op_of(gm, node) is None


def test_a_subclass_is_not_its_base() -> None:
    class Mine(nn.ReLU):
        pass

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = nn.Sequential(Mine())
    gm = fx.GraphModule(model, Tracer().trace(model))
    assert all(kind_of(gm, node) is None for node in gm.graph.nodes)


# -- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "wanted", "name"),
    [
        (nn.ReLU(), nn.ReLU, "ReLU"),
        (lambda x, y: F.relu(x), F.relu, "relu"),
        (lambda x, y: x.relu(), "relu", "relu"),
        (lambda x, y: x + y, operator.add, "add"),
        (lambda x, y: operator.iadd(x, y), operator.add, "add"),
    ],
)
def test_type_of(function: Function, wanted: object, name: str) -> None:
    gm, node = last_op(function)
    assert type_of(gm, node) == wanted
    assert type_name(gm, node) == name


INPLACE: list[tuple[Function, bool]] = [
    (nn.ReLU(inplace=True), True),
    (nn.ReLU(), False),
    (lambda x, y: F.relu(x, inplace=True), True),
    (lambda x, y: F.relu(x, True), True),
    (lambda x, y: F.relu(x), False),
    (lambda x, y: torch.relu_(x), True),
    (lambda x, y: x.add_(y), True),
    (lambda x, y: x.add(y), False),
    (lambda x, y: x.masked_fill_(y, 0.0), True),
    (lambda x, y: x.__getitem__(0), False),
]


@pytest.mark.parametrize("index", range(len(INPLACE)))
def test_is_inplace(index: int) -> None:
    function, wanted = INPLACE[index]
    gm, node = last_op(function)
    assert is_inplace(gm, node) == wanted


# -- the catalogue itself -------------------------------------------------------------------------


def test_names_are_unique_and_forms_belong_to_one_kind() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    for table in ("functions", "methods"):
        forms = [form for kind in KINDS for form in dict.fromkeys(getattr(kind, table))]
        assert len(set(forms)) == len(forms), table
    modules = [module for kind in KINDS for module in kind.modules]
    assert len(set(modules)) == len(modules)


def test_activations_and_constants_are_parameters() -> None:
    for kind in KINDS:
        parameters = {name for name, _ in kind.signature}
        assert parameters >= {*kind.activations, *kind.constants}, kind.name
        assert not set(kind.activations) & set(kind.constants), kind.name


def test_methods_exist() -> None:
    for name in KIND_BY_METHOD:
        assert callable(getattr(Tensor, name, None)), name


def test_functions_are_found_by_identity() -> None:
    for function, kind in KIND_BY_FUNCTION.items():
        assert function in kind.functions


MADE: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Conv1d: (4, 4, 1),
    nn.Conv2d: (4, 4, 1),
    nn.Conv3d: (4, 4, 1),
    nn.ConvTranspose1d: (4, 4, 1),
    nn.ConvTranspose2d: (4, 4, 1),
    nn.ConvTranspose3d: (4, 4, 1),
    nn.Linear: (4, 4),
    nn.Bilinear: (4, 4, 4),
    nn.BatchNorm1d: (4,),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (4,),
    nn.LayerNorm: (4,),
    nn.GroupNorm: (2, 4),
    nn.MaxPool1d: (2,),
    nn.MaxPool2d: (2,),
    nn.MaxPool3d: (2,),
    nn.AvgPool1d: (2,),
    nn.AvgPool2d: (2,),
    nn.AvgPool3d: (2,),
    nn.AdaptiveAvgPool1d: (2,),
    nn.AdaptiveAvgPool2d: (2,),
    nn.AdaptiveAvgPool3d: (2,),
    nn.ZeroPad1d: (1,),
    nn.ZeroPad2d: (1,),
    nn.ZeroPad3d: (1,),
    nn.ConstantPad1d: (1, 2.0),
    nn.ConstantPad2d: (1, 2.0),
    nn.ConstantPad3d: (1, 2.0),
    nn.PixelShuffle: (2,),
    nn.PixelUnshuffle: (2,),
    nn.ChannelShuffle: (2,),
    nn.InstanceNorm1d: (4,),
    nn.InstanceNorm2d: (4,),
    nn.InstanceNorm3d: (4,),
    nn.Embedding: (4, 4),
    nn.EmbeddingBag: (4, 4),
    nn.LSTM: (4, 4),
    nn.RNN: (4, 4),
    nn.RMSNorm: (4,),
    nn.Unflatten: (1, (2, 2)),
    nn.MultiheadAttention: (4, 2),
    nn.Transformer: (4, 2, 1, 1, 8, 0.1, F.relu, None, None, 1e-5, True),
    nn.TransformerEncoderLayer: (4, 2),
    nn.TransformerDecoderLayer: (4, 2),
    nn.TransformerEncoder: (nn.TransformerEncoderLayer(4, 2, batch_first=True), 1),
    nn.TransformerDecoder: (nn.TransformerDecoderLayer(4, 2), 1),
    **{getattr(nn, f"LPPool{d}d"): (2, 2) for d in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveMaxPool{d}d"): (2,) for d in (1, 2, 3)},
    **{
        getattr(nn, f"{name}Pad{d}d"): (1,)
        for name in ("Reflection", "Replication", "Circular")
        for d in (1, 2, 3)
    },
    nn.GRU: (4, 4),
    nn.LSTMCell: (4, 4),
    nn.GRUCell: (4, 4),
    nn.RNNCell: (4, 4),
}


def test_further_arguments_of_a_module_are_no_constants_and_no_attributes() -> None:
    """``bag(tokens, offsets)``: the function has the weight in between."""
    graph = fx.Graph()
    tokens, offsets = graph.placeholder("tokens"), graph.placeholder("offsets")
    graph.output(graph.call_module("bag", (tokens, offsets)))
    root = nn.Module()
    root.bag = nn.EmbeddingBag(4, 4, mode="sum")
    gm = fx.GraphModule(root, graph)
    op = op_of(gm, next(n for n in gm.graph.nodes if n.op == "call_module"))
    assert op is not None
    assert op.arguments["offsets"].name == "offsets"
    assert op.arguments["mode"] == "sum"
    assert op.arguments["per_sample_weights"] is None


OWN = set(KIND_BY_MODULE) - set(REFERENCE_BY_FLOAT.values())  # those are made of float modules


@pytest.mark.parametrize("module", sorted(OWN, key=lambda m: m.__name__))
def test_every_module_of_the_catalogue_binds(module: type[nn.Module]) -> None:
    """Its attributes exist, and all parameters but constants have a value."""
    plain = FLOAT_BY_QAT.get(module, module)
    made = plain(*MADE.get(plain, ()))
    if plain is not module:
        made = training_form(made, nn.Identity() if issubclass(module, QatBatchNormed) else None)
        assert type(made) is module
    graph = fx.Graph()
    x = graph.placeholder("x")
    several = {nn.Bilinear: 2, nn.MultiheadAttention: 3}
    inputs = (x,) * several.get(module, 1)
    node = graph.call_module("m", inputs)
    graph.output(node)
    root = nn.Module()
    root.m = made
    gm = fx.GraphModule(root, graph)
    op = op_of(gm, next(n for n in gm.graph.nodes if n.op == "call_module"))
    assert op is not None
    missing = {name for name, _ in op.kind.signature} - set(op.arguments) - set(op.kind.constants)
    assert missing <= ({"weights"} if op.kind.definition else set())
    for constant in op.kind.constants:
        assert hasattr(made, constant), constant
