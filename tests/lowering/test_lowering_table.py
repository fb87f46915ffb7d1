"""Every row of the x86 table, in every spelling that the op catalogue knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.op_catalog import KIND_BY_NAME
from fxquant.targets.table import Role
from fxquant.targets.x86 import X86

Lower = Callable[..., Any]

_CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


@dataclass(frozen=True, kw_only=True)
class Row:
    """How to call the ops of one kind.

    Attributes:
        arguments: variants of the arguments after the activations, positional.
        modules: variants of the module form.
        shape: of the op's input, without the batch; channels first.
        other: the same at another resolution; ``None`` where the op or the head fixes it.
        binary: the op takes two activations.
        listed: the op takes a list of activations.
        constants: the op's weights, which a function reads from its module.
        skip: spellings that are tested elsewhere.
        scale: of the input.
    """

    arguments: tuple[tuple[Any, ...], ...] = ((),)
    modules: tuple[Callable[[], nn.Module], ...] = ()
    shape: tuple[int, ...] = (8, 10, 12)
    other: tuple[int, ...] | None = (8, 7, 9)
    binary: bool = False
    listed: bool = False
    constants: tuple[tuple[int, ...], ...] = ()
    skip: frozenset[str] = frozenset()
    scale: float = 1.0


def _conv_row(rank: int, module: type[nn.Module], *, transposed: bool = False) -> Row:
    shape = {1: (8, 17), 2: (8, 10, 12), 3: (8, 5, 6, 7)}[rank]
    other = {1: (8, 30), 2: (8, 7, 9), 3: (8, 6, 4, 5)}[rank]
    weight = (8, 4, *[3] * rank)
    modules = (
        lambda: module(8, 4, 3, stride=2, padding=1),
        lambda: module(8, 4, 3, groups=2, bias=False),
    )
    return Row(
        arguments=((), (2, 1)),
        modules=modules,
        shape=shape,
        other=other,
        constants=(weight, (4,)) if transposed else ((4, 8, *[3] * rank), (4,)),
    )


INDICES = frozenset(
    {
        str(function)  # no int8 kernel
        for function in (
            *(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices),
        )
    }
)
MM = frozenset({str(torch.mm), "mm"})  # takes matrices

ROWS: dict[str, Row] = {
    "conv1d": _conv_row(1, nn.Conv1d),
    "conv2d": _conv_row(2, nn.Conv2d),
    "conv3d": _conv_row(3, nn.Conv3d),
    "conv_transpose1d": _conv_row(1, nn.ConvTranspose1d, transposed=True),
    "conv_transpose2d": _conv_row(2, nn.ConvTranspose2d, transposed=True),
    "conv_transpose3d": _conv_row(3, nn.ConvTranspose3d, transposed=True),
    "linear": Row(
        modules=(lambda: nn.Linear(12, 9), lambda: nn.Linear(12, 9, bias=False)),
        shape=(8, 10, 12),
        other=(8, 3, 12),
        constants=((9, 12), (9,)),
    ),
    "matmul": Row(shape=(8, 11, 11), other=(8, 5, 5), binary=True, skip=MM),
    "bmm": Row(shape=(12, 12), other=(12, 12), binary=True),
    "group_norm": Row(
        arguments=((2,), (4, None, None, 1e-3)),
        modules=(lambda: _scaled(nn.GroupNorm(2, 8)), lambda: nn.GroupNorm(4, 8, affine=False)),
    ),
    "instance_norm": Row(
        modules=(
            lambda: nn.InstanceNorm2d(8),
            lambda: _scaled(nn.InstanceNorm2d(8, affine=True)),
        ),
    ),
    "elu": Row(
        arguments=((), (0.5,)), modules=(nn.ELU, lambda: nn.ELU(0.3, inplace=True)),
    ),
    "celu": Row(arguments=((), (0.5,)), modules=(nn.CELU, lambda: nn.CELU(0.3))),
    "selu": Row(modules=(nn.SELU,)),
    "mish": Row(modules=(nn.Mish, lambda: nn.Mish(inplace=True))),
    "softplus": Row(arguments=((), (2.0, 1.0)), modules=(nn.Softplus, lambda: nn.Softplus(0.7))),
    "logsigmoid": Row(modules=(nn.LogSigmoid,)),
    "tanh": Row(modules=(nn.Tanh,), scale=3.0),
    "maximum": Row(binary=True),
    "minimum": Row(binary=True),
    "amax": Row(arguments=(((2,), True), (2, True)), other=(8, 7, 12)),
    "amin": Row(arguments=(((1, 2), True), (1, True)), other=(8, 7, 12)),
    "roll": Row(arguments=(((1, -2), (2, 3)), (3, 1), (2, -1))),
    "flip": Row(arguments=(((2, 3),), ((1,),))),
    "repeat": Row(arguments=(((1, 2, 1, 1),), ((2, 1, 1, 2),)), other=(8, 7, 12)),
    "repeat_interleave": Row(arguments=((2, 1), (3, -1))),
    "unflatten": Row(
        arguments=((1, (2, 4)), (-1, (3, -1))), modules=(lambda: nn.Unflatten(1, (4, 2)),),
        other=(8, 7, 12),
    ),
    "expand": Row(arguments=(((-1, 8, 10, 12),), ((3, -1, 8, 10, 12),)), other=None),
    "batch_norm": Row(
        arguments=((),),
        modules=(lambda: _seen(nn.BatchNorm2d(8)),),
        constants=((8,), (-8,), (8,), (8,)),  # negative: a variance
    ),
    "add": Row(binary=True),
    "mul": Row(binary=True),
    "leaky_relu": Row(
        arguments=((), (0.2,), (1.5,)), modules=(nn.LeakyReLU, lambda: nn.LeakyReLU(0.3))
    ),
    "relu": Row(modules=(nn.ReLU, lambda: nn.ReLU(inplace=True))),
    "relu6": Row(scale=20.0, modules=(nn.ReLU6,)),
    "hardtanh": Row(
        arguments=((-0.4, 0.7),), modules=(nn.Hardtanh, lambda: nn.Hardtanh(-0.25, 0.5))
    ),
    "clamp": Row(arguments=((-0.4, 0.7), (None, 0.3), (0.1, None), (0.2, 0.9), (-0.5, -0.1))),
    "clamp_min": Row(arguments=((-0.3,), (0.2,))),
    "clamp_max": Row(arguments=((-0.1,), (0.4,))),
    "max_pool1d": Row(
        skip=INDICES,
        arguments=((3,), (3, 2, 1), (2, 1, 0, 2), (3, 2, 1, 1, True)),
        modules=(lambda: nn.MaxPool1d(3, 2, 1),),
        shape=(8, 17),
        other=(8, 30),
    ),
    "max_pool2d": Row(
        skip=INDICES,
        arguments=((2,), (3, 2, 1), ((2, 3), (1, 2), (0, 1)), (2, 1, 0, 2), (3, 2, 1, 1, True)),
        modules=(lambda: nn.MaxPool2d(3, 2, 1), lambda: nn.MaxPool2d(2, ceil_mode=True)),
        shape=(8, 11, 13),
    ),
    "max_pool3d": Row(
        skip=INDICES,
        arguments=((2,), (3, 2, 1), (2, 1, 0, 2), (3, 2, 1, 1, True)),
        modules=(lambda: nn.MaxPool3d(3, 2, 1), lambda: nn.MaxPool3d(2, ceil_mode=True)),
        shape=(8, 5, 6, 7),
        other=(8, 6, 4, 5),
    ),
    "avg_pool2d": Row(
        arguments=(
            (2,),
            (3, 2, 1),
            ((2, 3), (1, 2), (0, 1), True, False),
            (3, 2, 1, False, True, 5),
        ),
        modules=(lambda: nn.AvgPool2d(3, 2, 1), lambda: nn.AvgPool2d(2, divisor_override=3)),
        shape=(8, 11, 13),
    ),
    "avg_pool3d": Row(
        arguments=((2,), (3, 2, 1), (2, 1, 0, False, True, 5)),
        modules=(lambda: nn.AvgPool3d(3, 2, 1), lambda: nn.AvgPool3d(2, divisor_override=3)),
        shape=(8, 5, 6, 7),
        other=(8, 6, 4, 5),
    ),
    "interpolate": Row(
        arguments=((None, 2), ((7, 21), None), (None, 2.0, "bilinear"),
                   (None, (1.5, 0.7), "nearest"),
                   ((9, 9), None, "bilinear", True), (None, 1.3, "bilinear", None, True),
                   (None, 1.3, "bilinear", False, False)),
        modules=(lambda: nn.Upsample(scale_factor=2),
                 lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
                 lambda: nn.UpsamplingNearest2d(scale_factor=2),
                 lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    ),
    "pad": Row(
        arguments=(((1, 2),), ((0, 1, 2, 0),), ((-1, 2, 1, -2), "constant"),
                   ((1, 1, 1, 1), "constant", 0.0), ((1, 2, 3, 4), "reflect"),
                   ((1, 2, 3, 4), "replicate"), ((1, 2, 3, 4), "circular"),
                   ((1, 1, 2, 2, 3, 3), "replicate")),
        modules=(lambda: nn.ZeroPad2d((1, 0, 2, 1)), lambda: nn.ConstantPad2d(2, 0.0),
                 lambda: nn.ReflectionPad2d((1, 0, 2, 1)), lambda: nn.ReplicationPad2d(1),
                 lambda: nn.CircularPad2d((0, 1, 2, 3)), lambda: nn.ReplicationPad3d(1)),
    ),
    "cat": Row(arguments=((1,), (-1,), (0,)), listed=True),
    "stack": Row(arguments=((1,), (2,), (-1,)), listed=True, shape=(8, 17), other=(8, 5)),
    "flatten": Row(
        arguments=((1,), (2,), (1, 2), (-2, -1)), modules=(nn.Flatten, lambda: nn.Flatten(2)),
        other=None,
    ),
    "reshape": Row(arguments=(((-1, 8, 120),), ((-1, 80, 12),)), other=None),
    "view": Row(arguments=(((-1, 8, 120),), ((-1, 80, 12),)), other=None),
    "permute": Row(arguments=(((0, 2, 3, 1),), ((0, 1, 3, 2),)), other=(8, 10, 12)),
    "transpose": Row(arguments=((2, 3), (-1, 1)), other=(8, 10, 12)),
    "squeeze": Row(arguments=((), (2,), (-1,), (3,)), shape=(8, 1, 12), other=None),
    "unsqueeze": Row(arguments=((2,), (-1,)), shape=(8, 17), other=(8, 5)),
    "slice": Row(
        arguments=(
            ((slice(None), slice(None, None, 2)),),
            ((..., slice(1, -1)),),
            ((slice(None), slice(None), 3),),
            ((slice(0, 1),),),
        ),
    ),
    "chunk": Row(arguments=((2, 1, 0), (3, -1, 1), (2, 0, 1)), other=(8, 7, 12)),
    "split": Row(arguments=((3, 1, 0), ((2, 6), 1, 1), (5, -1, -1))),
    "tensor_split": Row(arguments=((3, 1, 2), ((2, 5), 1, 1))),
    "select": Row(arguments=((2, 1), (-1, -2))),
    "narrow": Row(arguments=((2, 1, 3), (1, 2, 4))),
    "contiguous": Row(),
    "detach": Row(),
    "pixel_shuffle": Row(
        arguments=((2,), (1,)), modules=(lambda: nn.PixelShuffle(2),), shape=(16, 5, 7),
        other=(16, 3, 4),
    ),
    "pixel_unshuffle": Row(
        arguments=((2,), (1,)), modules=(lambda: nn.PixelUnshuffle(2),), shape=(4, 6, 8),
        other=(4, 4, 2),
    ),
    "channel_shuffle": Row(
        arguments=((2,), (4,), (1,)), modules=(lambda: nn.ChannelShuffle(2),),
    ),
}  # fmt: skip


def _scaled(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def _seen(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    return norm


class Sandwich(nn.Module):
    """``head(op(pool(stem(x))))``: int8 comes in, int8 is wanted, and nothing can be fused."""

    def __init__(self, call: Callable[..., Tensor], row: Row, module: nn.Module | None) -> None:
        super().__init__()
        rank, channels = len(row.shape) + 1, row.shape[0]
        self.call, self.row, self.module = call, row, module
        self.stem = _CONV[rank](3, channels, 1)
        self.stem2 = _CONV[rank](3, channels, 1)
        for index, shape in enumerate(row.constants):
            value = (
                torch.rand([-s for s in shape]) + 0.3 if shape[0] < 0 else torch.randn(shape) / 3
            )
            setattr(self, f"constant{index}", nn.Parameter(value))
        self.pool = _POOL[rank]
        example = torch.zeros(2, 3, *row.shape[1:])
        self.head: Any = None
        with torch.no_grad():
            made = self.forward(example)
        conv = _CONV.get(made.dim())
        self.head = nn.Linear(made.shape[-1], 5) if conv is None else conv(made.shape[1], 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.stem(x), 1)
        if self.row.binary:
            given = (y, self.pool(self.stem2(x), 1))
            y = self.call(*given) if self.module is None else self.call(*given, self.module)
        elif self.row.listed:
            y = self.call([y, self.pool(self.stem2(x), 1)])
        elif self.module is not None:
            y = self.module(y)
        else:
            y = self.call(
                y, *(getattr(self, f"constant{i}") for i in range(len(self.row.constants)))
            )
        return y if self.head is None else self.head(y)


def _spellings() -> list[Any]:
    """Every function and method once, the first of each with all variants of the arguments."""
    found = []
    for kind, row in ROWS.items():
        entry = KIND_BY_NAME[kind]
        for form, names in (("function", entry.functions), ("method", entry.methods)):
            for position, name in enumerate(names):
                if str(name) in row.skip:
                    continue
                variants = row.arguments[: None if position == 0 and form == "function" else 1]
                for index, arguments in enumerate(variants):
                    shown = getattr(name, "__name__", f".{name}")
                    identity = f"{kind}-{form}-{shown}-{index}"
                    found.append(pytest.param(kind, (form, name, arguments), id=identity))
        found += [
            pytest.param(kind, ("module", make, ()), id=f"{kind}-module-{index}")
            for index, make in enumerate(row.modules)
        ]
    return found


def _model(kind: str, spelling: tuple[str, Any, tuple[Any, ...]]) -> Sandwich:
    form, what, arguments = spelling
    if form == "module":
        return Sandwich(operator.pos, ROWS[kind], what())
    if form == "function":
        return Sandwich(lambda *given: what(*given, *arguments), ROWS[kind], None)
    return Sandwich(lambda x, *given: getattr(x, what)(*given, *arguments), ROWS[kind], None)


def test_every_row_has_a_case() -> None:
    lowered = {kind for kind, row in X86.rows.items() if row.role is not Role.FLOAT and row.static}
    assert lowered == set(ROWS)  # those of float activations: test_lowering_dynamic


def test_every_form_has_a_case() -> None:
    for kind, row in ROWS.items():
        assert bool(row.modules) == bool(KIND_BY_NAME[kind].modules), kind


@pytest.mark.parametrize(("kind", "spelling"), _spellings())
def test_row(lower: Lower, kind: str, spelling: tuple[str, Any, tuple[Any, ...]]) -> None:
    row = ROWS[kind]
    x = row.scale * torch.randn(2, 3, *row.shape[1:])
    case = lower(_model(kind, spelling), x)
    report = case.check(x)
    if kind not in ("detach", "contiguous"):
        assert any(kind in r.kind.split("+") and not r.floating for r in report.rows), f"\n{report}"
    assert not any(r.kind == "dequantize" for r in report.rows), f"\n{report}"
    if len(row.shape) == 3 and kind != "view":  # in float, a view of channels_last is an error
        case.check(torch.randn(x.shape).contiguous(memory_format=torch.channels_last))
    case.check(2 * torch.randn(5, 3, *(row.other or row.shape)[1:]))


@dataclass(frozen=True, kw_only=True)
class Float:
    """How to call the ops of one kind that is in FP32 by design.

    Attributes:
        call: ``(op, y, z)`` -> a float tensor of four dimensions.
        modules: variants of the module form.
        row: shapes.
    """

    call: Callable[[Callable[..., Any], Tensor, Tensor], Tensor] = lambda op, y, z: op(y)
    modules: tuple[Callable[[], nn.Module], ...] = ()
    row: Row = Row(binary=True)


_COMPARED = Float(call=lambda op, y, z: torch.where(op(y, z), y, z))
_VALUES = Float(call=lambda op, y, z: op(y, 3)[0])
_SEQUENCE = Row(binary=True, shape=(8, 12), other=(8, 12))
_VOLUME = Row(binary=True, shape=(8, 5, 6, 7), other=(8, 6, 4, 5))
_LINE = Row(binary=True, shape=(8, 17), other=(8, 30))

FLOAT: dict[str, Float] = {
    "mean": Float(call=lambda op, y, z: op(y, (2, 3), keepdim=True)),
    "sum": Float(call=lambda op, y, z: op(y, (2, 3), keepdim=True)),
    "max": Float(call=lambda op, y, z: op(y, 2, keepdim=True)[0]),
    "min": Float(call=lambda op, y, z: op(y, 2, keepdim=True)[0]),
    "topk": _VALUES,
    "sort": Float(call=lambda op, y, z: op(y)[0]),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _COMPARED),
    "where": Float(call=lambda op, y, z: op(y > 0, y, z)),
    "sub": Float(call=lambda op, y, z: op(y, z)),
    "div": Float(call=lambda op, y, z: op(y, 2.5)),
    "baddbmm": Float(
        call=lambda op, y, z: op(y, z, y), row=Row(binary=True, shape=(12, 12), other=(12, 12))
    ),
    "addmm": Float(
        call=lambda op, y, z: torch.stack([op(y[0, 0], z[0, 0], y[0, 1])[None]]),
        row=Row(binary=True, shape=(8, 11, 11), other=(8, 5, 5)),
    ),
    "einsum": Float(
        call=lambda op, y, z: op("bchw,bcvw->bchv", y, z), row=Row(binary=True, other=None)
    ),
    "bilinear": Float(
        call=lambda op, y, z: op(y, z, torch.ones(5, 12, 12)),
        row=Row(binary=True, other=(8, 3, 12)),
        modules=(lambda: nn.Bilinear(12, 12, 5),),
    ),
    "scaled_dot_product_attention": Float(
        call=lambda op, y, z: op(y, z, z), row=Row(binary=True, other=(8, 3, 12))
    ),
    "multihead_attention": Float(row=_SEQUENCE),
    "transformer": Float(row=_SEQUENCE),
    "rnn": Float(row=_SEQUENCE, modules=(lambda: nn.RNN(12, 7, batch_first=True),)),
    "layer_norm": Float(
        call=lambda op, y, z: op(y, (12,)),
        row=Row(binary=True, other=(8, 3, 12)),
        modules=(
            lambda: _scaled(nn.LayerNorm(12)),
            lambda: nn.LayerNorm(12, elementwise_affine=False),
        ),
    ),
    "rms_norm": Float(
        call=lambda op, y, z: op(y, (12,)),
        row=Row(binary=True, other=(8, 3, 12)),
        modules=(lambda: _scaled(nn.RMSNorm(12)), lambda: nn.RMSNorm(12, elementwise_affine=False)),
    ),
    "softmax": Float(call=lambda op, y, z: op(y, 1), modules=(lambda: nn.Softmax(1),)),
    "log_softmax": Float(call=lambda op, y, z: op(y, 1), modules=(lambda: nn.LogSoftmax(1),)),
    "prelu": Float(
        call=lambda op, y, z: op(y, torch.tensor([0.2])),
        modules=(nn.PReLU, lambda: _scaled(nn.PReLU(8))),
    ),
    "silu": Float(modules=(nn.SiLU,)),
    "gelu": Float(modules=(nn.GELU, lambda: nn.GELU(approximate="tanh"))),
    "sigmoid": Float(modules=(nn.Sigmoid,)),
    "hardswish": Float(modules=(nn.Hardswish,)),
    "hardsigmoid": Float(modules=(nn.Hardsigmoid,)),
    "adaptive_avg_pool1d": Float(
        call=lambda op, y, z: op(y, 4), row=_LINE, modules=(lambda: nn.AdaptiveAvgPool1d(4),)
    ),
    "adaptive_avg_pool2d": Float(
        call=lambda op, y, z: op(y, (2, 3)), modules=(lambda: nn.AdaptiveAvgPool2d((2, 3)),)
    ),
    "adaptive_avg_pool3d": Float(
        call=lambda op, y, z: op(y, 2), row=_VOLUME, modules=(lambda: nn.AdaptiveAvgPool3d(2),)
    ),
    "adaptive_max_pool1d": Float(
        call=lambda op, y, z: op(y, 4), row=_LINE, modules=(lambda: nn.AdaptiveMaxPool1d(4),)
    ),
    "adaptive_max_pool2d": Float(
        call=lambda op, y, z: op(y, (2, 3)), modules=(lambda: nn.AdaptiveMaxPool2d((2, 3)),)
    ),
    "adaptive_max_pool3d": Float(
        call=lambda op, y, z: op(y, 2), row=_VOLUME, modules=(lambda: nn.AdaptiveMaxPool3d(2),)
    ),
    "avg_pool1d": Float(
        call=lambda op, y, z: op(y, 2), row=_LINE, modules=(lambda: nn.AvgPool1d(3, 2, 1),)
    ),
    "lp_pool1d": Float(
        call=lambda op, y, z: op(y, 2, 2), row=_LINE, modules=(lambda: nn.LPPool1d(2, 2),)
    ),
    "lp_pool2d": Float(call=lambda op, y, z: op(y, 2, 2), modules=(lambda: nn.LPPool2d(2, 2),)),
    "lp_pool3d": Float(
        call=lambda op, y, z: op(y, 2, 2), row=_VOLUME, modules=(lambda: nn.LPPool3d(2, 2),)
    ),
}

TAKEN_APART = ("multihead_attention", "transformer")  # tests/test_attention.py


def _float_spellings() -> list[Any]:
    found = []
    for kind, case in FLOAT.items():
        entry = KIND_BY_NAME[kind]
        for what in entry.functions:
            shown = getattr(what, "__name__", str(what))
            found.append(pytest.param(kind, what, None, id=f"{kind}-function-{shown}"))
        for what in entry.methods:
            found.append(pytest.param(kind, _method(what), None, id=f"{kind}-method-{what}"))
        for index, make in enumerate(case.modules):
            found.append(pytest.param(kind, None, make, id=f"{kind}-module-{index}"))
    return found


def _method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def test_every_float_row_has_a_case() -> None:
    assert {kind for kind, row in X86.rows.items() if row.role is Role.FLOAT} == set(FLOAT)
    for kind, case in FLOAT.items():
        if kind not in TAKEN_APART:
            assert bool(case.modules) == bool(KIND_BY_NAME[kind].modules), kind


@pytest.mark.parametrize(("kind", "what", "make"), _float_spellings())
def test_float_row(
    lower: Lower, kind: str, what: Callable[..., Any] | None, make: Callable[[], nn.Module] | None
) -> None:
    """By design between a dequantize and a quantize; the op says with which measurement."""
    case = FLOAT[kind]

    def call(y: Tensor, z: Tensor, module: nn.Module | None = None) -> Tensor:
        if module is None:
            assert what is not None
            return case.call(what, y, z)
        made = module(y, z) if kind == "bilinear" else module(y)
        return made[0] if kind == "rnn" else made  # type: ignore[no-any-return]  # of a module

    model = Sandwich(call, case.row, None if make is None else make())
    lowered = lower(model, torch.randn(2, 3, *case.row.shape[1:]))
    report = lowered.check(torch.randn(2, 3, *(case.row.other or case.row.shape)[1:]))
    assert not any(kind in row.kind.split("+") for row in report.rows), f"\n{report}"
    assert X86.rows[kind].reason in lowered.reasons()
