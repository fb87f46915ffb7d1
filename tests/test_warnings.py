"""Every warning of the library is in one tree, and one switch silences or raises all of it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant import errors
from fxquant.errors import ConfigWarning, FxQuantWarning, StrictModeError
from fxquant.observers import MinMaxObserver
from fxquant.qconfig import QConfig, get_default_qconfig

ROOT = Path(__file__).parents[1]
FOLDERS = ("fxquant", "passes", "patterns")
CATEGORIES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, FxQuantWarning)
}


def _files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if not (
                folder == "fxquant"
                and path.relative_to(ROOT / "fxquant").parts[0]
                in ("passes", "patterns", "models_zoo")
            ):
                yield path


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, bool]]:
    """Every call of something named ``warn``, and whether it is compiled by TorchScript only."""
    scripted: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "is_scripting()" in ast.unparse(node.test):
            scripted |= {inner for child in node.body for inner in ast.walk(child)}
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "warn":
            yield node, node in scripted


def test_every_warning_names_a_category_of_the_tree() -> None:
    """TorchScript has no categories: what it compiles is a plain ``UserWarning``."""
    found = 0
    for path in _files():
        for call, scripted in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            given = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "category")]
            names = {ast.unparse(value).split(".")[-1] for value in given}
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            passes_on = path.name == "errors.py" and "category" in names
            assert names & CATEGORIES or scripted or passes_on, where
            found += 1
    assert found >= 20


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn = errors.__doc__ or ""
    for name in CATEGORIES:
        assert name in drawn
        assert issubclass(getattr(errors, name), UserWarning)


MODEL = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(), nn.Conv2d(4, 4, 1, padding_mode="reflect"))
X = torch.randn(2, 3, 8, 8)
WISH = QConfig(MinMaxObserver.with_args(dtype=torch.int16), get_default_qconfig().weight)


def _provoke() -> Any:
    """Warnings of the trace, the configuration, missing calibration and lowering."""
    model = MODEL.train()
    mapping = {"": get_default_qconfig(), "2": WISH, nn.LSTM: None}
    prepared = fxquant.prepare_fx(model, mapping, (X,))
    fxquant.convert_fx(prepared)
    fxquant.quantize(model, None, mapping, example_inputs=(X,))


def _raised() -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _provoke()
    return caught


def test_only_warnings_of_the_tree_are_raised() -> None:
    caught = _raised()
    assert len({w.category for w in caught}) >= 2
    assert all(issubclass(w.category, FxQuantWarning) for w in caught)
    assert all(Path(w.filename) == Path(__file__) for w in caught)  # they show the user's line


def test_the_switch_silences_all_of_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=fxquant.FxQuantWarning)
        _provoke()


def test_the_switch_raises_all_of_them() -> None:
    for warning in _raised():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", category=warning.category)
            with pytest.raises(warning.category):
                _provoke()


def test_one_kind_can_be_let_through() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=ConfigWarning)
        _provoke()
    assert {w.category for w in caught} == {ConfigWarning}


def test_strict_makes_errors_of_one_call() -> None:
    with pytest.raises(StrictModeError, match="int16"):
        fxquant.prepare_fx(MODEL.eval(), {"": WISH}, (X,), strict=True)


def test_each_message_comes_once_a_call() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxquant.prepare_fx(MODEL.train(), {"": get_default_qconfig(), "2": WISH}, (X,))
    texts = [str(w.message) for w in caught]
    assert len(texts) == len(set(texts)) == 2
