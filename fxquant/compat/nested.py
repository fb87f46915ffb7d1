"""Parts of a model that are quantized on their own: standalone modules and custom modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from fxquant.backend_config import BackendConfig
from fxquant.compat.custom_modules import (
    converted_module,
    is_custom,
    observed_module,
    quant_type,
)
from fxquant.custom_config import (
    ConvertCustomConfig,
    PrepareCustomConfig,
    StandaloneModuleConfigEntry,
)
from fxquant.errors import ConfigWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.metadata import record_of
from fxquant.passes.nest_modules import Nested
from fxquant.passes.to_reference import is_observer
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping, resolve
from fxquant.rewriter import leaves_of

#: Prepares a standalone module: (module, mapping, example inputs, custom config, backend config).
Prepare = Callable[
    [nn.Module, QConfigMapping, Any, PrepareCustomConfig, BackendConfig | None], QuantGraphModule
]
_NON_TRACEABLE: Final = "listed as non-traceable, so it stays as it is"
_STANDALONE: Final = "a standalone module, quantized on its own"


@dataclass(frozen=True)
class Nesting:
    """Makes of a float module what is quantized on its own, where the config says so.

    Attributes:
        config: names standalone, custom and non-traceable modules.
        prepare: prepares a standalone module.
        mapping: qconfigs of what is inside a custom module.
        diagnostics: takes the warnings.
    """

    config: PrepareCustomConfig
    prepare: Prepare
    mapping: QConfigMapping
    diagnostics: Diagnostics

    def leaves(self, model: nn.Module) -> dict[str, str]:
        """Paths of the submodules of ``model`` that are not traced into, with the reason."""
        found = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if not path:
                continue
            if self._entry(path, module) is not None:
                found[path] = _STANDALONE
            elif is_custom(self.config, module):
                found[path] = "a custom module"
            elif (
                path in self.config.non_traceable_module_names
                or type(module) in self.config.non_traceable_module_classes
            ):
                found[path] = _NON_TRACEABLE
        return found

    def __call__(self, path: str, module: nn.Module, qconfig: QConfig | None) -> Nested | None:
        """What becomes of the module at ``path``; ``None`` where the config does not name it."""
        entry = self._entry(path, module)
        if entry is not None:
            return self._standalone(entry, module, qconfig)

        def inside(inner: str, part: nn.Module) -> QConfig | None:
            at = f"{path}.{inner}"
            return resolve(self.mapping, module_path=at, target_types=(type(part),)).qconfig

        observed = observed_module(self.config, module, qconfig, inside)
        if observed is None and qconfig is not None and is_custom(self.config, module):
            self._tell_other_kind(path, module, qconfig)
        return observed

    def _tell_other_kind(self, path: str, module: nn.Module, qconfig: QConfig) -> None:
        """Say that a custom module is not mapped for how its qconfig quantizes."""
        wanted = quant_type(qconfig)
        if wanted is None:
            return
        mapping = self.config.float_to_observed_mapping
        known = [kind.name.lower() for kind, classes in mapping.items() if type(module) in classes]
        self.diagnostics.warn(
            f"module {path!r} ({type(module).__name__}) is a custom module for"
            f" {' and '.join(known)} quantization, and its qconfig is {wanted.name.lower()}; it"
            " computes in floating point. Map its class for that with"
            " set_float_to_observed_mapping, or set None for it",
            ConfigWarning,
        )

    def _entry(self, path: str, module: nn.Module) -> StandaloneModuleConfigEntry | None:
        named = self.config.standalone_module_names.get(path)
        return named or self.config.standalone_module_classes.get(type(module))

    def _standalone(
        self, entry: StandaloneModuleConfigEntry, module: nn.Module, qconfig: QConfig | None
    ) -> Nested:
        rules = entry.qconfig_mapping or QConfigMapping().set_global(qconfig)
        config = entry.prepare_custom_config or PrepareCustomConfig()
        child = self.prepare(module, rules, entry.example_inputs, config, entry.backend_config)
        return nested_standalone(child, tuple(config.input_quantized_indexes), qconfig)


def nested_standalone(
    child: QuantGraphModule, takes: tuple[int, ...], qconfig: QConfig | None
) -> Nested:
    """How a graph holds a standalone module.

    Args:
        child: the module, prepared.
        takes: positions of its inputs that come quantized.
        qconfig: by which the graph around it would quantize it.
    """
    return Nested(
        module=child,
        takes=takes,
        gives=_quantized_results(child),
        qconfig=qconfig or _first_qconfig(child),
        reason=_STANDALONE,
    )


def _quantized_results(child: QuantGraphModule) -> tuple[int, ...]:
    """The results that leave quantized: those of the config that the graph does quantize."""
    returned = next(node for node in child.graph.nodes if node.op == "output")
    wanted = record_of(returned).takes_quantized
    return tuple(
        position
        for position, leaves in enumerate(leaves_of(returned))
        if position in wanted
        and leaves
        and all(is_observer(leaf) or record_of(leaf).gives_quantized for leaf in leaves)
    )


def _first_qconfig(child: QuantGraphModule) -> QConfig | None:
    """By which a module quantizes, for what the graph around it says nothing about."""
    records = map(record_of, child.graph.nodes)
    return next((record.qconfig for record in records if record.annotation is not None), None)


@dataclass(frozen=True)
class Converting:
    """Converts what :class:`Nesting` put in.

    Attributes:
        config: names the classes of quantized custom modules.
        convert: converts a standalone module.
    """

    config: ConvertCustomConfig
    convert: Callable[[QuantGraphModule], QuantGraphModule]

    def __call__(
        self, path: str, module: nn.Module, qconfig: QConfig | None, observed: Callable[[], Any]
    ) -> nn.Module | None:
        """The converted module; ``None`` for one that is no standalone or custom module."""
        if isinstance(module, QuantGraphModule) and module.state.stage is Stage.PREPARED:
            return self.convert(module)
        return converted_module(self.config, module, qconfig, observed)
