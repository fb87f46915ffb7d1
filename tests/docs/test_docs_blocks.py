"""The blocks of README.md and docs/*.md do what they show.

``python`` blocks of one file run in order, in one namespace, in an empty folder. One that cannot
run says why in a comment on the line above it: ``<!-- not run: needs a GPU -->``. In ``console``
blocks every ``$ fxquant ...`` and ``$ make ...`` names a command, options and targets that exist.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<language>[\w+-]*)")
NOT_RUN = re.compile(r"^ *<!-- not run: *(?P<reason>.*?) *-->$")


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is the number of the first line inside it."""

    language: str
    line: int
    text: str
    not_run: str | None


def blocks_of(markdown: str) -> list[Block]:
    found = []
    lines = markdown.splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        start = number
        indent, marks = len(fence["indent"]), fence["marks"]
        while number < len(lines) and not lines[number].strip().startswith(marks):
            number += 1
        assert number < len(lines), f"the block that starts on line {start} never ends"
        above = NOT_RUN.match(lines[start - 2]) if start > 1 else None
        text = "\n".join(line[indent:] for line in lines[start:number])
        found.append(Block(fence["language"], start + 1, text, above["reason"] if above else None))
        number += 1
    return found


def blocks_in(path: Path, language: str) -> list[Block]:
    return [b for b in blocks_of(path.read_text(encoding="utf-8")) if b.language == language]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_in(block: Block) -> list[list[str]]:
    """The commands behind the prompts of a console block, without what they print."""
    text = block.text.replace("\\\n", " ")
    prompted = re.findall(r"^\$ +(.*)$", text, flags=re.MULTILINE)
    parts = (part for line in prompted for part in re.split(r"&&|\|\||[;|]", line))
    return [shlex.split(part, comments=True) for part in parts]


COMMANDS = [
    pytest.param(command, id=f"{name_of(path)}:{block.line} {shlex.join(command)}")
    for path in DOCUMENTS
    for block in blocks_in(path, "console")
    for command in commands_in(block)
    if command and command[0] in ("fxquant", "make")
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_in(path, "python"):
        if block.not_run is None:
            # Blank lines in front, so that a traceback shows the line of the document.
            code = compile(
                "\n" * (block.line - 1) + block.text, str(path), "exec", dont_inherit=True
            )
            exec(code, namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_what_is_not_run_says_why(path: Path) -> None:
    silent = [block.line for block in blocks_in(path, "python") if block.not_run == ""]
    assert silent == []


@pytest.mark.parametrize("command", COMMANDS)
def test_console_commands_exist(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for word in command[1:] if "=" not in word or word.startswith("-")]
    if command[0] == "make":
        targets = re.findall(
            r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
        )
        assert set(arguments) <= set(targets)
        return
    from fxquant.cli import main

    subcommand = [arguments[0]] if arguments and not arguments[0].startswith("-") else []
    monkeypatch.setattr(sys, "argv", ["fxquant", *subcommand, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code in (0, None)
    known = capsys.readouterr().out
    options = [word.split("=")[0] for word in arguments if word.startswith("-")]
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n"
    text += "<!-- not run: why -->\n  ```python\n  y\n  ```\n```console\n```"
    assert blocks_of(text) == [
        Block("python", 4, "x = 1", None),
        Block("python", 9, "y", "why"),
        Block("console", 12, "", None),
    ]


def test_commands_are_those_behind_prompts() -> None:
    text = "$ make test  # all\nok\n$ cd a && fxquant run \\\n    --x=1\nfxquant printed"
    found = commands_in(Block("console", 1, text, None))
    assert found == [["make", "test"], ["cd", "a"], ["fxquant", "run", "--x=1"]]
