"""Times of kernels: what is timed and when, where it is kept, and what is chosen by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant import (
    ConfigError,
    ConfigWarning,
    KernelTable,
    LoweringWarning,
    calibrate,
    convert_fx,
    default_dynamic_qconfig,
    explain,
    get_default_qconfig_mapping,
    kernel_table,
    load,
    prepare_fx,
    quantize,
    quantize_dynamic,
    save,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.kernel_table import fastest
from fxquant.kernel_tasks import FLOATS, Call, Task, calls_of
from fxquant.machine_file import CACHE_VARIABLE, MachineFile
from fxquant.metadata import record_of
from fxquant.pairing import POINTWISE, Geometry
from fxquant.targets import choice
from fxquant.timing import threads

CONV = Task(
    rows=2,
    geometry=Geometry(
        inputs=8, outputs=16, kernel=(3, 3), size=(7, 9), stride=(2, 1), padding=(1, 0),
        dilation=(1, 2),
    ),
)  # fmt: skip
LINEAR = Task(rows=4, geometry=Geometry(inputs=8, outputs=6))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


class FakeTime:
    """A clock that only calls of fake kernels move: each takes what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Task, str], float]):
        self.now = 0.0
        self.called: list[tuple[str, str]] = []
        self.seconds = seconds
        monkeypatch.setattr(kernel_table, "calls_of", self.calls_of)
        monkeypatch.setattr(kernel_table, "conversion_calls", self.conversion_calls)

    def __call__(self) -> float:
        return self.now

    def calls_of(self, task: Task, kernels: Sequence[str]) -> dict[str, Call]:
        return {name: self._call(task.key, name, self.seconds(task, name)) for name in kernels}

    def conversion_calls(self, shape: tuple[int, ...]) -> dict[str, Call]:
        return {name: self._call(str(shape), name, 1e-6) for name in ("quantize", "dequantize")}

    def _call(self, key: str, name: str, took: float) -> Call:
        def call() -> None:
            self.called.append((key, name))
            self.now += took

        return call


# -- what is timed ------------------------------------------------------------------------------


def every_task() -> Iterator[tuple[Task, tuple[str, ...]]]:
    packed = ("onednn", "fbgemm")
    conv = Geometry(
        inputs=4, outputs=8, kernel=(3, 3), size=(6, 6), stride=(1, 1), padding=(1, 1),
        dilation=(1, 1), groups=2,
    )  # fmt: skip
    for after in ("", "relu"):
        for shifted in (False, True):
            task = Task(rows=2, geometry=conv, after=after, shifted=shifted)
            yield task, (*packed, POINTWISE, *FLOATS)
            linear = Task(rows=3, geometry=LINEAR.geometry, after=after, shifted=shifted)
            yield linear, (*packed, POINTWISE, *FLOATS)
        dynamic = Task(rows=3, geometry=LINEAR.geometry, after=after, integers=False, dynamic=True)
        yield dynamic, (*packed, *FLOATS)
    for after in ("hardtanh", "hardswish", "swish", "sum"):
        yield Task(rows=2, geometry=conv, after=after), (POINTWISE, *FLOATS)
    for after in ("leaky_relu", "tanh", "gelu"):
        yield Task(rows=2, geometry=LINEAR.geometry, after=after), (POINTWISE, *FLOATS)
    yield Task(rows=2, geometry=conv, integers=False), (POINTWISE, *FLOATS)
    for dimensions in (1, 3):
        cube = Geometry(
            inputs=4, outputs=8, kernel=(3,) * dimensions, size=(5,) * dimensions,
            stride=(1,) * dimensions, padding=(0,) * dimensions, dilation=(1,) * dimensions,
        )  # fmt: skip
        yield Task(rows=2, geometry=cube), (*packed, *FLOATS)
    transposed = Geometry(
        inputs=4, outputs=6, kernel=(3, 3), size=(5, 5), stride=(2, 2), padding=(1, 1),
        dilation=(1, 1), output_padding=(1, 0), transposed=True,
    )  # fmt: skip
    yield Task(rows=2, geometry=transposed), ("fbgemm", *FLOATS)


