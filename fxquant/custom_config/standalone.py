"""How a submodule is prepared on its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fxquant.backend_config import BackendConfig
from fxquant.qconfig_mapping import QConfigMapping

if TYPE_CHECKING:
    from fxquant.custom_config.prepare import PrepareCustomConfig


@dataclass(frozen=True, slots=True)
class StandaloneModuleConfigEntry:
    """How a submodule is prepared on its own.

    Attributes:
        qconfig_mapping: its mapping; ``None`` takes that of the model around it.
        example_inputs: inputs of the submodule.
        prepare_custom_config: its custom config, with which of its inputs and outputs are
            quantized; ``None`` is an empty one.
        backend_config: its backend config; ``None`` takes that of the model around it.
    """

    qconfig_mapping: QConfigMapping | None
    example_inputs: tuple[Any, ...]
    prepare_custom_config: PrepareCustomConfig | None
    backend_config: BackendConfig | None


def fields_of(entry: Any) -> tuple[Any, ...]:
    """The fields of an entry for a standalone module, fxquant's or torch.ao's."""
    return tuple(getattr(entry, field.name) for field in fields(StandaloneModuleConfigEntry))
