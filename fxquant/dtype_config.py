"""``DTypeConfig``: one combination of dtypes that a backend serves, with its constraints.

The dtypes are those that quantize steps are given, not those of the tensors that kernels exchange:
dynamic quantization has ``input_dtype=torch.quint8`` and ``output_dtype=torch.float32``. ``None``
says nothing about a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from fxquant.dict_policy import OWN, DictPolicy, read_keys
from fxquant.errors import ConfigError, Diagnostics

_KEYS = ("input_dtype", "output_dtype", "weight_dtype", "bias_dtype", "is_dynamic")


@dataclass(frozen=True, slots=True)
class DTypeWithConstraints:
    """A dtype, and what its integers and scales must be.

    Attributes:
        dtype: of the integers, such as ``torch.quint8``; ``None`` allows any.
        quant_min_lower_bound: the smallest integer must not be below it.
        quant_max_upper_bound: the largest integer must not be above it.
        scale_min_lower_bound: the smallest possible scale (the observer's ``eps``) must not be
            below it.
        scale_max_upper_bound: recorded only: no observer bounds its scale from above.
        scale_exact_match: the scale of fixed quantization parameters.
        zero_point_exact_match: the zero point of fixed quantization parameters.

    Raises:
        ConfigError: something else than a dtype, or bounds that exclude everything.
    """

    dtype: torch.dtype | None = None
    quant_min_lower_bound: int | float | None = None
    quant_max_upper_bound: int | float | None = None
    scale_min_lower_bound: int | float | None = None
    scale_max_upper_bound: int | float | None = None
    scale_exact_match: float | None = None
    zero_point_exact_match: int | None = None

    def __post_init__(self) -> None:
        dtype: object = self.dtype
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ConfigError(f"DTypeWithConstraints needs a torch.dtype, got {dtype!r}")
        for low, high in (
            ("quant_min_lower_bound", "quant_max_upper_bound"),
            ("scale_min_lower_bound", "scale_max_upper_bound"),
        ):
            lower, upper = getattr(self, low), getattr(self, high)
            if lower is not None and upper is not None and lower > upper:
                raise ConfigError(f"{low}={lower} is above {high}={upper}: nothing would fit")

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return f"DTypeWithConstraints({shown})"


_ANY = DTypeWithConstraints()


@dataclass(frozen=True, slots=True, init=False, repr=False)
class DTypeConfig:
    """The dtypes of an op's input, output, weight and bias that a backend serves together.

    Args:
        input_dtype: a dtype, with or without constraints; ``None`` says nothing.
        output_dtype: likewise.
        weight_dtype: likewise.
        bias_dtype: a dtype.
        is_dynamic: the input is quantized with parameters computed at run time.

    Attributes:
        input_dtype_with_constraints: always a :class:`DTypeWithConstraints`.
        output_dtype_with_constraints: likewise.
        weight_dtype_with_constraints: likewise.

    Raises:
        ConfigError: something else than a dtype.
    """

    input_dtype_with_constraints: DTypeWithConstraints
    output_dtype_with_constraints: DTypeWithConstraints
    weight_dtype_with_constraints: DTypeWithConstraints
    bias_dtype: torch.dtype | None
    is_dynamic: bool | None

    #: How :meth:`from_dict` reads, unless told otherwise.
    dict_policy: ClassVar[DictPolicy] = OWN

    def __init__(
        self,
        input_dtype: torch.dtype | DTypeWithConstraints | None = None,
        output_dtype: torch.dtype | DTypeWithConstraints | None = None,
        weight_dtype: torch.dtype | DTypeWithConstraints | None = None,
        bias_dtype: torch.dtype | None = None,
        is_dynamic: bool | None = None,
    ) -> None:
        write = object.__setattr__
        write(self, "input_dtype_with_constraints", _constrained("input_dtype", input_dtype))
        write(self, "output_dtype_with_constraints", _constrained("output_dtype", output_dtype))
        write(self, "weight_dtype_with_constraints", _constrained("weight_dtype", weight_dtype))
        if bias_dtype is not None and not isinstance(bias_dtype, torch.dtype):
            raise ConfigError(f"Expected bias_dtype to be a torch.dtype, got {bias_dtype!r}")
        write(self, "bias_dtype", bias_dtype)
        write(self, "is_dynamic", is_dynamic)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype of the input, without its constraints."""
        return self.input_dtype_with_constraints.dtype

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output, without its constraints."""
        return self.output_dtype_with_constraints.dtype

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The dtype of the weight, without its constraints."""
        return self.weight_dtype_with_constraints.dtype

    def to_dict(self) -> dict[str, Any]:
        """What is set, under the names of the arguments; dtypes come with their constraints."""
        found: dict[str, Any] = {}
        for name in ("input", "output", "weight"):
            value = getattr(self, f"{name}_dtype_with_constraints")
            if value.dtype is not None:
                found[f"{name}_dtype"] = value
        if self.bias_dtype is not None:
            found["bias_dtype"] = self.bias_dtype
        if self.is_dynamic is not None:
            found["is_dynamic"] = self.is_dynamic
        return found

    @classmethod
    def from_dict(
        cls, dtype_config_dict: Mapping[str, Any], policy: DictPolicy | None = None
    ) -> DTypeConfig:
        """Read what :meth:`to_dict` wrote.

        Args:
            dtype_config_dict: any of the arguments' names, with dtypes or
                :class:`DTypeWithConstraints`.
            policy: about unknown keys; by default the class's.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another type.
        """
        policy = cls.dict_policy if policy is None else policy
        return cls(**read_keys(dtype_config_dict, _KEYS, "DTypeConfig", policy))  # type: ignore[arg-type]  # checked by __init__

    def __repr__(self) -> str:
        parts = []
        for name, value in self.to_dict().items():
            plain = isinstance(value, DTypeWithConstraints) and value == DTypeWithConstraints(
                value.dtype
            )
            parts.append(f"{name}={value.dtype if plain else value}")
        return f"DTypeConfig({', '.join(parts)})"


def _constrained(name: str, value: object) -> DTypeWithConstraints:
    if value is None:
        return _ANY
    if isinstance(value, torch.dtype):
        return DTypeWithConstraints(value)
    if isinstance(value, DTypeWithConstraints):
        return value
    if hasattr(value, "dtype") and hasattr(value, "quant_min_lower_bound"):  # torch.ao's
        return as_dtype_with_constraints(value)
    raise ConfigError(f"Expected {name} to be a torch.dtype or DTypeWithConstraints, got {value!r}")


def as_dtype_with_constraints(value: object) -> DTypeWithConstraints:
    """Read fxquant's or torch.ao's ``DTypeWithConstraints`` as fxquant's."""
    if isinstance(value, DTypeWithConstraints):
        return value
    names = (field.name for field in fields(DTypeWithConstraints))
    return DTypeWithConstraints(**{name: getattr(value, name, None) for name in names})


def as_dtype_config(
    value: object,
    where: str,
    policy: DictPolicy = OWN,
    diagnostics: Diagnostics | None = None,
) -> DTypeConfig:
    """Read fxquant's or torch.ao's ``DTypeConfig``, or its dict form, as fxquant's.

    Args:
        value: what the user gave.
        where: for what, for the message.
        policy: about unknown keys of a dict.
        diagnostics: where warnings go.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, DTypeConfig):
        return value
    if isinstance(value, Mapping):
        entries: Any = read_keys(value, _KEYS, "DTypeConfig", policy, diagnostics)
        return DTypeConfig(**entries)
    if hasattr(value, "input_dtype_with_constraints") and hasattr(value, "is_dynamic"):
        return DTypeConfig(
            input_dtype=getattr(value, "input_dtype_with_constraints", None),
            output_dtype=getattr(value, "output_dtype_with_constraints", None),
            weight_dtype=getattr(value, "weight_dtype_with_constraints", None),
            bias_dtype=getattr(value, "bias_dtype", None),
            is_dynamic=value.is_dynamic,
        )
    raise ConfigError(
        f"Expected a list of DTypeConfigs in {where}, got {type(value).__name__} {value!r}"
    )
