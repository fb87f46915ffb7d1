"""What all tests share: the data folder, what was skipped for want of it, packings, a switch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant import packing
from fxquant.errors import DataNotFoundError
from fxquant.graph_state import PackRecord
from fxquant.models_zoo.data import DATA_VARIABLE, find_data_dir

SKIP_REASON = f"needs the data folder; set {DATA_VARIABLE}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """One switch for all golden files."""
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write the golden files of tests/**/golden anew instead of comparing with them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """One thread a process: tests run side by side, and small tensors gain nothing from two."""
    torch.set_num_threads(1)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """The same numbers in modules that test files make at import, whichever files are collected."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The data folder; the test skips where there is none, and fails where a wrong one is set."""
    try:
        return find_data_dir()
    except DataNotFoundError as error:
        if os.environ.get(DATA_VARIABLE):
            pytest.fail(str(error))
        pytest.skip(SKIP_REASON)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[PackRecord]:
    """The packed constants that are made, in order."""
    found: list[PackRecord] = []
    ordinary = packing.pack

    def noting(root: nn.Module, record: PackRecord) -> object:
        found.append(record)
        return ordinary(root, record)

    monkeypatch.setattr(packing, "pack", noting)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run because the data folder is absent."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(SKIP_REASON in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests skipped for missing data ({SKIP_REASON})")
