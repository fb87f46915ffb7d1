"""What conformance tests share: whose config objects are given, seeds, builds that are broken."""

from __future__ import annotations

import os

import pytest
import torch

from tests.conformance.broken_builds import BROKEN, VARIABLE
from tests.conformance.harness import OURS, THEIRS, Peers


@pytest.fixture(params=[THEIRS, OURS], ids=lambda names: f"configs-of-{names.library}")
def peers(request: pytest.FixtureRequest) -> Peers:
    return Peers(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _broken_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without what the tests must notice, where the environment names one."""
    name = os.environ.get(VARIABLE)
    if name:
        BROKEN[name](monkeypatch)
