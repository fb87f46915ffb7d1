"""``BackendConfig``: which patterns a backend quantizes, with which dtypes, observed how.

::

    BackendConfig("mine").set_backend_pattern_config(
        BackendPatternConfig((torch.nn.Conv2d, torch.nn.ReLU))
        .set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        .add_dtype_config(DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float32))
    )

Patterns are in forward order. The setters of the older, reversed form exist and are converted
(:attr:`BackendPatternConfig.forward`). :func:`as_backend_config` reads torch.ao's objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Final

from fxquant.backend_patterns import (
    PatternCall,
    PatternForm,
    forward_of,
    forward_of_reversed,
    reversed_of,
)
from fxquant.dict_policy import OWN, DictPolicy, note_legacy_form, read_keys
from fxquant.dtype_config import DTypeConfig, as_dtype_config
from fxquant.errors import ConfigError, Diagnostics


class ObservationType(Enum):
    """How the output of a pattern is observed."""

    OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT = 0
    """It has quantization parameters of its own."""
    OUTPUT_SHARE_OBSERVER_WITH_INPUT = 1
    """It has the parameters of its first input."""
    INPUT_OUTPUT_NOT_OBSERVED = 2
    """Neither input nor output is observed: the op passes quantized tensors on, or reads shapes."""


# Attribute of a BackendPatternConfig -> key of its dict form, in the order of the latter.
_DICT_KEYS: Final = {
    "pattern": "pattern",
    "observation_type": "observation_type",
    "dtype_configs": "dtype_configs",
    "root_module": "root_module",
    "qat_module": "qat_module",
    "reference_quantized_module": "reference_quantized_module_for_root",
    "fused_module": "fused_module",
    "fuser_method": "fuser_method",
    "_root_node_getter": "root_node_getter",
    "_extra_inputs_getter": "extra_inputs_getter",
    "_num_tensor_args_to_observation_type": "num_tensor_args_to_observation_type",
    "_input_type_to_index": "input_type_to_index",
    "_pattern_complex_format": "pattern_complex_format",
}
# torch.ao documents this key and does not read it.
_DOCUMENTED_KEY: Final = "reference_quantized_module"


class BackendPatternConfig:
    """How one pattern is quantized on a backend.

    Args:
        pattern: a module class, a function, a method's name, or a tuple of two or three of them in
            forward order.

    Attributes:
        pattern: as given, or ``None`` where the pattern was given in reverse.
        observation_type: how the output is observed.
        dtype_configs: the combinations of dtypes that are served.
        root_module: of a fused module: the class that holds the weight.
        qat_module: the class that is trained in its place.
        reference_quantized_module: the class that takes the root module's place in a reference
            model.
        fused_module: the class that a match is fused to.
        fuser_method: makes it: ``fuser_method(is_qat, *modules)``.
    """

    dict_policy: ClassVar[DictPolicy] = OWN
    """How :meth:`from_dict` reads, unless told otherwise."""

    def __init__(self, pattern: PatternForm = None) -> None:
        self.pattern: PatternForm = None
        self.observation_type = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
        self.dtype_configs: list[DTypeConfig] = []
        self.root_module: type | None = None
        self.qat_module: type | None = None
        self.reference_quantized_module: type | None = None
        self.fused_module: type | None = None
        self.fuser_method: Callable[..., Any] | None = None
        self._root_node_getter: Callable[..., Any] | None = None
        self._extra_inputs_getter: Callable[..., Any] | None = None
        self._num_tensor_args_to_observation_type: dict[int, ObservationType] = {}
        self._input_type_to_index: dict[str, int] = {}
        self._pattern_complex_format: PatternForm = None
        if pattern is not None:
            self.set_pattern(pattern)

    def set_pattern(self, pattern: PatternForm) -> BackendPatternConfig:
        """Set the pattern, in forward order.

        Raises:
            ConfigError: no pattern, or one was set in reverse before.
        """
        if self._pattern_complex_format is not None:
            raise ConfigError("Only one of 'pattern' or 'pattern_complex_format' can be set")
        forward_of(pattern)
        self.pattern = pattern
        return self

    def set_observation_type(self, observation_type: object) -> BackendPatternConfig:
        """Set how the output is observed.

        Raises:
            ConfigError: no ``ObservationType``.
        """
        self.observation_type = as_observation_type(observation_type)
        return self

    def add_dtype_config(self, dtype_config: object) -> BackendPatternConfig:
        """Allow one more combination of dtypes.

        Raises:
            ConfigError: no ``DTypeConfig``.
        """
        self.dtype_configs.append(as_dtype_config(dtype_config, "add_dtype_config"))
        return self

    def set_dtype_configs(self, dtype_configs: Sequence[object]) -> BackendPatternConfig:
        """Set the combinations of dtypes, in place of those allowed before.

        Raises:
            ConfigError: not all are ``DTypeConfig``.
        """
        self.dtype_configs = [as_dtype_config(d, "set_dtype_configs") for d in dtype_configs]
        return self

    def set_root_module(self, root_module: type) -> BackendPatternConfig:
        """Set the class that holds the weight."""
        self.root_module = _class("root_module", root_module)
        return self

    def set_qat_module(self, qat_module: type) -> BackendPatternConfig:
        """Set the class that is trained in the pattern's place."""
        self.qat_module = _class("qat_module", qat_module)
        return self

    def set_reference_quantized_module(
        self, reference_quantized_module: type
    ) -> BackendPatternConfig:
        """Set the class that takes the root module's place in a reference model."""
        self.reference_quantized_module = _class(
            "reference_quantized_module", reference_quantized_module
        )
        return self

    def set_fused_module(self, fused_module: type) -> BackendPatternConfig:
        """Set the class that a match is fused to."""
        self.fused_module = _class("fused_module", fused_module)
        return self

    def set_fuser_method(self, fuser_method: Callable[..., Any]) -> BackendPatternConfig:
        """Set the function that fuses a match: ``fuser_method(is_qat, *modules)``."""
        self.fuser_method = _function("fuser_method", fuser_method)
        return self

    def _set_root_node_getter(self, root_node_getter: Callable[..., Any]) -> BackendPatternConfig:
        """Set the function that finds the node of the root module in a match."""
        self._root_node_getter = _function("root_node_getter", root_node_getter)
        return self

    def _set_extra_inputs_getter(
        self, extra_inputs_getter: Callable[..., Any]
    ) -> BackendPatternConfig:
        """Set the function that finds the further inputs of a match."""
        self._extra_inputs_getter = _function("extra_inputs_getter", extra_inputs_getter)
        return self

    def _set_num_tensor_args_to_observation_type(
        self, num_tensor_args_to_observation_type: Mapping[int, object]
    ) -> BackendPatternConfig:
        """Set how the output is observed by the number of operands that are tensors."""
        self._num_tensor_args_to_observation_type = {
            int(count): as_observation_type(kind)
            for count, kind in num_tensor_args_to_observation_type.items()
        }
        return self

    def _set_input_type_to_index(
        self, input_type_to_index: Mapping[str, int]
    ) -> BackendPatternConfig:
        """Set which positional argument is the weight, and which the bias."""
        self._input_type_to_index = dict(input_type_to_index)
        return self

    def _set_pattern_complex_format(self, pattern: PatternForm) -> BackendPatternConfig:
        """Set the pattern as a nested tuple in reverse, an op before its operands.

        Raises:
            ConfigError: no pattern, or one was set in forward order before.
        """
        if self.pattern is not None:
            raise ConfigError("Only one of 'pattern' or 'pattern_complex_format' can be set")
        forward_of_reversed(pattern)
        self._pattern_complex_format = pattern
        return self

    @property
    def forward(self) -> PatternCall:
        """The pattern as a tree in forward order, whichever way it was set.

        Raises:
            ConfigError: no pattern was set.
        """
        if self.pattern is not None:
            return forward_of(self.pattern)
        if self._pattern_complex_format is not None:
            return forward_of_reversed(self._pattern_complex_format)
        raise ConfigError("Either 'pattern' or 'pattern_complex_format' must be specified")

    @property
    def key(self) -> PatternForm:
        """The pattern as a nested tuple in reverse: what a config is registered under."""
        if self.pattern is not None:
            return reversed_of(self.pattern)
        self.forward  # noqa: B018  # raises where there is none
        return self._pattern_complex_format

    def to_dict(self) -> dict[str, Any]:
        """What is set, under the keys that :meth:`from_dict` reads."""
        found: dict[str, Any] = {}
        for attribute, key in _DICT_KEYS.items():
            value = getattr(self, attribute)
            if attribute == "dtype_configs":
                found[key] = [config.to_dict() for config in value]
            elif value is not None and value != {}:
                found[key] = value
        return found

    @classmethod
    def from_dict(
        cls, backend_pattern_config_dict: Mapping[str, Any], policy: DictPolicy | None = None
    ) -> BackendPatternConfig:
        """Read what :meth:`to_dict` wrote.

        Args:
            backend_pattern_config_dict: any of the keys ``pattern``, ``observation_type``,
                ``dtype_configs``, ``root_module``, ``qat_module``,
                ``reference_quantized_module_for_root`` (or ``reference_quantized_module``),
                ``fused_module``, ``fuser_method``, ``root_node_getter``, ``extra_inputs_getter``,
                ``num_tensor_args_to_observation_type``, ``input_type_to_index`` and
                ``pattern_complex_format``.
            policy: about unknown keys; by default the class's.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another type.
        """
        policy = cls.dict_policy if policy is None else policy
        return _pattern_from_dict(cls(), backend_pattern_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BackendPatternConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        unset = self.pattern is None and self._pattern_complex_format is None
        parts = ["no pattern" if unset else str(self.forward), self.observation_type.name]
        parts.extend(repr(config) for config in self.dtype_configs)
        for name in ("root_module", "qat_module", "reference_quantized_module", "fused_module"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={value.__name__}")
        return f"BackendPatternConfig({', '.join(parts)})"


def _pattern_from_dict(
    made: BackendPatternConfig,
    given: object,
    policy: DictPolicy,
    diagnostics: Diagnostics | None,
) -> BackendPatternConfig:
    where = "backend_pattern_config_dict"
    known = (*_DICT_KEYS.values(), _DOCUMENTED_KEY)
    entries: dict[str, Any] = dict(read_keys(given, known, where, policy, diagnostics))
    reference = entries.pop(_DOCUMENTED_KEY, None)
    if reference is not None:
        entries.setdefault("reference_quantized_module_for_root", reference)
    configs = entries.pop("dtype_configs", None) or ()
    made.dtype_configs = [
        as_dtype_config(config, f'{where}["dtype_configs"]', policy, diagnostics)
        for config in configs
    ]
    for key, setter in _SETTERS.items():
        if entries.get(key) is not None:
            setter(made, entries[key])
    return made


_SETTERS: Final[dict[str, Callable[[BackendPatternConfig, Any], object]]] = {
    "pattern": BackendPatternConfig.set_pattern,
    "observation_type": BackendPatternConfig.set_observation_type,
    "root_module": BackendPatternConfig.set_root_module,
    "qat_module": BackendPatternConfig.set_qat_module,
    "reference_quantized_module_for_root": BackendPatternConfig.set_reference_quantized_module,
    "fused_module": BackendPatternConfig.set_fused_module,
    "fuser_method": BackendPatternConfig.set_fuser_method,
    "root_node_getter": BackendPatternConfig._set_root_node_getter,
    "extra_inputs_getter": BackendPatternConfig._set_extra_inputs_getter,
    "num_tensor_args_to_observation_type": (
        BackendPatternConfig._set_num_tensor_args_to_observation_type
    ),
    "input_type_to_index": BackendPatternConfig._set_input_type_to_index,
    "pattern_complex_format": BackendPatternConfig._set_pattern_complex_format,
}


class BackendConfig:
    """The patterns that a backend quantizes.

    Args:
        name: for messages.
    """

    dict_policy: ClassVar[DictPolicy] = OWN
    """How :meth:`from_dict` reads, unless told otherwise."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._pattern_complex_format_to_config: dict[PatternForm, BackendPatternConfig] = {}

    def set_name(self, name: str) -> BackendConfig:
        """Set the name."""
        self.name = name
        return self

    def set_backend_pattern_config(self, config: object) -> BackendConfig:
        """Add a pattern's config, in place of one for the same pattern.

        Raises:
            ConfigError: no ``BackendPatternConfig``, or one without a pattern.
        """
        known = as_backend_pattern_config(config)
        self._pattern_complex_format_to_config[known.key] = known
        return self

    def set_backend_pattern_configs(self, configs: Sequence[object]) -> BackendConfig:
        """Add several, each in place of one for the same pattern.

        Raises:
            ConfigError: one is no ``BackendPatternConfig``, or has no pattern.
        """
        for config in configs:
            self.set_backend_pattern_config(config)
        return self

    @property
    def configs(self) -> list[BackendPatternConfig]:
        """A new list of the patterns' configs, in the order they were added."""
        return list(self._pattern_complex_format_to_config.values())

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., "configs": [...]}``, which :meth:`from_dict` reads back."""
        return {"name": self.name, "configs": [config.to_dict() for config in self.configs]}

    @classmethod
    def from_dict(
        cls, backend_config_dict: Mapping[str, Any], policy: DictPolicy | None = None
    ) -> BackendConfig:
        """Read a dict.

        Args:
            backend_config_dict: the keys ``name`` and ``configs``, a list of
                ``BackendPatternConfig`` or their dicts.
            policy: about unknown keys; by default the class's.

        Raises:
            UnknownKeyError: another key, where the policy says so.
            ConfigError: a value of another type.
        """
        policy = cls.dict_policy if policy is None else policy
        return _config_from_dict(cls(), backend_config_dict, policy, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BackendConfig):
            return NotImplemented
        mine, theirs = (
            self._pattern_complex_format_to_config,
            (other._pattern_complex_format_to_config),
        )
        return self.name == other.name and mine == theirs

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        inside = "".join(f"\n  {config!r}" for config in self.configs)
        return f"BackendConfig({self.name!r}{inside})"


def _config_from_dict(
    made: BackendConfig, given: object, policy: DictPolicy, diagnostics: Diagnostics | None
) -> BackendConfig:
    entries = read_keys(given, ("name", "configs"), "backend_config_dict", policy, diagnostics)
    made.set_name(str(entries.get("name", "")))
    configs = entries.get("configs", ())
    if not isinstance(configs, list | tuple):
        raise ConfigError(f"backend_config_dict['configs'] needs a list, got {configs!r}")
    for config in configs:
        if isinstance(config, Mapping):
            config = _pattern_from_dict(BackendPatternConfig(), config, policy, diagnostics)
        elif not _is_pattern_config(config):
            raise ConfigError(
                f"Expected backend_config_dict['configs'] to be a dictionary, got {config!r}"
            )
        made.set_backend_pattern_config(config)
    return made


def as_observation_type(value: object) -> ObservationType:
    """Read fxquant's or torch.ao's ``ObservationType``, or its number, as fxquant's.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, ObservationType):
        return value
    name = getattr(value, "name", None)
    if isinstance(value, Enum) and name in ObservationType.__members__:
        return ObservationType[str(name)]
    if value in (0, 1, 2):
        return ObservationType(value)
    known = ", ".join(ObservationType.__members__)
    raise ConfigError(f"observation_type needs one of {known}, got {value!r}")


def _is_pattern_config(value: object) -> bool:
    return hasattr(value, "dtype_configs") and hasattr(value, "observation_type")


def as_backend_pattern_config(value: object) -> BackendPatternConfig:
    """Read fxquant's or torch.ao's ``BackendPatternConfig`` as fxquant's.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, BackendPatternConfig):
        return value
    if not _is_pattern_config(value):
        raise ConfigError(f"expected a BackendPatternConfig, got {type(value).__name__} {value!r}")
    entries = {
        key: getattr(value, attribute)
        for attribute, key in _DICT_KEYS.items()
        if getattr(value, attribute, None) is not None
    }
    return _pattern_from_dict(BackendPatternConfig(), entries, OWN, None)


def as_backend_config(
    value: object,
    policy: DictPolicy = OWN,
    diagnostics: Diagnostics | None = None,
) -> BackendConfig | None:
    """Read fxquant's or torch.ao's ``BackendConfig``, or its dict form, as fxquant's.

    Args:
        value: what the user gave; ``None`` stays.
        policy: how dicts are read.
        diagnostics: where warnings go.

    Returns:
        ``value`` itself if it is fxquant's, else a new config.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None or isinstance(value, BackendConfig):
        return value
    if isinstance(value, Mapping):
        note_legacy_form("backend_config_dict", "prepare", "BackendConfig", policy, diagnostics)
        return _config_from_dict(BackendConfig(), value, policy, diagnostics)
    if hasattr(value, "configs") and hasattr(value, "name"):
        return BackendConfig(str(value.name)).set_backend_pattern_configs(list(value.configs))
    raise ConfigError(
        f"backend_config needs a BackendConfig or a dict, got {type(value).__name__} {value!r}"
    )


def _class(name: str, value: object) -> type:
    if not isinstance(value, type):
        raise ConfigError(f"{name} needs a class, got {value!r}")
    return value


def _function(name: str, value: object) -> Callable[..., Any]:
    if not callable(value):
        raise ConfigError(f"{name} needs a function, got {value!r}")
    return value
