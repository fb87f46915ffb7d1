"""Every test fails in a build that observes nothing, or configures, or lowers nothing.

A suite that only traces models would pass half of what it should; so the tests are run in three
builds, each without one step, and none may pass in all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conformance.broken_builds import BROKEN, VARIABLE

pytestmark = pytest.mark.peer

HERE = Path(__file__).parent
SUITE = sorted(
    path.name
    for path in HERE.glob("test_*.py")
    if path.name not in ("test_broken_builds.py", "test_statements.py")
)
SAMPLE = (
    "test_stronger_rules_win and type-over-global or test_cat or test_linears and True-module"
    " or test_packed_weights_load and conv3d-default_per_channel or modules-per-tensor-memory"
)
ABOUT_SOMETHING_ELSE: dict[str, str] = {
    "test_every_test_on_the_page_exists": "reads the page on differences",
    "test_every_test_that_points_to_the_page_is_on_it": "reads the page on differences",
}
"""Tests that run no model -> what they look at."""


def outcomes(build: str, file: Path, *options: str) -> dict[str, bool]:
    """Run tests in a broken build: name -> whether it passed."""
    paths = [str(HERE / name) for name in SUITE]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={file}"]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, *paths],
        env={**os.environ, VARIABLE: build},
        cwd=HERE.parent.parent,
        capture_output=True,
        check=False,
    )
    cases = ElementTree.parse(file).iter("testcase")
    return {
        f"{case.get('classname')}::{case.get('name')}": case.find("failure") is None
        and case.find("error") is None
        for case in cases
    }


@pytest.mark.parametrize("build", BROKEN)
def test_a_sample_fails_in_every_broken_build(build: str, tmp_path: Path) -> None:
    found = outcomes(build, tmp_path / "out.xml", "-k", SAMPLE)
    assert len(found) >= 8
    assert [name for name, passed in found.items() if passed] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_test_passes_in_all_broken_builds(tmp_path: Path) -> None:
    runs = [outcomes(build, tmp_path / f"{build}.xml") for build in BROKEN]
    assert len(runs[0]) > 500
    passing = [name for name in runs[0] if all(found.get(name, True) for found in runs)]
    assert {name.split("::")[1].split("[")[0] for name in passing} == set(ABOUT_SOMETHING_ELSE)
