"""Which qconfigs fit which dtype configs, with torch.ao's decision and words as the measure."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import qconfig as qconfigs
from fxquant.backend_fit import Misfit, fitting, misfit, traits_of
from fxquant.dtype_config import DTypeConfig, DTypeWithConstraints
from fxquant.observers import (
    HistogramObserver,
    MinMaxObserver,
    NoopObserver,
    PlaceholderObserver,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_weight_observer,
    weight_observer_range_neg_127_to_127,
)
from fxquant.qconfig import QConfig

U8, I8, F32, F16 = torch.quint8, torch.qint8, torch.float32, torch.float16
C = DTypeWithConstraints
FIXED = C(U8, 0, 255, scale_exact_match=1 / 256, zero_point_exact_match=0)


def _activation(factory: Any) -> QConfig:
    return QConfig(factory, default_weight_observer)


def _minmax(**options: Any) -> QConfig:
    return _activation(MinMaxObserver.with_args(dtype=U8, **options))


PLAIN = _minmax()
FITTING: list[tuple[QConfig, DTypeConfig]] = [
    (PLAIN, DTypeConfig(U8, U8, I8, F32)),
    (PLAIN, DTypeConfig()),
    (PLAIN, DTypeConfig(U8, None, I8)),
    (PLAIN, DTypeConfig(None, U8, None)),
    (PLAIN, DTypeConfig(U8, U8, I8, F32, is_dynamic=False)),
    (PLAIN, DTypeConfig(C(U8, 0, 255), U8, C(I8, -128, 127))),
    (_minmax(quant_min=0, quant_max=127), DTypeConfig(C(U8, 0, 127), C(U8, 0, 127))),
    (_minmax(reduce_range=True), DTypeConfig(C(U8, 0, 127), U8)),
    (_minmax(eps=2**-12), DTypeConfig(C(U8, scale_min_lower_bound=2**-12), U8)),
    (PLAIN, DTypeConfig(C(U8, scale_max_upper_bound=1e-9), U8)),
    (_activation(MinMaxObserver.with_args(dtype=torch.uint8)), DTypeConfig(U8, U8, I8)),
    (_activation(default_fixed_qparams_range_0to1_observer), DTypeConfig(FIXED, FIXED)),
    (
        QConfig(MinMaxObserver, weight_observer_range_neg_127_to_127),
        DTypeConfig(U8, U8, C(I8, -127, 127)),
    ),
    (qconfigs.default_dynamic_qconfig, DTypeConfig(U8, F32, I8, F32, True)),
    (qconfigs.default_dynamic_qconfig, DTypeConfig(U8, None, I8, F32, True)),
    (qconfigs.float16_dynamic_qconfig, DTypeConfig(F16, F32, F16, F32, True)),
    (qconfigs.float16_static_qconfig, DTypeConfig(F16, F16, F16, F16)),
    (qconfigs.float_qparams_weight_only_qconfig, DTypeConfig(F32, F32, U8)),
    (qconfigs.float_qparams_weight_only_qconfig_4bit, DTypeConfig(F32, F32, torch.quint4x2)),
    (QConfig(None, default_weight_observer), DTypeConfig(F32, F32, I8)),
]

REFUSED: list[tuple[QConfig, DTypeConfig, str, bool]] = [
    (
        PLAIN,
        DTypeConfig(C(U8, 0, 127), U8),
        r"QConfig activation quantization range must fall within the backend's:\n"
        r"QConfig range = \(0, 255\), BackendConfig range = \(0, 127\), ignoring QConfig\(",
        False,
    ),
    (PLAIN, DTypeConfig(U8, C(U8, 10, 255)), r"BackendConfig range = \(10, 255\)", False),
    (PLAIN, DTypeConfig(C(U8, None, 127)), r"BackendConfig range = \(None, 127\)", False),
    (PLAIN, DTypeConfig(C(U8, 1, None)), r"BackendConfig range = \(1, None\)", False),
    (
        _activation(PlaceholderObserver.with_args(dtype=U8)),
        DTypeConfig(C(U8, 0, 255)),
        "QConfig activation must specify 'quant_min' and 'quant_max', ignoring",
        False,
    ),
    (
        PLAIN,
        DTypeConfig(C(U8, scale_min_lower_bound=2**-12)),
        r"QConfig activation eps \(1.19\S+\) must be greater than or equal to the backend's min "
        r"scale value \(0.000244140625\), ignoring",
        False,
    ),
    (
        _activation(default_fixed_qparams_range_0to1_observer),
        DTypeConfig(C(U8, scale_min_lower_bound=2**-12)),
        "QConfig activation must specify 'eps', ignoring",
        False,
    ),
    (
        PLAIN,
        DTypeConfig(FIXED),
        "QConfig must specify a FixedQParamsObserver or a FixedQParamsFakeQuantize for fixed "
        "qparams ops, ignoring QConfig",
        False,
    ),
    (
        _activation(default_fixed_qparams_range_neg1to1_observer),
        DTypeConfig(FIXED),
        r"QConfig fixed scale \(0.0078125\) and zero point \(128\) do not match the backend's "
        r"\(0.00390625 and 0\), ignoring",
        False,
    ),
    (
        PLAIN,
        DTypeConfig(U8, U8, C(I8, -127, 127)),
        "QConfig weight quantization range must fall within the backend's",
        False,
    ),
    (
        PLAIN,
        DTypeConfig(U8, U8, C(I8, scale_min_lower_bound=1.0)),
        "QConfig weight eps",
        False,
    ),
    (PLAIN, DTypeConfig(I8), "activation is quint8, the backend's is qint8", True),
    (PLAIN, DTypeConfig(U8, F32), "activation is quint8, the backend's is float32", True),
    (PLAIN, DTypeConfig(U8, U8, U8), "weight is int8, the backend's is quint8", True),
    (PLAIN, DTypeConfig(U8, U8, I8, F16), "bias is float32, the backend's is float16", True),
    (PLAIN, DTypeConfig(U8, F32, I8, F32, True), "is static, the backend's is dynamic", True),
    (
        qconfigs.default_dynamic_qconfig,
        DTypeConfig(U8, U8, I8),
        "is dynamic, the backend's is static",
        True,
    ),
    (
        qconfigs.default_dynamic_qconfig,
        DTypeConfig(U8, U8, I8, F32, True),
        "QConfig output is float32, the backend's is quint8",
        True,
    ),
    (
        qconfigs.float16_static_qconfig,
        DTypeConfig(F16, F16, F16, F32),
        "bias is float16, the backend's is float32",
        True,
    ),
    (
        qconfigs.float_qparams_weight_only_qconfig,
        DTypeConfig(F32, F32, torch.quint4x2),
        "weight is uint8, the backend's is quint4x2",
        True,
    ),
    (QConfig(NoopObserver, NoopObserver), DTypeConfig(U8, U8, I8), "is float16", True),
    (QConfig(None, None), DTypeConfig(U8, U8, I8), "is float32", True),
]


@pytest.mark.parametrize(("qconfig", "config"), FITTING)
def test_what_fits(qconfig: QConfig, config: DTypeConfig) -> None:
    assert misfit(qconfig, config, weighted=True) is None
    assert fitting(qconfig, [DTypeConfig(torch.qint32), config], weighted=True) is config


@pytest.mark.parametrize(("qconfig", "config", "message", "about_dtype"), REFUSED)
def test_what_does_not_fit_says_why(
    qconfig: QConfig, config: DTypeConfig, message: str, about_dtype: bool
) -> None:
    found = misfit(qconfig, config, weighted=True)
    assert found is not None
    assert found.about_dtype is about_dtype
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.message)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_weight_counts_only_where_there_is_one(weighted: bool) -> None:
    found = misfit(PLAIN, DTypeConfig(U8, U8, C(I8, -1, 1), F16), weighted=weighted)
    assert (found is None) is not weighted


def test_the_first_that_fits_is_taken() -> None:
    configs = [DTypeConfig(I8), DTypeConfig(U8, U8, I8), DTypeConfig(U8)]
    assert fitting(PLAIN, configs, weighted=True) is configs[1]


def test_a_range_says_more_than_a_dtype() -> None:
    configs = [DTypeConfig(I8), DTypeConfig(C(U8, 0, 127))]
    found = fitting(PLAIN, configs, weighted=True)
    assert isinstance(found, Misfit)
    assert "(0, 127)" in found.message
    found = fitting(PLAIN, [DTypeConfig(I8), DTypeConfig(F16)], weighted=True)
    assert isinstance(found, Misfit)
    assert found.about_dtype
    assert found.message.count("the backend's is") == 2
    nothing = fitting(PLAIN, [], weighted=True)
    assert isinstance(nothing, Misfit)
    assert "no dtypes at all" in nothing.message


def test_fake_quantizers_are_read_through() -> None:
    traits = traits_of(qconfigs.default_symmetric_qnnpack_qat_qconfig.activation)
    assert (traits.dtype, traits.quant_min, traits.quant_max) == (torch.int8, -128, 127)
    assert traits.eps == 2**-12
    assert traits_of(HistogramObserver).fixed is None


# -- torch.ao decides the same --------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _torch_ao_quantizes(qconfig: Any, config: DTypeConfig) -> tuple[bool, str]:
    """Whether torch.ao observes a functional linear, and what it warns of."""
    from torch.ao.quantization import QConfigMapping, backend_config, quantize_fx

    def constrained(name: str) -> Any:
        ours = getattr(config, f"{name}_dtype_with_constraints")
        fields = {n: getattr(ours, n) for n in DTypeWithConstraints.__dataclass_fields__}
        return backend_config.DTypeWithConstraints(**fields)

    theirs = backend_config.DTypeConfig(
        *(constrained(name) for name in ("input", "output", "weight")),
        bias_dtype=config.bias_dtype,
        is_dynamic=config.is_dynamic,
    )
    pattern = backend_config.BackendPatternConfig(F.linear).add_dtype_config(theirs)
    pattern._set_input_type_to_index({"weight": 1, "bias": 2})
    backend = backend_config.BackendConfig().set_backend_pattern_config(pattern)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = quantize_fx.prepare_fx(
            Functional().eval(),
            QConfigMapping().set_global(qconfig),
            (torch.ones(1, 2),),
            backend_config=backend,
        )
    texts = [str(w.message) for w in caught if "ignoring" in str(w.message)]
    return any("activation_post" in name for name, _ in prepared.named_children()), " ".join(texts)


def _configs() -> list[DTypeConfig]:
    plain = [
        DTypeConfig(*dtypes)
        for dtypes in itertools.product(
            [None, U8, F16], [None, U8, F32], [None, I8, F16], [None, F32], [None, True]
        )
    ]
    bounds = [
        DTypeConfig(C(U8, low, high, eps), C(U8), C(I8, weight_low, 127), F32)
        for low, high in ((None, None), (0, 255), (0, 127), (1, 255))
        for eps in (None, 2**-12)
        for weight_low in (-128, -127)
    ]
    fixed = [
        DTypeConfig(C(U8, 0, 255, scale_exact_match=scale, zero_point_exact_match=zero), U8, I8)
        for scale in (None, 1 / 256, 1 / 128)
        for zero in (None, 0, 128)
    ]
    return [*plain[::3], *bounds, *fixed]


def _both(name: str) -> tuple[QConfig, Any]:
    """The same qconfig of fxquant and of torch.ao."""
    from torch.ao import quantization as theirs

    weight = theirs.default_weight_observer
    narrow = theirs.weight_observer_range_neg_127_to_127
    minmax = theirs.MinMaxObserver
    table: dict[str, tuple[QConfig, Any]] = {
        "static": (PLAIN, theirs.QConfig(minmax.with_args(dtype=U8), weight)),
        "half": (
            QConfig(
                MinMaxObserver.with_args(dtype=U8, quant_min=0, quant_max=127),
                weight_observer_range_neg_127_to_127,
            ),
            theirs.QConfig(minmax.with_args(dtype=U8, quant_min=0, quant_max=127), narrow),
        ),
        "symmetric": (
            qconfigs.default_symmetric_qnnpack_qconfig,
            theirs.default_symmetric_qnnpack_qconfig,
        ),
        "dynamic": (qconfigs.default_dynamic_qconfig, theirs.default_dynamic_qconfig),
        "float16": (qconfigs.float16_dynamic_qconfig, theirs.float16_dynamic_qconfig),
        "float16 static": (qconfigs.float16_static_qconfig, theirs.float16_static_qconfig),
        "fixed": (
            _activation(default_fixed_qparams_range_0to1_observer),
            theirs.QConfig(theirs.default_fixed_qparams_range_0to1_observer, weight),
        ),
        "qat": (qconfigs.default_qat_qconfig_v2, theirs.default_qat_qconfig_v2),
    }
    return table[name]


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    ["static", "half", "symmetric", "dynamic", "float16", "float16 static", "fixed", "qat"],
)
def test_torch_ao_takes_and_refuses_the_same(name: str) -> None:
    ours, theirs = _both(name)
    fits = 0
    for config in _configs():
        quantized, text = _torch_ao_quantizes(theirs, config)
        for qconfig in (ours, QConfig(theirs.activation, theirs.weight)):
            found = misfit(qconfig, config, weighted=True)
            assert (found is None) is quantized, config
            if found is not None:
                assert found.about_dtype is not bool(text), config
            if found is not None and text:
                assert re.split(r" \(|,|\n", found.message)[0] in text
        fits += quantized
    assert fits > 0


@pytest.mark.peer
def test_one_bound_alone_counts_here() -> None:
    """torch.ao passes over a bound whose partner is unset."""
    ours, theirs = _both("static")
    config = DTypeConfig(C(U8, None, 127), U8, I8)
    assert _torch_ao_quantizes(theirs, config) == (True, "")
    assert misfit(ours, config, weighted=True) is not None
