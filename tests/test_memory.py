"""Memory: what prepare and convert take, what shares memory with what, when weights are packed."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant import artifact
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import PackRecord
from fxquant.own_copy import own_copy, take_apart
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx
from fxquant.slices import all_finite, by_rows, quantize_rows, row_slices, scaled_rows
from fxquant.specs import QParams, QuantSpec, quantize

ROOT = Path(__file__).parents[1]
needs_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc"
)

_SYNTHETIC = """
import json
from dataclasses import asdict

import torch
from torch import nn
from benchmarks.memory import measure

torch.set_num_threads(1)
layers = [nn.Conv2d(3, 512, 3), nn.BatchNorm2d(512), nn.ReLU()]
for _ in range(10):
    layers += [nn.Conv2d(512, 512, 3, padding=1), nn.BatchNorm2d(512), nn.ReLU()]
layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 512, 4000)]
model = nn.Sequential(*layers).eval()
print(json.dumps(asdict(measure(model, torch.rand(1, 3, 8, 8)))))
"""


def _cost(*arguments: str) -> dict[str, float]:
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_linux
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("-c", _SYNTHETIC), id="synthetic"),
        pytest.param(
            ("-m", "benchmarks.memory", "torchvision/resnet50"),
            id="resnet50",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    importlib.util.find_spec("torchvision") is None,
                    reason="torchvision is not installed",
                ),
            ],
        ),
    ],
)
def test_peaks_in_multiples_of_the_parameters(arguments: tuple[str, ...]) -> None:
    cost = _cost(*arguments)
    assert cost["parameters"] > 90e6
    assert cost["prepare"] <= 1.1  # one copy of the weights, folded
    assert cost["convert"] <= 0.4  # int8 weights
    # int8 weights, and their packed form; not a third copy that the packed form keeps
    assert cost["converted"] + cost["first_call"] <= 0.66


# -- sharing --------------------------------------------------------------------------------------


class Listing(nn.Module):
    """Keeps its parameters in a list too, ties two, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.listed = [self.first.weight, {"bias": self.first.bias}]

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.second(self.first(x))  # type: ignore[no-any-return]  # nn.Module is untyped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(4))
        self.head = nn.Linear(4, 4)
        self.listing = Listing()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).mean((2, 3)) * self.scale
        return self.listing(nn.functional.layer_norm(self.head(y), (4,)))  # type: ignore[no-any-return]  # nn.Module is untyped


def _storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, Listing):
            tensors += [module.listed[0], module.listed[1]["bias"]]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@pytest.mark.filterwarnings("ignore:module 'listing'")
def test_nothing_is_shared_with_what_the_caller_gave() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    prepared = prepare_fx(model, None, (x,))
    prepared(x)
    made = [prepared, fuse_fx(model, example_inputs=(x,))]
    made += [convert_fx(prepared), convert_to_reference_fx(prepared)]
    for result in made:
        assert not _storages(result) & _storages(model)
        assert result is prepared or not _storages(result) & _storages(prepared)
    untouched = prepare_fx(model, None, (x,), leaf_modules=["listing"])
    listing = untouched.get_submodule("listing")
    assert isinstance(listing, Listing)
    assert listing.first.weight is listing.second.weight is listing.listed[0]


def test_a_copy_that_shares_is_told_apart_again() -> None:
    model = Listing()
    before = model.first.weight.detach().clone()
    copied = own_copy(model, share=True)
    assert isinstance(copied, Listing)
    assert copied.first.weight is not model.first.weight
    assert _storages(copied) == _storages(model)
    take_apart(copied, model)
    assert not _storages(copied) & _storages(model)
    assert copied.listed[0] is copied.first.weight
    versions = [parameter._version for parameter in model.parameters()]
    with torch.no_grad():
        copied.first.weight.zero_()
    assert torch.equal(model.first.weight, before)
    assert [parameter._version for parameter in model.parameters()] == versions


# -- packing --------------------------------------------------------------------------------------


