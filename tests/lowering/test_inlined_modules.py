"""Modules that stay in FP32 become calls of their functions: the same numbers, every option."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxquant.op_catalog import KINDS
from fxquant.quantize_fx import convert_fx, prepare_fx

VECTOR, SIGNAL, IMAGE, VOLUME = (8,), (8, 12), (8, 6, 6), (8, 4, 4, 4)

SHAPES = ((1, SIGNAL), (2, IMAGE), (3, VOLUME))
MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(8, 4), VECTOR),
    (nn.Linear(8, 4, bias=False), VECTOR),
    (nn.Conv1d(8, 4, 3, 2, 1, bias=False), SIGNAL),
    (nn.Conv2d(8, 4, 3, 2, 1, 2, 4), IMAGE),
    (nn.Conv2d(8, 4, 3, padding="same"), IMAGE),
    (nn.Conv3d(8, 4, 2), VOLUME),
    (nn.ConvTranspose1d(8, 4, 3, 2, 1, 1), SIGNAL),
    (nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, 2, False, 1), IMAGE),
    (nn.ConvTranspose3d(8, 4, 2, dilation=2), VOLUME),
    (nn.BatchNorm1d(8, eps=0.1), SIGNAL),
    (nn.BatchNorm2d(8), IMAGE),
    (nn.BatchNorm2d(8, affine=False), IMAGE),
    (nn.BatchNorm2d(8, track_running_stats=False), IMAGE),
    (nn.BatchNorm3d(8), VOLUME),
    (nn.LayerNorm(6, eps=0.1), IMAGE),
    (nn.LayerNorm([6, 6], elementwise_affine=False), IMAGE),
    (nn.LayerNorm(8, bias=False), VECTOR),
    (nn.GroupNorm(2, 8), IMAGE),
    (nn.GroupNorm(4, 8, affine=False), IMAGE),
    (nn.InstanceNorm1d(8), SIGNAL),
    (nn.InstanceNorm2d(8, affine=True, eps=0.1), IMAGE),
    (nn.InstanceNorm3d(8), VOLUME),
    (nn.ReLU(), VECTOR),
    (nn.ReLU6(), VECTOR),
    (nn.Hardtanh(-2.0, 0.5), VECTOR),
    (nn.LeakyReLU(0.3), VECTOR),
    (nn.ELU(0.5), VECTOR),
    (nn.PReLU(), VECTOR),
    (nn.PReLU(8), IMAGE),
    (nn.GELU(), VECTOR),
    (nn.GELU("tanh"), VECTOR),
    (nn.SiLU(), VECTOR),
    (nn.Mish(), VECTOR),
    (nn.Hardswish(), VECTOR),
    (nn.Hardsigmoid(), VECTOR),
    (nn.Sigmoid(), VECTOR),
    (nn.Tanh(), VECTOR),
    (nn.Softmax(1), IMAGE),
    (nn.Softmax(-1), IMAGE),
    (nn.MaxPool1d(2), SIGNAL),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.MaxPool3d(2), VOLUME),
    (nn.AvgPool1d(2), SIGNAL),
    (nn.AvgPool1d(3, 2, 1, count_include_pad=False), SIGNAL),
    (nn.AvgPool2d(2, divisor_override=3), IMAGE),
    (nn.AvgPool3d(2), VOLUME),
    (nn.AdaptiveAvgPool1d(3), SIGNAL),
    (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.AdaptiveAvgPool2d((None, 2)), IMAGE),
    (nn.AdaptiveAvgPool3d(2), VOLUME),
    (nn.Upsample(scale_factor=2), IMAGE),
    (nn.Upsample(size=(9, 7), mode="bicubic"), IMAGE),
    (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), IMAGE),
    (nn.ZeroPad1d(1), SIGNAL),
    (nn.ZeroPad2d((1, 0, 2, 1)), IMAGE),
    (nn.ZeroPad3d(1), VOLUME),
    (nn.ConstantPad1d((1, 2), 0.5), SIGNAL),
    (nn.ConstantPad2d(2, 3.5), IMAGE),
    (nn.ConstantPad3d(1, -1.0), VOLUME),
    *((getattr(nn, f"ReflectionPad{d}d")(2), shape) for d, shape in SHAPES),
    *((getattr(nn, f"ReplicationPad{d}d")(2), shape) for d, shape in SHAPES),
    *((getattr(nn, f"CircularPad{d}d")(2), shape) for d, shape in SHAPES),
    *((getattr(nn, f"LPPool{d}d")(4, 2, 1, ceil_mode=True), shape) for d, shape in SHAPES),
    *((getattr(nn, f"AdaptiveMaxPool{d}d")(2), shape) for d, shape in SHAPES),
    (nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    (nn.UpsamplingBilinear2d(size=(9, 7)), IMAGE),
    (nn.RMSNorm(6, eps=0.1), IMAGE),
    (nn.RMSNorm([6, 6], elementwise_affine=False), IMAGE),
    (nn.CELU(0.5), VECTOR),
    (nn.SELU(), VECTOR),
    (nn.Softplus(2.0, 1.5), VECTOR),
    (nn.LogSigmoid(), VECTOR),
    (nn.LogSoftmax(1), IMAGE),
    (nn.Unflatten(1, (2, 4)), IMAGE),
    (nn.Flatten(), IMAGE),
    (nn.Flatten(0, 1), IMAGE),
    (nn.PixelShuffle(2), IMAGE),
    (nn.PixelUnshuffle(2), IMAGE),
    (nn.ChannelShuffle(2), IMAGE),
    (nn.Dropout(0.3), VECTOR),
    (nn.Dropout2d(), IMAGE),
]


def _float(model: nn.Module, x: Tensor) -> nn.Module:
    prepared = prepare_fx(nn.Sequential(model).eval(), {"": None}, (x,))
    return convert_fx(prepared)


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: str(value))
def test_every_option_of_every_module(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(module).eval()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.5)
    x = torch.randn(2, *shape)
    made = _float(module, x)
    with torch.no_grad():
        wanted = module(x)
        if isinstance(module, nn.Conv2d):  # lay-out-weights: the sums are in that kernel's order
            wanted = module.to(memory_format=torch.channels_last)(x)
        assert torch.equal(made(x), wanted)
    own = isinstance(module, nn.modules.batchnorm._BatchNorm)
    kept = own and module.track_running_stats is False
    assert any(node.op == "call_module" for node in made.graph.nodes) == kept


def test_every_module_of_the_catalogue_has_a_case() -> None:
    known = {module for kind in KINDS for module in kind.modules}
    functionless = {
        module
        for kind in KINDS
        if not kind.functions or kind.definition or not kind.activations  # look-ups of integers
        for module in kind.modules
    }
    assert known - {type(module) for module, _ in MODULES} <= functionless | {nn.Bilinear}


def test_an_instance_norm_with_stored_statistics_keeps_its_module() -> None:
    module = nn.InstanceNorm2d(8, track_running_stats=True).eval()
    x = torch.randn(2, *IMAGE)
    made = _float(module, x)
    assert any(node.op == "call_module" for node in made.graph.nodes)
    with torch.no_grad():
        assert torch.equal(made(x), module(x))


def test_tables_become_functions_and_recurrent_modules_stay() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8, padding_idx=1)
            self.bag = nn.EmbeddingBag(20, 8, mode="max", padding_idx=2)
            self.lstm = nn.LSTM(8, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lstm(self.table(tokens))[0].sum(2) + self.bag(tokens).sum(1, keepdim=True)

    tokens = torch.randint(0, 20, (3, 5))
    model = Tagger().eval()
    made = convert_fx(prepare_fx(model, {"": None}, (tokens,)))
    assert [n.target for n in made.graph.nodes if n.op == "call_module"] == ["lstm"]
    with torch.no_grad():
        assert torch.equal(made(tokens), model(tokens))


def test_hooks_and_padding_modes_keep_their_module() -> None:
    hooked, calls = nn.GELU(), []
    hooked.register_forward_hook(lambda *given: calls.append(1))
    x = torch.randn(2, 8)
    made = _float(hooked, x)
    calls.clear()
    made(x)
    assert calls == [1]
    module, image = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(_float(module, image)(image), module(image))


def test_a_module_in_training_mode_stays_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval()
    model[1].train()
    x = torch.ones(64, 8)
    made = convert_fx(prepare_fx(model, {"": None}, (x,)))
    assert 0.3 < float((made(x) == 0).float().mean()) < 0.7
    made.eval()
    assert torch.equal(made(x), model.eval()(x))
