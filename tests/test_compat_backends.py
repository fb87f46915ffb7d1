"""torch.ao's backend configs under their names allow what torch.ao's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxquant import compat
from fxquant.backend_config import BackendConfig, as_backend_config
from fxquant.metadata import record_of
from fxquant.targets.compat import compat_target

NAMES = ("native", "fbgemm", "qnnpack", "onednn")


def allowed(config: object) -> dict[Any, Any]:
    read = as_backend_config(config)
    assert isinstance(read, BackendConfig)
    allow = compat_target(read).allow
    assert allow is not None
    return dict(allow.patterns)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_allows_the_same(name: str) -> None:
    import torch.ao.quantization.backend_config as theirs
    import torch.ao.quantization.quantize_fx  # noqa: F401  # theirs needs it to be imported

    expected = getattr(theirs, f"get_{name}_backend_config")()
    ours = getattr(compat, f"get_{name}_backend_config")()
    assert ours.name == expected.name
    assert allowed(ours) == allowed(expected)
    assert len(allowed(ours)) > 150


@pytest.mark.parametrize("name", NAMES)
def test_prepare_takes_them(name: str) -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.LayerNorm(6), nn.Linear(6, 5), nn.LeakyReLU())
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    backend = getattr(compat, f"get_{name}_backend_config")()
    qconfig = compat.get_default_qconfig("onednn")
    mapping = compat.QConfigMapping().set_global(qconfig)
    prepared = compat.prepare_fx(model, mapping, (x,), backend_config=backend)
    records = [record_of(n) for n in prepared.graph.nodes if str(n.target) in ("0", "1", "2", "3")]
    quantized = [record.annotation is not None for record in records]
    assert quantized == [True, name in ("native", "onednn"), True, True]
    assert (records[3].fusion is not None) == (name == "onednn")


def test_symmetric_activations_are_asked_of_qnnpack_first() -> None:
    for config in compat.get_qnnpack_backend_config().configs:
        if config.pattern is nn.Conv2d:
            first, second = config.dtype_configs
            assert first.weight_dtype_with_constraints.quant_min_lower_bound == -127
            assert first.input_dtype_with_constraints.scale_min_lower_bound == 2**-12
            assert second.input_dtype is torch.quint8