def _int8() -> tuple[QuantGraphModule, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare_fx(model, None, (x,))
    prepared(x)
    return convert_fx(prepared), x


def test_weights_are_packed_at_the_first_call(tmp_path: Path) -> None:
    int8, x = _int8()
    assert len(int8.unpacked) == len(int8.state.packs) == 3
    artifact.save(int8, tmp_path / "model.fxq")
    assert len(int8.unpacked) == 3
    wanted = int8(x)
    assert int8.unpacked == ()
    again = artifact.load(tmp_path / "model.fxq")
    assert len(again.unpacked) == 3
    assert torch.equal(again(x), wanted)
    again.load_state_dict(int8.state_dict())
    assert torch.equal(again(x), wanted)


def test_weights_are_packed_on_demand_or_by_copies() -> None:
    int8, x = _int8()
    int8.pack()
    assert int8.unpacked == ()
    for copied in (copy.copy(_int8()[0]), copy.deepcopy(_int8()[0])):
        assert isinstance(copied, QuantGraphModule)
        assert torch.equal(copied(x), int8(x))
    fresh, _ = _int8()
    with torch.inference_mode():
        inside = fresh(x)
    assert torch.equal(inside, int8(x))
    assert torch.equal(fresh(x), int8(x))


def test_a_loaded_state_is_packed_anew() -> None:
    int8, x = _int8()
    before = int8(x)
    name = int8.state.packs[-1].tensors[0]
    state = {key: value.clone() for key, value in int8.state_dict().items()}
    int8.load_state_dict(state | {name: torch.zeros_like(state[name])})
    assert not torch.equal(int8(x), before)
    int8.load_state_dict(state)
    assert torch.equal(int8(x), before)


def test_threads_that_call_first_pack_once(packings: list[PackRecord]) -> None:
    int8, x = _int8()
    packings.clear()
    barrier = threading.Barrier(8)
    results: list[Tensor] = []

    def call() -> None:
        barrier.wait()
        results.append(int8(x))

    workers = [threading.Thread(target=call) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(p.name for p in packings) == sorted(record.name for record in int8.state.packs)
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


# -- a few rows at a time -------------------------------------------------------------------------


def _big(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(0, 3), (1, 600_000), (7, 3), (1000, 900), (3, 300_000, 1)])
def test_slices_are_the_rows_once_and_small(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="meta")
    parts = list(row_slices(x))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(shape[0]))
    row = x.numel() // max(shape[0], 1)
    assert all((part.stop - part.start) * row <= max(1 << 18, row) for part in parts)


def test_rows_keep_dtype_layout_and_values() -> None:
    x = _big(64, 128, 9, 9).contiguous(memory_format=torch.channels_last)
    doubled = by_rows(x, torch.float64, lambda part: x[part] * 2)
    assert doubled.dtype is torch.float64
    assert doubled.stride() == x.stride()
    assert torch.equal(doubled, (x * 2).double())
    for factor in (_big(64, 1, 1, 1).double(), _big(1, 128, 1, 1).double()):
        assert torch.equal(scaled_rows(x, factor), (x.double() * factor).float())


@pytest.mark.parametrize("axis", [None, 0, 1, -4, -3])
def test_integers_by_rows_are_the_integers(axis: int | None) -> None:
    x = _big(600, 50, 5, 5)
    scheme = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric
    spec = QuantSpec(dtype=torch.int8, qscheme=scheme, quant_min=-127, quant_max=127, ch_axis=axis)
    if axis is None:
        qparams = QParams(torch.tensor(0.02), torch.tensor(0, dtype=torch.int32), spec)
    else:
        scale = torch.rand(x.shape[axis]) * 0.02 + 0.01
        qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), spec)
    assert torch.equal(quantize_rows(x, qparams), quantize(x, qparams))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_seen(bad: float) -> None:
    x = _big(40, 50)
    assert all_finite(x)
    assert all_finite(x[:0])
    x[17, 3] = bad
    assert not all_finite(x)
