"""convert-nested: what was prepared on its own is converted on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import LoweringWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.observers import FixedQParamsObserver, MinMaxObserver
from fxquant.pass_manager import PassResult, fingerprint
from fxquant.passes.convert_nested import ConvertNested, Observed
from fxquant.passes.nest_modules import Nested, NestModules
from fxquant.qconfig import QConfig
from tests.passes.helpers import node_named, observers
from tests.passes.nested_models import (
    IMAGES,
    ObservedTwice,
    QuantizedTwice,
    Twice,
    float_graph,
    run_alone,
    run_until,
)


class Chain(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.part = Twice()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.part(x)
        return x


def observed(path: str, module: nn.Module, qconfig: QConfig | None) -> Nested | None:
    made = ObservedTwice()
    return Nested(module=made, takes=None, gives=None, observed=True, qconfig=qconfig)


def prepared(calls: int) -> QuantGraphModule:
    gm = float_graph(Chain(calls), IMAGES, leaves=["part"])
    run_until(ConvertNested, gm, NestModules(observed))
    return gm


def quantized(
    path: str, module: nn.Module, qconfig: QConfig | None, observed: Observed
) -> nn.Module:
    assert isinstance(module, ObservedTwice)
    assert qconfig is not None
    return QuantizedTwice(observed())


def test_the_observer_of_the_result_goes_to_the_module() -> None:
    gm = prepared(1)
    assert list(observers(gm).values()) == ["x", "part"]
    seen = gm.activation_post_process_1
    given = []

    def convert(
        path: str, module: nn.Module, qconfig: QConfig | None, observed: Observed
    ) -> nn.Module:
        given.append((path, observed()))
        return quantized(path, module, qconfig, observed)

    assert run_alone(ConvertNested(convert), gm).changes
    assert given == [("part", seen)]
    assert isinstance(seen, MinMaxObserver)
    assert float(seen.max_val) == float(2 * IMAGES.max())
    assert list(observers(gm).values()) == ["x"]
    assert type(gm.part) is QuantizedTwice
    assert record_of(node_named(gm, "part")).gives_quantized


def test_two_calls_have_one_module_for_the_union_of_their_results() -> None:
    gm = prepared(2)
    assert len(observers(gm)) == 3
    seen: list[Any] = []

    def convert(
        path: str, module: nn.Module, qconfig: QConfig | None, observed: Observed
    ) -> nn.Module:
        seen.append(observed())
        return quantized(path, module, qconfig, observed)

    run_alone(ConvertNested(convert), gm)
    (observer,) = seen
    assert isinstance(observer, FixedQParamsObserver)
    wanted = MinMaxObserver()
    wanted(4 * IMAGES)
    torch.testing.assert_close(
        observer.calculate_qparams(), wanted.calculate_qparams(), rtol=1e-6, atol=0
    )
    assert len(observers(gm)) == 1


def test_what_nobody_converts_computes_in_float_and_is_told() -> None:
    gm = prepared(1)
    with pytest.warns(LoweringWarning, match=r"'part' \(ObservedTwice\) was to be quantized"):
        run_alone(ConvertNested(), gm)
    record = record_of(node_named(gm, "part"))
    assert (record.takes_quantized, record.gives_quantized) == ((), False)
    assert len(observers(gm)) == 2
    before = fingerprint(gm)
    assert run_alone(ConvertNested(), gm) == PassResult(changes=0)
    assert fingerprint(gm) == before
