"""Two processes share a sweep and both get the report that one process gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from networks import Gates, batches, made

from fxquant import analyze_sensitivity
from fxquant.errors import ConfigError
from fxquant.sensitivity.report import SensitivityReport
from fxquant.sensitivity.workers import Team

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
OPTIONS = {"estimates": ("first-order",), "costs": False, "probes": 2}

SCRIPT = """
import os, sys
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(1)
from networks import Gates, batches, made
from fxquant import analyze_sensitivity
import torch.distributed as dist

rank = int(os.environ["RANK"])
data = batches(Gates)
report = analyze_sensitivity(
    made(Gates), data, distributed=True, resume={resume!r}, progress=False, **{options!r}
)
assert not dist.is_initialized()
report.to_json({output!r} + str(rank))
"""


MEETINGS = """
from fxquant.sensitivity.workers import team

for number in range(6):
    with team(True) as members:
        assert members.gather((number, members.rank)) == [(number, 0), (number, 1)]
"""


def run_two(script: Path, text: str, *, timeout: int) -> None:
    """Run ``text`` in two processes that torchrun starts."""
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_processes_meet_again_in_one_script(tmp_path: Path) -> None:
    run_two(tmp_path / "script.py", MEETINGS, timeout=120)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_give_the_report_of_one(tmp_path: Path) -> None:
    output, resume = str(tmp_path / "report"), str(tmp_path / "sweep.json")
    text = SCRIPT.format(folder=str(FOLDER), output=output, options=OPTIONS, resume=resume)
    run_two(tmp_path / "script.py", text, timeout=300)
    alone = analyze_sensitivity(made(Gates), batches(Gates), **OPTIONS)  # type: ignore[arg-type]  # a dict of options
    for rank in "01":
        report = SensitivityReport.from_json(Path(output + rank))
        assert report.results == alone.results
        assert report.fingerprint == alone.fingerprint
        assert report.qconfig_mapping() == alone.qconfig_mapping()
    # the file that rank 0 wrote is that of all layers
    again = analyze_sensitivity(made(Gates), batches(Gates), resume=resume, **OPTIONS)  # type: ignore[arg-type]  # a dict of options
    assert again.results == alone.results


def test_a_process_alone_is_a_team_of_one() -> None:
    seen: list[int] = []
    assert Team().share([1, 2, 3], lambda item: item * item, seen.append)
    assert seen == [1, 4, 9]

    def stops(item: int) -> int:
        if item == 2:
            raise KeyboardInterrupt
        return item

    seen.clear()
    assert not Team().share([1, 2, 3], stops, seen.append)
    assert seen == [1]
    with pytest.raises(ConfigError, match="torchrun"):
        analyze_sensitivity(made(Gates), batches(Gates), distributed=True)


def test_processes_with_different_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Team, "gather", lambda self, value: [value, "another"])
    with pytest.raises(ConfigError, match="different things"):
        Team(rank=0, size=2).check_same("one")
    Team(rank=0, size=2).check_same("another")
