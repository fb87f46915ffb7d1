"""annotate: the specs of every op that the target serves, and a reason for every other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import compat
from fxquant.errors import ConfigWarning, StrictModeError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import Annotation, record_of
from fxquant.observers import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    default_reuse_input_observer,
)
from fxquant.pass_manager import fingerprint
from fxquant.passes.annotate import Annotate
from fxquant.qconfig import QConfig, default_dynamic_qconfig
from fxquant.qconfig_mapping import normalize
from fxquant.quantize_fx import prepare_fx
from fxquant.targets.registry import target_named
from fxquant.targets.table import Role
from tests.passes.helpers import (
    captured,
    graph_text,
    lively,
    node_named,
    observers,
    reasons,
    run_before,
)

Function = Callable[[Tensor], Any]

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
A = QConfig(MinMaxObserver, WEIGHT)
IMAGES = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
UINT8 = "uint8 affine 0..255"


class Between(nn.Module):
    """An op between two convolutions: integers come in and are wanted."""

    def __init__(self, function: Function, channels: int = 4) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, 4, 1)
        self.op = function
        self.after = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(self.before(x)))


class Alone(nn.Module):
    """An op between a float op and the output: no integers about."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.op = function

    def forward(self, x: Tensor) -> Any:
        return self.op(x.exp())


class _Call(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def annotated(model: nn.Module, *inputs: Any, mapping: Any = None) -> QuantGraphModule:
    lively(model)
    gm = captured(model, *inputs)
    shared = run_before(Annotate, gm, model, {"": A} if mapping is None else mapping)
    before = fingerprint(gm)
    result = Annotate().run(gm, shared)
    assert (result.changes > 0) == (fingerprint(gm) != before)
    after = fingerprint(gm)
    assert Annotate().run(gm, shared).changes == 0
    assert fingerprint(gm) == after
    return gm


def annotation(gm: QuantGraphModule, name: str) -> Annotation:
    found = record_of(node_named(gm, name)).annotation
    assert found is not None, reasons(gm, name)
    return found


def op_between(gm: QuantGraphModule) -> list[str]:
    names = [node.name for node in gm.graph.nodes if node.op.startswith("call_")]
    return names[names.index("before") + 1 : names.index("after")]


# -- ops that keep the parameters of their input --------------------------------------------------

SHARING: dict[str, tuple[Function, int]] = {
    "relu6": (nn.ReLU6(), 4),
    "relu": (nn.ReLU(), 4),
    "hardtanh": (nn.Hardtanh(), 4),
    "clamp": (lambda x: x.clamp(0, 3), 4),
    "clamp_min": (lambda x: x.clamp_min(0), 4),
    "clamp_max": (lambda x: x.clamp_max(3), 4),
    "max_pool2d": (nn.MaxPool2d(2), 4),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), 4),
    "avg_pool2d": (nn.AvgPool2d(2), 4),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0), 4),
    "bilinear": (nn.Upsample(scale_factor=2.0, mode="bilinear"), 4),
    "pad": (nn.ZeroPad2d(1), 4),
    "F.pad": (lambda x: F.pad(x, (1, 1)), 4),
    "cat": (lambda x: torch.cat([x, x], 1), 8),
    "stack": (lambda x: torch.stack([x], 0).squeeze(0), 4),
    "flatten and view": (lambda x: x.flatten(2).view(1, 4, 8, 8), 4),
    "reshape": (lambda x: torch.reshape(x, (1, 4, 4, 16)), 4),
    "permute": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 4),
    "transpose": (lambda x: x.transpose(2, 3), 4),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(0), 4),
    "slice": (lambda x: x[:, :2], 2),
    "chunk": (lambda x: x.chunk(2, 1)[1], 2),
    "split": (lambda x: torch.split(x, [1, 3], 1)[1], 3),
    "tensor_split": (lambda x: x.tensor_split(2, 1)[0], 2),
    "unbind": (lambda x: x[None].unbind()[0], 4),
    "narrow": (lambda x: x.narrow(1, 1, 2), 2),
    "select": (lambda x: x[None].select(0, 0), 4),
    "contiguous": (lambda x: x.contiguous(), 4),
    "pixel_shuffle": (nn.PixelShuffle(2), 1),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), 16),
    "channel_shuffle": (nn.ChannelShuffle(2), 4),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 4),
    "ReplicationPad2d": (nn.ReplicationPad2d(1), 4),
    "maximum": (lambda x: torch.maximum(x, x.flip(2)), 4),
    "minimum": (lambda x: x.minimum(x[:, :1]), 4),
    "amax": (lambda x: x.amax(1, True), 1),
    "amin": (lambda x: torch.amin(x, (2, 3), keepdim=True), 4),
    "roll": (lambda x: x.roll(1, 2), 4),
    "flip": (lambda x: torch.flip(x, (2,)), 4),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 8),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), 8),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1, -1), 4),
    "unflatten": (lambda x: x.unflatten(1, (2, 2)).flatten(1, 2), 4),
}


