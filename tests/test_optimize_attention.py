"""Attention, gelu and layer norm of native plans: torch's numbers, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import QuantGraphModule, optimize, quantize_dynamic
from fxquant.native import agreement, translate
from fxquant.optimize import OptimizedModel
from tests.native_machine import needs_native

pytestmark = [
    needs_native,
    pytest.mark.filterwarnings(
        "ignore::fxquant.LoweringWarning", "error:the native plan:fxquant.LoweringWarning"
    ),
]


class _Block(nn.Module):
    """A layer of a transformer; ``spelling`` says how the heads are split."""

    def __init__(self, width: int, heads: int, spelling: str = "unflatten", **given: Any) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, 1e-12)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads, self.spelling, self.given = heads, spelling, given
        for norm in (self.norm, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def _split(self, x: Tensor) -> Tensor:
        images, length, width = x.shape
        if self.spelling == "unflatten":
            return x.unflatten(2, (self.heads, width // self.heads)).transpose(1, 2)
        if self.spelling == "view":
            return x.view(images, length, self.heads, -1).permute(0, 2, 1, 3)
        return torch.transpose(
            torch.reshape(x, (images, length, self.heads, width // self.heads)), -3, -2
        )

    def _joined(self, x: Tensor) -> Tensor:
        if self.spelling == "unflatten":
            return x.transpose(1, 2).flatten(2)
        return x.transpose(1, 2).contiguous().reshape(x.shape[0], x.shape[2], -1)

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, **self.given)
        return self.o(self._joined(mixed.reshape(q.shape)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attended(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class _PreNorm(_Block):
    """The sum goes on beside the norm, so that the two stay apart."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _same(model: nn.Module, *inputs: Tensor) -> OptimizedModel:
    int8: QuantGraphModule = quantize_dynamic(model.eval())
    optimized = optimize(int8, inputs)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(optimized(*inputs), int8(*inputs))
    return optimized


def _kinds(optimized: OptimizedModel) -> list[str]:
    (program,) = optimized.plans()
    return [s.kind for s in program.plan.steps]


def _left(optimized: OptimizedModel) -> set[str]:
    (program,) = optimized.plans()
    return {getattr(n.target, "__name__", str(n.target)) for n in program.called}


@pytest.mark.parametrize("spelling", ["unflatten", "view", "reshape"])
@pytest.mark.parametrize("kind", [_Block, _PreNorm])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_runs_in_one_stretch(kind: type[_Block], spelling: str, batch: int) -> None:
    optimized = _same(kind(64, 4, spelling), torch.randn(batch, 48, 64) * 2)
    assert _left(optimized) <= {"add"}  # of what torch computed outside
    kinds = _kinds(optimized)
    assert kinds.count("attention") == 1
    assert kinds.count("layer_norm") == 2
    assert "float_map" not in kinds or kind is _PreNorm  # a gelu, and sums that only norms read


