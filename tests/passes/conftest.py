"""Golden files: what a pass makes of a graph, as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent / "golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: ``text`` is what ``golden/<name>.txt`` holds.

    ``pytest --regenerate-golden`` writes the files anew; read the difference before committing it.
    """

    def compare(name: str, text: str) -> None:
        path = _FOLDER / f"{name}.txt"
        if request.config.getoption("--regenerate-golden"):
            path.write_text(f"{text}\n", encoding="utf-8")
        assert path.exists(), f"no {path}; write it with pytest --regenerate-golden"
        assert text.splitlines() == path.read_text(encoding="utf-8").splitlines()

    return compare
