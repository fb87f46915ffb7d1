"""Side by side with torch.ao: the same losses, statistics and int8 weights after the same training.

Tests run ``fxquant.compat`` with torch.ao's fused fake quantizers and with fxquant's own. The
latter are compared with torch.ao's unfused ones, whose numbers they have: see
``test_the_fused_kernel_trains_with_other_scales_than_convert_keeps``.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant import compat
from fxquant.operators import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC
from fxquant.qat_modules import training_form

pytestmark = pytest.mark.peer

Forward = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Submodules by name, and what ``forward`` does with them."""

    def __init__(self, forward: Forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


@pytest.fixture(autouse=True)
def _torch_ao() -> Iterator[None]:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own, and ours on half ranges
        yield
    torch.backends.quantized.engine = engine


def torch_ao() -> Any:
    return importlib.import_module("torch.ao.quantization")


def torch_fx() -> Any:
    return importlib.import_module("torch.ao.quantization.quantize_fx")


def _seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X4, X2, X3, X5 = _seeded(4, 3, 8, 8), _seeded(6, 8), _seeded(4, 3, 9), _seeded(2, 3, 5, 5, 5)
BATCH_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _conv_bn_relu(dimensions: int, **options: Any) -> Model:
    return Model(
        lambda m, x: F.relu(m.bn(m.conv(x))),
        conv=CONVS[dimensions](3, 6, 3, **options),
        bn=BATCH_NORMS[dimensions](6),
    )


def _residual(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x))))) + x)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (lambda: Model(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 3)), X4),
    "conv-relu": (lambda: Model(lambda m, x: F.relu(m.conv(x)), conv=nn.Conv2d(3, 4, 3)), X4),
    "conv-bn": (
        lambda: Model(
            lambda m, x: m.bn(m.conv(x)),
            conv=nn.Conv2d(3, 4, 3, bias=False),
            bn=nn.BatchNorm2d(4, momentum=None),
        ),
        X4,
    ),
    "conv1d-bn-relu": (lambda: _conv_bn_relu(1), X3),
    "conv2d-bn-relu": (lambda: _conv_bn_relu(2, groups=3, stride=2, padding=1), X4),
    "conv3d-bn-relu": (lambda: _conv_bn_relu(3), X5),
    "linear-relu": (lambda: Model(lambda m, x: F.relu(m.fc(x)), fc=nn.Linear(8, 4)), X2),
    "linear-bn": (
        lambda: Model(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(8, 4), bn=nn.BatchNorm1d(4)),
        X2,
    ),
    "linear-bn-relu": (
        lambda: Model(lambda m, x: F.relu(m.bn(m.fc(x))), fc=nn.Linear(8, 4), bn=nn.BatchNorm1d(4)),
        X2,
    ),
    "functional linear": (
        lambda: Model(lambda m, x: F.linear(x, m.weight), weight=nn.Parameter(_seeded(4, 8))),
        X2,
    ),
    "residual": (
        lambda: Model(
            _residual,
            conv1=nn.Conv2d(3, 3, 3, padding=1),
            conv2=nn.Conv2d(3, 3, 3, padding=1),
            bn1=nn.BatchNorm2d(3),
            bn2=nn.BatchNorm2d(3),
        ),
        X4,
    ),
    "cat": (
        lambda: Model(
            lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 3, 3)
        ),
        X4,
    ),
    "pool-flatten-linear": (
        lambda: Model(
            lambda m, x: m.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(m.conv(x)), 1), 1)),
            conv=nn.Conv2d(3, 4, 3),
            fc=nn.Linear(4, 8),
        ),
        X4,
    ),
    "sigmoid": (
        lambda: Model(lambda m, x: torch.sigmoid(m.conv(x)), conv=nn.Conv2d(3, 4, 3)),
        X4,
    ),
    "bn-relu alone": (lambda: Model(lambda m, x: F.relu(m.bn(x)), bn=nn.BatchNorm2d(3)), X4),
    "two norms": (
        lambda: Model(
            lambda m, x: m.bn2(m.bn1(m.conv(x))),
            conv=nn.Conv2d(3, 3, 3),
            bn1=nn.BatchNorm2d(3),
            bn2=nn.BatchNorm2d(3),
        ),
        X4,
    ),
    "dropout": (
        lambda: Model(
            lambda m, x: m.b(m.drop(m.a(x))),
            a=nn.Conv2d(3, 3, 3),
            b=nn.Conv2d(3, 3, 3),
            drop=nn.Dropout(0.3),
        ),
        X4,
    ),
}


