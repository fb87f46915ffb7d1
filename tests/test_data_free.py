"""Ranges without data: made-up inputs, batch-norms that normalize, observers that are fed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.channel_mean import ChannelMean
from fxquant.data_free import Estimate, estimate
from fxquant.errors import CalibrationError, CalibrationWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.models_zoo import registry
from fxquant.models_zoo.metrics import agreement, sqnr_db
from fxquant.passes.to_reference import is_observer
from fxquant.quantize import quantize
from fxquant.quantize_fx import prepare_fx
from fxquant.synthetic import dead_leaves, synthetic_like, textures


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _estimated(
    model: nn.Module, *inputs: Tensor, mean: float = 0.0, deviation: float = 1.0
) -> tuple[QuantGraphModule, Estimate]:
    prepared = prepare_fx(model, None, inputs)
    graph = capture(model, Diagnostics(), inputs)
    return prepared, estimate(prepared, graph, inputs, mean=mean, deviation=deviation)


def _range_of(prepared: QuantGraphModule, name: str) -> tuple[float, float]:
    """What the observer of a value has seen."""
    node = next(n for n in prepared.graph.nodes if n.name == name)
    watcher = next(user for user in node.users if is_observer(user))
    observer = prepared.get_submodule(str(watcher.target))
    return float(observer.min_val), float(observer.max_val)


# -- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 32, 32), (2, 1, 28, 40), (1, 3, 224, 224), (1, 2, 3, 16, 16), (3, 4, 1, 1), (5, 7)],
)
def test_inputs_have_the_shape_mean_and_deviation_that_are_wanted(shape: tuple[int, ...]) -> None:
    example = torch.zeros(shape)
    made = synthetic_like(example, 16, mean=0.5, deviation=0.2, generator=_generator())
    assert made.shape == (16, *shape[1:])
    assert made.isfinite().all()
    if math.prod(shape[1:]) < 100:
        return
    assert float(made.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(made.std()) == pytest.approx(0.2, rel=0.06)
    again = synthetic_like(example, 16, mean=0.5, deviation=0.2, generator=_generator())
    assert torch.equal(made, again)


def test_inputs_keep_their_dtype() -> None:
    made = synthetic_like(
        torch.zeros(2, 8, dtype=torch.float64), 4, mean=0, deviation=1, generator=_generator()
    )
    assert made.dtype is torch.float64


@pytest.mark.parametrize("maker", [dead_leaves, textures])
def test_pictures_are_smooth_at_all_scales_as_photographs_are(maker: object) -> None:
    """Neighbours correlate, and less so with distance; noise would have 0 everywhere."""
    assert callable(maker)
    pictures = maker(8, 3, 64, 64, generator=_generator())
    assert float(pictures.abs().max()) <= 2.5

    def correlation(distance: int) -> float:
        pair = torch.stack(
            [pictures[..., distance:].flatten(), pictures[..., :-distance].flatten()]
        )
        return float(torch.corrcoef(pair)[0, 1])

    near, middle, far = correlation(1), correlation(4), correlation(24)
    assert near > 0.6
    assert near > middle + 0.05 > far + 0.1
    channels = torch.corrcoef(pictures.movedim(1, 0).flatten(1))
    assert 0.5 < float(channels[0, 1]) < 0.95  # grey for the most part


def test_leaves_have_edges_and_plains() -> None:
    steps = dead_leaves(4, 1, 64, 64, generator=_generator()).diff(dim=-1).abs()
    assert float(steps.median()) < 0.25  # grain only
    assert float(steps.quantile(0.99)) > 1


# -- the run --------------------------------------------------------------------------------------


def test_a_batch_norm_gives_what_it_was_trained_to_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data.mul_(1000)  # the running statistics know nothing of it
    gamma, beta = torch.tensor([1.0, 0.5, 2.0, 1.0]), torch.tensor([3.0, 0.0, -1.0, 0.5])
    model[1].weight.data.copy_(gamma)
    model[1].bias.data.copy_(beta)
    prepared, found = _estimated(model, torch.zeros(1, 3, 32, 32))
    assert found == Estimate(blind=(), unnormalized=())
    means = [m for m in prepared.modules() if isinstance(m, ChannelMean)]
    torch.testing.assert_close(means[1].mean, beta.double(), rtol=1e-4, atol=1e-4)
    low, high = _range_of(prepared, "_0")
    assert -1 - 2 * 5 < low < -1 - 2 * 1.5
    assert 3 + 1.5 < high < 3 + 5


def test_everything_else_is_computed() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu6(self.conv(x) * 100)
            return self.head(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))  # type: ignore[no-any-return]  # nn.Module is untyped

    torch.manual_seed(0)
    prepared, found = _estimated(Gated().eval(), torch.zeros(2, 3, 16, 16), deviation=3.0)
    assert found.blind == ()
    assert _range_of(prepared, "relu6") == (0.0, 6.0)
    low, high = _range_of(prepared, "x")
    assert 0.9 * 2.2 * 3 < min(-low, high) <= max(-low, high) < 1.15 * 2.2 * 3


def test_other_inputs_are_those_of_the_example() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor, scale: Tensor, x: Tensor) -> Tensor:
            return self.head(self.table(ids) * scale + x)  # type: ignore[no-any-return]  # nn.Module is untyped

    ids, scale = torch.tensor([[1, 2, 3], [4, 5, 9]]), torch.tensor(2.0)
    prepared, found = _estimated(Looking().eval(), ids, scale, torch.zeros(2, 3, 8))
    assert found.blind == ()
    low, high = _range_of(prepared, "add")
    assert low < -3
    assert high > 3


def test_a_model_that_takes_one_batch_size_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(2, 4 * 36))  # type: ignore[no-any-return]  # nn.Module is untyped

    prepared, found = _estimated(Fixed().eval(), torch.zeros(2, 3, 8, 8))
    assert found.blind == ()
    watchers = [m for m in prepared.modules() if isinstance(m, ChannelMean)]
    assert int(watchers[0].count) == 2 * 8 * 8  # nothing is left of the run that failed


def test_a_batch_norm_of_single_values_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[2].running_mean.fill_(5.0)
    ids = torch.zeros(1, 8, dtype=torch.int64)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids.float())  # type: ignore[no-any-return]  # nn.Module is untyped

    wrapped = Wrapped().eval()
    _, found = _estimated(wrapped, ids)
    assert found.unnormalized == ("inner_2",)
    with pytest.warns(CalibrationWarning, match="running statistics of 'inner_2' were used"):
        quantize(wrapped, None, example_inputs=(ids,))


def test_the_model_is_not_touched_and_the_result_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    results = [_estimated(model, torch.zeros(1, 3, 16, 16))[0].state_dict() for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_inputs_that_do_not_run_are_told() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(bool((x == 7).all()), "only sevens")
            return self.head(x)  # type: ignore[no-any-return]  # nn.Module is untyped

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picky = Picky()

        def forward(self, x: Tensor) -> Tensor:
            return self.picky(x)  # type: ignore[no-any-return]  # nn.Module is untyped

    model, sevens = Outer().eval(), torch.full((1, 4), 7.0)
    prepared = prepare_fx(nn.Sequential(nn.Linear(4, 2)).eval(), None, (sevens,))
    graph = capture(model, Diagnostics(silent=True), (sevens,))
    with pytest.raises(CalibrationError, match=r"does not run.*only sevens.*Pass calibration data"):
        estimate(prepared, graph, (sevens,), mean=0.0, deviation=1.0)


# -- networks -------------------------------------------------------------------------------------


def _quality(name: str, **options: object) -> tuple[float, float]:
    """Agreement in percent and SQNR in dB, on the first fifty evaluation inputs."""
    entry = registry.load(name, **options)  # type: ignore[arg-type]  # forwarded
    inputs = torch.cat(entry.calibration)
    with pytest.warns(CalibrationWarning, match="without data"):
        int8 = quantize(
            entry.model,
            None,
            example_inputs=entry.example_inputs,
            input_mean=float(inputs.mean()),
            input_deviation=float(inputs.std()),
        )
    shown, _ = entry.evaluation[0]
    reference, made = entry.logits(entry.model, [shown]), entry.logits(int8, [shown])
    return agreement(reference, made), sqnr_db(reference, made)


def test_digits() -> None:
    same, noise = _quality("digits")
    assert same == 100
    assert noise > 36  # calibrated: 40


@pytest.mark.parametrize(
    ("name", "least", "noise"),
    [
        ("resnet20_cifar10", 96.0, 20.0),
        pytest.param("mobilenetv2_folded", 94.0, 18.0, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite0", 94.0, 17.0, marks=pytest.mark.slow),
        pytest.param("squeezenet1_1", 86.0, 23.0, marks=pytest.mark.slow),
    ],
)
def test_real_networks(name: str, least: float, noise: float, data_dir: object) -> None:
    same, found = _quality(name, data_dir=data_dir)
    assert same >= least
    assert found >= noise