def test_every_kernel_of_a_task_computes_the_same() -> None:
    """Times of kernels that did something else would say nothing."""
    for task, kernels in every_task():
        shapes = set()
        integers = {}
        for name, call in calls_of(task, kernels).items():
            made = call()
            assert isinstance(made, Tensor)
            shapes.add(tuple(made.shape))
            if name not in FLOATS:
                values = made.int_repr() if made.is_quantized else made
                integers[name] = values.double()
        assert shapes == {task.output_shape}, task
        first, *others = integers.values()
        assert all((other - first).abs().max() <= 1 for other in others), task


def test_a_task_knows_its_shapes() -> None:
    x = torch.zeros(CONV.input_shape)
    conv = nn.Conv2d(8, 16, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    assert tuple(conv(x).shape) == CONV.output_shape
    assert CONV.macs == conv(x).numel() * 8 * 9
    assert CONV.key == ("conv2d 2x8x7x9 by 16x8x3x3, stride 2x1, padding 1x0, dilation 1x2")
    assert LINEAR.macs == 4 * 8 * 6


def test_ops_take_turns_and_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime(monkeypatch, lambda task, name: 1e-6)
    table = KernelTable(None, rounds=3, clock=clock)
    assert table.measure([(CONV, ("onednn", "fbgemm")), (LINEAR, ("fbgemm", "onednn"))]) == 2
    keys = [key for key, _ in clock.called]
    assert keys == [CONV.key, LINEAR.key] * (len(keys) // 2)
    assert len(keys) == 2 * 4 * (3 + 2)  # two of the rounds are not timed
    firsts = [name for key, name in clock.called if key == CONV.key][::4]
    assert len(set(firsts)) == 4, "the same kernel began every round"
    assert table.measure([(CONV, ("onednn",))]) == 0, "what is known was timed again"


def test_the_fastest_of_all_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    spikes = iter([9e-3, 9e-3, 5e-6, 3e-6, 8e-3])  # a warm-up of two, three that count
    clock = FakeTime(monkeypatch, lambda task, name: 0.0)

    def calls(task: Task, kernels: Sequence[str]) -> dict[str, Call]:
        def call() -> None:
            clock.now += next(spikes)

        return {"onednn": call, **dict.fromkeys(FLOATS, lambda: None)}

    monkeypatch.setattr(kernel_table, "calls_of", calls)
    times = KernelTable(None, rounds=3, clock=clock).task(CONV, ("onednn",))
    assert times["onednn"] == pytest.approx(3e-6)


def test_large_networks_are_timed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime(monkeypatch, lambda task, name: 1e-6)
    monkeypatch.setattr(kernel_table, "_AT_ONCE", 1)
    KernelTable(None, rounds=1, clock=clock).measure([(CONV, ("onednn",)), (LINEAR, ("onednn",))])
    keys = [key for key, _ in clock.called]
    assert keys == sorted(keys, key=[CONV.key, LINEAR.key].index)


# -- what is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"onednn": 10.0, "fbgemm": 9.4}, "fbgemm"),
        ({"onednn": 10.0, "fbgemm": 9.6}, "onednn"),  # not worth a difference
        ({"onednn": 10.0, "fbgemm": 5.0, "pointwise": 4.0}, "pointwise"),
        ({"onednn": 10.0, "fbgemm": 11.0, "fp32": 1.0}, "onednn"),  # not a kernel to choose
        ({"fbgemm": 5.0}, "onednn"),  # the usual one was never timed
        ({}, "onednn"),
    ],
)
def test_another_kernel_must_be_worth_it(times: dict[str, float], taken: str) -> None:
    assert fastest(times, "onednn", ("onednn", "fbgemm", "pointwise")) == taken


