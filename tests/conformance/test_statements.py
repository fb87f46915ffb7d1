"""The table of statements, and the list of those without a test."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = spec_from_file_location("list_untested", HERE / "list_untested.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ids_are_in_order_and_letters_without_gaps(tool: Any) -> None:
    ids = list(tool.statements())
    keys = [(*map(int, re.findall(r"\d+", one)), one[-1]) for one in ids]
    assert keys == sorted(set(keys))
    for section, point, letter in keys:
        before = chr(ord(letter) - 1)
        assert letter == "a" or (section, point, before) in keys
    assert set(tool.numbered(ids)) == {str(section) for section in range(1, 11)}
    for section, highest in tool.numbered(ids).items():
        assert {p for s, p, _ in keys if str(s) == section} == set(range(1, highest + 1))


def test_every_statement_has_a_tag_and_a_line(tool: Any) -> None:
    for one in tool.statements().values():
        assert one.tag in ("T", "O", "Q")
        assert 10 < len(one.text) <= 100


def test_claims_are_found_in_tests(tool: Any) -> None:
    source = '@pytest.mark.statement("S1.1a", "S2.2b")\ndef test_x(): ...\nx = "S3.1a"\n'
    assert tool.claimed([source, "def test_y(): ..."]) == {"S1.1a", "S2.2b"}


def test_what_is_claimed_exists(tool: Any) -> None:
    assert tool.claimed(tool.sources()) <= set(tool.statements())


def test_the_table_is_compared_with_its_text(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(
        f"## {section}. x\n" + "- point [T]\n  goes on\n" * count
        for section, count in tool.numbered(tool.statements()).items()
    )
    assert tool.points(text) == tool.numbered(tool.statements())
    (tmp_path / "text.md").write_text(text + "- one more\n")
    assert tool.main(["--semantics", str(tmp_path / "text.md")]) == 1
    assert "the text has" in capsys.readouterr().out
