"""Graphs of ATen overloads: translated, they quantize like the modules they came from."""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant import (
    CaptureError,
    ShapeGuardError,
    audit,
    calibrate,
    convert_fx,
    explain,
    get_default_qconfig,
    prepare_fx,
    prepare_qat_fx,
)
from fxquant.aten import import_aten, is_aten
from fxquant.models_zoo.torchvision_import import import_torchvision
from fxquant.op_rows import Runs
from fxquant.op_view import op_of

SEED = 5


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def exported(model: nn.Module, *inputs: Any, free: bool = True) -> torch.export.ExportedProgram:
    """``model`` with free sizes, unless not."""
    sizes = tuple(dict.fromkeys(range(x.dim()), Dim.AUTO) for x in inputs) if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch about itself
        return torch.export.export(model.eval(), inputs, dynamic_shapes=sizes, strict=False)


def translated(model: nn.Module, *inputs: Any, decompose: bool) -> torch.fx.GraphModule:
    program = exported(model, *inputs, free=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = program.run_decompositions() if decompose else program
        return import_aten(program.module(check_guards=False))


# -- the words ------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Functions of one tensor, and modules of one each: one export for all."""

    def __init__(
        self,
        functions: dict[str, Callable[[Tensor], Any]],
        modules: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.functions = functions
        self.modules_ = nn.ModuleDict(modules or {})

    def forward(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Any]:
        results = {name: function(x) for name, function in self.functions.items()}
        return results | {name: module(inputs[name]) for name, module in self.modules_.items()}


IMAGE = (2, 4, 8, 8)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x + 0),
    "relu6": F.relu6,
    "relu6_": lambda x: F.relu6(x + 0, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "clamp": lambda x: torch.clamp(x, -0.5, 0.25),
    "clamp_min": lambda x: torch.clamp_min(x, 0.5),
    "clamp_max": lambda x: torch.clamp_max(x, 0.5),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda x: F.softmax(x, -1),
    "add": lambda x: torch.add(x, x, alpha=2),
    "sub": lambda x: x - 2 * x,
    "mul": lambda x: x * x,
    "div": lambda x: x / 3,
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "bmm": lambda x: torch.bmm(x[0], x[1]),
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d_bare": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "interpolate_bilinear": lambda x: F.interpolate(x, (5, 7), mode="bilinear", align_corners=True),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "flatten": lambda x: torch.flatten(x, 1),
    "reshape": lambda x: x.reshape(2, -1),
    "view": lambda x: x.view(2, -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: x.split([1, 3], 1)[0],
    "select": lambda x: x[:, 1],
    "slice": lambda x: x[:, 1:4:2],
    "slice_end": lambda x: x[:, :-1],
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x * 3),
    "shape": lambda x: x.reshape(x.shape[0], -1) * x.shape[1],
}
NO_KIND = {"chunk", "split", "attention", "shape"}
"""Pieces come from a tuple, sizes are no op, and attention has no kind."""
TAKEN_APART = {"group_norm", "instance_norm", "prelu"}
"""What torch's decompositions have no op for."""


MODULES: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9), "conv1d"),
    "conv2d": (nn.Conv2d(4, 6, 3, 1, (1, 2), 2, bias=False), IMAGE, "conv2d"),
    "conv2d_same": (nn.Conv2d(4, 6, 3, padding="same"), IMAGE, "conv2d"),
    "conv3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5), "conv3d"),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 9), "conv_transpose1d"),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), IMAGE, "conv_transpose2d"),
    "linear": (nn.Linear(8, 5), (2, 8), "linear"),
    "linear_3d": (nn.Linear(8, 5), (2, 3, 8), "linear"),
    "linear_no_bias": (nn.Linear(8, 5, bias=False), (2, 8), "linear"),
    "batch_norm": (nn.BatchNorm2d(4), IMAGE, "batch_norm"),
    "layer_norm": (nn.LayerNorm(8), (2, 3, 8), "layer_norm"),
    "group_norm": (nn.GroupNorm(2, 4), IMAGE, "group_norm"),
    "instance_norm": (nn.InstanceNorm2d(4), IMAGE, "instance_norm"),
    "prelu": (nn.PReLU(4), IMAGE, "prelu"),
    "max_pool": (nn.MaxPool2d(3, 2), IMAGE, "max_pool2d"),
    "embedding": (nn.Embedding(9, 4, padding_idx=2), (), "embedding"),
}