class Net(nn.Module):
    """Everything that has kernels to choose from, and some that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.shifted = nn.Conv2d(16, 16, 1)
        self.residual = nn.Conv2d(16, 16, 3, padding=1)
        self.gated = nn.Conv2d(16, 16, 1)
        self.line = nn.Conv1d(16, 8, 3)
        self.hidden, self.head = nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.nn.functional.relu6(self.depthwise(x))
        y = torch.relu(self.residual(self.shifted(y)) + x)
        y = torch.nn.functional.hardswish(self.gated(y))
        y = self.line(y.flatten(2)).mean(2)
        return self.head(torch.relu(self.hidden(y)))


@pytest.fixture(scope="module")
def prepared() -> QuantGraphModule:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    made = prepare_fx(Net().eval(), get_default_qconfig_mapping("x86"), (x,))
    return calibrate(made, [x])


def preferring(kernel: str) -> Callable[[Task, str], float]:
    """int8 faster than FP32, and one of its kernels faster than the others."""
    return lambda task, name: 100e-6 if name in FLOATS else 20e-6 if name == kernel else 40e-6


@pytest.mark.parametrize(
    ("kernel", "shown"),
    [
        ("fbgemm", ("quantized::conv2d_relu (fbgemm)", "quantized::conv2d_relu (fbgemm)")),
        ("onednn", ("quantized::conv2d_relu (onednn)", "quantized::linear_relu (onednn)")),
        (POINTWISE, ("onednn::qconv_pointwise", "onednn::qlinear_pointwise")),
    ],
)
def test_the_faster_kernel_is_taken(
    kernel: str,
    shown: tuple[str, str],
    prepared: QuantGraphModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeTime(monkeypatch, preferring(kernel))
    tuned = convert_fx(prepared, tune=KernelTable(None, rounds=1, clock=clock))
    rows = {row.path: row for row in explain(tuned).rows if row.kernel}
    names = {
        "fbgemm": ("quantized::conv2d", "(fbgemm)"),
        "onednn": ("quantized::conv2d", "(onednn)"),
        POINTWISE: ("onednn::qconv_pointwise", "]"),
    }[kernel]
    exact = choice.packed_kernel(CONV.geometry).pairing is choice.Pairing.NONE
    for path in ("stem", "shifted") if exact else ():
        assert rows[path].kernel.startswith(names[0]), rows[path]
        assert rows[path].kernel.endswith(names[1]), rows[path]
    assert rows["residual"].kernel.startswith("onednn::qconv2d_pointwise.binary")
    assert rows["gated"].kernel.startswith("onednn::qconv_pointwise[hardswish]")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tuned(x), convert_fx(prepared)(x)), "another kernel, other integers"


def test_an_inexact_kernel_is_never_taken(
    prepared: QuantGraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fbgemm saturates depthwise convolutions, and is not even timed for them."""
    clock = FakeTime(monkeypatch, preferring("fbgemm"))
    tuned = convert_fx(prepared, tune=KernelTable(None, rounds=1, clock=clock))
    (row,) = [row for row in explain(tuned).rows if row.path == "depthwise"]
    assert "fbgemm" not in row.kernel
    assert not any("groups 16" in key and name == "fbgemm" for key, name in clock.called)


