"""Eight threads, copies and pickles: a lowered model computes the same wherever it is called."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.engines import available, engine
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_table import KernelTable
from fxquant.kernel_tasks import FLOATS, Task
from fxquant.pairing import POINTWISE
from fxquant.qconfig import default_dynamic_qconfig, default_qconfig
from fxquant.quantize_fx import convert_fx, prepare_fx

THREADS = 8
ENGINES = [name for name in ("fbgemm", "onednn", "qnnpack") if available(name)]


class Residual(nn.Module):
    """Convolutions with every kind of epilogue, sums in place, pools, a clamp of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        y = F.hardswish(self.wide(x))
        y = F.silu(self.depthwise(y))
        y = F.relu(self.project(y) + x)
        y = torch.cat([y, F.avg_pool2d(y, 3, 1, 1)], 1)[:, :16]
        y = F.relu6(self.up(y)) + 0.5 * self.up(y * x)
        return self.head(F.interpolate(y, scale_factor=2).mean((2, 3)))


class Gated(nn.Module):
    """A squeeze-excitation block and element-wise kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.1)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * torch.sigmoid(gate)
        return torch.clamp(self.norm(x + x), -0.5, 1.5).flatten(1)[:, :50]


class Perceptron(nn.Module):
    """Linears with functions inside their kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32),
            nn.ReLU(), nn.Linear(32, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _images(count: int) -> list[Tensor]:
    sizes = [(1, 3, 32, 32), (3, 3, 24, 40), (2, 3, 33, 17), (1, 3, 64, 48)]
    return [torch.randn(*sizes[i % len(sizes)]) for i in range(count)]


def _rows(count: int) -> list[Tensor]:
    return [torch.randn(*((1 + i % 5, 24) if i % 3 else (2, 1 + i % 4, 24))) for i in range(count)]


Make = Callable[[], tuple[QuantGraphModule, list[Tensor]]]


class Chosen(KernelTable):
    """As if one kernel had been the fastest wherever it can run."""

    def __init__(self, kernel: str) -> None:
        super().__init__(None)
        self.kernel = kernel

    def measure(self, work: Iterable[tuple[Task, Sequence[str]]]) -> int:
        """Nothing is timed."""
        return len(list(work))

    def task(self, task: Task, kernels: Sequence[str]) -> dict[str, float]:
        """Seconds of the kernels; FP32 is the slowest."""
        return dict.fromkeys(FLOATS, 3.0) | {k: 1.0 if k == self.kernel else 2.0 for k in kernels}


def _converted(
    model: nn.Module,
    inputs: list[Tensor],
    mapping: Any = None,
    target: str = "x86",
    kernel: str = "",
) -> QuantGraphModule:
    prepared = prepare_fx(model.eval(), mapping, (inputs[0],), target=target)
    with torch.no_grad():
        for x in inputs[:4]:
            prepared(x)
    return convert_fx(prepared, tune=Chosen(kernel) if kernel else False)


def _case(
    model: type[nn.Module], inputs: Callable[[int], list[Tensor]], **options: Any
) -> Callable[[], tuple[QuantGraphModule, list[Tensor]]]:
    def make() -> tuple[QuantGraphModule, list[Tensor]]:
        torch.manual_seed(0)
        found = inputs(THREADS)
        return _converted(model(), found, **options), found

    return make


CASES: dict[str, Make] = {
    "residual": _case(Residual, _images),
    "gated": _case(Gated, _images),
    "perceptron": _case(Perceptron, _rows),
    "per tensor": _case(Residual, _images, mapping={"": default_qconfig}),
    "dynamic": _case(Perceptron, _rows, mapping={"": default_dynamic_qconfig}),
    "oneDNN's own": _case(Residual, _images, kernel=POINTWISE),
    "linears of oneDNN": _case(Perceptron, _rows, kernel="onednn"),
}
if available("qnnpack"):  # which packs its weights again at the first call, for the input's scale
    CASES["qnnpack"] = _case(Residual, _images, target="qnnpack")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[QuantGraphModule, list[Tensor], list[Tensor]]:
    """A converted model, inputs, and its outputs for them, computed one after the other."""
    int8, inputs = CASES[request.param]()
    with torch.no_grad():
        return int8, inputs, [copy.deepcopy(int8)(x) for x in inputs]


@pytest.fixture
def restless() -> Iterator[None]:
    """Python switches threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _in_threads(work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(7)`` at the same time; the first error is raised."""
    barrier = threading.Barrier(THREADS)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait()
            with torch.no_grad():
                work(index)
        except BaseException as error:  # noqa: BLE001  # handed on
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("restless")
def test_first_calls_of_eight_threads(
    case: tuple[QuantGraphModule, list[Tensor], list[Tensor]],
) -> None:
    """Every round is a model that nobody called yet, and eight sizes at once."""
    int8, inputs, expected = case
    for _ in range(5):
        fresh = pickle.loads(pickle.dumps(int8))
        given: dict[int, Tensor] = {}

        def work(index: int, model: nn.Module = fresh, given: dict[int, Tensor] = given) -> None:
            given[index] = model(inputs[index])

        _in_threads(work)
        for index, output in given.items():
            assert torch.equal(output, expected[index])


@pytest.mark.usefixtures("restless")
def test_many_calls_of_eight_threads(
    case: tuple[QuantGraphModule, list[Tensor], list[Tensor]],
) -> None:
    """Each thread goes through all sizes, from another one on, while one of them converts."""
    int8, inputs, expected = case
    wrong: list[tuple[int, int]] = []

    def work(index: int) -> None:
        if index == 0:  # packs, for which the engine is changed and restored
            CASES["perceptron"]()
            return
        for step in range(2 * len(inputs)):
            place = (index + step) % len(inputs)
            if not torch.equal(int8(inputs[place]), expected[place]):
                wrong.append((index, place))

    _in_threads(work)
    assert wrong == []


def _deepcopied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(model))
    return made


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    made: nn.Module = torch.load(buffer, weights_only=False)
    return made


