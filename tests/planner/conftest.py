"""Measured latencies of tests go to a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.machine_file import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