@pytest.mark.parametrize("name", SHARING)
def test_ops_that_share(name: str) -> None:
    function, channels = SHARING[name]
    if name in ("relu", "relu6", "hardtanh") or name.startswith("clamp"):
        function = nn.Sequential(nn.MaxPool2d(2), _Call(function))  # behind a convolution it fuses
    gm = annotated(Between(function, channels), IMAGES)
    names = op_between(gm)
    assert names
    for node in names:
        found = annotation(gm, node)
        assert found.shares
        assert found.output is not None
        assert found.output.short() == UINT8
        assert all(spec == found.output for spec in found.inputs)
    assert annotation(gm, "before").output is not None


@pytest.mark.parametrize("name", SHARING)
def test_ops_that_share_stay_float_between_float_ops(name: str) -> None:
    function, _ = SHARING[name]
    gm = annotated(Alone(function), IMAGES)
    ops = [n for n in gm.graph.nodes if n.op.startswith("call_") and n.name != "exp"]
    for node in ops:
        assert record_of(node).annotation is None
        assert (
            "no integers come in and none are wanted, so int8 would add conversions only"
            in record_of(node).reasons
        )


WORTH_ALONE = ("max_pool2d", "F.max_pool2d", "cat")


@pytest.mark.parametrize("name", SHARING)
def test_ops_that_share_before_the_output(name: str) -> None:
    """Integers come in and nobody wants any: only what is much faster on bytes takes them."""
    function, _ = SHARING[name]
    gm = annotated(nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(1), _Call(function)), IMAGES)
    mover = node_named(gm, "_1").next
    if name in WORTH_ALONE:
        assert annotation(gm, mover.name).shares
    else:
        assert record_of(mover).annotation is None
        assert reasons(gm, mover.name).startswith("it keeps the scale of its input, and nobody")


# -- ops with parameters of their own -------------------------------------------------------------

TWO = torch.randn(1, 4, 8, 8)
WEIGHTED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "conv1d": (nn.Conv1d(4, 4, 1), (1, 4, 6), "int8 per-channel(0) sym -128..127"),
    "conv2d": (nn.Conv2d(4, 4, 1), (1, 4, 6, 6), "int8 per-channel(0) sym -128..127"),
    "conv3d": (nn.Conv3d(4, 4, 1), (1, 4, 4, 4, 4), "int8 per-channel(0) sym -128..127"),
    "linear": (nn.Linear(4, 4), (2, 4), "int8 per-channel(0) sym -128..127"),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 4, 1), (1, 4, 6), "int8 sym -128..127"),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 4, 1), (1, 4, 6, 6), "int8 sym -128..127"),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 4, 1), (1, 4, 4, 4, 4), "int8 sym -128..127"),
}


@pytest.mark.parametrize("kind", WEIGHTED)
def test_ops_with_weights(kind: str) -> None:
    """The result is read in floating point, so it is written so where the kernel can."""
    op, shape, weight = WEIGHTED[kind]
    gm = annotated(nn.Sequential(op), torch.randn(shape))
    found = annotation(gm, "_0")
    assert [spec.short() for spec in found.inputs if spec is not None] == [UINT8]
    assert found.weight is not None
    assert found.weight.short() == weight
    assert (found.output is None) == (not kind.startswith("conv_transpose"))
    assert not found.shares
    if kind.startswith("conv_transpose"):
        assert "weight per tensor instead of per channel" in reasons(gm, "_0")


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "mul": torch.mul,
    "matmul": torch.matmul,
}


