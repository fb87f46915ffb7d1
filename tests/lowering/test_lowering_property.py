"""Random small networks, all the way: no exception, float meaning kept, every kernel exact."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import CalibrationWarning, ConfigWarning, LoweringWarning
from fxquant.explain import explain
from fxquant.graph_module import QuantGraphModule
from fxquant.op_rows import Runs
from fxquant.optimize import optimize
from fxquant.parity import parity
from fxquant.qconfig_mapping import get_default_qconfig_mapping
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from tests.lowering.qconfigs import PER_CHANNEL

Step = tuple[str, int, int, int]
"""Operation, two operands (counted back from the last value), and a variant."""

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, F.relu6, lambda x: x.clamp(-0.3, 0.8), lambda x: F.hardtanh(x, 0.1, 0.9), F.silu,
    F.hardswish, torch.sigmoid, torch.tanh, F.gelu, lambda x: F.leaky_relu(x, 0.1),
    F.mish, lambda x: F.elu(x, 0.5), F.selu, lambda x: F.celu(x, 0.7), F.softplus, F.logsigmoid,
    lambda x: torch.softmax(x, 1), lambda x: F.group_norm(x, 2), F.instance_norm, torch.cos,
]  # fmt: skip
MOVES: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.max_pool2d(x, 3, 1, 1),
    lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.pad(x, (1, 0, 0, 1))[:, :, :-1, 1:],
    lambda x: x.flatten(2).view(x.shape),
    lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda x: x.transpose(2, 3).transpose(-1, -2),
    lambda x: F.interpolate(x, scale_factor=2)[:, :, ::2, ::2],
    lambda x: F.interpolate(F.max_pool2d(x, 2, ceil_mode=True), size=x.shape[2:], mode="bilinear"),
    lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
    lambda x: F.channel_shuffle(x, 4),
    lambda x: x.unsqueeze(1).squeeze(1),
    lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    lambda x: x.reshape(x.size(0), -1, x.size(2), x.size(3)),
    lambda x: torch.stack([x, x], 1)[:, 1],
    lambda x: x.roll((1, 2), (2, 3)),
    lambda x: x.flip(3),
    lambda x: x.amax(1, True).expand(-1, 8, -1, -1),
    lambda x: x.repeat(1, 2, 1, 1)[:, 4:12],
    lambda x: x.repeat_interleave(2, 1)[:, ::2],
    lambda x: x.unflatten(1, (2, -1)).flatten(1, 2),
    lambda x: F.pad(x, (1, 0, 0, 2), mode="reflect")[:, :, :-2, 1:],
    lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")[..., 1:-1, 1:-1],
    lambda x: torch.stack(x.unbind(1), 1),
    lambda x: x.swapdims(2, 3).movedim(3, 2),
]  # fmt: skip
CONSTANTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x + 0.5, lambda x: 2 - x, lambda x: x * 1.5, lambda x: x / 3, lambda x: -x,
    lambda x: x + torch.ones(8, 1, 1), lambda x: x * torch.linspace(0.5, 2, 8).reshape(8, 1, 1),
    lambda x: torch.ones_like(x) - x, lambda x: x.clamp(min=torch.tensor(-0.2)),
]  # fmt: skip
DTYPES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, z: torch.where(x > z, x, z),
    lambda x, z: x * (z > 0),
    lambda x, z: x.masked_fill(z < 0, 0.0),
    lambda x, z: (x.double() + z.double()).float(),
    lambda x, z: x.bfloat16().float() - z,
    lambda x, z: x.gather(1, z.argmax(1, keepdim=True)).expand(-1, 8, -1, -1),
    lambda x, z: x.sort(1)[0] + z.topk(8, 1).values,
    lambda x, z: x + F.one_hot(z.argmax(1), 8).permute(0, 3, 1, 2),
]  # fmt: skip


class Product(nn.Module):
    """A linear as a product with a constant."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.variant = variant
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        made = (
            lambda: x @ self.weight,
            lambda: torch.matmul(x, self.weight) + self.bias,
            lambda: F.linear(x, self.weight.t(), self.bias),
            lambda: torch.einsum("...i,oi->...o", x, self.weight),
            lambda: torch.addmm(self.bias, x.flatten(0, 2), self.weight).view(x.shape),
        )
        return made[self.variant % 5]()