def test_a_usual_kernel_that_is_inexact_stays(
    prepared: QuantGraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights were fitted to it."""
    monkeypatch.setattr(
        choice, "packed_kernel", lambda g, names=(): choice.KernelChoice(
            kernel="onednn", geometry=g, pairing=choice.Pairing.CHANNELS
        )
    )  # fmt: skip
    clock = FakeTime(monkeypatch, preferring("fbgemm"))
    convert_fx(prepared, tune=KernelTable(None, rounds=1, clock=clock))
    assert {n for key, n in clock.called if ", relu" in key} <= {"onednn", *FLOATS}


def test_explain_says_what_was_taken_and_the_times(
    prepared: QuantGraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime(monkeypatch, preferring("fbgemm"))
    tuned = convert_fx(prepared, tune=KernelTable(None, rounds=1, clock=clock))
    rows = {row.path: row for row in explain(tuned).rows if row.kernel}
    (note,) = [note for note in rows["stem"].notes if note.startswith("measured here")]
    count = torch.get_num_threads()
    assert f"({count} thread{'s' if count > 1 else ''}, conv2d 2x3x8x8 by 16x3x3x3" in note
    assert "quantized::conv2d (fbgemm) 20 us, taken; " in note
    assert "quantized::conv2d (onednn) 40 us" in note
    assert "onednn::qconv_pointwise 40 us" in note
    assert "FP32 100 us" in note
    for path in ("stem", "depthwise", "shifted", "residual", "gated", "line", "hidden", "head"):
        assert any("taken" in note for note in rows[path].notes), path
    assert "20 us" in explain(tuned).to_text()
    plain = explain(convert_fx(prepared)).to_markdown()
    assert "measured here" not in plain


def test_dynamic_linears_have_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    plain = quantize_dynamic(model, example_inputs=(x,))
    for kernel in ("fbgemm", "onednn"):
        clock = FakeTime(monkeypatch, preferring(kernel))
        table = KernelTable(None, rounds=1, clock=clock)
        tuned = quantize_dynamic(model, example_inputs=(x,), tune=table)
        kernels = [row.kernel for row in explain(tuned).rows if row.kernel]
        assert len(kernels) == 2
        assert all(f"dynamic ({kernel})" in name for name in kernels)
        torch.testing.assert_close(tuned(x), plain(x), rtol=1e-5, atol=1e-6)
    mapping = {"": default_dynamic_qconfig}
    clock = FakeTime(monkeypatch, preferring("onednn"))
    made = prepare_fx(model, mapping, (x,))
    convert_fx(made, tune=KernelTable(None, rounds=1, clock=clock))
    assert {name for _, name in clock.called} == {"fbgemm", "onednn", *FLOATS}


def test_a_loaded_model_is_tuned(
    prepared: QuantGraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = convert_fx(prepared)
    save(plain, tmp_path / "model.fxq")
    clock = FakeTime(monkeypatch, preferring("fbgemm"))
    tuned = load(tmp_path / "model.fxq", tune=KernelTable(None, rounds=1, clock=clock))
    (row,) = [row for row in explain(tuned).rows if row.path == "stem"]
    assert "(fbgemm)" in row.kernel
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tuned(x), plain(x))


@pytest.mark.parametrize("tune", [None, "yes", 1])
def test_tune_is_a_table_or_yes_or_no(tune: object, prepared: QuantGraphModule) -> None:
    with pytest.raises(ConfigError, match=r"tune takes True, False or a fxquant\.KernelTable"):
        convert_fx(prepared, tune=tune)  # type: ignore[arg-type]  # refused


def test_where_nothing_can_be_chosen_it_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    blind = calibrate(prepare_fx(model, None, None), [x])
    with pytest.warns(ConfigWarning, match="no shapes are known"):
        convert_fx(blind, tune=True)
    reference = calibrate(prepare_fx(model, None, (x,), target="reference"), [x])
    with pytest.warns(ConfigWarning, match="'reference' runs no kernels"):
        convert_fx(reference, tune=True)


# -- where times are kept -----------------------------------------------------------------------


def test_times_are_kept_for_each_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime(monkeypatch, lambda task, name: 1e-6 * torch.get_num_threads())
    with threads(1):
        one = KernelTable(rounds=1, clock=clock)
        assert one.measure([(CONV, ("onednn",))]) == 1
        first = one.path
        assert first is not None
        assert first.parent == Path(os.environ[CACHE_VARIABLE])
        with threads(2):
            assert one.path != first
            assert one.times == {}
            assert one.measure([(CONV, ("onednn",))]) == 1
            assert one.times[CONV.key]["onednn"] == pytest.approx(2e-6)
        again = KernelTable(measure=False)
        assert again.times[CONV.key]["onednn"] == pytest.approx(1e-6)
        assert again.task(CONV, ("onednn",)).keys() == {"onednn", *FLOATS}
        assert again.task(LINEAR, ("onednn",)) == {}, "measured against its word"


def test_only_what_is_missing_is_timed(
    prepared: QuantGraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime(monkeypatch, preferring("onednn"))
    convert_fx(prepared, tune=KernelTable(rounds=1, clock=clock))
    assert clock.called
    clock.called.clear()
    convert_fx(prepared, tune=KernelTable(rounds=1, clock=clock))
    assert not clock.called


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-10], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"kernels"', '"recipes"', 1), "holds recipes"),
        (lambda text: text.replace('"format": ', '"format": 9'), "in format 9"),
        (lambda text: text.replace('"threads": ', '"threads": 7'), "another machine"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_and_ignored(
    change: Callable[[str], str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime(monkeypatch, lambda task, name: 1e-6)
    table = KernelTable(rounds=1, clock=clock)
    table.measure([(CONV, ("onednn",))])
    assert table.path is not None
    table.path.write_text(change(table.path.read_text()))
    again = KernelTable(rounds=1, clock=clock)
    with pytest.warns(ConfigWarning, match=said):
        found = again.times
    assert found == {}
    assert again.measure([(CONV, ("onednn",))]) == 1
    assert KernelTable(measure=False).times.keys() == {CONV.key}


def test_entries_of_another_form_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime(monkeypatch, lambda task, name: 1e-6)
    table = KernelTable(rounds=1, clock=clock)
    table.measure([(CONV, ("onednn",))])
    assert table.path is not None
    plain = json.loads(table.path.read_text())
    plain["entries"] = {CONV.key: "soon", LINEAR.key: {"onednn": "fast"}}
    table.path.write_text(json.dumps(plain))
    again = KernelTable(rounds=1, clock=clock)
    assert again.times == {}
    assert again.measure([(CONV, ("onednn",)), (LINEAR, ("onednn",))]) == 2


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = MachineFile(tmp_path / "file" / "folder", "kernels", largest=3)
    with pytest.warns(ConfigWarning, match="cannot be written"):
        table.put({"a": 1})
    assert table.get("a") == 1


def test_the_oldest_entries_go_first(tmp_path: Path) -> None:
    file = MachineFile(tmp_path, "kernels", largest=3)
    file.put(dict.fromkeys("abc", 0))
    file.put({"a": 1, "d": 1})
    assert list(MachineFile(tmp_path, "kernels", largest=3).entries) == ["c", "a", "d"]


WRITER = """
import sys
from pathlib import Path
from fxquant.machine_file import MachineFile
folder, first = Path(sys.argv[1]), int(sys.argv[2])
for number in range(first, first + 20):
    MachineFile(folder, "kernels", largest=1000).put({str(number): number})
"""


def test_processes_add_to_one_file(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(first)],
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for first in (0, 100)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    (file,) = tmp_path.iterdir()  # and nothing half written is left
    plain = json.loads(file.read_text())
    assert plain["kind"] == "kernels"
    assert plain["entries"] == {str(f + n): f + n for f in (0, 100) for n in range(20)}


def test_threads_add_to_one_file(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 20):
            MachineFile(tmp_path, "kernels", largest=1000).put({str(number): number})

    workers = [threading.Thread(target=write, args=(100 * number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = MachineFile(tmp_path, "kernels", largest=1000).entries
    assert found == {str(100 * f + n): 100 * f + n for f in range(3) for n in range(20)}


# -- really -------------------------------------------------------------------------------------


def test_real_kernels_are_timed(prepared: QuantGraphModule) -> None:
    """Times of this machine: nothing is asserted of them but that they are some."""
    table = KernelTable(rounds=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoweringWarning)  # small layers may well be slower
        tuned = convert_fx(prepared, tune=table)
    assert len(table.times) >= 8
    assert all(0 < t < 1 for times in table.times.values() for t in times.values())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tuned(x), convert_fx(prepared)(x))
    taken = {record_of(node).kernel for node in tuned.graph.nodes}
    assert any("(" in kernel for kernel in taken)


def test_quantize_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime(monkeypatch, preferring("fbgemm"))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    data = [torch.randn(2, 3, 8, 8)]
    tuned = quantize(model, data, tune=KernelTable(None, rounds=1, clock=clock))
    assert "(fbgemm)" in explain(tuned).row("0").kernel