class Binary(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, wanted: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(1)
        self.function = function
        self.after = nn.Conv2d(4, 4, 1) if wanted else nn.Softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.pool(x), x))


@pytest.mark.parametrize("name", BINARY)
def test_ops_of_two_tensors(name: str) -> None:
    gm = annotated(Binary(BINARY[name], wanted=True), IMAGES)
    found = annotation(gm, name)
    assert [spec.short() for spec in found.inputs if spec is not None] == [UINT8, UINT8]
    assert found.output is not None
    gm = annotated(Binary(BINARY[name], wanted=False), IMAGES)
    assert record_of(node_named(gm, name)).annotation is None
    assert "its result is only read in floating point (by 'after')" in reasons(gm, name)


@pytest.mark.parametrize("op", [nn.BatchNorm2d(4), nn.LeakyReLU(0.1)])
def test_unfused_normalisation_and_leaky_relu(op: nn.Module) -> None:
    gm = annotated(nn.Sequential(nn.MaxPool2d(1), op, nn.Conv2d(4, 4, 1)), IMAGES)
    assert annotation(gm, "_1").output is not None
    assert annotation(gm, "_1").weight is None


def test_every_row_of_the_target_is_tried_here() -> None:
    here = {name.removeprefix("F.") for name in (*SHARING, *WEIGHTED, *BINARY)}
    here |= {"batch_norm", "leaky_relu", "flatten", "view", "unsqueeze"} | set(FLOAT)
    here |= {"max_pool1d", "max_pool3d", "avg_pool3d", "detach"}  # other dimensions; removed before
    here |= {*LOOKED_UP, "bmm"}  # as matmul
    rows = target_named("x86").rows
    tried = {kind for kind, row in rows.items() if row.static and row.role is not Role.FLOAT}
    assert tried <= here  # those in FP32 by design, in every spelling: test_lowering_table


LOOKED_UP: dict[str, Function] = {
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm,
}


@pytest.mark.parametrize("name", LOOKED_UP)
def test_functions_with_a_scale_of_their_own(name: str) -> None:
    """Between integers they read and write integers; where nobody reads them, they are float."""
    gm = annotated(Between(nn.Sequential(nn.MaxPool2d(2), _Call(LOOKED_UP[name]))), IMAGES)
    found = annotation(gm, op_between(gm)[-1])
    assert not found.shares
    assert found.output is not None
    assert found.output.short() == UINT8
    assert all(spec == found.output for spec in found.inputs)
    alone = annotated(Alone(LOOKED_UP[name]), IMAGES)
    assert all(record_of(node).annotation is None for node in alone.graph.nodes)


# -- ops that stay in floating point --------------------------------------------------------------

FLOAT: dict[str, tuple[Function, str]] = {
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "an average has a far smaller range"),
    "adaptive_avg_pool1d": (
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 4)[..., None],
        "an average has a far smaller range",
    ),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d(4), "an average has a far smaller range"),
    "adaptive_avg_pool3d": (
        lambda x: F.adaptive_avg_pool3d(x[None], 4)[0],
        "an average has a far smaller range",
    ),
    "sigmoid": (nn.Sigmoid(), "quantized::sigmoid takes 122 us"),
    "softmax": (lambda x: F.softmax(x, 1), "quantized::softmax takes 89 us"),
    "where": (lambda x: torch.where(x > 0, x, x), "PyTorch selects bytes no faster"),
    "sort": (lambda x: x.sort()[0], "it gives values and indices"),
    "gelu": (F.gelu, "a table of 256 bytes 89"),
    "hardswish": (nn.Hardswish(), "quantized::hardswish takes 48 us"),
    "hardsigmoid": (nn.Hardsigmoid(), "the int8 kernel takes as long as"),
}
UNKNOWN: dict[str, tuple[Function, str]] = {
    "another function": (F.softsign, "no int8 kernel for 'softsign'"),
    "function": (torch.exp, "no int8 kernel for 'exp'"),
    "method": (lambda x: x.cos(), "no int8 kernel for 'cos'"),
    "module": (nn.Softsign(), "no int8 kernel for 'Softsign'"),
    "arguments that are not understood": (
        lambda x: torch.clamp(x, 0, 1, out=torch.empty(0)),
        "no int8 kernel for 'clamp'",
    ),
}
GUARDED: dict[str, tuple[Function, str]] = {
    "a number": (lambda x: x + 1.0, "operand 1.0 is a number"),
    "a constant": (lambda x: x * torch.ones(1), "is a constant tensor"),
    "alpha": (lambda x: torch.add(x, x, alpha=2), "alpha=2"),
    "indices": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        "indices",
    ),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), "mode='bicubic'"),
    "padding with ones": (lambda x: F.pad(x, (1, 1), value=1.0), "value=1.0"),
    "computed weight": (
        lambda x: F.conv2d(x, x.exp()[:, :, :1, :1].expand(4, 4, 1, 1)),
        "the weight is computed in the graph",
    ),
}