@pytest.mark.parametrize(
    ("width", "heads", "length"),
    [(64, 4, 16), (64, 1, 33), (96, 3, 32), (128, 1, 40), (192, 1, 64), (320, 4, 128), (64, 2, 192),
     (128, 2, 7), (64, 4, 197), (48, 2, 16), (512, 2, 32), (64, 2, 208), (64, 2, 320),
     (64, 2, 384), (64, 2, 400), (64, 2, 512), (32, 1, 528)],
)  # fmt: skip
def test_shapes_that_the_kernel_takes_and_others(width: int, heads: int, length: int) -> None:
    optimized = _same(_Block(width, heads), torch.randn(2, length, width))
    size = width // heads
    fits = length % 16 == 0 and size % 16 == 0 and length <= 512
    if not fits:
        assert "scaled_dot_product_attention" in _left(optimized)
        assert "scaled_dot_product_attention" in str(optimized)
    else:
        assert "attention" in _kinds(optimized)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    model, x = _Block(128, 4), torch.randn(1, 64, 128)
    int8 = quantize_dynamic(model.eval())
    expected, optimized = int8(x), optimize(int8, (x,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(10):
            assert torch.equal(optimized(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given", [{"is_causal": True}, {"scale": 0.3}], ids=str)
def test_options_of_the_attention(given: dict[str, Any]) -> None:
    optimized = _same(_Block(64, 4, **given), torch.randn(1, 32, 64))
    assert ("attention" in _kinds(optimized)) == ("scale" in given)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 4, 32, 48), (2, 1, 32, 48), (1, 4, 32, 48), (1, 1, 1, 48), (2, 1, 1, 48),
              (1, 1, 32, 1), (32, 48)],
    ids=str,
)  # fmt: skip
def test_masks(shape: tuple[int, ...], boolean: bool) -> None:
    class Masked(_Block):
        def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # two more
            q, k, v = (
                self._split(self.q(x)),
                self._split(self.k(memory)),
                self._split(self.v(memory)),
            )
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o(self._joined(mixed))

    mask = torch.randn(shape)
    mask[..., :3, -1:] = -float("inf")  # rows that see nothing, where keys share one number
    inputs = torch.randn(2, 32, 64), torch.randn(2, 48, 64), mask > -1 if boolean else mask
    optimized = _same(Masked(64, 4), *inputs)
    assert "attention" in _kinds(optimized)


def test_a_mask_that_is_expanded() -> None:
    class Expanded(_Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # one more
            wide = mask[:, None, None, :].ge(0).expand(-1, 4, x.shape[1], -1)
            q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
            return self.o(self._joined(F.scaled_dot_product_attention(q, k, v, wide)))

    optimized = _same(Expanded(64, 4), torch.randn(3, 32, 64), torch.randn(3, 32))
    assert "attention" in _kinds(optimized)


def test_keys_of_another_length() -> None:
    class Cross(_Block):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (
                self._split(self.q(x)),
                self._split(self.k(memory)),
                self._split(self.v(memory)),
            )
            return self.o(self._joined(F.scaled_dot_product_attention(q, k, v)))

    optimized = _same(Cross(64, 2), torch.randn(2, 24, 64), torch.randn(2, 80, 64))
    assert "attention" in _kinds(optimized)


def test_heads_that_torch_reads_too() -> None:
    class Shared(_Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k, v)
            weights = torch.softmax(q @ k.transpose(-2, -1), -1)
            return torch.cat(
                [mixed, weights @ v, self.k(x).unflatten(2, (4, 16)).permute(0, 2, 1, 3)]
            )

    optimized = _same(Shared(64, 4), torch.randn(1, 32, 64))
    assert "attention" in _kinds(optimized)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_rows_that_are_not_finite(value: float) -> None:
    """In the attention alone: what dynamic quantization makes of them is torch's own affair."""
    given = [torch.randn(1, 32, 64) for _ in range(3)]
    given[0][0, 3, 5] = value
    given[1][0, 7, :] = value
    shape, scale = (1, 32, 32, 2, 32), 32**-0.5
    builder, values, out = agreement._one_step(given, given[0].shape)
    reads = dict(zip(("query", "key", "value"), values, strict=True))
    builder.add("attention", reads, out, images=1, heads=2, scale=scale)
    found = agreement._run(builder, given, given[0].shape)
    split = [x.unflatten(2, (2, 32)).transpose(1, 2) for x in given]
    expected = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert agreement.agrees_on_attention(shape, scale)


@pytest.mark.parametrize("width", [8, 24, 128, 136, 768, 1024, 5000])
@pytest.mark.parametrize("spread", [1e-20, 1.0, 1e15])
def test_layer_norms(width: int, spread: float) -> None:
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8))
    optimized = _same(model, torch.randn(3, width) * spread + spread)
    assert _left(optimized) == set()


@pytest.mark.parametrize("width", [20, 7])
def test_layer_norms_of_other_widths_stay_with_torch(width: int) -> None:
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8))
    assert "layer_norm" in _left(_same(model, torch.randn(5, width)))


def test_layer_norms_without_constants_stay_with_torch() -> None:
    model = nn.Sequential(nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 8))
    assert "layer_norm" in _left(_same(model, torch.randn(5, 64)))


def test_gelus() -> None:
    """Every magnitude, both signs; absorbed by the linear before it or on its own."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(F.gelu(y)) + self.b(y)

    x = torch.randn(64, 16) * torch.logspace(-30, 4, 64)[:, None]
    assert "float_map" in _kinds(_same(Twice(), x))
    absorbed = _same(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), x)
    assert "float_map" not in _kinds(absorbed)
    approximate = nn.Sequential(nn.Linear(16, 64), nn.GELU("tanh"), nn.Linear(64, 16))
    assert "gelu" in _left(_same(approximate, x))


def test_a_gelu_of_channels_last_is_another_one() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).unflatten(1, (4, 8)).permute(0, 3, 1, 2)
            return self.b(F.gelu(y).permute(0, 2, 3, 1))

    assert "gelu" in _left(_same(Images(), torch.randn(2, 32, 16)))


def test_every_float_through_gelu() -> None:
    bits = torch.arange(0, 2**32, 997, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite()].reshape(1, -1)
    builder, values, out = agreement._one_step([x], x.shape)
    builder.add("float_map", {"a": values[0], "b": values[0]}, out, function=4)
    assert torch.equal(agreement._run(builder, [x], x.shape), F.gelu(x))


@pytest.mark.parametrize(
    ("name", "left"),
    [("agrees_on_gelu", "gelu"), ("agrees_on_layer_norm", "layer_norm"),
     ("agrees_on_attention", "scaled_dot_product_attention")],
)  # fmt: skip
def test_where_torch_computes_otherwise_it_keeps_the_node(
    name: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate, name, lambda *_: False)
    assert left in _left(_same(_Block(64, 4), torch.randn(1, 32, 64)))
