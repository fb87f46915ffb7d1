"""compat.QConfig takes what torch.ao's takes; prepare refuses what is no factory."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import fxquant
from fxquant import compat
from fxquant.errors import ConfigError


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4)).eval()


def _mappings(qconfig: object) -> dict[str, compat.QConfigMapping]:
    return {
        "global": compat.QConfigMapping().set_global(qconfig),
        "object_type": compat.QConfigMapping().set_object_type(nn.Linear, qconfig),
        "regex": compat.QConfigMapping().set_module_name_regex("0", qconfig),
        "name": compat.QConfigMapping().set_module_name("0", qconfig),
    }


def _refused_by_prepare(qconfig: object) -> None:
    for mapping in _mappings(qconfig).values():
        with pytest.raises(ConfigError, match="needs observer classes or factories, got 123"):
            compat.prepare_fx(_linear(), mapping, (torch.randn(2, 4),))


def test_anything_is_kept_and_refused_where_it_is_used() -> None:
    qconfig = compat.QConfig(123, "global")
    assert (qconfig.activation, qconfig.weight) == (123, "global")
    assert compat.QConfigMapping().set_global(qconfig).global_qconfig == compat.QConfig(
        123, "global"
    )
    assert qconfig != compat.QConfig(activation=123, weight="other")
    _refused_by_prepare(qconfig)


@pytest.mark.peer
def test_those_of_torch_ao_likewise() -> None:
    from torch.ao.quantization import QConfig

    mapping = compat.QConfigMapping().set_global(QConfig(123, "global"))
    assert mapping.global_qconfig == QConfig(123, "global")
    _refused_by_prepare(QConfig(123, "global"))


def test_it_is_the_class_of_fxquant() -> None:
    qconfig = compat.QConfig(compat.MinMaxObserver, compat.default_weight_observer)
    assert type(qconfig) is fxquant.QConfig
    assert isinstance(qconfig, compat.QConfig)
    assert isinstance(compat.default_qconfig, compat.QConfig)
    assert pickle.loads(pickle.dumps(qconfig)) == qconfig
    with pytest.raises(ConfigError, match="needs an observer class or factory as activation"):
        fxquant.QConfig(123, compat.default_weight_observer)
    with pytest.raises(ConfigError, match="please pass observer class instead"):
        compat.QConfig(compat.MinMaxObserver(), compat.default_weight_observer)