@functools.cache
def all_words(*, decompose: bool) -> tuple[Calls, dict[str, Any], torch.fx.GraphModule]:
    """Everything above, its inputs, and its graph in the words of torch."""
    model = Calls(FUNCTIONS, {name: module for name, (module, _, _) in MODULES.items()})
    inputs = {"x": floats(*IMAGE), "inputs": {n: floats(*s) for n, (_, s, _) in MODULES.items()}}
    inputs["inputs"]["embedding"] = torch.tensor([[1, 2, 8]])
    return model, inputs, translated(model, *inputs.values(), decompose=decompose)


def ops_behind(gm: torch.fx.GraphModule, name: str) -> list[torch.fx.Node]:
    """The calls that the output of a name needs."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    pending = [n for n in [output.args[0][name]] if isinstance(n, torch.fx.Node)]
    found: dict[torch.fx.Node, None] = {}
    while pending:
        node = pending.pop()
        if node.op.startswith("call_") and node not in found and "inputs" not in str(node.args):
            found[node] = None
        pending += node.all_input_nodes
    return list(found)


@pytest.mark.parametrize("decompose", [False, True], ids=["training", "core"])
@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_the_same_numbers(name: str, *, decompose: bool) -> None:
    model, inputs, gm = all_words(decompose=decompose)
    found, wanted = gm(**inputs)[name], model(**inputs)[name]
    if decompose:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in NO_KIND])
def test_functions_are_known_to_the_catalogue(name: str) -> None:
    _, _, gm = all_words(decompose=False)
    calls = [
        node
        for node in ops_behind(gm, name)
        if node.target is not operator.getitem or not isinstance(node.args[1], (str, int))
    ]
    assert calls
    assert all(op_of(gm, node) is not None for node in calls), [n.format_node() for n in calls]


@pytest.mark.parametrize("decompose", [False, True], ids=["training", "core"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_known_to_the_catalogue(name: str, *, decompose: bool) -> None:
    _, _, gm = all_words(decompose=decompose)
    kind = MODULES[name][2]
    kinds = [op.name for op in (op_of(gm, n) for n in ops_behind(gm, name)) if op is not None]
    if decompose and name in TAKEN_APART:
        assert kind not in kinds
    else:
        assert kind in kinds


# -- signatures -----------------------------------------------------------------------------------


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, more: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
        return {"y": self.fc(x) * scale, "rest": (more["a"] + x, [more["b"][0], x])}


def test_nested_inputs_and_outputs() -> None:
    model, x = Structured().eval(), floats(3, 4)
    more, scale = {"a": floats(3, 4), "b": [floats(2)]}, torch.tensor(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(model, (x, more), {"scale": scale}, strict=False)
        gm = import_aten(program.module())
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "more", "scale"]
    found, wanted = gm(x, more, scale=scale), model(x, more, scale=scale)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert isinstance(found["rest"], tuple)
    assert isinstance(found["rest"][1], list)


def test_guards_of_sizes_stay() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.shape[0] > 2 else self.fc(-x)

    program = exported(Branches(), floats(5, 4))
    gm = prepare_fx(program, None, (floats(5, 4),))
    gm(floats(3, 4))
    with pytest.raises(ShapeGuardError, match=r"torch\.export's"):
        gm(floats(2, 4))
    int8 = convert_fx(calibrate(gm, [floats(7, 4)]))
    assert int8(floats(4, 4)).shape == (4, 4)
    with pytest.raises(ShapeGuardError):
        int8(floats(1, 4))


class Steps(nn.Module):
    """Counts its calls in a buffer; holds a constant; takes an optional input and a flag."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor | None = None, flag: bool = True) -> Tensor:
        self.count.add_(1)
        y = self.fc(x) if mask is None or not flag else self.fc(x) * mask
        return y + self.count + torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("masked", [False, True])