def _module(op: str, variant: int) -> nn.Module | None:
    if op in ("conv", "residual", "block"):
        groups = (1, 1, 2, 8)[variant % 4]
        kernel, dilation = ((3, 1), (1, 1), (3, 2), (5, 1))[variant // 4 % 4]
        padding = dilation * (kernel // 2)
        bias = variant % 3 > 0
        mode = ("zeros", "zeros", "reflect", "replicate", "circular")[variant % 7 % 5]
        conv = nn.Conv2d(8, 8, kernel, 1, padding, dilation, groups, bias, mode)
        if variant % 5 == 0:
            norm = nn.BatchNorm2d(8)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            return nn.Sequential(conv, norm)
        return conv
    if op == "norm":
        norm = nn.BatchNorm2d(8)
        nn.init.normal_(norm.running_mean)
        return norm
    if op == "linear":
        return nn.Linear(8, 8) if variant % 3 else Product(variant)
    if op == "up":
        return nn.ConvTranspose2d(8, 8, (2, 3)[variant % 2], 1, padding=0)
    if op == "cat":
        return nn.Conv2d(16, 8, 1)
    return None


def _function(op: str, y: Tensor, z: Tensor, variant: int) -> Tensor:
    """The steps without a module."""
    if op == "add":
        made = y + z if variant % 3 else y + z[:, :1]
        return ACTIVATIONS[variant % 4](made) if variant % 2 else made
    if op == "mul":
        return y * torch.sigmoid(F.adaptive_avg_pool2d(z, 1)) if variant % 2 else y * z
    if op == "join":
        return (torch.maximum, torch.minimum, torch.sub, torch.add)[variant % 4](y, z)
    if op == "constant":
        return CONSTANTS[variant % len(CONSTANTS)](y)
    if op == "dtype":
        return DTYPES[variant % len(DTYPES)](y, z)
    if op == "product":
        return (
            (y @ z.transpose(-1, -2)) @ y
            if variant % 2
            else torch.bmm(
                torch.bmm(y.flatten(0, 1), z.flatten(0, 1).transpose(1, 2)), y.flatten(0, 1)
            ).view(y.shape)
        )
    if op == "act":
        return ACTIVATIONS[variant % len(ACTIVATIONS)](y)
    return MOVES[variant % len(MOVES)](y)


class Random(nn.Module):
    """A network of ``[N, 8, H, W]`` values; each step reads earlier ones."""

    def __init__(self, steps: list[Step], outputs: list[int], head: bool) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.ops = nn.ModuleDict()
        for index, (op, _, _, variant) in enumerate(steps):
            module = _module(op, variant)
            if module is not None:
                self.ops[str(index)] = module
        self.head = nn.Linear(8, 4) if head else None

    def forward(self, x: Tensor) -> Any:
        values = [self.stem(x)]
        for index, (op, left, right, variant) in enumerate(self.steps):
            y, z = values[-1 - left % len(values)], values[-1 - right % len(values)]
            values.append(self._step(str(index), op, y, z, variant))
        chosen = [values[-1 - index % len(values)] for index in self.outputs]
        if self.head is None:
            return chosen[0] if len(chosen) == 1 else tuple(chosen)
        return tuple(self.head(value.mean((2, 3))) for value in chosen)

    def _step(self, index: str, op: str, y: Tensor, z: Tensor, variant: int) -> Tensor:
        if op in ("conv", "norm"):
            return self.ops[index](y)
        if op == "residual":
            made = z + self.ops[index](y) if variant % 2 else self.ops[index](y) + z
            return ACTIVATIONS[variant // 2 % 4](made) if variant % 3 else made
        if op == "block":
            return ACTIVATIONS[variant % len(ACTIVATIONS)](self.ops[index](y))
        if op == "linear":
            return self.ops[index](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if op == "up":
            return F.interpolate(self.ops[index](y), size=y.shape[2:])
        if op == "again":  # one module called twice
            return self.stem(y[:, :3])
        if op == "cat":
            return self.ops[index](torch.cat([y, z], 1))
        return _function(op, y, z, variant)


_OPS = ["conv"] * 3 + ["residual"] * 5 + ["block"] * 4 + ["act"] * 3 + ["add"] * 2
_OPS += ["move"] * 4 + ["cat"] * 2 + ["mul", "norm", "linear", "up", "again"]
_OPS += ["constant"] * 2 + ["dtype"] * 2 + ["join"] * 2 + ["product"]

STEPS = st.lists(
    st.tuples(st.sampled_from(_OPS), st.integers(0, 3), st.integers(0, 3), st.integers(0, 59)),
    min_size=1,
    max_size=9,
)


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _check(steps: list[Step], outputs: list[int], head: bool, seed: int, default: bool) -> None:
    torch.manual_seed(seed)
    model = Random(steps, outputs, head).eval()
    note(f"{steps=} {outputs=} {head=} {seed=} {default=}")
    x, larger = torch.randn(2, 3, 6, 8), 3 * torch.randn(3, 3, 8, 4)
    mapping = get_default_qconfig_mapping() if default else {"": PER_CHANNEL}
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*because of their dtype", ConfigWarning)  # told so
        warnings.filterwarnings("ignore", ".*below the smallest scale", CalibrationWarning)
        prepared = prepare_fx(model, mapping, (x,))
        for expected, found in zip(_flat(model(x)), _flat(prepared(x)), strict=True):
            scale = float(expected.abs().max()) or 1.0
            assert float((expected - found).abs().max()) <= 1e-5 * scale
        reference, int8 = convert_to_reference_fx(prepared), convert_fx(prepared)
        for batch in (x, larger, x.contiguous(memory_format=torch.channels_last)):
            report = parity(reference, int8, (batch,))
            assert report.ok, f"\n{report}\n{int8.graph}"
            given, wanted = _flat(int8(batch)), _flat(reference(batch))
            again = _flat(int8(batch))
            for a, b, c in zip(given, wanted, again, strict=True):
                assert a.shape == b.shape
                assert torch.equal(a, c)
        _check_optimized(int8, (x, larger, x.contiguous(memory_format=torch.channels_last)))
    for gm in (prepared, reference, int8):
        for row in explain(gm).rows:
            assert row.runs is not Runs.FP32 or row.reason, row
            assert "please report" not in row.reason, row
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def _check_optimized(int8: QuantGraphModule, batches: tuple[Tensor, ...]) -> None:
    """The native plan gives the model's numbers; where there is none here, nothing is to check."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optimize changes nothing", LoweringWarning)
        optimized = optimize(int8)
    for batch in batches:
        optimized(batch)  # makes the plan, and an error of the warning that it differs
        for a, b in zip(_flat(int8(1.7 * batch)), _flat(optimized(1.7 * batch)), strict=True):
            assert torch.equal(a, b)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(STEPS, st.lists(st.integers(0, 2), min_size=1, max_size=2), st.booleans(),
       st.integers(0, 99), st.just(False))  # fmt: skip
def test_random_networks(
    steps: list[Step], outputs: list[int], head: bool, seed: int, default: bool
) -> None:
    _check(steps, outputs, head, seed, default)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS, st.lists(st.integers(0, 3), min_size=1, max_size=3), st.booleans(),
       st.integers(0, 10_000), st.booleans())  # fmt: skip
def test_many_random_networks(
    steps: list[Step], outputs: list[int], head: bool, seed: int, default: bool
) -> None:
    _check(steps, outputs, head, seed, default)
