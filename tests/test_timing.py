"""interleaved_latency: candidates take turns and are timed alike."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from fxquant.errors import ConfigError
from fxquant.timing import Latency, interleaved_latency, threads


def test_candidates_take_turns() -> None:
    order: list[str] = []
    rounds: list[int] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleaved_latency(calls, 2, warmup=2, after_round=lambda: rounds.append(len(order)))
    assert "".join(order) == "abcbcacababc"
    assert rounds == [3, 6, 9, 12]
    assert list(found) == ["a", "b", "c"]


def test_seconds_of_one_call() -> None:
    found = interleaved_latency({"wait": lambda: time.sleep(0.01), "none": int}, 5, warmup=0)
    assert 0.01 <= found["wait"].minimum <= found["wait"].median
    assert found["none"].median < 0.005


def test_the_median_is_of_the_timed_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 100.0, 0.0, 1.0, 0.0, 2.0, 0.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert interleaved_latency({"a": int}, 3, warmup=1) == {"a": Latency(median=2.0, minimum=1.0)}


def test_no_gradients_and_no_collection_inside() -> None:
    seen: list[tuple[bool, bool]] = []
    interleaved_latency({"a": lambda: seen.append((torch.is_grad_enabled(), gc.isenabled()))}, 1)
    assert set(seen) == {(False, False)}
    assert gc.isenabled()


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_rounds_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="interleaved_latency needs"):
        interleaved_latency({"a": int}, **options)
    with pytest.raises(ConfigError, match="0 callables"):
        interleaved_latency({})


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="must be >= 1"), threads(0):
        pass