def test_buffers_constants_and_inputs_that_are_no_tensors(*, masked: bool) -> None:
    x = floats(3, 4)
    inputs = (x, torch.ones(3, 4)) if masked else (x, None, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(Steps().eval(), inputs, strict=False)
    gm = prepare_fx(program, None, inputs)
    module = program.module()
    for _ in range(3):
        assert torch.equal(gm(*inputs), module(*inputs))
    int8 = convert_fx(gm)
    assert int8.count.item() == 3  # type: ignore[operator]  # a buffer
    assert audit(int8, inputs).mac_coverage == 1.0


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.one(x)
        return self.last(
            torch.cond(x.sum() > 0, lambda y: self.one(y), lambda y: self.two(y), (x,))
        )


def test_higher_order_operators_run_as_they_are() -> None:
    """``torch.cond`` and ``no_grad`` are graphs in the graph: what is in them stays in FP32."""
    model, x = Conditional().eval(), floats(3, 4)
    gm = prepare_fx(exported(model, x, free=False), None, (x,))
    int8 = convert_fx(calibrate(gm, [(x,), (-x,)]))
    assert explain(int8).row("cond").runs is Runs.FP32
    assert explain(int8).row("last").runs is Runs.INT8
    for sign in (1, -1):
        torch.testing.assert_close(int8(sign * x), model(sign * x), rtol=0, atol=0.05)


# -- whole models ---------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolutions, a residual sum, a pool, a linear; in-place writes as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.conv(x))
        y += x
        y = self.pool(self.relu(y))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def small() -> Small:
    torch.manual_seed(SEED)
    model = Small()
    model(floats(16, 3, 12, 12))  # statistics of batch-norms
    return model.eval()


def converted(model: Any, x: Tensor) -> Any:
    return convert_fx(calibrate(prepare_fx(model, None, (x,)), [(x,)]))


@pytest.mark.parametrize("decompose", [False, True], ids=["training", "core"])
@pytest.mark.parametrize("as_module", [False, True])
def test_an_exported_model_is_the_same_int8_model(*, decompose: bool, as_module: bool) -> None:
    model, x = small(), floats(2, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = exported(model, x)
        program = program.run_decompositions() if decompose else program
    int8, wanted = converted(program.module() if as_module else program, x), converted(model, x)
    assert torch.equal(int8(x), wanted(x))
    report, other = audit(int8), audit(wanted)
    assert report.confirmed
    assert report.mac_coverage == other.mac_coverage == 1.0
    assert dict(report.int8_calls) == dict(other.int8_calls)
    for shape in ((1, 3, 12, 12), (3, 3, 21, 16)):
        assert torch.equal(int8(floats(*shape)), wanted(floats(*shape)))


def test_the_program_is_not_touched() -> None:
    model, x = small(), floats(2, 3, 12, 12)
    program = exported(model, x)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    text, y = str(program.graph), program.module()(x)
    converted(program, x)
    assert str(program.graph) == text
    assert torch.equal(program.module()(x), y)
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, before[name])


def test_rules_name_the_modules_it_came_from() -> None:
    model, x = small(), floats(2, 3, 12, 12)
    mapping = {"": get_default_qconfig("x86"), "conv": None}
    gm = prepare_fx(exported(model, x), mapping, (x,))
    row = explain(gm).row("conv")
    assert (row.runs, row.path) == (Runs.FP32, "conv")
    assert "module_name 'conv'" in row.rule
    assert explain(gm).row("head").runs is Runs.PLANNED
    gm = prepare_fx(exported(model, x), {nn.Conv2d: get_default_qconfig("x86")}, (x,))
    assert explain(gm).row("head").runs is Runs.FP32
    assert explain(gm).row("conv").runs is Runs.PLANNED


def test_exported_programs_do_not_train() -> None:
    program = exported(small(), floats(2, 3, 12, 12))
    for model in (program, program.module()):
        with pytest.raises(CaptureError, match=r"torch\.export gives does not train"):
            prepare_qat_fx(model, None, (floats(2, 3, 12, 12),))  # type: ignore[arg-type]  # the point


def test_other_tools_make_aten_graphs_too() -> None:
    model, x = small(), floats(2, 3, 12, 12)
    gm = make_fx(model)(x)
    assert is_aten(gm)
    int8 = converted(gm, x)
    assert audit(int8).mac_coverage == 1.0
    assert torch.equal(int8(x), converted(model, x)(x))


def test_an_overload_that_nobody_knows_runs_as_it_is() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.fc(torch.cumsum(x, -1)))

    model, x = Unknown().eval(), floats(3, 4)
    int8 = converted(exported(model, x), x)
    assert explain(int8).row("cumsum").runs is Runs.FP32
    assert audit(int8).mac_coverage == 1.0
    assert audit(int8).confirmed


def test_resnet18() -> None:
    torchvision = import_torchvision()
    torch.manual_seed(SEED)
    model, x = torchvision.models.resnet18(), floats(2, 3, 64, 64)
    model.eval()
    int8, wanted = converted(exported(model, x), x), converted(model, x)
    assert torch.equal(int8(x), wanted(x))
    assert audit(int8).op_coverage == audit(wanted).op_coverage
    assert sys.maxsize not in [a for node in int8.graph.nodes for a in node.args]