def lively(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None  # noqa: PT018
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.train()


def train(model: nn.Module, x: Tensor, steps: int = 5) -> list[float]:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        y = model(x * (1 + 0.1 * step) if x.is_floating_point() else x)
        target = torch.randn(y.shape, generator=torch.Generator().manual_seed(step))
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@dataclass
class Trained:
    """One library's model after training, at all stages."""

    losses: list[float]
    prepared: fx.GraphModule
    reference: fx.GraphModule
    int8: fx.GraphModule

    @property
    def statistics(self) -> list[list[float]]:
        buffers = self.prepared.named_buffers()
        return sorted(b.flatten().tolist() for n, b in buffers if "running_" in n)

    @property
    def counts(self) -> dict[str, int]:
        observers = [n for n in self.prepared.graph.nodes if "activation_post" in str(n.target)]
        return {
            "observers": len(observers),
            "quantize": _steps(self.reference, "quantize"),
            "dequantize": _steps(self.reference, "dequantize"),
            "lowered quantize": _steps(self.int8, "quantize"),
            "lowered dequantize": _steps(self.int8, "dequantize"),
        }


def _steps(gm: fx.GraphModule, what: str) -> int:
    """Quantize or dequantize steps of activations, and of weights that are read as floats."""
    count = 0
    for node in gm.graph.nodes:
        name = str(node.target)
        if node.target in (QUANTIZE, QUANTIZE_DYNAMIC) or "quantize_per_" in name:
            count += what == "quantize"
        elif node.target is DEQUANTIZE:
            is_stored = node.args[0].op == "get_attr"  # an integer weight: no step of its own
            count += what == "dequantize" and not is_stored
        elif name == "dequantize" or node.target is torch.dequantize:
            count += what == "dequantize"
    return count


def side_by_side(
    make: Callable[[], nn.Module], x: Tensor, mapping: Callable[[Any], Any], *, own: bool
) -> tuple[Trained, Trained]:
    """torch.ao and fxquant.compat, trained alike."""
    model = lively(make)
    results = []
    for library, qconfigs in (
        (torch_fx(), torch_ao()),
        (compat, compat if own else torch_ao()),
    ):
        prepared = library.prepare_qat_fx(copy.deepcopy(model), mapping(qconfigs), (x,))
        losses = train(prepared, x)
        prepared.eval()
        reference = library.convert_to_reference_fx(copy.deepcopy(prepared))
        int8 = library.convert_fx(copy.deepcopy(prepared))
        results.append(Trained(losses, prepared, reference, int8))
    return results[0], results[1]


def integer_weights(trained: Trained) -> list[Tensor]:
    """Of torch.ao's quantized modules and packed attributes, or of our reference graph."""
    found = []
    for module in trained.int8.modules():
        weight = getattr(module, "weight", None)
        made = weight() if callable(weight) else None
        if isinstance(made, Tensor) and made.is_quantized:
            found.append(made.int_repr())
    if not found:
        buffers = trained.int8.named_buffers()
        found = [b for n, b in buffers if n.endswith("weight") and b.dtype is torch.int8]
    return sorted(found, key=lambda w: (w.numel(), w.flatten()[:20].tolist()))


def default_mapping(names: Any) -> Any:
    """Fused fake quantizers."""
    return names.get_default_qat_qconfig_mapping("x86")


def unfused_mapping(names: Any) -> Any:
    return names.get_default_qat_qconfig_mapping("x86", 0)


@pytest.mark.statement("S4.2a")
@pytest.mark.parametrize("own", [True, False], ids=["own qconfigs", "torch.ao's"])
@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same(name: str, own: bool) -> None:
    make, x = CASES[name]
    mapping = unfused_mapping if own else default_mapping
    theirs, ours = side_by_side(make, x, mapping, own=own)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=0)
    assert ours.statistics == theirs.statistics
    assert ours.counts == theirs.counts
    weights = list(zip(integer_weights(ours), integer_weights(theirs), strict=False))
    assert weights or "functional" in name or "alone" in name
    assert all(torch.equal(mine, other.reshape(mine.shape)) for mine, other in weights)
    observers = [m for n, m in ours.prepared.named_modules() if n.startswith("activation_post")]
    step = float(observers[-1].scale if hasattr(observers[-1], "scale") else 1 / 256)
    torch.testing.assert_close(ours.int8(x), theirs.int8(x), rtol=0, atol=step * 1.001)


@pytest.mark.parametrize("engine", ["qnnpack", "onednn"])
def test_other_defaults(engine: str) -> None:
    theirs, ours = side_by_side(
        lambda: _conv_bn_relu(2),
        X4,
        lambda names: names.get_default_qat_qconfig_mapping(engine, 0),
        own=True,
    )
    assert ours.losses == theirs.losses
    assert all(map(torch.equal, integer_weights(ours), integer_weights(theirs)))


