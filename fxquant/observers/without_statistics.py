"""Observers that make no range: parameters that the op dictates, a dtype alone, or a recording."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
import warnings

import torch
from torch import Tensor

from fxquant.errors import ConfigError, ConfigWarning
from fxquant.observers.base import ObserverBase, integer_range
from fxquant.specs import DEFAULT_EPS, QParams, QuantSpec, storage_dtype


class FixedQParamsObserver(ObserverBase):
    """Scale and zero point that the op dictates: sigmoid, tanh, softmax, hardsigmoid.

    Args:
        scale: the scale.
        zero_point: the zero point.
        dtype: dtype of the integers.
        qscheme: ``torch.per_tensor_affine`` or ``per_tensor_symmetric``.
        quant_min: smallest integer.
        quant_max: largest integer.
        is_dynamic: kept for torch.ao's signature.
    """

    scale: Tensor
    zero_point: Tensor
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))
        _ = self.spec  # validates

    @property
    def spec(self) -> QuantSpec:
        """How the tensor is to be quantized, with ``fixed`` set."""
        return QuantSpec(
            dtype=storage_dtype(self.dtype),
            qscheme=self.qscheme,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            is_dynamic=self.is_dynamic,
            fixed=(float(self.scale), int(self.zero_point)),
        )

    @property
    def was_observed(self) -> bool:
        """Always: nothing needs to be seen."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back; nothing depends on it."""
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The fixed scale and zero point, each of shape ``[1]``."""
        return self.scale, self.zero_point

    def qparams(self) -> QParams:
        """The same as :class:`fxquant.specs.QParams`, 0-d."""
        return QParams(self.scale.reshape(()), self.zero_point.reshape(()), self.spec)

    def extra_repr(self) -> str:
        """The spec in one line."""
        return self.spec.short()


class _NoQParams(ObserverBase):
    """Gives back what passes; there is nothing to make parameters of."""

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back without a look."""
        return x

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Never: nothing is summarized here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"calculate_qparams should not be called for {type(self).__name__}")


class PlaceholderObserver(_NoQParams):
    """Looks at nothing and only says which dtype is wanted: dynamic, float16, or none at all.

    Args:
        dtype: what to quantize to; float32 and float64 mean "leave it in floating point".
        custom_op_name: kept for torch.ao's signature; stored as ``custom_op``.
        compute_dtype: an old spelling of ``is_dynamic=True``.
        quant_min: smallest integer, where ``dtype`` is one.
        quant_max: largest integer.
        qscheme: default ``torch.per_tensor_affine``.
        eps: smallest scale.
        is_dynamic: parameters are chosen at run time.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic or compute_dtype is not None)
        if compute_dtype is not None:
            warnings.warn(
                "PlaceholderObserver(compute_dtype=...) is an old spelling of is_dynamic=True",
                ConfigWarning,
                stacklevel=2,
            )
        self.custom_op = custom_op_name
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        self.eps = DEFAULT_EPS if eps is None else float(eps)
        _ = self.spec  # validates

    @property
    def spec(self) -> QuantSpec | None:
        """How the tensor is to be quantized; ``None`` for float32 and float64."""
        if self.dtype in (torch.float32, torch.float64):
            return None
        low, high = integer_range(self.dtype, self.quant_min, self.quant_max)
        return QuantSpec(
            dtype=storage_dtype(self.dtype),
            qscheme=self.qscheme,
            quant_min=low,
            quant_max=high,
            is_dynamic=self.is_dynamic,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """The dtype in one line."""
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"


class NoopObserver(_NoQParams):
    """Looks at nothing and wants nothing: the tensor stays in floating point.

    Args:
        dtype: kept for torch.ao's signature.
        custom_op_name: kept for torch.ao's signature; stored as ``custom_op``.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype)
        self.custom_op = custom_op_name


class ReuseInputObserver(_NoQParams):
    """Says that an op's output shares the observer of its input; is never inserted itself."""

    def __init__(self) -> None:
        super().__init__(torch.uint8)


class RecordingObserver(_NoQParams):
    """Keeps a copy of every tensor, for debugging; its memory grows with every batch.

    Args:
        dtype: kept for torch.ao's signature.
    """

    def __init__(self, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__(dtype)
        self.tensor_val: list[Tensor] = []

    @property
    def was_observed(self) -> bool:
        """Whether at least one tensor has been recorded."""
        return bool(self.tensor_val)

    @torch.jit.unused
    def forward(self, x: Tensor) -> Tensor:
        """Record a copy of ``x`` and give it back."""
        if self.observer_enabled:
            self.tensor_val.append(x.detach().clone())
        return x

    @torch.jit.unused
    def get_tensor_value(self) -> list[Tensor]:
        """The recorded tensors, in order."""
        return self.tensor_val
