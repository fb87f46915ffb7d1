"""The page on differences: its tests exist; and those that no section has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.conformance.harness import (
    OURS,
    THEIRS,
    Names,
    Peers,
    assert_same,
    default_mapping,
    everywhere,
    placement,
    run,
    steps,
)
from tests.conformance.models import Calls, conv, images, linear
from tests.conformance.test_qconfigs import observed_by, with_range

pytestmark = pytest.mark.peer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/differences.md").read_text(encoding="utf-8")
HERE = "tests/conformance/"
X = images()


def rows() -> list[list[str]]:
    """The cells of every row of every table."""
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if not set(row[0]) <= set("-| ") and row[0] != "torch.ao"]


def named_in(cell: str) -> list[tuple[Path, str]]:
    """The files and functions that a cell names."""
    names = re.findall(r"`([^`]+\.py)(?:::(\w+))?`", cell)
    return [(ROOT / (n if "/" in n else HERE + n), function) for n, function in names]


def test_every_test_on_the_page_exists() -> None:
    missing, before = [], False
    for row in rows():
        assert len(row) == 3, row
        named = named_in(row[2])
        before = bool(named) or (before and row[2] == "the same")
        if not before:
            missing.append(row[0])
        for path, function in named:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if not text or (function and f"def {function}(" not in text):
                missing.append(f"{path.name}::{function}")
    assert missing == []
    assert len(rows()) > 50


@pytest.mark.statement("S4.1c", "S4.3b", "S5.3b", "S5.9b", "S5.13b", "S7.10b", "S7.11a")
def test_every_test_that_points_to_the_page_is_on_it() -> None:
    named = {function for row in rows() for _, function in named_in(row[2])}
    pointing = set()
    for path in sorted((ROOT / HERE).glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for body in re.split(r"(?m)^(?=def test_|@pytest)", text):
            found = re.match(r"def (test_\w+)", body)
            if found and "differences.md" in body and path.name != Path(__file__).name:
                pointing.add(found[1])
    assert pointing - named == set()


def test_a_module_with_hooks_stays_in_float_and_runs_them(peers: Peers) -> None:
    seen: list[str] = []
    model = Calls(lambda s, x: s.b(s.h(s.a(x))), a=conv(), b=conv(), h=nn.Hardswish())
    model.h.register_forward_hook(lambda *_: seen.append("h"))
    found = []
    for names in (THEIRS, OURS):
        prepared, _ = peers.prepare(names, model, (X,), everywhere("default_qconfig"))
        run(prepared, (X,))
        _, lowered = peers.convert(names, prepared)
        seen.clear()
        result = run(lowered, (X,))
        found.append((list(seen), steps(lowered), len(placement(prepared))))
    assert found[0] == ([], (1, 0, 1), 4)
    assert found[1] == (["h"], (2, 0, 2), 4)
    seen.clear()
    with torch.no_grad():
        expected = model(X)
    assert float((result - expected).norm() / expected.norm()) < 0.05


def test_bounds_on_one_side_are_kept(peers: Peers) -> None:
    backend, model = with_range(quant_max_upper_bound=100), nn.Sequential(linear()).eval()
    found = []
    for names in (THEIRS, OURS):
        prepared, warned = peers.prepare(names, model, (X,), observed_by(), backend=backend)
        found.append((len(placement(prepared)), any("must fall within" in w for w in warned)))
    assert found == [(2, False), (0, True)]
    peers.compare(model, (X,), observed_by(), quantizes=1)


def test_dtypes_that_the_backend_lacks_are_told(peers: Peers) -> None:
    model = nn.Sequential(linear()).eval()
    told = []
    for names in (THEIRS, OURS):
        prepared, warned = peers.prepare(
            names, model, (X,), observed_by(dtype=torch.qint8, quant_min=-128, quant_max=127)
        )
        assert placement(prepared) == []
        told.append(any("the backend's is quint8" in w for w in warned))
    assert told == [False, True]


def test_half_a_range_is_told_where_it_is_needless(peers: Peers) -> None:
    told = []
    for names in (THEIRS, OURS):
        prepared, warned = peers.prepare(names, nn.Sequential(conv()).eval(), (X,))
        assert {spec[2:4] for *_, spec in placement(prepared)} == {(0, 127)}
        told.append(any("0..127 of 0..255" in w for w in warned))
    assert told[0] is False
    assert told[1] is (torch.backends.cpu.get_cpu_capability() == "AVX512") or not told[1]


class Inside(nn.Module):
    """A function in a scope."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)


def test_functions_of_a_traced_graph_keep_their_scopes(peers: Peers) -> None:
    """Where fx noted them: rules by name, and names of scales, follow them."""
    model = Calls(lambda s, x: s.d(s.a(x)), a=conv(), d=nn.Sequential(Inside()))

    def mapping(names: Names) -> Any:
        made = names.QConfigMapping().set_global(names.default_qconfig)
        return made.set_module_name("d", None)

    counts = []
    for names in (THEIRS, OURS):
        for given in (model, fx.symbolic_trace(model)):
            prepared, _ = peers.prepare(names, given, (X,), mapping)
            counts.append(len(placement(prepared)))
    assert counts == [2, 3, 2, 2]


def test_a_functional_convolution_and_a_batch_norm_stay_two(peers: Peers) -> None:
    """As in torch.ao: counts are the same; fxquant.prepare_fx folds them."""
    import fxquant

    weight = nn.Parameter(torch.randn(6, 3, 3, 3))
    model = Calls(
        lambda s, x: s.n(F.conv2d(x, s.w, None, (1, 1), (1, 1), (1, 1), 1)),
        w=weight,
        n=nn.BatchNorm2d(6),
    )
    done = peers.compare(model, (X,), everywhere("default_qconfig"), quantizes=1)
    assert len(placement(done.ours.prepared)) == 4
    folded = fxquant.prepare_fx(model, fxquant.get_default_qconfig_mapping("x86"), (X,))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_a_norm_with_parameters_is_quantized_by_any_qconfig(peers: Peers) -> None:
    """Its weight stays in float, whatever observer the qconfig has for weights."""
    parts = {"w": nn.Parameter(torch.randn(8)), "v": nn.Parameter(torch.randn(8))}
    named = Calls(lambda s, x: F.layer_norm(x, (8,), weight=s.w, bias=s.v), **parts)
    plain = Calls(lambda s, x: F.layer_norm(x, (8,), s.w, s.v), **parts)
    results = []
    for model in (named, plain):
        theirs, _ = peers.prepare(THEIRS, model, (X,), everywhere("default_qconfig"))
        assert placement(theirs) == []
        prepared, _ = peers.prepare(OURS, model, (X,), everywhere("default_qconfig"))
        run(prepared, (X,))
        results.append(run(peers.convert(OURS, prepared)[1], (X,)))
        assert len(placement(prepared)) == 2
        peers.compare(model, (X,), default_mapping, quantizes=1)
    assert_same(*results)