@pytest.mark.parametrize("own", [True, False])
def test_dynamic(own: bool) -> None:
    def mapping(names: Any) -> Any:
        return names.QConfigMapping().set_global(names.default_dynamic_qat_qconfig)

    def make() -> nn.Module:
        return Model(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(8, 16), b=nn.Linear(16, 3))

    theirs, ours = side_by_side(make, X2, mapping, own=own)
    assert ours.losses == theirs.losses
    assert ours.counts == theirs.counts
    assert all(map(torch.equal, integer_weights(ours), integer_weights(theirs)))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "bits", ["default_embedding_qat_qconfig", "default_embedding_qat_qconfig_4bit"]
)
@pytest.mark.parametrize("table", [nn.Embedding(10, 4), nn.EmbeddingBag(10, 4, mode="sum")])
def test_tables(table: nn.Module, bits: str, own: bool) -> None:
    """torch.ao has no reference form of a trained table."""
    ids = torch.tensor([[1, 2, 0], [9, 3, 3]])
    model = lively(lambda: Model(lambda m, x: m.table(x), table=copy.deepcopy(table)))
    outputs = []
    for library, names in ((torch_fx(), torch_ao()), (compat, compat if own else torch_ao())):
        mapping = names.QConfigMapping().set_object_type(type(table), getattr(names, bits))
        prepared = library.prepare_qat_fx(copy.deepcopy(model), mapping, (ids,))
        losses = train(prepared, ids)
        outputs.append((losses, library.convert_fx(prepared.eval())(ids)))
    assert outputs[0][0] == outputs[1][0]
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_a_layer_in_float_and_an_empty_mapping() -> None:
    def none_for_one(names: Any) -> Any:
        return unfused_mapping(names).set_module_name("conv2", None)

    for mapping in (none_for_one, lambda names: names.QConfigMapping()):
        theirs, ours = side_by_side(CASES["residual"][0], X4, mapping, own=True)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=0)
        assert ours.counts == theirs.counts


def test_frozen_statistics_train_alike() -> None:
    theirs_module = importlib.import_module("torch.ao.nn.intrinsic.qat")
    model = lively(lambda: _conv_bn_relu(2))
    losses = []
    for library, names, freeze in (
        (torch_fx(), torch_ao(), theirs_module.freeze_bn_stats),
        (compat, compat, compat.freeze_bn_stats),
    ):
        prepared = library.prepare_qat_fx(copy.deepcopy(model), unfused_mapping(names), (X4,))
        train(prepared, X4, 2)
        prepared.apply(freeze)
        prepared.train()
        losses.append(train(prepared, X4, 3))
    assert losses[0] == losses[1]


def test_switches_of_torch_ao_reach_their_fake_quantizers_in_our_modules() -> None:
    prepared = compat.prepare_qat_fx(
        lively(lambda: _conv_bn_relu(2)), default_mapping(torch_ao()), (X4,)
    )
    prepared(X4)
    for switch, buffer in (
        (torch_ao().disable_observer, "observer_enabled"),
        (torch_ao().disable_fake_quant, "fake_quant_enabled"),
    ):
        prepared.apply(switch)
        flags = [int(b) for n, b in prepared.named_buffers() if n.endswith(buffer)]
        assert flags == [0] * len(flags)
        assert len(flags) == 3


NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "mobilenet_v2": {},
    "mobilenet_v3_large": {},
    "shufflenet_v2_x1_0": {},
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}
QUICK = ("resnet18", "shufflenet_v2_x1_0")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NETWORKS]
)
def test_networks_of_torchvision(name: str) -> None:
    from fxquant.models_zoo.torchvision_import import import_torchvision

    import_torchvision()
    models = importlib.import_module("torchvision.models.quantization")
    make, options = getattr(models, name), NETWORKS[name]
    side = 96 if name == "inception_v3" else 64
    theirs, ours = side_by_side(
        lambda: make(quantize=False, num_classes=10, **options),
        _seeded(2, 3, side, side),
        default_mapping,
        own=False,
    )
    assert ours.losses == theirs.losses
    assert ours.counts == theirs.counts
    mine, other = integer_weights(ours), integer_weights(theirs)
    assert len(mine) == len(other) > 20
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(mine, other, strict=True))


@pytest.mark.slow
def test_auxiliary_results() -> None:
    from fxquant.models_zoo.torchvision_import import import_torchvision

    import_torchvision()
    models = importlib.import_module("torchvision.models.quantization")
    model = models.googlenet(quantize=False, num_classes=10, init_weights=False).train()
    x = _seeded(2, 3, 96, 96)
    results = []
    for library in (torch_fx(), compat):
        prepared = library.prepare_qat_fx(copy.deepcopy(model), default_mapping(torch_ao()), (x,))
        torch.manual_seed(1)  # of its dropouts
        trained = prepared(x)
        results.append((*trained, *library.convert_fx(prepared.eval())(x)))
    assert len(results[0]) == 6
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


# -- where torch.ao is wrong ----------------------------------------------------------------------