def _shallow(model: nn.Module) -> nn.Module:
    return copy.copy(model)


def _loaded(model: nn.Module) -> nn.Module:
    """Its state in a copy whose own state was something else, through ``weights_only``."""
    assert isinstance(model, QuantGraphModule)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for buffer in other.buffers():
            if buffer.dtype == torch.int8:
                buffer.neg_().clamp_(min=-127)
    other.rebuild_packed()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    return other


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    "remade", [_deepcopied, _pickled, _saved, _shallow, _loaded], ids=lambda f: f.__name__
)
def test_a_copy_computes_the_same_under_another_engine(
    case: tuple[QuantGraphModule, list[Tensor], list[Tensor]],
    remade: Callable[[nn.Module], nn.Module],
    name: str,
) -> None:
    int8, inputs, expected = case
    with engine(name), torch.no_grad():
        made = remade(int8)
        for x, wanted in zip(inputs[:4], expected, strict=False):
            assert torch.equal(made(x), wanted)
            assert torch.equal(int8(x), wanted)
        assert torch.backends.quantized.engine == name
    with torch.no_grad():
        assert torch.equal(made(inputs[4]), expected[4])


@pytest.mark.parametrize("name", ENGINES)
def test_converted_under_another_engine(name: str) -> None:
    int8, inputs = CASES["residual"]()
    with engine(name):
        other, _ = CASES["residual"]()
    with torch.no_grad():
        for x in inputs:
            assert torch.equal(other(x), int8(x))


@pytest.mark.parametrize("name", ENGINES)
def test_statistics_go_from_one_prepared_copy_to_another(name: str) -> None:
    """``load_state_dict`` between prepared copies, converted after the engine was changed."""
    torch.manual_seed(0)
    model, inputs = Residual().eval(), _images(4)
    first = prepare_fx(model, None, (inputs[0],))
    second = prepare_fx(model, None, (inputs[0],))
    third = copy.deepcopy(first)
    with torch.no_grad():
        for x in inputs:
            first(x)
        expected = [convert_fx(first)(x) for x in inputs]
        with engine(name):
            for other in (second, third, pickle.loads(pickle.dumps(third))):
                stream = io.BytesIO()
                torch.save(first.state_dict(), stream)
                stream.seek(0)
                other.load_state_dict(torch.load(stream, weights_only=True))
                int8 = convert_fx(other)
                for x, wanted in zip(inputs, expected, strict=True):
                    assert torch.equal(int8(x), wanted)
