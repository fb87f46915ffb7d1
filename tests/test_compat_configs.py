"""fxquant.compat's config classes: the same objects, dicts read as torch.ao reads them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant import backend_config, compat, custom_config, dtype_config, qconfig_mapping
from fxquant.errors import ConfigWarning, UnknownKeyError

QCONFIG = compat.get_default_qconfig("qnnpack")
OWN = {
    "QConfigMapping": qconfig_mapping.QConfigMapping,
    "PrepareCustomConfig": custom_config.PrepareCustomConfig,
    "ConvertCustomConfig": custom_config.ConvertCustomConfig,
    "FuseCustomConfig": custom_config.FuseCustomConfig,
    "BackendConfig": backend_config.BackendConfig,
    "BackendPatternConfig": backend_config.BackendPatternConfig,
    "DTypeConfig": dtype_config.DTypeConfig,
}
DICTS: dict[str, dict[str, Any]] = {
    "QConfigMapping": {"": QCONFIG, "module_name": [("a", None)]},
    "PrepareCustomConfig": {"input_quantized_idxs": [0], "preserved_attributes": ["a"]},
    "ConvertCustomConfig": {"preserved_attributes": ["a"]},
    "FuseCustomConfig": {"preserved_attributes": ["a"]},
    "BackendConfig": {"name": "mine", "configs": [{"pattern": nn.Linear}]},
    "BackendPatternConfig": {"pattern": nn.Linear},
    "DTypeConfig": {"input_dtype": torch.quint8, "is_dynamic": True},
}


@pytest.mark.parametrize("name", OWN)
def test_both_names_have_the_same_instances(name: str) -> None:
    own, theirs = OWN[name], getattr(compat, name)
    made, same = theirs(), own()
    assert type(made) is own
    assert made == same
    assert isinstance(made, theirs)
    assert isinstance(same, theirs)
    assert isinstance(made, own)
    assert issubclass(own, theirs)
    assert issubclass(theirs, own)
    assert not isinstance(object(), theirs)
    assert not issubclass(int, theirs)
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


@pytest.mark.parametrize("name", OWN)
def test_unknown_keys_are_told_and_passed_over(name: str) -> None:
    own, theirs = OWN[name], getattr(compat, name)
    known = DICTS[name]
    expected = own.from_dict(known)
    assert theirs.from_dict(known) == expected != own()
    with pytest.warns(ConfigWarning, match=r"unknown key 'more'.*it is ignored"):
        found = theirs.from_dict({**known, "more": 1})
    assert found == expected
    with pytest.raises(UnknownKeyError, match="unknown key 'more'"):
        own.from_dict({**known, "more": 1})


def test_dicts_in_dicts_are_read_alike() -> None:
    given = {"name": "mine", "configs": [{"pattern": nn.Linear, "more": 1}]}
    with pytest.warns(ConfigWarning, match="'more'"):
        found = compat.BackendConfig.from_dict(given)
    assert len(found.configs) == 1
    row = ("a", {"": QCONFIG}, (), {"preserved_attributes": ["b"], "more": 1}, None)
    with pytest.warns(ConfigWarning, match="'more'"):
        custom = compat.PrepareCustomConfig.from_dict({"standalone_module_name": [row]})
    entry = custom.standalone_module_names["a"]
    assert entry.prepare_custom_config is not None
    assert entry.prepare_custom_config.preserved_attributes == ["b"]


def test_a_class_of_the_user_is_one_of_its_own() -> None:
    class Mine(compat.QConfigMapping):
        def set_global(self, global_qconfig: object) -> Any:
            return super().set_global(None)

    made = Mine().set_global(QCONFIG)
    assert type(made) is Mine
    assert made.global_qconfig is None
    assert isinstance(made, compat.QConfigMapping)
    assert isinstance(made, fxquant.QConfigMapping)
    assert not isinstance(compat.QConfigMapping(), Mine)
    with pytest.warns(ConfigWarning, match="'more'"):
        assert isinstance(Mine.from_dict({"more": 1}), Mine)


def test_prepare_tells_unknown_keys() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    with (
        pytest.warns(ConfigWarning, match="unknown key 'module_names'; .*did you mean"),
        pytest.warns(FutureWarning, match="Passing a QConfig dictionary to prepare is deprecated"),
    ):
        compat.prepare_fx(model, {"": QCONFIG, "module_names": [("0", None)]}, (x,))


@pytest.mark.peer
def test_torch_passes_over_the_same_keys() -> None:
    import torch.ao.quantization as tq
    import torch.ao.quantization.backend_config as tq_backend
    import torch.ao.quantization.fx.custom_config as tq_custom

    for module, names in (
        (tq, ("QConfigMapping",)),
        (tq_custom, ("PrepareCustomConfig", "ConvertCustomConfig", "FuseCustomConfig")),
        (tq_backend, ("BackendConfig", "BackendPatternConfig", "DTypeConfig")),
    ):
        for name in names:
            theirs = getattr(module, name)
            without = theirs.from_dict(DICTS[name])
            assert str(theirs.from_dict({**DICTS[name], "more": 1})) == str(without)
