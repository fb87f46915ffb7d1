"""What torch.ao has under a name that means something else in :mod:`fxquant`, and its stubs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxquant.errors import UnsupportedBackendError
from fxquant.fake_quantize import (
    FakeQuantize,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
)
from fxquant.fake_quantize import default_fake_quant as _own_fake_quant
from fxquant.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    TorchHistogramObserver,
    default_per_channel_weight_observer,
    default_weight_observer,
)
from fxquant.observers import default_observer as _own_observer
from fxquant.qconfig import BackendDefaults, QConfig, backend_defaults
from fxquant.qconfig_mapping import (
    QConfigMapping,
)
from fxquant.qconfig_mapping import (
    get_default_qat_qconfig_mapping as _own_qat_mapping,
)
from fxquant.qconfig_mapping import (
    get_default_qconfig_mapping as _own_mapping,
)

HistogramObserver = TorchHistogramObserver
default_observer = _own_observer.with_args(quant_min=0, quant_max=127)
default_fake_quant = _own_fake_quant.with_args(quant_min=0, quant_max=127)
default_histogram_observer = TorchHistogramObserver.with_args(quant_min=0, quant_max=127)
default_histogram_fake_quant = default_fake_quant.with_args(observer=TorchHistogramObserver)
default_qconfig = QConfig(activation=default_observer, weight=default_weight_observer)
default_per_channel_qconfig = QConfig(
    activation=default_observer, weight=default_per_channel_weight_observer
)
default_qat_qconfig = QConfig(activation=default_fake_quant, weight=default_weight_fake_quant)
default_per_channel_qat_qconfig = QConfig(
    activation=default_fake_quant, weight=default_per_channel_weight_fake_quant
)
default_activation_only_qconfig = QConfig(activation=default_fake_quant, weight=nn.Identity)
default_quint8_weight_qconfig = QConfig(activation=TorchHistogramObserver, weight=MinMaxObserver)


def _backend(name: str) -> str:
    """torch.ao's ``x86`` is ``x86-compat`` here."""
    return "x86-compat" if name == "x86" else name


def _defaults(backend: str) -> BackendDefaults:
    return backend_defaults(_backend(backend))


def _check_version(version: int, known: tuple[int, ...]) -> None:
    if version not in known:
        raise UnsupportedBackendError(
            f"version {version} of the defaults is not supported, use one of"
            f" {', '.join(map(str, known))}"
        )


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """torch.ao's default for post-training quantization.

    Args:
        backend: ``x86``, ``fbgemm``, ``onednn`` or ``qnnpack``.
        version: 0.

    Raises:
        UnsupportedBackendError: another one (an ``AssertionError``).
    """
    _check_version(version, (0,))
    return _defaults(backend).ptq


def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """torch.ao's default for quantization-aware training.

    Args:
        backend: ``x86``, ``fbgemm``, ``onednn`` or ``qnnpack``.
        version: 1 observes and rounds in one step, 0 in two.

    Raises:
        UnsupportedBackendError: another one (an ``AssertionError``).
    """
    _check_version(version, (0, 1))
    fused = _defaults(backend).qat
    if version == 1:
        return fused
    reduce_range = backend in ("x86", "fbgemm")
    activation = FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=255,
        reduce_range=reduce_range,
    )
    per_tensor = backend == "qnnpack"
    weight = default_weight_fake_quant if per_tensor else default_per_channel_weight_fake_quant
    return QConfig(activation=activation, weight=weight)


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """torch.ao's default mapping for post-training quantization."""
    _check_version(version, (0,))
    return _with_torch_histogram(_own_mapping(_backend(backend)))


def _with_torch_histogram(mapping: QConfigMapping) -> QConfigMapping:
    mapping.object_type_qconfigs[nn.PReLU] = default_quint8_weight_qconfig
    return mapping


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """torch.ao's default mapping for training; see :func:`get_default_qat_qconfig`."""
    _check_version(version, (0, 1))
    mapping = _with_torch_histogram(_own_qat_mapping(_backend(backend)))
    if version == 1:
        return mapping
    fused, plain = _defaults(backend).qat, get_default_qat_qconfig(backend, 0)
    types = mapping.object_type_qconfigs.items()
    for kind, qconfig in list(types):
        if qconfig == fused:
            mapping.set_object_type(kind, plain)
    return mapping.set_global(plain)


class QuantStub(nn.Module):
    """Where a model that eager mode quantizes goes from floats to integers; a trace drops it.

    Args:
        qconfig: kept as an attribute.
    """

    def __init__(self, qconfig: Any = None) -> None:
        super().__init__()
        if qconfig:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        """``x``."""
        return x


class DeQuantStub(QuantStub):
    """Where such a model goes back to floats; a trace drops it."""


class QuantWrapper(nn.Module):
    """A module between a :class:`QuantStub` and a :class:`DeQuantStub`.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.quant = QuantStub(getattr(module, "qconfig", None))
        self.dequant = DeQuantStub(getattr(module, "qconfig", None))
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """What the module gives."""
        return self.dequant(self.module(self.quant(x)))  # type: ignore[no-any-return]  # modules have no types
