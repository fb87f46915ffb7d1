"""shift-signed: int8 activations on kernels of uint8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxquant.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
)
from fxquant.compat import (
    MinMaxObserver,
    PrepareCustomConfig,
    QConfig,
    QConfigMapping,
    convert_fx,
    convert_to_reference_fx,
    default_weight_observer,
    prepare_fx,
)
from fxquant.graph_module import QuantGraphModule
from fxquant.operators import QUANTIZE
from fxquant.parity import parity
from fxquant.pass_manager import PassResult
from fxquant.passes.inline_references import inlined
from fxquant.passes.shift_signed import ShiftSigned, shifted
from tests.passes.helpers import graph_text, run_alone

pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.ConfigWarning")

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.second(y.view(y.size(0), -1))
        return z


def _backend() -> BackendConfig:
    dtypes = DTypeConfig(
        input_dtype=torch.qint8,
        output_dtype=torch.qint8,
        weight_dtype=torch.qint8,
        bias_dtype=torch.float32,
    )
    own = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    shared = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    return BackendConfig("signed").set_backend_pattern_configs(
        [
            BackendPatternConfig(nn.Linear).set_observation_type(own).add_dtype_config(dtypes),
            BackendPatternConfig("view").set_observation_type(shared).add_dtype_config(dtypes),
        ]
    )


def prepared(custom: PrepareCustomConfig | None = None) -> QuantGraphModule:
    signed = MinMaxObserver.with_args(dtype=torch.qint8)
    mapping = QConfigMapping().set_global(QConfig(signed, default_weight_observer))
    made = prepare_fx(Model().eval(), mapping, (X,), custom, backend_config=_backend())
    made(X)
    return made


def signed_steps(gm: QuantGraphModule) -> list[str]:
    nodes = gm.graph.nodes
    return [n.name for n in nodes if n.target is QUANTIZE and n.args[5] is torch.int8]


def test_signed_activations_are_shifted(golden: Callable[[str, str], None]) -> None:
    gm = inlined(convert_to_reference_fx(prepared()))
    expected = gm(X)
    assert len(signed_steps(gm)) == 4
    assert run_alone(ShiftSigned(), gm).changes
    golden("shift-signed", graph_text(gm))
    assert signed_steps(gm) == []
    assert torch.equal(gm(X), expected)
    assert run_alone(ShiftSigned(), gm) == PassResult(changes=0)


def test_they_run_on_kernels() -> None:
    reference, lowered = convert_to_reference_fx(prepared()), convert_fx(prepared())
    names = [str(node.target) for node in lowered.graph.nodes]
    assert names.count("quantized.linear.default") == 2
    assert torch.equal(lowered(X), reference(X))
    report = parity(reference, lowered, (X,))
    assert all(row.max_lsb == 0 for row in report.rows)
    assert shifted(lowered) is lowered


def test_what_others_take_stays_signed() -> None:
    gm = convert_to_reference_fx(prepared(PrepareCustomConfig().set_output_quantized_indexes([0])))
    assert signed_steps(gm)
    assert shifted(gm) is gm