@pytest.mark.parametrize("name", [*FLOAT, *UNKNOWN, *GUARDED])
def test_floating_point_with_the_reason(name: str) -> None:
    function, reason = (FLOAT | UNKNOWN | GUARDED)[name]
    gm = annotated(nn.Sequential(nn.MaxPool2d(1), _Call(function), nn.Softmax(1)), IMAGES)
    said = [r for node in gm.graph.nodes for r in record_of(node).reasons]
    assert any(reason in one for one in said), said
    assert not [
        n
        for n in gm.graph.nodes
        if record_of(n).annotation is not None and any(reason in r for r in record_of(n).reasons)
    ]


def test_reading_the_shape_needs_no_reason() -> None:
    gm = annotated(Between(lambda x: x.view(x.size(0), *[4, 8, x.shape[3]])), IMAGES)
    for node in gm.graph.nodes:
        if node.name in ("size", "getattr_1"):
            assert not record_of(node).reasons


def test_float64_is_told_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).double().eval()
    with pytest.warns(
        ConfigWarning, match=r"2 op\(s\) .* '_0': .* is float64.*model\.float"
    ) as seen:
        gm = prepare_fx(model, {"": A}, (IMAGES.double(),))
    assert len(seen) == 1
    assert not observers(gm)
    assert torch.equal(gm(IMAGES.double()), model(IMAGES.double()))


def test_a_hook_keeps_its_module_in_floating_point() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].register_forward_pre_hook(lambda module, inputs: None)
    gm = annotated(model, IMAGES)
    assert record_of(node_named(gm, "_0")).annotation is None
    assert "forward hook(s) <lambda>" in reasons(gm, "_0")
    assert record_of(node_named(gm, "_1")).annotation is not None


def test_weight_norms_say_how_to_remove_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form is deprecated
        old = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
    new = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    model = nn.Sequential(old, new).eval()
    # prepare_fx of fxquant settles them itself
    gm = compat.prepare_fx(model, normalize({"": A}), (IMAGES,))
    assert "torch.nn.utils.remove_weight_norm" in reasons(gm, "_0")
    assert "remove_parametrizations" in reasons(gm, "_1")
    torch.testing.assert_close(gm(IMAGES), model(IMAGES))


