"""Parts that int8 makes slower: which they are, what is said of them, and how they are left."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant import (
    KernelTable,
    LoweringWarning,
    StrictModeError,
    calibrate,
    convert_fx,
    convert_to_reference_fx,
    explain,
    get_default_qconfig,
    kernel_table,
    plan_mixed_precision,
    prepare_fx,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_tasks import FLOATS, Call, Task
from fxquant.machine_file import CACHE_VARIABLE
from fxquant.slow_regions import Part, Region, Wire, parts_of, slow_regions

US = 1e-6


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def part(name: str, int8: float, fp32: float, *reads: Wire) -> Part:
    return Part(name=name, what=f"{name}'s shapes", int8=int8 * US, fp32=fp32 * US, reads=reads)


def wire(name: str, *sources: int) -> Wire:
    return Wire(name=name, shape=(1, 8, 4, 4), sources=frozenset(sources))


def chain(*times: tuple[float, float]) -> list[Part]:
    """``x -> 0 -> 1 -> ...``, with (int8, FP32) microseconds."""
    found = []
    for number, (int8, fp32) in enumerate(times):
        read = wire(str(number - 1), number - 1) if number else wire("x")
        found.append(part(str(number), int8, fp32, read))
    return found


def regions(parts: Sequence[Part], *, quantize: float = 10, dequantize: float = 10) -> list[Region]:
    costs = {"quantize": quantize * US, "dequantize": dequantize * US}
    return list(slow_regions(parts, lambda kind, shape: costs[kind]))


# -- regions --------------------------------------------------------------------------------------


def test_a_fast_network_has_none() -> None:
    assert regions(chain((10, 50), (20, 90))) == []
    assert regions([]) == []


def test_a_slow_part_among_others_pays_for_its_conversions() -> None:
    (found,) = regions(chain((10, 50), (100, 40), (10, 50)))
    assert found.names == ("1",)
    assert found.int8 == pytest.approx(100 * US)
    assert found.fp32 == pytest.approx((40 + 10 + 10) * US)
    assert regions(chain((10, 50), (60, 40), (10, 50))) == [], "the conversions eat it up"


def test_neighbours_are_one_region_with_no_conversion_between_them() -> None:
    (found,) = regions(chain((10, 50), (60, 40), (70, 40), (10, 50)))
    assert found.names == ("1", "2")
    assert found.fp32 == pytest.approx((80 + 20) * US)


def test_where_floats_come_in_int8_pays() -> None:
    (found,) = regions(chain((60, 40), (10, 90)), quantize=30)
    assert found.names == ("0",)
    assert found.int8 == pytest.approx(90 * US), "it would not need to quantize the input"
    assert found.fp32 == pytest.approx(70 * US), "but its result"


def test_a_tensor_is_converted_once_for_all_readers() -> None:
    shared = wire("0", 0)
    parts = [
        part("0", 10, 90, wire("x")),
        part("1", 100, 20, shared),
        part("2", 100, 20, shared, wire("1", 1)),
        part("3", 10, 90, wire("2", 2)),
        part("4", 10, 90, wire("2", 2)),
    ]
    (found,) = regions(parts)
    assert found.names == ("1", "2")
    assert found.fp32 == pytest.approx((40 + 10 + 10) * US)


def test_a_sum_of_two_has_both_as_sources() -> None:
    parts = [*chain((10, 90), (10, 90)), part("2", 200, 20, wire("sum", 0, 1))]
    (found,) = regions(parts)
    assert found.fp32 == pytest.approx((20 + 10) * US)


def test_noise_is_not_told() -> None:
    assert regions(chain((1000, 990)), quantize=0) == []
    assert regions(chain((15, 8)), quantize=0) == [], "nobody misses 7 us"


def test_the_greatest_loss_comes_first() -> None:
    found = regions(chain((100, 20), (10, 90), (500, 20), (10, 90), (200, 20)))
    assert [region.names for region in found] == [("2",), ("4",), ("0",)]


# -- networks -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A residual block, a pool between convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.join = nn.Conv2d(8, 8, 1)
        self.after = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.join(torch.relu(self.body(x))) + x)
        x = self.after(nn.functional.max_pool2d(x, 2))
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module, x: Tensor = X, mapping: object = None) -> QuantGraphModule:
    torch.manual_seed(0)
    return calibrate(prepare_fx(model.eval(), mapping, (x,)), [x])  # type: ignore[arg-type]  # a dict


def test_parts_and_what_is_between_them() -> None:
    reference = convert_to_reference_fx(prepared(Net()))
    parts = parts_of(reference, lambda task, op: (1.0, 2.0))
    assert [part.name for part in parts] == ["stem", "body", "join", "after", "head"]
    sources = [[sorted(wire.sources) for wire in part.reads] for part in parts]
    assert sources == [[[]], [[0]], [[1], [0]], [[2]], [[]]]  # the head reads a float mean
    assert parts[3].reads[0].shape == (2, 8, 4, 4)
    assert parts[0].what == "conv2d 2x3x8x8 by 8x3x3x3, padding 1x1, shifted"


def timed(monkeypatch: pytest.MonkeyPatch, slow: str) -> KernelTable:
    """A table in which int8 is three times slower for tasks with ``slow`` in their keys."""
    now = [0.0]

    def call(took: float) -> Call:
        def wait() -> None:
            now[0] += took

        return wait

    def calls(task: Task, kernels: Sequence[str]) -> dict[str, Call]:
        int8 = 300 * US if slow in task.key else 50 * US
        return {name: call(100 * US if name in FLOATS else int8) for name in kernels}

    def conversions(shape: tuple[int, ...]) -> dict[str, Call]:
        return {"quantize": call(5 * US), "dequantize": call(5 * US)}

    monkeypatch.setattr(kernel_table, "calls_of", calls)
    monkeypatch.setattr(kernel_table, "conversion_calls", conversions)
    return KernelTable(None, rounds=1, clock=lambda: now[0])


def test_convert_names_the_part_its_times_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    table = timed(monkeypatch, "8x8x3x3")
    with pytest.warns(LoweringWarning) as caught:
        convert_fx(prepared(Net()), tune=table)
    (warning,) = caught
    said = str(warning.message)
    assert said.startswith("1 part(s) of the model are slower in int8 than in FP32 on this machine")
    assert "(measured, with conversions): 'body' (conv2d 2x8x8x8 by 8x8x3x3" in said
    assert "about 0.3 ms in int8, 0.11 in FP32" in said
    assert "{..., 'body': None}" in said
    assert "plan_mixed_precision" in said
    with pytest.raises(StrictModeError, match="slower in int8"):
        convert_fx(prepared(Net()), tune=table, strict=True)


def test_the_cure_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    table = timed(monkeypatch, "8x8x3x3")
    mapping = {"": get_default_qconfig("x86"), "body": None}
    cured = convert_fx(prepared(Net(), mapping=mapping), tune=table)  # warnings are errors here
    assert explain(cured).row("body").runs.value == "fp32"


def test_without_measurement_usual_layers_are_not_suspected() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_fx(prepared(Net()))


class Upsampled(nn.Module):
    """A grouped transposed convolution, which fbgemm computes group by group."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, channels, 3, padding=1)
        self.up = nn.ConvTranspose2d(channels, channels, 4, 2, 1, groups=channels)
        self.last = nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.first(x)))


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def test_what_is_known_to_be_slow_is_told_without_measurement(image: Tensor) -> None:
    with pytest.warns(LoweringWarning, match=r"by experience.*'up' \(conv_transpose2d") as caught:
        int8 = convert_fx(prepared(Upsampled(), image))
    assert len(caught) == 1
    assert explain(int8).row("up").runs.value == "int8", "told, and done as asked"


def test_it_is_slow_indeed_and_the_planner_leaves_it(image: Tensor) -> None:
    """The kernel takes thirty times as long as float, which no noise hides."""
    torch.manual_seed(0)
    model = Upsampled().eval()
    plan = plan_mixed_precision(
        model,
        [image],
        budget={"accuracy_drop": 50.0},
        metric="error",
        candidates=["fp32", "int8"],
        cache=False,
    )
    chosen = {layer.name: layer.precision for layer in plan.layers}
    assert chosen["up"] == "fp32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned = convert_fx(prepared(model, image, plan.qconfig_mapping()))
    assert explain(planned).row("up").runs.value == "fp32"