def test_gamma_zero_is_nan_in_torch_ao() -> None:
    model = lively(lambda: _conv_bn_relu(2))
    with torch.no_grad():
        model.bn.weight[0] = 0  # as zero_init_residual sets it
    theirs = torch_fx().prepare_qat_fx(copy.deepcopy(model), default_mapping(torch_ao()), (X4,))
    assert torch.isnan(theirs(X4)).any()
    ours = compat.prepare_qat_fx(model, default_mapping(torch_ao()), (X4,))
    assert torch.isfinite(ours(X4)).all()


def test_the_fused_kernel_gives_channels_of_one_sign_a_zero_point_in_training_only() -> None:
    """int8 has none: torch.ao trains such a channel with half the step that int8 will have."""
    weight = torch.tensor([[0.1, 0.4], [-0.2, 0.3]])
    theirs = torch_ao().default_fused_per_channel_wt_fake_quant()
    theirs(weight)
    assert theirs.zero_point.tolist() == [-128, 0]
    assert theirs.calculate_qparams()[1].tolist() == [0, 0]
    ours = compat.default_fused_per_channel_wt_fake_quant()
    ours(weight)
    assert ours.zero_point.tolist() == [0, 0]
    torch.testing.assert_close(ours.scale, theirs.calculate_qparams()[0], rtol=1e-6, atol=0)


def test_the_fused_kernel_trains_with_other_scales_than_convert_keeps() -> None:
    """``max(|low| / 128, |high| / 127)`` in training, ``max(|low|, |high|) / 127.5`` in int8."""
    weight = torch.tensor([[-0.5, 1.0], [-1.0, 0.5]])
    theirs = torch_ao().default_fused_per_channel_wt_fake_quant()
    theirs(weight)
    torch.testing.assert_close(theirs.scale, torch.tensor([1 / 127, 1 / 128]), rtol=1e-6, atol=0)
    kept = torch.tensor([1 / 127.5, 1 / 127.5])
    torch.testing.assert_close(theirs.calculate_qparams()[0], kept, rtol=1e-6, atol=0)
    ours = compat.default_fused_per_channel_wt_fake_quant()
    ours(weight)
    torch.testing.assert_close(ours.scale, kept, rtol=1e-6, atol=0)


def test_default_qconfigs_train_nearly_alike() -> None:
    """Scales that differ by 0.4 % round some values to a neighbour; training forgives it."""
    theirs, ours = side_by_side(CASES["residual"][0], X4, default_mapping, own=True)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0.02, atol=0)
    assert ours.counts == theirs.counts
    pairs = zip(integer_weights(ours), integer_weights(theirs), strict=True)
    worst = max(int((a.int() - b.int()).abs().max()) for a, b in pairs)
    assert 0 < worst <= 4


def test_transposed_convolutions_train_without_rounding_in_torch_ao() -> None:
    model = lively(lambda: Model(lambda m, x: m.up(x), up=nn.ConvTranspose2d(3, 3, 3)))
    theirs = torch_fx().prepare_qat_fx(copy.deepcopy(model), default_mapping(torch_ao()), (X4,))
    ours = compat.prepare_qat_fx(model, default_mapping(torch_ao()), (X4,))
    assert not hasattr(theirs.up, "weight_fake_quant")
    assert type(ours.up) is type(training_form(nn.ConvTranspose2d(1, 1, 1)))


def test_a_convolution_called_twice_keeps_its_batch_norm_apart() -> None:
    """torch.ao fuses the batch-norm of one call into both."""
    model = lively(
        lambda: Model(
            lambda m, x: m.conv(m.bn(m.conv(x))),
            conv=nn.Conv2d(3, 3, 1),
            bn=nn.BatchNorm2d(3),
        )
    )
    expected = copy.deepcopy(model)(X4)
    for library, wrong in ((torch_fx(), True), (compat, False)):
        prepared = library.prepare_qat_fx(copy.deepcopy(model), default_mapping(torch_ao()), (X4,))
        prepared.apply(torch_ao().disable_fake_quant)
        error = float((prepared(X4) - expected).abs().max().detach())
        assert (error > 0.1) is wrong


def test_batch_norms_that_torch_ao_refuses() -> None:
    for norm in (nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)):
        model = nn.Sequential(nn.Conv2d(3, 3, 3), norm).train()
        with pytest.raises(AssertionError, match="Only support fusing BatchNorm2d with"):
            torch_fx().prepare_qat_fx(copy.deepcopy(model), default_mapping(torch_ao()), (X4,))
        prepared = compat.prepare_qat_fx(model, default_mapping(torch_ao()), (X4,))
        prepared.apply(compat.disable_fake_quant)
        torch.testing.assert_close(prepared(X4), model(X4), rtol=1e-5, atol=1e-5)
