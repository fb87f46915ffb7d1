"""Small models taken all the way to int8, and every kernel held to its definition."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.errors import ConfigWarning
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.parity import ParityReport, parity
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from tests.lowering.qconfigs import PER_CHANNEL


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A model and what became of it."""

    model: nn.Module
    prepared: QuantGraphModule
    reference: QuantGraphModule
    int8: QuantGraphModule

    @property
    def kernels(self) -> list[str]:
        """The kernels of the lowered graph, in order, without quantize and dequantize."""
        found = [record_of(node).kernel for node in self.int8.graph.nodes]
        skip = ("", "aten::quantize_per_tensor", "aten::dequantize")
        return [kernel for kernel in found if kernel not in skip]

    def node(self, name: str) -> fx.Node:
        """A node of the lowered graph by the reference op it stands for, or by its own name."""
        for node in self.int8.graph.nodes:
            if record_of(node).stands_for in (name, f"{name}_quantize") or node.name == name:
                return node
        raise LookupError(name)

    def reasons(self) -> str:
        """All reasons of all nodes that still are in the lowered graph, one a line."""
        return "\n".join(r for n in self.int8.graph.nodes for r in record_of(n).reasons)

    def parity(self, *inputs: Any) -> ParityReport:
        """The report for these inputs."""
        return parity(self.reference, self.int8, inputs)

    def check(self, *inputs: Any) -> ParityReport:
        """Every kernel agrees with its definition on ``inputs``, and the results are near."""
        report = self.parity(*inputs)
        assert report.ok, f"\n{report}"
        with torch.no_grad():
            given, wanted = self.int8(*inputs), self.reference(*inputs)
        assert given.shape == wanted.shape
        assert given.dtype == wanted.dtype
        return report


def _lower(
    model: nn.Module, *inputs: Any, mapping: Any = None, calibration: list[Any] | None = None
) -> Lowered:
    model.eval()
    mapping = {"": PER_CHANNEL} if mapping is None else mapping
    before = copy.deepcopy(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*0..127 of 0..255", ConfigWarning)  # wished for here
        prepared = prepare_fx(model, mapping, inputs)
        for batch in calibration or [inputs]:
            expected = before(*copy.deepcopy(batch))
            given = prepared(*batch)
            scale = float(expected.abs().max()) or 1.0
            assert float((given - expected).abs().max()) <= 1e-5 * scale
        return Lowered(
            model=before,
            prepared=prepared,
            reference=convert_to_reference_fx(prepared),
            int8=convert_fx(prepared),
        )


@pytest.fixture(scope="session")
def lower() -> Callable[..., Lowered]:
    """``lower(model, *inputs)``: prepared (and equal to the model), calibrated and converted."""
    return _lower


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
