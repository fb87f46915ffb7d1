"""Mappings written to a file come back equal, and mistakes in a file are named."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.config_file import (
    from_plain,
    load_qconfig_mapping,
    qconfig_to_plain,
    save_qconfig_mapping,
    to_plain,
)
from fxquant.errors import ConfigError
from fxquant.observers import HistogramObserver, MinMaxObserver, PartialFactory
from fxquant.qconfig import QConfig, default_dynamic_qconfig, get_default_qconfig
from fxquant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from fxquant.range_rules import PercentileRule

SPECIAL = QConfig(
    activation=HistogramObserver.with_args(
        dtype=torch.uint8, rule=PercentileRule(0.999), quant_min=0, quant_max=127
    ),
    weight=MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric),
)
FULL = (
    QConfigMapping()
    .set_global(get_default_qconfig("x86"))
    .set_object_type(nn.Linear, None)
    .set_object_type(F.relu, SPECIAL)
    .set_object_type(operator.add, None)
    .set_object_type("reshape", default_dynamic_qconfig)
    .set_module_name_regex("layer[12]\\..*", SPECIAL)
    .set_module_name("layer1.0", None)
    .set_module_name_object_type_order("layer3", nn.Conv2d, 2, SPECIAL)
)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("mapping", [FULL, get_default_qconfig_mapping("x86"), QConfigMapping()])
def test_a_file_gives_back_an_equal_mapping(
    mapping: QConfigMapping, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"mapping.{suffix}"
    save_qconfig_mapping(mapping, path)
    again = load_qconfig_mapping(path)
    assert again == mapping
    assert to_plain(again) == to_plain(mapping)


def test_observers_are_named_by_their_package() -> None:
    """In which module of the package a class stands may change, and files stay readable."""
    plain = qconfig_to_plain(SPECIAL)
    assert plain is not None
    assert plain["activation"]["make"] == "fxquant.observers.HistogramObserver"
    assert plain["weight"]["make"] == "fxquant.observers.MinMaxObserver"


def test_the_observers_that_come_back_observe_the_same() -> None:
    again = from_plain(to_plain(FULL)).module_name_regex_qconfigs["layer[12]\\..*"]
    assert again is not None
    assert again.activation().rule == PercentileRule(0.999)
    assert again.activation().spec == SPECIAL.activation().spec


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ({"globl": None}, "'globl'"),
        ({"global": {"activation": None}}, "activation and weight"),
        ({"global": {"activation": {"make": "fxquant.observers.Nope"}, "weight": None}}, "Nope"),
        ({"object_type": [["class torch.nn.Linearr", None]]}, "Linearr"),
        (
            {
                "global": {
                    "activation": {
                        "make": "fxquant.observers.HistogramObserver",
                        "rule": {"rule": "BestRule"},
                    },
                    "weight": None,
                }
            },
            "BestRule",
        ),
    ],
)
def test_mistakes_are_named(plain: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_plain(plain)


def test_what_has_no_name_is_refused() -> None:
    class Local(MinMaxObserver):
        pass

    for factory in (Local, PartialFactory(Local, {}), lambda: MinMaxObserver()):
        with pytest.raises(ConfigError):
            to_plain(QConfigMapping().set_global(QConfig(activation=factory, weight=None)))


def test_only_known_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.json, \.yaml or \.yml"):
        save_qconfig_mapping(FULL, tmp_path / "mapping.txt")
