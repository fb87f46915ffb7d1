"""The benchmark of speed measures what it says, and reports whoever cannot take part."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed.coordinator import Member
from benchmarks.speed.peers import BY_NAME, PEERS, UnavailableError
from benchmarks.speed.peers._files import kept
from benchmarks.speed.protocol import Built, Channel, Failed, Slice
from benchmarks.speed.report import BEGIN, END, markdown, put_between_markers, right
from benchmarks.speed.results import (
    Interval,
    Row,
    Table,
    interval,
    read_tables,
    write_tables,
)
from benchmarks.speed.worker import pin, reason_of, turn
from benchmarks.speed.workloads import NETWORKS, Workload

ROOT = Path(__file__).parents[1]
TASKS = Path("/proc/self/task")


def built(sqnr: float | None = 30.0) -> Built:
    return Built(settings="as it comes", sqnr=sqnr, agreement=90.0, seconds=1.0)


def row(*medians: float, sqnr: float | None = 30.0) -> Row:
    return Row(built=built(sqnr), medians=medians, minima=tuple(m / 2 for m in medians))


def table(**rows: Row) -> Table:
    return Table(
        network="tiny",
        threads=1,
        weights="seeded",
        machine="a machine",
        versions={"torch": "9"},
        plan=(2, 1, 0.1),
        rows={name.replace("_", "-"): found for name, found in rows.items()},
    )


# -- what follows from times -----------------------------------------------------------------------


def test_a_ratio_is_formed_within_each_run() -> None:
    found = table(fxquant=row(1.0, 4.0, 9.0), eager=row(2.0, 16.0, 27.0))
    assert found.ratio("fxquant", "eager") == Interval(1 / 3, 0.25, 0.5)  # of medians: 0.25


def test_a_ratio_of_the_fastest_calls_takes_those() -> None:
    one = Row(built=built(), medians=(9.0,), minima=(1.0,))
    found = table(fxquant=one, eager=row(8.0))
    assert found.ratio("fxquant", "eager", fastest=True) == Interval(0.25, 0.25, 0.25)


def test_who_did_not_take_part_has_no_ratio() -> None:
    found = table(fxquant=row(1.0), eager=Row(failure="no"))
    assert found.ratio("fxquant", "eager") is None
    assert found.ratio("fxquant", "compile") is None


def test_the_interval_is_the_extremes_around_the_median() -> None:
    assert interval([5.0, 1.0, 2.0]) == Interval(2.0, 1.0, 5.0)


def test_tables_come_back_from_the_file(tmp_path: Path) -> None:
    tables = {("tiny", 1): table(fxquant=row(1.0, 2.0, sqnr=None), eager=Row(failure="no"))}
    write_tables(tmp_path / "new" / "r.json", tables)
    assert read_tables(tmp_path / "new" / "r.json") == tables
    assert read_tables(tmp_path / "absent.json") == {}


def test_a_fast_engine_with_wrong_answers_stands_for_nobody() -> None:
    found = table(
        torch_ao_x86=row(1.0, sqnr=13.9), torch_ao_onednn=row(2.0, sqnr=20.0), eager=row(3.0)
    )
    assert right(found, ["torch-ao-x86", "torch-ao-onednn"]) == ["torch-ao-onednn"]
    assert right(found, ["eager", "compile"]) == ["eager"]
    assert right(found, ["compile"]) == []


# -- the report ------------------------------------------------------------------------------------


def test_the_report_has_times_ratios_accuracy_and_reasons() -> None:
    tables = {
        ("tiny", 1): table(
            fxquant=row(1.0, 2.0, sqnr=41.26),
            torch_ao_onednn=row(2.0, 8.0),
            eager=row(10.0, 10.0, sqnr=None),
            openvino_int8=Row(failure="openvino is not installed"),
        )
    }
    text = markdown(tables)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    summary, fastest = (cells for cells in lines if cells[:2] == ["tiny", "fxquant"])
    assert summary[2:] == ["0.38 [0.25, 0.50] (onednn)", "", "", "", "0.15 [0.10, 0.20]", ""]
    assert fastest[2:] == summary[2:]
    assert [
        "fxquant",
        *("1.50 [1.00, 2.00]", "0.50", "1.00 [1.00, 1.00]", "", "41.3", "90.0 %"),
    ] in lines
    assert [
        "FP32 eager",
        *("10.00 [10.00, 10.00]", "5.00", "0.15 [0.10, 0.20]", "", "equal", "90.0 %"),
    ] in lines
    assert "- OpenVINO int8 (NNCF): openvino is not installed" in text
    assert "on a machine, with torch 9" in text


def test_a_busy_machine_is_told() -> None:
    quiet, busy = (
        table(
            fxquant=Row(built=built(), medians=(1.0,), minima=(1.0,), waited=w),
            eager=Row(built=built(), medians=(1.0,), minima=(1.0,), waited=w),
            compile=Row(failure="no"),
        )
        for w in (0.04, 0.31)
    )
    assert "busy" not in markdown({("tiny", 1): quiet})
    told = markdown({("tiny", 1): busy})
    assert "31 % of the time" in told
    assert told.count("| tiny (busy)") == 2
    assert told.count("not told") == 6


def test_a_page_keeps_what_is_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_between_markers(page, "new\n")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        put_between_markers(page, "new")
    assert page.read_text() == text


# -- coordinator and worker ------------------------------------------------------------------------


def ends() -> tuple[Channel, Channel]:
    first, second = os.pipe(), os.pipe()
    return Channel(first[0], second[1]), Channel(second[0], first[1])


@pytest.mark.parametrize(
    "message",
    [
        built(),
        built(None),
        Failed(reason="two\nlines"),
        Slice(median=1.5, minimum=1.0, calls=3, waited=0.25),
        0.2,
    ],
)
def test_messages_arrive_as_they_were_sent(message: Built | Failed | Slice | float) -> None:
    here, there = ends()
    there.send(message)
    there.send(message)
    assert here.receive(1) == message
    assert here.receive(1) == message
    there.close()
    assert here.receive(1) is None
    here.close()


def test_silence_is_told_from_an_end() -> None:
    here, there = ends()
    with pytest.raises(TimeoutError):
        here.receive(0.01)
    here.close()
    there.close()


def _member(tmp_path: Path, code: str) -> Member:
    here, there = os.pipe(), os.pipe()
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=(here[1],), stderr=output, stdout=output
        )
    os.close(here[1])
    return Member(peer=PEERS[0], process=process, channel=Channel(here[0], there[1]), log=log)


def test_a_process_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    member = _member(tmp_path, "import os; print('out of luck', flush=True); os._exit(3)")
    assert member.hear(30) is None
    assert member.failure == "its process ended with 3: out of luck"


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    member = _member(tmp_path, "import time; time.sleep(60)")
    assert member.hear(0.1) is None
    assert member.failure == "nothing was heard for 0.1 s"
    assert member.process.wait(30) < 0


def test_a_turn_counts_its_calls_but_the_first() -> None:
    calls = []
    assert turn(lambda: None, 0.0, least=4).calls == 4
    found = turn(lambda: calls.append(0), 0.001)
    assert len(calls) == found.calls + 2
    assert 0 < found.minimum <= found.median


def test_a_call_longer_than_the_turn_is_warmed_up_once() -> None:
    calls = []

    def call() -> None:
        calls.append(0)
        time.sleep(0.02)

    found = turn(call, 0.01)
    assert found.calls == 1
    assert found.minimum >= 20
    assert len(calls) == 2


@pytest.fixture
def one_core() -> Iterator[int]:
    """A core to pin this process to; its threads get back what they had."""
    before = {int(t.name): os.sched_getaffinity(int(t.name)) for t in TASKS.iterdir()}
    yield min(os.sched_getaffinity(0))
    for thread, cores in before.items():
        if (TASKS / str(thread)).exists():
            os.sched_setaffinity(thread, cores)


def test_every_thread_is_pinned(one_core: int) -> None:
    release = threading.Event()
    other = threading.Thread(target=release.wait)
    other.start()
    try:
        pin([one_core])
        found = [os.sched_getaffinity(int(thread.name)) for thread in TASKS.iterdir()]
    finally:
        release.set()
        other.join()
    assert len(found) >= 2
    assert all(cores == {one_core} for cores in found)


def test_waiting_for_a_core_is_counted(one_core: int) -> None:
    pin([one_core])
    restless = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same core
    try:
        found = turn(lambda: sum(range(10000)), 1.0)
    finally:
        restless.kill()
        restless.wait()
    assert 0.1 < found.waited < 1.1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnavailableError("not here"), "not here"),
        (ModuleNotFoundError(name="nncf"), "nncf is not installed: pip install 'fxquant[bench]'"),
        (ValueError("\n first line \nsecond"), "ValueError: first line"),
        (KeyError(), "KeyError: no message"),
    ],
)
def test_reasons_fit_on_a_line(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_file_is_made_once_and_complete(tmp_path: Path) -> None:
    made = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("half")
        if len(made) == 1:
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        kept(tmp_path / "a" / "x.onnx", make)
    assert not (tmp_path / "a" / "x.onnx").exists()
    for _ in range(2):
        assert kept(tmp_path / "a" / "x.onnx", make).read_text() == "half"
    assert len(made) == 2


# -- being right -----------------------------------------------------------------------------------


def _workload() -> Workload:
    return NETWORKS["tiny"]()


def test_the_float_model_scores_as_equal() -> None:
    workload = _workload()
    with torch.no_grad():
        assert workload.score(workload.model) == (math.inf, 100.0)


def test_noise_is_measured_for_each_input() -> None:
    workload = _workload()
    with torch.no_grad():
        sqnr, agreement = workload.score(lambda x: workload.model(x) * 1.1)
    assert sqnr == pytest.approx(20.0, abs=1e-4)  # 10 * log10(1 / 0.1^2)
    assert agreement == 100.0


def test_answers_that_are_no_numbers_are_no_result() -> None:
    workload = _workload()
    with torch.no_grad(), pytest.raises(ValueError, match="not a number"):
        workload.score(lambda x: workload.model(x) * math.nan)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--networks", "resnet19"], ["--peers", "eagre"], ["--runs", "0"]]
)
def test_unknown_names_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.peer
def test_it_measures_whoever_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: pytest.RecordProperty
) -> None:
    peers = ["fxquant", "eager", "torch-ao-onednn", "onnxruntime-int8", "openvino-int8"]
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    arguments = ["--networks", "tiny", "--threads", "1", "--quick", "--peers", ",".join(peers)]
    command.main([*arguments, "--output", str(tmp_path / "out"), "--page", str(page)])
    tables = read_tables(tmp_path / "out" / "results.json")
    (found,) = tables.values()
    assert set(found.rows) == set(peers)
    for name in ("fxquant", "eager", "torch-ao-onednn"):
        measured = found.rows[name]
        assert measured.failure == ""
        assert len(measured.medians) == len(measured.minima) == 2
        assert all(0 < a <= b for a, b in zip(measured.minima, measured.medians, strict=True))
    for name in ("onnxruntime-int8", "openvino-int8"):
        assert found.rows[name].medians or "is not installed" in found.rows[name].failure
    eager, ours = found.rows["eager"].built, found.rows["fxquant"].built
    assert eager is not None
    assert ours is not None
    assert eager.sqnr is None
    assert ours.sqnr is not None
    assert ours.sqnr > 20
    assert markdown(tables, page.with_suffix("")) in page.read_text()
    assert read_tables(page.with_suffix(".json")) == tables
    assert "<svg" in (tmp_path / "page-1.svg").read_text()
    ratios = {name: found.ratio("fxquant", name) for name in peers}
    record_property("ratios", str(ratios))
    with capsys.disabled():  # recorded, not asserted: the machine may be busy
        seen = [f"{n} {r.median:.2f}" for n, r in ratios.items() if r is not None]
        print(f"\nfxquant / peer on the tiny network: {', '.join(seen)}")


def test_every_peer_has_a_family_and_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(PEERS) == len({peer.label for peer in PEERS})
    for peer in PEERS:
        assert (ROOT / "benchmarks/speed/peers" / f"{peer.family}.py").exists()