class WritesAView(nn.Module):
    """An op that must stay in place: whoever reads the memory stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 1)
        self.two = nn.Conv2d(4, 4, 1)
        self.three = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y.flatten(2).relu_()
        return self.three(self.two(y))


def test_memory_that_is_written_in_place_is_not_quantized() -> None:
    gm = annotated(WritesAView(), IMAGES)
    for name in ("one", "flatten", "two"):
        assert record_of(node_named(gm, name)).annotation is None
        assert "'relu_' writes in place what may be the memory of" in reasons(gm, name)
    assert record_of(node_named(gm, "three")).annotation is not None


def test_the_ops_behind_a_refused_one_have_its_reason() -> None:
    conv = nn.Conv2d(4, 4, (2, 3), padding="same")
    gm = annotated(nn.Sequential(conv, nn.ReLU()), IMAGES)
    assert record_of(node_named(gm, "_1")).fusion is not None
    assert "behind '_0': padding='same'" in reasons(gm, "_1")


# -- without shapes -------------------------------------------------------------------------------


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, n: Any, batch: dict[str, Tensor]) -> Tensor:
        y = self.conv(x) * n
        return self.conv(y) + self.conv(batch["image"])


def test_what_may_be_no_float_tensor_is_not_observed() -> None:
    gm = prepare_fx(Inputs().eval(), {"": A}, None)
    watched = set(observers(gm).values())
    assert watched >= {"x", "getitem"}
    assert not watched & {"n", "batch"}
    assert "'n' may be something else than a float tensor" in reasons(gm, "mul")
    gm(IMAGES, torch.tensor(3), {"image": IMAGES})
    gm(IMAGES, 3, {"image": IMAGES})


# -- specs that cannot be honoured ----------------------------------------------------------------

PER_TENSOR_WEIGHT = MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
UNSERVED: dict[str, tuple[QConfig, str]] = {
    "activation dtype": (
        QConfig(MinMaxObserver.with_args(dtype=torch.int8), WEIGHT),
        r"'_0' \(conv2d\) stays in FP32: activation int8 affine -128\.\.127 is not served"
        r" \(possible: uint8\)",
    ),
    "float16": (
        QConfig(PlaceholderObserver.with_args(dtype=torch.float16), WEIGHT),
        r"'_0' \(conv2d\) stays in FP32: activation float16 is not served \(possible: uint8\)",
    ),
    "activation per channel": (
        QConfig(PerChannelMinMaxObserver.with_args(dtype=torch.uint8), WEIGHT),
        r"'_0' .* is per channel, kernels take per-tensor activations",
    ),
    "dynamic": (default_dynamic_qconfig, r"'_0' .*dynamic activation .* not served for 'conv2d'"),
    "weight dtype": (
        QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.uint8)),
        r"'_0' .*weight uint8 affine 0\.\.255 is not served \(possible: int8\)",
    ),
    "no weight": (QConfig(MinMaxObserver, None), r"'_0' .*its qconfig has no weight observer"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_a_spec_that_the_target_lacks(name: str) -> None:
    qconfig, message = UNSERVED[name]
    model = nn.Sequential(nn.Conv2d(4, 4, 1)).eval()
    with pytest.warns(ConfigWarning, match=message) as seen:
        gm = prepare_fx(model, {"": qconfig}, (IMAGES,))
    assert "its qconfig comes from global" in str(seen[0].message)
    assert "Choose a spec that the target has, or set None there" in str(seen[0].message)
    assert "config cannot be honoured" in reasons(gm, "_0")
    assert record_of(node_named(gm, "_0")).annotation is None
    with pytest.raises(StrictModeError, match="stays in FP32"):
        prepare_fx(model, {"": qconfig}, (IMAGES,), strict=True)


def test_a_qconfig_without_activation_is_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    with pytest.warns(ConfigWarning, match="'_0' .* observes no activation"):
        gm = annotated(model, IMAGES, mapping={"": QConfig(None, WEIGHT)})
    assert "the qconfig observes no activation" in reasons(gm, "_0")


def test_reuse_input() -> None:
    reuse = QConfig(default_reuse_input_observer, None)
    mapping = {"": A, "object_type": [("reshape", reuse)]}
    gm = annotated(Between(lambda x: x.reshape(1, 4, 8, 8)), IMAGES, mapping=mapping)
    assert annotation(gm, "reshape").output == annotation(gm, "before").output
    gm = annotated(
        Between(lambda x: x.sigmoid().reshape(1, 4, 8, 8)),
        IMAGES,
        mapping=mapping | {"module_name": [("before", None)]},
    )
    assert "it reuses its input's parameters" in reasons(gm, "reshape")


# -- golden ---------------------------------------------------------------------------------------


class Small(nn.Module):
    """A residual block, a branch that is only moved about, and a float head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        y = F.relu6(self.conv2(x) + x)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], 1)
        return self.fc(y.mean((2, 3))).softmax(-1)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("annotate", graph_text(annotated(Small(), IMAGES)))
